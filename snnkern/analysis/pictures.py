"""Pictures of what the other modules find: each function takes their plain data and a path, and writes a PNG there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .energy import Energy
from .landscape import Landscape

__all__ = ["bars", "curves", "dots", "energy", "energy_curves", "landscapes", "scatter"]

# Okabe and Ito, told apart by every eye; the marker repeats what the colour says.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "lines.markersize": 4.5,
    "savefig.dpi": 150,
}


def curves(
    path: Path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    xlabel: str,
    ylabel: str,
    title: str,
    log: int | None = None,
    mark: tuple[float, str] | Sequence[tuple[float, str]] | None = None,
    ticks: Sequence[float] | None = None,
    floor: float | None = None,
) -> Path:
    """Lines, each the mean of its runs, with a band from the least to the greatest.

    Args:
        lines: label to (x, runs), each run as long as x.
        log: base of a logarithmic x axis.
        mark: (x, what is there), a dashed line, or several of them.
        ticks: on the x axis.
        floor: where the y axis begins.
    """

    def draw(figure):
        axes = figure.subplots()
        for i, (label, (x, runs)) in enumerate(lines.items()):
            means = [sum(values) / len(values) for values in zip(*runs, strict=True)]
            axes.plot(x, means, label=label, color=_of(COLOURS, i), marker=_of(MARKERS, i) if len(x) < 25 else "")
            if len(runs) > 1:
                lowest, highest = map(min, zip(*runs, strict=True)), map(max, zip(*runs, strict=True))
                lowest, highest = [*lowest], [*highest]
                axes.fill_between(x, lowest, highest, color=_of(COLOURS, i), alpha=0.15, linewidth=0)
                axes.plot(x, lowest, x, highest, linestyle="none")  # the legend keeps clear of lines, not of bands
        if log:
            axes.set_xscale("log", base=log)
            axes.minorticks_off()
        if ticks is not None:
            axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        elif not log:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if floor is not None:
            axes.set_ylim(bottom=floor)
        for place in [mark] if isinstance(mark, tuple) else mark or ():
            _mark(axes, *place)
        most = max(len(runs) for _, runs in lines.values())
        if len(lines) > 1 or most > 1:
            axes.legend(title=f"mean and range of {most} seeds" if most > 1 else None, title_fontsize=9)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)

    return _save(path, draw)


def energy_curves(path: Path, lines: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> Path:
    """Accuracy against energy: label to the rows of ``accuracy_over_energy``; numbers of steps are written beside."""

    def draw(figure):
        axes = figure.subplots()
        for i, (label, rows) in enumerate(lines.items()):
            x, y = [1e6 * row["joules"] for row in rows], [100 * row["accuracy"] for row in rows]
            axes.plot(x, y, label=label, color=_of(COLOURS, i), marker=_of(MARKERS, i))
            place = {"xytext": (0, -12 if i % 2 else 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            for at, row in zip(zip(x, y, strict=True), rows, strict=True):
                axes.annotate(f"{row['steps']:g}", at, color=_of(COLOURS, i), **place)
        axes.margins(y=0.1)
        if len(lines) > 1:
            axes.legend(loc="lower right")
        axes.set(xlabel="energy per sample, µJ (numbers: time steps T)", ylabel="test accuracy, %", title=title)

    return _save(path, draw)


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], ylabel: str, title: str) -> Path:
    """Numbers by layer, such as ``sparsity``: label to {layer: value}; groups stand side by side."""

    def draw(figure):
        axes = figure.subplots()
        layers = list(dict.fromkeys(layer for group in groups.values() for layer in group))
        width = 0.8 / len(groups)
        for i, (label, group) in enumerate(groups.items()):
            x = [j + (i - (len(groups) - 1) / 2) * width for j, layer in enumerate(layers) if layer in group]
            axes.bar(x, list(group.values()), width, label=label, color=_of(COLOURS, i))
        crowded = max(map(len, layers)) * len(layers) > 60
        turned = {"rotation": 90 if len(layers) > 12 else 40, "ha": "center" if len(layers) > 12 else "right"}
        axes.set_xticks(range(len(layers)), labels=layers, fontsize=8, **(turned if crowded else {}))
        axes.tick_params(axis="x", length=0)
        axes.grid(False, axis="x")
        if len(groups) > 1:
            axes.legend()
        axes.set(ylabel=ylabel, title=title)

    return _save(path, draw)


def dots(path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str, title: str) -> Path:
    """Label to {case: runs}: every run a dot, their mean a line, cases along the x axis; groups stand side by side."""

    def draw(figure):
        axes = figure.subplots()
        cases = list(dict.fromkeys(case for group in groups.values() for case in group))
        width = 0.6 / len(groups)
        for i, (label, group) in enumerate(groups.items()):
            for case, runs in group.items():
                x = cases.index(case) + (i - (len(groups) - 1) / 2) * width
                axes.plot([x] * len(runs), runs, _of(MARKERS, i), color=_of(COLOURS, i), alpha=0.4, markeredgewidth=0)
                average = [sum(runs) / len(runs)] * 2
                axes.plot([x - width / 3, x + width / 3], average, color=_of(COLOURS, i), linewidth=2, label=label)
                label = None  # once in the legend
        axes.set_xticks(range(len(cases)), labels=cases)
        axes.set_xlim(-0.6, len(cases) - 0.4)
        axes.grid(False, axis="x")
        if len(groups) > 1:
            axes.legend(title="dots: seeds, lines: mean", title_fontsize=9)
        axes.set(ylabel=ylabel, title=title)

    return _save(path, draw)


def scatter(
    path: Path, groups: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str
) -> Path:
    """Label to points (x, y)."""

    def draw(figure):
        axes = figure.subplots()
        for i, (label, points) in enumerate(groups.items()):
            axes.plot(*zip(*points, strict=True), _of(MARKERS, i), color=_of(COLOURS, i), alpha=0.6, label=label)
        if len(groups) > 1:
            axes.legend()
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)

    return _save(path, draw)


def energy(path: Path, found: Energy, title: str) -> Path:
    """Energy by layer, of the network and of the ANN, on a logarithmic scale."""

    def draw(figure):
        axes = figure.subplots()
        x = range(len(found.layers))
        spent = [1e-6 * (a.additions * found.add + a.multiplications * found.multiply) for a in found.layers]
        ann = [1e-6 * a.macs * (found.add + found.multiply) for a in found.layers]
        axes.bar([i - 0.2 for i in x], spent, 0.4, label=f"spiking, {1e6 * found.joules:.3g} µJ", color=COLOURS[0])
        axes.bar([i + 0.2 for i in x], ann, 0.4, label=f"ANN, {1e6 * found.ann_joules:.3g} µJ", color="#999999")
        axes.set_yscale("log")
        axes.set_xticks(x, labels=[a.name for a in found.layers], fontsize=8, rotation=40, ha="right")
        axes.tick_params(axis="x", length=0)
        axes.grid(False, axis="x")
        axes.set_ylim(top=3 * max(spent + ann))
        axes.legend(ncols=2, loc="upper right")
        axes.set(ylabel="energy per sample, µJ", title=title)

    return _save(path, draw)


def landscapes(path: Path, panels: Mapping[str, Landscape], loss: str | None = None) -> Path:
    """Contours of losses: a row per network (title to landscape), a column per loss, or ``loss`` alone.

    Levels grow with the square, so that a quadratic bowl has evenly spaced rings, and are shared within a column: of
    two minima, the one with fewer rings is the flatter.
    """
    names = list(next(iter(panels.values())).losses) if loss is None else [loss]

    def draw(figure):
        from matplotlib.colors import BoundaryNorm

        figure.set_size_inches(4.3 * len(names) + 0.4, 3.7 * len(panels))
        grid = figure.subplots(len(panels), len(names), squeeze=False, sharex=True, sharey=True)
        for column, name in enumerate(names):
            values = [v for found in panels.values() for row in found.losses[name] for v in row if math.isfinite(v)]
            lowest, highest = min(values), max(*values, min(values) + 1e-6)
            levels = [lowest + (highest - lowest) * (i / 14) ** 2 for i in range(15)]
            for row, (title, found) in enumerate(panels.items()):
                axes = grid[row][column]
                at = found.offsets, found.offsets, [*zip(*found.losses[name], strict=True)]
                filled = axes.contourf(*at, levels=levels, cmap="viridis", norm=BoundaryNorm(levels, 256))
                drawn = axes.contour(*at, levels=levels, colors="white", linewidths=0.6, alpha=0.7)
                axes.clabel(drawn, levels[::3], fmt="%.2g", fontsize=7)
                axes.plot(0, 0, "+", color="white", markersize=9)
                axes.grid(False)
                axes.set(title=f"{title}: {name}", aspect="equal")
                if row == len(panels) - 1:
                    axes.set_xlabel("first direction, filter norms")
                if column == 0:
                    axes.set_ylabel("second direction")
            bar = figure.colorbar(filled, ax=grid[:, column], shrink=0.8, label=name)
            bar.set_ticks(levels[::3], labels=[f"{level:.2g}" for level in levels[::3]])
        if len(panels) > 1:
            text = "Rings: the same losses in both rows, evenly spaced around a quadratic bowl; the fewer, the flatter."
            figure.supxlabel(text, fontsize=9)

    return _save(path, draw)


def _of(choices: Sequence, i: int):
    return choices[i % len(choices)]


def _mark(axes, x: float, text: str) -> None:
    axes.axvline(x, color="0.4", linestyle="--", linewidth=1, zorder=0)
    place = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "bottom", "rotation": 90}
    axes.annotate(text, (x, 0.03), xycoords=("data", "axes fraction"), color="0.3", fontsize=9, **place)


def _save(path: Path, draw: Callable) -> Path:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'snnkern[train]'") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4))
        draw(figure)
        figure.savefig(path)
    return Path(path)
