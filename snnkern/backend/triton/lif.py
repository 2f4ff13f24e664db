"""The LIF kernels in Triton, and their launches. The mathematics, its order included, is that of ``csrc/neuron.h``.

A program holds BLOCK neurons and walks over time K steps at a time. The loads of K steps stand before their arithmetic
and before the first store, across which compilers do not move loads, so that all of them are in flight together.

- forward: load K steps of x, step the neurons, store their spikes; v stays in registers.
- backward, from the last K steps to the first: load x, the upstream gradient and the v kept; recompute h, into
  registers; then run the adjoint.

K is that of the tile, or with fewer steps their next power of two: a kernel serves every number of steps of one K.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import surrogate
from ...ops.lif import CHUNK, LIFSpec
from . import interpreted

surrogate.tl = tl  # the language of the twins there

_sizes = ["steps", "neurons", "inner", "x_outer", "x_step", "per_row"]


@triton.jit
def _charge(v, x, leak, rest, FORM: tl.constexpr):
    if FORM == "decay":
        h = leak * v + x
    elif FORM == "tau_input":
        h = v + tl.div_rn(x - (v - rest), leak)
    else:
        h = v - tl.div_rn(v - rest, leak) + x
    return h


@triton.jit
def _reset(h, fired, threshold, reset, HARD: tl.constexpr):
    # A select, not a product: an infinite h leaves no NaN behind.
    if HARD:
        v = tl.where(fired, reset, h)
    else:
        v = tl.where(fired, h - threshold, h)
    return v


@triton.jit
def _start(v, otherwise, n, exists, BLOCK: tl.constexpr):
    if v is None:
        start = tl.full([BLOCK], otherwise, tl.float32)
    else:
        start = tl.load(v + n, exists, other=0.0)
    return start


@triton.jit
def _resume(t, v0, saved, v_start, neurons, n, i, limit, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The potential before step t, a multiple of CHUNK. Without a branch, which would hold up the loads after it."""
    if saved is None:
        v = _start(v0, v_start, n, i < limit, BLOCK)
    else:
        later = i < tl.where(t > 0, limit, 0)
        v = tl.load(saved + (t // CHUNK - 1) * neurons + n, later, other=v_start)
        if v0 is not None:
            v = tl.where(later, v, tl.load(v0 + n, i < tl.where(t > 0, 0, limit), other=0.0))
    return v


@triton.jit
def _place(steps, neurons, inner, x_outer, per_row, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """A program's neurons n, of which those with i < limit exist, and their offsets at step 0: in x, and elsewhere.

    A program lies in one of the outer rows, or (FLAT, for rows too short for that) anywhere in [outer * inner].
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
        row = (tl.program_id(0) // per_row).to(tl.int64)
        column = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK + lane
        n = row * inner + column
        i = column
        limit = inner
    return n, i, limit, row * x_outer + column, row * (steps * inner) + column


@triton.jit(do_not_specialize=_sizes)
def lif_forward_kernel(
    x, v0, spikes, v_last, saved, steps, neurons, inner, x_outer, x_step, per_row,
    leak, rest, threshold, fire_above, reset, v_start,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, LOG_K: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    neurons, inner = neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    n, i, limit, x_at, at = _place(steps, neurons, inner, x_outer, per_row, FLAT, BLOCK)
    exists = i < limit
    v = _start(v0, v_start, n, exists, BLOCK)
    done = 0
    for p in tl.static_range(LOG_K, -1, -1):  # as many K steps as there are, then K/2, ..., 1: none needs a mask
        for t in range(done, steps >> p << p, 1 << p):
            x_t = x + x_at + t * x_step
            s_t = spikes + at + t * inner
            xs = ()
            for _ in tl.static_range(1 << p):
                xs += (tl.load(x_t, exists, other=0.0),)
                x_t += x_step
            for k in tl.static_range(1 << p):
                if saved is not None and k % CHUNK == 0:
                    if (t + k > 0) & ((t + k) % CHUNK == 0):
                        tl.store(saved + ((t + k) // CHUNK - 1) * neurons + n, v, exists)
                h = _charge(v, xs[k].to(tl.float32), leak, rest, FORM)
                fired = h > fire_above
                tl.store(s_t, tl.where(fired, 1.0, 0.0).to(spikes.dtype.element_ty), exists)
                s_t += inner
                v = _reset(h, fired, threshold, reset, HARD)
        done = steps >> p << p
    tl.store(v_last + n, v, exists)


@triton.jit(do_not_specialize=_sizes)
def lif_backward_kernel(
    x, v0, saved, grad_spikes, grad_v_last, grad_x, grad_v0, steps, neurons, inner, x_outer, x_step, per_row,
    leak, rest, threshold, fire_above, reset, v_start, input_gain, state_gain, a, b, c,
    FORM: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, LOG_K: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
    DETACH: tl.constexpr, CURVE: tl.constexpr,
):  # fmt: skip
    """Adjoint of a step, g = surrogate'(h - threshold):

    dL/dh = dL/ds g + dL/dv (keep + (pull - push h) g),   keep = 1, but 0 after a hard reset
    dL/dx = input_gain dL/dh,   dL/dv[t-1] = state_gain dL/dh
    """
    K: tl.constexpr = 1 << LOG_K
    neurons, inner = neurons.to(tl.int64) * UNIT, inner.to(tl.int64) * UNIT
    x_outer, x_step = x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    n, i, limit, x_at, at = _place(steps, neurons, inner, x_outer, per_row, FLAT, BLOCK)
    exists = i < limit
    grad_v = _start(grad_v_last, 0.0, n, exists, BLOCK)
    full = steps >> LOG_K << LOG_K
    for WHOLE in tl.static_range(2):  # the last steps if they are fewer than K, repeating the very last; then K by K
        for back in range(0, full if WHOLE else steps - full, K):
            t = full - K - back if WHOLE else full
            v = _resume(t, v0, saved, v_start, neurons, n, i, limit, CHUNK, BLOCK)
            x_t = x + x_at + t * x_step
            xs = ()
            upstream = ()
            if grad_spikes is not None:
                u_t = grad_spikes + at + t * inner
            for k in tl.static_range(K):
                xs += (tl.load(x_t, exists, other=0.0),)
                x_t += x_step if WHOLE else tl.where(t + k + 1 < steps, x_step, 0)
                if grad_spikes is not None:
                    upstream += (tl.load(u_t, exists, other=0.0),)
                    u_t += inner if WHOLE else tl.where(t + k + 1 < steps, inner, 0)
            hs = ()
            for k in tl.static_range(K):
                h = _charge(v, xs[k].to(tl.float32), leak, rest, FORM)
                v = _reset(h, h > fire_above, threshold, reset, HARD)
                hs += (h,)
            g_t = grad_x + at + (t + K) * inner
            for k in tl.static_range(K - 1, -1, -1):
                g_t -= inner
                now = exists if WHOLE else i < tl.where(t + k < steps, limit, 0)
                h = hs[k]
                g = CURVE(h - threshold, a, b, c)
                if HARD:
                    kept = tl.where(h > fire_above, 0.0, 1.0)
                else:
                    kept = 1.0
                if not DETACH:
                    if HARD:
                        through_reset = (reset - h) * g
                    else:
                        through_reset = -threshold * g
                    kept += tl.where(g != 0.0, through_reset, 0.0)  # at an infinite h, g is 0 and the product a NaN
                grad_h = grad_v * kept
                if grad_spikes is not None:
                    grad_h += upstream[k].to(tl.float32) * g
                tl.store(g_t, (grad_h * input_gain).to(grad_x.dtype.element_ty), now)
                grad_v = grad_h * state_gain if WHOLE else tl.where(now, grad_h * state_gain, grad_v)
    if grad_v0 is not None:
        tl.store(grad_v0 + n, grad_v, exists)


@lru_cache(maxsize=512)
def _numbers(spec: LIFSpec) -> list[float]:
    """leak, ..., c of the kernels (the first six are forward's), as float32; see Neuron in ``csrc/neuron.h``."""
    threshold = torch.tensor(spec.threshold, dtype=torch.float32, device="cpu")
    below = torch.nextafter(threshold, torch.full_like(threshold, -math.inf))
    fire_above = (below if spec.fire_at_threshold else threshold).item()
    input_gain = 1 / spec.leak if spec.form == "tau_input" else 1.0
    forward = spec.leak, spec.rest, spec.threshold, fire_above, spec.rest, spec.v_start
    return [ctypes.c_float(x).value for x in (*forward, input_gain, spec.state_gain, *spec.surrogate.constants())]


_compiled = lru_cache(maxsize=None)(triton.jit)  # a surrogate's twin, compiled once


@lru_cache(maxsize=1)
def _machine() -> tuple[str, int]:
    """Triton's name of the kind of GPU, and the threads in a warp."""
    if interpreted():
        return "interpreter", 256  # where an operation costs the same on any number of elements
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size


class _Tile(NamedTuple):
    """What a program holds: neurons per thread, warps, and at most 2**log_k steps at a time."""

    per_thread: int
    warps: int
    log_k: int
    maxnreg: int | None = None  # registers per thread, on NVIDIA; left alone, ptxas spills some to have more warps


WIDE = 1 << 18  # neurons
# With at least as many, and with fewer: then threads are scarce, and take one neuron each but more steps at a time.
# The first is limited by registers in backward, where K is at most CHUNK; else a thread takes 16 bytes of float32.
FORWARD = _Tile(4, 2, 3), _Tile(1, 1, 5)
BACKWARD = _Tile(2, 2, 4, maxnreg=255), _Tile(1, 1, 4)


def _launch(kernel, tiles, spec, layout, tensors, numbers, **options):
    _, outer, steps, inner, x_outer, x_step = layout
    neurons = outer * inner
    if neurons == 0:
        return
    machine, warp_size = _machine()
    for tile in tiles[neurons < WIDE :]:
        block = tile.per_thread * tile.warps * warp_size
        flat = outer > 1 and inner % block > 0 and inner < 4 * block
        if not flat:
            break
    if tile.maxnreg and machine == "cuda":
        options["maxnreg"] = tile.maxnreg
    sizes = (neurons, inner, x_outer if outer > 1 else 0, x_step if steps > 1 else 0)
    # Sizes go in units of 16 elements if all can: from that Triton knows that rows are aligned, and loads 16 bytes.
    unit = 16 if all(size % 16 == 0 for size in sizes) else 1
    per_row = triton.cdiv(inner, block)
    with _current(tensors[0].device):
        kernel[(triton.cdiv(neurons, block) if flat else outer * per_row,)](
            *tensors,
            steps,
            *(size // unit for size in sizes),
            per_row,
            *numbers,
            FORM=spec.form,
            HARD=spec.reset is not None,
            CHUNK=CHUNK,
            LOG_K=min(tile.log_k, max(steps - 1, 0).bit_length()),
            UNIT=unit,
            FLAT=flat,
            BLOCK=block,
            num_warps=tile.warps,
            enable_fp_fusion=False,
            **options,
        )


def _current(device: torch.device):
    """Triton launches on the current device."""
    if device.type == "cpu":
        return nullcontext()
    module = getattr(torch, device.type)
    return nullcontext() if device.index == module.current_device() else module.device(device)


def lif_forward(spec, layout, x, v, spikes, v_last, saved):
    _launch(lif_forward_kernel, FORWARD, spec, layout, (x, v, spikes, v_last, saved), _numbers(spec)[:6])


def lif_backward(spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v):
    _launch(
        lif_backward_kernel,
        BACKWARD,
        spec,
        layout,
        (x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v),
        _numbers(spec),
        DETACH=spec.detach_reset,
        CURVE=_compiled(type(spec.surrogate)._triton),
    )
