"""Launches of the LIF kernels in ``csrc/cuda/lif.cuh``. Tensors are in the order of the layout, see ``ops/launch.py``.

On the current stream of x's device; nothing here waits for the device.
"""

from __future__ import annotations

import struct
from functools import cache, reduce
from operator import or_
from typing import NamedTuple

import torch

from ...spec.layout import DTYPES
from ...spec.split import CHUNK, Split, add_up, for_gpu, parts_of, warmup
from ...surrogate import Table
from .. import on
from .._extension import _C, addresses, neuron_of, words_of
from .program import Grid, prepare, stream_of

FORWARD_THREADS = 128  # kForwardThreads
MOST_LAUNCHES = 512  # that a neuron remembers
FEW_STEPS = 8  # up to so many are constants of the kernel, and all are loaded at once; else 4 are, or 16 where narrow

# Wide threads, of 16 bytes of x, issue a fraction of the instructions; narrow ones, of one neuron, are more, and have
# more loads on their way. A device runs at full speed with about 4.3 TB/s * 0.8 us / 132 multiprocessors on its way:
IN_FLIGHT = 26 << 10  # bytes a multiprocessor
# A wide thread has 4 steps of 16 bytes on its way, of each of the tensors that are read: it takes 400 threads forward,
# 200 backward. Of few steps it has all, as narrow threads would. Then what is left to be hidden is arithmetic: 64 wide
# threads, two warps, take about as long for one after the other of their 4 or 8 neurons as the four schedulers take to
# issue what the 4 or 8 times as many narrow ones need.
WIDE_THREADS_OF_FEW_STEPS = 64  # a multiprocessor


class LIFVariant(NamedTuple):
    dtype: int
    width: int
    steps: int
    rows: bool
    form: int
    rest: bool
    hard: bool
    detached: bool
    surrogate: int
    given: bool
    split: bool
    grouped: bool
    lanes: int = 0
    residual: bool = False
    ternary: bool = False
    integer: bool = False
    bounded: bool = False
    unit: bool = False
    leak: int = 0
    threshold: int = 0
    bias: int = 0
    sequence: bool = False
    grad_leak: bool = False
    grad_threshold: bool = False
    grad_bias: bool = False
    synaptic: bool = False
    adaptive: bool = False
    at_threshold: bool = False


class Extra(NamedTuple):
    """What a launch has of ``More``: channels and period of parameters that are tensors, the sequence, gradients."""

    leak: tuple[int, int] | None
    threshold: tuple[int, int] | None
    bias: tuple[int, int] | None
    sequence: bool
    grad_leak: bool
    grad_threshold: bool
    grad_bias: bool


class Launches(NamedTuple):
    """What a call launches, one after the other, with the same words; and how it splits time."""

    kernels: tuple
    split: Split


def lif_forward(spec, layout, call):
    x, v, spikes, v_last, saved, _, more = call
    words = a, b, c, d, e = addresses(x, v, spikes, v_last, saved)
    _launch(_forward, spec, layout, x, words, (a | b | c | d | e) & 15, False, more)


def lif_backward(spec, layout, call):
    x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, _, _, _, more = call
    words = a, b, c, d, e, f, g = addresses(x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v)
    _launch(_backward, spec, layout, x, words, (a | b | c | d | e | f | g) & 15, bool(d), more)


def _launch(make, spec, layout, x, words, misaligned, given, more):
    device = x.device
    if more is None:
        key = make, layout, x.dtype, misaligned == 0, given, device.index
    else:
        rest = words_of(more)
        key = make, layout, x.dtype, (misaligned | _misaligned(rest)) == 0, given, device.index, _extra_of(more)
    with on(device):
        kernels, split = made_once(spec, key)
        scratch = split.scratch(layout, torch.float32, device) if split.segments > 1 else None
        if scratch is not None:
            words.append(scratch.data_ptr())
        whole = parts = None
        if more is not None:  # between them: scratch, if there is none; Norm; of backward pull_push and grad_residual
            words += [0] * (10 + 4 * (make is _backward) - len(words)) + rest
            whole, parts = more.grad_bias, parts_of(more.grad_bias, split.segments)
            if parts is not whole:
                words[-1] = parts.data_ptr()
        stream = stream_of(device.index)
        for kernel in kernels:
            kernel(stream, *words)
        add_up(parts, whole)


def _extra_of(more) -> Extra:
    sequence = more.v_seq is not None or more.grad_v_seq is not None
    return Extra(*(p and p[1:] for p in more[:3]), sequence, *(grad is not None for grad in more[-3:]))


def _misaligned(words) -> int:
    addresses = (*words[:9:3], *words[9:])  # not channels and periods
    return reduce(or_, addresses) & 15


def made_once(spec, key):
    """What ``make(spec, *rest)`` returns, for ``key = make, *rest``."""
    known = spec.__dict__.get("_launches")  # kept there: the spec itself is slower to look up
    if known is None:
        known = spec.__dict__["_launches"] = {}
    found = known.get(key)
    if found is None:
        if len(known) >= MOST_LAUNCHES:
            known.clear()
        make, *rest = key
        found = known[key] = make(spec, *rest)
    return found


def _forward(spec, layout, dtype, aligned, given, device, extra=None) -> Launches:
    if _whole(spec, extra):
        split = Split(1, layout.steps, 0)
    else:
        warm = warmup(spec.state_gain, torch.float32)
        split = _split(layout, device, max(warm, 4 * CHUNK), warm)
    variant, constants = compiled_for(spec, layout, dtype, aligned, 1, split, device, extra)
    across = blocks(layout, variant.width, FORWARD_THREADS)
    kernels = [("lif_forward", Grid(across, split.segments, FORWARD_THREADS, 0))]
    if variant.split:
        kernels.append(("lif_repair", Grid(across, 1, FORWARD_THREADS, 0)))
    return _prepared(kernels, variant, constants, split, device)


def _backward(spec, layout, dtype, aligned, given, device, extra=None) -> Launches:
    whole = _whole(spec, extra)
    split = Split(1, layout.steps, 0) if whole else _split(layout, device, 8 * CHUNK)
    widest = 4 if whole else 8  # of 16-bit numbers: what is kept besides would not fit registers
    variant, constants = compiled_for(spec, layout, dtype, aligned, 1 + given, split, device, extra, widest)
    variant = adjoint_of(spec, variant, constants[0], given)
    threads = backward_threads(variant.width)
    across, shared = blocks(layout, variant.width, threads), column_bytes(layout, variant.width)
    shared *= 1 + variant.grad_leak + variant.adaptive  # what the leak is a factor of, too; the threshold of every step
    kernels = [("lif_backward", Grid(across, split.segments, threads, shared))]
    if variant.split:
        kernels.insert(0, ("lif_map", Grid(across, split.segments - 1, threads, shared)))
    return _prepared(kernels, variant, constants, split, device)


def _prepared(kernels, variant, constants, split, device) -> Launches:
    some = [(name, grid) for name, grid in kernels if grid.across]  # none where there are no neurons
    return Launches(tuple(prepare("lif.cuh", name, variant, grid, constants, device) for name, grid in some), split)


def _whole(spec, extra) -> bool:
    """Whether time is one segment."""
    return spec.states > 1 or (extra is not None and bool(extra.leak or extra.threshold or extra.sequence))


def _split(layout, device, shortest, warm=0) -> Split:
    if layout.steps_out < layout.steps:  # a group of steps may lie in two segments
        return Split(1, layout.steps, 0)
    return for_gpu(layout.steps, layout.outer * layout.inner, processors(device), shortest, warm)


def compiled_for(spec, layout, dtype, aligned, streams, split, device, extra=None, widest=8):
    """The variant, of forward, and the constants of a LIF kernel that reads so many tensors step by step."""
    neuron, code = _C.neuron(neuron_of(spec)), DTYPES.index(dtype)
    form, hard, _, rest = _told(neuron)
    if layout.steps >> 30:
        raise ValueError(f"the CUDA kernels count up to 2**30 time steps, got {layout.steps}")
    width, parts = min(16 // dtype.itemsize, widest), split.segments > 1
    if parts or not (aligned and fits(layout, width) and _fill(layout, width, streams, processors(device))):
        width = 1
    grouped = layout.steps_out < layout.steps
    steps = layout.steps if layout.steps <= FEW_STEPS and not grouped else 0  # of groups, many would not fit registers
    variant = LIFVariant(code, width, steps, layout.outer > 1, form, rest, hard, False, 0, False, parts, grouped)
    adaptive = spec.threshold_decay is not None
    if not spec.binary or spec.v_min is not None:
        unit = spec.levels > 0 and spec.threshold == 1 and not adaptive
        kind = spec.ternary, spec.levels > 0, spec.v_min is not None, unit
        variant = variant._replace(**dict(zip(("ternary", "integer", "bounded", "unit"), kind, strict=True)))
    if spec.states > 1:
        synaptic, at_threshold = spec.synapse_decay is not None, adaptive and spec.fire_at_threshold
        variant = variant._replace(synaptic=synaptic, adaptive=adaptive, at_threshold=at_threshold)
    if extra is not None:
        lanes = (lanes_of(p[1], width) if p else 0 for p in extra[:3])
        variant = variant._replace(**dict(zip(Extra._fields, (*lanes, *extra[3:]), strict=True)))
    return variant, [neuron, _C.bytes_of(_C.LIFShape(code, *layout[1:], *split))]


def adjoint_of(spec, variant, neuron, given) -> LIFVariant:
    variant = variant._replace(detached=spec.detach_reset, surrogate=_told(neuron)[2], given=given)
    # Without a loop, the compiler has all of a table's loads on their way, or all divisions of neurons that adapt, in
    # more registers than there are.
    loops = isinstance(spec.surrogate, Table) or (variant.adaptive and divides(variant))
    return variant._replace(steps=0) if loops else variant


def divides(variant) -> bool:
    return variant.form in (1, 2) or variant.integer > variant.unit  # csrc/cuda/lif.cuh's


def fits(layout, width) -> bool:
    """Whether rows of x begin where aligned packs of ``width`` numbers do."""
    return not (layout.inner | layout.x_outer_stride | layout.x_step_stride) % width


def _fill(layout, width, streams, processors) -> bool:
    few = layout.steps <= FEW_STEPS
    each = WIDE_THREADS_OF_FEW_STEPS if few else IN_FLIGHT // (streams * 4 * 16)
    return layout.outer * layout.inner // width >= processors * each


def lanes_of(period, width) -> int:
    """Of how many of its neighbouring neurons a thread has to know the channel."""
    return 1 if period % width == 0 else width


def blocks(layout, width, threads) -> int:
    return -(-(layout.outer * layout.inner // width) // threads)


def backward_threads(width) -> int:
    return 64 if width == 8 else 128  # csrc/cuda/lif.cuh's


def column_bytes(layout, width) -> int:
    """Potentials of a chunk in shared memory, of a block."""
    return min(layout.steps, CHUNK) * backward_threads(width) * width * 4


def _told(neuron: bytes) -> tuple[int, bool, int, bool]:
    """Of Neuron<float>: form, hard, surrogate, and whether a resting potential other than 0 is in use."""
    form, hard, *_, surrogate, _, rest = struct.unpack_from("i7?iff", neuron)
    return form, hard, surrogate, form != 0 and rest != 0


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
