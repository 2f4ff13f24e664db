"""The folder of a training run.

- ``settings.json``: the recipe with everything filled in, and the versions of what it was started with;
- ``metrics.jsonl``: one line per finished epoch;
- ``checkpoint.pt``: everything that training needs to go on: at which step of which stage it is, weights, optimiser,
  loss scale, temperature. There is no state of a random generator: see ``batches.py``;
- ``stage0-last.safetensors``, ``stage0-best.safetensors``, ...: a stage's weights after its last epoch, and after the
  one with the best test accuracy; each file says what it is, see ``load_weights``;
- ``tensorboard/``, if the recipe asks for it;
- ``lock``: which process trains here, if one does.

A file takes its name only when it is complete, so an interruption at any moment leaves all of them readable.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import get_type_hints

import torch

from ..files import replacing, versions, write_json

__all__ = [
    "Interrupted",
    "RecipeError",
    "Request",
    "RunError",
    "State",
    "claim",
    "common",
    "grouped",
    "holding",
    "load_weights",
    "prepared",
    "read_metrics",
    "read_settings",
    "save_weights",
]

LOCK = "lock"
FREE = {"title", "source", "seeds", "workers", "tensorboard", "checkpoint_minutes"}  # settings that change no number


class RunError(RuntimeError):
    """The run cannot start or go on as asked; the message says why and what to do. Nothing was overwritten."""


class RecipeError(ValueError):
    """The recipe, or an override of it, is wrong; the message names the key, what it got and what it expects."""


class Interrupted(KeyboardInterrupt):
    """Training stopped on request, and a checkpoint holds all that it did; the message says where it is."""


@dataclass
class State:
    """Where a training is: ``epoch`` epochs of ``stage`` are finished, and ``step`` steps of the next."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, right, samples in this epoch,
    seconds: float = 0.0  # and the time that it took
    found: dict = field(default_factory=dict)  # by the temperature search of this epoch
    cosines: list[float] = field(default_factory=list)  # of this epoch's probes, summed over its iterations
    b: float | None = None  # Dspike's temperature
    accuracy: float = 0.0  # on the test data, after the last epoch,
    best: float = -1.0  # and the best of this stage
    lines: int = 0  # of metrics


class Request:
    """Turns Ctrl-C, SIGTERM and a lost terminal (SIGHUP, unless nohup ignores it) into the wish to stop. They reach the
    main thread; elsewhere it does nothing."""

    def __enter__(self) -> Request:
        self.stop, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            asking = (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))
            self.before = {number: signal.signal(number, self._ask) for number in asking}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if not self.stop:
            self.stop, self.since = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.since + 1:  # torchrun passes on what we got already
            raise KeyboardInterrupt


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses is a RunError that names the file, or else ``path``."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


@contextmanager
def reading(path: Path, hint: str = "") -> Iterator[None]:
    """Whatever keeps a file from being read, the system or its contents, is a RunError that names it."""
    try:
        yield
    except (RunError, ImportError):
        raise
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except Exception as error:
        raise RunError(f"{path} cannot be read: {reason(error)}{hint}") from error


def reason(error: Exception) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text[:300]}"


def prepared(folder: Path) -> None:
    """Makes ``folder``; RunError if it is something else's."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        others = any(p.suffix != ".part" and p.name != LOCK for p in folder.iterdir())
    if others and not (folder / "settings.json").exists():
        raise RunError(f"{folder} is not empty and is not a run's folder; choose another")


def claim(folder: Path, settings: dict) -> None:
    """Makes ``folder`` the place of these settings; RunError if it holds anything else."""
    prepared(folder)
    path = folder / "settings.json"
    if path.exists():
        with reading(path):
            kept = _read(folder)
            ours, held, before = _flat(settings), _flat({**kept["settings"]}), kept.get("versions", {})
            now = versions()
            others = [f"{k} {v} there, {now.get(k)} here" for k, v in before.items() if v != now.get(k)]
        keys = [key for key in {**held, **ours} if key.partition(".")[0] not in FREE]
        changed = [f"{k} {held.get(k)!r} there, {ours.get(k)!r} here" for k in keys if held.get(k) != ours.get(k)]
        if changed:
            raise RunError(f"{folder} holds a run with other settings ({'; '.join(changed)}); choose another folder")
        if others:
            text = f"{folder} was begun elsewhere ({'; '.join(others)}): it goes on, but its last bits may differ"
            warnings.warn(text, stacklevel=2)
    else:
        with writing(path):
            write_json(path, {"settings": settings, "versions": versions()})


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in ``folder``, which is there, however this one ends; RunError if one does.

    The system's lock on the file ``lock`` is what counts; its text says whose it is. It is one of a process (``lockf``,
    not ``flock``): workers that load data do not hold on to it when training is killed.
    """
    path = folder / LOCK
    with writing(path):
        file = open(path, "ab+", buffering=0)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = file.read().decode(errors="replace") or "another process"
                raise RunError(f"{folder} is being trained by {who}; wait until it ends or choose another") from error
            # a file system without locks is no reason not to train
        with suppress(OSError):  # a full disk: the next file that matters says so
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def read_settings(folder: Path) -> dict:
    with reading(folder / "settings.json"):
        return {**_read(folder)["settings"]}


def _read(folder: Path) -> dict:
    """What ``claim`` wrote."""
    path = folder / "settings.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        inside = ", ".join(sorted(str(p.parent) for p in folder.glob("*/settings.json")))
        hint = f"; the runs in it are {inside}" if inside else ""
        raise RunError(f"{path} does not exist: {folder} is not the folder of a run{hint}") from error


def grouped(paths: Sequence[str | Path]) -> dict[str, list[Path]]:
    """The runs that the paths hold: label to the runs of its seeds. A path is a run's folder or a file in it, or the
    folder of a ``train`` or a ``compare``; the label is what tells the runs' own folders apart."""
    runs = [run for path in map(Path, paths) for run in _inside(path)]
    held = [Path(os.path.abspath(run.parent if run.suffix != ".safetensors" else run.with_suffix(""))) for run in runs]
    base = Path(os.path.commonpath(held))
    groups: dict[str, list[Path]] = {}
    for run, place in zip(runs, held, strict=True):
        groups.setdefault(str(place.relative_to(base)) if place != base else base.name, []).append(run)
    return groups


def common(paths: Sequence[str | Path]) -> Path:
    """The folder that holds them all; that of one is itself."""
    folders = [os.path.abspath(path if Path(path).is_dir() else Path(path).parent) for path in paths]
    held = os.path.commonpath(folders)
    return Path(held if Path(paths[0]).is_absolute() else os.path.relpath(held))


def _inside(path: Path) -> list[Path]:
    found = [settings.parent for settings in path.rglob("settings.json")]
    runs = [run for run in found if not any(run in other.parents for other in found)]
    return sorted(runs, key=lambda run: (str(run.parent), len(run.name), run.name)) or [path]


def _flat(value, key: str = "") -> dict:
    if not isinstance(value, (dict, list)) or not value:
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, item in items for k, v in _flat(item, f"{key}.{name}" if key else name).items()}


def save_checkpoint(folder: Path, state: dict) -> None:
    path = folder / "checkpoint.pt"
    sums = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(True)
        with writing(path), replacing(path) as file:
            torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(sums)


def read_checkpoint(folder: Path) -> tuple[State, dict] | None:
    """What ``save_checkpoint`` wrote last; None in a new folder. Lines of metrics after it are dropped."""
    path = folder / "checkpoint.pt"
    metrics, lines = folder / "metrics.jsonl", 0
    with reading(metrics):
        held = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    found = None
    if path.exists():
        with whole(folder):
            with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
                if wrong := file.testzip():
                    raise ValueError(f"the checksum of {wrong} in it is wrong")
            parts = torch.load(path, map_location="cpu", weights_only=True)  # nothing in it is executed
            found = _state(parts.pop("state")), parts
            if (lines := found[0].lines) > len(held):
                raise ValueError(f"it comes after {lines} epochs, {metrics.name} has {len(held)}")
    if held[lines:]:  # a line is written before its checkpoint
        with writing(metrics), replacing(metrics) as file:
            file.writelines(held[:lines])
    return found


def _state(held: dict) -> State:
    wanted = get_type_hints(State)
    if held.keys() != wanted.keys():
        raise ValueError(f"its state must have {', '.join(wanted)}, got {', '.join(map(str, held))}")
    for name, value in held.items():
        if not isinstance(value, getattr(wanted[name], "__origin__", wanted[name])):
            raise TypeError(f"{name} must be {wanted[name]}, got {value!r}")
    if not all(isinstance(value, float) for value in (*held["sums"], *held["cosines"])):
        raise TypeError(f"sums and cosines must be numbers, got {held['sums']} and {held['cosines']}")
    return State(**held)


@contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Whatever is wrong is a RunError that the checkpoint is damaged."""
    try:
        yield
    except Exception as error:
        raise RunError(
            f"{folder / 'checkpoint.pt'} is damaged and was left as it is; move it away to train this run from the "
            f"start ({reason(error)})"
        ) from error


def board(folder: Path, lines: int):
    """TensorBoard's writer, for what comes after so many lines of metrics."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tensorboard = true needs tensorboard: pip install 'snnkern[tensorboard]'") from error
    with writing(folder / "tensorboard"):
        return SummaryWriter(folder / "tensorboard", purge_step=lines + 1)


def show_on(board, metrics: dict, line: int) -> None:
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            board.add_scalar(name, value, line)


def add_metrics(folder: Path, metrics: dict) -> None:
    path = folder / "metrics.jsonl"
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())  # the checkpoint that follows counts on it


MEASURED = {
    **dict.fromkeys(("stage", "epoch", "steps"), int),
    **dict.fromkeys(("network", "criterion"), str),
    **dict.fromkeys(("lr", "loss", "train_accuracy", "test_accuracy", "test_sdt", "test_tet", "seconds"), float),
    **dict.fromkeys(("accuracy_over_steps", "moments"), list),
}


def read_metrics(folder: Path) -> list[dict]:
    """Of the finished epochs; a last line that is being written does not count."""
    path, found = folder / "metrics.jsonl", []
    with reading(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        with reading(path, f", in line {number}"):
            found.append(_measured(json.loads(line)))
    return found


def _measured(line: dict) -> dict:
    for key, kind in MEASURED.items():
        if type(line[key]) is not kind:
            raise TypeError(f"{key} must be {kind.__name__}, got {line[key]!r}")
    over_time = *line["accuracy_over_steps"], *line["moments"]
    if len(over_time) != 2 * line["steps"] or not all(0 <= value <= 1 for value in over_time):
        raise ValueError(f"accuracies must be one for each of {line['steps']} steps, got {over_time}")
    return line


def save_weights(path: Path, model: torch.nn.Module, about: dict) -> None:
    """As safetensors, with ``about`` as JSON in its metadata, and a digest of everything: the format has none."""
    with writing(path), replacing(path) as file:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        said = json.dumps(about | {"digest": _digest(weights, about)})
        file.write(safetensors().save(weights, {"snnkern": said}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The state_dict and what was said about it."""
    try:
        with safetensors().safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["snnkern"])
            weights = {name: file.get_tensor(name) for name in file.keys()}
        digest = about.pop("digest", None)
        if digest is not None and digest != _digest(weights, about):  # the first files had none
            raise ValueError("it is damaged, as its digest tells")
        return weights, about
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except Exception as error:
        raise RunError(f"{path} is not a file of weights that `snnkern train` wrote: {reason(error)}") from error


def _digest(weights: dict[str, torch.Tensor], about: dict) -> str:
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def safetensors():
    try:
        import safetensors.torch as module
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("training needs safetensors: pip install 'snnkern[train]'") from error
    return module
