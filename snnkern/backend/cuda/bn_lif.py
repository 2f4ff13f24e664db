"""Launches of the kernels in ``csrc/cuda/norm.cuh`` and ``bn_lif.cuh``; see csrc/norm.h.

On the current stream of the tensors' device; nothing here waits for the device.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch

from ...spec.layout import DTYPES
from ...spec.split import CHUNK, Split
from .. import on
from .._extension import _C, addresses, plan_of
from .program import Grid, prepare, stream_of

MOMENT_THREADS, CHANNEL_THREADS = 256, 32  # kMomentThreads, kChannelThreads
BAND = 64  # neurons of a run that a block has at least, if there are as many
MOST_PARTS = 64  # which one thread adds up
SETUP = 4  # a block starts and adds up in about the time of so many items a thread


class MomentsVariant(NamedTuple):
    dtype: int
    width: int
    lanes: int


class NormVariant(NamedTuple):
    training: bool


class Bands(NamedTuple):
    """How blocks share out the neurons of all channels: csrc/cuda/channels.cuh's Bands."""

    channels: int
    period: int
    width: int
    parts: int

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.width) * self.parts

    def bytes(self) -> bytes:
        return struct.pack("=4q", *self)


def bn_moments(layout, norm, y):
    if not y.numel():
        return torch.zeros((3, norm.channels), dtype=torch.float64, device=y.device)
    at, device = y.data_ptr(), y.device.index
    with on(y.device):
        launch, parts = _moments(layout, norm.channels, norm.period, y.dtype, at % 16 == 0, device)
        moments = torch.empty((2 * parts + 1, norm.channels), dtype=torch.float64, device=y.device)
        launch(stream_of(device), at, moments.data_ptr())
    return moments


def bn_prepare(plan, moments, parameters, table):
    _of_channels("prepare", moments is not None, plan, table, moments, (moments, *parameters, table))


def bn_gradients(plan, table, sums, all_sums, affine, pull_push):
    """``affine``, [2, channels], receives the gradients of weight and bias."""
    _of_channels("gradients", pull_push is not None, plan, table, sums, (table, sums, all_sums, affine, pull_push))


def _of_channels(name, training, plan, table, sums, tensors):
    if table.numel():
        device, parts = table.device.index, 0 if sums is None else len(sums) // 2
        with on(table.device):
            launch = _channels(name, NormVariant(training), plan, table.shape[1], parts, device)
            launch(stream_of(device), *addresses(*tensors))


@lru_cache(maxsize=512)
def _channels(name, variant, plan, channels, parts, device):
    given = _C.bytes_of(_C.NormPlan(DTYPES.index(torch.float32), channels, parts, *plan))
    grid = Grid(-(-channels // CHANNEL_THREADS), 1, CHANNEL_THREADS, 0)
    return prepare("norm.cuh", name, variant, grid, [given], device)


@lru_cache(maxsize=512)
def _moments(layout, channels, period, dtype, aligned, device):
    width, lanes = pack_of(layout, channels, period, dtype, aligned, MOMENT_THREADS)
    places = processors(device) * (4 if lanes == 1 else 3 if lanes <= 4 else 2)  # its launch bounds
    rows = layout.outer * layout.inner // (channels * period) * -(-layout.steps // CHUNK)
    bands = bands_of(channels, period, width, rows, MOMENT_THREADS, places)
    variant = MomentsVariant(DTYPES.index(dtype), width, lanes)
    constants = [_C.bytes_of(shape_of(layout, dtype)), bands.bytes()]
    grid = Grid(bands.blocks, 1, MOMENT_THREADS, 0)
    return prepare("norm.cuh", "moments", variant, grid, constants, device), bands.parts


def band_width(period, width) -> int:
    """Channels in a band: whole packs, and enough neurons."""
    channels = max(BAND // period, 1)
    while channels * period % width:
        channels += 1
    return channels


def pack_of(layout, channels, period, dtype, aligned, threads):
    """Neighbouring neurons that a thread has, and how many of them may have a channel of their own."""
    full = 16 // dtype.itemsize
    for width, lanes in ((full, 1), (full // 2, 1), (full, full)):
        if not (aligned and fits(layout, width)):
            continue
        if lanes == 1 and period % width == 0:
            return width, 1
        if lanes > 1 and channels * period % width == 0 and band_width(period, width) * period <= threads * width:
            return width, lanes
    return 1, 1


def bands_of(channels, period, width, rows, threads, places) -> Bands:
    """Bands and parts by which blocks fill the device's places best, in whole waves of them."""
    each = band_width(period, width)
    bands = -(-channels // each)
    rounds = -(-rows * min(each, channels) * period // width // threads)

    def cost(parts):
        return -(-bands * parts // places) * (-(-rounds // parts) + SETUP)

    return Bands(channels, period, each, min(range(1, min(rounds, MOST_PARTS) + 1), key=cost))

def bn_sums(): pass
