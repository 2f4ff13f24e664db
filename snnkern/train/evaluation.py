"""What a trained network does on test data, at every number of steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..analysis.accuracy import evaluating
from ..data import Data
from ..nn import fold
from . import folder as runs
from . import recipe as recipes
from .batches import fetch, to_device
from .processes import World, working
from .recipe import Recipe

__all__ = ["Evaluation", "Restored", "evaluate", "restore", "test"]


class Evaluation(NamedTuple):
    """Entry t - 1 of each belongs to t steps, or to step t. Stopping after t steps is the same as running t: in eval
    mode, no step knows of later ones. Accuracies are fractions, losses are means over the samples."""

    accuracy: list[float]  # of the argmax of the potential averaged over the first t steps
    moments: list[float]  # of the argmax at step t alone
    sdt: list[float]  # loss of t steps: see snnkern.losses
    tet: list[float]  # with lamb = 0
    samples: int


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    dataset: Dataset,
    steps: int,
    events: bool = False,
    *,
    batch: int = 256,
    where: World | None = None,
    amp: str = "off",
    channels_last: bool = False,
    workers: int = 0,
    check=lambda: None,
) -> Evaluation:
    """Tests in eval mode, and leaves the model in the mode it was in.

    Args:
        model: see ``snnkern.models``.
        dataset: of (x, y); x [C, H, W], or frames [T, C, H, W] with ``events``.
        where: processes that share the work, all of which call this; None: this one, where the model is.
        amp: autocast to ``bfloat16`` or ``float16``.
        check: called before every batch.
    """
    device = next(model.parameters()).device
    where = where or World(device)
    sums = torch.zeros(4, steps, dtype=torch.float64, device=device)
    mine = torch.arange(where.rank, len(dataset), where.size)
    with evaluating(model):
        for x, y in fetch(dataset, mine.split(batch), workers=workers):
            check()
            x, y = to_device(x, y, device, steps, events, channels_last)
            with where.autocast(amp):
                outputs = model(x, None if events else steps)
            sums += _sums(outputs.float(), y)
    accuracy, moments, sdt, tet = (where.sum(sums) / len(dataset)).tolist()
    return Evaluation(accuracy, moments, sdt, tet, len(dataset))


def _sums(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[4, T]: how many are right after t steps and at step t, and their losses; summed over the samples."""
    count = torch.arange(1, len(outputs) + 1, device=outputs.device).view(-1, 1)
    mean = outputs.cumsum(0) / count.unsqueeze(2)
    y = y.expand(len(outputs), -1)

    def loss(scores):
        return F.cross_entropy(scores.movedim(2, 1), y, reduction="none")

    rows = mean.argmax(2) == y, outputs.argmax(2) == y, loss(mean), loss(outputs).cumsum(0) / count
    return torch.stack([row.double().sum(1) for row in rows])


def test(
    recipe: Recipe, model: torch.nn.Module, data: Data, steps: int, where: World | None = None, check=lambda: None
) -> Evaluation:
    """``evaluate`` on the test data, in at most as many steps as there are frames, as the recipe says: with its
    device, threads, autocast, and the processes that torchrun started."""
    steps = min(steps, data.shape[0]) if data.events else steps
    options = {"amp": recipe.amp, "channels_last": recipe.channels_last, "workers": recipe.workers, "check": check}
    settings = recipe.device, recipe.threads, recipe.deterministic
    with nullcontext(where) if where else working(*settings) as where:
        return evaluate(model.to(where.device), data.test, steps, data.events, where=where, **options)


class Restored(NamedTuple):
    model: torch.nn.Module
    recipe: Recipe
    about: dict  # stage, epoch, test_accuracy, classes, shape


def restore(path: str | Path, stage: int = -1, best: bool = False) -> Restored:
    """The network in a file of weights that training or ``snnkern export`` wrote, or in a run's folder: after the last
    epoch of a stage, or after the one with the best accuracy on the test data."""
    path = Path(path)
    if path.is_dir():
        count = len(runs.read_settings(path).get("stage", ()))
        if not -count <= stage < count:
            raise runs.RunError(f"stage must be one of the run's {count}, counted from 0, got {stage}")
        path = path / f"stage{stage % count}-{'best' if best else 'last'}.safetensors"
    weights, about = runs.load_weights(path)
    recipe = recipes.read(about.pop("recipe"))
    model = recipe.make_model(about["stage"], about["classes"], about["shape"])
    if about.pop("folded", False):
        model = fold(model)
    model.load_state_dict(weights)
    return Restored(model, recipe, about)
