"""Accuracy under Gaussian noise on the weights or on the inputs: how much of it a network keeps.

Weights are those of convolutions and linear layers; biases and batch norms stay, and the norms keep their running
statistics. One sigma, in the units of the weights, holds for all layers; in a folded network (``snnkern.nn.fold``) the
weights have the norms' scale in them, which makes it another noise. On inputs sigma is in the units of what the model
takes, after normalisation: a static image gets one noise that is shown at every step, frames get one each.

A draw is scaled to every sigma, so that its curve is that of one direction; networks of one architecture get the same
draws from the same seed.

Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, figures 5 and 6: mean, least and
greatest accuracy of five draws. Which parameters are meant, and that sigma is absolute, is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn

from ..spec.arguments import number, positive
from .accuracy import accuracy_over_steps
from .landscape import moving, weights_of

__all__ = ["Noise", "input_noise", "weight_noise"]

Progress = Callable[[int, int], None]  # evaluations done, of how many


@dataclass(frozen=True)
class Noise:
    """Accuracies, fractions, of the argmax of the mean output."""

    sigmas: list[float]  # standard deviations of the noise
    runs: list[list[float]]  # [draw][sigma]

    @property
    def mean(self) -> list[float]:
        return [*map(mean, zip(*self.runs, strict=True))]

    @property
    def least(self) -> list[float]:
        return [*map(min, zip(*self.runs, strict=True))]

    @property
    def greatest(self) -> list[float]:
        return [*map(max, zip(*self.runs, strict=True))]


def weight_noise(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    sigmas: Sequence[float] = (0.0, 0.005, 0.01, 0.02, 0.05),
    repeats: int = 5,
    seed: int = 0,
    steps: int | None = None,
    batch: int = 256,
    progress: Progress | None = None,
) -> Noise:
    """Accuracy with N(0, sigma²) added to every weight, whose values come back exactly, also when interrupted.

    Args:
        sigmas: standard deviations, in the unit of what the noise is added to.
        repeats: draws of the noise, ``seed`` that of their generator.
        steps: T. Default: the model's own, or the number of frames.
        progress: called after each evaluation with the number done and of all.

    Source: Du et al., ICLR 2025, figure 5.
    """
    with moving(model) as move:

        def accuracy(sigma: float, noise: list[torch.Tensor]) -> float:
            move([sigma * of_weight for of_weight in noise])
            return accuracy_over_steps(model, x, y, steps, batch)[-1]

        return _over(weights_of(model), accuracy, sigmas, repeats, seed, progress)


def input_noise(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    sigmas: Sequence[float] = (0.0, 0.1, 0.2, 0.5, 1.0),
    repeats: int = 5,
    seed: int = 0,
    steps: int | None = None,
    batch: int = 256,
    progress: Progress | None = None,
) -> Noise:
    """Accuracy with N(0, sigma²) added to every number of x; the rest as in ``weight_noise``.

    Source: Du et al., ICLR 2025, figure 6.
    """

    def accuracy(sigma: float, noise: list[torch.Tensor]) -> float:
        return accuracy_over_steps(model, x + sigma * noise[0], y, steps, batch)[-1]

    return _over([x], accuracy, sigmas, repeats, seed, progress)


def _over(
    tensors: Sequence[torch.Tensor],
    accuracy: Callable[[float, list[torch.Tensor]], float],
    sigmas: Sequence[float],
    repeats: int,
    seed: int,
    progress: Progress | None,
) -> Noise:
    sigmas, generator = [number("sigmas", sigma) for sigma in sigmas], torch.Generator().manual_seed(seed)
    if not sigmas or min(sigmas) < 0:
        raise ValueError(f"sigmas must hold at least one number and none below 0, got {sigmas}")
    runs: list[list[float]] = []
    for i in range(positive("repeats", repeats)):
        noise = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in tensors]
        runs.append([])
        for j, sigma in enumerate(sigmas):
            runs[i].append(accuracy(sigma, noise))
            if progress is not None:
                progress(i * len(sigmas) + j + 1, repeats * len(sigmas))
    return Noise(sigmas, runs)
