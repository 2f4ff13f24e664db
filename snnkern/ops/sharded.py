"""DTensors: every process computes with its own part, of which the neurons need nothing of the others'."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


def is_sharded(x) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # imported by whoever makes them
    return module is not None and isinstance(x, module.DTensor)


def on_shards(op: Callable, x, time_dim: int, v=None, *parameters):
    """``op(x, v, *parameters) -> (y, v_last)`` of the parts of x [..., T, ...], and of v without time; the results lie
    as they do. Parameters are the same in every process, and their gradients the sum over processes. ``v_last`` may
    have time, as a sequence.

    Raises:
        TypeError: v or a parameter is neither None nor a DTensor.
        ValueError: x is sharded over time, or is a sum that is still to be made.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements, time_dim = x.device_mesh, x.placements, time_dim % x.dim()
    if any(p.is_partial() or p.is_shard(time_dim) for p in placements):
        raise ValueError(
            f"x must be sharded along other dimensions than time, {time_dim}, or replicated, got {placements}: "
            "redistribute it"
        )
    for name, t in (("v", v), *(("decay, tau, inverse_tau or threshold", p) for p in parameters)):
        if t is not None and not is_sharded(t):
            raise TypeError(f"{name} must be no tensor, or a DTensor, for x in a DTensor, got {type(t).__name__}")
    of_state = [Shard(p.dim - (p.dim > time_dim)) if p.is_shard() else p for p in placements]
    of_gradient = [Partial() if p.is_shard() else p for p in placements]
    everywhere = [Replicate()] * mesh.ndim
    uneven = any(p.is_shard() and x.shape[p.dim] % mesh.size() for p in placements)
    parts = [
        p if p is None else p.redistribute(mesh, everywhere).to_local(grad_placements=of_gradient) for p in parameters
    ]
    y, v_last = op(x.to_local(), v if v is None else v.redistribute(mesh, of_state).to_local(), *parts)

    def whole(t, placements, *steps):
        if not uneven:  # told nothing, as torch.compile cannot tell it sizes that it traces
            return DTensor.from_local(t, mesh, placements, run_check=False)
        shape = torch.Size((*x.shape[:time_dim], *steps, *x.shape[time_dim + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t, mesh, placements, run_check=False, shape=shape, stride=stride)

    y = whole(y, placements, y.shape[time_dim])
    if v_last is None or v_last.dim() == x.dim():
        return y, None if v_last is None else whole(v_last, placements, v_last.shape[time_dim])
    return y, whole(v_last, of_state)
