"""The launch of the kernel in ``csrc/cuda/ttm.cuh``, on the current stream of x's device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ...spec.layout import DTYPES
from .. import on
from .._extension import _C
from .lif import fits
from .program import Grid, prepare, stream_of

THREADS = 256  # kTTMThreads


class TTMVariant(NamedTuple):
    dtype: int
    width: int


def ttm(layout, x, y):
    if not y.numel():
        return
    words = x.data_ptr(), y.data_ptr()
    with on(x.device):
        launch = _launch(layout, x.dtype, not (words[0] | words[1]) & 15, x.device.index)
        launch(stream_of(x.device.index), *words)


@lru_cache(maxsize=512)
def _launch(layout, dtype, aligned, device):
    full, code = 16 // dtype.itemsize, DTYPES.index(dtype)
    width = full if aligned and fits(layout, full) else 1
    threads = layout.outer * layout.steps_out * (layout.inner // width)
    shape = _C.TTMShape(code, *layout[1:])
    grid = Grid(-(-threads // THREADS), 1, THREADS, 0)
    return prepare("ttm.cuh", "ttm", TTMVariant(code, width), grid, [_C.bytes_of(shape)], device)
