"""The command line: ``snnkern doctor | train | plot | bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import backends
from .backend import choose
from .runs import RunError, versions
from .train import LOSSES, Settings

app = typer.Typer(
    name="snnkern",
    help="Fused leaky integrate-and-fire neurons for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what snnkern finds on this machine, and for each backend that cannot run, why."""
    report = {
        **versions(),
        "triton": _triton(),
        "instruction set": _instruction_set(),
        "threads": torch.get_num_threads(),
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "backends": {name: reason or "ok" for name, reason in backends().items()},
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name in ("snnkern", "python", "torch", "triton", "processor", "instruction set", "threads"):
        typer.echo(f"{name:19}{report[name]}")
    typer.echo(f"{'devices':19}{'; '.join(report['devices']) or 'no GPU that this PyTorch can use'}")
    for name, state in report["backends"].items():
        typer.echo(f"backend {name:11}{state}")


@app.command()
def train(
    loss: Annotated[list[str], typer.Option(help="sdt or tet; repeat to compare.")] = LOSSES,
    seeds: Annotated[int, typer.Option(help="How many seeds, counted from 0.")] = 8,
    steps: Annotated[int, typer.Option(help="Time steps T.")] = Settings.steps,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = Settings.epochs,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = Settings.batch,
    lr: Annotated[float, typer.Option(help="Adam's learning rate at the start.")] = Settings.lr,
    lamb: Annotated[float, typer.Option(help="Weight of TET's second term, 0 to 1.")] = Settings.lamb,
    noise: Annotated[float, typer.Option(help="Standard deviation of the pixel noise.")] = Settings.noise,
    threads: Annotated[int, typer.Option(help="Processor threads.")] = Settings.threads,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = Settings.device,
    backend: Annotated[str | None, typer.Option(help="Of the LIF op; default: the fastest here.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes there.")] = Path(
        "runs/digits"
    ),
) -> None:
    """Train a small network on noisy handwritten digits with each loss, and compare the losses seed by seed."""
    from .compare import compare, table

    if seeds < 1:
        _fail(f"--seeds must be a whole number from 1 up, got {seeds}")
    common = {"steps": steps, "epochs": epochs, "batch": batch, "lr": lr, "lamb": lamb, "noise": noise}
    common |= {"threads": threads, "device": device, "backend": backend}
    try:
        runs = [Settings(loss=name, seed=seed, **common) for name in dict.fromkeys(loss) for seed in range(seeds)]
    except ValueError as error:
        _fail(f"--{error}")  # it begins with the setting's name, which is the option's
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        _fail(f"--device must be one that PyTorch can use here, got {device!r}: {str(error).splitlines()[0]}")
    try:
        choose(torch.device(device).type, torch.float32, backend)
    except (RuntimeError, ValueError) as error:
        _fail(f"--backend: {error}")

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console()
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("", total=len(runs) * epochs)

            def show(run: Settings, metrics: dict) -> None:
                progress.update(
                    task,
                    completed=runs.index(run) * epochs + metrics["epoch"],
                    description=f"{run.loss.upper()} seed {run.seed}: {100 * metrics['test_accuracy']:.1f} %",
                )

            results = compare(runs, out, show)
    except KeyboardInterrupt:
        _fail(f"interrupted; finished epochs are safe in {out}. The same command goes on from there.", 130)
    except (RunError, ModuleNotFoundError) as error:
        _fail(str(error), 1)
    header, lines = table(results)
    shown = Table(*header, title=f"Digits, trained at T = {steps} for {epochs} epochs", box=SIMPLE)
    for column in shown.columns[1:]:
        column.justify = "right"
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    typer.echo(f"Training took {sum(run['seconds'] for run in results['runs']):.0f} s. Pictures: snnkern plot {out}")


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="The folder that train wrote.")]) -> None:
    """Draw the results of a training as pictures, into its folder."""
    from .plot import plot as draw

    try:
        for path in draw(run):
            typer.echo(path)
    except (RunError, ModuleNotFoundError) as error:
        _fail(str(error), 1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure the ops and whole models beside their peers; needs a source checkout. Options: snnkern bench --help"""
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks" / "run.py").exists():
        _fail(f"the benchmarks live in the source checkout, not in {checkout}: there, `python -m benchmarks.run`", 1)
    sys.path.insert(0, str(checkout))
    try:
        from benchmarks.run import app as suite
    except ModuleNotFoundError as error:
        _fail(f"{error}; `pip install 'snnkern[bench]'` brings what the benchmarks need", 1)
    suite(context.args, prog_name="snnkern bench")


def main() -> None:
    app()


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


def _triton() -> str:
    try:
        import triton
    except ImportError as error:
        return f"cannot be imported: {error}"
    return triton.__version__


def _instruction_set() -> str:
    try:
        from ._C import cpu_isa
    except ImportError:
        return "unknown without the compiled extension"
    return cpu_isa()


def _device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
