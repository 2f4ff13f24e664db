"""The compiled extension, if there is one."""

from __future__ import annotations

from ..ops.lif import DTYPES

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


def arguments(spec, layout, split, x, *tensors) -> tuple:
    """What every launcher takes first: the neuron, the shape, and where the data of x and the other tensors lies.

    0 stands for None. The caller holds the tensors by names until the launch is over.
    """
    shape = _C.LIFShape(DTYPES.index(x.dtype), *layout[1:], *split)
    return spec.compiled, shape, x.data_ptr(), *[0 if t is None else t.data_ptr() for t in tensors]
