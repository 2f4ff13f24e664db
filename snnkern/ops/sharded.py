"""DTensors: every process computes with its own part, of which the neurons need nothing of the others'."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


def is_sharded(x) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # imported by whoever makes them
    return module is not None and isinstance(x, module.DTensor)


def on_shards(op: Callable, x, v, time_dim: int):
    """``op(x, v) -> (y, v_last)`` of the parts of x [..., T, ...], and of v without time; results lie as they do.

    Raises:
        TypeError: v is neither None nor a DTensor.
        ValueError: x is sharded over time, or is a sum that is still to be made.
    """
    from torch.distributed.tensor import DTensor, Shard

    time_dim %= x.dim()
    if any(p.is_partial() or p.is_shard(time_dim) for p in x.placements):
        raise ValueError(
            f"x must be sharded along other dimensions than time, {time_dim}, or replicated, got {x.placements}: "
            "redistribute it"
        )
    if v is not None and not is_sharded(v):
        raise TypeError(f"v must be a DTensor or None for x in a DTensor, got {type(v).__name__}")
    mesh, placements = x.device_mesh, x.placements
    of_state = [Shard(p.dim - (p.dim > time_dim)) if p.is_shard() else p for p in placements]
    uneven = any(p.is_shard() and x.shape[p.dim] % mesh.size() for p in placements)
    y, v_last = op(x.to_local(), None if v is None else v.redistribute(mesh, of_state).to_local())

    def whole(t, placements, *steps):
        if not uneven:  # told nothing, as torch.compile cannot tell it sizes that it traces
            return DTensor.from_local(t, mesh, placements, run_check=False)
        shape = torch.Size((*x.shape[:time_dim], *steps, *x.shape[time_dim + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t, mesh, placements, run_check=False, shape=shape, stride=stride)

    return whole(y, placements, y.shape[time_dim]), None if v_last is None else whole(v_last, of_state)
