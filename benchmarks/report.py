"""The tables of a result file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import fmean

VERSIONS = (
    "snnkern",
    "torch",
    "cuda",
    "triton",
    "spikingjelly",
    "snntorch",
    "norse",
    "sinabs",
    "sinabs-exodus",
    "commit",
)

CALL_TIMES = (("ms", "over_one"), ("ms_mean", "mean_over_one"))  # and what they are relative to one thread's


def tables(content: dict) -> str:
    """Markdown: what ran where, the tables of each group, and why cells are empty."""
    parts = [f"{made_by(content['machine'])}."]
    for (group,), chosen in split(content["rows"], "group"):
        parts += [f"## {group}", *TABLES.get(group, _layer)(chosen)]
    return "\n\n".join([*parts, "## notes", "\n".join(_notes(content))]) + "\n"


def made_by(machine: dict) -> str:
    known = [f"{name} {machine[name]}" for name in VERSIONS if machine.get(name)]
    known += [f"{name} {value}" for name, value in machine["environment"].items()]
    return f"{machine['device']}: {', '.join(known)}; {machine['date']}"


def _layer(rows: list[dict]) -> Iterator[str]:
    for (dtype, layout), chosen in split(rows, "dtype", "layout"):
        yield f"Forward + backward, {dtype}, {layout}: ms and per cent of a copy's bandwidth; others: times as long"
        yield _grid(chosen, "both", _time)
        yield f"Memory, {dtype}, {layout}: bytes per element of x, kept for backward / at the peak"
        yield _grid(chosen, "both", _memory)


def _norm(rows: list[dict]) -> Iterator[str]:
    yield "Batch norm of y [T, N, C, H, W] and LIF; all but the first: PyTorch's batch norm, then the neurons"
    for (dtype, layout), chosen in split(rows, "dtype", "layout"):
        for mode, what in (("both", "Forward + backward"), ("inference", "Inference, with running statistics")):
            yield f"{what}, {dtype}, {layout}: ms and per cent of a copy's bandwidth; others: times as long"
            yield _grid(chosen, mode, _time, "shape")
        yield f"Memory, {dtype}, {layout}: bytes per element of y, kept for backward / at the peak"
        yield _grid(chosen, "both", _memory, "shape")


def _chain(rows: list[dict]) -> Iterator[str]:
    yield "Convolution, batch norm, LIF, convolution, all C to C channels"
    for (dtype, layout), chosen in split(rows, "dtype", "layout"):
        yield f"Memory, {dtype}, {layout}: bytes per element, kept for backward, input and weights apart / at the peak"
        yield _grid(chosen, "both", _memory, "shape")
        yield f"Forward + backward, {dtype}, {layout}: ms; others: times as long"
        yield _grid(chosen, "both", _time, "shape")


def _twin(rows: list[dict]) -> Iterator[str]:
    for (op, steps, dtype, layout), chosen in split(rows, "op", "T", "dtype", "layout"):
        lines = [("neurons", "ms", "over the ReLU twin", "images a second", "peak memory, MB", "kept for backward, MB")]
        for row in chosen:
            if row["mode"]:
                sizes = (_megabytes(row[key]) for key in ("peak_bytes", "kept_bytes"))
                times = number(row["ms"]), number(row["over_twin"]), number(row["per_second"])
                lines.append((row["contender"], *times, *sizes))
        yield f"One training step of {op}, T = {steps}, batch {chosen[0]['shape'][0]}, {dtype}, {layout}"
        yield _markdown(lines, left=1)


def _mixed(rows: list[dict]) -> Iterator[str]:
    yield "Apart: spikes are written, then summed in a pass of its own; frames are repeated, then convolved"
    for (op, steps, dtype, layout), chosen in split(rows, "op", "T", "dtype", "layout"):
        head = ("passes", "mean T", "GMACs, forward", "ms", "times as long", "peak memory, MB", "kept for backward, MB")
        timed = [row for row in chosen if row["mode"]]
        lines = [head]
        for row in timed:
            sizes = (_megabytes(row[key]) for key in ("peak_bytes", "kept_bytes"))
            figures = fmean(map(fmean, row["t"])), row["macs"] / 1e9, row["ms"], row["over_ours"]
            lines.append((row["contender"], *map(number, figures), *sizes))
        drawn = f", at {'; '.join(str(tuple(t)) for t in timed[0]['t'])}" if timed else ""
        yield f"One update of {op}, T up to {steps}, batch {chosen[0]['shape'][0]}, {dtype}, {layout}{drawn}"
        yield _markdown(lines, left=1)


def _protocol(rows: list[dict]) -> Iterator[str]:
    yield "Linear(n, n) and LIF, batch 16, N = 16 n"
    for mode in ("forward", "backward"):
        yield f"{mode.capitalize()}: ms; others: times as long"
        yield _grid(rows, mode, _time)


def _overhead(rows: list[dict]) -> Iterator[str]:
    lines = [("one call, us", "inference", "forward + backward", "times ours")]
    for (name,), chosen in split(rows, "contender"):
        got = {row["mode"]: row for row in chosen}
        if "both" in got:
            us = [f"{1e3 * got[mode]['ms']:.0f}" for mode in ("inference", "both")]
            lines.append((name, *us, number(got["both"]["over_ours"])))
    yield _markdown(lines, left=1)


def _models(rows: list[dict]) -> Iterator[str]:
    for (op, steps, dtype), chosen in split(rows, "op", "T", "dtype"):
        lines = [("neurons", "a second", "times as long", "peak memory, MB")]
        for row in chosen:
            if row["mode"]:
                rates = number(row["per_second"]), number(row["over_ours"])
                lines.append((row["contender"], *rates, _megabytes(row["peak_bytes"])))
        yield f"One training step of {op}, T = {steps}, batch {chosen[0]['shape'][0]}, {dtype}"
        yield _markdown(lines, left=1)


def _calls(rows: list[dict]) -> Iterator[str]:
    yield (
        "Whole calls in fresh processes: ms, median and mean of the calls (times one thread's) / MB that the process "
        "had resident at most"
    )
    for (mode, dtype), chosen in split(rows, "mode", "dtype"):
        yield f"{mode.capitalize()}, {dtype}"
        yield _grid(chosen, mode, _call)


TABLES = {
    **{"models": _models, "long": _models, "longest": _models, "overhead": _overhead, "protocol": _protocol},
    **{"norm": _norm, "chain": _chain, "twin": _twin, "mixed": _mixed, "calls": _calls},
}


def _grid(rows: list[dict], mode: str, cell: Callable[[dict, bool], str], size: str = "N") -> str:
    """A line per T and ``size``, N or shape, a column per contender."""
    rows = [row | {"steps": steps_of(row), "size": size_of(row, size)} for row in rows if row["mode"] == mode]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [("T", size, *names)]
    for labels, chosen in split(rows, "steps", "size"):
        got = {row["contender"]: row for row in chosen}
        cells = [cell(got[name], name == names[0]) if name in got else "-" for name in names]
        lines.append((*labels, *cells))
    return _markdown(lines)


def steps_of(row: dict) -> str:
    return f"{row['T']:,}" + (f" to {row['steps_out']:,}" if row.get("steps_out") else "")


def size_of(row: dict, key: str = "shape") -> str:
    return " x ".join(map(str, row["shape"])) if key == "shape" else f"{row[key]:,}"


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f}"


def _time(row: dict, first: bool) -> str:
    if not first and row["over_ours"]:
        return f"{number(row['over_ours'])}x"
    share = f" ({row['percent_of_copy']:.0f} %)" if row["percent_of_copy"] else ""
    return f"{number(row['ms'])}{share}"


def _call(row: dict, first: bool) -> str:
    times = (f"{number(row[ms])} ({number(row[over])}x)" for ms, over in CALL_TIMES)
    return f"{', '.join(times)} / {_megabytes(row['resident_bytes'])}"


def _memory(row: dict, first: bool) -> str:
    sizes = (row["kept_bytes"], row["peak_bytes"])
    return " / ".join("-" if size is None else f"{size / row['T'] / row['N']:.1f}" for size in sizes)


def _notes(content: dict) -> Iterator[str]:
    rows = content["rows"]
    present = {row["contender"] for row in rows}
    yield from (f"- {name} differs: {text}." for name, text in content["differs"].items() if name in present)
    rounded = [row for row in rows if row["mode"] in ("both", "step") and row["spikes_differ"]]
    for (op, name, dtype), chosen in split(rounded, "op", "contender", "dtype"):
        share = 100 * max(row["spikes_differ"] for row in chosen)
        yield f"- {name}, {op}, {dtype}: up to {share:.2g} % of its spikes differ from the reference's."
    if any(row["op"] == "bn+lif" for row in rows):
        limits = (f"{100 * most:g} % in {dtype}" for dtype, (most, *_) in content["limits"].items())
        yield f"- Of the spikes behind PyTorch's batch norm, which rounds otherwise, may differ: {', '.join(limits)}."
    for (name, reason), chosen in split([row for row in rows if row["reason"]], "contender", "reason"):
        where = ", ".join(f"{row['group']} T = {row['T']}, N = {row['N']:,}" for row in chosen)
        yield f"- {name}: {reason} ({where if len(chosen) < 4 else f'{len(chosen)} workloads'})."
    for name, reason in content["unavailable"].items():
        yield f"- {name}: not measured: {reason}."
    if content["not_reached"]:
        yield f"- Not reached in time: {'; '.join(content['not_reached'])}."


def split(rows: Iterable[dict], *keys: str) -> Iterable[tuple[tuple, list[dict]]]:
    """Rows by the values of ``keys``, in the order in which those first appear."""
    parts = {}
    for row in rows:
        parts.setdefault(tuple(row[k] for k in keys), []).append(row)
    return parts.items()


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _markdown(lines: list[tuple[str, ...]], left: int = 0) -> str:
    """``lines``, the first of them the head, with ``left`` columns of words before those of numbers."""
    rule = [*["---"] * left, *["---:"] * (len(lines[0]) - left)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
