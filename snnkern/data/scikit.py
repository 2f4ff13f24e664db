"""scikit-learn's digits."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ..spec.arguments import positive
from .base import Data, Recorded

TEST = 597  # the last of the 1797 images; the other 1200 are there for training
DURATION = 100_000  # of a digit in events, in microseconds


def digits(
    seed: int = 0, noise: float = 0.4, train: int = 600
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """scikit-learn's 8x8 handwritten digits, made hard enough to tell two methods apart. Nothing is downloaded.

    Pixels are scaled to [0, 1], the images permuted, Gaussian noise added once, and all standardised with the mean and
    standard deviation of the training pixels. Without noise every method reaches 98 to 99 %.

    Args:
        seed: of the permutation, thus of the split, and of the noise.
        noise: standard deviation of the pixel noise.
        train: number of training images, 1 to 1200. The test set is always the same 597 images of the permutation.

    Returns:
        (x, y) for training and (x, y) for testing: x [N, 1, 8, 8] float32, y [N] int64.
    """
    if not isinstance(noise, (int, float)) or not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be a finite number, not negative, got {noise!r}")
    x, y, generator = pixels(seed, train)
    x += noise * torch.randn(x.shape, generator=generator)
    return split((x - x[:train].mean()) / x[:train].std(), y, train)


def pixels(seed: int, train: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """All images [1797, 1, 8, 8] in [0, 1] and y, permuted, and the generator that did it."""
    images, labels = _read()
    available = len(labels) - TEST
    if not isinstance(train, int) or not 1 <= train <= available:
        raise ValueError(f"train must be a whole number between 1 and {available}, got {train!r}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return images[order], labels[order], generator


@cache
def _read() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install 'snnkern[train]'") from error
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


def split(x, y, train: int):
    """The first ``train`` samples and the last ``TEST``."""
    return (x[:train], y[:train]), (x[-TEST:], y[-TEST:])


def load_digits_data(root: Path | None = None, seed: int = 0, *, noise: float = 0.4, train: int = 600) -> Data:
    """``digits`` as data sets. ``root`` is not needed: the images come with scikit-learn."""
    training, test = (TensorDataset(*part) for part in digits(seed, noise, train))
    return Data(training, test, 10, tuple(training[0][0].shape), False, training)


def digits_spikes(
    root: Path | None = None, seed: int = 0, *, frames: int = 16, events: int = 8, train: int = 600
) -> Data:
    """The digits without noise, intensity as the number of events: frames [frames, 1, 8, 8] of counts, and the events.

    A pixel of the greatest intensity gives ``events`` of them, others in proportion, rounded, all at random times
    within 100 ms: about 160 a digit. They are drawn once. The images are those of ``digits`` with the same ``seed`` and
    ``train``; ``root`` is not needed. ``test.recording(i)`` gives the events that frames i count; see ``Recorded``.

    Args:
        frames: T, the number of frames, of equal duration.
        events: of a pixel, at the most.
        train: see ``digits``.
    """
    positive("frames", frames)
    positive("events", events)
    x, y, generator = pixels(seed, train)
    counts = (x * events + 0.5).floor().long()
    n, _, row, column = torch.nonzero(counts, as_tuple=True)
    each = counts[counts > 0]
    n, row, column = (index.repeat_interleave(each) for index in (n, row, column))
    t = torch.randint(DURATION, n.shape, generator=generator)
    place = ((n * frames + t * frames // DURATION) * 8 + row) * 8 + column
    counted = place.bincount(minlength=len(x) * frames * 64).float().view(len(x), frames, 1, 8, 8)
    order = np.lexsort((t.numpy(), n.numpy()))
    ends = counts.sum((1, 2, 3)).cumsum(0)[:-1]
    arrays = (np.split(values.numpy()[order], ends) for values in (t, column, row, torch.zeros_like(t)))
    recordings = [*zip(*arrays, strict=True)]
    training, test = (
        Recorded(*part, held)
        for part, held in zip(split(counted, y, train), (recordings[:train], recordings[-TEST:]), strict=True)
    )
    return Data(training, test, 10, (frames, 1, 8, 8), True, training)
