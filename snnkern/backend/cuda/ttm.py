"""The launch of the kernel in ``csrc/cuda/ttm.cuh``, on the current stream of x's device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ...spec.layout import DTYPES
from .. import on
from .._extension import _C
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
        launch = _launch(layout, DTYPES.index(x.dtype), x.itemsize, not (words[0] | words[1]) & 15, x.device.index)
        launch(stream_of(x.device.index), *words)


@lru_cache(maxsize=512)
def _launch(layout, dtype, size, aligned, device):
    full = 16 // size
    fits = aligned and not (layout.inner | layout.x_outer_stride | layout.x_step_stride) % full
    width = full if fits else 1
    threads = layout.outer * layout.steps_out * (layout.inner // width)
    shape = _C.TTMShape(dtype, *layout[1:])
    grid = Grid(-(-threads // THREADS), 1, THREADS, 0)
    return prepare("ttm.cuh", "ttm", TTMVariant(dtype, width), grid, [_C.bytes_of(shape)], device)
