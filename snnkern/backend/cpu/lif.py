"""Launches of the LIF kernels in ``csrc/cpu/lif.cpp``. Tensors are in the order of the layout, see ``ops/lif.py``."""

from __future__ import annotations

import torch

from .._extension import _C, arguments


def lif_forward(*call):
    """spec, layout, x, v, spikes, v_last, saved"""
    _C.lif_forward_cpu(*arguments(*call), torch.get_num_threads())


def lif_backward(*call):
    """spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v"""
    _C.lif_backward_cpu(*arguments(*call), torch.get_num_threads())
