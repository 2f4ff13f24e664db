"""Launches of the kernels in ``csrc/cuda/recurrent.cuh``: one each way, for all of time.

On the current stream of x's device; nothing here waits for the device. How fast they are depends on where a layer's
weights find room. Forward has them in shared memory up to 238 neurons (compute capability 9.0; 157 where a block has
99 KiB), and reads them through L1 from there on, slower where that does not hold the rows of those who fire. Backward,
which needs all of them at every step, has them in registers up to 128 neurons, in registers and shared memory up to
about 270; beyond, the rest comes from L2 at every step, and soon takes most of the time: of a layer of 1024 neurons
4 MB a step.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

import torch

from ...spec.layout import DTYPES
from ...spec.split import CHUNK, Split
from .. import on
from .._extension import _C, addresses, neuron_of, words_of
from .lif import made_once, processors
from .program import Grid, prepare, stream_of

MOST_NEURONS = 1024  # of a layer: backward has a thread for each
FORWARD_THREADS = 512  # kRecurrentThreads
PLANES = 4  # neurons a thread of forward, at most
MORE_WORDS = 16  # of csrc/lif.h's More


class RecurrentVariant(NamedTuple):
    dtype: int
    warps: int
    planes: int
    shared: bool
    rows: int
    valued: bool
    form: int
    hard: bool
    ternary: bool
    integer: bool
    bounded: bool
    detached: bool
    synaptic: bool
    adaptive: bool
    at_threshold: bool
    surrogate: int = 0
    grad_leak: bool = False


def recurrent_forward(spec, layout, call, recurrence):
    """``call``: a ``spec.neuron.Forward``; ``recurrence``: a ``spec.neuron.Recurrence``.

    Raises:
        ValueError: A layer has more than 1024 neurons.
    """
    *tensors, _, more = call
    size, device = recurrence.weight.shape[0], call.x.device
    _check(layout, size)
    if layout.outer * layout.inner:
        key = _forward, layout, call.x.dtype, size, recurrence.s is not None, device.index
        with on(device):
            launch, words = made_once(spec, key), addresses(*tensors)
            launch(stream_of(device.index), *words, *[0] * 5, *_words_of(more, size, recurrence))


def recurrent_backward(spec, layout, call, recurrence):
    """``call``: a ``spec.neuron.Backward``; otherwise as ``recurrent_forward``."""
    *tensors, _, _, _, more = call
    size, device = recurrence.weight.shape[0], call.x.device
    _check(layout, size)
    if layout.outer * layout.inner:
        grad_leak = more is not None and more.grad_leak is not None
        key = _backward, layout, call.x.dtype, size, recurrence.s is not None, grad_leak, device.index
        with on(device):
            launch, kept, planes = made_once(spec, key)
            scratch = torch.empty((CHUNK, planes, layout.outer * layout.inner), dtype=torch.float32, device=device)
            words = addresses(*tensors, scratch)
            launch(stream_of(device.index), *words, *[0] * 6, *_words_of(more, size, recurrence), kept)


def _words_of(more, size, recurrence) -> list[int]:
    rest = [0] * MORE_WORDS if more is None else words_of(more)
    return [*rest, size, *addresses(*recurrence)]


def _check(layout, size) -> None:
    if size > MOST_NEURONS:
        raise ValueError(f"the CUDA kernels have recurrent layers of up to {MOST_NEURONS} neurons, got {size}")
    if layout.steps >> 30:
        raise ValueError(f"the CUDA kernels count up to 2**30 time steps, got {layout.steps}")


def _forward(spec, layout, dtype, size, given, device):
    variant, constants = _variant(spec, layout, dtype)
    warps = -(-size // (32 * PLANES))
    planes = -(-size // (32 * warps))
    layers = layout.outer * layout.inner // size
    each = max(1, min(-(-layers // processors(device)), FORWARD_THREADS // (32 * warps)))  # layers a block
    places = 32 * planes * warps
    lists = 4 * (2 * each * places + -(-2 * each * warps // 4) * 4)
    values = 4 * 2 * each * places if given or variant.valued else 0
    rows = 4 * -(-(size * size + places - size) // 4) * 4
    shared = lists + values + rows <= shared_memory(device)
    variant = variant._replace(warps=warps, planes=planes, shared=shared)
    grid = Grid(-(-layers // each), 1, 32 * warps * each, lists + values + rows * shared)
    return prepare("recurrent.cuh", "recurrent_forward", variant, grid, constants, device)


def _backward(spec, layout, dtype, size, given, grad_leak, device):
    """The launch, the rows of the weight in shared memory, and the planes of scratch memory."""
    variant, constants = _variant(spec, layout, dtype)
    warps = -(-size // 32)
    places = 32 * warps
    rows = min(places, rows_in_registers(warps))
    valued = variant.valued or given
    listed = CHUNK // 2 if valued and warps > 16 else CHUNK  # steps: csrc/cuda/recurrent.cuh's listed_together
    shared = 4 * (2 * places + listed * (warps + 1 + (1 + valued) * places))
    left, room = max(size - rows, 0), (shared_memory(device) - shared) // (4 * places)
    kept = left if left <= room else room // 4 * 4  # the kernel takes four at a time
    variant = variant._replace(
        warps=warps,
        rows=rows,
        valued=valued,
        detached=spec.detach_reset,
        surrogate=_C.surrogates[spec.surrogate.twin().__name__],
        grad_leak=grad_leak,
    )
    grid = Grid(layout.outer * layout.inner // size, 1, places, shared + 4 * kept * places)
    planes = 1 + variant.adaptive + grad_leak
    return prepare("recurrent.cuh", "recurrent_backward", variant, grid, constants, device), kept, planes


def rows_in_registers(warps) -> int:
    """Of a thread's column of the weight in backward: it has its share of the registers of a quarter of a
    multiprocessor, and needs 80 besides."""
    share = (1 << 14) // (32 * -(-warps // 4)) // 8 * 8
    return max(0, min(128, share - 80))


def _variant(spec, layout, dtype):
    neuron, code = _C.neuron(neuron_of(spec)), DTYPES.index(dtype)
    form, hard = struct.unpack_from("=i?", neuron)
    kind = spec.ternary, spec.levels > 0, spec.v_min is not None
    states = spec.synapse_decay is not None, spec.threshold_decay is not None
    at_threshold = spec.fire_at_threshold and states[1]
    variant = RecurrentVariant(code, 1, 1, False, 0, not spec.binary, form, hard, *kind, False, *states, at_threshold)
    once = Split(1, layout.steps, 0)
    return variant, [neuron, _C.bytes_of(_C.LIFShape(code, *layout[1:], *once))]


@cache
def shared_memory(device: int) -> int:
    """That a block may ask for, in bytes; older versions of PyTorch do not tell, then what all devices have."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)
