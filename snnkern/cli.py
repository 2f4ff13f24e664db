"""The command line: ``snnkern doctor | train | compare | eval | plot | report | export | bench``."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from . import backends, keep_freed_memory
from .runs import Interrupted, RunError, versions

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


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Settings in place of the recipe's.", show_default=False),
]


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A name that --list shows, or the path of a .toml file.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; default: runs/RECIPE.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the recipes that come along.")] = False,
) -> None:
    """Train a recipe, with each of its seeds. The same command goes on where an earlier one was interrupted.

    An override is a dotted key of the recipe and a value: seed=1 (that seed alone), seeds=3, stage.0.epochs=10,
    stage.epochs=1 (all stages), stage.0.loss.lamb=0.05, data.root=/data, amp=bfloat16, fused=false. On several GPUs or
    machines: torchrun --nproc-per-node 4 -m snnkern train RECIPE; batch stays the batch of all together.
    """
    if show:
        _list()
    elif recipe is None:
        _fail("RECIPE is missing: the name of one (snnkern train --list) or the path of a .toml file")
    else:
        _train([recipe], overrides or [], out or Path("runs") / Path(recipe).stem)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RECIPE RECIPE ... [KEY=VALUE ...]")],
    out: Annotated[Path | None, typer.Option(help="Folder of all runs; default: runs/RECIPE-vs-RECIPE.")] = None,
) -> None:
    """Train several recipes with the same seeds, and compare them with the first, seed by seed.

    Overrides hold for all of them; see snnkern train.
    """
    overrides = [name for name in names if "=" in name]
    names = [name for name in names if "=" not in name]
    if len(names) < 2:
        _fail(f"compare needs two recipes or more, got {', '.join(names) or 'none'}")
    _train(names, overrides, out or Path("runs") / "-vs-".join(Path(name).stem for name in names))


def _train(names: list[str], overrides: list[str], out: Path) -> None:
    from .compare import compare, table
    from .progress import Show
    from .recipe import load

    keep_freed_memory()  # this process trains and does nothing else
    first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not first, soft_wrap=True)
    with _errors(out):
        recipes = {Path(name).stem: load(name, overrides) for name in names}
        runs = [run for recipe in recipes.values() for run in recipe.runs()]
        total = sum(run.total_cost for run in runs)
        with Show(total, brief=len(runs) > 1, console=console) as watch:
            results = compare(recipes, out, watch)
    if results is None:
        return
    header, lines = table(results)
    title = next(iter(recipes.values())).title if len(recipes) == 1 else None
    console.print(_table(header, lines, title))
    seconds = sum(run["seconds"] for run in results["runs"])
    console.print(f"Training took {seconds:.0f} s. Pictures: snnkern plot {out}", highlight=False)


@app.command(name="eval")
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or a .safetensors file in it.")
    ],
    overrides: Overrides = None,
    steps: Annotated[
        str | None, typer.Option(help="Time steps T, such as 1,2,4,8. Default: 1 to T of training.")
    ] = None,
    stage: Annotated[int, typer.Option(help="Of the run, counted from 0; -1 is the last.")] = -1,
    best: Annotated[
        bool, typer.Option("--best", help="The epoch that did best on the test data, not the last.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Test a trained network at several T: accuracy of the averaged potential and of each single step, and losses."""
    from .evaluation import restore, test
    from .recipe import override

    with _errors(path):
        model, recipe, about = restore(path, stage, best)
        recipe = override(recipe, overrides or [])
        trained = recipe.stage[about["stage"]].steps
        at = _steps(steps) if steps else list(range(1, trained + 1))
        data = recipe.load_data()
        if data.events and max(at) > data.shape[0]:
            _fail(f"--steps must be at most the number of frames, {data.shape[0]}, got {max(at)}")
        found = test(recipe, model, data, max(at))
    rows = [
        {"T": t, "accuracy": found.accuracy[t - 1], "moment": found.moments[t - 1], "sdt": found.sdt[t - 1],
         "tet": found.tet[t - 1]}
        for t in at
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**about, "trained_steps": trained, "samples": found.samples, "rows": rows}, indent=2))
        return
    header = "T", "accuracy, %", "at step T alone, %", "SDT loss", "TET loss"
    forms = "d", ".2f", ".2f", ".4f", ".4f"
    cells = [(row["T"], 100 * row["accuracy"], 100 * row["moment"], row["sdt"], row["tet"]) for row in rows]
    lines = [[format(value, form) for value, form in zip(line, forms, strict=True)] for line in cells]
    title = f"{recipe.title}\nstage.{about['stage']} after epoch {about['epoch']}, {found.samples} test samples"
    Console().print(_table(header, lines, title))


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="The folder of a run, of a train or of a compare.")]) -> None:
    """Draw a run, or the results of several, as pictures, into its folder."""
    from .plot import plot as draw

    with _errors(run):
        for path in draw(run):
            typer.echo(path)


@app.command()
def export(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or a .safetensors file in it.")
    ],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    stage: Annotated[int, typer.Option(help="Of the run, counted from 0; -1 is the last.")] = -1,
    best: Annotated[
        bool, typer.Option("--best", help="The epoch that did best on the test data, not the last.")
    ] = False,
) -> None:
    """Write a trained network's weights with the batch norms folded into the layers before them, as safetensors."""
    from .evaluation import restore
    from .nn import fold
    from .runs import save_weights

    with _errors(path):
        model, recipe, about = restore(path, stage, best)
        try:
            folded = fold(model)
        except ValueError as error:
            _fail(f"{path}: {error}", 1)
        save_weights(out, folded, {**about, "folded": True, "recipe": recipe.settings()})
    typer.echo(f"{out}: for snnkern eval, snnkern report, or load_state_dict of snnkern.nn.fold(model)")


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or a .safetensors file in it.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: analysis, in the run's.")] = None,
    samples: Annotated[int, typer.Option(help="Of the test data, and of the training data for the landscape.")] = 1000,
    points: Annotated[int, typer.Option(help="Of the loss landscape along each direction; 0 leaves it out.")] = 15,
    stage: Annotated[int, typer.Option(help="Of the run, counted from 0; -1 is the last.")] = -1,
    best: Annotated[
        bool, typer.Option("--best", help="The epoch that did best on the test data, not the last.")
    ] = False,
) -> None:
    """Measure a trained network: accuracy over T and at single steps, energy, sparsity and the loss landscape."""
    from . import analysis
    from .distributed import working
    from .evaluation import restore

    with _errors(run):
        model, recipe, about = restore(run, stage, best)
        folder = out or (run if run.is_dir() else run.parent) / "analysis"
        with working(recipe.device, recipe.threads) as where:
            steps = recipe.stage[about["stage"]].steps
            options = {"steps": steps, "samples": samples, "points": points, "on_part": typer.echo}
            analysis.report(model.to(where.device), recipe.load_data(), folder, **options)
    typer.echo(folder / "analysis.md")


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


def _list() -> None:
    from .recipe import load, recipes

    for name in recipes():
        recipe = load(name)
        typer.echo(f"{name:26}{recipe.title}\n{'':26}{recipe.source}")


def _steps(text: str) -> list[int]:
    try:
        at = sorted({int(part) for part in text.split(",")})
        if at[0] < 1:
            raise ValueError
    except ValueError:
        _fail(f"--steps must be whole numbers from 1 up with commas between, got {text!r}")
    return at


def _table(header, lines: list[list[str]], title: str | None) -> Table:
    shown = Table(*header, title=title, box=SIMPLE)
    for column in shown.columns[1:]:
        column.justify = "right"
    for line in lines:
        shown.add_row(*line)
    return shown


@contextmanager
def _errors(folder: Path):
    """Mistakes of the user, and what stops a training, as one line."""
    from .recipe import RecipeError

    try:
        yield
    except RecipeError as error:
        _fail(str(error))
    except Interrupted as error:
        _fail(f"interrupted in {error}; all of it is safe in {folder}. The same command goes on from there.", 130)
    except KeyboardInterrupt:
        _fail(
            f"interrupted; what the last checkpoint holds is safe in {folder}. The same command goes on from it.", 130
        )
    except (RunError, ImportError, FileNotFoundError) as error:
        _fail(str(error), 1)


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
