"""The compiled extension, if there is one."""

from __future__ import annotations

from pathlib import Path

from ..ops.layout import DTYPES


def _why(error: ImportError, package: Path) -> str:
    """What to do about the extension that ``package`` cannot import."""
    if found := sorted(path.name for path in package.glob("_C.*")):
        what = f"the compiled extension, {', '.join(found)}, cannot be loaded ({error})"
    else:
        what = "the compiled extension is missing"
    if (package.parent / "CMakeLists.txt").exists():
        build = f"`python -m pip install -e {package.parent}` builds it there"
        return f"{what} in the source folder: {build}; an installed one is imported from any other folder"
    return f"{what}: install a C++ compiler, then snnkern again (pip install --force-reinstall --no-deps)"


try:
    from .. import _C

    _missing = None
except ImportError as error:
    _C = None
    _missing = _why(error, Path(__file__).parents[1])


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
