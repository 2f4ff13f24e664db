"""What a training shows while it runs."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text
from torch import nn

from .folder import State
from .recipe import Recipe

__all__ = ["Show", "Watch"]


class Watch:
    """What looks on while a recipe trains. Costs are those of ``Recipe.cost``: passes over the samples times T."""

    interval = 0.5  # seconds between two calls of ``step``

    def start(self, recipe: Recipe, folder: Path, cost: float) -> None:
        """Training starts, or goes on where it had this cost."""

    def step(self, recipe: Recipe, state: State, cost: float, numbers: dict[str, float]) -> None:
        """A step is done, or some passes of a search; ``numbers`` are those of the epoch under way."""

    def measure(self, recipe: Recipe, metrics: dict, model: nn.Module) -> dict:
        """An epoch is done: what this finds on the network, which it leaves as it is, joins its line of metrics (as
        JSON). Only the first process is asked."""
        return {}

    def epoch(self, recipe: Recipe, metrics: dict, cost: float) -> None:
        """An epoch is done and on disk."""


class Show(Watch):
    """Several runs, one after another: a line for every epoch or, with ``brief``, for every run; and in a terminal a
    bar for all of them and what the step under way gives.

    ``total``: the cost of all runs.
    """

    def __init__(self, total: float, brief: bool = False, console: Console | None = None) -> None:
        self.total, self.brief, self.console = total, brief, console or Console()
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:.0f} %"))
        self.task, self.line = self.bar.add_task("", total=total), Text(no_wrap=True, overflow="ellipsis")
        self.live = Live(Group(self.bar, self.line), console=self.console, transient=True)
        self.began = time.monotonic()
        self.done = self.skipped = 0.0  # the cost of finished runs; what was done before we looked on

    def __enter__(self) -> Show:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error) -> None:
        with suppress(OSError):
            self.live.stop()

    def start(self, recipe: Recipe, folder: Path, cost: float) -> None:
        self.name = str(folder)
        self.skipped += cost
        if cost >= recipe.total_cost:
            self.done += recipe.total_cost
        if cost:
            self._say(f"goes on after {100 * cost / recipe.total_cost:.0f} %")

    def step(self, recipe: Recipe, state: State, cost: float, numbers: dict[str, float]) -> None:
        self._show(_place(recipe, state.stage, state.epoch + 1), cost, numbers)

    def epoch(self, recipe: Recipe, metrics: dict, cost: float) -> None:
        place = _place(recipe, metrics["stage"], metrics["epoch"])
        ended = cost >= recipe.total_cost
        numbers = {k: v for k, v in metrics.items() if k != "passes"} | {"accuracy": metrics["train_accuracy"]}
        self._show(place, cost, numbers)
        if ended:
            self.done += recipe.total_cost
            cost = 0.0
        if ended or not self.brief:
            self._say(f"{place}: {_text(numbers)}, left {self._left(cost)}")

    def _say(self, text: str) -> None:
        with suppress(OSError):  # where nobody reads any more, training goes on
            self.console.print(f"{self.name}: {text}", highlight=False)

    def _show(self, place: str, cost: float, numbers: dict[str, float]) -> None:
        self.bar.update(self.task, completed=self.done + cost, description=place)
        self.line.plain = f"{self.name}: left {self._left(cost)}, {_text(numbers)}"

    def _left(self, cost: float) -> str:
        done = self.done + cost
        ours = done - self.skipped
        seconds = (time.monotonic() - self.began) * (self.total - done) / ours if ours > 0 else None
        return (
            "?" if seconds is None else f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f}:{seconds % 60 // 1:02.0f}"
        )


def _place(recipe: Recipe, stage: int, epoch: int) -> str:
    current = recipe.stage[stage]
    which = f"stage.{stage}, " if len(recipe.stage) > 1 else ""
    return f"{which}{current.network} T={current.steps}, epoch {epoch}/{current.epochs}"


def _text(numbers: dict[str, float]) -> str:
    """What there is of the numbers, in one order."""
    forms = {
        "search": lambda v: f"temperature search {100 * v:.0f} %",
        "differences": lambda v: f"finite differences {100 * v:.0f} %",
        "loss": lambda v: f"loss {v:.3f}",
        "accuracy": lambda v: f"train {100 * v:.1f} %",
        "test_accuracy": lambda v: f"test {100 * v:.1f} %",
        "b": lambda v: f"b {v:.1f}",
        "passes": lambda v: f"passes {', '.join(f'T {t:.1f} in {1000 * seconds:.0f} ms' for t, seconds in v)}",
        "mean_t": lambda v: f"mean T {v:.2f}",
        "images_per_second": lambda v: f"{v:,.0f} images/s",
        "memory": lambda v: f"{v:.2f} GiB",
    }
    return ", ".join(form(numbers[name]) for name, form in forms.items() if name in numbers)
