"""Time series of the UCR and UEA archives, from .ts files; those of the aeon package are at hand without a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset

from .base import Data


class Series(NamedTuple):
    """Of a file: the series, each [length, channels] float32, their classes as words, and those that the file names."""

    x: list[torch.Tensor]
    y: list[str]
    classes: list[str]


def read(file: Path) -> Series:
    """A .ts file: after ``@data`` a line for each series, channels and at last the class with ``:`` between them.

    Raises: ValueError where a line is no series of numbers, its channels differ in length or number, or its class is
        not one that the file names.
    """
    header, _, lines = file.read_text().partition("@data\n")
    classes = [
        word for line in header.splitlines() if line.startswith("@classLabel true ") for word in line.split()[2:]
    ]
    x, y = [], []
    for number, line in enumerate(filter(str.strip, lines.splitlines()), 1):
        *channels, label = line.strip().split(":")
        values = [[float(value) for value in channel.split(",")] for channel in channels]
        lengths = sorted({len(channel) for channel in values})
        if len(lengths) != 1 or (x and len(values) != x[0].shape[1]):
            wanted = "one length, and as many as the first" if x else "one length"
            raise ValueError(f"series {number} must have channels of {wanted}, got {len(values)} of {lengths} steps")
        values = torch.tensor(values)
        if not values.isfinite().all():
            raise ValueError(f"series {number} has a value that is not finite")
        if label not in classes:
            raise ValueError(f"series {number} is of class {label!r}, not one of {', '.join(classes) or 'none'}")
        x.append(values.T)
        y.append(label)
    if not x:
        raise ValueError("no series")
    return Series(x, y, classes)


def time_series(name: str, root: Path | None = None, seed: int = 0) -> Data:
    """The data set ``name`` of the archives, as its files split it: [T, channels] float32.

    Every channel is standardised with its mean and standard deviation in the training series. Series that are shorter
    than the longest one of both files are followed by zeros, which is that mean.

    Args:
        name: of the folder and the files: ``ACSF1``, power that appliances draw, 10 classes, T = 1460;
            ``JapaneseVowels``, 12 coefficients of speech, 9 speakers, 7 to 29 steps; ``BasicMotions``, accelerometer
            and gyroscope, 6 channels, 4 activities, T = 100.
        root: the folder that holds ``NAME/NAME_TRAIN.ts`` and ``NAME/NAME_TEST.ts``, as timeseriesclassification.com
            has them; None: that of the aeon package. It is not imported: what aeon itself needs need not be there.
    """
    if root is None:
        package = find_spec("aeon")
        if package is None:
            raise ModuleNotFoundError(f"{name} needs the files of aeon: pip install --no-deps aeon")
        root = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    parts = []
    for part in ("TRAIN", "TEST"):
        file = root / name / f"{name}_{part}.ts"
        try:
            parts.append(read(file))
            if len({(held.x[0].shape[1], *held.classes) for held in parts}) > 1:
                raise ValueError("other channels or classes than those of training")
        except (OSError, ValueError) as error:  # missing; cut off, other contents
            reason = error if file.exists() else "missing"
            raise FileNotFoundError(
                f"{name} is not in {root}, or not whole ({file.name}: {reason}). This gets it, where root is left out:"
                "\n    pip install --no-deps --force-reinstall aeon"
            ) from error
    train = parts[0]
    seen = torch.cat(train.x)
    x = pad_sequence([(each - seen.mean(0)) / seen.std(0) for held in parts for each in held.x], batch_first=True)
    y = torch.tensor([train.classes.index(label) for held in parts for label in held.y])
    training, testing = (TensorDataset(x[part], y[part]) for part in (slice(len(train.y)), slice(len(train.y), None)))
    return Data(training, testing, len(train.classes), tuple(x.shape[1:]), True, training)
