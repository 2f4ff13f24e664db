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
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

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
    """Turns Ctrl-C and SIGTERM into the wish to stop. They reach the main thread; elsewhere it does nothing."""

    def __enter__(self) -> Request:
        self.stop, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
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


def claim(folder: Path, settings: dict) -> None:
    """Makes ``folder`` the place of these settings; RunError if it holds anything else."""
    path = folder / "settings.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        ours, held = _flat(settings), _flat(read_settings(folder))
        keys = [key for key in {**held, **ours} if key.partition(".")[0] not in FREE]
        changed = [f"{k} {held.get(k)!r} there, {ours.get(k)!r} here" for k in keys if held.get(k) != ours.get(k)]
        if changed:
            raise RunError(f"{folder} holds a run with other settings ({'; '.join(changed)}); choose another folder")
    elif any(p.suffix != ".part" and p.name != LOCK for p in folder.iterdir()):
        raise RunError(f"{folder} is not empty and is not a run's folder; choose another")
    else:
        with writing(path):
            write_json(path, {"settings": settings, "versions": versions()})


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in ``folder``, a claimed one, however this one ends; RunError if one does.

    The system's lock on the file ``lock`` is what counts; its text says whose it is. It is one of a process (``lockf``,
    not ``flock``): workers that load data do not hold on to it when training is killed.
    """
    path = folder / LOCK
    with writing(path):
        file = open(path, "a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = file.read() or "another process"
                raise RunError(f"{folder} is being trained by {who}; wait until it ends or choose another") from error
            # a file system without locks is no reason not to train
        with writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
            file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def read_settings(folder: Path) -> dict:
    path = folder / "settings.json"
    try:
        return dict(json.loads(path.read_text())["settings"])
    except FileNotFoundError as error:
        inside = ", ".join(sorted(str(p.parent) for p in folder.glob("*/settings.json")))
        hint = f"; the runs in it are {inside}" if inside else ""
        raise RunError(f"{path} does not exist: {folder} is not the folder of a run{hint}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error!r}") from error


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
    with writing(path), replacing(path) as file:
        torch.save(state, file)


def read_checkpoint(folder: Path) -> dict | None:
    """What ``save_checkpoint`` wrote last; None in a new folder. Lines of metrics after it are dropped."""
    path = folder / "checkpoint.pt"
    state = None
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            lines = state["state"]["lines"]
        except Exception as error:
            raise damaged(folder, error) from error
    metrics = folder / "metrics.jsonl"
    if metrics.exists():  # a line is written before its checkpoint
        with writing(metrics), replacing(metrics) as file:
            file.writelines(metrics.read_bytes().splitlines(keepends=True)[: lines if state else 0])
    return state


def damaged(folder: Path, error: Exception) -> RunError:
    reason = next(iter(str(error).splitlines()), "")
    return RunError(
        f"{folder / 'checkpoint.pt'} is damaged and was left as it is; move it away to train this run from the start "
        f"({type(error).__name__}: {reason})"
    )


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


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def save_weights(path: Path, model: torch.nn.Module, about: dict) -> None:
    """As safetensors, with ``about`` as JSON in its metadata."""
    with writing(path), replacing(path) as file:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        file.write(safetensors().save(weights, {"snnkern": json.dumps(about)}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The state_dict and what was said about it."""
    try:
        with safetensors().safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["snnkern"])
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except Exception as error:
        raise RunError(f"{path} is not a file of weights that `snnkern train` wrote: {error!r}") from error


def safetensors():
    try:
        import safetensors.torch as module
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("training needs safetensors: pip install 'snnkern[train]'") from error
    return module
