"""Spoken words as the spikes of 700 channels: the Spiking Heidelberg Digits and the Spiking Speech Commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..spec.arguments import number, positive
from .base import ROOT, Data, DataError, in_a_line, one_of

CLASSES = {"SHD": 20, "SSC": 35}
CHANNELS = 700


def to_steps(times: torch.Tensor, units: torch.Tensor, steps: int, channels: int, window: float) -> torch.Tensor:
    """Counts the spikes [N] in each of ``steps`` equal parts of the first ``window`` seconds: [steps, channels].

    Channel c sums the ``700 / channels`` neighbours from ``units`` c 700 / channels up. ``times`` are in seconds,
    float64; those beyond the window do not count.
    """
    step = (times * (steps / window)).floor().long()
    units = units.long() // (CHANNELS // channels)
    place = (step * channels + units)[(step >= 0) & (step < steps)]
    return place.bincount(minlength=steps * channels).float().view(steps, channels)


@dataclass(frozen=True, eq=False)
class Words(Dataset):
    """(counts [T, channels] float32, class) of every word of a file, read from it each time."""

    file: Path
    size: int  # of the file, in bytes
    targets: list[int]
    steps: int
    channels: int
    values: str
    window: float

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import h5py

        try:
            with h5py.File(self.file) as held:
                times, units = (held[f"spikes/{name}"][index] for name in ("times", "units"))
            if (size := self.file.stat().st_size) != self.size:  # HDF5 may give anything in place of what is gone
                raise OSError(f"the file had {self.size} bytes and has {size}")
        except Exception as error:  # h5py has its own kinds
            raise DataError(f"{self.file}: word {index} cannot be read: {in_a_line(error)}") from error
        if len(times) != len(units) or (units >= CHANNELS).any():
            raise DataError(f"{self.file}: word {index} is not one of {CHANNELS} channels")
        times, units = torch.from_numpy(times.astype("float64")), torch.from_numpy(units.astype("int64"))
        counts = to_steps(times, units, self.steps, self.channels, self.window)
        return (counts.clamp(max=1) if self.values == "binary" else counts), self.targets[index]


def spoken(
    name: str,
    root: Path | None = None,
    seed: int = 0,
    *,
    steps: int = 100,
    channels: int = 70,
    values: str = "counts",
    window: float = 1.0,
) -> Data:
    """The Spiking Heidelberg Digits, 20 classes, or the Spiking Speech Commands, 35 (Cramer et al. 2022).

    The speech commands' training part is trained on and their test part tested on; their validation part is left out.
    MTT (A.12) gives 70 channels, but neither how they come from 700 nor the steps: sums of tens, the number of steps
    and counts are choices.

    Args:
        name: ``"SHD"`` or ``"SSC"``.
        root: the folder that holds ``SHD/shd_train.h5`` or ``SSC/ssc_train.h5`` and so on, as tonic unpacks them.
        steps: T.
        channels: a divisor of 700: neighbouring channels are summed.
        values: ``"counts"``, spikes per step and channel, or ``"binary"``, whether there was one.
        window: seconds from the start that the steps share in equal parts; later spikes are left out. For SHD it is
            1.4 unless given, as its authors' tutorial bins it; a recording of the speech commands lasts 1 s.
    """
    positive("steps", steps)
    if CHANNELS % positive("channels", channels):
        raise ValueError(f"channels must divide {CHANNELS}, got {channels}")
    one_of("values", values, ("counts", "binary"))
    if number("window", window) <= 0:
        raise ValueError(f"window must be positive, got {window}")
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs h5py ({error}): pip install 'snnkern[events]'") from error
    root, parts = root or ROOT, []
    for part in ("train", "test"):
        file = root / name / f"{name.lower()}_{part}.h5"
        try:
            with h5py.File(file) as held:
                targets = held["labels"][:].tolist()
                words = {len(held[f"spikes/{each}"]) for each in ("times", "units")}
            if words != {len(targets)} or not set(targets) <= set(range(CLASSES[name])):
                raise ValueError(f"{len(targets)} labels up to {max(targets, default=0)}, {max(words)} words")
        except (OSError, KeyError, ValueError) as error:  # missing, not HDF5 or cut off; other contents
            reason = error if file.exists() else "missing"
            choice = "split=s) for s in ('train', 'test')" if name == "SSC" else "train=t) for t in (True, False)"
            command = f"from tonic.datasets import {name} as C; [C({str(root)!r}, {choice}]"
            raise FileNotFoundError(
                f"{name} is not in {root}, or not whole ({file.name}: {reason}). This gets it:"
                f'\n    python -c "{command}"'
            ) from error
        parts.append(Words(file, file.stat().st_size, targets, steps, channels, values, float(window)))
    return Data(*parts, CLASSES[name], (steps, channels), True, parts[0])
