"""Pictures of a run, and of several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from ..analysis.pictures import curves, scatter
from .compare import read_results, run_folder
from .folder import RunError, common, grouped, read_metrics

__all__ = ["plot"]

ACCURACY = "test accuracy, %"


def plot(*folders: str | Path, out: str | Path | None = None) -> list[Path]:
    """Draws what folders of ``snnkern train`` or ``compare`` hold, as PNG; returns the paths.

    A run has its losses and accuracies over the epochs, what it does at test time at every T and step, Dspike's
    temperature if that was searched, and the cosines with finite differences if those were probed. Several runs, of one
    folder or more, are drawn into the same pictures: mean and range over the seeds of each recipe.

    Args:
        out: folder of the pictures; default: the folder drawn, and of several ``plots`` in the one that holds them.
    """
    found = {label: [_read(run) for run in runs if _began(run)] for label, runs in grouped(folders).items()}
    found = {label: runs for label, runs in found.items() if runs}
    if not found:
        raise RunError(f"{', '.join(map(str, folders))}: there is no run with a finished epoch in it")
    out = Path(out or (folders[0] if len(folders) == 1 else common(folders) / "plots"))
    out.mkdir(parents=True, exist_ok=True)
    alone = len(folders) == 1 and (Path(folders[0]) / "metrics.jsonl").exists()
    return _run(out, next(iter(found.values()))[0].metrics) if alone else _several(out, found)


class _Run(NamedTuple):
    metrics: list[dict]
    at: list[int]  # T that were tested,
    accuracy: list[float]  # at 1, 2, ...
    moments: list[float]

    @property
    def steps(self) -> int:
        return self.metrics[-1]["steps"]


def _began(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and bool(read_metrics(run))


def _read(run: Path) -> _Run:
    """With what ``compare`` found at more T than those of training, if it came so far; time is nothing to an ANN."""
    metrics = read_metrics(run)
    for folder in run.parents[:2]:
        if (folder / "results.json").exists():
            results = read_results(folder)
            for tested in results["runs"]:
                if run_folder(folder, tested["name"], tested["seed"], len(results["names"])) == run:
                    at = results["test_steps"] if metrics[-1]["network"] == "snn" else [metrics[-1]["steps"]]
                    return _Run(metrics, at, tested["accuracy"], tested["moments"])
    last = metrics[-1]
    return _Run(metrics, [*range(1, last["steps"] + 1)], last["accuracy_over_steps"], last["moments"])


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
    if any("b" in line for line in metrics):
        drawn.append(_temperatures(folder, {"": [metrics]}, marks))
    probed = [(epoch, dict(line["probe"])) for epoch, line in zip(epochs, metrics, strict=True) if line.get("probe")]
    if probed:
        x, cosines = zip(*probed, strict=True)
        lines = {f"eps = {eps:g}": (x, [[found[eps] for found in cosines]]) for eps in cosines[0]}
        drawn.append(curves(folder / "similarity.png", lines, "epoch", "cosine", SIMILARITY))
    return drawn


SIMILARITY = "First layer: backward against finite differences"


def _several(folder: Path, found: Mapping[str, Sequence[_Run]]) -> list[Path]:
    def over(values: Callable[[_Run], Sequence[float]], at: Callable[[_Run], Sequence[float]] | None = None) -> dict:
        """Label to (x, runs), as long as the shortest run."""
        lines = {}
        for label, runs in found.items():
            rows = [[100 * v for v in values(run)] for run in runs]
            least = min(map(len, rows))
            lines[label] = ((at(runs[0]) if at else range(1, least + 1))[:least], [row[:least] for row in rows])
        return lines

    flat = [run for runs in found.values() for run in runs]
    trained, longest = sorted({run.steps for run in flat}), max(max(run.at) for run in flat)
    epochs = over(lambda run: [line["test_accuracy"] for line in run.metrics])
    most = max(len(run.metrics) for run in flat)
    path = folder / "accuracy_epochs.png"
    drawn = [curves(path, epochs, "epoch", ACCURACY, "Training", zoom=most // 4 + 1 if most >= 12 else None)]
    if longest > 1:
        x, title = "time steps T at test time", "Tested with fewer and more steps"
        log = 2 if longest > 16 else None
        ticks = sorted({t for run in flat for t in run.at})
        ticks = ticks if len(ticks) <= 10 else [2**i for i in range(longest.bit_length())] if log else None
        mark = [(t, "T in training") for t in trained] if len(trained) == 1 else None
        steps = over(lambda run: [run.accuracy[t - 1] for t in run.at], lambda run: run.at)
        moments = over(lambda run: run.moments[: min(2 * trained[-1], max(run.at))])
        drawn += [
            curves(folder / "accuracy_steps.png", steps, x, ACCURACY, title, log, mark, ticks),
            curves(folder / "accuracy_moments.png", moments, "time step t", ACCURACY,
                   "Prediction from the output of a single step, O(t)",
                   mark=[(t, "last step in training") for t in trained] if mark else None),
        ]  # fmt: skip
        if all(max(run.at) > run.steps for run in flat):
            grown = over(_growth, lambda run: [t for t in run.at if t >= run.steps])
            ticks = ticks and [t for t in ticks if t >= trained[0]]
            path, text = folder / "accuracy_growth.png", "accuracy over that at T of training, %"
            drawn.append(curves(path, grown, x, text, "Growth with more steps than in training", log, None, ticks))
        points = {label: [_moments_and_total(run) for run in runs if run.steps > 1] for label, runs in found.items()}
        points = {label: pairs for label, pairs in points.items() if pairs}
        if sum(map(len, points.values())) > 2:
            path, texts = folder / "accuracy_scatter.png", ("mean accuracy of single steps, %", "accuracy at T, %")
            drawn.append(scatter(path, points, *texts, "Single steps and all of them, T of training: a dot for a seed"))
    if any("b" in line for run in flat for line in run.metrics):
        drawn.append(_temperatures(folder, {label: [run.metrics for run in runs] for label, runs in found.items()}))
    probed = {label: [cosines for run in runs if (cosines := _cosines(run))] for label, runs in found.items()}
    lines = {label: ([*rows[0]], [[*row.values()] for row in rows]) for label, rows in probed.items() if rows}
    if lines:
        ticks = sorted({eps for at, _ in lines.values() for eps in at})
        drawn.append(curves(folder / "similarity.png", lines, "eps", "cosine", SIMILARITY, 10, None, ticks))
    return drawn


def _cosines(run: _Run) -> dict[float, float]:
    """By eps, from small to large: the mean over the epochs. Source: Li et al., NeurIPS 2021, figure 2."""
    probes = [dict(line["probe"]) for line in run.metrics if line.get("probe")]
    return {eps: mean(probe[eps] for probe in probes) for eps in sorted(probes[0])} if probes else {}


def _growth(run: _Run) -> list[float]:
    """Source: Deng et al., ICLR 2022, figure 8B, which does not say what it divides by."""
    start = run.accuracy[run.steps - 1]
    return [(run.accuracy[t - 1] - start) / start for t in run.at if t >= run.steps]


def _moments_and_total(run: _Run) -> tuple[float, float]:
    """Source: Deng et al., ICLR 2022, figure 7."""
    return 100 * mean(run.moments[: run.steps]), 100 * run.accuracy[run.steps - 1]


def _temperatures(folder: Path, found: Mapping[str, Sequence[list[dict]]], marks=()) -> Path:
    """Source: Li et al., NeurIPS 2021, figure 5. Every run has its own line: their mean would be that of none."""
    lines = {}
    for label, runs in found.items():
        for i, metrics in enumerate(runs):
            searched = [(epoch, line["b"]) for epoch, line in enumerate(metrics, 1) if "b" in line]
            if searched:
                x, b = zip(*searched, strict=True)
                name = ", ".join(part for part in (label, f"seed {i}" if len(runs) > 1 else "") if part)
                lines[name] = (x, [b])
    first = min(x[0] for x, _ in lines.values())
    marks = [mark for mark in marks if mark[0] >= first]
    title = "The temperature that the search chose"
    return curves(folder / "temperature.png", lines, "epoch", "temperature b", title, mark=marks)
