"""Launches of the kernels in ``csrc/cpu/recurrent.cpp``. Tensors are in the kernels' order, see ``ops/launch.py``."""

from __future__ import annotations

import torch

from ...spec.split import Split
from .._extension import _C, addresses, backward_of, forward_of, neuron_of, recurrence_of, shape_of


def recurrent_forward(spec, layout, call, recurrence):
    shape = shape_of(layout, Split(1, layout.steps, 0), call.x)
    given = neuron_of(spec), shape, forward_of(call), recurrence_of(recurrence)
    _C.recurrent_forward_cpu(*given, torch.get_num_threads())


def recurrent_backward(spec, layout, call, recurrence):
    shape = shape_of(layout, Split(1, layout.steps, 0), call.x)
    given = neuron_of(spec), shape, backward_of(call), recurrence_of(recurrence)
    _C.recurrent_backward_cpu(*given, torch.get_num_threads())


def recurrent_weight(spec, layout, grad_x, recurrence):
    """The gradient of the weight: rows of grad_x, added up where there are spikes."""
    shape, grad = shape_of(layout, Split(1, layout.steps, 0), grad_x), torch.empty_like(recurrence.weight)
    given = neuron_of(spec), shape, recurrence_of(recurrence), *addresses(grad_x, grad)
    _C.recurrent_weight_cpu(*given, torch.get_num_threads())
    return grad.t().contiguous()
