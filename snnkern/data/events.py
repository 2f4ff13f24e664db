"""DVS-CIFAR10, N-MNIST, N-Caltech101: recordings of an event camera, read by tonic, made into frames."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..spec.arguments import positive
from .base import ROOT, Data, DataError, in_a_line, one_of

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDINGS, TRAINING = 1000, 900  # of every class
SENSOR = 128  # pixels, both ways
NMNIST = {"Train": 60000, "Test": 10000}  # recordings in each folder
NCALTECH101 = 101, 8709  # classes, recordings


def to_frames(t, x, y, on, frames: int, by: str = "time", sensor: int | tuple[int, int] = SENSOR) -> torch.Tensor:
    """Counts the events of each of ``frames`` blocks, per polarity and pixel.

    Args:
        t, x, y, on: arrays [N], in order: time (any unit), column, row, and whether the pixel became brighter.
        by: ``"time"``: blocks of equal duration, from the first event to the last; ``"count"``: of equally many
            events, or one more where N is not divisible (TET's code leaves those last events out).
        sensor: height and width in pixels; one number for both.

    Returns:
        [frames, 2, H, W] float32; channel 0 counts the events of pixels that became darker.
    """
    height, width = (sensor, sensor) if isinstance(sensor, int) else sensor
    t, x, y, on = (torch.from_numpy(column.astype("int64")) for column in (t, x, y, on))
    if x.max() >= width or y.max() >= height:
        raise ValueError(f"its events reach to column {int(x.max())} and row {int(y.max())}")
    if by == "time":
        block = (t - t.min()) * frames // (t.max() - t.min() + 1)
    else:
        block = torch.arange(len(t)) * frames // len(t)
    place = ((block * 2 + on) * height + y) * width + x
    return place.bincount(minlength=frames * 2 * height * width).float().view(frames, 2, height, width)


def flip_roll(frames: torch.Tensor) -> torch.Tensor:
    """Mirrored left to right with probability 1/2; then rolled by up to 5 pixels each way. All frames alike."""
    return roll(flip(frames))


def flip_roll_reverse(frames: torch.Tensor) -> torch.Tensor:
    """With probability 1/4 mirrored, with 1/4 run backwards, brighter for darker; then rolled as in ``flip_roll``."""
    drawn = float(torch.rand(()))
    if drawn > 0.75:
        frames = frames.flip(-1)
    elif drawn < 0.25:
        frames = frames.flip(0, 1)
    return roll(frames)


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
OF_CALTECH = {"flip-roll-reverse": flip_roll_reverse, "flip-roll": flip_roll, "none": None}


def read_aedat4(path: Path) -> tuple[np.ndarray, ...]:
    """Time, column, row and polarity of the events of a file in AEDAT 4."""
    from tonic.io import read_aedat4

    events = read_aedat4(str(path))
    return tuple(events[name] for name in events.dtype.names)  # in this order, whatever their names


def read_bin(path: Path) -> tuple[np.ndarray, ...]:
    """The same of a file of N-MNIST or N-Caltech101."""
    from tonic.io import read_mnist_file

    events = read_mnist_file(str(path), np.dtype([(name, np.int64) for name in ("x", "y", "t", "on")]))
    return tuple(events[name] for name in ("t", "x", "y", "on"))


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
    sensor: tuple[int, int] = (SENSOR, SENSOR)
    events: Callable[[Path], tuple[np.ndarray, ...]] = read_aedat4

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        height, width = self.sensor
        try:
            frames = to_frames(*self.events(self.files[index]), self.frames, self.by, self.sensor)
        except Exception as error:  # each layer has its own kind
            problem = f"{self.files[index]} is not a recording of {width} x {height} pixels"
            raise DataError(f"{problem}: {in_a_line(error)}") from error
        if self.values == "binary":
            frames = frames.clamp(max=1)
        if self.sensor != (self.size, self.size):
            smooth = self.resize == "bilinear"
            frames = F.interpolate(frames, (self.size, self.size), mode=self.resize, antialias=smooth)
        return (frames if self.augment is None else self.augment(frames)), self.targets[index]

    def recording(self, index: int) -> tuple[np.ndarray, ...]:
        """(t, x, y, p), as of ``base.Recorded``; ValueError where the frames are scaled."""
        if self.sensor != (self.size, self.size):
            raise ValueError(f"size must be that of the sensor, {self.sensor}, to see its events, got {self.size}")
        return self.events(self.files[index])


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
    check(frames, by, values, size, resize)
    one_of("augment", augment, AUGMENTATIONS)
    try:
        import aedat  # noqa: F401  tonic reads with it, but does not declare it
        import tonic.io  # noqa: F401
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


def n_mnist(
    root: Path | None = None, seed: int = 0, *, frames: int = 10, by: str = "time", values: str = "counts"
) -> Data:
    """N-MNIST (Orchard et al. 2015): 60 000 training and 10 000 test recordings of 34 x 34 pixels, as they are.

    Args:
        root: the folder that holds ``NMNIST``, as tonic unpacks it: ``Train/0/00002.bin`` and so on.
        frames, by, values: as of ``dvs_cifar10``.
    """
    check(frames, by, values)
    tonic_io("N-MNIST")
    root, parts = root or ROOT, []
    for folder, count in NMNIST.items():
        found = binaries(root / "NMNIST" / folder)
        if list(found) != [str(digit) for digit in range(10)] or sum(map(len, found.values())) < count:
            command = f"from tonic.datasets import NMNIST as C; [C({str(root)!r}, train=t) for t in (True, False)]"
            raise absent("N-MNIST", root, f"NMNIST/{folder}", found, 10, count, command)
        files = [file for held in found.values() for file in held]
        targets = [target for target, held in enumerate(found.values()) for _ in held]
        parts.append(Recordings(files, targets, frames, by, values, 34, "nearest", None, (34, 34), read_bin))
    return Data(*parts, 10, (frames, 2, 34, 34), True, parts[0])


def n_caltech101(
    root: Path | None = None,
    seed: int = 0,
    *,
    frames: int = 10,
    by: str = "time",
    values: str = "counts",
    size: int = 48,
    resize: str = "bilinear",
    augment: str = "flip-roll-reverse",
) -> Data:
    """N-Caltech101 (Orchard et al. 2015), split 9:1: of every class, the last tenth of the recordings is for testing.

    MTT splits 9:1 (A.2), but which recordings are in which part is not published. Here it goes by their names; the
    tenth of a class is rounded down. A recording fills a part of the sensor, 240 x 180 pixels, from its upper left: all
    of them is scaled, so that objects keep their sizes.

    Args:
        root: the folder that holds ``NCALTECH101``, as tonic unpacks it: ``Caltech101/accordion/image_0001.bin``.
        frames, by, values, resize: as of ``dvs_cifar10``.
        size: height and width that the sensor is scaled to.
        augment: ``"flip-roll-reverse"`` (MTT's code: mirrored, or backwards with brighter for darker, or neither; then
            rolled), ``"flip-roll"`` or ``"none"``; the same for all frames.
    """
    check(frames, by, values, size, resize)
    one_of("augment", augment, OF_CALTECH)
    tonic_io("N-Caltech101")
    root, (classes, count) = root or ROOT, NCALTECH101
    found = binaries(root / "NCALTECH101" / "Caltech101")
    if len(found) != classes or sum(map(len, found.values())) < count:
        command = f"from tonic.datasets import NCALTECH101 as C; C({str(root)!r})"
        raise absent("N-Caltech101", root, "NCALTECH101/Caltech101", found, classes, count, command)

    def part(chosen, augment):
        files = [file for held in found.values() for file in chosen(held)]
        targets = [target for target, held in enumerate(found.values()) for _ in chosen(held)]
        return Recordings(files, targets, frames, by, values, size, resize, augment, (180, 240), read_bin)

    def training(held):
        return held[: len(held) - len(held) // 10]

    train, plain = part(training, OF_CALTECH[augment]), part(training, None)
    test = part(lambda held: held[len(held) - len(held) // 10 :], None)
    return Data(train, test, classes, (frames, 2, size, size), True, plain)


def check(frames: int, by: str, values: str, size: int = SENSOR, resize: str = "bilinear") -> None:
    positive("frames", frames)
    positive("size", size)
    one_of("by", by, ("time", "count"))
    one_of("values", values, ("counts", "binary"))
    one_of("resize", resize, ("bilinear", "nearest"))


def tonic_io(what: str) -> None:
    try:
        import tonic.io  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs tonic ({error}): pip install 'snnkern[events]'") from error


def binaries(folder: Path) -> dict[str, list[Path]]:
    """The .bin files of each folder within, by its name; both in the order of their names."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.bin")):
        found.setdefault(file.parent.name, []).append(file)
    return found


def absent(what: str, root: Path, where: str, found: dict, classes: int, count: int, command: str) -> Exception:
    held = sum(map(len, found.values()))
    return FileNotFoundError(
        f"{what} is not whole in {root}: {where} has {held} recordings of {len(found)} classes, not {count} of "
        f'{classes}. This gets it:\n    python -c "{command}"'
    )
