"""The compiled extension, if there is one."""

from __future__ import annotations

from ..ops.layout import DTYPES

try:
    from .. import _C

    _missing = None
except ImportError as error:
    _C = None
    _missing = (
        "the compiled extension is missing; install snnkern again where a C++ compiler is at hand. "
        f"The import said: {error}"
    )


def missing() -> str | None:
    """Why the extension cannot be used, or None."""
    return _missing


# The caller of these holds the tensors by names until the launch is over. Of a tensor, the extension gets the address.


def arguments(spec, layout, split, x, *tensors) -> tuple:
    """What every launcher of the LIF takes first: the neuron, the shape, and where x and the other tensors lie."""
    return spec.compiled, shape_of(layout, split, x), *addresses(x, *tensors)


def shape_of(layout, split, x):
    return _C.LIFShape(DTYPES.index(x.dtype), *layout[1:], *split)


def norm_of(norm):
    """csrc/lif.h's Norm; None: no norm."""
    if norm is None:
        return _C.Norm(1, 1, 0, 0)
    return _C.Norm(norm.channels, norm.period, *addresses(norm.table, norm.residual))


def plan_of(plan, table, sums):
    """csrc/norm.h's NormPlan, for sums (or moments) of any number of parts; None: there are none."""
    parts = 0 if sums is None else (sums.numel() // sums.shape[-1]) // 2
    return _C.NormPlan(DTYPES.index(table.dtype), table.shape[1], parts, *plan)


def addresses(*tensors) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
