"""Sums over channels in Triton, what is made of them, and the launches: ``csrc/norm.h`` says what all of it means.

The neurons, [outer * inner], are [images, channels, period] too. A program has CHANNELS neighbouring channels and one
part of their neurons, a block of ROWS images by SPAN of a period at a time:

- channels last: period = SPAN = 1, and lanes are neighbouring channels;
- otherwise SPAN is the period's next power of two, as far as a program has lanes, and CHANNELS is 1 unless the period
  is so short that several channels share a line of memory.

So lanes that follow each other lie side by side in memory, and a lane keeps its channel; it adds up alone, and lanes
are added up at the program's end. Parts depend on the shape, and on how many threads the GPU has in a warp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...spec.split import CHUNK
from .. import on
from .lif import FEW, _curve, _form, _groups, _in_time, _machine, _number, _numbers, _retrace, _sizes_of, _start, _Tile

_counts = ["per_part", "images", "channels", "period", "groups", "steps", "neurons", "inner", "x_outer", "x_step"]


@triton.jit
def _lines(channels, period, UNIT: tl.constexpr, SPAN: tl.constexpr):
    """The period as it was given but whole, and both at 64 bits: what lies side by side goes in units."""
    if SPAN == 1:
        whole = period
        channels, period = channels.to(tl.int64) * UNIT, period.to(tl.int64)
    else:
        whole = period * UNIT
        channels, period = channels.to(tl.int64), period.to(tl.int64) * UNIT
    return whole, channels, period


@triton.jit
def _lanes(ROWS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr):
    """Row, channel, and place within the span of each lane of a program."""
    lane = tl.arange(0, ROWS * CHANNELS * SPAN)
    return lane // (CHANNELS * SPAN), tl.program_id(0) * CHANNELS + lane // SPAN % CHANNELS, lane % SPAN


@triton.jit
def _blocks(per_part, images, period, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The blocks of a program: how many, and of the first of them image and place within the period."""
    spans = tl.cdiv(period, SPAN)
    begin = tl.program_id(1) * per_part
    count = tl.minimum(per_part, tl.cdiv(images, ROWS) * spans - begin)
    return count, (begin // spans * ROWS).to(tl.int64), (begin % spans * SPAN).to(tl.int64)


@triton.jit
def _place(
    image, at, row, c, p, images, channels, period, inner,
    ROWS: tl.constexpr, SPAN: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """A block's neurons n, whether they exist, and where they are in [outer, inner]; and image and place within the
    period of the next block. OUTER: outer is not 1."""
    exists = (image + row < images) & (c < channels)
    n = (image + row) * channels + c
    if SPAN > 1:
        p += at
        exists = exists & (p < period)
        n = n * period + p
    if OUTER:
        row, column = n // inner, n % inner
    else:
        row, column = n * 0, n
    wraps = at + SPAN >= period
    return n, exists, row, column, image + tl.where(wraps, ROWS, 0), tl.where(wraps, 0, at + SPAN)


@triton.jit
def _store_part(
    parts, one, two, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """Adds up the lanes of each channel, into [parts, 2, channels]."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    parts += tl.program_id(1).to(tl.int64) * 2 * channels + c
    tl.store(parts, tl.sum(tl.sum(tl.reshape(one, [ROWS, CHANNELS, SPAN]), 2), 0), c < channels)
    tl.store(parts + channels, tl.sum(tl.sum(tl.reshape(two, [ROWS, CHANNELS, SPAN]), 2), 0), c < channels)


@triton.jit
def _add_up(parts, count, channels, c, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both sums of channels c over [count, 2, channels]."""
    part = tl.arange(0, ROWS)[:, None]
    at = parts + part.to(tl.int64) * 2 * channels + c[None, :]
    one = tl.zeros([ROWS, CHANNELS], tl.float64)
    two = tl.zeros([ROWS, CHANNELS], tl.float64)
    for first in range(0, count, ROWS):
        exists = (first + part < count) & (c < channels)[None, :]
        one += tl.load(at, exists, other=0.0)
        two += tl.load(at + channels, exists, other=0.0)
        at += ROWS * 2 * channels
    return tl.sum(one, 0), tl.sum(two, 0)


@triton.jit(do_not_specialize=_counts)
def bn_moments_kernel(
    x, moments, per_part, images, channels, period, steps, neurons, inner, x_outer, x_step,
    UNIT: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr, OUTER: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Sums of x - shift and of its square, in float64 from the first difference on."""
    if TAILS == 0:
        steps = K
    inner = inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    lines, channels, period = _lines(channels, period, UNIT, SPAN)
    row, c, p = _lanes(ROWS, CHANNELS, SPAN)
    n = c * period  # its first element is a channel's shift, and stands for what does not exist
    first = tl.load(x + n // inner * x_outer + n % inner, c < channels, other=0.0)
    shift = first.to(tl.float32).to(tl.float64)
    total = tl.zeros_like(shift)
    square = tl.zeros_like(shift)
    count, image, at = _blocks(per_part, images, lines, ROWS, SPAN)
    for _ in range(count):
        _, exists, outer, column, image, at = _place(
            image, at, row, c, p, images, channels, period, inner, ROWS, SPAN, OUTER
        )  # fmt: skip
        x_t = x + outer * x_outer + column
        until = tl.where(exists, steps, 0)
        for t in range(0, steps, K):
            xs = ()
            for k in tl.static_range(K):
                xs += (tl.load(x_t, exists if TAILS == 0 else t + k < until, other=first),)
                x_t += x_step
            for k in tl.static_range(K):
                from_shift = xs[k].to(tl.float32).to(tl.float64) - shift
                total += from_shift
                square = tl.fma(from_shift, from_shift, square)
    _store_part(moments, total, square, channels, ROWS, CHANNELS, SPAN)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = c * period
    shift = tl.load(x + n // inner * x_outer + n % inner, c < channels, other=0.0).to(tl.float32).to(tl.float64)
    last = moments + tl.num_programs(1).to(tl.int64) * 2 * channels
    tl.store(last + c, shift, c < tl.where(tl.program_id(1) == 0, channels, 0))


@triton.jit(do_not_specialize=["parts", "channels"])
def bn_prepare_kernel(
    moments, weight, bias, running_mean, running_var, table, parts, channels,
    count: tl.float64, unbiased: tl.float64, momentum: tl.float64, eps: tl.float64, gain: tl.float64,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    if moments is None:
        mean = tl.load(running_mean + c, exists, other=0.0).to(tl.float64)
        var = tl.load(running_var + c, exists, other=0.0).to(tl.float64)
    else:
        total, square = _add_up(moments, parts, channels, c, ROWS, CHANNELS)
        from_shift = total / count
        mean = tl.load(moments + parts.to(tl.int64) * 2 * channels + c, exists, other=0.0) + from_shift
        var = square / count - from_shift * from_shift
        var = tl.where(var < 0.0, 0.0, var)  # a NaN stays one
        if running_mean is not None:
            old = tl.load(running_mean + c, exists, other=0.0).to(tl.float64)
            tl.store(running_mean + c, ((1.0 - momentum) * old + momentum * mean).to(tl.float32), exists)
            old = tl.load(running_var + c, exists, other=0.0).to(tl.float64)
            tl.store(running_var + c, ((1.0 - momentum) * old + momentum * (var * unbiased)).to(tl.float32), exists)
    inverse_deviation = 1.0 / tl.sqrt(var + eps)
    if weight is None:
        scale = (gain * inverse_deviation).to(tl.float32)
    else:
        scale = (tl.load(weight + c, exists, other=0.0).to(tl.float64) * gain * inverse_deviation).to(tl.float32)
    rounded = mean.to(tl.float32)
    offset = (rounded.to(tl.float64) - mean) * scale.to(tl.float64)
    if bias is not None:
        offset = tl.load(bias + c, exists, other=0.0).to(tl.float64) + offset
    table += c
    tl.store(table, rounded, exists)
    tl.store(table + channels, scale, exists)
    tl.store(table + 2 * channels, offset.to(tl.float32), exists)
    tl.store(table + 3 * channels, inverse_deviation.to(tl.float32), exists)
    tl.store(table + 4 * channels, (mean - rounded.to(tl.float64)).to(tl.float32), exists)


@triton.jit(do_not_specialize=_counts)
def bn_sums_kernel(
    x, v0, saved, grad_spikes, grad_v_last, sums, table, residual, groups, samples,
    per_part, images, channels, period, steps, neurons, inner, x_outer, x_step,
    leak, rest, threshold, fire_above, v_start, v_min, levels, per_threshold, input_gain, state_gain, a, b, c,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr,
    UNIT: tl.constexpr, OUTER: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr,
    TERNARY: tl.constexpr, DETACH: tl.constexpr, CURVE: tl.constexpr,
):  # fmt: skip
    """Sums of g, the gradient of what the neurons receive, and of g (x - mean)."""
    BLOCK: tl.constexpr = ROWS * CHANNELS * SPAN
    if TAILS == 0:
        steps = K
    lines, channels, period = _lines(channels, period, UNIT, SPAN)
    neurons, inner = neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    leak, threshold, fire_above = _number(leak), _number(threshold), _number(fire_above)
    row, channel, p = _lanes(ROWS, CHANNELS, SPAN)
    mean = tl.load(table + channel, channel < channels, other=0.0)
    scale = tl.load(table + channels + channel, channel < channels, other=0.0)
    offset = tl.load(table + 2 * channels + channel, channel < channels, other=0.0)
    total = tl.zeros([BLOCK], tl.float64)
    moment = tl.zeros([BLOCK], tl.float64)
    count, image, at = _blocks(per_part, images, lines, ROWS, SPAN)
    for _ in range(count):
        n, exists, outer, column, image, at = _place(
            image, at, row, channel, p, images, channels, period, inner, ROWS, SPAN, OUTER
        )  # fmt: skip
        r_at = outer * (steps * inner) + column
        u_at = r_at if groups is None else outer * (groups * inner) + column
        _, _, _, total, moment, _ = _retrace(
            _start(grad_v_last, 0.0, n, exists, BLOCK), None, None, total, moment, None, 0, steps,
            x + outer * x_outer + column, x_step, v0, saved, v_start,
            None if grad_spikes is None else grad_spikes + u_at, None, None,
            None if residual is None else residual + r_at,
            mean, scale, offset, None, None, groups, None, None, None, None, steps, inner, neurons,
            n, 1 - exists.to(tl.int32), 1,
            leak, rest, threshold, fire_above, v_min, levels, per_threshold, None, None, None,
            input_gain, state_gain, a, b, c, samples,
            FORM, HARD, CHUNK, K, TAILS, BLOCK, TERNARY, DETACH, CURVE, "sums",
        )  # fmt: skip
    _store_part(sums, total, moment, channels, ROWS, CHANNELS, SPAN)


@triton.jit(do_not_specialize=["parts", "channels"])
def bn_gradients_kernel(
    table, sums, all_sums, affine, pull_push, parts, channels, count: tl.float64, gain: tl.float64,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    scale = tl.load(table + channels + c, exists, other=0.0).to(tl.float64)
    inverse_deviation = tl.load(table + 3 * channels + c, exists, other=0.0).to(tl.float64)
    rest = tl.load(table + 4 * channels + c, exists, other=0.0).to(tl.float64)
    total, moment = _add_up(sums, parts, channels, c, ROWS, CHANNELS)
    tl.store(affine + c, ((moment - rest * total) * inverse_deviation * gain).to(tl.float32), exists)
    tl.store(affine + channels + c, total.to(tl.float32), exists)
    if pull_push is not None:
        if all_sums is not None:
            total = tl.load(all_sums + c, exists, other=0.0)
            moment = tl.load(all_sums + channels + c, exists, other=0.0)
        push = scale * inverse_deviation * inverse_deviation * (moment - rest * total) / count
        tl.store(pull_push + c, (scale * total / count - rest * push).to(tl.float32), exists)
        tl.store(pull_push + channels + c, push.to(tl.float32), exists)


# By bytes of an element. Of more, ptxas has one load in flight at a time, for the sake of registers.
MOMENTS = {2: _Tile(4, 4, 4, maxnreg=255), 4: _Tile(2, 4, 4, maxnreg=255)}
SUMS = _Tile(4, 4, 3, maxnreg=255), _Tile(2, 4, 4, maxnreg=255)  # few steps, and more
LINE = 32  # neighbouring elements of a step that fill what memory moves at once
PROGRAMS = 1024  # that keep a large GPU busy
BLOCKS = 4  # that a part has at least, so that the parts are little beside what they sum
CHANNEL = {"ROWS": 32, "CHANNELS": 8}  # of a program that works on channels: parts at a time, and channels


class _Work(NamedTuple):
    """How the neurons are shared out: see the head of the file."""

    columns: int
    parts: int
    per_part: int  # blocks
    images: int
    rows: int
    channels: int
    span: int

    @property
    def shape(self):
        return {"ROWS": self.rows, "CHANNELS": self.channels, "SPAN": self.span}


def _share(layout, norm, tile) -> _Work:
    lanes = tile.per_thread * tile.warps * _machine()[1]
    images = layout.outer * layout.inner // (norm.channels * norm.period)
    span = min(triton.next_power_of_2(norm.period), lanes)
    channels = min(triton.next_power_of_2(norm.channels), max(LINE // span, 1))
    rows = lanes // (span * channels)
    blocks = triton.cdiv(images, rows) * triton.cdiv(norm.period, span)
    columns = triton.cdiv(norm.channels, channels)
    parts = min(triton.cdiv(blocks, BLOCKS), triton.cdiv(PROGRAMS, columns))
    per_part = triton.cdiv(blocks, parts)
    return _Work(columns, triton.cdiv(blocks, per_part), per_part, images, rows, channels, span)


def _sizes(layout, norm, work, tile):
    """per_part, ..., x_step of the kernels, and the unit that those of memory go in."""
    line = norm.channels if norm.period == 1 else norm.period
    unit, sizes = _sizes_of(layout, tile.per_thread, line)
    channels, period = (norm.channels // unit, 1) if norm.period == 1 else (norm.channels, norm.period // unit)
    return unit, (work.per_part, work.images, channels, period, layout.steps, *sizes)


def bn_moments(layout, norm, y):
    if layout.outer * layout.steps * layout.inner == 0:
        return torch.zeros((3, norm.channels), dtype=torch.float64, device=y.device)
    tile = MOMENTS[y.element_size()]
    work = _share(layout, norm, tile)
    moments = torch.empty((2 * work.parts + 1, norm.channels), dtype=torch.float64, device=y.device)
    unit, sizes = _sizes(layout, norm, work, tile)
    with on(y.device):
        bn_moments_kernel[(work.columns, work.parts)](
            y,
            moments,
            *sizes,
            UNIT=unit,
            **_in_time(tile.log_k, layout.steps),
            OUTER=layout.outer > 1,
            **work.shape,
            **tile.options,
        )
    return moments


def bn_prepare(plan, moments, parameters, table):
    channels = table.shape[1]
    if channels == 0:
        return
    parts = 0 if moments is None else len(moments) // 2
    with on(table.device):
        bn_prepare_kernel[(triton.cdiv(channels, CHANNEL["CHANNELS"]),)](
            moments, *parameters, table, parts, channels, *map(float, plan),
            **CHANNEL, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def bn_sums(spec, layout, call):
    norm, y = call.norm, call.x
    if layout.outer * layout.steps * layout.inner == 0:
        return torch.zeros((2, norm.channels), dtype=torch.float64, device=y.device)
    tile = SUMS[layout.steps > FEW]
    work = _share(layout, norm, tile)
    sums = torch.empty((2 * work.parts, norm.channels), dtype=torch.float64, device=y.device)
    unit, sizes = _sizes(layout, norm, work, tile)
    with on(y.device):
        bn_sums_kernel[(work.columns, work.parts)](
            y,
            call.v,
            call.saved,
            call.grad_spikes,
            call.grad_v_last,
            sums,
            norm.table,
            norm.residual,
            _groups(layout),
            None if call.more is None else call.more.table,
            *sizes,
            *_numbers(spec),
            FORM=_form(spec),
            HARD=spec.reset is not None,
            CHUNK=CHUNK,
            **_in_time(tile.log_k, layout.steps),
            UNIT=unit,
            OUTER=layout.outer > 1,
            **work.shape,
            TERNARY=spec.ternary,
            DETACH=spec.detach_reset,
            CURVE=_curve(spec),
            **tile.options,
        )
    return sums


def bn_gradients(plan, table, sums, all_sums, affine, pull_push):
    """``affine``, [2, channels], receives the gradients of weight and bias."""
    channels = table.shape[1]
    if channels == 0:
        return
    with on(table.device):
        bn_gradients_kernel[(triton.cdiv(channels, CHANNEL["CHANNELS"]),)](
            table, sums, all_sums, affine, pull_push, len(sums) // 2, channels, float(plan.count), float(plan.scale),
            **CHANNEL, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
