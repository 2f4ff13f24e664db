"""Pictures of what the other modules find: each function takes their plain data and a path, and writes a PNG there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..files import replacing
from ..surrogate import Surrogate
from .energy import Energy, joules
from .landscape import Landscape

__all__ = ["bars", "curves", "dots", "energy", "energy_curves", "epochs", "landscapes", "scatter", "surrogates"]

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
    zoom: float | None = None,
    each: str = "seeds",
) -> Path:
    """Lines, each the mean of its runs, with a band from the least to the greatest.

    Args:
        lines: label to (x, runs), each run as long as x.
        log: base of a logarithmic x axis.
        mark: (x, what is there), a dashed line, or several of them.
        ticks: on the x axis.
        floor: where the y axis begins.
        zoom: draws everything twice, once with its end alone: what is left of this x would squeeze it.
        each: what the runs are.
    """
    marks = [mark] if isinstance(mark, tuple) else mark or ()

    def panel(axes, start: float):
        for i, (label, (x, runs)) in enumerate(lines.items()):
            shown = [j for j, at in enumerate(x) if at >= start]
            x, runs = [x[j] for j in shown], [[run[j] for j in shown] for run in runs]
            axes.plot(x, _means(runs), label=label, color=_of(COLOURS, i), marker=_of(MARKERS, i) * (len(x) < 25))
            if len(runs) > 1:
                lowest, highest = map(min, zip(*runs, strict=True)), map(max, zip(*runs, strict=True))
                axes.fill_between(x, [*lowest], [*highest], color=_of(COLOURS, i), alpha=0.15, linewidth=0)
        if log:
            axes.set_xscale("log", base=log)
            axes.minorticks_off()
        places = {at for x, _ in lines.values() for at in x}
        if ticks is not None or len(places) == 1:
            at = places if ticks is None else ticks
            axes.set_xticks([*at], labels=[f"{tick:g}" for tick in at])
        elif not log:
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if floor is not None:
            axes.set_ylim(floor, floor + 1.05 * (axes.get_ylim()[1] - floor))
        for at, text in marks:
            if at >= start:
                _mark(axes, at, text)
        axes.set(xlabel=xlabel)

    def draw(figure):
        if zoom is None:
            panels = [figure.subplots()]
        else:
            figure.set_figwidth(9.6)
            panels = figure.subplots(1, 2)
            panel(panels[1], zoom)
            panels[1].set(title=f"From {xlabel} {zoom:g} on")
        panel(panels[0], -math.inf)
        panels[0].set(ylabel=ylabel, title=title)
        _legend(figure, panels[0], _seeds([len(runs) for _, runs in lines.values()], each))

    return _save(path, draw)


def epochs(
    path: Path, panels: Mapping[str, tuple[Mapping[str, Sequence[Sequence[float]]], Mapping[str, float]]]
) -> Path:
    """Test accuracies in % over the epochs, two panels a row: title to (label to runs, what others reach by name).

    Lines are the mean of their runs, with a band from the least to the greatest; what others reach is dashed.
    """

    def draw(figure):
        down = -(-len(panels) // 2)
        figure.set_size_inches(9.6, 3.4 * down)
        axes = list(figure.subplots(down, 2, squeeze=False).flat)
        for place, (title, (lines, others)) in zip(axes, panels.items(), strict=False):
            for i, (label, runs) in enumerate(lines.items()):
                x = range(1, len(runs[0]) + 1)
                place.plot(x, _means(runs), label=label, color=_of(COLOURS, i))
                lowest, highest = map(min, zip(*runs, strict=True)), map(max, zip(*runs, strict=True))
                place.fill_between(x, [*lowest], [*highest], color=_of(COLOURS, i), alpha=0.12, linewidth=0)
            for name, level in others.items():
                place.axhline(level, color="0.4", linestyle="--", linewidth=1, zorder=0)
                at = {"xytext": (-2, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8, "color": "0.3"}
                place.annotate(name, (1, level), xycoords=("axes fraction", "data"), **at)
            place.set(title=title, xlabel="epoch", ylabel="test accuracy, %", ylim=(None, 105))
        for place in axes[len(panels) :]:
            place.remove()
        counts = [len(runs) for lines, _ in panels.values() for runs in lines.values()]
        _legend(figure, axes[0], _seeds(counts))

    return _save(path, draw)


def energy_curves(path: Path, lines: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], title: str) -> Path:
    """Accuracy against energy: label to runs, each the rows of ``accuracy_over_energy``, at the same numbers of steps,
    which are written beside. The mean of the runs, and bars from the least to the greatest."""

    def draw(figure):
        axes = figure.subplots()
        for i, (label, runs) in enumerate(lines.items()):
            x = [1e6 * joules for joules in _means([[row["joules"] for row in rows] for rows in runs])]
            accuracies = [[100 * row["accuracy"] for row in rows] for rows in runs]
            y = _means(accuracies)
            lowest = [mean - min(values) for mean, values in zip(y, zip(*accuracies, strict=True), strict=True)]
            highest = [max(values) - mean for mean, values in zip(y, zip(*accuracies, strict=True), strict=True)]
            spread = {"yerr": [lowest, highest], "capsize": 2, "elinewidth": 0.8} if len(runs) > 1 else {}
            axes.errorbar(x, y, label=label, color=_of(COLOURS, i), marker=_of(MARKERS, i), **spread)
            place = {"xytext": (5, -10 if i % 2 else 4), "textcoords": "offset points", "fontsize": 8}
            for at, row in zip(zip(x, y, strict=True), runs[0], strict=True):
                axes.annotate(f"{row['steps']:g}", at, color=_of(COLOURS, i), **place)
        axes.margins(y=0.1)
        _legend(figure, axes, _seeds([*map(len, lines.values())]))
        axes.set(xlabel="energy per sample, µJ (numbers: time steps T)", ylabel="test accuracy, %", title=title)

    return _save(path, draw)


def scatter(path: Path, groups: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str):
    """A dot (x, y) for every run of every label, and beside the label how x and y correlate over its runs."""

    def draw(figure):
        axes = figure.subplots()
        for i, (label, points) in enumerate(groups.items()):
            x, y = zip(*points, strict=True)
            varied = len(points) > 2 and len(set(x)) > 1 and len(set(y)) > 1
            label += f", r = {statistics.correlation(x, y):.2f}" if varied else ""
            axes.plot(x, y, _of(MARKERS, i), color=_of(COLOURS, i), alpha=0.7, label=label.lstrip(", "))
        _legend(figure, axes)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)

    return _save(path, draw)


def surrogates(path: Path, chosen: Mapping[str, Surrogate], threshold: float = 1.0) -> Path:
    """What stands for the spike in backward, and what that is the derivative of, over the potential.

    Of ``Dspike`` at several temperatures: figure 3 of Li et al., NeurIPS 2021.
    """

    def draw(figure):
        figure.set_figwidth(9.6)
        forward, backward = figure.subplots(1, 2)
        v = torch.linspace(-threshold, 3 * threshold, 4001, dtype=torch.float64)
        forward.plot(v, (v > threshold).double(), color="0.6", label="spike")
        for i, (label, surrogate) in enumerate(chosen.items()):
            forward.plot(v, surrogate.primitive(v - threshold), color=_of(COLOURS, i), label=label)
            backward.plot(v, surrogate.grad(v - threshold), color=_of(COLOURS, i))
        _legend(figure, forward)
        forward.set(xlabel="potential v", title="Forward")
        backward.set(xlabel="potential v", title="Backward: the derivative")

    return _save(path, draw)


def bars(
    path: Path,
    groups: Mapping[str, Mapping[str, float | Sequence[float]]],
    ylabel: str,
    title: str,
    log: bool = False,
) -> Path:
    """Numbers by layer, such as ``sparsity``: label to {layer: value}, or to {layer: values of seeds}, drawn as their
    mean and a line from the least to the greatest; groups stand side by side. ``log``: the y axis is logarithmic."""
    groups = {
        label: {layer: value if isinstance(value, Sequence) else [value] for layer, value in group.items()}
        for label, group in groups.items()
    }

    def draw(figure):
        axes = figure.subplots()
        layers = list(dict.fromkeys(layer for group in groups.values() for layer in group))
        width = 0.8 / len(groups)
        for i, (label, group) in enumerate(groups.items()):
            x = [j + (i - (len(groups) - 1) / 2) * width for j, layer in enumerate(layers) if layer in group]
            runs = [group[layer] for layer in layers if layer in group]
            y = [statistics.mean(values) for values in runs]
            axes.bar(x, y, width, label=label, color="#999999" if label.startswith("ANN") else _of(COLOURS, i))
            axes.vlines(x, [*map(min, runs)], [*map(max, runs)], color="0.2", linewidth=0.8)
        crowded = max(map(len, layers)) * len(layers) > 60
        turned = {"rotation": 90 if len(layers) > 12 else 40, "ha": "center" if len(layers) > 12 else "right"}
        axes.set_xticks(range(len(layers)), labels=layers, fontsize=8, **(turned if crowded else {}))
        axes.tick_params(axis="x", length=0)
        axes.grid(False, axis="x")
        if log:
            axes.set_yscale("log")
        _legend(figure, axes, _seeds([len(values) for group in groups.values() for values in group.values()]))
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
        _legend(figure, axes, "dots: seeds, lines: mean")
        axes.set(ylabel=ylabel, title=title)

    return _save(path, draw)


def energy(path: Path, found: Mapping[str, Energy], title: str) -> Path:
    """Energy by layer, of networks by label, and beside each of another size that of its ANN; logarithmic."""
    groups, anns = {}, {}
    for label, each in found.items():
        if each.rates:
            groups[f"{label or 'spiking'}, {1e6 * each.joules:.3g} µJ"] = {
                layer.name: 1e6 * joules(layer.additions, layer.multiplications, each.add, each.multiply)
                for layer in each.layers
            }
        ann = {layer.name: 1e6 * joules(layer.macs, layer.macs, each.add, each.multiply) for layer in each.layers}
        if ann not in anns.values():
            anns[f"ANN{f' of {label}' if anns else ''}, {1e6 * each.ann_joules:.3g} µJ"] = ann
    return bars(path, groups | anns, "energy per sample, µJ", title, log=True)


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
        note = (
            "Levels: least loss of the column + range * (i / 14)², i = 0, 1, ... 14:\n"
            "a quadratic bowl has evenly spaced rings. The same within a column:\n"
            "of two minima there, the one with fewer rings is the flatter."
        )
        figure.supxlabel(note, fontsize=8)

    return _save(path, draw)


def _means(runs: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*runs, strict=True)]


def _seeds(counts: Sequence[int], each: str = "seeds") -> str | None:
    least, most = min(counts), max(counts)
    return None if most == 1 else f"mean and range of {most if least == most else f'{least} to {most}'} {each}"


def _legend(figure, axes, title: str | None = None) -> None:
    """Below the axes, where it covers no line and no band; nothing where nothing has a label and there is no title."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels and title is None:
        return
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 11 / (max(map(len, labels), default=0) + 6))))
    rows = -(-len(labels) // columns) + (title is not None)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    options = {"ncols": columns, "title": title, "title_fontsize": 9, "fontsize": 9}
    figure.legend(handles, labels, loc="outside lower center", **options)


def _of(choices: Sequence, i: int):
    return choices[i % len(choices)]


def _mark(axes, x: float, text: str) -> None:
    axes.axvline(x, color="0.4", linestyle="--", linewidth=1, zorder=0)
    place = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "bottom", "rotation": 90}
    axes.annotate(text, (x, 0.03), xycoords=("data", "axes fraction"), color="0.3", fontsize=9, **place)


def matplotlib():
    """The package, or how to get it."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'snnkern[train]'") from error
    return matplotlib


def _save(path: Path, draw: Callable) -> Path:
    with matplotlib().rc_context(STYLE):
        figure = matplotlib().figure.Figure(figsize=(6.4, 4))
        draw(figure)
        with replacing(Path(path)) as file:
            figure.savefig(file, format="png")
    return Path(path)
