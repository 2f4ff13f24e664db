"""Launches of the kernels in ``csrc/cpu/norm.cpp``: sums over channels, and what is made of them; see csrc/norm.h."""

from __future__ import annotations

import torch

from ...ops.split import Split
from .._extension import _C, addresses, arguments, norm_of, plan_of, shape_of


def bn_moments(layout, norm, y):
    shape = shape_of(layout, Split(1, layout.steps, 0), y)
    moments = torch.empty((2 * _C.norm_parts_cpu(shape) + 1, norm.channels), dtype=torch.float64)
    _C.moments_cpu(shape, norm_of(norm), *addresses(y, moments), torch.get_num_threads())
    return moments


def bn_prepare(plan, moments, weight, bias, running_mean, running_var, table):
    addressed = addresses(moments, weight, bias, running_mean, running_var, table)
    _C.prepare_cpu(plan_of(plan, table, moments), *addressed)


def bn_sums(spec, layout, y, v, saved, grad_spikes, grad_v_last, norm):
    call = arguments(spec, layout, Split(1, layout.steps, 0), y, v, saved, grad_spikes, grad_v_last)
    sums = torch.empty((2 * _C.norm_parts_cpu(call[1]), norm.channels), dtype=torch.float64)
    _C.sums_cpu(*call, norm_of(norm), sums.data_ptr(), torch.get_num_threads())
    return sums


def bn_backward(
    plan, spec, layout, y, v, saved, grad_spikes, grad_v_last, grad_y, grad_v, norm, pull_push, grad_residual, affine
):
    """``bn_sums``, ``bn_gradients`` and ``lif_backward`` in one, a few channels at a time. Returns False, having done
    nothing, where they do not lie in memory such that this works."""
    shape, threads = shape_of(layout, Split(1, layout.steps, 0), y), torch.get_num_threads()
    kept = torch.empty(_C.norm_kept_cpu(shape, norm_of(norm), threads), dtype=affine.dtype)
    if not len(kept):
        return False
    sums = torch.empty((2, norm.channels), dtype=torch.float64)
    call = addresses(y, v, saved, grad_spikes, grad_v_last, grad_y, grad_v, kept)
    written = addresses(sums, affine, pull_push, grad_residual)
    _C.norm_backward_cpu(spec.compiled, shape, *call, norm_of(norm), plan_of(plan, norm.table, sums), *written, threads)
    return True


def bn_gradients(plan, table, sums, all_sums, affine, pull_push):
    """``affine``, [2, channels], receives the gradients of weight and bias."""
    _C.gradients_cpu(plan_of(plan, table, sums), *addresses(table, sums, all_sums, affine, pull_push))
