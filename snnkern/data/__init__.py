"""Data sets by name, ready for training, each with the augmentation that its papers use."""

from __future__ import annotations

import os
from functools import partial
from inspect import Parameter, signature
from pathlib import Path

from .audio import spoken
from .base import Data
from .events import dvs_cifar10, n_caltech101, n_mnist
from .images import cifar, imagenet, mnist
from .saccades import digits_events
from .scikit import digits, digits_spikes, load_digits_data
from .sequences import sequential_digits, sequential_mnist
from .series import time_series

__all__ = ["SETS", "Data", "digits", "load"]

SETS = {
    "digits": load_digits_data,
    "mnist": mnist,
    "cifar10": partial(cifar, "cifar10"),
    "cifar100": partial(cifar, "cifar100"),
    "imagenet": imagenet,
    "dvs-cifar10": dvs_cifar10,
    "n-mnist": n_mnist,
    "n-caltech101": n_caltech101,
    "digits-events": digits_events,
    "digits-spikes": digits_spikes,
    "sequential-mnist": sequential_mnist,
    "sequential-digits": sequential_digits,
    "shd": partial(spoken, "SHD", window=1.4),
    "ssc": partial(spoken, "SSC"),
    "acsf1": partial(time_series, "ACSF1"),
    "japanese-vowels": partial(time_series, "JapaneseVowels"),
    "basic-motions": partial(time_series, "BasicMotions"),
}


def load(name: str, root: str | os.PathLike | None = None, seed: int = 0, **options) -> Data:
    """The data set ``name``. Nothing is downloaded: where the files are missing, the error says how to get them.

    Args:
        name: a key of ``SETS``.
        root: the folder with the files, as torchvision or tonic lay them; None: ``data``. The digits come with
            scikit-learn and need none; for time series None is the folder of the aeon package.
        seed: of a data set that is drawn: those of the digits. The others have their fixed split.
        options: those of the data set, below; ``augment`` is about what is trained on alone.

    Options, by data set:

    - digits: ``noise`` (0.4), ``train`` (600): see ``digits``.
    - mnist: none: see ``images.mnist``.
    - cifar10, cifar100: ``augment`` ("crop-flip", "autoaugment-cutout", "none"): see ``images.cifar``.
    - imagenet: ``augment`` ("crop-flip", "none"): see ``images.imagenet``.
    - dvs-cifar10: ``frames`` (10), ``by`` ("time", "count"), ``values`` ("counts", "binary"), ``size`` (48),
      ``resize`` ("bilinear", "nearest"), ``augment`` ("flip-roll", "nda", "none"): see ``events.dvs_cifar10``.
    - n-mnist: ``frames``, ``by``, ``values``: see ``events.n_mnist``.
    - n-caltech101: ``frames``, ``by``, ``values``, ``size``, ``resize``, ``augment`` ("flip-roll-reverse",
      "flip-roll", "none"): see ``events.n_caltech101``.
    - digits-events: ``frames``, ``by``, ``values``, ``train`` (600), ``threshold`` (0.15): see
      ``saccades.digits_events``.
    - digits-spikes: ``frames`` (16), ``events`` (8), ``train`` (600): see ``scikit.digits_spikes``.
    - sequential-mnist: ``by`` ("pixel", "row"): see ``sequences.sequential_mnist``.
    - sequential-digits: ``by``, ``noise`` (0), ``train`` (600): see ``sequences.sequential_digits``.
    - shd, ssc: ``steps`` (100), ``channels`` (70), ``values`` ("counts", "binary"), ``window`` (1.4; 1.0): see
      ``audio.spoken``.
    - acsf1, japanese-vowels, basic-motions: none: see ``series.time_series``.

    Raises:
        ValueError: there is no such name or option.
        FileNotFoundError: the data set is missing.
        ModuleNotFoundError: the package that reads it is.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}, got {name!r}")
    parameters = signature(SETS[name]).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(allowed) or 'none'}")
    return SETS[name](None if root is None else Path(root).expanduser(), seed, **options)
