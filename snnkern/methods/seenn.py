"""Spiking early exit (SEENN-I): a sample leaves at the first step at which the network is confident.

``outputs`` O_t are those of the last layer at each step; T of them.

::

    S_t = O_1 + ... + O_t
    c_t = max softmax(S_t)                             "confidence"
        = 1 - H(softmax(S_t)) / log(classes)           "entropy", H the entropy
    leaves at the first t with c_t > threshold, at T at the latest; the prediction is argmax S_t

The sum, not the mean: confidence grows with t even where all steps say the same.

``exits``, ``curve`` and ``choose`` apply the rule to stored outputs, as the published code does; ``exit_early`` runs a
network step by step and computes nothing more of the samples that have left. SEENN-II, a policy network, is not here.

Source: Li et al., "SEENN: Towards Temporal Spiking Early-Exit Neural Networks", NeurIPS 2023, and its published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from ..nn import carried
from ..spec.arguments import number, positive

__all__ = ["GRID", "Exits", "Point", "choose", "curve", "exit_early", "exits"]

# From the first step for all (0) to all steps for all (1).
GRID = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 1.0)
MEASURES = ("confidence", "entropy")


class Exits(NamedTuple):
    """Where samples leave, and as what."""

    steps: torch.Tensor  # [N], int64: 1 to T, at which the sample leaves
    predictions: torch.Tensor  # [N], int64: the class that it leaves as


class Point(NamedTuple):
    """What a threshold costs and gives."""

    threshold: float
    steps: float  # mean over the samples
    accuracy: float  # a fraction


def exits(outputs: torch.Tensor, threshold: float, measure: str = "confidence") -> Exits:
    """Where samples leave, and as what.

    Args:
        outputs: [T, N, classes]; summed in float64.
        threshold: to be exceeded; from 1 on nobody leaves before T.
        measure: "confidence" or "entropy".
    """
    sums = _sums(outputs)
    return _exits(_confidence(sums, measure), sums.argmax(2), number("threshold", threshold))


def curve(
    outputs: torch.Tensor, y: torch.Tensor, thresholds: Sequence[float] = GRID, measure: str = "confidence"
) -> list[Point]:
    """Mean T and accuracy at every threshold.

    Args:
        outputs: [T, N, classes].
        y: [N], int64 classes.
        thresholds: of the measure, see ``exits``.
        measure: "confidence" or "entropy".
    """
    return [point for point, _ in _judged(outputs, y, thresholds, measure)]


def choose(
    outputs: torch.Tensor,
    y: torch.Tensor,
    steps: float | None = None,
    thresholds: Sequence[float] = GRID,
    measure: str = "confidence",
) -> Point:
    """The threshold with the least mean T that costs no accuracy, or with ``steps`` the most accurate one with at most
    this mean T.

    Costs no accuracy: of the samples about which only one of early exit and all T steps is right, l and w of them,
    ``l - w <= sqrt(l + w)``, one standard error of the difference.

    Args:
        outputs, y: of samples held out, neither trained on nor those on which the choice is judged.
        steps: None, or the mean T wanted.
        thresholds, measure: those of ``curve``; all steps for all is always among the choices.

    Raises: ValueError if no threshold has a mean T of at most ``steps``.
    """
    *judged, (full, right) = _judged(outputs, y, [*thresholds, 1.0], measure)  # from 1 on, all steps for all
    if steps is None:
        good = [full]
        for point, early in judged:
            lost, won = (right & ~early).sum().item(), (early & ~right).sum().item()
            if lost - won <= math.sqrt(lost + won):
                good.append(point)
        return min(good, key=lambda point: (point.steps, -point.accuracy))
    points = [full, *(point for point, _ in judged)]
    within = [point for point in points if point.steps <= number("steps", steps)]
    if not within:
        raise ValueError(f"steps must be at least {min(p.steps for p in points):g} with these thresholds, got {steps}")
    return max(within, key=lambda point: (point.accuracy, -point.steps))


def _judged(outputs, y, thresholds, measure) -> list[tuple[Point, torch.Tensor]]:
    """The point of every threshold, and about which samples it is right: bool [N]."""
    sums = _sums(outputs)
    if y.shape != sums.shape[1:2]:
        raise ValueError(f"y must hold a class for each of the {sums.shape[1]} samples, got shape {tuple(y.shape)}")
    confidence, predictions = _confidence(sums, measure), sums.argmax(2)
    judged = []
    for threshold in thresholds:
        found = _exits(confidence, predictions, number("thresholds", threshold))
        right = found.predictions == y.to(outputs.device)
        point = Point(float(threshold), found.steps.double().mean().item(), right.double().mean().item())
        judged.append((point, right))
    return judged


@torch.no_grad()
def exit_early(
    model: nn.Module,
    x: torch.Tensor,
    threshold: float,
    steps: int | None = None,
    batch: int = 256,
    measure: str = "confidence",
) -> Exits:
    """The same by a network that stops: at step t it computes the samples that are still in it, and no others.

    Args:
        model: in eval mode; takes frames [T, N, ...] to [T, N, classes], with neurons that ``nn.carried`` knows.
        x: static images [N, C, H, W], shown up to ``steps`` times, or frames [T, N, ...].
        steps: T. Default: the model's ``steps``, or the number of frames.
        batch: samples that start together, on the device of the model's parameters.

    Returns: on the CPU. Equal to ``exits`` of the outputs of all steps, with the reservation of ``nn.carried``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or the model cannot be run step by step.
    """
    threshold = number("threshold", threshold)
    static = x.dim() == 4
    frames = x.unsqueeze(0) if static else x
    steps = positive("steps", (getattr(model, "steps", None) if static else len(x)) if steps is None else steps)
    if not static and steps > len(x):
        raise ValueError(f"steps must be at most the number of frames, {len(x)}, got {steps}")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model must be in eval mode, got {training[0]} in training mode: call model.eval()")
    device = next(model.parameters()).device
    parts = [
        _exit_early(model, part.to(device), threshold, steps, measure)
        for part in frames.split(positive("batch", batch), dim=1)
    ]
    return Exits(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))


def _exit_early(model, frames, threshold, steps, measure) -> Exits:
    samples = frames.shape[1]
    left = torch.arange(samples, device=frames.device)
    at, predictions = torch.full_like(left, steps), torch.empty_like(left)
    sums = 0
    with carried(model) as keep:
        for t in range(steps):
            frame = frames[t : t + 1] if len(frames) > 1 else frames
            outputs = model(frame if len(left) == samples else frame[:, left])
            if outputs.dim() != 3 or outputs.shape[:2] != (1, len(left)):
                raise ValueError(
                    f"model must give [1, {len(left)}, classes] for one step of {len(left)} samples, got "
                    f"{tuple(outputs.shape)}"
                )
            sums = sums + outputs[0].double()
            predictions[left] = sums.argmax(1)
            stay = ~(_confidence(sums, measure) > threshold)
            if stay.all():
                continue
            at[left[~stay]] = t + 1
            left, sums = left[stay], sums[stay]
            if not len(left):
                break
            keep(stay)
    return Exits(at, predictions)


def _sums(outputs: torch.Tensor) -> torch.Tensor:
    """S_t, [T, N, classes]; added up as ``exit_early`` does."""
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        raise TypeError(f"outputs must be a floating-point tensor, got {getattr(outputs, 'dtype', type(outputs))}")
    if outputs.dim() != 3 or outputs.numel() == 0:
        raise ValueError(f"outputs must be [T, N, classes], none of them 0, got shape {tuple(outputs.shape)}")
    return torch.stack([*accumulate(outputs.double())])


def _confidence(sums: torch.Tensor, measure: str) -> torch.Tensor:
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(map(repr, MEASURES))}, got {measure!r}")
    if measure == "confidence":
        return sums.softmax(-1).amax(-1)
    logs = sums.log_softmax(-1)
    return 1 + (logs.exp() * logs).sum(-1) / math.log(sums.shape[-1])


def _exits(confidence: torch.Tensor, predictions: torch.Tensor, threshold: float) -> Exits:
    leaves = confidence > threshold
    leaves[-1] = True
    first = leaves.int().argmax(0)
    return Exits(first + 1, predictions.gather(0, first.unsqueeze(0))[0])
