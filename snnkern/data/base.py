"""What every data set gives."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

ROOT = Path("data")  # where data sets are looked for when no folder is named


class Data(NamedTuple):
    """A data set, split: ``train`` and ``test`` give (x, y) by index, y a whole number in [0, classes).

    x is float32, of the shape ``shape``: an image [C, H, W], or with ``events`` a recording's frames
    [T, C, H, W], or the steps of a sequence [T, inputs].
    Augmentation is inside ``train`` and draws from torch's global generator alone: its state settles what comes out.
    ``plain`` has the samples of ``train`` as they are, prepared like those of ``test``.
    """

    train: Dataset
    test: Dataset
    classes: int
    shape: tuple[int, ...]
    events: bool
    plain: Dataset


def one_of(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
