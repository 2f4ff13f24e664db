"""Accuracy over the number of time steps, and at single ones."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from ..spec.arguments import positive

__all__ = ["accuracy_over_steps", "moments", "outputs"]


def accuracy_over_steps(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int | None = None, batch: int = 256
) -> list[float]:
    """Accuracy, a fraction, of the argmax of the mean output over the first 1, 2, ... steps.

    A network that ran for t steps is the beginning of one that runs for longer (batch norms keep their statistics), so
    this is also the accuracy of running it for t steps. Not so with a temporal transformation inside.

    Args:
        steps: how far; may be more than in training. Default: the model's own, or the number of frames.

    Source: Deng et al., ICLR 2022, figures 4A and 8.
    """
    return _right(outputs(model, x, steps, batch).cumsum(0), y)


def moments(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int | None = None, batch: int = 256
) -> list[float]:
    """Accuracy of the argmax of the output O(t) at each single step. Source: Deng et al., ICLR 2022, table 4."""
    return _right(outputs(model, x, steps, batch), y)


def outputs(model: nn.Module, x: torch.Tensor, steps: int | None = None, batch: int = 256) -> torch.Tensor:
    """[T, N, classes] of all samples, on the CPU."""
    positive("batch", batch)
    static = x.dim() == 4
    if not static and steps is not None:
        if positive("steps", steps) > len(x):
            raise ValueError(f"steps must be at most the number of frames, {len(x)}, got {steps}")
        x = x[:steps]
    device = next(model.parameters()).device
    options = (steps,) if static and steps is not None else ()
    with torch.no_grad(), evaluating(model):
        parts = x.split(batch, dim=0 if static else 1)
        return torch.cat([model(part.to(device), *options).cpu() for part in parts], dim=1)


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _right(scores: torch.Tensor, y: torch.Tensor) -> list[float]:
    if y.shape != scores.shape[1:2]:
        raise ValueError(f"y must hold a class for each of the {scores.shape[1]} samples, got shape {tuple(y.shape)}")
    return (scores.argmax(-1) == y.cpu()).double().mean(1).tolist()
