"""Launches of the LIF kernels in ``csrc/cpu/lif.cpp``. Tensors are in the kernels' order, see ``ops/launch.py``."""

from __future__ import annotations

import torch

from ...spec.layout import state_dtype
from ...spec.split import Split, add_up, for_cpu, parts_of
from .._extension import _C, backward_of, forward_of, neuron_of, shape_of


def lif_forward(spec, layout, call):
    shape, _, scratch = _prepare(spec, layout, call)
    _C.lif_forward_cpu(neuron_of(spec), shape, forward_of(call, scratch), torch.get_num_threads())


def lif_backward(spec, layout, call):
    shape, segments, scratch = _prepare(spec, layout, call)
    grad_bias = None if call.more is None else call.more.grad_bias
    parts = parts_of(grad_bias, segments)
    if parts is not grad_bias:
        call = call._replace(more=call.more._replace(grad_bias=parts))
    _C.lif_backward_cpu(neuron_of(spec), shape, backward_of(call, scratch), torch.get_num_threads())
    add_up(parts, grad_bias)


def _prepare(spec, layout, call):
    x, more = call.x, call.more
    state, split = state_dtype(x.dtype), Split(1, layout.steps, 0)
    whole = more is None or all(t is None for t in (more.leak, more.threshold, more.v_seq, more.grad_v_seq))
    if whole and spec.states == 1 and layout.steps_out == layout.steps:  # else a group of steps may lie in two segments
        neurons = layout.outer * layout.inner
        split = for_cpu(layout.steps, neurons, spec.state_gain, state, torch.get_num_threads())
    return shape_of(layout, split, x), split.segments, split.scratch(layout, state, x.device)
