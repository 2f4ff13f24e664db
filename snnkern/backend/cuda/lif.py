"""Launches of the LIF kernels in ``csrc/cuda/lif.cu``. Tensors are in the order of the layout, see ``ops/lif.py``.

The current stream of x's device is passed explicitly; nothing here waits for the device.
"""

from __future__ import annotations

from functools import cache

import torch

from ...ops.layout import state_dtype
from ...ops.split import CHUNK, Split, for_gpu, warmup
from .. import on
from .._extension import _C, addresses, arguments, norm_of


def lif_forward(spec, layout, x, v, spikes, v_last, saved, norm=None):
    warm = warmup(spec.state_gain, torch.float32)
    split = _split(layout, x, norm, max(warm, 4 * CHUNK), warm)
    scratch = split.scratch(layout, state_dtype(x.dtype), x.device)
    with on(x.device):
        call = arguments(spec, layout, split, x, v, spikes, v_last, saved, scratch)
        _C.lif_forward_cuda(*call, norm_of(norm), torch.cuda.current_stream().cuda_stream)


def lif_backward(
    spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, norm=None, pull_push=None, grad_residual=None
):
    split = _split(layout, x, norm, 8 * CHUNK)
    scratch = split.scratch(layout, state_dtype(x.dtype), x.device)
    with on(x.device):
        call = arguments(spec, layout, split, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, scratch)
        stream = torch.cuda.current_stream().cuda_stream
        _C.lif_backward_cuda(*call, norm_of(norm), *addresses(pull_push, grad_residual), stream)


def _split(layout, x, norm, shortest, warm=0):
    if norm is not None or layout.steps_out < layout.steps:
        return Split(1, layout.steps, 0)  # these kernels take all of time; a group of steps may lie in two segments
    return for_gpu(layout.steps, layout.outer * layout.inner, _processors(x.device.index), shortest, warm)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
