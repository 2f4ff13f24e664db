"""The LIF neuron as a plain loop over time: what every other backend must reproduce."""

from __future__ import annotations

import math

import torch

from .ttm import ttm


def lif(
    x, v, spec, time_dim, steps_out=None, smooth=False, leak=None, threshold=None, bias=None, sequence=False,
    weight=None, s=None,
):  # fmt: skip
    """``snnkern.lif`` in PyTorch operations, and with a ``weight`` ``snnkern.recurrent_lif``; arguments checked by the
    caller. ``leak`` and ``threshold``: tensors where ``spec`` has none; ``sequence``: the potential after every step is
    returned, instead of the last state; ``s``: the spikes before the first step.

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
    synaptic, adaptive = spec.synapse_decay is not None, spec.threshold_decay is not None
    if v is None:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        v = torch.full(shape, spec.v_start, dtype=state, device=x.device)
        i = a = torch.zeros_like(v)
    elif spec.states > 1:
        v, i, a = v[0], v[1], v[-1]
    base, spikes, potentials = threshold, [], []
    for x_t in steps:
        if bias is not None:
            x_t = x_t + bias
        if weight is not None:
            x_t = x_t + (torch.zeros_like(x_t) if s is None else receive(s.to(state), weight))
        if synaptic:
            x_t = i = spec.synapse_decay * i + x_t
        if adaptive:
            threshold = base + spec.threshold_jump * a
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
            infinite = ~threshold.isfinite() & (event == 0)
            v = h - torch.where(infinite, 0, threshold) * event  # 0 * inf would leave a NaN without a spike
        else:
            infinite = (h.abs() == math.inf) & (event != 0)
            finite = torch.where(infinite, spec.reset, h)  # 0 * inf would leave a NaN after the spike
            v = spec.reset * event + (1 - event) * finite
        if adaptive:
            a = spec.threshold_decay * a + s
        spikes.append(s.to(x.dtype))
        potentials.append(v)
    last = [v, *([i] if synaptic else []), *([a] if adaptive else [])]
    last = v if spec.states == 1 else torch.stack(last)
    if not spikes:
        return torch.empty_like(x), torch.empty_like(x, dtype=state) if sequence else last.clone()
    spikes = torch.stack(spikes, time_dim)
    spikes = spikes if steps_out in (None, len(steps)) else ttm(spikes, steps_out, time_dim)
    return spikes, torch.stack(potentials, time_dim) if sequence else last


def receive(s, weight):
    """[..., H]: the sum over the neurons j that fired, in ascending j from 0, of ``s[..., j] * weight[:, j]``."""
    return _Receive.apply(s, weight)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, weight):
        ctx.save_for_backward(s, weight)
        r = s.new_zeros(s.shape)
        for j in (s != 0)[None].flatten(0, -2).any(0).nonzero().flatten().tolist():
            s_j = s[..., j : j + 1]
            r = torch.where(s_j != 0, r + s_j * weight[:, j], r)
        return r

    @staticmethod
    def backward(ctx, grad):
        s, weight = ctx.saved_tensors
        return grad @ weight, grad[None].flatten(0, -2).T @ s[None].flatten(0, -2)


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
    if spec.reset is None:
        return up - down, up - down
    event = up + down
    if not smooth:  # both fire at a threshold below 0, of a tensor or one that fell: that is no spike
        event = event - 2 * (up * down).detach()
    return up - down, event


def _spike(h, threshold, spec, smooth):
    if smooth:
        return spec.surrogate.primitive(h - threshold)
    fired = h >= threshold if spec.fire_at_threshold else h > threshold
    return spec.surrogate(h - threshold, fired)
