"""``python -m benchmarks.run``: a LIF layer, alone, behind a linear one, behind batch norm, and whole models, beside
their peers; updates of mixed time-step training beside plain ones.

A contender that differs from the reference gets no time (``check.py``). In every round all contenders run one after the
other; figures are medians over rounds, ratios medians of the rounds' ratios. Results go to ``FOLDER/NAME.json``, tables
and pictures beside it; those that come with the project were written with ``--out benchmarks/results``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
import warnings
from contextlib import suppress
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import snnkern
from snnkern.files import commit, replacing, versions
from snnkern.train.folder import RunError

from . import report
from .cases import CASES
from .check import ROUNDED, Refused
from .contenders import Contender, contenders
from .measure import Call, clock_for, interleave, peak
from .pictures import draw
from .workloads import Workload, workloads

SHARE = {"cpu": 0.05, "cuda": 0.02}  # seconds of one contender in one round, if it is that fast
PEERS = ("spikingjelly", "snntorch", "norse", "sinabs", "sinabs-exodus", "triton")
KEPT = {True: "kept", False: "left to the C library"}
BLANK = dict.fromkeys(
    (
        *("group", "op", "contender", "backend", "mode", "T", "N", "shape", "dtype", "layout"),
        *("buffers", "rounds", "ms", "ms_min", "ms_max", "over_ours", "over_copy", "GB/s", "percent_of_copy"),
        *("steps_out", "over_twin", "per_second", "kept_bytes", "peak_bytes"),
        *("spike_rate", "spikes_differ", "gradient_error", "t", "macs", "reason"),
    )
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def machine(device: str, memory: str) -> dict:
    known = versions()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        from snnkern._C import cpu_isa

        name = f"{known['processor']}, {torch.get_num_threads()} threads, {cpu_isa()}"
    peers = {}
    for peer in PEERS:
        with suppress(metadata.PackageNotFoundError):
            peers[peer] = metadata.version(peer)
    return {
        "device": name,
        **known,
        **peers,
        "cuda": torch.version.cuda,
        "commit": commit(Path(__file__).parent),
        "date": date.today().isoformat(),
        "environment": {
            "freed memory": memory,
            **{k: os.environ[k] for k in ("GLIBC_TUNABLES", "OMP_WAIT_POLICY") if k in os.environ},
        },
    }


def blank(workload: Workload) -> dict:
    """A row with nothing measured."""
    size = {"T": workload.steps, "N": workload.neurons, "shape": list(workload.shape)}
    return BLANK | size | {k: getattr(workload, k) for k in ("group", "op", "dtype", "layout", "steps_out")}


def measure(workload: Workload, able: list[Contender], device: str, rounds: int) -> list[dict]:
    """The rows of one workload: one per contender and mode, or one with the reason why a contender has no time."""
    if workload.compiled:
        torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    case = CASES[workload.op](workload, device)
    common = blank(workload) | {"buffers": case.buffers}
    calls, found, rows = [call for call in [case.copy()] if call], {}, []
    for contender in able:
        if not contender.takes(workload):
            continue
        told = common | {"contender": contender.name, "backend": contender.backend}
        try:
            facts, memory, its_calls = prepare(case, workload, contender, device)
        except Exception as error:
            rows.append(told | {"reason": _reason(error)})
        else:
            found[contender.name] = told | facts, memory
            calls += its_calls
    least = rounds if workload.group in ("twin", "mixed") else 3  # their ratios are the headline
    times = interleave(calls, clock_for(workload, device), rounds, SHARE[device], least)
    ours = next((name for name in found if name.startswith("snnkern")), None)
    for (name, mode), got in times.items():
        facts, memory = found.get(name, (common | {"contender": name}, {}))
        row = facts | memory.get(mode, {}) | figures(case, mode, got, times, ours)
        rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
    return rows


def prepare(case, workload: Workload, contender: Contender, device: str) -> tuple[dict, dict[str, dict], list[Call]]:
    """How a contender differs, its memory by mode, and its calls; raises Refused."""
    if reason := contender.refuses(workload):
        raise Refused(reason)
    module = case.module(contender)
    case.foresee(module)
    facts, memory = case.check(module, contender), {}
    calls = case.calls(module, contender)
    for call in calls:
        for mode in {"inference", "both", "step"}.intersection(call.modes):
            memory[mode] = {}
            if mode != "inference" and not contender.compiled:
                memory[mode]["kept_bytes"] = case.keeps(module)
            call.run(0, lambda: None)
            if device == "cuda" or not case.bytes or case.bytes >= 2**22:  # resident memory comes in pages
                memory[mode]["peak_bytes"] = peak(lambda call=call: call.run(0, lambda: None), device)
    return facts, memory, calls


def figures(case, mode: str, got: list[float], times: dict, ours: str | None) -> dict:
    """A row's times, and what follows from them."""

    def over(other: list[float] | None) -> float | None:
        return other and statistics.median(a / b for a, b in zip(got, other, strict=False))

    median, streams = statistics.median(got), 2 if mode == "copy" else case.streams.get(mode)
    row = {"mode": mode, "rounds": len(got), "ms": 1e3 * median, "ms_min": 1e3 * min(got), "ms_max": 1e3 * max(got)}
    row["over_ours"] = over(times.get((ours, mode)))
    row["over_copy"] = over(times.get(("Tensor.copy_", "copy")))
    if mode == "step":
        row["per_second"] = case.workload.shape[0] / median
        row["over_twin"] = over(times.get(("ReLU twin", mode)))
    if streams:
        row["GB/s"] = streams * case.bytes / median / 1e9
        row["percent_of_copy"] = 100 * streams / 2 / row["over_copy"]
    return row


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Refused) else traceback.format_exception_only(error)[0].partition("\n")[0]


def write(path: Path, content: dict) -> None:
    """As JSON, a row a line; until it is complete, what was there stays."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in content["rows"])
    text = json.dumps({**content, "rows": []}, indent=1).removesuffix("[]\n}") + f"[\n{rows}\n]\n}}\n"
    with replacing(path) as file:
        file.write(text.encode())


def begin(path: Path, content: dict, resume: bool) -> dict:
    """``content``, or with ``resume`` what ``path`` holds of the same; RunError if that is of something else."""
    if not resume or not path.exists():
        return content
    held = json.loads(path.read_text())
    for part in ("machine", "settings"):
        differ = [k for k, v in content[part].items() if held.get(part, {}).get(k) != v and k != "date"]
        if differ:
            told = "; ".join(f"{k} {held.get(part, {}).get(k)!r} there, {content[part][k]!r} here" for k in differ)
            raise RunError(f"{path} cannot be resumed: {told}")
    return held


def run(
    chosen: list[Workload],
    path: Path,
    device: str = "cpu",
    rounds: int = 7,
    budget: float | None = None,
    resume: bool = False,
    able: list[Contender] | None = None,
    console: Console | None = None,
    memory: str = KEPT[False],
) -> dict:
    """Measures ``chosen`` into ``path``, which is written after every workload; returns what it holds."""
    started = time.monotonic()
    here, unable = contenders(device)
    content = {
        "machine": machine(device, memory),
        "settings": {"rounds": rounds, "threads": torch.get_num_threads()},
        "differs": {contender.name: contender.differs for contender in here if contender.differs},
        "unavailable": unable,
        "limits": {dtype: list(limits) for dtype, limits in ROUNDED.items()},
        "finished": [],
        "not_reached": [],
        "rows": [],
    }
    content = begin(path, content, resume)
    content["not_reached"] = [str(workload) for workload in chosen if str(workload) not in content["finished"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console or Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(chosen))
        longest = {}  # seconds of a workload so far, by group
        for workload in chosen:
            progress.update(task, description=str(workload))
            begun = time.monotonic()
            late = budget is not None and begun - started + longest.get(workload.group, 0) > budget
            if str(workload) in content["not_reached"] and not late:
                try:
                    content["rows"] += measure(workload, able or here, device, rounds)
                except Exception as error:  # the rest can still be measured
                    content["rows"].append(blank(workload) | {"contender": "all", "reason": _reason(error)})
                content["finished"].append(str(workload))
                content["not_reached"].remove(str(workload))
                write(path, content)
                longest[workload.group] = max(longest.get(workload.group, 0), time.monotonic() - begun)
            progress.advance(task)
    return content


@app.command(help=__doc__.replace("``", ""))
def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few small workloads, in about a minute.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="On the GPU, the most important first, in ten minutes.")] = False,
    group: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this group; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("runs/bench"),
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the results; default: from the device and the choice.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds in which all take turns; default: 7, 5 with --quick.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch; default: its own choice.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Seconds, by leaving out what comes last; 570 with --gpu.")
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh-memory",
            help="On the CPU, leave freed memory to the C library, which may return it to the system at every step; "
            "default: snnkern.keep_freed_memory(), for all alike.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the finished workloads of an interrupted run.")
    ] = False,
    redraw: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Only write the tables and pictures of these results again."),
    ] = None,
) -> None:
    if redraw:
        for path in redraw:
            _present(_results(path), path)
        return
    device = "cuda" if gpu else "cpu"
    if gpu and not torch.cuda.is_available():
        _fail("--gpu: this PyTorch finds no GPU; see `snnkern doctor`")
    if threads:
        torch.set_num_threads(threads)
    everything = {workload.group for workload in workloads(device, quick)}
    if unknown := set(group or ()) - everything:
        _fail(f"--group must be one of {', '.join(sorted(everything))}, got {', '.join(sorted(unknown))}")
    where = torch.cuda.get_device_name().lower().replace(" ", "-") if gpu else "cpu"
    path = out / f"{name or '-'.join([where, *['quick'] * quick, *(group or [])])}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"--out must be a folder that can be written to: {error}")
    chosen = workloads(device, quick, tuple(group or ()))
    kept = not gpu and not fresh and snnkern.keep_freed_memory()
    warnings.simplefilter("ignore")  # the peers' own
    try:
        budget = budget if budget is not None or not gpu else 570
        content = run(chosen, path, device, rounds or (5 if quick else 7), budget, resume, memory=KEPT[kept])
    except RunError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{path} cannot be written: {error}", 1)
    except KeyboardInterrupt:
        _fail(f"interrupted; finished workloads are safe in {path}, --resume goes on from there", 130)
    typer.echo(report.tables(content))
    _present(content, path)


def _results(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        content["machine"], content["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        _fail(f"{path} is no file of results: {error!r}")
    return content


def _present(content: dict, path: Path) -> None:
    """Tables and pictures beside ``path``."""
    tables = path.with_suffix(".md")
    with replacing(tables) as file:
        file.write(report.tables(content).encode())
    for file in (path, tables, *draw(content, path)):
        typer.echo(file)


def _fail(message: str, code: int = 2):
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
