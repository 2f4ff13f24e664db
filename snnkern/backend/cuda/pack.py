"""The launches of the kernels in ``csrc/cuda/pack.cuh``, on the current stream of x's device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ...spec.layout import DTYPES
from .. import on
from .program import Grid, prepare, stream_of

THREADS = 256  # kPackThreads


class PackVariant(NamedTuple):
    dtype: int
    wide: bool
    check: bool


def pack(x, bits, check):
    other = torch.zeros(1, dtype=torch.int32, device=x.device) if check else None
    _launch("pack", x, bits, other)
    return not (check and other.item())


def unpack(bits, x):
    _launch("unpack", x, bits, None)


def _launch(name, x, bits, other):
    n, at, device = x.numel(), x.data_ptr(), x.device.index
    if not n:
        return
    variant = PackVariant(DTYPES.index(x.dtype), at % 16 == 0, other is not None)
    with on(x.device):
        launch = _prepared(name, variant, -(-n // (8 * THREADS)), device)
        launch(stream_of(device), at, bits.data_ptr(), 0 if other is None else other.data_ptr(), n)


@lru_cache(maxsize=512)
def _prepared(name, variant, blocks, device):
    return prepare("pack.cuh", name, variant, Grid(blocks, 1, THREADS, 0), [], device)
