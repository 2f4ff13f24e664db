"""Accuracy and losses over the number of time steps, and at single ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.modes import evaluating
from ..spec.arguments import positive

__all__ = ["Evaluation", "accuracy_over_steps", "evaluate", "moments", "outputs"]

Parts = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Evaluation(NamedTuple):
    """Entry t - 1 of each belongs to t steps, or to step t. Accuracies are fractions, losses are means over the
    samples. A network that ran for t steps is the beginning of one that runs for longer (batch norms keep their
    statistics), so stopping after t steps is the same as running t; not so with a temporal transformation inside."""

    accuracy: list[float]  # of the argmax of the potential averaged over the first t steps
    moments: list[float]  # of the argmax at step t alone
    sdt: list[float]  # loss of t steps: see snnkern.losses
    tet: list[float]  # with lamb = 0
    samples: int


def evaluate(
    model: nn.Module,
    parts: Parts,
    steps: int | None = None,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    t: Sequence[int] | None = None,
) -> Evaluation:
    """Tests in eval mode, and leaves every module in the mode it was in.

    Args:
        parts: (x, y) as the model takes them: x [N, C, H, W], or frames [T, N, ...]; y [N], int64.
        steps: of static images. Default: the model's own.
        total: of sums [5, T], over the processes that share the work.
        t: a temporal configuration in place of ``steps``; see ``snnkern.models.Staged``. Only the last entries of what
            is returned are then those of a network that stops there.
    """
    with torch.no_grad(), evaluating(model):
        sums = total(sum(_sums(scores.float(), y) for scores, y in _scored(model, parts, steps, t)))
    *rows, samples = sums.tolist()
    return Evaluation(*([value / samples[0] for value in row] for row in rows), int(samples[0]))


def accuracy_over_steps(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int | None = None, batch: int = 256
) -> list[float]:
    """Accuracy, a fraction, of the argmax of the mean output over the first 1, 2, ... steps; see ``Evaluation``.

    Args:
        steps: how far; may be more than in training. Default: the model's own, or the number of frames.

    Source: Deng et al., ICLR 2022, figures 4A and 8.
    """
    return evaluate(model, *_parts(x, y, steps, batch)).accuracy


def moments(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int | None = None, batch: int = 256
) -> list[float]:
    """Accuracy of the argmax of the output O(t) at each single step. Source: Deng et al., ICLR 2022, table 4."""
    return evaluate(model, *_parts(x, y, steps, batch)).moments


def outputs(
    model: nn.Module, x: torch.Tensor, steps: int | None = None, batch: int = 256, t: Sequence[int] | None = None
) -> torch.Tensor:
    """[T, N, classes] of all samples, on the CPU; ``t``: see ``evaluate``."""
    nobody = torch.zeros(x.shape[0 if x.dim() == 4 else 1], dtype=torch.int64)
    with torch.no_grad(), evaluating(model):
        parts, steps = _parts(x, nobody, steps, batch)
        return torch.cat([scores.cpu() for scores, _ in _scored(model, parts, steps, t)], dim=1)


def _parts(x: torch.Tensor, y: torch.Tensor, steps: int | None, batch: int) -> tuple[Parts, int | None]:
    """x and y in parts of ``batch`` samples, and ``steps`` as the model is to be told."""
    positive("batch", batch)
    static = x.dim() == 4
    if not static and steps is not None:
        if positive("steps", steps) > len(x):
            raise ValueError(f"steps must be at most the number of frames, {len(x)}, got {steps}")
        x, steps = x[:steps], None
    samples = x.shape[0 if static else 1]
    if y.shape != (samples,):
        raise ValueError(f"y must hold a class for each of the {samples} samples, got shape {tuple(y.shape)}")
    return zip(x.split(batch, dim=0 if static else 1), y.split(batch), strict=True), steps


def _scored(
    model: nn.Module, parts: Parts, steps: int | None, t: Sequence[int] | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs [T, N, classes] of every part, and y, on the device of the model."""
    device, options = next(model.parameters()).device, () if steps is None else (steps,)
    named = {} if t is None else {"t": t}
    for x, y in parts:
        yield model(x.to(device), *options, **named), y.to(device)


def _sums(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[5, T]: how many are right after t steps and at step t, and their losses, summed over the samples; how many."""
    count = torch.arange(1, len(scores) + 1, device=scores.device).view(-1, 1)
    mean = scores.cumsum(0) / count.unsqueeze(2)
    y = y.expand(len(scores), -1)

    def loss(scores):
        return F.cross_entropy(scores.movedim(2, 1), y, reduction="none")

    rows = mean.argmax(2) == y, scores.argmax(2) == y, loss(mean), loss(scores).cumsum(0) / count, torch.ones_like(y)
    return torch.stack([row.double().sum(1) for row in rows])
