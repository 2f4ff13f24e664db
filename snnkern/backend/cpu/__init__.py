"""C++, vectorised, on several threads; AVX-512, AVX2 or baseline is chosen at run time (``csrc/cpu``)."""

import ctypes

from .._extension import missing
from .bn_lif import bn_backward, bn_gradients, bn_moments, bn_prepare, bn_sums  # noqa: F401
from .lif import lif_backward, lif_forward  # noqa: F401
from .linear import linear_backward, linear_forward, linear_pays  # noqa: F401
from .pack import pack, unpack  # noqa: F401
from .recurrent import recurrent_backward, recurrent_forward, recurrent_weight  # noqa: F401
from .ttm import ttm  # noqa: F401

differentiable = False


def unavailable() -> str | None:
    return missing()


def refuses(device_type, dtype) -> str | None:
    return None if device_type == "cpu" else f"the tensor is on {device_type}, this backend needs it on the CPU"


def keep_freed_memory() -> bool:
    """Makes this process keep the memory it frees, instead of giving large blocks back to the system.

    PyTorch's tensors on the CPU come from the C library. glibc returns blocks of some MiB at every free, and the next
    ones are then faulted in page by page, which can take longer than the kernels that fill them. For training loops,
    which ask for the same sizes again and again. Memory use stays at its peak.

    Returns whether it took effect: on Linux with glibc.

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    m_trim_threshold, m_mmap_max, never = -1, -4, -1
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, never))
