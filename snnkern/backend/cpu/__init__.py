"""C++ with OpenMP, vectorised; AVX-512, AVX2 or baseline is chosen at run time (``csrc/cpu``)."""

from .._extension import missing
from .lif import lif_backward, lif_forward  # noqa: F401

differentiable = False


def unavailable() -> str | None:
    return missing()


def refuses(device_type, dtype) -> str | None:
    return None if device_type == "cpu" else f"the tensor is on {device_type}, this backend needs it on the CPU"
