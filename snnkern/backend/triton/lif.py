"""The LIF kernels in Triton, and their launches. The mathematics, its order included, is that of ``csrc/neuron.h``.

A program holds BLOCK neurons and walks over time K steps at a time. The loads of K steps stand before their arithmetic
and before the first store, across which compilers do not move loads, so that all of them are in flight together.

- forward: load K steps of x, step the neurons, store their spikes; v stays in registers.
- backward, from the last K steps to the first: load x, the upstream gradient and the v kept; recompute h, into
  registers; then run the adjoint.

K is that of the tile, or with fewer steps their next power of two: a kernel serves every number of steps of one K.
Where they are no more than FEW, K is all of them (TAILS = 0), and no loop over time is left.

Where neurons are few, time is split into segments, program_id(1):

- forward: a segment warms up on the steps before it and notes its start and its end in scratch; then the repair kernel
  runs again what did not start where the segment before it ended.
- backward: a first pass finds gain and carry of each segment, the second starts from those of the segments after it.

See ``csrc/cuda/lif.cuh``, too. Where scratch, [2, segments, neurons], is None, all of this compiles away.

So does what is None of ``table`` and ``residual``, the norm before the neurons, and ``groups``, the steps out where
they are fewer than the steps. With either, time is not split: a group could lie in two segments, and with a norm the
sums of its gradients would have to be split as well. Nor is it with a leak or a threshold that is a tensor, with
``v_seq`` and its gradient, or with more states than the potential.

What else neurons may have compiles away likewise: ``v_min``, ``levels`` of an integer spike (and ``per_threshold``, its
1 / threshold where a product with that is the quotient), TERNARY spikes, ``samples`` of a surrogate that is a table, a
``bias``, and the states behind the potential: the synaptic current (``synapse_decay``) and the adaptation
(``threshold_decay``), from which the threshold of each step is made.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import surrogate
from ...spec.neuron import LIFSpec, More
from ...spec.split import CHUNK, add_up, for_gpu, parts_of, warmup
from .. import on
from . import interpreted

surrogate.tl = tl  # the language of the twins there

_sizes = ["channels", "period", "leak_channels", "leak_period", "threshold_channels", "threshold_period"]
_sizes += ["bias_channels", "bias_period"]
_sizes += ["groups", "steps", "neurons", "inner", "x_outer", "x_step", "per_row"]


@triton.jit
def _float(x):
    """float32. bfloat16 is its upper half: of two in a word, a shift and a mask, where a conversion takes three."""
    if x.dtype == tl.bfloat16:
        y = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _receive(x, residual, mean, scale, offset):
    """What the neurons receive, in this order on every backend; None: nothing of it. An offset alone is a bias."""
    x = _float(x)
    if mean is not None:
        x = (x - mean) * scale + offset
    elif offset is not None:
        x += offset
    if residual is not None:
        x += _float(residual)
    return x


@triton.jit
def _charge(v, x, leak, rest, FORM: tl.constexpr):
    """``rest`` None: it is 0."""
    above_rest = v if rest is None else v - rest
    if FORM == "decay":
        h = leak * v + x
    elif FORM == "tau_input":
        h = v + tl.div_rn(x - above_rest, leak)
    elif FORM == "tau":
        h = v - tl.div_rn(above_rest, leak) + x
    elif FORM == "tau_input_inverse":
        h = v + (x - above_rest) * leak
    elif FORM == "tau_inverse":
        h = v - above_rest * leak + x
    return h


@triton.jit
def _drive(v, x, rest, FORM: tl.constexpr):
    """What the leak multiplies, or divides."""
    above_rest = v if rest is None or FORM == "decay" else v - rest
    if FORM == "decay":
        drive = above_rest
    elif FORM == "tau_input" or FORM == "tau_input_inverse":
        drive = x - above_rest
    else:
        drive = -above_rest
    return drive


@triton.jit
def _bound(h, v_min):
    return h if v_min is None else tl.where(h <= v_min, v_min, h)


@triton.jit
def _in_thresholds(h, threshold, per_threshold):
    return tl.div_rn(h, threshold) if per_threshold is None else h * per_threshold


@triton.jit
def _fire(h, threshold, fire_above, levels, per_threshold, TERNARY: tl.constexpr):
    """The spike; of those that are 0 or 1, whether it is one. ``fire_above`` None: it is where h >= threshold."""
    if levels is not None:
        u = _in_thresholds(h, threshold, per_threshold)
        u = tl.where(u > 0.0, u, 0.0)  # a NaN does not fire
        s = (tl.where(u < levels, u, levels) + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds when added
    elif TERNARY:
        up = h >= threshold if fire_above is None else h > fire_above
        down = -h >= threshold if fire_above is None else -h > fire_above
        s = tl.where(up, 1.0, 0.0) - tl.where(down, 1.0, 0.0)
    else:
        s = h >= threshold if fire_above is None else h > fire_above
    return s


@triton.jit
def _fired(s):
    return s if s.dtype == tl.int1 else s != 0.0


@triton.jit
def _count(s):
    """As a number."""
    return tl.where(s, 1.0, 0.0) if s.dtype == tl.int1 else s


@triton.jit
def _reset(h, s, threshold, rest, HARD: tl.constexpr):
    # A select, not a product: an infinite h leaves no NaN behind.
    if HARD:
        v = tl.where(_fired(s), 0.0 if rest is None else rest, h)
    elif s.dtype == tl.int1:
        v = tl.where(s, h - threshold, h)
    elif len(threshold.shape) > 0:  # of a tensor, or raised: it may be infinite
        v = tl.where(s != 0.0, h - threshold * s, h)
    else:
        v = h - threshold * s
    return v


@triton.jit
def _step(
    v, current, adaptation, x, leak, rest, threshold, fire_above, v_min, levels, per_threshold,
    synapse_decay, threshold_decay, jump, FORM: tl.constexpr, TERNARY: tl.constexpr,
):  # fmt: skip
    """The current after a step, what the membrane received, h, the step's threshold and the spike."""
    if synapse_decay is not None:
        current = synapse_decay * current + x
        x = current
    if threshold_decay is not None:
        threshold += jump * adaptation
    h = _bound(_charge(v, x, leak, rest, FORM), v_min)
    s = _fire(h, threshold, _above(threshold, fire_above, threshold_decay), levels, per_threshold, TERNARY)
    return current, x, h, threshold, s


@triton.jit
def _settle(h, threshold, s, adaptation, rest, threshold_decay, HARD: tl.constexpr):
    """Potential and adaptation after a step."""
    v = _reset(h, s, threshold, rest, HARD)
    if threshold_decay is not None:
        adaptation = threshold_decay * adaptation + _count(s)
    return v, adaptation


@triton.jit
def _above(threshold, fire_above, threshold_decay):
    """What a neuron fires above. With adaptation ``fire_above`` only says, None, that it fires at its threshold too."""
    return fire_above if threshold_decay is None or fire_above is None else threshold


@triton.jit
def _behind(p, distance):
    return None if p is None else p + distance


@triton.jit
def _apart(neurons, synapse_decay, threshold_decay):
    """How far the states of one chunk are behind those of the one before, and the last of them behind the first."""
    last = neurons * 0
    if synapse_decay is not None:
        last += neurons
    if threshold_decay is not None:
        last += neurons
    return last + neurons, last


@triton.jit
def _start(v, otherwise, n, exists, BLOCK: tl.constexpr):
    if v is None:
        start = tl.full([BLOCK], otherwise, tl.float32)
    else:
        start = tl.load(v + n, exists, other=0.0)
    return start


@triton.jit
def _resume(t, v0, saved, v_start, apart, n, i, limit, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The state before step t, a multiple of CHUNK, of which one is kept ``apart`` numbers behind the other. Without a
    branch, which would hold up the loads after it."""
    if saved is None:
        v = _start(v0, v_start, n, i < limit, BLOCK)
    else:
        later = i < tl.where(t > 0, limit, 0)
        v = tl.load(saved + (t // CHUNK - 1) * apart + n, later, other=v_start)
        if v0 is not None:
            v = tl.where(later, v, tl.load(v0 + n, i < tl.where(t > 0, 0, limit), other=0.0))
    return v


@triton.jit
def _start_all(v0, otherwise, n, exists, neurons, synapse_decay, threshold_decay, BLOCK: tl.constexpr):
    """The states of neurons n: potential, current, adaptation, None of those that they do not have. Of ``_start``."""
    _, last = _apart(neurons, synapse_decay, threshold_decay)
    v = _start(v0, otherwise, n, exists, BLOCK)
    current, adaptation = None, None
    if synapse_decay is not None:
        current = _start(_behind(v0, neurons), 0.0, n, exists, BLOCK)
    if threshold_decay is not None:
        adaptation = _start(_behind(v0, last), 0.0, n, exists, BLOCK)
    return v, current, adaptation


@triton.jit
def _resume_all(
    t, v0, saved, v_start, n, i, limit, neurons, synapse_decay, threshold_decay, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of ``_resume``."""
    apart, last = _apart(neurons, synapse_decay, threshold_decay)
    v = _resume(t, v0, saved, v_start, apart, n, i, limit, CHUNK, BLOCK)
    current, adaptation = None, None
    if synapse_decay is not None:
        given, kept = _behind(v0, neurons), _behind(saved, neurons)
        current = _resume(t, given, kept, 0.0, apart, n, i, limit, CHUNK, BLOCK)
    if threshold_decay is not None:
        given, kept = _behind(v0, last), _behind(saved, last)
        adaptation = _resume(t, given, kept, 0.0, apart, n, i, limit, CHUNK, BLOCK)
    return v, current, adaptation


@triton.jit
def _store_all(to, v, current, adaptation, neurons, last, exists):
    tl.store(to, v, exists)
    if current is not None:
        tl.store(to + neurons, current, exists)
    if adaptation is not None:
        tl.store(to + last, adaptation, exists)


@triton.jit
def _place(neurons, inner, per_row, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """A program's neurons n, of which those with i < limit exist, and where they are in [outer, inner].

    A program lies in one of the outer rows (per_row None: there is but one), or (FLAT, for rows too short for that)
    anywhere in [outer * inner].
    """
    lane = tl.arange(0, BLOCK)
    if FLAT:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        column = (first % inner).to(tl.int32) + lane
        row = first // inner + column // inner.to(tl.int32)
        column = column % inner.to(tl.int32)
        n = first + lane
        i = n
        limit = neurons
    else:
        if per_row is None:
            row = inner * 0
            column = tl.program_id(0).to(tl.int64) * BLOCK + lane
        else:
            row = (tl.program_id(0) // per_row).to(tl.int64)
            column = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK + lane
        n = row * inner + column
        i = column
        limit = inner
    return n, i, limit, row, column


@triton.jit
def _channel(
    inner, per_row, channels, period, SPAN: tl.constexpr, SIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr
):
    """The channels n // period % channels of a program's neurons. SPAN: "same", all are of one; "last", period is 1.

    Else, or with "last", SIDE neurons side by side have the same one, or channels side by side: one division will do.
    """
    channels = channels.to(tl.uint32)
    if SPAN == "same":
        channel = tl.program_id(0).to(tl.uint32) // (period // BLOCK).to(tl.uint32) % channels
    else:
        if FLAT or per_row is None:
            first = tl.program_id(0).to(tl.int64) * BLOCK
        else:
            first = (tl.program_id(0) // per_row) * inner + (tl.program_id(0) % per_row).to(tl.int64) * BLOCK
        first = first.to(tl.uint64)
        lane = tl.arange(0, BLOCK).to(tl.uint32)
        if SPAN == "last":
            side = (first % channels).to(tl.uint32) // SIDE + lane // SIDE
            channel = side % (channels // SIDE) * SIDE + lane % SIDE
        else:
            period = period.to(tl.uint64 if period.dtype == tl.int64 else tl.uint32)
            side = (first % period).to(period.dtype) // SIDE + lane // SIDE
            channel = ((first // period % channels).to(tl.uint32) + side // (period // SIDE)) % channels
    return channel.to(tl.int32)


@triton.jit
def _number(p):
    """A number, or None, as a kernel has it: of float32, where the interpreter has Python's."""
    if p is not None:
        p = tl.cast(p, tl.float32)
    return p


@triton.jit
def _of_lanes(
    p, channels, period, inner, per_row, SPAN: tl.constexpr, SIDE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr
):
    """A parameter as a program's neurons have it: a number (SPAN None), or of a tensor the only one ("one") or those of
    their channels."""
    if SPAN is None:
        p = _number(p)
    else:
        if SPAN != "one":
            p += _channel(inner, per_row, channels, period, SPAN, SIDE, FLAT, BLOCK)
        p = tl.broadcast_to(tl.load(p), [BLOCK])
    return p


@triton.jit
def _gains(leak, FORM: tl.constexpr):
    """dh/dx, None: 1, and dh/dv[t-1], of a leak that is a tensor."""
    if FORM == "decay":
        gains = None, leak
    elif FORM == "tau_input":
        gains = tl.div_rn(1.0, leak), 1.0 - tl.div_rn(1.0, leak)
    elif FORM == "tau":
        gains = None, 1.0 - tl.div_rn(1.0, leak)
    elif FORM == "tau_input_inverse":
        gains = leak, 1.0 - leak
    else:
        gains = None, 1.0 - leak
    return gains


@triton.jit
def _segment(p, segment_steps, steps):
    """Where it begins, a multiple of CHUNK, and ends."""
    begin = p * segment_steps.to(steps.dtype)
    return begin, begin + tl.minimum(steps - begin, segment_steps)


@triton.jit
def _march(
    v, current, adaptation, begin, end, x, x_step, spikes, inner, saved, neurons, n, i, limit,
    residual, mean, scale, offset, groups, v_seq, steps,
    leak, rest, threshold, fire_above, v_min, levels, per_threshold, synapse_decay, threshold_decay, jump,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr,
    TERNARY: tl.constexpr,
):  # fmt: skip
    """The states before step ``end`` from those before ``begin``, a multiple of CHUNK; spikes None: no output."""
    exists = i < limit
    apart, last = _apart(neurons, synapse_decay, threshold_decay)
    if groups is not None:
        # Of group_of(t) = (2t + 1) groups // (2 steps), the remainder: where it wraps, a group ends. begin is 0.
        phase = groups
        written = inner * 0
        total = tl.zeros_like(v)
    for p in tl.static_range(TAILS + 1):  # as many K steps as there are, then K/2, ..., 1: none needs a mask
        done = end if TAILS == 0 else begin + ((end - begin) >> (TAILS - p) << (TAILS - p))
        if spikes is not None or (p == 0 or K >> p >= CHUNK):  # a warm-up has whole chunks only
            for t in range(begin, done, K >> p):
                x_t = x + t * x_step
                if spikes is not None and groups is None:
                    s_t = spikes + t * inner
                if residual is not None:
                    r_t = residual + t * inner
                if v_seq is not None:
                    v_t = v_seq + t * inner
                xs = ()
                rs = ()
                for _ in tl.static_range(K >> p):
                    xs += (tl.load(x_t, exists, other=0.0),)
                    x_t += x_step
                    if residual is not None:
                        rs += (tl.load(r_t, exists, other=0.0),)
                        r_t += inner
                for k in tl.static_range(K >> p):
                    if saved is not None and k % CHUNK == 0:
                        if (t + k > 0) & ((t + k) % CHUNK == 0):
                            kept = saved + ((t + k) // CHUNK - 1) * apart + n
                            _store_all(kept, v, current, adaptation, neurons, last, exists)
                    received = _receive(xs[k], None if residual is None else rs[k], mean, scale, offset)
                    current, _, h, raised, s = _step(
                        v, current, adaptation, received, leak, rest, threshold, fire_above, v_min, levels,
                        per_threshold, synapse_decay, threshold_decay, jump, FORM, TERNARY,
                    )  # fmt: skip
                    if groups is not None:
                        total += _count(s)
                        phase += 2 * groups
                        ends = phase >= 2 * steps
                        tl.store(spikes + written, total.to(spikes.dtype.element_ty), i < tl.where(ends, limit, 0))
                        total = tl.where(ends, 0.0, total)
                        written += tl.where(ends, inner, 0)
                        phase -= tl.where(ends, 2 * steps, 0)
                    elif spikes is not None:
                        tl.store(s_t, _count(s).to(spikes.dtype.element_ty), exists)
                        s_t += inner
                    v, adaptation = _settle(h, raised, s, adaptation, rest, threshold_decay, HARD)
                    if v_seq is not None:
                        tl.store(v_t, v, exists)
                        v_t += inner
        begin = done
    return v, current, adaptation


@triton.jit(do_not_specialize=_sizes)
def lif_forward_kernel(
    x, v0, spikes, v_last, saved, scratch, segment_steps, warmup, table, residual, channels, period, groups, v_seq,
    leak_channels, leak_period, threshold_channels, threshold_period,
    synapse_decay, threshold_decay, jump, bias, bias_channels, bias_period,
    steps, neurons, inner, x_outer, x_step, per_row,
    leak, rest, threshold, fire_above, v_start, v_min, levels, per_threshold,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, TERNARY: tl.constexpr,
    SPAN: tl.constexpr = None, SIDE: tl.constexpr = None,
    LEAK: tl.constexpr = None, THRESHOLD: tl.constexpr = None, BIAS: tl.constexpr = None,
):  # fmt: skip
    if TAILS == 0:
        steps = K
    neurons, inner = neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    n, i, limit, row, column = _place(neurons, inner, per_row, FLAT, BLOCK)
    exists = i < limit
    x += row * x_outer + column
    spikes += row * ((steps if groups is None else groups) * inner) + column
    if residual is not None:
        residual += row * (steps * inner) + column
    mean, scale, offset = None, None, None
    if table is not None:
        channel = _channel(inner, per_row, channels, period, SPAN, SIDE, FLAT, BLOCK)
        mean = tl.load(table + channel)
        scale = tl.load(table + channels + channel)
        offset = tl.load(table + 2 * channels + channel)
    elif bias is not None:
        offset = _of_lanes(bias, bias_channels, bias_period, inner, per_row, BIAS, SIDE, FLAT, BLOCK)
    if v_seq is not None:
        v_seq += row * (steps * inner) + column
    leak = _of_lanes(leak, leak_channels, leak_period, inner, per_row, LEAK, SIDE, FLAT, BLOCK)
    if fire_above is not None:
        fire_above = _of_lanes(
            fire_above, threshold_channels, threshold_period, inner, per_row, THRESHOLD, SIDE, FLAT, BLOCK
        )
    threshold = _of_lanes(threshold, threshold_channels, threshold_period, inner, per_row, THRESHOLD, SIDE, FLAT, BLOCK)
    v, current, adaptation = _start_all(v0, v_start, n, exists, neurons, synapse_decay, threshold_decay, BLOCK)
    begin, end = 0, steps
    if scratch is not None:
        begin, end = _segment(tl.program_id(1), segment_steps, steps)
        first = tl.maximum(begin - warmup, 0)
        v = tl.where(first > 0, v_start, v)
        v, _, _ = _march(v, None, None, first, begin, x, x_step, None, inner, None, neurons, n, i, limit,
                         None, None, None, offset, None, None, steps,
                         leak, rest, threshold, fire_above, v_min, levels, per_threshold, None, None, None,
                         FORM, HARD, CHUNK, K, TAILS, TERNARY)  # fmt: skip
        starts = scratch + tl.program_id(1) * neurons + n
        tl.store(starts, v, exists)
    v, current, adaptation = _march(
        v, current, adaptation, begin, end, x, x_step, spikes, inner, saved, neurons, n, i, limit,
        residual, mean, scale, offset, groups, v_seq, steps,
        leak, rest, threshold, fire_above, v_min, levels, per_threshold, synapse_decay, threshold_decay, jump,
        FORM, HARD, CHUNK, K, TAILS, TERNARY,
    )  # fmt: skip
    if scratch is not None:
        tl.store(starts + tl.cdiv(steps, segment_steps) * neurons, v, exists)
    if v_last is not None:
        _, last = _apart(neurons, synapse_decay, threshold_decay)
        now = exists if scratch is None else i < tl.where(end == steps, limit, 0)
        _store_all(v_last + n, v, current, adaptation, neurons, last, now)


@triton.jit
def _differ(a, b, exists):
    return ((a.to(tl.int32, bitcast=True) != b.to(tl.int32, bitcast=True)) & exists).to(tl.int32)


@triton.jit(do_not_specialize=_sizes)
def lif_repair_kernel(
    x, v0, spikes, v_last, saved, scratch, segment_steps, warmup, bias, bias_channels, bias_period,
    steps, neurons, inner, x_outer, x_step, per_row,
    leak, rest, threshold, fire_above, v_start, v_min, levels, per_threshold,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, TERNARY: tl.constexpr,
    SIDE: tl.constexpr = None, BIAS: tl.constexpr = None,
):  # fmt: skip
    """Runs again the segments that did not start where the one before ended, for all neurons of a program."""
    if TAILS == 0:
        steps = K
    neurons, inner = neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    n, i, limit, row, column = _place(neurons, inner, per_row, FLAT, BLOCK)
    exists = i < limit
    x += row * x_outer + column
    spikes += row * (steps * inner) + column
    segments = tl.cdiv(steps, segment_steps)
    starts = scratch + n
    ends = starts + segments * neurons
    differ = tl.zeros([BLOCK], tl.int32)
    for p in tl.range(1, segments, loop_unroll_factor=8):  # most often all there is to do; loads in flight together
        start = tl.load(starts + p * neurons, exists, other=0.0)
        differ |= _differ(tl.load(ends + (p - 1) * neurons, exists, other=0.0), start, exists)
    if tl.max(differ, 0) > 0:
        offset = _of_lanes(bias, bias_channels, bias_period, inner, per_row, BIAS, SIDE, FLAT, BLOCK)
        leak, threshold, fire_above = _number(leak), _number(threshold), _number(fire_above)
        v = tl.load(ends, exists, other=0.0)  # stays in registers: a new end stored may be another thread's to load
        for p in range(1, segments):
            if tl.max(_differ(v, tl.load(starts + p * neurons, exists, other=0.0), exists), 0) > 0:
                begin, end = _segment(p, segment_steps, steps)
                v, _, _ = _march(v, None, None, begin, end, x, x_step, spikes, inner, saved, neurons, n, i, limit,
                                 None, None, None, offset, None, None, steps,
                                 leak, rest, threshold, fire_above, v_min, levels, per_threshold, None, None, None,
                                 FORM, HARD, CHUNK, K, TAILS, TERNARY)  # fmt: skip
            else:
                v = tl.load(ends + p * neurons, exists, other=0.0)
        if v_last is not None:
            tl.store(v_last + n, v, exists)


@triton.jit
def _interpolate(x, a, b, c, samples):
    """Of surrogate.Table: a straight line through cell (x + a) b of c, each of which has its value and its slope."""
    at = (x + a) * b
    at = tl.where(at > 0.0, at, 0.0)  # a NaN is at 0
    at = tl.where(at < c, at, c)
    cell = tl.minimum(at, c - 1.0).to(tl.int32)
    return tl.fma(at - cell.to(tl.float32), tl.load(samples + 2 * cell + 1), tl.load(samples + 2 * cell))


@triton.jit
def _slope(x, a, b, c, samples, CURVE: tl.constexpr):
    return CURVE(x, a, b, c) if samples is None else _interpolate(x, a, b, c, samples)


@triton.jit
def _slopes(
    h, above, threshold, a, b, c, samples, levels, per_threshold, TERNARY: tl.constexpr, CURVE: tl.constexpr
):  # fmt: skip
    """ds/dh and -ds/dthreshold."""
    if levels is not None:
        u = _in_thresholds(h, threshold, per_threshold)
        inverse = tl.div_rn(1.0, threshold) if per_threshold is None else per_threshold
        g = tl.where((u >= 0.0) & (u <= levels), inverse, 0.0)
        by = tl.where(g != 0.0, g * u, 0.0)
    elif TERNARY:
        rise = _slope(above, a, b, c, samples, CURVE)
        fall = _slope(-h - threshold, a, b, c, samples, CURVE)
        g = rise + fall
        by = rise - fall
    else:
        g = _slope(above, a, b, c, samples, CURVE)
        by = g
    return g, by


@triton.jit
def _adjoint(
    h, upstream, grad_v, g, event, kept, threshold, rest, HARD: tl.constexpr, DETACH: tl.constexpr
):  # fmt: skip
    """What comes through a step to h, or minus that to the threshold:

    dL/ds g + dL/dv (kept + (rest - h) event)

    after a hard reset; after a soft one, -threshold is in the place of rest - h. ``g`` and ``event`` are derivatives of
    the spike and of what resets (None: the same). In any order: unlike that of the neurons, its rounding may differ
    from backend to backend.
    """
    if HARD:
        change = -h if rest is None else rest - h
    else:
        change = -threshold
    if DETACH:
        through = tl.fma(upstream, g, kept)
    elif event is None:
        curved = tl.fma(grad_v, change, upstream)
        if HARD or len(threshold.shape) > 0:
            curved = tl.where(g != 0.0, curved, upstream)  # at an infinite h, g is 0 and the product a NaN
        through = tl.fma(curved, g, kept)
    else:
        through = tl.fma(upstream, g, kept + tl.where(event != 0.0, grad_v * change * event, 0.0))
    return through


@triton.jit
def _pulled(
    h, threshold, fire_above, upstream, grad_v, rest, v_min, levels, per_threshold, threshold_decay, a, b, c, samples,
    HARD: tl.constexpr, TERNARY: tl.constexpr, DETACH: tl.constexpr, CURVE: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """What comes through a step to h before its bound, and minus that to its threshold (not BY: 0)."""
    above = h - threshold
    g, by = _slopes(h, above, threshold, a, b, c, samples, levels, per_threshold, TERNARY, CURVE)
    at = _above(threshold, fire_above, threshold_decay)
    if threshold_decay is None:
        # As h > fire_above, but of numbers that are at hand: nobody keeps K steps of answers in registers.
        fired = above > fire_above - threshold
        if TERNARY:
            fired |= -h - threshold > fire_above - threshold
    else:
        fired = _fired(_fire(h, threshold, at, levels, per_threshold, TERNARY))
    magnitude = by if TERNARY and HARD else None  # the derivative of |s|, which resets
    if samples is not None and HARD:  # whose ends need not be 0
        finite = tl.where((tl.abs(h) if TERNARY else h) == float("inf"), threshold, h)
    else:
        finite = h
    kept = tl.where(fired, 0.0, grad_v) if HARD else grad_v
    grad_h = _adjoint(finite, upstream, grad_v, g, magnitude, kept, threshold, rest, HARD, DETACH)
    if v_min is not None:
        grad_h = tl.where(h <= v_min, 0.0, grad_h)
    by_threshold = tl.zeros_like(grad_v)
    if BY:
        if HARD:
            kept = tl.zeros_like(grad_v)
        else:
            kept = grad_v * _count(_fire(h, threshold, at, levels, per_threshold, TERNARY))
        turned = g if TERNARY and HARD else None
        by_threshold = _adjoint(finite, upstream, grad_v, by, turned, kept, threshold, rest, HARD, DETACH)
    return grad_h, by_threshold


@triton.jit
def _retrace(
    grad_v, grad_current, grad_adaptation, one, two, three, begin, end, x, x_step, v0, saved, v_start, grad_spikes,
    grad_x, grad_residual, residual, mean, scale, offset, pull, push, groups, grad_v_seq, grad_leak, grad_threshold,
    grad_bias, steps, inner, neurons, n, i, limit, leak, rest, threshold, fire_above, v_min, levels, per_threshold,
    synapse_decay, threshold_decay, jump, input_gain, state_gain, a, b, c, samples,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr,
    BLOCK: tl.constexpr, TERNARY: tl.constexpr, DETACH: tl.constexpr, CURVE: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """The adjoint of the steps: dL/dx = input_gain dL/dh (None: 1), dL/dv[t-1] = state_gain dL/dh. With a synaptic
    current that dL/dx adds to dL/di, which is then dL/dx, and dL/di[t-1] = synapse_decay dL/di; with adaptation dL/ds
    has dL/da in it, and dL/da[t-1] = threshold_decay dL/da + jump dL/dthreshold.

    From dL/dv (dL/di, dL/da) after step end - 1 to that before ``begin``. Returns it (them), ``one``, ``two`` and
    ``three``. WANTED on the way:

    - "gradients": writes grad_x and grad_residual; adds dL/dleak to ``one``, dL/dthreshold to ``two`` and dL/dbias to
      ``three``, unless grad_leak, grad_threshold or grad_bias is None, over K steps at a time
    - "map": ``one``, a gain: dL/dv before begin = gain dL/dv after end + what it is for dL/dv = 0 after end
    - "sums": adds dL/dx to ``one``, and dL/dx (x - mean) to ``two``: in float32 over K steps, then in float64
    """
    exists = i < limit
    full = end if TAILS == 0 else end >> TAILS << TAILS
    # The last steps if they are fewer than K, repeating the very last; then K by K.
    for WHOLE in tl.static_range(1 if TAILS == 0 else 0, 2):
        for back in range(0, full - begin if WHOLE else end - full, K):
            t = full - K - back if WHOLE else full
            v, current, adaptation = _resume_all(
                t, v0, saved, v_start, n, i, limit, neurons, synapse_decay, threshold_decay, CHUNK, BLOCK
            )
            x_t = x + t * x_step
            xs = ()
            rs = ()
            upstream = ()
            if residual is not None:
                r_at = t * inner
            vs = ()
            if grad_v_seq is not None:
                v_at = t * inner
            if grad_spikes is not None:
                if groups is None:
                    u_t = grad_spikes + t * inner
                else:  # group_of(t), and the remainder, which wraps where a group ends
                    place = (2 * t + 1).to(tl.int64) * groups
                    u_t = grad_spikes + place // (2 * steps) * inner
                    phase = place % (2 * steps)
            for k in tl.static_range(K):
                xs += (tl.load(x_t, exists, other=0.0),)
                x_t += x_step if WHOLE else tl.where(t + k + 1 < end, x_step, 0)
                if residual is not None:
                    rs += (tl.load(residual + r_at, exists, other=0.0),)  # a scalar grows: fewer registers
                    r_at += inner if WHOLE else tl.where(t + k + 1 < end, inner, 0)
                if grad_v_seq is not None:
                    vs += (tl.load(grad_v_seq + v_at, exists, other=0.0),)
                    v_at += inner if WHOLE else tl.where(t + k + 1 < end, inner, 0)
                if grad_spikes is not None:
                    upstream += (tl.load(u_t, exists, other=0.0),)
                    if groups is None:
                        u_t += inner if WHOLE else tl.where(t + k + 1 < end, inner, 0)
                    else:
                        phase += 2 * groups
                        ends = phase >= 2 * steps
                        phase -= tl.where(ends, 2 * steps, 0)
                        u_t += tl.where(ends & (t + k + 1 < end), inner, 0)
            hs = ()
            drives = ()
            thresholds = ()
            for k in tl.static_range(K):
                received = _receive(xs[k], None if residual is None else rs[k], mean, scale, offset)
                current, received, h, raised, s = _step(
                    v, current, adaptation, received, leak, rest, threshold, fire_above, v_min, levels, per_threshold,
                    synapse_decay, threshold_decay, jump, FORM, TERNARY,
                )  # fmt: skip
                if grad_leak is not None:
                    drives += (_drive(v, received, rest, FORM),)
                v, adaptation = _settle(h, raised, s, adaptation, rest, threshold_decay, HARD)
                hs += (h,)
                thresholds += (raised,)
            if WANTED == "gradients":
                g_t = grad_x + (t + K) * inner
            if WANTED == "sums" or grad_leak is not None:
                total = tl.zeros([BLOCK], tl.float32)
            if WANTED == "sums" or grad_threshold is not None:
                moment = tl.zeros([BLOCK], tl.float32)
            if grad_bias is not None:
                pushes = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(K - 1, -1, -1):
                now = exists if WHOLE else i < tl.where(t + k < end, limit, 0)
                direct = tl.zeros([BLOCK], tl.float32) if grad_spikes is None else _float(upstream[k])
                if threshold_decay is not None:
                    direct += grad_adaptation
                after = grad_v if grad_v_seq is None else grad_v + vs[k]
                grad_h, by_threshold = _pulled(
                    hs[k], thresholds[k], fire_above, direct, after, rest, v_min, levels, per_threshold,
                    threshold_decay, a, b, c, samples, HARD, TERNARY, DETACH, CURVE,
                    grad_threshold is not None or threshold_decay is not None,
                )  # fmt: skip
                received = grad_h if input_gain is None else grad_h * input_gain
                if synapse_decay is not None:
                    received += grad_current
                    through = synapse_decay * received
                    grad_current = through if WHOLE else tl.where(now, through, grad_current)
                if grad_leak is not None:
                    by_leak = tl.where(grad_h != 0.0, grad_h * drives[k], 0.0)  # of an infinite potential
                    total += by_leak if WHOLE else tl.where(now, by_leak, 0.0)
                if grad_threshold is not None:
                    moment -= by_threshold if WHOLE else tl.where(now, by_threshold, 0.0)
                if threshold_decay is not None:
                    through = threshold_decay * grad_adaptation - jump * by_threshold
                    grad_adaptation = through if WHOLE else tl.where(now, through, grad_adaptation)
                if WANTED == "map":  # what becomes of 1, without anything from above
                    through, _ = _pulled(
                        hs[k], thresholds[k], fire_above, tl.zeros([BLOCK], tl.float32), one, rest, v_min, levels,
                        per_threshold, threshold_decay, a, b, c, samples, HARD, TERNARY, DETACH, CURVE, False,
                    )  # fmt: skip
                    one = through * state_gain if WHOLE else tl.where(now, through * state_gain, one)
                elif WANTED == "sums":
                    if not WHOLE:  # else what does not exist receives 0, from what is 0
                        received = tl.where(now, received, 0.0)
                    total += received
                    moment = tl.fma(received, _float(xs[k]) - mean, moment)
                else:
                    if grad_bias is not None:
                        pushes += received if WHOLE else tl.where(now, received, 0.0)
                    if grad_residual is not None:
                        tl.store(grad_residual + (t + k) * inner, received.to(grad_residual.dtype.element_ty), now)
                    if pull is not None:
                        received = tl.fma(scale, received, -tl.fma(_float(xs[k]) - mean, push, pull))
                    elif mean is not None:
                        received = scale * received
                    g_t -= inner
                    tl.store(g_t, received.to(grad_x.dtype.element_ty), now)
                grad_v = grad_h * state_gain if WHOLE else tl.where(now, grad_h * state_gain, grad_v)
            if WANTED == "sums":
                one += total.to(tl.float64)
                two += moment.to(tl.float64)
            if grad_leak is not None:
                one += total
            if grad_threshold is not None:
                two += moment
            if grad_bias is not None:
                three += pushes
    return grad_v, grad_current, grad_adaptation, one, two, three


@triton.jit(do_not_specialize=_sizes)
def lif_backward_kernel(
    x, v0, saved, grad_spikes, grad_v_last, grad_x, grad_v0, scratch, segment_steps,
    table, residual, channels, period, pull_push, grad_residual, groups,
    samples, grad_v_seq, grad_leak, grad_threshold, leak_channels, leak_period, threshold_channels, threshold_period,
    synapse_decay, threshold_decay, jump, bias, bias_channels, bias_period, grad_bias,
    steps, neurons, inner, x_outer, x_step, per_row,
    leak, rest, threshold, fire_above, v_start, v_min, levels, per_threshold, input_gain, state_gain, a, b, c,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, TERNARY: tl.constexpr,
    DETACH: tl.constexpr, CURVE: tl.constexpr, SPAN: tl.constexpr = None, SIDE: tl.constexpr = None,
    LEAK: tl.constexpr = None, THRESHOLD: tl.constexpr = None, BIAS: tl.constexpr = None,
):  # fmt: skip
    """With grad_x None, finds gain and carry of each segment but the first:

    dL/dv before it = gain dL/dv after it + carry
    """
    if TAILS == 0:
        steps = K
    neurons, inner = neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    n, i, limit, row, column = _place(neurons, inner, per_row, FLAT, BLOCK)
    exists = i < limit
    at = row * (steps * inner) + column
    x += row * x_outer + column
    if grad_spikes is not None:
        grad_spikes += at if groups is None else row * (groups * inner) + column
    if grad_x is not None:
        grad_x += at
    if residual is not None:
        residual += at
    if grad_residual is not None:
        grad_residual += at
    mean, scale, offset, pull, push = None, None, None, None, None
    if table is not None:
        channel = _channel(inner, per_row, channels, period, SPAN, SIDE, FLAT, BLOCK)
        mean = tl.load(table + channel)
        scale = tl.load(table + channels + channel)
        offset = tl.load(table + 2 * channels + channel)
        if pull_push is not None:
            pull = tl.load(pull_push + channel)
            push = tl.load(pull_push + channels + channel)
    elif bias is not None:
        offset = _of_lanes(bias, bias_channels, bias_period, inner, per_row, BIAS, SIDE, FLAT, BLOCK)
    if grad_v_seq is not None:
        grad_v_seq += at
    leak = _of_lanes(leak, leak_channels, leak_period, inner, per_row, LEAK, SIDE, FLAT, BLOCK)
    if LEAK is not None:
        input_gain, state_gain = _gains(leak, FORM)
    if fire_above is not None:
        fire_above = _of_lanes(
            fire_above, threshold_channels, threshold_period, inner, per_row, THRESHOLD, SIDE, FLAT, BLOCK
        )
    threshold = _of_lanes(threshold, threshold_channels, threshold_period, inner, per_row, THRESHOLD, SIDE, FLAT, BLOCK)
    grad_v, grad_current, grad_adaptation = _start_all(
        grad_v_last, 0.0, n, exists, neurons, synapse_decay, threshold_decay, BLOCK
    )
    begin, end = 0, steps
    if scratch is not None:
        segments = tl.cdiv(steps, segment_steps)
        segment = tl.program_id(1)
        gains = scratch + n
        carries = gains + segments * neurons
        if grad_x is None:
            segment += 1
        else:
            for back in tl.range(1, segments - segment, loop_unroll_factor=8):  # loads in flight together
                later = (segments - back) * neurons
                carry = tl.load(carries + later, exists, other=0.0)
                gain = tl.load(gains + later, exists, other=0.0)
                some = grad_v != 0.0 if v_min is None else (grad_v != 0.0) & (gain != 0.0)
                grad_v = tl.where(some, gain * grad_v + carry, carry)
        begin, end = _segment(segment, segment_steps, steps)
        if grad_bias is not None:
            grad_bias += segment * neurons
    zeros = tl.zeros([BLOCK], tl.float32)
    grad_v, grad_current, grad_adaptation, one, two, three = _retrace(
        grad_v, grad_current, grad_adaptation, zeros + 1.0 if grad_x is None else zeros, zeros, zeros, begin, end,
        x, x_step, v0, saved, v_start, grad_spikes, grad_x, grad_residual, residual, mean, scale, offset, pull, push,
        groups, grad_v_seq, grad_leak, grad_threshold, grad_bias, steps, inner, neurons, n, i, limit,
        leak, rest, threshold, fire_above, v_min, levels, per_threshold, synapse_decay, threshold_decay, jump,
        input_gain, state_gain, a, b, c, samples, FORM, HARD, CHUNK, K, TAILS, BLOCK, TERNARY, DETACH, CURVE,
        "map" if grad_x is None else "gradients",
    )  # fmt: skip
    if grad_leak is not None:
        tl.store(grad_leak + n, one, exists)
    if grad_threshold is not None:
        tl.store(grad_threshold + n, two, exists)
    if grad_bias is not None:
        tl.store(grad_bias + n, three, exists)
    if grad_x is None:
        tl.store(gains + segment * neurons, one, exists)
        tl.store(carries + segment * neurons, grad_v, exists)
    elif grad_v0 is not None:
        _, last = _apart(neurons, synapse_decay, threshold_decay)
        now = exists if scratch is None else i < tl.where(begin == 0, limit, 0)
        _store_all(grad_v0 + n, grad_v, grad_current, grad_adaptation, neurons, last, now)


def _form(spec: LIFSpec) -> str:
    """``_inverse``: the leak is a power of two, and dividing by it is multiplying by its inverse, bit for bit."""
    divides = spec.form in ("tau_input", "tau") and spec.leak is not None
    return f"{spec.form}_inverse" if divides and _has_inverse(spec.leak) else spec.form


def _has_inverse(number: float) -> bool:
    """Whether ``number`` is a power of two, and so is its inverse in float32."""
    return math.frexp(number)[0] == 0.5 and 2.0**-126 <= number <= 2.0**126


@lru_cache(maxsize=512)
def _numbers(spec: LIFSpec) -> list[float | None]:
    """leak, ..., c of the kernels (the first eight are forward's), as float32; see Neuron in ``csrc/neuron.h``. None: a
    rest of 0 or an input gain of 1, which kernels leave out, what the neuron does not have, and what is a tensor; of
    fire_above, see ``_raised``."""
    fire_above, input_gain, state_gain, per_threshold = None, None, None, None
    if spec.threshold is not None:
        threshold = torch.tensor(spec.threshold, dtype=torch.float32, device="cpu")
        below = torch.nextafter(threshold, torch.full_like(threshold, -math.inf))
        fire_above = (below if spec.fire_at_threshold else threshold).item()
        if spec.levels and spec.threshold_decay is None and _has_inverse(spec.threshold):
            per_threshold = 1 / spec.threshold
    leak = spec.leak
    if leak is not None:
        if spec.form.startswith("tau_input"):
            input_gain = leak if spec.form.endswith("inverse") else 1 / leak
        state_gain = spec.state_gain
        leak = leak if _form(spec) == spec.form else 1 / leak
    if spec.threshold_decay is not None and spec.fire_at_threshold:
        fire_above = None
    forward = leak, spec.rest or None, spec.threshold, fire_above, spec.v_start
    more = spec.v_min, float(spec.levels) if spec.levels else None, per_threshold
    numbers = *forward, *more, input_gain, state_gain, *spec.surrogate.constants()
    return [None if number is None else ctypes.c_float(number).value for number in numbers]


_compiled = lru_cache(maxsize=None)(triton.jit)  # a surrogate's twin, compiled once


_NO_MORE = More()


def _curve(spec: LIFSpec):
    """The surrogate's twin; None: the kernels have it themselves."""
    twin = spec.surrogate.twin()._triton
    return None if twin is None else _compiled(twin)


@lru_cache(maxsize=1)
def _machine() -> tuple[str, int]:
    """Triton's name of the kind of GPU, and the threads in a warp."""
    if interpreted():
        return "interpreter", 256  # where an operation costs the same on any number of elements
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size


@cache
def _processors(device: int | None) -> int:
    if interpreted():
        return 132
    return triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"]


class _Tile(NamedTuple):
    """What a program holds: neurons per thread, warps, and at most 2**log_k steps at a time."""

    per_thread: int
    warps: int
    log_k: int
    maxnreg: int | None = None  # registers per thread, on NVIDIA; left alone, ptxas spills some to have more warps

    @property
    def options(self):
        registers = {"maxnreg": self.maxnreg} if self.maxnreg and _machine()[0] == "cuda" else {}
        return {"num_warps": self.warps, "enable_fp_fusion": False, **registers}


FEW = 8  # steps
WIDE = 1 << 18  # neurons
# The tile for at least as many neurons (of few steps, an eighth of it), and the one for fewer: then threads are scarce,
# and take one neuron each but more steps at a time. Forward, by bytes of an element, a thread takes 16 bytes of x;
# backward is limited by registers, where K is at most CHUNK.
FORWARD = {2: (_Tile(8, 2, 3), _Tile(1, 1, 5)), 4: (_Tile(4, 2, 3), _Tile(1, 1, 5))}
BACKWARD_FEW = _Tile(4, 2, 3, maxnreg=255), _Tile(1, 1, 3)
BACKWARD = _Tile(2, 2, 4, maxnreg=255), _Tile(1, 1, 4)


def _split(spec, layout, x, norm, more, shortest, warm=0):
    """Segments of time, and what the kernels take for them: scratch, and steps and warm-up of a segment."""
    whole = 1, None, None, None
    if norm is not None or layout.steps_out < layout.steps or spec.states > 1 or _has_more(more):
        return whole
    split = for_gpu(layout.steps, layout.outer * layout.inner, _processors(x.device.index), shortest, warm)
    if split.segments == 1:
        return whole
    return split.segments, split.scratch(layout, torch.float32, x.device), split.steps, split.warmup


def _sizes_of(layout, unit=16, *others):
    """The unit that sizes go in, and neurons, inner, x_outer and x_step: it is ``unit`` if all of them can, and all
    others. From it Triton knows that rows are aligned, and loads 16 bytes."""
    _, outer, _, inner, x_outer, x_step, _ = layout
    sizes = (outer * inner, inner, x_outer, x_step)
    unit = unit if all(size % unit == 0 for size in (*sizes, *others)) else 1
    return unit, [size // unit for size in sizes]


def _of_norm(norm):
    """table, residual, channels, period"""
    return (None,) * 4 if norm is None else (norm.table, norm.residual, norm.channels, norm.period)


def _has_more(more):
    """Whether it is more than a table and a bias. Then time is not split."""
    return any(each is not None for each in (more.leak, more.threshold, more.v_seq, more.grad_v_seq))


def _sizes_of_parameters(more):
    """leak_channels, ..., threshold_period"""
    return [size for p in (more.leak, more.threshold) for size in ((None, None) if p is None else p[1:])]


def _states(spec):
    """synapse_decay, threshold_decay and jump, as float32; None: no such state."""
    numbers = spec.synapse_decay, spec.threshold_decay, None if spec.threshold_decay is None else spec.threshold_jump
    return [None if number is None else ctypes.c_float(number).value for number in numbers]


def _bias(more):
    """bias, bias_channels, bias_period"""
    return more.bias or (None,) * 3


def _span(p, block, rows):
    """SPAN and SIDE of ``_channel``, of what has channels and a period, where programs begin at multiples of a block in
    rows of so many neurons (1: in one row)."""
    line = p.channels if p.period == 1 else p.period
    same = p.period % block == 0 and (rows == 1 or rows % block == 0)
    side = 4 if line % 4 == 0 and (rows == 1 or rows % 4 == 0) else 1
    return "same" if same else "last" if p.period == 1 else "any", side


def _spans(more, block, rows):
    """LEAK, THRESHOLD and BIAS of ``_of_lanes``, of those that are tensors, and SIDE."""
    spans = {
        name: ("one", 4) if p.channels == 1 else _span(p, block, rows)
        for name, p in (("LEAK", more.leak), ("THRESHOLD", more.threshold), ("BIAS", more.bias))
        if p is not None
    }
    return {name: span for name, (span, _) in spans.items()} | {"SIDE": min(side for _, side in spans.values())}


def _groups(layout):
    return layout.steps_out if layout.steps_out < layout.steps else None


def _in_time(most, steps):
    """The steps at a time, at most 2**most, and how often what remains is halved (0: nothing does)."""
    if 1 <= steps <= min(FEW, 1 << most):
        return {"K": steps, "TAILS": 0}
    log_k = min(most, (max(steps, 2) - 1).bit_length())
    return {"K": 1 << log_k, "TAILS": log_k}


def _given(spec, numbers, more):
    """leak, ..., with tensors where they are given."""
    numbers = list(numbers)
    if more.leak is not None:
        numbers[0] = more.leak.data
    if more.threshold is not None:
        at_threshold = spec.threshold_decay is not None and spec.fire_at_threshold
        numbers[2:4] = more.threshold.data, None if at_threshold else more.fire_above
    return numbers


def _launch(kernel, tiles, segments, spec, layout, norm, more, tensors, numbers, **options):
    outer, inner = layout.outer, layout.inner
    neurons = outer * inner
    if neurons == 0:
        return
    _, warp_size = _machine()
    for tile in tiles[neurons < (WIDE if layout.steps > FEW else WIDE // 8) :]:
        block = tile.per_thread * tile.warps * warp_size
        flat = outer > 1 and inner % block > 0 and inner < 4 * block
        if not flat:
            break
    rows = 1 if flat or outer == 1 else inner  # where programs begin, but for multiples of a block
    if norm is not None:
        options["SPAN"], options["SIDE"] = _span(norm, block, rows)
    elif more.leak is not None or more.threshold is not None or more.bias is not None:
        options |= _spans(more, block, rows)
        numbers = _given(spec, numbers, more)
    unit, sizes = _sizes_of(layout)
    per_row = triton.cdiv(inner, block)
    with on(tensors[0].device):
        kernel[(triton.cdiv(neurons, block) if flat else outer * per_row, segments)](
            *tensors,
            layout.steps,
            *sizes,
            per_row if outer > 1 else None,
            *numbers,
            FORM=_form(spec),
            HARD=spec.reset is not None,
            CHUNK=CHUNK,
            **_in_time(tile.log_k, layout.steps),
            UNIT=unit,
            FLAT=flat,
            BLOCK=block,
            TERNARY=spec.ternary,
            **tile.options,
            **options,
        )


def lif_forward(spec, layout, call):
    *tensors, norm, more = call
    more, warm = more or _NO_MORE, 0
    if spec.leak is not None:
        warm = warmup(spec.state_gain, torch.float32)
    segments, *split = _split(spec, layout, call.x, norm, more, max(warm, 4 * CHUNK), warm)
    wide, narrow = FORWARD[call.x.element_size()]
    plain = norm is None and _groups(layout) is None and spec.states == 1 and more.bias is None and not _has_more(more)
    tiles = wide if plain else wide._replace(maxnreg=255), narrow
    of, numbers, tensors = (spec, layout, norm, more), _numbers(spec)[:8], (*tensors, *split)
    rest = *_of_norm(norm), _groups(layout), more.v_seq, *_sizes_of_parameters(more), *_states(spec), *_bias(more)
    _launch(lif_forward_kernel, tiles, segments, *of, (*tensors, *rest), numbers)
    if segments > 1:
        _launch(lif_repair_kernel, tiles, 1, *of, (*tensors, *_bias(more)), numbers)


def lif_backward(spec, layout, call):
    x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, norm, *of_norm, more = call
    more = more or _NO_MORE
    segments, scratch, segment_steps, _ = _split(spec, layout, x, norm, more, 8 * CHUNK)
    of_more = more.table, more.grad_v_seq, more.grad_leak, more.grad_threshold, *_sizes_of_parameters(more)
    rest = *_of_norm(norm), *of_norm, _groups(layout), *of_more, *_states(spec), *_bias(more)
    grad_bias = parts_of(more.grad_bias, segments)
    tiles = BACKWARD_FEW if layout.steps <= FEW else BACKWARD
    if layout.steps > FEW and more.grad_v_seq is not None and more.grad_leak is not None:
        tiles = tiles[1:] * 2  # two neurons of a thread would spill

    def launch(segments, *gradients, grad_bias=None):
        tensors = x, v, saved, grad_spikes, *gradients, scratch, segment_steps, *rest, grad_bias
        _launch(lif_backward_kernel, tiles, segments, spec, layout, norm, more, tensors, _numbers(spec),
                DETACH=spec.detach_reset, CURVE=_curve(spec))  # fmt: skip

    if segments > 1:
        launch(segments - 1, None, None, None)
    launch(segments, grad_v_last, grad_x, grad_v, grad_bias=grad_bias)
    add_up(grad_bias, more.grad_bias)
