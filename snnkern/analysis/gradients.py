"""How long a trained network's gradients are, and how much those of two numbers of time steps agree.

::

    ||dL/dW||              L: mean loss of all samples, W: all convolution weights as one vector
    mean_i ||dL_i/dx_i||   L_i: loss of a sample, x_i: its image, or all its frames
    cos(dL/dW at T, dL/dW at T')                                                       the same W, the same samples

A network without convolutions is measured at its linear weights. Backward goes through the surrogates and through
time, as in training; dropout is off. The norms use their running statistics, or in ``gradient_similarity`` those of a
batch, a part of ``batch`` samples (the last one may be smaller). ``.grad`` of no parameter is touched; modes and
buffers are afterwards what they were.

Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025: table 13 (lengths, over the whole
training set), and section 4.2: a cosine above 0.94 between 3 and 6 steps. It leaves open of which layers, at which
samples, how far into training and how batch norm is treated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..methods.dspike import cosine, probing
from ..nn.modes import evaluating
from ..spec.arguments import positive
from .accuracy import _parts
from .landscape import Criterion

__all__ = ["Lengths", "Similarity", "gradient_lengths", "gradient_similarity"]

Progress = Callable[[int, int], None]  # samples done, of how many


class Lengths(NamedTuple):
    weights: float  # of dL/dW
    inputs: float  # of dL_i/dx_i, the mean over the samples


class Similarity(NamedTuple):
    whole: float  # cosine over all convolution weights
    layers: dict[str, float]  # of the weight of every convolution and linear layer, by the layer's name


def gradient_lengths(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    criterion: Criterion,
    steps: int | None = None,
    batch: int = 256,
    progress: Progress | None = None,
) -> Lengths:
    """Lengths, Euclidean norms, of the gradients of the loss to all weights and to the input of each sample.

    In eval mode, where the loss of a sample does not depend on others.

    Args:
        criterion: (outputs [T, N, classes], y) -> scalar, a mean over the samples.
        steps: T. Default: the model's own, or the number of frames.
        progress: called after each part with the number of samples done and of all.

    Source: Du et al., ICLR 2025, table 13.
    """
    gradients, inputs = _gradients(model, evaluating, x, y, criterion, steps, batch, progress)
    return Lengths(_whole(model, gradients).norm().item(), inputs)


def gradient_similarity(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    criterion: Criterion,
    steps: tuple[int, int] = (3, 6),
    batch: int = 256,
    batch_statistics: bool = False,
    progress: Progress | None = None,
) -> Similarity:
    """Cosine between the gradients at two numbers of steps, T and T'.

    Args:
        criterion: (outputs [T, N, classes], y) -> scalar, a mean over the samples.
        steps: T and T'; of frames, the first so many.
        batch_statistics: whether norms use those of each part, as in training, in place of the running ones. Then L
            is the mean over the parts, and ``batch`` is part of what is measured.
        progress: called after each part with the number of samples done and of all, both numbers of steps counted.

    Source: Du et al., ICLR 2025, section 4.2.
    """
    if not isinstance(steps, (tuple, list)) or len(steps) != 2:
        raise ValueError(f"steps must be two numbers of time steps, got {steps!r}")
    mode, found = probing if batch_statistics else evaluating, []
    for i, t in enumerate(steps):
        shift = progress and (lambda done, samples, i=i: progress(done + i * samples, 2 * samples))
        found.append(_gradients(model, mode, x, y, criterion, positive("steps", t), batch, shift)[0])
    first, second = found
    layers = {name: cosine(gradient, second[name]) for name, gradient in first.items()}
    return Similarity(cosine(_whole(model, first), _whole(model, second)), layers)


def _gradients(model, mode, x, y, criterion, steps, batch, progress) -> tuple[dict[str, torch.Tensor], float]:
    """dL/dW by layer, in float64, and the mean of ||dL_i/dx_i||."""
    layers = {name: module.weight for name, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))}
    if not layers:
        raise ValueError(f"model must have a convolution or linear layer, {type(model).__name__} has none")
    device, samples = next(model.parameters()).device, len(y)
    sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in layers.items()}
    done, lengths = 0, 0.0
    parts, steps = _parts(x, y, steps, batch)
    with torch.enable_grad(), mode(model):
        for part, labels in parts:
            part, labels = part.to(device).detach().requires_grad_(), labels.to(device)
            loss = len(labels) * criterion(model(part) if steps is None else model(part, steps), labels)
            wanted = [*layers.values(), part]
            *found, of_part = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                total += gradient
            of_sample = of_part.movedim(0 if part.dim() == 4 else 1, 0).flatten(1)
            lengths += of_sample.double().norm(dim=1).sum().item()
            done += len(labels)
            if progress is not None:
                progress(done, samples)
    return {name: total / samples for name, total in sums.items()}, lengths / samples


def _whole(model: nn.Module, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    convolutions = [name for name in gradients if isinstance(model.get_submodule(name), _ConvNd)]
    return torch.cat([gradients[name].flatten() for name in convolutions or gradients])
