"""Launches of the kernels in ``csrc/cpu/norm.cpp``: sums over channels, and what is made of them; see csrc/norm.h."""

from __future__ import annotations

import torch

from ...spec.split import Split
from .._extension import _C, addresses, backward_of, neuron_of, norm_of, parameters_of, plan_of, shape_of


def bn_moments(layout, norm, y):
    shape = shape_of(layout, Split(1, layout.steps, 0), y)
    moments = torch.empty((2 * _C.norm_parts_cpu(shape) + 1, norm.channels), dtype=torch.float64)
    _C.moments_cpu(shape, norm_of(norm), *addresses(y, moments), torch.get_num_threads())
    return moments


def bn_prepare(plan, moments, parameters, table):
    moments_at, table_at = addresses(moments, table)
    _C.prepare_cpu(plan_of(plan, table, moments), moments_at, parameters_of(parameters), table_at)


def bn_sums(spec, layout, call):
    shape = shape_of(layout, Split(1, layout.steps, 0), call.x)
    sums = torch.empty((2 * _C.norm_parts_cpu(shape), call.norm.channels), dtype=torch.float64)
    _C.sums_cpu(neuron_of(spec), shape, backward_of(call), sums.data_ptr(), torch.get_num_threads())
    return sums


def bn_backward(plan, spec, layout, call, affine):
    """``bn_sums``, ``bn_gradients`` and ``lif_backward`` in one, a few channels at a time. Returns False, having done
    nothing, where they do not lie in memory such that this works."""
    shape, threads = shape_of(layout, Split(1, layout.steps, 0), call.x), torch.get_num_threads()
    kept = torch.empty(_C.norm_kept_cpu(shape, norm_of(call.norm), threads), dtype=affine.dtype)
    if not len(kept):
        return False
    sums = torch.empty((2, call.norm.channels), dtype=torch.float64)
    given = backward_of(call, kept), plan_of(plan, call.norm.table, sums)
    _C.norm_backward_cpu(neuron_of(spec), shape, *given, *addresses(sums, affine), threads)
    return True


def bn_gradients(plan, table, sums, all_sums, affine, pull_push):
    """``affine``, [2, channels], receives the gradients of weight and bias."""
    _C.gradients_cpu(plan_of(plan, table, sums), *addresses(table, sums, all_sums, affine, pull_push))
