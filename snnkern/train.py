"""Training of the digits recipe: a run that survives interruption.

The folder of a run holds

- ``settings.json``: its settings and the versions of what it started with;
- ``metrics.jsonl``: one line per finished epoch;
- ``checkpoint.pt``: everything that training needs to go on after the last finished epoch;
- ``model.safetensors``: the weights, once it is finished.

A file takes its name only when it is complete. On the CPU, with the same versions and number of threads, an interrupted
run that is resumed ends in the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from . import losses
from ._version import __version__
from .data import digits
from .models import CNN6

__all__ = ["LOSSES", "Evaluation", "RunError", "Settings", "evaluate", "fit", "train_epoch"]

LOSSES = ("sdt", "tet")


class RunError(RuntimeError):
    """The run cannot start or go on as asked; the message says why and what to do. Nothing was overwritten."""


@dataclass(frozen=True)
class Settings:
    """One run. ``lamb`` is the weight of TET's second term; ``noise`` and ``train`` belong to ``data.digits``."""

    loss: str = "tet"
    seed: int = 0
    steps: int = 4
    epochs: int = 40
    batch: int = 100
    lr: float = 2e-3
    lamb: float = 0.0
    noise: float = 0.4
    train: int = 600
    device: str = "cpu"
    backend: str | None = None

    def __post_init__(self) -> None:
        rules = [("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}")]
        for name, least in (("seed", 0), ("steps", 1), ("epochs", 1), ("batch", 1), ("train", 1)):
            value = getattr(self, name)
            rules.append((name, isinstance(value, int) and value >= least, f"a whole number from {least} up"))
        rules.append(("lr", 0 < self.lr < math.inf, "positive and finite"))
        rules.append(("lamb", 0 <= self.lamb <= 1, "in [0, 1]"))
        rules.append(("noise", 0 <= self.noise < math.inf, "finite and not negative"))
        for name, kept, wanted in rules:
            if not kept:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def criterion(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return losses.sdt(outputs, target) if self.loss == "sdt" else losses.tet(outputs, target, self.lamb)


def fit(settings: Settings, folder: str | Path, on_epoch: Callable[[Settings, dict], None] | None = None) -> CNN6:
    """Trains in ``folder``, or goes on where an earlier call stopped there. Adam; cosine to 0, stepped per epoch.

    Args:
        on_epoch: called after each epoch, when its checkpoint is on disk, with the settings and the line of metrics.

    Raises:
        RunError: the folder holds something else, its checkpoint is damaged, or the loss is no longer finite.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("training needs safetensors: pip install 'snnkern[train]'") from error
    folder = Path(folder)
    (x, y), test = digits(settings.seed, settings.noise, settings.train)
    x, y = x.to(settings.device), y.to(settings.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = CNN6(settings.steps, backend=settings.backend).to(settings.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs)
    shuffle = torch.Generator().manual_seed(settings.seed)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}

    claim(folder, asdict(settings))
    done = _resume(folder, parts, shuffle)
    for epoch in range(done + 1, settings.epochs + 1):
        started = time.perf_counter()
        order = torch.randperm(len(x), generator=shuffle)
        loss, accuracy = train_epoch(model, optimiser, settings.criterion, x, y, order.split(settings.batch))
        schedule.step()
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise RunError(f"the loss of epoch {epoch} is {loss}; try a smaller lr (the checkpoint before it is kept)")
        tested = evaluate(model, test, settings.steps)
        metrics = {
            "epoch": epoch,
            "loss": loss,
            "test_sdt": tested.sdt,
            "test_tet": tested.tet,
            "train_accuracy": accuracy,
            "test_accuracy": tested.accuracy[-1],
            "images_per_second": len(x) / seconds,
            "seconds": seconds,
        }
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        state = {name: part.state_dict() for name, part in parts.items()}
        with replacing(folder / "checkpoint.pt") as file:
            torch.save({**state, "shuffle": shuffle.get_state(), "epoch": epoch}, file)
        if on_epoch is not None:
            on_epoch(settings, metrics)
    with replacing(folder / "model.safetensors") as file:
        file.write(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    return model


def train_epoch(model, optimiser, criterion, x, y, batches) -> tuple[float, float]:
    """One pass over the batches (tensors of indices into x and y). Returns the mean loss and accuracy on the way."""
    model.train()
    total, right = 0.0, 0
    for index in batches:
        outputs = model(x[index])
        loss = criterion(outputs, y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item() * len(index)
        right += (outputs.detach().mean(0).argmax(-1) == y[index]).sum().item()
    return total / len(x), right / len(x)


class Evaluation(NamedTuple):
    """What a model does in ``steps`` steps; accuracies as fractions."""

    accuracy: list[float]  # of the argmax of the mean over the first 1, 2, ... steps; the last is the model's accuracy
    moments: list[float]  # of the argmax at each single step
    sdt: float
    tet: float


@torch.no_grad()
def evaluate(model: CNN6, data: tuple[torch.Tensor, torch.Tensor], steps: int) -> Evaluation:
    """Tests on (x, y) of static images. Stopping after fewer steps is the same as running fewer: see ``accuracy``."""
    x, y = data
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    outputs = torch.cat([model(part.to(device), steps) for part in x.split(256)], dim=1).cpu()
    model.train(training)

    def right(scores: torch.Tensor) -> list[float]:
        return (scores.argmax(-1) == y).double().mean(1).tolist()

    return Evaluation(
        right(outputs.cumsum(0)), right(outputs), losses.sdt(outputs, y).item(), losses.tet(outputs, y).item()
    )


def versions() -> dict[str, str | int]:
    """What a run depends on besides its settings."""
    return {
        "snnkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


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


def _resume(folder: Path, parts: dict, shuffle: torch.Generator) -> int:
    """Loads the folder's checkpoint, if there is one; returns how many epochs are finished."""
    path, done = folder / "checkpoint.pt", 0
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            shuffle.set_state(state["shuffle"])
            done = state["epoch"]
        except Exception as error:
            raise RunError(
                f"{path} is damaged and was left as it is; move it away to train this run from the start "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
    metrics = folder / "metrics.jsonl"
    if metrics.exists():  # a line is written before its checkpoint: drop those without
        with replacing(metrics) as file:
            file.writelines(metrics.read_bytes().splitlines(keepends=True)[:done])
    return done


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
