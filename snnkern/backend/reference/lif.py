"""The LIF neuron as a plain loop over time: what every other backend must reproduce."""

from __future__ import annotations

import math

import torch

from .ttm import ttm


def lif(x, v, spec, time_dim, steps_out=None, smooth=False):
    """``snnkern.lif`` in PyTorch operations; arguments checked by the caller.

    ``smooth=True`` replaces the spike H(h - threshold) by the surrogate's antiderivative. Then the surrogate is the
    exact derivative, and ``torch.autograd.gradcheck`` can confirm the gradients that the step function hides.
    """
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = x.to(state).unbind(time_dim)
    # A tensor, because dividing by a number is multiplying by its inverse on some devices.
    leak = torch.full((), spec.leak, dtype=state, device=x.device)
    if v is None:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        v = torch.full(shape, spec.v_start, dtype=state, device=x.device)
    spikes = []
    for x_t in steps:
        if spec.form == "decay":
            h = leak * v + x_t
        elif spec.form == "tau_input":
            h = v + (x_t - (v - spec.rest)) / leak
        else:
            h = v - (v - spec.rest) / leak + x_t
        s = _spike(h, spec, smooth)
        gate = s.detach() if spec.detach_reset else s
        if spec.reset is None:
            v = h - spec.threshold * gate
        else:
            finite = torch.where(h == math.inf, spec.threshold, h)  # 0 * inf would leave a NaN after the spike
            v = spec.reset * gate + (1 - gate) * finite
        spikes.append(s.to(x.dtype))
    if not spikes:
        return torch.empty_like(x), v.clone()
    spikes = torch.stack(spikes, time_dim)
    return (spikes if steps_out in (None, len(steps)) else ttm(spikes, steps_out, time_dim)), v


def _spike(h, spec, smooth):
    if smooth:
        return spec.surrogate.primitive(h - spec.threshold)
    fired = h >= spec.threshold if spec.fire_at_threshold else h > spec.threshold
    return spec.surrogate(h - spec.threshold, fired)
