"""The launches of the kernels in ``csrc/cpu/pack.cpp``."""

from __future__ import annotations

import torch

from ...spec.layout import DTYPES
from .._extension import _C


def pack(x, bits, check):
    return _C.pack_cpu(DTYPES.index(x.dtype), x.numel(), x.data_ptr(), bits.data_ptr(), torch.get_num_threads())


def unpack(bits, x):
    _C.unpack_cpu(DTYPES.index(x.dtype), x.numel(), bits.data_ptr(), x.data_ptr(), torch.get_num_threads())
