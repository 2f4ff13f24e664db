"""Launches of the LIF kernels in ``csrc/cuda/lif.cu``. Tensors are in the order of the layout, see ``ops/launch.py``.

The current stream of x's device is passed explicitly; nothing here waits for the device.
"""

from __future__ import annotations

from functools import cache

import torch

from ...spec.layout import state_dtype
from ...spec.split import CHUNK, Split, for_gpu, warmup
from .. import on
from .._extension import _C, backward_of, forward_of, neuron_of, shape_of


def lif_forward(spec, layout, call):
    warm = warmup(spec.state_gain, torch.float32)
    shape, scratch = _prepare(layout, call, max(warm, 4 * CHUNK), warm)
    with on(call.x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.lif_forward_cuda(neuron_of(spec), shape, forward_of(call, scratch), stream)


def lif_backward(spec, layout, call):
    shape, scratch = _prepare(layout, call, 8 * CHUNK)
    with on(call.x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.lif_backward_cuda(neuron_of(spec), shape, backward_of(call, scratch), stream)


def _prepare(layout, call, shortest, warm=0):
    x, split = call.x, Split(1, layout.steps, 0)
    # The kernels with a norm take all of time; a group of steps may lie in two segments.
    if call.norm is None and layout.steps_out == layout.steps:
        neurons = layout.outer * layout.inner
        split = for_gpu(layout.steps, neurons, _processors(x.device.index), shortest, warm)
    return shape_of(layout, split, x), split.scratch(layout, state_dtype(x.dtype), x.device)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
