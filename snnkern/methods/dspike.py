"""Dspike's search for the temperature of its surrogate, by finite differences of the first layer.

The spike is a step, so its loss has no useful derivative; but over a distance eps it has a difference quotient. A
surrogate is the better, the closer the gradient that it gives is in direction to the finite-difference gradient (FDG)

::

    g_i = (L(w + eps e_i) - L(w - eps e_i)) / (2 eps)

Source: Li et al., "Differentiable Spike: Rethinking Gradient-Descent for Training Spiking Neural Networks", NeurIPS
2021, eq. 10 and algorithm 1. No code of it is public; what the paper leaves open is chosen here:

- one batch serves all evaluations of a search, and between them only the weights differ: batch norms use the statistics
  of this batch, as in training (that is the function being differentiated), without touching the running ones, and
  dropout is off. Its size is the caller's choice;
- the forward pass does not know the surrogate, so one FDG serves the three candidates, and so does one forward pass
  of the gradient: only backward runs once for each;
- a tie keeps b; a gradient of zeros has the cosine 0;
- b is not lowered below one step: a candidate under it is left out. At b = 0.2 the surrogate is within 1 % the
  rectangle that it tends to, and b = 0 is not defined;
- evaluations are a plain loop. With k perturbed copies folded into the batch, and norms per copy, one CPU core took 0.8
  times as long for the toy network on 8x8 images (128 of them, k = 6 to 36), but 1.0 to 1.9 times on 28x28 images, 1.2
  to 1.9 times for CNN6, 1.1 to 1.4 times for ResNet-19.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from ..nn import LIF
from ..nn.modes import keeping_buffers, with_batch_statistics
from ..ops.launch import go_back_by
from ..surrogate import Dspike, Surrogate

__all__ = [
    "Found",
    "cosine",
    "finite_differences",
    "first_weight",
    "search",
    "set_surrogate",
    "surrogate_gradient",
]

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # outputs [T, N, classes], labels [N] -> scalar
Progress = Callable[[int, int], None]  # forward passes done, of how many


class Found(NamedTuple):
    """What a search found."""

    b: float
    cosines: dict[float, float]  # of every candidate, the b before it first
    evaluations: int  # forward passes of the finite differences: two per weight


def search(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    criterion: Criterion,
    b: float = 1.0,
    step: float = 0.2,
    eps: float = 0.1,
    progress: Progress | None = None,
    *,
    width: float = 1.0,
) -> Found:
    """The best of b, b + step and b - step, on one batch. Model, surrogate and running statistics stay as they are.

    Args:
        model: with at least one ``nn.LIF``, alone or in a ``BNLIF``. Processes that share batch norm statistics must
            call this together and with the same batch, to find the same b.
        x, y: the batch, as the model and the criterion take it.
        criterion: (outputs [T, N, classes], y) to a scalar.
        b: temperature until now. ``step``: distance of the candidates, and the least temperature.
        eps: of the finite differences.
        progress: called after each weight with the number of forward passes done and of all.
        width: of the surrogate, around the threshold.

    Source: Li et al., NeurIPS 2021, algorithm 1.
    """
    for name, value in (("b", b), ("step", step)):
        _positive(name, value)
    _neurons(model)
    differences = finite_differences(model, x, y, criterion, eps, progress=progress)
    candidates = [b] + [c for c in (round(b + step, 9), round(b - step, 9)) if c >= step]
    cosines = {}
    with torch.enable_grad(), probing(model):
        loss, weight = criterion(model(x), y), first_weight(model)
        for candidate in candidates:
            if not go_back_by(Dspike(candidate, width), loss.grad_fn):
                raise ValueError("model must run its LIFs, not compiled: none is in the graph of its loss")
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            cosines[candidate] = cosine(differences, gradient)
    return Found(max(cosines, key=cosines.get), cosines, 2 * differences.numel())


def set_surrogate(model: nn.Module, surrogate: Surrogate) -> None:
    """Gives every ``nn.LIF`` of the model, those inside ``BNLIF`` too, this surrogate."""
    if not isinstance(surrogate, Surrogate):
        raise TypeError(f"surrogate must be one of snnkern.surrogate, got {surrogate!r}")
    for neuron in _neurons(model):
        neuron.settings["surrogate"] = surrogate


def finite_differences(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    criterion: Criterion,
    eps: float = 0.1,
    parameter: nn.Parameter | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """The FDG of a parameter, by two forward passes for each of its elements.

    Args:
        model, x, y, criterion, eps, progress: see ``search``.
        parameter: one of the model's. Default: ``first_weight``.

    Returns: a tensor of the parameter's shape. The parameter is put back exactly, also when interrupted.
    """
    _positive("eps", eps)
    parameter = first_weight(model) if parameter is None else parameter
    if not any(parameter is p for p in model.parameters()):
        raise ValueError(f"parameter must be one of the model's, got one of shape {tuple(parameter.shape)} that is not")
    before, differences = parameter.detach().clone(), torch.empty_like(parameter)
    with torch.no_grad(), probing(model):
        try:
            for done, i in enumerate(product(*map(range, before.shape)), start=1):
                parameter[i] = before[i] + eps
                above = criterion(model(x), y)
                parameter[i] = before[i] - eps
                differences[i] = (above - criterion(model(x), y)) / (2 * eps)
                parameter[i] = before[i]
                if progress is not None:
                    progress(2 * done, 2 * before.numel())
        finally:
            parameter.copy_(before)
    return differences


def surrogate_gradient(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, criterion: Criterion, parameter: nn.Parameter | None = None
) -> torch.Tensor:
    """The gradient of a parameter by backward, under the conditions of the FDG; arguments as ``finite_differences``.

    ``.grad`` of no parameter is touched.
    """
    with torch.enable_grad(), probing(model):
        loss = criterion(model(x), y)
        return torch.autograd.grad(loss, first_weight(model) if parameter is None else parameter)[0]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the angle between two tensors of one shape, a and b, taken as vectors; 0 if one of them is 0."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms > 0 else 0.0


def first_weight(model: nn.Module) -> nn.Parameter:
    """The weight of the model's first convolution, linear or recurrent layer, in the order of their registration."""
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            return module.weight
        if isinstance(module, nn.RNNBase):
            return module.weight_ih_l0
    raise ValueError(f"model must have a convolution or linear layer, {type(model).__name__} has none")


@contextmanager
def probing(model: nn.Module):
    """Batch norms use the statistics of the batch, dropout is off; modes and buffers are afterwards what they were."""
    with keeping_buffers(model), with_batch_statistics(model):
        yield


def _neurons(model: nn.Module) -> list[LIF]:
    found = [module for module in model.modules() if isinstance(module, LIF)]
    if not found:
        raise ValueError(f"model must have an snnkern.nn.LIF, {type(model).__name__} has none")
    return found


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
