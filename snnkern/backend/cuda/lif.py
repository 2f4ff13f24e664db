"""Launches of the LIF kernels in ``csrc/cuda/lif.cu``. Tensors are in the order of the layout, see ``ops/lif.py``.

The current stream of x's device is passed explicitly; nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .._extension import _C, address, shape_of


def lif_forward(spec, layout, x, v, spikes, v_last, saved):
    with _on(x.device):
        _C.lif_forward_cuda(
            spec.compiled,
            shape_of(layout, x),
            x.data_ptr(),
            address(v),
            spikes.data_ptr(),
            v_last.data_ptr(),
            address(saved),
            torch.cuda.current_stream().cuda_stream,
        )


def lif_backward(spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v):
    with _on(x.device):
        _C.lif_backward_cuda(
            spec.compiled,
            shape_of(layout, x),
            x.data_ptr(),
            address(v),
            address(saved),
            address(grad_spikes),
            address(grad_v_last),
            grad_x.data_ptr(),
            address(grad_v),
            torch.cuda.current_stream().cuda_stream,
        )


def _on(device: torch.device):
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
