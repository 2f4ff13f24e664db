"""Launches of the LIF kernels in ``csrc/cpu/lif.cpp``. Tensors are in the order of the layout, see ``ops/lif.py``."""

from __future__ import annotations

import torch

from ...ops.layout import state_dtype
from ...ops.split import Split, for_cpu
from .._extension import _C, addresses, arguments, norm_of


def lif_forward(spec, layout, x, v, spikes, v_last, saved, norm=None):
    split = _split(spec, layout, x)
    scratch = split.scratch(layout, state_dtype(x.dtype), x.device)
    call = arguments(spec, layout, split, x, v, spikes, v_last, saved, scratch)
    _C.lif_forward_cpu(*call, norm_of(norm), torch.get_num_threads())


def lif_backward(
    spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, norm=None, pull_push=None, grad_residual=None
):
    split = _split(spec, layout, x)
    scratch = split.scratch(layout, state_dtype(x.dtype), x.device)
    call = arguments(spec, layout, split, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v, scratch)
    _C.lif_backward_cpu(*call, norm_of(norm), *addresses(pull_push, grad_residual), torch.get_num_threads())


def _split(spec, layout, x):
    if layout.steps_out < layout.steps:
        return Split(1, layout.steps, 0)  # a group of steps may lie in two segments
    neurons = layout.outer * layout.inner
    return for_cpu(layout.steps, neurons, spec.state_gain, state_dtype(x.dtype), torch.get_num_threads())
