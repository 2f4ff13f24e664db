"""Plain PyTorch, one operation after the other: the specification, and the backend of last resort."""

from .bn_lif import bn_lif  # noqa: F401
from .lif import lif  # noqa: F401
from .pack import pack, unpack  # noqa: F401
from .ttm import ttm  # noqa: F401

differentiable = True


def unavailable() -> str | None:
    return None


def refuses(device_type, dtype) -> str | None:
    return None
