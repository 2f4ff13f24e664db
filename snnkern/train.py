"""Training of the digits recipe.

A run lives in a folder (``runs.py``) and survives interruption: on the CPU, with the same versions, one that is resumed
ends in the same weights, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from . import losses
from .data import digits
from .models import CNN6
from .runs import RunError, claim, replacing, resume, save_epoch

__all__ = ["LOSSES", "Evaluation", "Settings", "evaluate", "fit", "train_epoch", "using_threads"]

LOSSES = ("sdt", "tet")


@dataclass(frozen=True)
class Settings:
    """One run. ``lamb`` is the weight of TET's second term; ``noise`` and ``train`` belong to ``data.digits``.

    ``threads`` is 1: a network this small gains little from more and, on a busy machine, loses much, because
    threads that have finished their part of an operation spin while others wait for a core.
    """

    loss: str = "tet"
    seed: int = 0
    steps: int = 4
    epochs: int = 40
    batch: int = 100
    lr: float = 2e-3
    lamb: float = 0.0
    noise: float = 0.4
    train: int = 600
    threads: int = 1
    device: str = "cpu"
    backend: str | None = None

    def __post_init__(self) -> None:
        rules = [("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}")]
        for name, least in (("seed", 0), ("steps", 1), ("epochs", 1), ("batch", 1), ("train", 1), ("threads", 1)):
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
    with using_threads(settings.threads):
        model = _fit(settings, folder, on_epoch)
    with replacing(folder / "model.safetensors") as file:
        file.write(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    return model


def _fit(settings: Settings, folder: Path, on_epoch) -> CNN6:
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
    for epoch in range(resume(folder, parts, shuffle) + 1, settings.epochs + 1):
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
        save_epoch(folder, metrics, parts, shuffle)
        if on_epoch is not None:
            on_epoch(settings, metrics)
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


@contextmanager
def using_threads(threads: int):
    """PyTorch, and with it the cpu backend, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
