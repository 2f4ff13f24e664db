"""The tables of a result file. ``python -m benchmarks.report results/NAME.json`` writes them and the pictures again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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


def tables(content: dict) -> str:
    """Markdown: what ran where, the tables of each group, and why cells are empty."""
    machine, rows = content["machine"], content["rows"]
    known = [f"{name} {machine[name]}" for name in VERSIONS if machine.get(name)]
    known += [f"{name} {value}" for name, value in machine["environment"].items()]
    parts = [f"{machine['device']}: {', '.join(known)}; {machine['date']}."]
    for (group,), chosen in split(rows, "group"):
        tell = {"models": _models, "overhead": _overhead, "protocol": _protocol}.get(group, _layer)
        parts += [f"## {group}", *tell(chosen)]
    return "\n\n".join([*parts, "## notes", "\n".join(_notes(content))]) + "\n"


def _layer(rows: list[dict]) -> Iterator[str]:
    for (dtype, layout), chosen in split(rows, "dtype", "layout"):
        yield f"Forward + backward, {dtype}, {layout}: ms and per cent of a copy's bandwidth; others: times as long"
        yield _grid(chosen, "both", _time)
        yield f"Memory, {dtype}, {layout}: bytes per element of x, kept for backward / at the peak"
        yield _grid(chosen, "both", _memory)


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
                peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
                lines.append((row["contender"], number(row["per_second"]), number(row["over_ours"]), peak))
        yield f"One training step of {op}, T = {steps}, batch {chosen[0]['shape'][0]}, {dtype}"
        yield _markdown(lines, left=1)


def _grid(rows: list[dict], mode: str, cell: Callable[[dict, bool], str]) -> str:
    """A line per size, a column per contender."""
    rows = [row for row in rows if row["mode"] == mode]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [("T", "N", *names)]
    for (steps, neurons), chosen in split(rows, "T", "N"):
        got = {row["contender"]: row for row in chosen}
        cells = [cell(got[name], name == names[0]) if name in got else "-" for name in names]
        lines.append((f"{steps:,}", f"{neurons:,}", *cells))
    return _markdown(lines)


def _time(row: dict, first: bool) -> str:
    if not first and row["over_ours"]:
        return f"{number(row['over_ours'])}x"
    share = f" ({row['percent_of_copy']:.0f} %)" if row["percent_of_copy"] else ""
    return f"{number(row['ms'])}{share}"


def _memory(row: dict, first: bool) -> str:
    sizes = (row["kept_bytes"], row["peak_bytes"])
    return " / ".join("-" if size is None else f"{size / row['T'] / row['N']:.1f}" for size in sizes)


def _notes(content: dict) -> Iterator[str]:
    rows = content["rows"]
    for name, text in content["differs"].items():
        yield f"- {name} differs: {text}."
    rounded = [row for row in rows if row["mode"] in ("both", "step") and row["spikes_differ"]]
    for (name, dtype), chosen in split(rounded, "contender", "dtype"):
        share = 100 * max(row["spikes_differ"] for row in chosen)
        yield f"- {name}, {dtype}: up to {share:.2g} % of its spikes differ from the reference's."
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


if __name__ == "__main__":
    from .pictures import draw

    for file in map(Path, sys.argv[1:]):
        content = json.loads(file.read_text())
        file.with_suffix(".md").write_text(tables(content))
        draw(content, file)
