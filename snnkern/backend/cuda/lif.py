"""Launches of the LIF kernels in ``csrc/cuda/lif.cu``. Tensors are in the order of the layout, see ``ops/lif.py``.

The current stream of x's device is passed explicitly; nothing here waits for the device.
"""

from __future__ import annotations

from functools import cache

import torch

from ...ops.layout import state_dtype
from ...ops.split import CHUNK, for_gpu, warmup
from .. import on
from .._extension import _C, arguments


def lif_forward(*call):
    """spec, layout, x, v, spikes, v_last, saved"""
    warm = warmup(call[0].state_gain, torch.float32)
    _launch(_C.lif_forward_cuda, max(warm, 4 * CHUNK), warm, *call)


def lif_backward(*call):
    """spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v"""
    _launch(_C.lif_backward_cuda, 8 * CHUNK, 0, *call)


def _launch(kernel, shortest, warm, spec, layout, x, *tensors):
    split = for_gpu(layout.steps, layout.outer * layout.inner, _processors(x.device.index), shortest, warm)
    scratch = split.scratch(layout, state_dtype(x.dtype), x.device)
    with on(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        kernel(*arguments(spec, layout, split, x, *tensors, scratch), stream)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
