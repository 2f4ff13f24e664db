"""The launches of the kernels in ``csrc/cpu/pack.cpp``."""

from __future__ import annotations

import torch

from ...spec.layout import DTYPES
from .._extension import _C, addresses


def pack(x, bits, check):
    return _C.pack_cpu(DTYPES.index(x.dtype), x.numel(), *addresses(x, bits), torch.get_num_threads())


def unpack(bits, x):
    _C.unpack_cpu(DTYPES.index(x.dtype), x.numel(), *addresses(bits, x), torch.get_num_threads())
