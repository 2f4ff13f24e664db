"""Launches of the LIF kernels in ``csrc/cuda/lif.cu``. Tensors are in the order of the layout, see ``ops/lif.py``.

The current stream of x's device is passed explicitly; nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .._extension import _C, arguments


def lif_forward(*call):
    """spec, layout, x, v, spikes, v_last, saved"""
    with _on(call[2].device):
        _C.lif_forward_cuda(*arguments(*call), torch.cuda.current_stream().cuda_stream)


def lif_backward(*call):
    """spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v"""
    with _on(call[2].device):
        _C.lif_backward_cuda(*arguments(*call), torch.cuda.current_stream().cuda_stream)


def _on(device: torch.device):
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
