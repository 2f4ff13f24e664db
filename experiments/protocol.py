"""What the protocols are made of: data, training, and what a claim says about the numbers, stated before.

All train on scikit-learn's digits made hard: pixel noise of standard deviation 0.4 and 600 training images, as without
the noise every method reaches 98 to 99 % and nothing can be told apart; where a protocol says *clean*, 1200 images
without noise. Networks that are compared share the seed: split, noise, initial weights and order of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from snnkern import analysis, losses
from snnkern.data import digits

LOSSES = {"SDT": losses.sdt, "TET": losses.tet}


@dataclass(frozen=True)
class Size:
    """``quick`` is a trial of the code: an epoch, a few images; its numbers say nothing."""

    quick: bool = False

    def epochs(self, count: int) -> int:
        return 1 if self.quick else count

    def data(self, seed: int, noise: float = 0.4, train: int = 600):
        train, test = digits(seed, noise, 60 if self.quick else train)
        return (train, tuple(part[:50] for part in test)) if self.quick else (train, test)


@dataclass(frozen=True)
class Measure:
    """A number of every seed's result, and the bound that its mean over seeds is to keep.

    ``wanted``: (">" , "<", ">=", "=" or "within", bound); "within": not further from 0 than that.
    """

    name: str
    of: Callable[[dict], float]
    wanted: tuple[str, float] | None = None

    def kept(self, value: float) -> bool:
        return self.margin(value) > 0 or (self.margin(value) == 0 and self.wanted[0] in (">=", "=", "within"))

    def margin(self, value: float) -> float:
        """How far a value is on the right side of the bound."""
        sign, bound = self.wanted
        if sign == "=":
            return -abs(value - bound)
        return {"<": bound - value, "within": bound - abs(value)}.get(sign, value - bound)


@dataclass(frozen=True)
class Protocol:
    claim: str
    source: str
    setup: str
    run: Callable[[int, Size], dict]
    measures: Sequence[Measure]
    draw: Callable[[Path, list[dict]], Path]
    seeds: int = 6


def train(
    model: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    plan: Sequence[tuple[Callable, int]],
    seed: int,
    lr: float = 2e-3,
    batch: int = 100,
    steps: int | None = None,
    constant: bool = False,
    each: Callable[[int], None] | None = None,
) -> nn.Module:
    """Adam; cosine to 0 over all epochs unless ``constant``. ``plan``: (loss, epochs) one after the other.

    ``each``: called before every epoch with its number.
    """
    x, y = data
    epochs = sum(count for _, count in plan)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch, criterion in enumerate(criterion for criterion, count in plan for _ in range(count)):
        if each is not None:
            each(epoch)
        model.train()
        for index in torch.randperm(len(x), generator=shuffle).split(batch):
            loss = criterion(model(x[index], steps), y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if not constant:
            schedule.step()
    return model


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def accuracy(model: nn.Module, test, steps: int) -> float:
    return 100 * analysis.accuracy_over_steps(model, *test, steps)[-1]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def gain(*keys, of: Callable = lambda x: x, first: str = "SDT", second: str = "TET") -> Callable[[dict], float]:
    """result[second][keys...] - result[first][keys...], ``of`` either."""

    def difference(result: dict) -> float:
        ends = []
        for name in (second, first):
            value = result[name]
            for key in keys:
                value = value[key]
            ends.append(of(value))
        return ends[0] - ends[1]

    return difference
