"""Layers of neurons that receive their own spikes a step later, in Triton: see ``csrc/lif.h``'s Recurrence.

A program has one layer, all of whose neurons step together, and walks over time:

- forward: who fired at the step before is found in ascending order, by the least index of those left, a reduction over
  the program for each; its row of ``outgoing`` is added. The time is that of the spikes.
- backward, chunk by chunk from the last: the steps are run again from the states kept and forward's spikes, and what
  their adjoint needs goes to ``scratch``. Then the adjoint: to dL/ds of a step comes dL/dx of the step behind it, times
  the weight, ROWS rows at a time and all of them, however few neurons fired.

This keeps few threads busy and waits at each step; with many neurons in a layer CUDA's kernels are the faster ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...spec.split import CHUNK
from .. import on
from .lif import (
    _NO_MORE,
    _apart,
    _bias,
    _count,
    _curve,
    _drive,
    _float,
    _form,
    _gains,
    _given,
    _machine,
    _number,
    _numbers,
    _pulled,
    _receive,
    _resume_all,
    _settle,
    _sizes_of,
    _sizes_of_parameters,
    _start_all,
    _states,
    _step,
    _store_all,
)

_sizes = ["leak_channels", "leak_period", "threshold_channels", "threshold_period", "bias_channels", "bias_period"]
_sizes += ["steps", "size", "neurons", "inner", "x_outer", "x_step"]


@triton.jit
def _place(size, inner, BLOCK: tl.constexpr):
    """A program's neurons n, whether they exist, and where they are in [outer, inner]."""
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * size
    return first + lane, lane, lane < size, first // inner, first % inner + lane


@triton.jit
def _of_neurons(p, channels, period, n, exists):
    """A parameter that is a number (channels None) or a tensor."""
    return _number(p) if channels is None else tl.load(p + n // period % channels, exists, other=1.0)


@triton.jit
def _heard(s, outgoing, size, lane, exists, BINARY: tl.constexpr):
    """The sum, in ascending j from 0, of s[j] times row j of ``outgoing``, over the neurons that fired."""
    r = tl.zeros_like(s)
    fired = s != 0.0
    j = tl.min(tl.where(fired, lane, s.shape[0]), 0)
    while j < s.shape[0]:
        sent = tl.load(outgoing + j * size + lane, exists, other=0.0)
        r += sent if BINARY else sent * tl.sum(tl.where(lane == j, s, 0.0), 0)
        j = tl.min(tl.where(fired & (lane > j), lane, s.shape[0]), 0)
    return r


@triton.jit
def _sent(g, weight, size, lane, exists, ROWS: tl.constexpr):
    """The sum over k of g[k], which is 0 where no neuron exists, times row k of ``weight``."""
    total = tl.zeros_like(g)
    for first in range(0, size, ROWS):
        k = first + tl.arange(0, ROWS)
        rows = tl.load(weight + k[:, None] * size + lane[None, :], (k < size)[:, None] & exists[None, :], other=0.0)
        total += tl.sum(tl.gather(g, k.to(tl.int32), 0)[:, None] * rows, 0)
    return total


@triton.jit(do_not_specialize=_sizes)
def recurrent_forward_kernel(
    x, v0, spikes, v_last, saved, outgoing, s0,
    leak_channels, leak_period, threshold_channels, threshold_period, synapse_decay, threshold_decay, jump,
    bias, bias_channels, bias_period, steps, size, neurons, inner, x_outer, x_step,
    leak, rest, threshold, fire_above, v_start, v_min, levels, per_threshold,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    TERNARY: tl.constexpr,
):  # fmt: skip
    size, neurons, inner = size.to(tl.int64) * UNIT, neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    n, lane, exists, row, column = _place(size, inner, BLOCK)
    x += row * x_outer + column
    spikes += row * (steps * inner) + column
    leak = _of_neurons(leak, leak_channels, leak_period, n, exists)
    threshold = _of_neurons(threshold, threshold_channels, threshold_period, n, exists)
    if fire_above is not None:
        fire_above = _of_neurons(fire_above, threshold_channels, threshold_period, n, exists)
    if bias is not None:
        bias = _of_neurons(bias, bias_channels, bias_period, n, exists)
    apart, last = _apart(neurons, synapse_decay, threshold_decay)
    v, current, adaptation = _start_all(v0, v_start, n, exists, neurons, synapse_decay, threshold_decay, BLOCK)
    s = tl.zeros([BLOCK], tl.float32)
    if s0 is not None:
        s = _float(tl.load(s0 + n, exists, other=0.0))
    for t in range(steps):
        if saved is not None:
            if (t > 0) & (t % CHUNK == 0):
                kept = saved + (t // CHUNK - 1) * apart + n
                _store_all(kept, v, current, adaptation, neurons, last, exists)
        received = _receive(tl.load(x + t * x_step, exists, other=0.0), None, None, None, bias)
        received += _heard(s, outgoing, size, lane, exists, not TERNARY and levels is None)
        current, _, h, raised, fired = _step(
            v, current, adaptation, received, leak, rest, threshold, fire_above, v_min, levels, per_threshold,
            synapse_decay, threshold_decay, jump, FORM, TERNARY,
        )  # fmt: skip
        v, adaptation = _settle(h, raised, fired, adaptation, rest, threshold_decay, HARD)
        s = tl.where(exists, _count(fired), 0.0)
        tl.store(spikes + t * inner, s.to(spikes.dtype.element_ty), exists)
    if v_last is not None:
        _store_all(v_last + n, v, current, adaptation, neurons, last, exists)


@triton.jit(do_not_specialize=_sizes)
def recurrent_backward_kernel(
    x, v0, saved, grad_spikes, grad_v_last, grad_x, grad_v0, weight, outgoing, s0, spikes, grad_s0, scratch, samples,
    grad_leak, grad_threshold, grad_bias,
    leak_channels, leak_period, threshold_channels, threshold_period, synapse_decay, threshold_decay, jump,
    bias, bias_channels, bias_period, steps, size, neurons, inner, x_outer, x_step,
    leak, rest, threshold, fire_above, v_start, v_min, levels, per_threshold, input_gain, state_gain, a, b, c,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    TERNARY: tl.constexpr, DETACH: tl.constexpr, CURVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``scratch``, a row of neurons for each step of a chunk: h; thresholds; what leaks multiply."""
    size, neurons, inner = size.to(tl.int64) * UNIT, neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    n, lane, exists, row, column = _place(size, inner, BLOCK)
    at = row * (steps * inner) + column
    x += row * x_outer + column
    spikes += at
    grad_x += at
    if grad_spikes is not None:
        grad_spikes += at
    hs = scratch + n
    thresholds = hs + CHUNK * neurons
    drives = thresholds if threshold_decay is None else thresholds + CHUNK * neurons
    leak = _of_neurons(leak, leak_channels, leak_period, n, exists)
    if leak_channels is not None:
        input_gain, state_gain = _gains(leak, FORM)
    threshold = _of_neurons(threshold, threshold_channels, threshold_period, n, exists)
    if fire_above is not None:
        fire_above = _of_neurons(fire_above, threshold_channels, threshold_period, n, exists)
    if bias is not None:
        bias = _of_neurons(bias, bias_channels, bias_period, n, exists)
    grad_v, grad_current, grad_adaptation = _start_all(
        grad_v_last, 0.0, n, exists, neurons, synapse_decay, threshold_decay, BLOCK
    )
    by_spike = tl.zeros([BLOCK], tl.float32)  # dL/ds, through what the spike sent
    by_leak = tl.zeros([BLOCK], tl.float32)
    by_threshold = tl.zeros([BLOCK], tl.float32)
    by_bias = tl.zeros([BLOCK], tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    if s0 is not None:
        s = _float(tl.load(s0 + n, exists, other=0.0))
    first = _heard(s, outgoing, size, lane, exists, not TERNARY and levels is None)
    for back in range(0, steps, CHUNK):
        begin = (steps - 1) // CHUNK * CHUNK - back
        end = tl.minimum(begin + CHUNK, steps)
        v, current, adaptation = _resume_all(
            begin, v0, saved, v_start, n, lane, size, neurons, synapse_decay, threshold_decay, CHUNK, BLOCK
        )
        for t in range(begin, end):
            heard = first
            if t > 0:
                s = _float(tl.load(spikes + (t - 1) * inner, exists, other=0.0))
                heard = _heard(s, outgoing, size, lane, exists, not TERNARY and levels is None)
            received = _receive(tl.load(x + t * x_step, exists, other=0.0), None, None, None, bias) + heard
            current, received, h, raised, fired = _step(
                v, current, adaptation, received, leak, rest, threshold, fire_above, v_min, levels, per_threshold,
                synapse_decay, threshold_decay, jump, FORM, TERNARY,
            )  # fmt: skip
            tl.store(hs + (t - begin) * neurons, h, exists)
            if threshold_decay is not None:
                tl.store(thresholds + (t - begin) * neurons, raised, exists)
            if grad_leak is not None:
                tl.store(drives + (t - begin) * neurons, _drive(v, received, rest, FORM), exists)
            v, adaptation = _settle(h, raised, fired, adaptation, rest, threshold_decay, HARD)
        tl.debug_barrier()  # a thread may load what another has stored
        for k in range(end - begin - 1, -1, -1):
            t = begin + k
            h = tl.load(hs + k * neurons, exists, other=0.0)
            raised = threshold
            if threshold_decay is not None:
                raised = tl.load(thresholds + k * neurons, exists, other=1.0)
            upstream = by_spike
            if grad_spikes is not None:
                upstream += _float(tl.load(grad_spikes + t * inner, exists, other=0.0))
            if threshold_decay is not None:
                upstream += grad_adaptation
            grad_h, less = _pulled(
                h, raised, fire_above, upstream, grad_v, rest, v_min, levels, per_threshold, threshold_decay,
                a, b, c, samples, HARD, TERNARY, DETACH, CURVE,
                grad_threshold is not None or threshold_decay is not None,
            )  # fmt: skip
            received = grad_h if input_gain is None else grad_h * input_gain
            if synapse_decay is not None:
                received += grad_current
                grad_current = synapse_decay * received
            if grad_leak is not None:
                driven = tl.load(drives + k * neurons, exists, other=0.0)
                by_leak += tl.where(grad_h != 0.0, grad_h * driven, 0.0)
            by_threshold -= less
            if threshold_decay is not None:
                grad_adaptation = threshold_decay * grad_adaptation - jump * less
            by_bias += received
            tl.store(grad_x + t * inner, received.to(grad_x.dtype.element_ty), exists)
            grad_v = grad_h * state_gain
            by_spike = _sent(tl.where(exists, received, 0.0), weight, size, lane, exists, ROWS)
    if grad_leak is not None:
        tl.store(grad_leak + n, by_leak, exists)
    if grad_threshold is not None:
        tl.store(grad_threshold + n, by_threshold, exists)
    if grad_bias is not None:
        tl.store(grad_bias + n, by_bias, exists)
    if grad_s0 is not None:
        tl.store(grad_s0 + n, by_spike, exists)
    if grad_v0 is not None:
        _, last = _apart(neurons, synapse_decay, threshold_decay)
        _store_all(grad_v0 + n, grad_v, grad_current, grad_adaptation, neurons, last, exists)


def _block(size):
    """The lanes of a program, and its warps."""
    block = triton.next_power_of_2(size)
    return block, min(max(block // _machine()[1], 1), 16)


def _launch(kernel, spec, layout, size, more, tensors, numbers, **options):
    neurons = layout.outer * layout.inner
    if neurons == 0:
        return
    unit, sizes = _sizes_of(layout, 16, size)
    block, warps = _block(size)
    with on(tensors[0].device):
        kernel[(neurons // size,)](
            *tensors,
            *_sizes_of_parameters(more),
            *_states(spec),
            *_bias(more),
            layout.steps,
            size // unit,
            *sizes,
            *_given(spec, numbers, more),
            FORM=_form(spec),
            HARD=spec.reset is not None,
            CHUNK=CHUNK,
            UNIT=unit,
            BLOCK=block,
            TERNARY=spec.ternary,
            num_warps=warps,
            enable_fp_fusion=False,
            **options,
        )


def recurrent_forward(spec, layout, call, recurrence):
    *tensors, _, more = call
    size = len(recurrence.weight)
    tensors = *tensors, recurrence.outgoing, recurrence.s
    _launch(recurrent_forward_kernel, spec, layout, size, more or _NO_MORE, tensors, _numbers(spec)[:8])


def recurrent_backward(spec, layout, call, recurrence):
    *tensors, _, _, _, more = call
    more, size = more or _NO_MORE, len(recurrence.weight)
    of_chunk = 1 + (spec.threshold_decay is not None) + (more.grad_leak is not None)
    scratch = (CHUNK * of_chunk, layout.outer * layout.inner)
    scratch = torch.empty(scratch, dtype=torch.float32, device=call.x.device)
    sums = more.grad_leak, more.grad_threshold, more.grad_bias
    weight, outgoing, s, spikes, grad_s = recurrence
    tensors = *tensors, weight, outgoing, s, spikes, grad_s, scratch, more.table, *sums
    block, warps = _block(size)
    rows = min(block, max(16 * warps * _machine()[1] // block, 1))  # 16 of their numbers in a thread
    options = {"DETACH": spec.detach_reset, "CURVE": _curve(spec), "ROWS": triton.next_power_of_2(rows)}
    _launch(recurrent_backward_kernel, spec, layout, size, more, tensors, _numbers(spec), **options)
