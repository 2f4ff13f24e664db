"""The launch of the kernel in ``csrc/cpu/ttm.cpp``."""

from __future__ import annotations

import torch

from ...spec.layout import DTYPES
from .._extension import _C, addresses


def ttm(layout, x, y):
    shape = _C.TTMShape(DTYPES.index(x.dtype), *layout[1:])
    _C.ttm_cpu(shape, *addresses(x, y), torch.get_num_threads())
