"""Launches of the LIF kernels in ``csrc/cpu/lif.cpp``. Tensors are in the order of the layout, see ``ops/lif.py``."""

from __future__ import annotations

import torch

from .._extension import _C, address, shape_of


def lif_forward(spec, layout, x, v, spikes, v_last, saved):
    _C.lif_forward_cpu(
        spec.compiled,
        shape_of(layout, x),
        x.data_ptr(),
        address(v),
        spikes.data_ptr(),
        v_last.data_ptr(),
        address(saved),
        torch.get_num_threads(),
    )


def lif_backward(spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v):
    _C.lif_backward_cpu(
        spec.compiled,
        shape_of(layout, x),
        x.data_ptr(),
        address(v),
        address(saved),
        address(grad_spikes),
        address(grad_v_last),
        grad_x.data_ptr(),
        address(grad_v),
        torch.get_num_threads(),
    )
