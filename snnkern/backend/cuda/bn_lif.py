"""Launches of the kernels in ``csrc/cuda/norm.cu``, and of the sums in ``lif.cu``; see csrc/norm.h.

On the current stream of the tensors' device; nothing here waits for the device.
"""

from __future__ import annotations

import torch

from ...spec.split import Split
from .. import on
from .._extension import _C, addresses, backward_of, neuron_of, norm_of, parameters_of, plan_of, shape_of


def bn_moments(layout, norm, y):
    shape, given = shape_of(layout, Split(1, layout.steps, 0), y), norm_of(norm)
    moments = _sums(2 * _C.norm_parts_cuda(shape, given) + 1, norm, y)
    with on(y.device):
        _C.moments_cuda(shape, given, *addresses(y, moments), torch.cuda.current_stream().cuda_stream)
    return moments


def bn_prepare(plan, moments, parameters, table):
    with on(table.device):
        stream = torch.cuda.current_stream().cuda_stream
        given = plan_of(plan, table, moments), parameters_of(parameters)
        _C.prepare_cuda(*given, *addresses(moments, table), stream)


def bn_sums(spec, layout, call):
    shape = shape_of(layout, Split(1, layout.steps, 0), call.x)
    sums = _sums(2 * _C.norm_parts_cuda(shape, norm_of(call.norm)), call.norm, call.x)
    with on(call.x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.sums_cuda(neuron_of(spec), shape, backward_of(call), sums.data_ptr(), stream)
    return sums


def bn_gradients(plan, table, sums, all_sums, affine, pull_push):
    """``affine``, [2, channels], receives the gradients of weight and bias."""
    addressed = addresses(table, sums, all_sums, affine, pull_push)
    with on(table.device):
        _C.gradients_cuda(plan_of(plan, table, sums), *addressed, torch.cuda.current_stream().cuda_stream)


def _sums(rows, norm, y):
    return torch.empty((rows, norm.channels), dtype=torch.float64, device=y.device)
