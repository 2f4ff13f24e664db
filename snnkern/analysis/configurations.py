"""Accuracy of a network in temporal configurations, one number of time steps per stage, and how often its stages fire.

What ``snnkern.methods.mtt_search`` chooses the best configuration from. Source: Du et al., "Temporal Flexibility in
Spiking Neural Networks", ICLR 2025, section 5.3 and appendix A.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from ..methods.mtt import calibrate
from ..nn.modes import evaluating, keeping_buffers
from .accuracy import Parts, _scored
from .energy import NEURONS, _count

__all__ = ["accuracies", "right", "stage_rates"]


def right(model: nn.Module, t: Sequence[int], calibrations: Sequence[Parts], parts: Parts) -> torch.Tensor:
    """[N], float64: for each sample the share of the calibrations after which the network in the configuration t is
    right about it. Their mean is the accuracy. The network is left as it was, statistics included.

    Args:
        t: a number of time steps per stage.
        calibrations: batches (x, y) of training samples in each, from which the batch norms are calibrated for t; the
            mean over three is published.
        parts: (x, y) as the model takes them. All that is given here is gone through more than once.

    Source: appendix A.3.
    """
    if not calibrations:
        raise ValueError("calibrations must be at least one, got none")
    device, shares = next(model.parameters()).device, torch.zeros((), dtype=torch.float64)
    with keeping_buffers(model):
        for batches in calibrations:
            calibrate(model, (x.to(device) for x, _ in batches), t=t)
            with torch.no_grad(), evaluating(model):
                found = [(scores.float().mean(0).argmax(1) == y).cpu() for scores, y in _scored(model, parts, None, t)]
            shares = shares + torch.cat(found).double() / len(calibrations)
    return shares


def accuracies(
    model: nn.Module,
    configurations: Iterable[Sequence[int]],
    calibrations: Sequence[Parts],
    parts: Parts,
) -> Iterator[float]:
    """Accuracy, a fraction, in each of the ``configurations``, one after another; the network is left as it was.

    Args:
        configurations: a number of time steps per stage each.
        calibrations: batches (x, y) of training samples in each, from which the batch norms are calibrated for every
            configuration; the result is the mean over them (published: three).
        parts: (x, y) of test samples as the model takes them. All that is given here is gone through more than once.

    Source: Du et al., ICLR 2025, appendix A.3.
    """
    for t in configurations:
        yield right(model, t, calibrations, parts).mean().item()


def stage_rates(
    model: nn.Module,
    x: torch.Tensor,
    steps: int | None = None,
    batch: int = 256,
    neurons: tuple[type[nn.Module], ...] = NEURONS,
) -> list[float]:
    """Spikes per neuron and step of every stage of the network with ``steps`` steps in each: R of the energy EC(t).

    The mean is over all neurons of the stage: those of a layer with more of them weigh more. ``neurons``: as in
    ``energy``. Source: Du et al., ICLR 2025, appendix A.3.
    """
    fired, names = _count(model, x, steps, batch, neurons).fired, dict(model.named_modules())
    rates = []
    for i, modules in enumerate(model.stage_modules(), 1):
        inside = {each for module in modules for each in module.modules()}
        seen = [found for name, found in fired.items() if names[name] in inside]
        if not seen:
            raise ValueError(f"model must have neurons in every stage, {type(model).__name__} has none in stage {i}")
        rates.append(sum(found.total for found in seen) / sum(found.elements for found in seen))
    return rates
