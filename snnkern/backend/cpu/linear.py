"""Launches of the kernels in ``csrc/cpu/linear.cpp``: all tensors contiguous, float32; see ``csrc/linear.h``."""

from __future__ import annotations

import torch

from .._extension import _C, addresses

SAMPLE = 64  # rows in which spikes are counted
DENSEST = 0.25  # spikes per number from which PyTorch's dense product is as fast or faster
NARROWEST = 64  # inputs or outputs below which it is
SMALLEST = 1 << 24  # multiplications of the dense product below which the calls around the kernels decide


def linear_pays(spikes: torch.Tensor, outputs: int) -> bool:
    """Whether the kernels are expected to be faster than a dense product for spikes [..., inputs]."""
    numbers, inputs = spikes.numel(), spikes.shape[-1]
    if numbers * outputs < SMALLEST or min(inputs, outputs) < NARROWEST or not numbers:
        return False
    rows = numbers // inputs
    sample = min(rows, SAMPLE)
    found = _C.linear_count_cpu(_C.LinearShape(rows, inputs, outputs, False), *addresses(spikes), sample)
    return found < DENSEST * sample * inputs and inputs <= _C.most_inputs


def linear_forward(spikes, weight, bias):
    """Returns y, and spikes as bits, or None if there are others than 0 and 1 among them."""
    (rows, inputs), outputs = spikes.shape, len(weight)
    shape = _C.LinearShape(rows, inputs, outputs, bias is not None)
    weight_t = torch.zeros(inputs + (bias is not None), _C.linear_stride(shape))
    weight_t[:inputs, :outputs] = weight.t()
    if bias is not None:
        weight_t[inputs, :outputs] = bias
    y = torch.empty(rows, outputs)
    bits = torch.empty(-(-rows // _C.bit_rows), inputs, dtype=torch.int32)
    binary = _C.linear_forward_cpu(shape, *addresses(spikes, weight_t, y, bits), torch.get_num_threads())
    return y, bits if binary else None


def linear_backward(bits, grad, biased):
    """Gradients of the weight and, if there is one, of the bias."""
    (rows, outputs), inputs = grad.shape, bits.shape[1]
    shape = _C.LinearShape(rows, inputs, outputs, biased)
    grad_t = torch.empty(inputs + biased, _C.linear_stride(shape))
    sums = torch.empty(_C.linear_parts(shape), *grad_t.shape)
    _C.linear_backward_cpu(shape, *addresses(bits, grad, sums, grad_t), torch.get_num_threads())
    grad_t = grad_t[:, :outputs]
    return grad_t[:inputs].t().contiguous(), grad_t[inputs] if biased else None
