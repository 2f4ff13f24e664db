"""What a trained network does on test data, at every number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Subset

from ..analysis import accuracy, event_driven
from ..analysis.accuracy import Evaluation
from ..data import Data
from ..methods import mtt, seenn
from ..nn import Windows, fold
from ..nn.modes import evaluating
from . import folder as runs
from . import recipe as recipes
from .batches import Epoch, Parts
from .folder import RunError
from .processes import World, working
from .recipe import Recipe

__all__ = ["Evaluation", "Restored", "calibrate", "early_exit", "evaluate", "restore", "test", "test_events"]


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
    t: Sequence[int] | None = None,
) -> Evaluation:
    """``analysis.evaluate`` on a data set.

    Args:
        model: see ``snnkern.models``.
        dataset: of (x, y); x [C, H, W], or frames [T, C, H, W] with ``events``.
        steps: T.
        batch: samples that run together; ``workers`` processes load them.
        channels_last: of images in memory.
        where: processes that share the work, all of which call this; None: this one, where the model is.
        amp: autocast to ``bfloat16`` or ``float16``.
        check: called before every batch.
        t: a temporal configuration; ``steps`` then are the frames that there are to be.
    """
    device = next(model.parameters()).device
    where = where or World(device)
    if len(dataset) < where.size:
        raise RunError(f"the test data must have a sample for each of the {where.size} processes, got {len(dataset)}")
    mine = torch.arange(where.rank, len(dataset), where.size)

    def parts():
        for part in Parts(dataset, mine.split(batch), device, steps, events, channels_last, workers=workers):
            check()
            yield part

    with where.autocast(amp):
        return accuracy.evaluate(model, parts(), None if events or t else steps, where.sum, t)


def test(
    recipe: Recipe,
    model: torch.nn.Module,
    data: Data,
    steps: int,
    where: World | None = None,
    check=lambda: None,
    t: Sequence[int] | None = None,
) -> Evaluation:
    """``evaluate`` on the test data, in at most as many steps as there are frames, as the recipe says.

    That is with its device, threads, autocast, and the processes that torchrun started.

    Args:
        recipe, model, data: of a training; see ``restore`` and ``snnkern.data.load``.
        steps, where, check, t: see ``evaluate``.
    """
    steps = min(steps, data.shape[0]) if data.events else steps
    options = {"amp": recipe.amp, "channels_last": recipe.channels_last, "workers": recipe.workers, "check": check}
    options["t"] = t
    settings = recipe.device, recipe.threads, recipe.deterministic
    with nullcontext(where) if where else working(*settings) as where:
        if recipe.windows and t is None:
            model = Windows(model, recipe.windows)
        return evaluate(model.to(where.device), data.test, steps, data.events, where=where, **options)


def test_events(
    recipe: Recipe,
    model: torch.nn.Module,
    stage: int,
    samples: int | None = None,
    watch: Callable[[Iterable], Iterable] = lambda recordings: recordings,
) -> dict:
    """The network of a stage on test data clocked, with T of its training, and event by event, on the same samples.

    Args:
        recipe, model, stage: of a training; see ``restore``.
        samples: how many, evenly spread over the test data; None: all.
        watch: passes the numbers of the recordings on, one by one.

    Returns: ``clocked`` and ``event_driven``, accuracies as fractions; ``events``, ``spikes`` and ``operations`` of
        ``analysis.EventDriven``; ``samples`` and ``steps``.
    """
    data = recipe.load_data()
    if not hasattr(data.test, "recording"):
        raise RunError(f"data.name must be a set that gives the events themselves, got {recipe.data['name']!r}")
    count = min(samples or len(data.test), len(data.test))
    chosen = [i * len(data.test) // count for i in range(count)]
    steps = min(recipe.stage[stage].steps, data.shape[0])
    try:
        found = event_driven(model, ((data.test.recording(i), data.test[i][1]) for i in watch(chosen)), data.shape[1:])
    except ValueError as error:
        raise RunError(f"event by event: {error}") from error
    clocked = test(recipe, model, data._replace(test=Subset(data.test, chosen)), steps)
    totals = {name: getattr(found, name) for name in ("events", "spikes", "operations", "samples")}
    return {"steps": steps, "clocked": clocked.accuracy[-1], "event_driven": found.accuracy, **totals}


def calibrate(
    recipe: Recipe,
    model: torch.nn.Module,
    data: Data,
    batches: int = 10,
    steps: int | None = None,
    t: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """``methods.mtt.calibrate`` from batches of training data as the recipe has them, where the model is.

    Args:
        recipe, model, data: of a training; see ``restore`` and ``snnkern.data.load``.
        batches: how many.
        steps, t: the time steps to calibrate for; see ``snnkern.methods.mtt.calibrate``.
        seed: others draw other batches.
    """
    device, frames = next(model.parameters()).device, data.shape[0] if data.events else 0
    parts = training_parts(
        recipe, data, device, frames if t else steps or 0, (recipe.seed, "calibration", seed), batches
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), World(device).autocast(recipe.amp):
        mtt.calibrate(model, (x for x, _ in parts), None if data.events or t else steps, t)


def training_parts(recipe: Recipe, data: Data, device: torch.device, steps: int, key: tuple, batches: int) -> Parts:
    """So many batches of training data that the key settles, in the parts in which training computes them."""
    plan = Epoch.of(key, len(data.train), recipe.batch, recipe.accumulate)
    parts = [part for batch in plan.batches[:batches] for part in batch.tensor_split(recipe.accumulate)]
    options = steps, data.events, recipe.channels_last, plan.sample_seeds, recipe.workers
    return Parts(data.train, parts, device, *options)


ROUNDS = 3  # that each batch is timed


def early_exit(
    recipe: Recipe, model: torch.nn.Module, data: Data, steps: int, thresholds: Sequence[float] = (), batch: int = 256
) -> dict:
    """Early exit on the test data beside all steps at once; see ``snnkern.methods.seenn``.

    Args:
        recipe, model, data: of a training; see ``restore`` and ``snnkern.data.load``.
        steps: T.
        batch: samples that start together.
        thresholds: of confidence. None given: the one that ``seenn.choose`` finds on half of the samples, a draw of
            seed 0; the other half then judges it.

    Returns: ``T``, ``samples``, ``chosen_on`` (how many others chose the threshold, or None) and ``rows``, the first of
        all steps: ``threshold`` (None), mean ``steps``, ``accuracy`` and ``seconds``, the sum over the batches of the
        median of 3 rounds, in each of which all rows run one after the other.
    """
    with working(recipe.device, recipe.threads, recipe.deterministic) as where, evaluating(model.to(where.device)):
        if where.size > 1:
            raise RunError(f"early exit is timed in one process, got {where.size}")

        def parts(index: torch.Tensor) -> Parts:
            options = steps, data.events, recipe.channels_last
            return Parts(data.test, index.split(batch), where.device, *options, workers=recipe.workers)

        def whole(x: torch.Tensor) -> torch.Tensor:
            return model(x) if data.events else model(x, steps)

        with torch.no_grad(), where.autocast(recipe.amp):
            judged, held = torch.arange(len(data.test)), None
            if not thresholds:
                if len(data.test) < 2:
                    raise RunError(f"to choose a threshold takes two test samples or more, got {len(data.test)}")
                order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
                held, judged = order.chunk(2)
                outputs, labels = zip(*((whole(x).cpu(), y.cpu()) for x, y in parts(held)), strict=True)
                thresholds = [seenn.choose(torch.cat(outputs, dim=1), torch.cat(labels)).threshold]
            calls = {None: lambda x: seenn.exits(whole(x), 1.0)} | {
                threshold: lambda x, threshold=threshold: seenn.exit_early(model, x, threshold, steps)
                for threshold in thresholds
            }
            sums = {threshold: torch.zeros(3, dtype=torch.float64) for threshold in calls}
            for x, y in parts(judged):
                taken = [{threshold: _timed(call, x, where.device) for threshold, call in calls.items()}
                         for _ in range(ROUNDS)]  # fmt: skip
                for threshold, total in sums.items():
                    found = taken[0][threshold][0]
                    right = (found.predictions.cpu() == y.cpu()).sum()
                    seconds = median(each[threshold][1] for each in taken)
                    total += torch.tensor([found.steps.sum(), right, seconds], dtype=torch.float64)
    rows = [
        {
            "threshold": threshold,
            "steps": float(at) / len(judged),
            "accuracy": float(right) / len(judged),
            "seconds": float(seconds),
        }
        for threshold, (at, right, seconds) in sums.items()
    ]
    return {"T": steps, "samples": len(judged), "chosen_on": None if held is None else len(held), "rows": rows}


def _timed(call: Callable[[torch.Tensor], seenn.Exits], x: torch.Tensor, device: torch.device):
    """What the call returns, and its seconds; both calls end with what a GPU has to hand over."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    found = call(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - begin


class Restored(NamedTuple):
    """What ``restore`` read."""

    model: torch.nn.Module
    recipe: Recipe
    about: dict  # stage, epoch, test_accuracy, classes, shape


def restore(path: str | Path, stage: int = -1, best: bool = False) -> Restored:
    """The network in a file of weights that training or ``snnkern export`` wrote, or in a run's folder.

    Args:
        path: of the file, or of the folder of a run with one seed.
        stage: of the run, counted from 0; -1 is the last.
        best: after the epoch with the best accuracy on the test data, not after the last.

    Raises: RunError if there is no such network; the message says what there is.
    """
    path = Path(path)
    if path.is_dir():
        settings = runs.read_settings(path)
        with runs.reading(path / "settings.json"):
            count = len(settings["stage"])
        if not -count <= stage < count:
            raise RunError(f"stage must be one of the run's {count}, counted from 0, got {stage}")
        stage, folder = stage % count, path
        path = folder / f"stage{stage}-{'best' if best else 'last'}.safetensors"
        if not path.exists():
            begun = (folder / f"stage{stage}-best.safetensors").exists()
            rest = "its best epoch so far is there (--best)" if begun else "no epoch of it is"
            raise RunError(f"{folder}: stage.{stage} is not finished; {rest}")
    weights, about = runs.load_weights(path)
    with runs.reading(path):
        recipe = recipes.read(about.pop("recipe"))
        if absent := {"stage", "epoch", "test_accuracy"} - about.keys():
            raise KeyError(*sorted(absent))
        folded = about.pop("folded", False)

        def make() -> torch.nn.Module:
            model = recipe.make_model(about["stage"], about["classes"], about["shape"])
            return fold(model) if folded else model

        with torch.device("meta"):
            model = make()
        if (wanted := _shapes(model.state_dict())) != _shapes(weights):
            differing = sorted(dict(wanted.items() ^ _shapes(weights).items()))
            raise ValueError(f"its weights are not those of its network: {', '.join(differing)}")
        model = make()
        model.load_state_dict(weights)
    return Restored(model, recipe, about)


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}
