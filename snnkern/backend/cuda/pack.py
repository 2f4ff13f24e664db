"""The launches of the kernels in ``csrc/cuda/pack.cu``, on the current stream of x's device."""

from __future__ import annotations

import torch

from ...spec.layout import DTYPES
from .. import on
from .._extension import _C


def pack(x, bits, check):
    other = torch.zeros(1, dtype=torch.int32, device=x.device) if check else None
    flag = other.data_ptr() if check else 0
    with on(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.pack_cuda(DTYPES.index(x.dtype), x.numel(), x.data_ptr(), bits.data_ptr(), flag, stream)
    return not (check and other.item())


def unpack(bits, x):
    with on(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.unpack_cuda(DTYPES.index(x.dtype), x.numel(), bits.data_ptr(), x.data_ptr(), stream)
