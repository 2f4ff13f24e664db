"""The loss around a minimum, along random directions that every filter takes in proportion to its own size.

::

    L(w + a d1 + b d2)  or  L(w + a d),   d of a filter: Gaussian, scaled to the norm of that filter

so that minima of networks with weights of different sizes can be compared: batch norm makes the size itself arbitrary.
A filter is what makes one output channel, of a convolution or a linear layer. Biases and batch norms are not moved, and
the norms use their running statistics. Networks of one architecture get the same directions from the same seed.

Source: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018; Deng et al., ICLR 2022, figures 2 and
5, and Du et al., ICLR 2025, figure 9, which do not say how batch norm is treated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..spec.arguments import positive
from .accuracy import outputs

__all__ = ["Landscape", "Line", "landscape", "line", "rise"]

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Landscape:
    """Losses on a square grid."""

    offsets: list[float]  # along either direction, in filter norms; the middle one is 0
    losses: dict[str, list[list[float]]]  # name -> [offset along the first][offset along the second]


@dataclass(frozen=True)
class Line:
    """Losses along single directions."""

    offsets: list[float]  # in filter norms; the middle one is 0
    losses: dict[str, list[list[float]]]  # name -> [direction][offset]


def landscape(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    criteria: Mapping[str, Criterion],
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
    steps: int | None = None,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Landscape:
    """Losses over the plane of two directions around the model's weights.

    Args:
        criteria: name to (outputs [T, N, classes], y) -> scalar: several losses of the same evaluations.
        radius: how far to either side, in filter norms.
        points: of the grid along a side, odd, so that the minimum itself is on it; ``points**2`` evaluations.
        seed: of the directions.
        progress: called after each evaluation with the number done and of all.
    """
    offsets = _offsets(radius, points)
    first, second = _directions(model, 2, seed)
    losses = {name: [[0.0] * points for _ in offsets] for name in criteria}
    with moving(model) as move:
        for i, a in enumerate(offsets):
            for j, b in enumerate(offsets):
                move([a * d + b * e for d, e in zip(first, second, strict=True)])
                found = outputs(model, x, steps, batch)
                for name, criterion in criteria.items():
                    losses[name][i][j] = criterion(found, y).item()
                if progress is not None:
                    progress(i * points + j + 1, points * points)
    return Landscape(offsets, losses)


def line(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    criteria: Mapping[str, Criterion],
    radius: float = 1.0,
    points: int = 21,
    directions: int = 5,
    seed: int = 0,
    steps: int | None = None,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Line:
    """Losses along each of several random ``directions`` through the model's weights.

    The rest is as in ``landscape``, whose first direction is the first of these; ``points`` times ``directions``
    evaluations.

    Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, figure 9 (one direction).
    """
    offsets = _offsets(radius, points)
    made = _directions(model, positive("directions", directions), seed)
    losses = {name: [[0.0] * points for _ in made] for name in criteria}
    with moving(model) as move:
        for i, direction in enumerate(made):
            for j, a in enumerate(offsets):
                move([a * d for d in direction])
                found = outputs(model, x, steps, batch)
                for name, criterion in criteria.items():
                    losses[name][i][j] = criterion(found, y).item()
                if progress is not None:
                    progress(i * points + j + 1, directions * points)
    return Line(offsets, losses)


def rise(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    criterion: Criterion,
    radii: Sequence[float] = (0.25, 0.5),
    directions: int = 5,
    seed: int = 0,
    steps: int | None = None,
    batch: int = 256,
) -> list[float]:
    """How much the loss grows at each radius: a number to compare, where two landscapes can only be looked at.

    Args:
        criterion: (outputs [T, N, classes], y) -> scalar.
        radii: distances, in filter norms.
        directions: random ones; the mean is over them, to both sides of each.
        seed: of the directions.
    """
    made = _directions(model, positive("directions", directions), seed)
    with moving(model) as move:
        start = criterion(outputs(model, x, steps, batch), y).item()
        rises = []
        for radius in radii:
            found = []
            for direction in made:
                for side in (radius, -radius):
                    move([side * d for d in direction])
                    found.append(criterion(outputs(model, x, steps, batch), y).item() - start)
            rises.append(sum(found) / len(found))
    return rises


def _offsets(radius: float, points: int) -> list[float]:
    if positive("points", points) % 2 == 0 or points < 3:
        raise ValueError(f"points must be odd and at least 3, got {points}")
    half = points // 2
    return [radius * (i - half) / half for i in range(points)]


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """What directions and noise move: of the models, the weights of convolutions and linear layers."""
    return [p for p in model.parameters() if p.dim() > 1]


def _directions(model: nn.Module, count: int, seed: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        direction = []
        for weight in weights_of(model):
            d = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
            size = weight.detach().flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)
            direction.append(d * size.view(-1, *[1] * (d.dim() - 1)))
        made.append(direction)
    return made


@contextmanager
def moving(model: nn.Module):
    """Gives a function that puts the weights at their start plus a shift; in the end they are at the start again."""
    weights = weights_of(model)
    start = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def move(shifts):
        for weight, origin, shift in zip(weights, start, shifts, strict=True):
            weight.copy_(origin + shift)

    try:
        yield move
    finally:
        with torch.no_grad():
            for weight, origin in zip(weights, start, strict=True):
                weight.copy_(origin)
