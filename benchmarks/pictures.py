"""Pictures of a result file."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from snnkern.files import replacing

from .report import made_by, number, size_of, split, steps_of

# After Okabe and Ito, told apart by every eye: a colour per library, a dash or a paler shade per variant of it.
COLOURS = {
    "snnkern": "#0072B2",
    "SpikingJelly": "#D55E00",
    "plain loop": "#777777",
    "compiled": "#E69F00",
    "snnTorch": "#009E73",
    "Norse LIFBoxCell": "#000000",
    "Norse": "#882255",
    "sinabs": "#CC79A7",
    "EXODUS": "#56B4E9",
    "ReLU twin": "#F0E442",
    "uniform": "#777777",
}
DASHES = ("-", "--", ":", "-.")
SPREAD = "Medians, and thin lines from the least to the greatest of the rounds."
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 12,
    "grid.alpha": 0.25,
    "lines.markersize": 4,
    "savefig.dpi": 150,
}


Bar = tuple[str, float, list[float]]  # a name, its value, and the least and the greatest if there are any
Picture = tuple[Figure, list[dict], bool]  # its rows, also those without a time; whether it shows a spread


def draw(content: dict, path: Path) -> list[Path]:
    """The pictures that the rows suffice for, beside ``path`` with its name and their own; returns their paths."""
    pictures = {
        "time-over-T": _over_t,
        "time-over-N": _over_n,
        "bandwidth": _bandwidth,
        "memory-over-T": _memory,
        "protocol": _protocol,
        "norm": _norm,
        "kept": _kept,
        "twin": _twin,
        "peak-memory": _peak,
        "mixed": _mixed,
        "models": _models,
        "time": _long_time,
        "memory": _long_memory,
    }
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, picture in pictures.items():
            if made := picture(content["rows"]):
                figure, rows, spread = made
                below = [*_reasons(rows), *[SPREAD] * spread, made_by(content["machine"])]
                below = [line for text in below for line in textwrap.wrap(text, int(17 * figure.get_figwidth()))]
                figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=7.5, color="#555555")
                drawn.append(path.with_name(f"{path.stem}-{name}.png"))
                with replacing(drawn[-1]) as file:
                    figure.savefig(file, format="png")
    return drawn


def _reasons(rows: list[dict]) -> Iterator[str]:
    """Why contenders have no time, or where they have none."""
    measured, told = {row["contender"] for row in rows if row["mode"]}, {}
    for (name, reason), some in split([row for row in rows if row["reason"]], "contender", "reason"):
        at = sorted({(row["T"], row["N"]) for row in some}) if name in measured else []
        places = " and ".join(f"T = {steps:,}, N = {neurons:,}" for steps, neurons in at)
        where = "" if not at else f" at {places}" if len(at) < 3 else " elsewhere"
        told.setdefault((where, reason), []).append(name)
    reasons = [f"{', '.join(names)}{where}: {reason}" for (where, reason), names in told.items()]
    if reasons:
        yield f"Not measured: {'; '.join(reasons)}."


def _over_t(rows: list[dict]) -> Picture | None:
    return _curves([("One LIF layer, N = 4,096, float32", _layer(rows, "both", N=4096, dtype="float32"))], "T")


def _over_n(rows: list[dict]) -> Picture | None:
    image = [row for row in _layer(rows, "both", T=4) if row["group"] == "image"]
    return _curves([(f"One LIF layer, T = 4, {dtype}", some) for (dtype,), some in split(image, "dtype")], "N")


def _memory(rows: list[dict]) -> Picture | None:
    chosen = _layer(rows, "both", N=4096, dtype="float32")
    panels = []
    for key, what in (("kept_bytes", "Kept for backward"), ("peak_bytes", "Peak beyond the inputs")):
        some = [row | {"MB": (row[key] or 0) / 1e6} for row in chosen if row[key] or row["reason"]]
        panels.append((f"{what}, N = 4,096, float32", some))
    return _curves(panels, "T", "MB")


def _protocol(rows: list[dict]) -> Picture | None:
    rows = [row | {"n": row["shape"][1]} for row in rows if row["op"] == "linear+lif"]
    panels = [
        (f"Linear(n, n) and LIF, {mode}, T = 500, batch 16", [row for row in rows if row["mode"] in (mode, None)])
        for mode in ("forward", "backward")
    ]
    return _curves(panels, "n")


def _layer(rows: list[dict], mode: str, **wanted) -> list[dict]:
    """With the contenders that have no time."""
    wanted |= {"op": "lif", "layout": "contiguous"}
    return [row for row in rows if row["mode"] in (mode, None) and all(row[k] == v for k, v in wanted.items())]


def _curves(panels: list[tuple[str, list[dict]]], x: str, y: str = "ms") -> Picture | None:
    """``y`` over ``x``, a line per contender, its name at the end; both axes logarithmic. None without two points."""
    panels = [(title, rows) for title, rows in panels if len({row[x] for row in rows if row["mode"]}) > 1]
    if not panels:
        return None
    figure = Figure(figsize=(1.8 + 5.6 * len(panels), 4.9))
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = [row for row in rows if row["mode"]]
        axes.set(title=title, xscale="log", yscale="log", xlabel={"T": "time steps T", "N": "neurons N", "n": "n"}[x])
        axes.set_ylabel("forward + backward, ms" if y == "ms" and rows[0]["mode"] == "both" else y)
        names = list(dict.fromkeys(row["contender"] for row in rows))
        lines = {name: {row[x]: row for row in rows if row["contender"] == name} for name in names}
        points = {name: {at: row[y] for at, row in sorted(line.items())} for name, line in lines.items()}
        for i, (name, line) in enumerate(points.items()):
            covers = sum(_coincide(line, points[other]) for other in names[i + 1 :])  # they are drawn over it
            look = _line(name, names) | {"linewidth": 1.5 + 2 * covers, "markersize": 4 + 2 * covers}
            axes.plot([*line], [*line.values()], marker="o", **look)
            if y == "ms":
                spread = zip(*((lines[name][at]["ms_min"], lines[name][at]["ms_max"]) for at in line), strict=True)
                axes.vlines([*line], *spread, color=look["color"], alpha=0.5, linewidth=1)
        ticks = sorted({row[x] for row in rows})
        axes.set_xticks(ticks, [f"$2^{{{math.log2(tick):g}}}$" if x == "N" else f"{tick:,}" for tick in ticks])
        _log_ticks(axes.yaxis)
        axes.minorticks_off()
        _name_ends(axes, [(*[*line.items()][-1], name) for name, line in points.items()])
    return figure, [row for _, rows in panels for row in rows], y == "ms"


def _coincide(line: dict[float, float], other: dict[float, float]) -> bool:
    """Whether one line hides the other between two points or more."""
    shared = [at for at in line if at in other]
    return len(shared) > 1 and all(abs(math.log(line[at] / other[at])) < 0.02 for at in shared)


def _log_ticks(axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 2.5 else (1,)))
    axis.set_major_formatter("{x:,g}")


def _line(name: str, names: list[str]) -> dict:
    library = next((key for key in COLOURS if name.startswith(key)), "plain loop")
    dash = DASHES[[other for other in names if other.startswith(library)].index(name) % len(DASHES)]
    return {"color": COLOURS[library], "linestyle": dash, "zorder": 3 if library == "snnkern" else 2}


def _name_ends(axes, ends: list[tuple[float, float, str]]) -> None:
    """Names of lines to the right of all, a line of text apart."""
    right, (low, high) = max(x for x, *_ in ends), [math.log10(limit) for limit in axes.get_ylim()]
    ends = sorted(ends, key=lambda end: end[1])
    places, apart = [math.log10(y) for _, y, _ in ends], 0.05 * (high - low)
    for _ in range(100):
        places[0], places[-1] = max(places[0], low), min(places[-1], high)
        for i in range(len(places) - 1):
            overlap = max(0, apart - (places[i + 1] - places[i]))
            places[i] -= overlap / 2
            places[i + 1] += overlap / 2
    for (x, y, name), place in zip(ends, places, strict=True):
        colour = _line(name, [name])["color"]
        lead = {"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 0}
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.05, 10**place),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops=None if x == right and abs(place - math.log10(y)) < apart / 4 else lead,
        )


def _bandwidth(rows: list[dict]) -> Picture | None:
    """Ours as a share of what a copy of x reaches in the same rounds."""
    ours = next((row["contender"] for row in rows if row["contender"].startswith("snnkern")), None)
    rows = [row for row in rows if row["contender"] == ours and row["percent_of_copy"]]
    rows = [row for row in rows if row["op"] == "lif" and row["group"] != "overhead"]
    panels = [(dtype, chosen) for (dtype,), chosen in split(rows, "dtype")]
    if not panels:
        return None
    modes = {
        "inference": ("inference", "o", "#0072B2"),
        "forward": ("forward, training", "^", "#009E73"),
        "backward": ("backward", "v", "#D55E00"),
    }
    figure = Figure(figsize=(2.5 + 4.5 * len(panels), 4.2))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (dtype, chosen) in zip(all_axes, panels, strict=True):
        for mode, (label, marker, colour) in modes.items():
            some = [row for row in chosen if row["mode"] == mode]
            mib = [row["T"] * row["N"] * (4 if dtype == "float32" else 2) / 2**20 for row in some]
            share = [row["percent_of_copy"] for row in some]
            axes.scatter(mib, share, marker=marker, color=colour, s=26, alpha=0.8, label=label)
        axes.axhline(100, color="#777777", linewidth=1)
        axes.set(title=f"{ours}, {dtype}", xscale="log", xlabel="size of x, MiB")
        _log_ticks(axes.xaxis)
        axes.minorticks_off()
    all_axes[0].set_ylim(bottom=0)
    all_axes[0].set_ylabel("bandwidth, % of that of a copy of x")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure, rows, False


def _norm(rows: list[dict]) -> Picture | None:
    """A group of bars per shape and layout, a bar per contender that has a time there."""
    rows = [row for row in rows if row["op"] == "bn+lif" and row["mode"] in ("both", None)]
    timed = [row | {"size": f"T = {steps_of(row)}, {row['layout']}\n{size_of(row)}"} for row in rows if row["mode"]]
    panels = [(dtype, split(chosen, "size")) for (dtype,), chosen in split(timed, "dtype")]
    if not panels or not all(row["over_ours"] for row in timed):
        return None
    names = list(dict.fromkeys(row["contender"] for row in timed))
    most = max(sum(len(some) + 1 for _, some in groups) for _, groups in panels)
    figure = Figure(figsize=(3 + 4.6 * len(panels), 1.6 + 0.19 * most))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (dtype, groups) in zip(all_axes, panels, strict=True):
        starts = [0, *accumulate(len(some) + 1 for _, some in groups)]
        for start, (_, some) in zip(starts, groups, strict=False):
            ours = next(row["ms"] for row in some if row["contender"] == names[0])
            for place, row in enumerate(some, start):
                spread = [row["ms_min"] / ours, row["ms_max"] / ours]
                _bar(axes, place, row["over_ours"], row["contender"], names, spread, 7)
        middles = [start + (len(some) - 1) / 2 for start, (_, some) in zip(starts, groups, strict=False)]
        axes.set_yticks(middles, [size for (size,), _ in groups], fontsize=8)
        axes.axvline(1, color="#777777", linewidth=1)
        axes.set(title=dtype, xlabel=f"times as long as {names[0]}", ylim=(most - 1, -1))
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    figure.suptitle("Batch norm and LIF, forward + backward")
    bars = {label: bar for axes in all_axes for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([bars[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=9)
    return figure, rows, True


def _kept(rows: list[dict]) -> Picture | None:
    rows = [row for row in rows if row["group"] == "chain"]
    kept = [row for row in rows if row["kept_bytes"] is not None]
    return _bars(
        [
            (
                f"Conv, batch norm, LIF, conv\nT = {steps}, {dtype}, {layout}",
                "kept for backward, bytes per element",
                [(row["contender"], row["kept_bytes"] / row["T"] / row["N"], []) for row in chosen],
            )
            for (steps, dtype, layout), chosen in split(kept, "T", "dtype", "layout")
        ],
        rows,
    )


def _twin(rows: list[dict]) -> Picture | None:
    """The spread is that of the times, over the median of the twin's."""
    rows = [row for row in rows if row["group"] == "twin"]
    twins = {row["dtype"]: row["ms"] for row in rows if row["contender"] == "ReLU twin"}

    def spread(row):
        return [row[key] / twins[row["dtype"]] for key in ("ms_min", "ms_max")]

    return _steps(rows, "over_twin", "times as long as with ReLU", spread)


def _peak(rows: list[dict]) -> Picture | None:
    rows = [row | {"MB": row["peak_bytes"] and row["peak_bytes"] / 1e6} for row in rows if row["group"] == "twin"]
    return _steps(rows, "MB", "peak memory of a step, MB")


def _mixed(rows: list[dict]) -> Picture | None:
    """The spread is that of the times, over the median of the first's."""
    rows = [row for row in rows if row["group"] == "mixed"]
    firsts = {size: some[0]["ms"] for size, some in split([row for row in rows if row["ms"]], "op", "dtype")}

    def spread(row):
        return [row[key] / firsts[row["op"], row["dtype"]] for key in ("ms_min", "ms_max")]

    return _steps(rows, "over_ours", "times as long as mixed", spread)


def _models(rows: list[dict]) -> Picture | None:
    rows = [row for row in rows if row["group"] == "models"]
    sequences = [row["op"] for row in rows if row["op"] == "SpikingMLP"]

    def spread(row):
        return [1e3 * row["shape"][0] / row[key] for key in ("ms_max", "ms_min")]

    return _steps(rows, "per_second", "images a second", spread, dict.fromkeys(sequences, "sequences a second"))


def _long_time(rows: list[dict]) -> Picture | None:
    return _curves(_of_long(rows), "T")


def _long_memory(rows: list[dict]) -> Picture | None:
    key = "peak memory, MB"
    known = [row | {key: row["peak_bytes"] / 1e6} for row in rows if row["peak_bytes"]]
    return _curves(_of_long(known), "T", key)


def _of_long(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """The networks that were measured over T."""
    rows = [row for row in rows if row["group"] == "longest" and row["mode"]]
    return [(f"A training step, {op}, batch {some[0]['shape'][0]}", some) for (op,), some in split(rows, "op")]


def _steps(
    rows: list[dict],
    key: str,
    what: str,
    spread: Callable[[dict], list[float]] = lambda row: [],
    others: dict | None = None,
) -> Picture | None:
    """Training steps, a panel per workload; ``others``: what ``key`` is called for other models."""
    panels = []
    for (op, steps, dtype, layout), chosen in split([row for row in rows if row[key]], "op", "T", "dtype", "layout"):
        title = f"{op}, T = {steps:,}, batch {chosen[0]['shape'][0]}\n{dtype}, {layout}"
        values = [(row["contender"], row[key], spread(row)) for row in chosen]
        panels.append((title, (others or {}).get(op, what), values))
    return _bars(panels, rows)


def _bars(
    panels: list[tuple[str, str, list[tuple[str, float, tuple[float, ...]]]]], rows: list[dict]
) -> Picture | None:
    """A bar per contender; panels are titles, what is measured, and names, values and their least and greatest."""
    if not panels:
        return None
    down = -(-len(panels) // 3)
    across = -(-len(panels) // down)
    most = max(len(values) for *_, values in panels)
    figure = Figure(figsize=(4.4 * across + 0.5, down * (1.5 + 0.34 * most)))
    all_axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (title, what, values) in zip(all_axes, panels, strict=False):
        names = [name for name, *_ in values]
        for place, (name, value, spread) in enumerate(values):
            _bar(axes, place, value, name, names, spread, 9)
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, xlabel=what)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.grid(axis="y", visible=False)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    return figure, rows, any(spread for *_, values in panels for *_, spread in values)


def _bar(axes, place: float, value: float, name: str, names: list[str], spread: list[float], size: int) -> None:
    """A bar in the colour of its library, paler for every other variant of it, with its number and its spread."""
    colour = _line(name, names)["color"]
    alike = [other for other in names if _line(other, names)["color"] == colour]
    axes.barh(place, value, 0.9, color=colour, alpha=0.6 ** alike.index(name), label=name)
    if spread:
        axes.plot(spread, [place, place], color="#222222", linewidth=1, solid_capstyle="butt")
    axes.annotate(
        number(value), (max([value, *spread]), place), (3, 0), textcoords="offset points", va="center", fontsize=size
    )
