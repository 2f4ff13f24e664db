"""The gate: a contender that differs from the reference gets no time."""

from __future__ import annotations

import torch

import snnkern

TIE = 1e-6  # a potential so near the threshold may be rounded to either side
GRADIENT = {"float32": 1e-5, "bfloat16": 4e-3}  # relative norm of the error; a rounding to bfloat16 is 2e-3
# Share of spikes that may differ; relative norm of the error of the gradient, and of those of weight and bias.
EXACT = {"float32": (0.0, 1e-5, 1e-4), "bfloat16": (0.0, 4e-3, 4e-3)}
# PyTorch's batch norm rounds at other steps, and to bfloat16 where ours stays in float32.
ROUNDED = {"float32": (1e-5, 1e-5, 1e-3), "bfloat16": (2e-3, 2e-2, 5e-2)}
HALF_STATE = 1e-2, 1e-1, 1e-1  # where the state itself is rounded to 16 bits


class Refused(Exception):
    """Why a contender is not measured."""


def compare(got, true, x, options: dict, dtype: str, half_state: bool = False) -> dict[str, float]:
    """Holds (spikes, gradient) to the reference's for the same x [T, ...]; returns how far they are, or raises Refused.

    A neuron may differ from a tie on, and its gradient then too.
    """
    spikes, gradient = (t.detach().flatten(1) for t in got)
    true_spikes, true_gradient = (t.flatten(1) for t in true)
    differ = spikes != true_spikes
    share = differ.float().mean().item()
    most, bound = HALF_STATE[:2] if half_state and dtype != "float32" else (0.0, GRADIENT[dtype])
    if share > most:
        columns = differ.any(0).nonzero().squeeze(1)
        tied = len(columns) <= max(1, differ.shape[1] // 100) and _tied(
            x.detach().flatten(1)[:, columns], differ[:, columns].int().argmax(0), options
        )
        if not tied:
            raise Refused(f"{differ.sum()} of {differ.numel()} spikes differ from the reference")
        gradient, true_gradient = gradient.clone(), true_gradient.clone()
        gradient[:, columns] = true_gradient[:, columns] = 0
    error = distance(gradient, true_gradient)
    if not error <= bound:
        raise Refused(f"gradient differs from the reference's by {error:.1e} of its norm, more than {bound:.0e}")
    return {"spikes_differ": share, "gradient_error": error, "spike_rate": spikes.float().mean().item()}


def compare_within(got, true, limits: tuple[float, float, float]) -> dict[str, float]:
    """Holds spikes, and any gradients, x's first, to the reference's; returns how far they are, or raises Refused.

    Of the gradient of x [T, ...] those neurons count whose spikes agree. One spike may differ whatever the limit.
    """
    most, *bounds = limits
    spikes, true_spikes = (part[0].detach().flatten(1) for part in (got, true))
    differ = spikes != true_spikes
    count, share = differ.sum().item(), differ.float().mean().item()
    if count > max(1, most * differ.numel()):
        raise Refused(f"{count} of {differ.numel()} spikes differ from the reference, more than {most:g} of them")
    facts = {"spikes_differ": share, "spike_rate": true_spikes.float().mean().item()}
    for i, gradients in enumerate(zip(got[1:], true[1:], strict=True)):
        name, bound = ("gradient of weight or bias", bounds[1]) if i else ("gradient", bounds[0])
        error = distance(*gradients) if i else distance(*(g.flatten(1)[:, ~differ.any(0)] for g in gradients))
        if not error <= bound:
            raise Refused(f"{name} differs from the reference's by {error:.1e} of its norm, more than {bound:.0e}")
        facts.setdefault("gradient_error", error)
    return facts


def distance(got: torch.Tensor, true: torch.Tensor) -> float:
    return ((got.float() - true.float()).norm() / true.float().norm()).item()


def _tied(x, first, options: dict) -> bool:
    """Whether in every column of x [T, K] the potential at step ``first`` [K] is at the threshold, but for rounding."""
    v, threshold = None, options.get("threshold", 1.0)
    distance = torch.empty(first.shape, device=x.device)
    for t in range(int(first.max()) + 1):
        h = snnkern.lif(x[t : t + 1], v, **{**options, "threshold": 1e30}, backend="reference")[1]  # never fires
        distance = torch.where(first == t, (h - threshold).abs().float(), distance)
        v = snnkern.lif(x[t : t + 1], v, **options, backend="reference")[1]
    return bool((distance < TIE).all())
