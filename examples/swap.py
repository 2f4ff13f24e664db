"""One network, trained with SpikingJelly's LIFNode and with snnkern's: what the swap changes, and what it does not.

``python examples/swap.py`` shows 1,000 time steps of spikes, whose rates are the pixels of handwritten digits, to two
layers of neurons, and trains them from the same weights on the same batches, with each node in a process of its own.
Without SpikingJelly a plain PyTorch loop takes its place. Losses and trained weights are equal to the last bit, as they
are wherever the reset is detached, the surrogate is ATan and tau is a power of two.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from snnkern.files import commit, replacing, versions, write_json
from snnkern.nn import LIFNode
from snnkern.surrogate import ATan

NEURON = {"tau": 16.0, "decay_input": False, "detach_reset": True, "step_mode": "m"}


def spikingjelly() -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    return neuron.LIFNode(**NEURON, surrogate_function=surrogate.ATan())


def snnkern() -> nn.Module:
    return LIFNode(**NEURON, surrogate_function=ATan())


def plain_loop() -> nn.Module:
    return LIFNode(**NEURON, surrogate_function=ATan(), backend="reference")


NODES = {"SpikingJelly": spikingjelly, "plain loop": plain_loop, "snnkern": snnkern}


def build(node: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), node(), nn.Linear(128, 128), node(), nn.Linear(128, 10))


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Rates of spikes per step [1797, 64], float32, and labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16 / 5, torch.from_numpy(labels)


def train(
    net: nn.Sequential, optimizer: torch.optim.Optimizer, updates: int, steps: int, batch: int
) -> Iterator[tuple[float, float]]:
    """The loss and the seconds of every update of the weights; making its batch is not among them."""
    (rates, labels), generator = digits(), torch.Generator().manual_seed(0)
    for _ in range(updates):
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        x = torch.bernoulli(rates[chosen].expand(steps, -1, -1), generator=generator)  # [T, N, 64]
        start = time.perf_counter()
        for node in (net[1], net[3]):
            node.reset()
        loss = F.cross_entropy(net(x).mean(0), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), time.perf_counter() - start


# The rest measures this, and shows it.


def run(name: str, updates: int, steps: int, batch: int) -> None:
    """Prints a line of JSON per update, then one with the memory that training took and the weights."""
    torch.manual_seed(0)
    net = build(NODES[name])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    digits()
    before = _peak_memory()
    for loss, seconds in train(net, optimizer, updates, steps, batch):
        print(json.dumps({"loss": loss, "seconds": seconds}), flush=True)
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in net.parameters())
    found = {"peak_bytes": _peak_memory() - before, "weights": hashlib.sha256(bits).hexdigest()}
    print(json.dumps(found), flush=True)


def _peak_memory() -> int:
    """Of this process, resident, in bytes."""
    with suppress(OSError):  # on Linux; there what getrusage says begins with the peak of the process that started this
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(names: list[str], settings: dict[str, int], console: Console) -> dict[str, dict]:
    """Each node in a process of its own, one after the other."""
    options, runs = [f"--{key}={value}" for key, value in settings.items()], {}
    columns = "{task.description:12}", BarColumn(), MofNCompleteColumn(), "{task.fields[loss]}", TimeElapsedColumn()
    with Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console) as progress:
        tasks = {name: progress.add_task(name, total=settings["updates"], start=False, loss="") for name in names}
        for name in names:
            command = [sys.executable, "-W", "ignore", __file__, f"--node={name}", *options]
            progress.start_task(tasks[name])
            lines = []
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout:
                    lines.append(json.loads(line))
                    if "loss" in lines[-1]:
                        progress.update(tasks[name], advance=1, loss=f"loss {lines[-1]['loss']:.4f}")
            if process.returncode:
                _fail(f"the training with {name} ended with exit status {process.returncode}", 1)
            *trained, last = lines
            runs[name] = {key: [line[key] for line in trained] for key in ("loss", "seconds")} | last
    return runs


def table(runs: dict[str, dict]) -> Table:
    (peer, theirs), (name, ours) = runs.items()
    shown = Table("", peer, name, "", box=SIMPLE)
    for column in shown.columns[1:]:
        column.justify = "right"
    count = len(ours["loss"])
    for i in sorted({0, count // 4, count // 2, 3 * count // 4, count - 1}):
        a, b = theirs["loss"][i], ours["loss"][i]
        shown.add_row(f"loss of update {i + 1}", f"{a:.9g}", f"{b:.9g}", "equal" if a == b else "differs")
    a, b = theirs["weights"], ours["weights"]
    shown.add_row("trained weights, SHA-256", f"{a[:9]}…", f"{b[:9]}…", "equal" if a == b else "differ")
    (_, a, _), (_, b, _) = spread = [statistics.quantiles(run["seconds"], method="inclusive") for run in runs.values()]
    spans = [f"{1e3 * low:,.0f} to {1e3 * high:,.0f} ms" for low, _, high in spread]
    shown.add_row("an update, median", f"{1e3 * a:,.0f} ms", f"{1e3 * b:,.0f} ms", f"{a / b:.1f} times")
    shown.add_row("  half of them within", *spans, "")
    a, b = theirs["peak_bytes"], ours["peak_bytes"]
    shown.add_row("memory of training", f"{a / 1e6:,.0f} MB", f"{b / 1e6:,.0f} MB", f"{a / b:.1f} times" if b else "")
    return shown


def draw(path: Path, content: dict) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    style = {"axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "grid.alpha": 0.25}
    with matplotlib.rc_context(style | {"axes.titlesize": 11, "figure.constrained_layout.use": True}):
        figure = Figure(figsize=(12, 4))
        losses, times, memory = figure.subplots(1, 3, width_ratios=(4, 4, 3))
        looks = {"color": "#D55E00", "markersize": 8, "fillstyle": "none"}, {"color": "#0072B2", "markersize": 3}
        for (name, run), look in zip(content["runs"].items(), looks, strict=True):
            seconds = [sum(run["seconds"][: i + 1]) for i in range(len(run["seconds"]))]
            losses.plot(range(1, len(seconds) + 1), run["loss"], "o", label=name, **look)
            median = f"{name}, {1e3 * statistics.median(run['seconds']):,.0f} ms an update"
            times.plot(seconds, run["loss"], label=median, **{**look, "marker": "o", "markersize": 3})
            bar = memory.bar(name, run["peak_bytes"] / 1e6, 0.6, color=look["color"])
            memory.bar_label(bar, [f"{run['peak_bytes'] / 1e6:,.0f}"])
        first, second = (run["loss"] for run in content["runs"].values())
        told = "equal to the last bit" if first == second else "which differ"
        losses.set(xlabel="update of the weights", ylabel="loss", title=f"Losses, {told}")
        losses.xaxis.get_major_locator().set_params(integer=True)
        times.set(xlabel="seconds of training", ylabel="loss", title="Losses over time", xlim=(0, None))
        for axes in (losses, times):
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
            axes.legend(frameon=False, loc="upper right")
        memory.set(ylabel="MB at the peak", title="Memory of training")
        memory.grid(visible=False)
        settings, machine = content["settings"], content["machine"]
        figure.suptitle(f"Two LIF layers, T = {settings['steps']:,}, batch {settings['batch']}, float32")
        figure.supxlabel(_footer(machine), fontsize=8, color="#555555")
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=150)


def _footer(machine: dict) -> str:
    known = (f"{name} {machine[name]}" for name in ("snnkern", "torch", "spikingjelly") if machine[name])
    return f"{machine['processor']}, {machine['threads']} threads; {', '.join(known)}; {machine['date']}"


def main(
    out: Annotated[Path, typer.Option(help="Folder for swap.json and swap.png.")] = Path("runs/swap"),
    updates: Annotated[int, typer.Option(min=2, help="Of the weights.")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="Time steps T.")] = 1000,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    node: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train one network with SpikingJelly's LIFNode, then with snnkern's; compare losses, time and memory."""
    settings = {"updates": updates, "steps": steps, "batch": batch}
    if node:
        return run(node, **settings)
    for module in ("sklearn", "matplotlib"):
        if find_spec(module) is None:
            _fail(f"this example needs {module}: pip install 'snnkern[train]'", 1)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"--out: {error}")
    console, found = Console(), find_spec("spikingjelly") is not None
    if not found:
        console.print("SpikingJelly is not installed; a plain PyTorch loop takes its place.")
    known = {"threads": torch.get_num_threads(), "spikingjelly": metadata.version("spikingjelly") if found else None}
    known |= {"commit": commit(Path(__file__).parent), "date": date.today().isoformat()}
    runs = measure(["SpikingJelly" if found else "plain loop", "snnkern"], settings, console)
    content = {"machine": versions() | known, "settings": settings, "runs": runs}
    write_json(out / "swap.json", content)
    draw(out / "swap.png", content)
    console.print(table(runs), "Update: forward, backward and Adam. Memory: the peak, beyond what was there before.")
    console.print(os.fspath(out / "swap.png"), highlight=False)


def _fail(message: str, code: int = 2):
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
