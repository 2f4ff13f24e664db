"""Pictures of a run, and of a comparison of recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..analysis.pictures import curves
from .compare import run_folder
from .folder import RunError, read_metrics

__all__ = ["plot"]

ACCURACY = "test accuracy, %"


def plot(folder: str | Path) -> list[Path]:
    """Draws what a folder of ``snnkern train`` or ``compare`` holds, as PNG into that folder; returns the paths.

    A run has its losses and accuracies over the epochs, what it does at test time at every T and step, and Dspike's
    temperature if that was searched. A comparison, or several seeds, have their mean and range.
    """
    folder = Path(folder)
    if (folder / "results.json").exists():
        return _comparison(folder, json.loads((folder / "results.json").read_text()))
    if (folder / "metrics.jsonl").exists():
        return _run(folder, read_metrics(folder))
    raise RunError(f"{folder} has neither metrics.jsonl nor results.json: it holds no run with a finished epoch")


def _run(folder: Path, metrics: list[dict]) -> list[Path]:
    epochs = range(1, len(metrics) + 1)
    starts = [i for i in range(1, len(metrics)) if metrics[i]["stage"] != metrics[i - 1]["stage"]]
    ends = [*starts, len(metrics)]
    marks = [(end, f"{metrics[end - 1]['network']}, T = {metrics[end - 1]['steps']}") for end in ends] if starts else []
    switches = [
        (i, f"to {metrics[i]['criterion'].upper()}")
        for i in range(1, len(metrics))
        if i not in starts and metrics[i]["criterion"] != metrics[i - 1]["criterion"]
    ]

    def over(*keys: str, scale: float = 1.0) -> dict:
        names = {"loss": "training", "train_accuracy": "training", "test_accuracy": "test"}
        names |= {"test_sdt": "test, SDT", "test_tet": "test, TET"}
        return {names[key]: (epochs, [[scale * line[key] for line in metrics]]) for key in keys}

    marks += switches
    last = metrics[-1]
    title = f"{last['network'].upper()} trained with T = {last['steps']}"
    losses, accuracies = over("loss", "test_sdt", "test_tet"), over("train_accuracy", "test_accuracy", scale=100)
    drawn = [
        curves(folder / "loss.png", losses, "epoch", "loss", "Loss", mark=marks, floor=0.0),
        curves(folder / "accuracy.png", accuracies, "epoch", "accuracy, %", "Accuracy", mark=marks),
    ]
    if last["steps"] > 1:
        at = range(1, last["steps"] + 1)
        lines = {"mean of the first t steps": last["accuracy_over_steps"], "step t alone": last["moments"]}
        lines = {label: (at, [[100 * v for v in values]]) for label, values in lines.items()}
        path = folder / "accuracy_steps.png"
        drawn.append(curves(path, lines, "time step t", ACCURACY, title, ticks=at if len(at) <= 16 else None))
    searched = [(epoch, line["b"]) for epoch, line in zip(epochs, metrics, strict=True) if "b" in line]
    if searched:
        x, b = zip(*searched, strict=True)
        path = folder / "temperature.png"
        drawn.append(curves(path, {"": (x, [b])}, "epoch", "temperature b", "The temperature that the search chose",
                            mark=[mark for mark in marks if mark[0] >= x[0]]))  # fmt: skip
    return drawn


def _comparison(folder: Path, results: dict) -> list[Path]:
    names, at = results["names"], results["test_steps"]
    trained = {run["steps"] for run in results["runs"]}

    def lines(values: Callable[[dict], list[float]]) -> dict:
        found = {
            name: [[100 * v for v in values(run)] for run in results["runs"] if run["name"] == name] for name in names
        }
        return {name: (range(1, len(runs[0]) + 1), runs) for name, runs in found.items()}

    def epochs(run: dict) -> list[float]:
        place = run_folder(folder, run["name"], run["seed"], len(names))
        return [metrics["test_accuracy"] for metrics in read_metrics(place)]

    over = lines(epochs)
    # The climb from chance in the first epochs would squeeze all the rest.
    floor = min(v for _, runs in over.values() for run in runs for v in run[len(run) // 4 :]) - 2
    steps = {name: (at, runs) for name, (_, runs) in lines(lambda run: [run["accuracy"][t - 1] for t in at]).items()}
    moments = lines(lambda run: run["moments"][: 2 * max(trained)])
    mark = [(t, "T in training") for t in trained] if len(trained) == 1 and max(at) > 1 else None
    wide, title = max(at) > 16, "Tested with fewer and more steps"
    drawn = [curves(folder / "accuracy_epochs.png", over, "epoch", ACCURACY, "Training", floor=floor)]
    if max(at) > 1:
        x = "time steps T at test time"
        drawn += [
            curves(folder / "accuracy_steps.png", steps, x, ACCURACY, title, 2 if wide else None, mark, at),
            curves(folder / "accuracy_moments.png", moments, "time step t", ACCURACY,
                   "Prediction from the output of a single step, O(t)",
                   mark=[(t, "last step in training") for t in trained] if mark else None),
        ]  # fmt: skip
    return drawn
