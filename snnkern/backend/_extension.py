"""The compiled extension, if there is one."""

from __future__ import annotations

try:
    from .. import _C

    _missing = None
except ImportError as error:
    _C = None
    _missing = (
        "the compiled extension is missing; install snnkern where a C++ compiler is at hand "
        f"(python -m pip install --force-reinstall snnkern). The import said: {error}"
    )


def missing() -> str | None:
    """Why the extension cannot be used, or None."""
    return _missing


def shape_of(layout, x):
    """The extension's LIFShape."""
    from ..ops.lif import DTYPES

    return _C.LIFShape(DTYPES.index(x.dtype), *layout[1:])


def address(t) -> int:
    """Where a tensor's data lies, 0 for None. The caller holds the tensor by a name until the launch is over."""
    return 0 if t is None else t.data_ptr()
