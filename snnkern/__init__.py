"""snnkern: fused leaky integrate-and-fire neurons for PyTorch."""

from . import losses, nn, surrogate
from ._version import __version__
from .backend import backends
from .backend.cpu import keep_freed_memory
from .convert import convert
from .ops.bn_lif import bn_lif
from .ops.lif import lif
from .ops.linear import linear
from .ops.pack import packed_spikes
from .ops.recurrent import recurrent_lif
from .ops.ttm import ttm

__all__ = [
    "__version__",
    "backends",
    "bn_lif",
    "convert",
    "keep_freed_memory",
    "lif",
    "linear",
    "losses",
    "nn",
    "packed_spikes",
    "recurrent_lif",
    "surrogate",
    "ttm",
]
