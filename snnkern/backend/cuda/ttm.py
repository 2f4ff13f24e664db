"""The launch of the kernel in ``csrc/cuda/ttm.cu``, on the current stream of x's device."""

from __future__ import annotations

import torch

from ...spec.layout import DTYPES
from .. import on
from .._extension import _C


def ttm(layout, x, y):
    shape = _C.TTMShape(DTYPES.index(x.dtype), *layout[1:])
    with on(x.device):
        _C.ttm_cuda(shape, x.data_ptr(), y.data_ptr(), torch.cuda.current_stream().cuda_stream)
