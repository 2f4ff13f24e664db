"""The folder of a training run.

- ``settings.json``: its settings, and the versions of what it was started with;
- ``metrics.jsonl``: one line per finished epoch;
- ``checkpoint.pt``: everything that training needs to go on after the last finished epoch;
- ``model.safetensors``: the weights, once it is finished.

A file takes its name only when it is complete, so an interruption at any moment costs the epoch under way and no more.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import contextmanager
from pathlib import Path

import torch

from ._version import __version__

__all__ = ["RunError", "claim", "read_metrics", "replacing", "resume", "save_epoch", "versions", "write_json"]


class RunError(RuntimeError):
    """The run cannot start or go on as asked; the message says why and what to do. Nothing was overwritten."""


def claim(folder: Path, settings: dict) -> None:
    """Makes ``folder`` the place of these settings; RunError if it holds anything else."""
    path = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            held = json.loads(path.read_text())["settings"]
            changed = [f"{k} {held.get(k)!r} there, {v!r} here" for k, v in settings.items() if held.get(k) != v]
        except (ValueError, KeyError, AttributeError) as error:
            raise RunError(f"{path} cannot be read: {error!r}") from error
        if changed or len(held) != len(settings):
            raise RunError(f"{folder} holds a run with other settings ({'; '.join(changed)}); choose another folder")
    elif any(p.suffix != ".part" for p in folder.iterdir()):
        raise RunError(f"{folder} is not empty and is not a run's folder; choose another")
    else:
        write_json(path, {"settings": settings, "versions": versions()})


def save_epoch(folder: Path, metrics: dict, parts: dict, shuffle: torch.Generator) -> None:
    """Adds a finished epoch: its line of metrics, then the state of ``parts`` (name to object) and of the generator."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    state = {name: part.state_dict() for name, part in parts.items()}
    with replacing(folder / "checkpoint.pt") as file:
        torch.save({**state, "shuffle": shuffle.get_state(), "epoch": metrics["epoch"]}, file)


def resume(folder: Path, parts: dict, shuffle: torch.Generator) -> int:
    """Puts ``parts`` and the generator where ``save_epoch`` left them; returns how many epochs are finished."""
    path, done = folder / "checkpoint.pt", 0
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            shuffle.set_state(state["shuffle"])
            done = state["epoch"]
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise RunError(
                f"{path} is damaged and was left as it is; move it away to train this run from the start "
                f"({type(error).__name__}: {reason})"
            ) from error
    metrics = folder / "metrics.jsonl"
    if metrics.exists():  # a line is written before its checkpoint: drop those without
        with replacing(metrics) as file:
            file.writelines(metrics.read_bytes().splitlines(keepends=True)[:done])
    return done


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def versions() -> dict[str, str]:
    """What a run depends on besides its settings."""
    return {
        "processor": _processor(),
        "snnkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


@contextmanager
def replacing(path: Path):
    """A binary file that takes the name ``path`` when it is complete and on disk; until then, what was there stays."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
