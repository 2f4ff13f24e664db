"""Launches of the kernels in ``csrc/cuda/norm.cuh`` and ``bn_lif.cuh``; see csrc/norm.h.

On the current stream of the tensors' device; nothing here waits for the device.
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache, reduce
from operator import or_
from typing import NamedTuple

import torch

from ...spec.layout import DTYPES
from ...spec.split import CHUNK, Split
from .. import on
from .._extension import _C, addresses, words_of
from . import lif
from .lif import backward_threads, blocks, lanes_of, processors
from .program import Grid, prepare, stream_of

MOMENT_THREADS, CHANNEL_THREADS = 256, 128  # kMomentThreads, kChannelThreads, a warp each
BAND = 64  # neurons of a run that a block has at least, if there are as many
MOST_PARTS = 1024  # which one warp adds up
SETUP = 4  # a block begins and adds up in about the time of so many items a thread


class MomentsVariant(NamedTuple):
    dtype: int
    width: int
    lanes: int
    steps: int
    rows: bool


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


# --- over channels ---


def bn_moments(layout, norm, y):
    if not y.numel():
        return torch.zeros((3, norm.channels), dtype=torch.float64, device=y.device)
    at, device = y.data_ptr(), y.device.index
    with on(y.device):
        launch, parts = _moments(layout, norm.channels, norm.period, y.dtype, at % 16 == 0, device)
        moments = torch.empty((2 * parts + 1, norm.channels), dtype=torch.float64, device=y.device)
        launch(stream_of(device), at, moments.data_ptr())
    return moments


@lru_cache(maxsize=512)
def _moments(layout, channels, period, dtype, aligned, device):
    width = 16 // dtype.itemsize
    lanes = lanes_of(period, width)
    if not (aligned and lif.fits(layout, width) and bands_fit(channels, period, width, lanes, MOMENT_THREADS)):
        width = lanes = 1
    steps = layout.steps if layout.steps <= lif.FEW_STEPS else 0
    places = processors(device) * _moment_blocks(lanes)
    rows = layout.outer * layout.inner // (channels * period) * -(-layout.steps // CHUNK)
    bands = bands_of(channels, period, width, rows, MOMENT_THREADS, places)
    variant = MomentsVariant(DTYPES.index(dtype), width, lanes, steps, layout.outer > 1)
    constants = [_C.bytes_of(_C.LIFShape(variant.dtype, *layout[1:], 1, layout.steps, 0)), bands.bytes()]
    grid = Grid(bands.blocks, 1, MOMENT_THREADS, 0)
    return prepare("norm.cuh", "moments", variant, grid, constants, device), bands.parts


def _moment_blocks(lanes) -> int:
    """Blocks that a multiprocessor's registers hold: csrc/cuda/norm.cuh's launch bounds."""
    return 4 if lanes == 1 else 3 if lanes <= 4 else 2


def bn_prepare(plan, moments, parameters, table):
    _of_channels("prepare", moments is not None, plan, table, moments, (moments, *parameters, table))


def bn_gradients(plan, table, sums, all_sums, affine, pull_push):
    """``affine``, [2, channels], receives the gradients of weight and bias."""
    _of_channels("gradients", pull_push is not None, plan, table, sums, (table, sums, all_sums, affine, pull_push))


def _of_channels(name, training, plan, table, sums, tensors):
    if table.numel():
        device, parts = table.device.index, 0 if sums is None else len(sums) // 2
        with on(table.device):
            launch = _a_warp_each(name, training, plan, table.shape[1], parts, device)
            launch(stream_of(device), *addresses(*tensors))


@lru_cache(maxsize=512)
def _a_warp_each(name, training, plan, channels, parts, device):
    constants = [_C.bytes_of(_C.NormPlan(DTYPES.index(torch.float32), channels, parts, *plan))]
    grid = Grid(-(-channels * 32 // CHANNEL_THREADS), 1, CHANNEL_THREADS, 0)
    return prepare("norm.cuh", name, NormVariant(training), grid, constants, device)


# --- over neurons ---


def lif_forward(spec, layout, call):
    if call.norm is None:
        return lif.lif_forward(spec, layout, call)
    x, v, spikes, v_last, saved, norm, _ = call
    tensors = x, v, spikes, v_last, saved, None
    return _launch(_forward, spec, layout, norm, x, tensors, (norm.table, norm.residual), False, None)


def bn_sums(spec, layout, call):
    x, v, saved, grad_spikes, grad_v_last, _, _, norm, _, _, more = call
    if not x.numel():
        return torch.zeros((2, norm.channels), dtype=torch.float64, device=x.device)
    tensors = x, v, saved, grad_spikes, grad_v_last, None, None, None
    rest = norm.table, norm.residual, None, None
    return _launch(_sums, spec, layout, norm, x, tensors, rest, grad_spikes is not None, more)


def lif_backward(spec, layout, call):
    if call.norm is None:
        return lif.lif_backward(spec, layout, call)
    x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, norm, pull_push, grad_residual, more = call
    tensors = x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, None
    rest = norm.table, norm.residual, pull_push, grad_residual
    return _launch(_backward, spec, layout, norm, x, tensors, rest, grad_spikes is not None, more)


def _launch(make, spec, layout, norm, x, tensors, rest, given, more):
    """The words are those of csrc/lif.h's LIFForward or LIFBackward; where ``make`` tells parts, an output goes before,
    the sums of that many."""
    if not layout.outer * layout.inner:
        return None
    words = [*addresses(*tensors), norm.channels, norm.period, *addresses(*rest)]
    n, device = len(tensors), x.device
    aligned = not reduce(or_, words[:n] + words[n + 2 :]) & 15
    if more is not None:
        words += words_of(more)
    key = make, layout, norm.channels, norm.period, norm.residual is not None, x.dtype, aligned, given, device.index
    with on(device):
        launch, parts = lif.made_once(spec, key)
        sums = None
        if parts:
            sums = torch.empty((2 * parts, norm.channels), dtype=torch.float64, device=device)
            words.insert(0, sums.data_ptr())
        launch(stream_of(device.index), *words)
    return sums


def _forward(spec, layout, channels, period, residual, dtype, aligned, given, device):
    variant, constants = _normed(spec, layout, period, residual, dtype, aligned, 1, device)
    grid = Grid(blocks(layout, variant.width, lif.FORWARD_THREADS), 1, lif.FORWARD_THREADS, 0)
    return prepare("bn_lif.cuh", "lif_forward", variant, grid, constants, device), 0


def _sums(spec, layout, channels, period, residual, dtype, aligned, given, device):
    variant, constants = _normed(spec, layout, period, residual, dtype, aligned, 2, device)
    variant = lif.adjoint_of(spec, variant, constants[0], given)
    if not bands_fit(channels, period, variant.width, variant.lanes, backward_threads(variant.width)):
        variant = variant._replace(width=1, lanes=1)
    threads = backward_threads(variant.width)
    shared = max(_columns(layout, dtype, variant.width), 16 * variant.lanes * threads)  # or two doubles a lane
    places = processors(device) * min(_sums_blocks(variant), _shared_memory(device) // (shared + 2048))
    rows = layout.outer * layout.inner // (channels * period)
    bands = bands_of(channels, period, variant.width, rows, threads, places)
    grid = Grid(bands.blocks, 1, threads, shared)
    return prepare("bn_lif.cuh", "bn_lif_sums", variant, grid, [*constants, bands.bytes()], device), bands.parts


def _backward(spec, layout, channels, period, residual, dtype, aligned, given, device):
    variant, constants = _normed(spec, layout, period, residual, dtype, aligned, 2, device)
    variant = lif.adjoint_of(spec, variant, constants[0], given)
    threads = backward_threads(variant.width)
    grid = Grid(blocks(layout, variant.width, threads), 1, threads, _columns(layout, dtype, variant.width))
    return prepare("bn_lif.cuh", "bn_lif_backward", variant, grid, constants, device), 0


def _normed(spec, layout, period, residual, dtype, aligned, streams, device):
    once = Split(1, layout.steps, 0)
    variant, constants = lif.compiled_for(spec, layout, dtype, aligned, streams + residual, once, device)
    return variant._replace(lanes=lanes_of(period, variant.width), residual=residual), constants


def _sums_blocks(variant) -> int:
    """Blocks that a multiprocessor's registers hold: csrc/cuda/bn_lif.cuh's sums_blocks."""
    divides = lif.divides(variant)
    of_64 = 4 if variant.lanes > 1 or divides else 6 if variant.residual or variant.grouped else 8
    blocks_of_64 = of_64 * 3 // 2 if variant.steps and not divides else of_64
    return blocks_of_64 * 64 // backward_threads(variant.width)


@cache
def _shared_memory(device) -> int:
    """Of a multiprocessor, in bytes; older versions of PyTorch do not tell."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 164 << 10)


def _columns(layout, dtype, width) -> int:
    """Potentials and x of a chunk in shared memory."""
    x = min(layout.steps, CHUNK) * backward_threads(width) * max(width * dtype.itemsize, 4)
    return lif.column_bytes(layout, width) + x


def band_width(period, width) -> int:
    """Channels in a band: whole packs, and enough neurons."""
    channels = max(BAND // period, 1)
    while channels * period % width:
        channels += 1
    return channels


def bands_fit(channels, period, width, lanes, threads) -> bool:
    """Whether packs never leave a run, and the packs of a band lie side by side in a block."""
    packs = band_width(period, width) * period // width
    return lanes == 1 or (channels * period % width == 0 and packs <= threads)


def bands_of(channels, period, width, rows, threads, places) -> Bands:
    """Bands and parts by which blocks fill the device's places best, in whole waves of them."""
    each = band_width(period, width)
    bands, packs = -(-channels // each), min(each, channels) * period // width
    active = threads if min(each, channels) == 1 else threads // packs * packs
    rounds = -(-rows * packs // active)

    def cost(parts):
        return -(-bands * parts // places) * (-(-rounds // parts) + SETUP)

    return Bands(channels, period, each, min(range(1, min(rounds, MOST_PARTS) + 1), key=cost))
