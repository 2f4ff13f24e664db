"""The LIF neuron as a plain loop over time: what every other backend must reproduce."""

from __future__ import annotations

import math

import torch

from .ttm import ttm


def lif(x, v, spec, time_dim, steps_out=None, smooth=False, leak=None, threshold=None, sequence=False):
    """``snnkern.lif`` in PyTorch operations; arguments checked by the caller. ``leak`` and ``threshold``: tensors where
    ``spec`` has none; ``sequence``: the potential after every step is returned, instead of the last.

    ``smooth=True`` replaces the spike H(h - threshold) by the surrogate's antiderivative. Then the surrogate is the
    exact derivative, and ``torch.autograd.gradcheck`` can confirm the gradients that the step function hides.
    """
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = x.to(state).unbind(time_dim)
    # Tensors, because dividing by a number is multiplying by its inverse on some devices.
    if leak is None:
        leak = torch.full((), spec.leak, dtype=state, device=x.device)
    if threshold is None:
        threshold = torch.full((), spec.threshold, dtype=state, device=x.device)
    if v is None:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        v = torch.full(shape, spec.v_start, dtype=state, device=x.device)
    spikes, potentials = [], []
    for x_t in steps:
        if spec.form == "decay":
            h = leak * v + x_t
        elif spec.form == "tau_input":
            h = v + (x_t - (v - spec.rest)) / leak
        elif spec.form == "tau":
            h = v - (v - spec.rest) / leak + x_t
        elif spec.form == "tau_input_inverse":
            h = v + (x_t - (v - spec.rest)) * leak
        else:
            h = v - (v - spec.rest) * leak + x_t
        if spec.v_min is not None:
            h = torch.where(h <= spec.v_min, spec.v_min, h)
        s, event = _fire(h, threshold, spec, smooth)
        if spec.detach_reset:
            event = event.detach()
        if spec.reset is None:
            v = h - threshold * event
        else:
            infinite = h.abs() == math.inf if spec.ternary else h == math.inf
            finite = torch.where(infinite, threshold, h)  # 0 * inf would leave a NaN after the spike
            v = spec.reset * event + (1 - event) * finite
        spikes.append(s.to(x.dtype))
        potentials.append(v)
    if not spikes:
        return torch.empty_like(x), torch.empty_like(x, dtype=state) if sequence else v.clone()
    spikes = torch.stack(spikes, time_dim)
    spikes = spikes if steps_out in (None, len(steps)) else ttm(spikes, steps_out, time_dim)
    return spikes, torch.stack(potentials, time_dim) if sequence else v


def _fire(h, threshold, spec, smooth):
    """The spike, and what resets: of a ternary spike under hard reset, its magnitude."""
    if spec.levels:
        u = h / threshold
        s = spec.surrogate.primitive(u) if smooth else spec.surrogate(u)
        return s, s
    if not spec.ternary:
        s = _spike(h, threshold, spec, smooth)
        return s, s
    up, down = _spike(h, threshold, spec, smooth), _spike(-h, threshold, spec, smooth)
    return up - down, up - down if spec.reset is None else up + down


def _spike(h, threshold, spec, smooth):
    if smooth:
        return spec.surrogate.primitive(h - threshold)
    fired = h >= threshold if spec.fire_at_threshold else h > threshold
    return spec.surrogate(h - threshold, fired)
