"""``python -m benchmarks.busy``: what a call of ``lif``, forward and backward, takes by default, on the CPU.

Whole calls in fresh processes, alone on the machine and beside a process that keeps one core busy, as a data loader's
worker does: with PyTorch's default number of threads, with one, and with ``keep_freed_memory()``. Times are medians and
means over the calls of a process, then medians over rounds; ratios medians of the rounds' ratios. Memory is the
largest resident size that the process had. Writes ``NAME.json`` and ``.md`` into the
folder that ``--out`` names.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from . import report
from .run import blank, machine, write
from .workloads import Workload

SIZES = [
    *((100, 256), (100, 4096), (500, 256), (1000, 4096), (2000, 256), (4000, 4096), (16000, 256)),
    *((16, 65536), (4, 2**20)),
]
HALF = [(1000, 4096), (2000, 256), (16, 65536), (4, 2**20)]  # in bfloat16, too
WORKLOADS = [
    Workload("calls", "lif", steps, (neurons,), dtype)
    for dtype, sizes in (("float32", SIZES), ("bfloat16", HALF))
    for steps, neurons in sizes
]
SETTINGS = ("default", "one thread", "kept memory")
BESIDE = ("nothing", "a busy process")

CALLS = """
import json, resource, statistics, sys, time
import torch, snnkern
steps, neurons, dtype, setting, seconds = json.loads(sys.argv[1])
if setting == "one thread":
    torch.set_num_threads(1)
if setting == "kept memory":
    snnkern.keep_freed_memory()
x = torch.randn(steps, neurons, dtype=getattr(torch, dtype), requires_grad=True)
grad = torch.randn_like(x)
times, begun = [], time.perf_counter()
while len(times) < 6 or time.perf_counter() - begun < seconds:
    start = time.perf_counter()
    spikes, _ = snnkern.lif(x)
    spikes.backward(grad)
    del spikes
    x.grad = None
    times.append(time.perf_counter() - start)
times = times[3:]
size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([1e3 * statistics.median(times), 1e3 * statistics.mean(times), size]))
"""


def call(*what) -> list[float]:
    """Median and mean of a call in ms, and the largest resident size in bytes, of a process of its own."""
    command = [sys.executable, "-c", CALLS, json.dumps(what)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@contextmanager
def beside(busy: bool):
    """With ``busy``, a process that computes without end runs beside what is done here."""
    if not busy:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def rows_of(workload: Workload, other: str, rounds: int, seconds: float) -> list[dict]:
    found = {setting: [] for setting in SETTINGS}
    with beside(other != "nothing"):
        for _ in range(rounds):
            for setting in SETTINGS:
                found[setting].append(call(workload.steps, workload.neurons, workload.dtype, setting, seconds))
    one, rows = found["one thread"], []
    for setting, got in found.items():
        figures = [statistics.median(values) for values in zip(*got, strict=True)]
        figures += [statistics.median(a[i] / b[i] for a, b in zip(got, one, strict=True)) for i in (0, 1)]
        names = ("ms", "ms_mean", "resident_bytes", "over_one", "mean_over_one")
        measured = {name: float(f"{value:.5g}") for name, value in zip(names, figures, strict=True)}
        rows.append(blank(workload) | {"contender": setting, "mode": f"beside {other}", "rounds": rounds} | measured)
    return rows


def main(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("runs/bench"),
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the results.")] = "cpu-busy",
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes for each figure.")] = 3,
    seconds: Annotated[float, typer.Option(help="That a process measures, at least.")] = 1.0,
) -> None:
    content = {
        "machine": machine("cpu", "as each row says"),
        "settings": {"rounds": rounds, "seconds": seconds, "threads": torch.get_num_threads()},
        **{"differs": {}, "unavailable": {}, "limits": {}, "not_reached": [], "rows": []},
    }
    todo = [(workload, other) for other in BESIDE for workload in WORKLOADS]
    for workload, other in track(todo, description="whole calls"):
        content["rows"] += rows_of(workload, other, rounds, seconds)
    path = out / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)
    path.with_suffix(".md").write_text(report.tables(content))
    typer.echo(report.tables(content))


if __name__ == "__main__":
    typer.run(main)
