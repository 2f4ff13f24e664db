"""The launch of the kernel in ``csrc/cpu/ttm.cpp``."""

from __future__ import annotations

import torch

from ...spec.layout import DTYPES
from .._extension import _C


def ttm(layout, x, y):
    shape = _C.TTMShape(DTYPES.index(x.dtype), *layout[1:])
    _C.ttm_cpu(shape, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
