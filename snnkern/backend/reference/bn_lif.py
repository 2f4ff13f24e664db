"""Batch norm before the LIF in PyTorch operations: what every other backend must reproduce."""

from __future__ import annotations

import torch
import torch.distributed

from .lif import lif


def bn_lif(y, parameters, v, residual, norm, spec, time_dim, steps_out, smooth=False):
    """``snnkern.bn_lif``; arguments checked by the caller. ``smooth``: see ``lif``."""
    x = normalise(y, parameters, norm)
    if residual is not None:
        x = x + residual.to(x.dtype)
    spikes, v_last = lif(x, v, spec, time_dim, steps_out, smooth)
    return spikes.to(y.dtype), v_last


def normalise(y, parameters, norm):
    """``(y - mean) * (norm.scale * weight / sqrt(var + norm.eps)) + bias`` in the dtype of the state."""
    weight, bias, running_mean, running_var = parameters
    state = torch.float64 if y.dtype == torch.float64 else torch.float32
    if norm.training:
        mean, var, count = statistics(y, norm.group)
        if running_mean is not None:
            with torch.no_grad():
                for running, new in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
                    running.copy_((1 - norm.momentum) * running.double() + norm.momentum * new)
    else:
        mean, var = running_mean.double(), running_var.double()
    scale = norm.scale / torch.sqrt(var + norm.eps)
    if weight is not None:
        scale = weight.double() * scale
    scale, rounded = scale.to(state), mean.to(state)
    offset = (rounded.double() - mean) * scale.double()  # what the rounding of the mean takes away
    if bias is not None:
        offset = bias.double() + offset
    channel = [-1 if i == 2 else 1 for i in range(y.dim())]
    return (y.to(state) - rounded.view(channel)) * scale.view(channel) + offset.to(state).view(channel)


def statistics(y, group):
    """Mean and biased variance of every channel, float64, and the number of elements in one, over all processes."""
    others = [i for i in range(y.dim()) if i != 2]
    exact, count = y.double(), y.numel() // y.shape[2]
    if group is None:
        return exact.mean(others), exact.var(others, unbiased=False), count
    count = int(_Sum.apply(torch.tensor(count, dtype=torch.float64, device=y.device), group))
    mean = _Sum.apply(exact.sum(others), group) / count
    centred = exact - mean.view([-1 if i == 2 else 1 for i in range(y.dim())])
    return mean, _Sum.apply(centred.square().sum(others), group) / count, count


def gather(t: torch.Tensor, group) -> torch.Tensor:
    """[processes, ...], in the order of ranks, so that all add them up alike."""
    parts = [torch.empty_like(t) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, t.contiguous(), group=group)
    return torch.stack(parts)


class _Sum(torch.autograd.Function):
    """The sum over processes; of gradients, too, as every process uses the sum."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return gather(t, group).sum(0)

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None
