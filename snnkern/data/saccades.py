"""scikit-learn's digits as the events of a camera that moves before them. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..spec.arguments import number
from .base import Data, Recorded
from .events import check, to_frames
from .scikit import pixels, split

DURATION = 100_000  # of a saccade, in microseconds
FINE = 25  # positions looked at for every pixel of the way up or down: brightness changes by at most 1.5 / 25 between


class Events(NamedTuple):
    """In the order of time: arrays [N] int64, as ``events.to_frames`` takes them."""

    t: np.ndarray  # microseconds
    x: np.ndarray  # column
    y: np.ndarray  # row
    on: np.ndarray  # 1: the pixel became brighter, 0: darker


def saccades(images: torch.Tensor, threshold: float = 0.15) -> list[Events]:
    """What an event camera sees of every image while it moves along a triangle, as in N-MNIST.

    The image goes down and half as far to the right, up and right again, then back to the left: three straight ways of
    100 ms, by a quarter of its height, which N-MNIST has too (7 of 28 pixels). A pixel of the sensor, which is larger
    than the image by that, sees brightness interpolated between the image's pixels, 0 beside it, and gives an event
    where it differs from that of the pixel's last event, or of the start, by ``threshold``. Nothing is random.

    Args:
        images: [N, H, W] in [0, 1], H and W at least 4.
        threshold: a change in brightness, 0.1 to 1.

    Returns: N ``Events``, on a sensor of H + H // 4 rows and W + H // 4 columns.

    Source: Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades",
    Frontiers in Neuroscience 2015 (the ways).
    """
    if (
        images.dim() != 3
        or min(images.shape[1:]) < 4
        or not (images.numel() and 0 <= images.min() <= images.max() <= 1)
    ):
        raise ValueError(f"images must be [N, H, W] in [0, 1] with H and W at least 4, got shape {tuple(images.shape)}")
    if not 0.1 <= number("threshold", threshold) <= 1:
        raise ValueError(f"threshold must be in [0.1, 1], got {threshold}")
    images, way = images.double(), images.shape[1] // 4
    steps = FINE * way

    def seen(position: float) -> torch.Tensor:
        """Brightness [N, H + way, W + way] at ``position`` in 0 to 3 saccades."""
        down = way * (1 - abs(1 - position)) if position < 2 else 0.0
        right = way * (position / 2 if position < 2 else 3 - position)
        rows, columns = (
            _shifted(size, size + way, by) for size, by in zip(images.shape[1:], (down, right), strict=True)
        )
        return rows @ images @ columns.T

    found, before = [], seen(0)
    level = before.clone()
    for step in range(1, 3 * steps + 1):
        now = seen(step / steps)
        sign = (now - level).sign() * ((now - level).abs() >= threshold)
        at = n, y, x = sign.nonzero(as_tuple=True)
        part = (level[at] + sign[at] * threshold - before[at]) / (now[at] - before[at])
        t = ((step - 1 + part) * (DURATION / steps)).long()
        found.append(torch.stack((n, t, x, y, (sign[at] > 0).long())))
        level += threshold * sign
        before = now
    n, *columns = torch.cat(found, 1).numpy()
    order = np.lexsort((columns[0], n))
    ends = np.bincount(n, minlength=len(images)).cumsum()[:-1]
    return [Events(*each) for each in zip(*(np.split(column[order], ends) for column in columns), strict=True)]


def _shifted(size: int, sensor: int, by: float) -> torch.Tensor:
    """[sensor, size]: how much of each of an image's pixels a pixel of the sensor sees along one axis."""
    away = torch.arange(sensor).double()[:, None] - by - torch.arange(size).double()
    return (1 - away.abs()).clamp(min=0)


def recorded_digits(
    seed: int = 0, train: int = 600, threshold: float = 0.15
) -> tuple[tuple[list[Events], torch.Tensor], tuple[list[Events], torch.Tensor]]:
    """``saccades`` of the digits without noise, on 10 x 10 pixels, and y [N] int64: for training, and for testing.

    The images are those of ``digits`` with the same ``seed`` and ``train``, in the same order.
    """
    x, y, _ = pixels(seed, train)
    training, test = ((saccades(x.squeeze(1), threshold), y) for x, y in split(x, y, train))
    return training, test


def digits_events(
    root: Path | None = None,
    seed: int = 0,
    *,
    frames: int = 10,
    by: str = "time",
    values: str = "counts",
    train: int = 600,
    threshold: float = 0.15,
) -> Data:
    """``recorded_digits`` as frames [T, 2, 10, 10]; see ``base.Recorded``. ``root`` is not needed.

    ``frames``, ``by`` and ``values`` as of ``dvs_cifar10``, ``train`` as of ``digits``, ``threshold`` as of
    ``saccades``.
    """
    check(frames, by, values)

    def part(events: list[Events], y: torch.Tensor) -> Recorded:
        x = torch.stack([to_frames(*each, frames, by, 10) for each in events])
        return Recorded(x.clamp(max=1) if values == "binary" else x, y, events)

    training, test = (part(*each) for each in recorded_digits(seed, train, threshold))
    return Data(training, test, 10, (frames, 2, 10, 10), True, training)
