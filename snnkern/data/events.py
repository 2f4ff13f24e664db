"""DVS-CIFAR10: recordings of an event camera, read by tonic, made into frames."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..spec.arguments import positive
from .base import ROOT, Data, one_of

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDINGS, TRAINING = 1000, 900  # of every class
SENSOR = 128  # pixels, both ways


def to_frames(t, x, y, on, frames: int, by: str = "time", sensor: int = SENSOR) -> torch.Tensor:
    """Counts the events of each of ``frames`` blocks, per polarity and pixel.

    Args:
        t, x, y, on: arrays [N], in order: time (any unit), column, row, and whether the pixel became brighter.
        by: ``"time"``: blocks of equal duration, from the first event to the last; ``"count"``: of equally many
            events, or one more where N is not divisible (TET's code leaves those last events out).

    Returns:
        [frames, 2, sensor, sensor] float32; channel 0 counts the events of pixels that became darker.
    """
    t, x, y, on = (torch.from_numpy(column.astype("int64")) for column in (t, x, y, on))
    if x.max() >= sensor or y.max() >= sensor:
        raise ValueError(f"its events reach to column {int(x.max())} and row {int(y.max())}")
    if by == "time":
        block = (t - t.min()) * frames // (t.max() - t.min() + 1)
    else:
        block = torch.arange(len(t)) * frames // len(t)
    place = ((block * 2 + on) * sensor + y) * sensor + x
    return place.bincount(minlength=frames * 2 * sensor * sensor).float().view(frames, 2, sensor, sensor)


def flip_roll(frames: torch.Tensor) -> torch.Tensor:
    """Mirrored left to right with probability 1/2; then rolled by up to 5 pixels each way. All frames alike."""
    return roll(flip(frames))


def nda(frames: torch.Tensor) -> torch.Tensor:
    """Mirrored with probability 1/2; then either rolled by up to 5 pixels, or turned or sheared by up to 30 degrees."""
    return (roll, turn, shear)[int(torch.randint(3, ()))](flip(frames))


def flip(frames):
    return frames.flip(-1) if torch.rand(()) < 0.5 else frames


def roll(frames):
    return frames.roll(torch.randint(-5, 6, (2,)).tolist(), (-2, -1))


def turn(frames):
    angle = angle_within(30)
    return warp(frames, [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])


def shear(frames):
    return warp(frames, [[1, math.tan(angle_within(30)), 0], [0, 1, 0]])


def angle_within(degrees: float) -> float:
    return math.radians(degrees) * (2 * float(torch.rand(())) - 1)


def warp(frames, matrix):
    """Each pixel takes the value of the one nearest to where ``matrix`` puts it; 0 outside."""
    grid = F.affine_grid(torch.tensor([matrix]), [1, *frames.shape[1:]], align_corners=False)
    return F.grid_sample(frames, grid.expand(len(frames), -1, -1, -1), mode="nearest", align_corners=False)


AUGMENTATIONS = {"flip-roll": flip_roll, "nda": nda, "none": None}


@dataclass(frozen=True, eq=False)
class Recordings(Dataset):
    """(frames [T, 2, size, size] float32, class) of every recording, read from its file each time."""

    files: list[Path]
    targets: list[int]
    frames: int
    by: str
    values: str
    size: int
    resize: str
    augment: Callable[[torch.Tensor], torch.Tensor] | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from tonic.io import read_aedat4

        try:
            events = read_aedat4(str(self.files[index]))
            columns = (events[name] for name in events.dtype.names)  # time, column, row, polarity, whatever their names
            frames = to_frames(*columns, self.frames, self.by)
        except Exception as error:  # each layer has its own kind
            problem = f"{self.files[index]} is not a recording of {SENSOR} x {SENSOR} pixels"
            raise ValueError(f"{problem}: {error}") from error
        if self.values == "binary":
            frames = frames.clamp(max=1)
        if self.size != SENSOR:
            smooth = self.resize == "bilinear"
            frames = F.interpolate(frames, (self.size, self.size), mode=self.resize, antialias=smooth)
        return (frames if self.augment is None else self.augment(frames)), self.targets[index]


def dvs_cifar10(
    root: Path | None = None,
    seed: int = 0,
    *,
    frames: int = 10,
    by: str = "time",
    values: str = "counts",
    size: int = 48,
    resize: str = "bilinear",
    augment: str = "flip-roll",
) -> Data:
    """DVS-CIFAR10 (Li et al. 2017): of every class, recordings 0 to 899 for training and 900 to 999 for testing.

    TET's text (A.1) and its public code differ. The defaults follow the text; ``by="count", values="binary"`` follows
    the code. Two more ways of the code are not followed: its frames are [x, y], hence its horizontal flip mirrors the
    other axis, and they pass through 8-bit images, which rounds what the scaling gives. Here they are [y, x].

    Args:
        root: the folder that holds ``CIFAR10DVS``, as tonic unpacks it: ``airplane/cifar10_airplane_0.aedat4`` and
            so on. The number in a name decides the split; tonic's own list of the files is in no order.
        frames: T, the number of frames of a recording.
        by: ``"time"`` (the text) or ``"count"`` (the code): what the blocks that become frames have in common.
        values: ``"counts"``, events per pixel, which the text accumulates; ``"binary"``, whether there was an event:
            the code means to count and scale to at most 1, but numpy's ``+=`` takes repeated indices once. Dspike's
            first layer (section 5) also takes frames of 0 and 1.
        size: height and width that the 128 x 128 pixels are scaled to.
        resize: ``"bilinear"`` with antialiasing (TET's code), which makes fractions of 0 and 1 too; or ``"nearest"``
            (NDA's code, by Dspike's first author), which keeps them, and of 128 x 128 pixels only those it meets.
        augment: ``"flip-roll"`` (TET, A.1; Dspike, 5.2), ``"nda"`` (Li et al. 2022: the roll, rotation and shear that
            its public code chooses from, after the flip that SEENN's has), or ``"none"``; the same for all frames.
    """
    positive("frames", frames)
    positive("size", size)
    one_of("by", by, ("time", "count"))
    one_of("values", values, ("counts", "binary"))
    one_of("resize", resize, ("bilinear", "nearest"))
    one_of("augment", augment, AUGMENTATIONS)
    try:
        import aedat  # noqa: F401  tonic reads with it, but does not declare it
        from tonic.io import read_aedat4  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"DVS-CIFAR10 needs tonic and aedat ({error}): pip install 'snnkern[events]'"
        ) from error
    files = recordings(root or ROOT)

    def part(numbers, augment):
        chosen = [numbered[number] for numbered in files for number in numbers]
        targets = [target for target in range(len(files)) for _ in numbers]
        return Recordings(chosen, targets, frames, by, values, size, resize, augment)

    train, plain = part(range(TRAINING), AUGMENTATIONS[augment]), part(range(TRAINING), None)
    test = part(range(TRAINING, RECORDINGS), None)
    return Data(train, test, len(files), (frames, 2, size, size), True, plain)


def recordings(root: Path) -> list[dict[int, Path]]:
    """The file of every recording, by class and by the number in its name; FileNotFoundError unless all are there."""
    found = {name: {} for name in CLASSES}
    for file in (root / "CIFAR10DVS").rglob("*.aedat4"):
        number = re.search(r"\d+$", file.stem)
        if number and file.parent.name in found:
            found[file.parent.name][int(number[0])] = file
    for name, numbered in found.items():
        if numbered.keys() != set(range(RECORDINGS)):
            command = f"from tonic.datasets import CIFAR10DVS as C; C({str(root)!r})"
            raise FileNotFoundError(
                f"DVS-CIFAR10 is not whole in {root}: CIFAR10DVS/{name} has {len(numbered)} recordings, not those "
                f'numbered 0 to {RECORDINGS - 1}. This gets them:\n    python -c "{command}"'
            )
    return list(found.values())
