"""Launches of the LIF kernels in ``csrc/cpu/lif.cpp``. Tensors are in the order of the layout, see ``ops/lif.py``."""

from __future__ import annotations

import torch

from ...ops.lif import state_dtype
from ...ops.split import for_cpu
from .._extension import _C, arguments


def lif_forward(*call):
    """spec, layout, x, v, spikes, v_last, saved"""
    _launch(_C.lif_forward_cpu, *call)


def lif_backward(*call):
    """spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v"""
    _launch(_C.lif_backward_cpu, *call)


def _launch(kernel, spec, layout, x, *tensors):
    threads, state = torch.get_num_threads(), state_dtype(x.dtype)
    split = for_cpu(layout.steps, layout.outer * layout.inner, spec.state_gain, state, threads)
    scratch = split.scratch(layout, state, x.device)
    kernel(*arguments(spec, layout, split, x, *tensors, scratch), threads)
