"""The temporal transformation: fewer steps by summing neighbours, more by repeating them."""

from __future__ import annotations

import torch

from ..backend import choose
from ..spec.arguments import check_dense, check_x, positive
from ..spec.layout import are_plain_gradients, is_plain
from . import launch
from .sharded import is_sharded, on_shards


def ttm(x: torch.Tensor, steps: int, time_dim: int = 0, backend: str | None = None) -> torch.Tensor:
    """Temporal transformation of x to ``steps`` time steps.

    ::

        l, k = the larger and the smaller of x.shape[time_dim] and steps
        group i of k = the steps from round(i*l/k) up to round((i+1)*l/k), half rounded down
        fewer steps:  y[i] = sum of x[t] over group i
        more steps:   y[t] = x[i] for every t in group i

    Groups are never empty and differ in size by at most one. With as many steps, y is x. Sums of spikes are whole
    numbers up to the size of a group. 16-bit numbers are summed in float32 and rounded once.

    Args:
        x: ``time_dim`` among its dimensions, one step at least; float32, float64 (``cpu`` and ``reference`` backends),
            float16 or bfloat16; any strides.
        steps: time steps of the result, 1 or more.
        time_dim: the dimension of x that is time.
        backend: see ``snnkern.lif``.

    Returns: shape of x but for time, dtype of x.

    Gradient: to x, to any order: summing and repeating are each the other's adjoint.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
        RuntimeError: the backend asked for cannot run here.

    Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, eq. 8-11. Specification:
    ``snnkern/backend/reference/ttm.py``.
    """
    plain = is_plain(x)
    if not plain:
        check_dense(x=x)
        if is_sharded(x):
            _check(x, steps, time_dim)
            return on_shards(lambda x, _: (ttm(x, steps, time_dim, backend), None), x, time_dim)[0]
    time_dim, steps = _check(x, steps, time_dim)
    if steps == x.shape[time_dim]:
        return x
    if not plain:
        from . import library

        name = library.name_for(x.device.type, x.dtype, backend)
        if name != "reference":
            return library.ttm(x, steps, time_dim, name)
        from ..backend.reference import ttm as reference

        return reference(x, steps, time_dim)
    kernels = choose(x.device.type, x.dtype, backend)
    if kernels.differentiable:
        return kernels.ttm(x, steps, time_dim)
    return _TTM.apply(x, steps, time_dim, kernels)


def _check(x, steps, time_dim) -> tuple[int, int]:
    """Checks the arguments of ``ttm``; returns ``time_dim`` counted from the front, and ``steps``."""
    front = check_x(x, time_dim)
    steps = positive("steps", steps)
    if x.shape[front] < 1:
        raise ValueError(f"x must have one time step at least, got shape {tuple(x.shape)} with time_dim {time_dim}")
    return front, steps


class _TTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, steps, time_dim, kernels):
        ctx.rest = x.shape[time_dim], time_dim, kernels
        return launch.ttm(x, steps, time_dim, kernels)

    @staticmethod
    def backward(ctx, grad):
        if not are_plain_gradients(grad):
            from . import library

            steps, time_dim, kernels = ctx.rest
            return library.ttm(grad, steps, time_dim, library.name_of(kernels)), None, None, None
        return _TTM.apply(grad, *ctx.rest), None, None, None
