"""Pictures of a result file."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .report import number, size_of, split, steps_of

# Okabe and Ito, told apart by every eye: a colour per library, a dash per variant of it.
COLOURS = {
    "snnkern": "#0072B2",
    "SpikingJelly": "#D55E00",
    "plain loop": "#777777",
    "compiled": "#E69F00",
    "snnTorch": "#009E73",
    "Norse": "#000000",
    "sinabs": "#CC79A7",
    "EXODUS": "#56B4E9",
    "ReLU twin": "#F0E442",
}
DASHES = ("-", "--", ":", "-.")
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
        "models": _models,
    }
    drawn, rows = [], [row for row in content["rows"] if row["mode"]]
    with matplotlib.rc_context(STYLE):
        for name, picture in pictures.items():
            if figure := picture(rows):
                figure.supxlabel(content["machine"]["device"], fontsize=8, color="#555555")
                drawn.append(path.with_name(f"{path.stem}-{name}.png"))
                figure.savefig(drawn[-1])
    return drawn


def _over_t(rows: list[dict]) -> Figure | None:
    return _curves([("One LIF layer, N = 4,096, float32", _layer(rows, "both", N=4096, dtype="float32"))], "T")


def _over_n(rows: list[dict]) -> Figure | None:
    image = [row for row in _layer(rows, "both", T=4) if row["group"] == "image"]
    return _curves([(f"One LIF layer, T = 4, {dtype}", some) for (dtype,), some in split(image, "dtype")], "N")


def _memory(rows: list[dict]) -> Figure | None:
    chosen = _layer(rows, "both", N=4096, dtype="float32")
    panels = []
    for key, what in (("kept_bytes", "Kept for backward"), ("peak_bytes", "Peak beyond the inputs")):
        title = f"{what}, N = 4,096, float32"
        panels.append((title, [row | {"MB": row[key] / 1e6} for row in chosen if row[key]]))
    return _curves(panels, "T", "MB")


def _protocol(rows: list[dict]) -> Figure | None:
    panels = []
    for mode in ("forward", "backward"):
        some = [row | {"n": row["shape"][1]} for row in rows if row["op"] == "linear+lif" and row["mode"] == mode]
        panels.append((f"Linear(n, n) and LIF, {mode}, T = 500, batch 16", some))
    return _curves(panels, "n")


def _layer(rows: list[dict], mode: str, **wanted) -> list[dict]:
    wanted |= {"op": "lif", "mode": mode, "layout": "contiguous"}
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def _curves(panels: list[tuple[str, list[dict]]], x: str, y: str = "ms") -> Figure | None:
    """``y`` over ``x``, a line per contender, its name at the end; both axes logarithmic. None without two points."""
    panels = [(title, rows) for title, rows in panels if len({row[x] for row in rows}) > 1]
    if not panels:
        return None
    figure = Figure(figsize=(1.8 + 5.6 * len(panels), 4.6))
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(title=title, xscale="log", yscale="log", xlabel={"T": "time steps T", "N": "neurons N", "n": "n"}[x])
        axes.set_ylabel("forward + backward, ms" if y == "ms" and rows[0]["mode"] == "both" else y)
        names, ends = list(dict.fromkeys(row["contender"] for row in rows)), []
        for (name,), chosen in split(rows, "contender"):
            points = sorted({row[x]: row[y] for row in chosen}.items())
            axes.plot(*zip(*points, strict=True), marker="o", **_line(name, names))
            ends.append((*points[-1], name))
        ticks = sorted({row[x] for row in rows})
        axes.set_xticks(ticks, [f"$2^{{{math.log2(tick):g}}}$" if x == "N" else f"{tick:,}" for tick in ticks])
        _log_ticks(axes.yaxis)
        axes.minorticks_off()
        _name_ends(axes, ends)
    return figure


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
    right, (low, high) = max(x for x, *_ in ends), map(math.log10, axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    places, apart = [math.log10(y) for _, y, _ in ends], 0.05 * (high - low)
    for _ in range(100):
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


def _bandwidth(rows: list[dict]) -> Figure | None:
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
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.2))
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
    all_axes[0].legend(frameon=False, fontsize=9)
    return figure


def _norm(rows: list[dict]) -> Figure | None:
    """A group of bars per shape, a bar per contender."""
    rows = [row for row in rows if row["op"] == "bn+lif" and row["mode"] == "both" and row["over_ours"]]
    rows = [row | {"size": f"T = {steps_of(row)}\n{size_of(row)}"} for row in rows]
    panels = list(split(rows, "dtype", "layout"))
    if not panels:
        return None
    names = list(dict.fromkeys(row["contender"] for row in rows))
    most = max(len(split(chosen, "size")) for _, chosen in panels)
    figure = Figure(figsize=(2 + 3.6 * len(panels), 1.6 + 0.16 * most * (len(names) + 1)))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((dtype, layout), chosen) in zip(all_axes, panels, strict=True):
        sizes = list(dict.fromkeys(row["size"] for row in chosen))
        thick = 1 / (len(names) + 1)
        for i, name in enumerate(names):
            some = [row for row in chosen if row["contender"] == name]
            if not some:  # else bars of no colour would be the ones in the legend
                continue
            places = [sizes.index(row["size"]) + i * thick for row in some]
            bars = axes.barh(places, [row["over_ours"] for row in some], thick, **_bar(name, names))
            axes.bar_label(bars, [number(row["over_ours"]) for row in some], padding=2, fontsize=7)
        axes.set_yticks([i + (len(names) - 1) / 2 * thick for i in range(len(sizes))], sizes, fontsize=8)
        axes.axvline(1, color="#777777", linewidth=1)
        axes.set(title=f"{dtype}, {layout}", xlabel=f"times as long as {names[0]}", ylim=(most - thick, -thick))
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    figure.suptitle("Batch norm and LIF, forward + backward")
    bars = {label: bar for axes in all_axes for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([bars[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _kept(rows: list[dict]) -> Figure | None:
    rows = [row for row in rows if row["group"] == "chain" and row["kept_bytes"] is not None]
    return _bars(
        [
            (
                f"Conv, batch norm, LIF, conv\nT = {steps}, {dtype}, {layout}",
                "kept for backward, bytes per element",
                [(row["contender"], row["kept_bytes"] / row["T"] / row["N"]) for row in chosen],
            )
            for (steps, dtype, layout), chosen in split(rows, "T", "dtype", "layout")
        ]
    )


def _twin(rows: list[dict]) -> Figure | None:
    return _steps([row for row in rows if row["group"] == "twin"], "over_twin", "times as long as with ReLU")


def _peak(rows: list[dict]) -> Figure | None:
    rows = [row | {"MB": (row["peak_bytes"] or 0) / 1e6} for row in rows if row["group"] == "twin"]
    return _steps(rows, "MB", "peak memory of a step, MB")


def _models(rows: list[dict]) -> Figure | None:
    rows = [row for row in rows if row["group"] == "models"]
    sequences = [row["op"] for row in rows if row["op"] == "SpikingMLP"]
    return _steps(rows, "per_second", "images a second", dict.fromkeys(sequences, "sequences a second"))


def _steps(rows: list[dict], key: str, what: str, others: dict | None = None) -> Figure | None:
    """Training steps, a panel per workload; ``others``: what ``key`` is called for other models."""
    panels = []
    for (op, steps, dtype, layout), chosen in split([row for row in rows if row[key]], "op", "T", "dtype", "layout"):
        title = f"{op}, T = {steps}, batch {chosen[0]['shape'][0]}\n{dtype}, {layout}"
        panels.append((title, (others or {}).get(op, what), [(row["contender"], row[key]) for row in chosen]))
    return _bars(panels)


def _bars(panels: list[tuple[str, str, list[tuple[str, float]]]], across: int = 3) -> Figure | None:
    """A bar per contender; panels are titles, what is measured, and the values by name."""
    if not panels:
        return None
    down, across = -(-len(panels) // across), min(across, len(panels))
    most = max(len(values) for *_, values in panels)
    figure = Figure(figsize=(4.4 * across + 0.5, down * (1.3 + 0.34 * most)))
    all_axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (title, what, values) in zip(all_axes, panels, strict=False):
        names, lengths = zip(*values, strict=True)
        bars = axes.barh(names, lengths, color=[_line(name, names)["color"] for name in names])
        axes.bar_label(bars, [number(length) for length in lengths], padding=3, fontsize=9)
        axes.set(title=title, xlabel=what)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    return figure


def _bar(name: str, names: list[str]) -> dict:
    """The colour of a library, paler for every other variant of it."""
    colour = _line(name, names)["color"]
    alike = [other for other in names if _line(other, names)["color"] == colour]
    return {"color": colour, "alpha": 0.6 ** alike.index(name), "label": name}
