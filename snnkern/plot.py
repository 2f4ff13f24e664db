"""Pictures of a comparison: accuracy over epochs, over the number of steps at test time, and at single steps."""

from __future__ import annotations

import json
from pathlib import Path

from .compare import TEST_STEPS
from .runs import RunError, read_metrics

__all__ = ["plot"]

# Blue and vermilion of Okabe and Ito; the marker repeats what the colour says.
STYLES = {"sdt": {"color": "#0072B2", "marker": "o"}, "tet": {"color": "#D55E00", "marker": "s"}}


def plot(folder: str | Path) -> list[Path]:
    """Draws the three pictures of a finished ``compare`` into its folder, as PNG; returns their paths."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'snnkern[train]'") from error
    folder = Path(folder)
    path = folder / "results.json"
    if not path.exists():
        raise RunError(f"{path} is missing: {folder} is not the folder of a finished `snnkern train`")
    results = json.loads(path.read_text())
    matplotlib.use("Agg")
    style = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.dpi": 150,
        "figure.figsize": (6, 4),
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "grid.alpha": 0.3,
        "legend.framealpha": 0.9,
        "legend.edgecolor": "none",
        "lines.markersize": 5,
    }
    pictures = {"epochs": _epochs, "steps": _steps, "moments": _moments}
    with matplotlib.rc_context(style):
        return [_save(folder, name, draw, results) for name, draw in pictures.items()]


def _save(folder: Path, name: str, draw, results: dict) -> Path:
    from matplotlib import pyplot as plt

    seeds = len(results["seeds"])
    figure, axes = plt.subplots()
    draw(axes, results, folder)
    axes.set_ylabel("test accuracy, %")
    axes.legend(loc="lower right", title=f"mean and range of {seeds} seeds" if seeds > 1 else None, title_fontsize=9)
    path = folder / f"accuracy_{name}.png"
    figure.savefig(path)
    plt.close(figure)
    return path


def _epochs(axes, results: dict, folder: Path) -> None:
    settled = []
    for name in results["losses"]:
        folders = [folder / f"{name}-seed{seed}" for seed in results["seeds"]]
        runs = [[metrics["test_accuracy"] for metrics in read_metrics(place)] for place in folders]
        _line(axes, name, range(1, len(runs[0]) + 1), runs, marker="")
        settled += [100 * accuracy for run in runs for accuracy in run[len(run) // 4 :]]
    axes.set_ylim(bottom=min(settled) - 2)  # the climb from chance in the first epochs would squeeze all the rest
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", title=f"Training with T = {results['settings']['steps']}")


def _steps(axes, results: dict, folder: Path) -> None:
    steps = results["settings"]["steps"]
    at = sorted({*TEST_STEPS, steps})
    for name in results["losses"]:
        _line(axes, name, at, [[run["accuracy"][t - 1] for t in at] for run in _of(results, name)])
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, labels=map(str, at))
    axes.minorticks_off()
    _mark(axes, steps, "T in training")
    axes.set(xlabel="time steps T at test time", title=f"Trained with T = {steps}, tested with fewer and more steps")


def _moments(axes, results: dict, folder: Path) -> None:
    steps = results["settings"]["steps"]
    at = range(1, 2 * steps + 1)
    for name in results["losses"]:
        _line(axes, name, at, [run["moments"][: len(at)] for run in _of(results, name)])
    axes.xaxis.get_major_locator().set_params(integer=True)
    _mark(axes, steps, "last step in training")
    axes.set(xlabel="time step t", title="Prediction from the output of a single step, O(t)")


def _line(axes, name: str, x, runs: list[list[float]], **style) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    import numpy as np

    values = 100 * np.array(runs)
    style = STYLES[name] | style
    axes.plot(x, values.mean(0), label=name.upper(), **style)
    if len(runs) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def _mark(axes, x: float, text: str) -> None:
    axes.axvline(x, color="0.4", linestyle="--", linewidth=1, zorder=0)
    place = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "bottom", "rotation": 90}
    axes.annotate(text, (x, 0.03), xycoords=("data", "axes fraction"), color="0.3", fontsize=9, **place)


def _of(results: dict, name: str) -> list[dict]:
    return [run for run in results["runs"] if run["loss"] == name]
