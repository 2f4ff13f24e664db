"""What every data set gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, TensorDataset

ROOT = Path("data")  # where data sets are looked for when no folder is named


class Data(NamedTuple):
    """A data set, split: ``train`` and ``test`` give (x, y) by index, y a whole number in [0, classes).

    x is float32, of the shape ``shape``: an image [C, H, W], or with ``events`` a recording's frames
    [T, C, H, W], or the steps of a sequence [T, inputs].
    Augmentation is inside ``train`` and draws from torch's global generator alone: its state settles what comes out.
    ``plain`` has the samples of ``train`` as they are, prepared like those of ``test``. Where a data set has a method
    ``recording(index)``, that gives the events that are in the frames of this sample; see ``Recorded``.
    """

    train: Dataset
    test: Dataset
    classes: int
    shape: tuple[int, ...]
    events: bool
    plain: Dataset


class Recorded(TensorDataset):
    """(frames [N, T, C, H, W], classes [N]) in memory, and the events that the frames count."""

    def __init__(self, x, y, recordings: Sequence[tuple[np.ndarray, ...]]) -> None:
        super().__init__(x, y)
        self.recordings = recordings

    def recording(self, index: int) -> tuple[np.ndarray, ...]:
        """(t, x, y, p), arrays of equal length in the order of time: time, column, row, and channel (polarity)."""
        return self.recordings[index]


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


class DataError(ValueError):
    """A sample cannot be read; the message names its file and says why, in one line."""


def one_of(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
