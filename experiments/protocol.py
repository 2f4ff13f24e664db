"""What the protocols are made of: trainings that are recipes, and what a claim says about the numbers, stated before.

All train on scikit-learn's digits made hard: pixel noise of standard deviation 0.4 and 600 training images, as without
the noise every method reaches 98 to 99 % and nothing can be told apart; where a protocol says *clean*, there is no
noise. Networks that are compared share the seed: split, noise, initial weights and order of the batches.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch.nn import ReLU

from snnkern.files import commit, versions, write_json
from snnkern.nn import IAF, LIF, SmoothLIF
from snnkern.train import fit
from snnkern.train.evaluation import restore
from snnkern.train.folder import claim, read_metrics
from snnkern.train.recipe import Recipe, load

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """A recipe of ``snnkern train``, and what has to be read back from its weights and metrics once it has run: the
    words of ``ran``. A run that turns out to be another is an error."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    wanted: str


@dataclass(frozen=True)
class Trained:
    folder: Path
    recipe: Recipe
    quick: bool = False

    def lines(self, stage: int = -1) -> list[dict]:
        """Of metrics, one per epoch of the stage."""
        stage %= len(self.recipe.stage)
        return [line for line in read_metrics(self.folder) if line["stage"] == stage]

    def accuracy(self, stage: int = -1) -> float:
        """On the test images after the last epoch, in percent."""
        return 100 * self.lines(stage)[-1]["test_accuracy"]

    def model(self, stage: int = -1) -> torch.nn.Module:
        return restore(self.folder, stage).model

    def images(self, part: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
        x, y = getattr(self.recipe.load_data(), part).tensors
        return (x[:60], y[:60]) if self.quick else (x, y)


@dataclass
class Work:
    """One seed's trainings, each done once for all protocols and kept in ``folder``.

    ``quick`` is a trial of the code: two epochs, a few images; its numbers say nothing.
    """

    folder: Path
    seed: int
    quick: bool = False
    used: list[str] = field(default_factory=list)  # names of the runs asked for

    def train(self, run: Run) -> Trained:
        folder = self.path(run.name)
        quick = ("stage.epochs=2", "data.train=60") if self.quick else ()
        fast = "device=cpu", "threads=1", "channels_last=true"
        recipe = load(run.recipe, (*run.overrides, f"seed={self.seed}", *fast, *quick))
        if not (folder / "ran.json").exists():
            started = time.process_time()
            fit(recipe, folder)
            about = {"ran": ran(folder), "seconds": time.process_time() - started, "commit": commit(HERE), **versions()}
            wanted = re.sub(r"\d+ (sdt|tet)[^;]*?, lr", r"2 \1, lr", run.wanted) if self.quick else run.wanted
            if about["ran"] != wanted:
                raise AssertionError(f"run {run.name} was to be\n  {wanted}\nand turned out to be\n  {about['ran']}")
            write_json(folder / "ran.json", about)
        claim(folder, recipe.settings())  # an error if it holds another
        self.used.append(run.name)
        return Trained(folder, recipe, self.quick)

    def path(self, name: str, suffix: str = "") -> Path:
        return self.folder / f"{name}-seed{self.seed}{'-quick' if self.quick else ''}{suffix}"


def ran(folder: Path) -> str:
    """What a finished run trained, read back from what it left behind: the shapes of its weights, a stage's network, T,
    losses and epochs from the lines of metrics, and the neurons of the network that its weights fit."""
    stages = []
    for index, part in groupby(read_metrics(folder), key=lambda line: line["stage"]):
        lines, model = list(part), restore(folder, index).model  # fails where the weights are of other shapes
        first, last, weights = lines[0], lines[-1], [p for p in model.parameters() if p.dim() > 1]
        layers = "-".join(f"{len(w)}C{w.shape[-1]}" if w.dim() == 4 else f"FC{w.shape[1]}" for w in weights)
        neurons = (module for module in model.modules() if isinstance(module, (LIF, SmoothLIF, IAF, ReLU)))
        neuron = next(neurons, type(model).__name__)
        losses = ", ".join(f"{len([*group])} {name}" for name, group in groupby(line["criterion"] for line in lines))
        falling = " falling" if last["lr"] < first["lr"] else ""
        steps = f"{last['steps']}{_mixed(lines)}"
        stages.append(f"{layers} of {neuron}, T = {steps}: {losses}, lr {first['lr']:g}{falling}")
    return "; ".join(stages)


def _mixed(lines: Sequence[dict]) -> str:
    """What the temporal configurations that a training drew have in common, from those that its epochs began with."""
    drawn = [t for line in lines for t in line.get("t", ())]
    if not drawn:
        return ""
    stages = len(drawn[0])
    shared = max(g for g in range(1, stages + 1)
                 if all(len({*t[i : i + g]}) == 1 for t in drawn for i in range(0, stages, g)))  # fmt: skip
    fixed = ", the first fixed" if stages > 1 and len({t[0] for t in drawn}) == 1 else ""
    falling = ", never growing" if shared < stages and all(t == sorted(t, reverse=True) for t in drawn) else ""
    return f", {lines[-1]['passes']} passes, t by {shared} of {stages} stages{fixed}{falling}"


@dataclass(frozen=True)
class Measure:
    """A number of every seed's result, and the bound that its mean over seeds is to keep.

    ``wanted``: (">" , "<", ">=", "=" or "within", bound); "within": not further from 0 than that.
    ``together``: ``of`` takes the results of all seeds at once, and its error is that of the jackknife.
    """

    name: str
    of: Callable[..., float]
    wanted: tuple[str, float] | None = None
    together: bool = False

    def kept(self, value: float) -> bool:
        return self.margin(value) > 0 or (self.margin(value) == 0 and self.wanted[0] in (">=", "=", "within"))

    def margin(self, value: float) -> float:
        """How far a value is on the right side of the bound."""
        sign, bound = self.wanted
        if sign == "=":
            return -abs(value - bound)
        return {"<": bound - value, "within": bound - abs(value)}.get(sign, value - bound)

    def judge(self, results: Sequence[dict]) -> dict:
        """Over seeds: values, mean and its standard error, and, if something is wanted, in how many seeds it is so and
        the state: it *holds* if the mean keeps the bound by more than two standard errors, is *within noise* if by
        less, and *does not show* if it does not keep it."""
        count = len(results)
        if self.together:
            values = [float(self.of([*results[:i], *results[i + 1 :]])) for i in range(count)] if count > 2 else []
            average = float(self.of(results))
            error = statistics.pstdev(values) * (count - 1) ** 0.5 if values else None
        else:
            values = [float(self.of(result)) for result in results]
            average = statistics.mean(values)
            error = statistics.stdev(values) / count**0.5 if count > 1 else None
        row = {"measure": self.name, "mean": average, "error": error, "values": values}
        if self.wanted is None:
            return row
        state = "does not show"
        if self.kept(average):
            state = "within noise" if error is None or 0 < self.margin(average) <= 2 * error else "holds"
        seeds = None if self.together else sum(map(self.kept, values))
        return {**row, "wanted": self.wanted, "seeds": seeds, "state": state}

    def check(self, results: Sequence[dict]) -> dict:
        """Of something that is so in every seed or is broken."""
        values = [float(self.of(result)) for result in results]
        worst = min(values, key=self.margin)
        return {"check": self.name, "worst": worst, "wanted": self.wanted, "kept": self.kept(worst)}


@dataclass(frozen=True)
class Protocol:
    """A claim, and what is to show it.

    Args:
        measures: the evidence, with bounds that were set before.
        checks: what is so by arithmetic or by construction, and says something about the code alone.
    """

    claim: str
    source: str
    setup: str
    run: Callable[[Work], dict]
    measures: Sequence[Measure]
    draw: Callable[[Path, list[dict]], Path]
    seeds: int = 12
    checks: Sequence[Measure] = ()

    @property
    def key(self) -> str:
        """Of the results, which protocols with one ``run`` share."""
        return self.run.__name__

    def unit(self, work: Work) -> None:
        """Runs one seed, if that has not been done."""
        path = work.path(self.key, ".json")
        if not path.exists():
            work.used.clear()
            result = self.run(work)
            about = {"seed": work.seed, "quick": work.quick, "commit": commit(HERE), "runs": sorted(set(work.used))}
            write_json(path, {**about, **versions(), "result": _short(result)})


def _short(value):
    """Numbers with six digits."""
    if isinstance(value, dict):
        return {str(key): _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def gain(*keys, of: Callable = lambda x: x, first: str = "SDT", second: str = "TET") -> Callable[[dict], float]:
    """result[second][keys...] - result[first][keys...], ``of`` either."""

    def difference(result: dict) -> float:
        ends = []
        for name in (second, first):
            value = result[name]
            for key in keys:
                value = value[key]
            ends.append(of(value))
        return ends[0] - ends[1]

    return difference
