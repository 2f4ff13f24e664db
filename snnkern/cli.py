"""The command line: ``snnkern doctor | check | train | compare | eval | plot | report | search | export | ...``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from inspect import signature
from io import BytesIO
from pathlib import Path
from statistics import mean, stdev
from tempfile import NamedTemporaryFile
from typing import Annotated, NoReturn

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ._version import __version__
from .backend import backends
from .backend.cpu import keep_freed_memory
from .data.base import DataError
from .files import replacing, versions
from .models import Staged
from .train.folder import Interrupted, RecipeError, RunError

app = typer.Typer(
    name="snnkern",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"snnkern {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fused leaky integrate-and-fire neurons for PyTorch."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what is found here, and why a backend cannot run."""
    report = {
        **versions(),
        "triton": _triton(),
        "nvrtc": _nvrtc(),
        "instruction set": _instruction_set(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "backends": {name: reason or "ok" for name, reason in backends().items()},
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name in ("snnkern", "python", "torch", "triton", "nvrtc", "processor", "instruction set", "threads"):
        typer.echo(f"{name:19}{report[name]}")
    typer.echo(f"{'devices':19}{'; '.join(report['devices']) or 'no GPU that this PyTorch can use'}")
    for name, state in report["backends"].items():
        typer.echo(f"backend {name:11}{state}")


@app.command()
def check(
    seconds: Annotated[float, typer.Option(help="For how long.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the calls.")] = 0,
    backend: Annotated[
        str | None,
        typer.Option(envvar="SNNKERN_BACKEND", help="This one alone: cuda, cpu or triton. Default: all that can run."),
    ] = None,
) -> None:
    """Hold every backend that can run here to the reference.

    Random calls of every op: spikes must be equal bit for bit, gradients within a rounding. Then the bandwidth of a LIF
    layer beside that of a copy. The exit code is 1 if anything differs; a program that shows it is printed. Ctrl-C
    shows what is known so far.
    """
    from rich.progress import BarColumn, Progress, TextColumn

    from .check import HEADER, MEASURED_HEADER, NOTE, Report, runnable
    from .check import run as checked

    kernels = [name for name in backends() if name != "reference"]
    if not 0 < seconds < float("inf"):
        _fail(f"--seconds must be positive and finite, got {seconds}")
    if backend not in (None, *kernels):
        wanted = f"one of {', '.join(kernels)}, which are held to the reference"
        _fail(f"--backend (SNNKERN_BACKEND) must be {wanted}, got {backend!r}")
    where, left = runnable(backend)
    if backend in left:
        _fail(f"backend {backend!r} cannot run: {left[backend]}", 1)
    known = versions()
    typer.echo(
        f"snnkern {known['snnkern']}, torch {known['torch']}, python {known['python']}; {known['processor']}, "
        f"{torch.get_num_threads()} threads, {_instruction_set()}; {', '.join(_devices()) or 'no GPU'}"
    )
    for name, reason in left.items():
        typer.echo(f"Not checked: {name}: {reason}.")
    if not where:
        typer.echo("Only the reference can run here, which is what others are held to: there is nothing to check.")
        return
    keep_freed_memory()
    result, interrupted = Report(), False
    columns = BarColumn(20), TextColumn("{task.percentage:.0f} %  {task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=seconds)
        try:
            checked(result, where, seconds, seed, lambda now, what: bar.update(task, completed=now, description=what))
        except KeyboardInterrupt:
            interrupted = True
    console = Console(markup=False, highlight=False)
    if result.tried:
        shown = _table(HEADER, result.rows(), None)
        shown.columns[1].justify = "left"
        console.print(shown, NOTE)
    if result.measured:
        console.print(_table(MEASURED_HEADER, result.measured_rows(), "lif, forward + backward"))
    for name, reason in result.not_measured.items():
        typer.echo(f"Bandwidth of {name} not measured: {reason}")
    typer.echo(f"{'Interrupted. ' * interrupted}{result.failed} of {result.calls:,} calls differ; seed {seed}.")
    for failure in result.failures:
        typer.echo(f"\n# {failure.backend} differs from the reference: {failure.what}")
        typer.echo(failure.call.source(failure.backend), nl=False)
    if result.failures or interrupted:
        raise typer.Exit(1 if result.failures else 130)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Settings in place of the recipe's.", show_default=False),
]


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A name that --list shows, or the path of a .toml file.")
    ] = None,
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
        _train([recipe, *(overrides or [])], out)


@app.command()
def compare(
    words: Annotated[list[str], typer.Argument(metavar="RECIPE[:KEY=VALUE] ... [KEY=VALUE ...]", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder of all runs; default: runs/RECIPE-vs-RECIPE.")] = None,
) -> None:
    """Train several recipes with the same seeds and compare them.

    Differences are to the first, seed by seed. Overrides hold for all of them, see snnkern train; one behind a recipe
    and a colon for that alone. So a sweep is snnkern compare digits-tet digits-tet:stage.steps=2
    digits-tet:stage.steps=4, which bash also writes as digits-tet:stage.steps={2,4,6}.
    """
    _train(words, out, 2)


def _train(words: list[str], out: Path | None, least: int = 1) -> None:
    keep_freed_memory()  # this process trains and does nothing else
    first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not first, soft_wrap=True)
    with _errors(out or Path("runs")):
        from .train.compare import compare, named, table
        from .train.progress import Show

        recipes = named(words)
    if len(recipes) < least:
        _fail(f"compare needs two recipes or more, got {', '.join(recipes) or 'none'}")
    out = out or Path("runs") / "-vs-".join(recipes)
    with _errors(out, trains=True):
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


Best = Annotated[bool, typer.Option("--best", help="The epoch that did best on the test data, not the last.")]
StageOption = Annotated[int, typer.Option("--stage", help="Of the run, counted from 0; -1 is the last.")]
RUNS = "A run's folder, a .safetensors file in it, or the folder of a train or a compare: all its seeds."


@app.command(name="eval")
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help=RUNS)],
    overrides: Overrides = None,
    steps: Annotated[
        str | None, typer.Option(help="Time steps T, such as 1,2,4,8. Default: 1 to T of training.")
    ] = None,
    t: Annotated[
        str | None,
        typer.Option("--t", help="A temporal configuration, such as 3,2,2,5: the time steps of every stage."),
    ] = None,
    calibrate: Annotated[
        int, typer.Option(help="Batches of training data from which batch norms are calibrated anew for what is asked.")
    ] = 0,
    exit_at: Annotated[
        str | None,
        typer.Option("--exit", help="Early exit at confidences above these, such as 0.5,0.9,0.99, or auto."),
    ] = None,
    stage: StageOption = -1,
    best: Best = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    events: Annotated[
        bool, typer.Option("--events", help="Event by event, as an asynchronous chip does it, beside T of training.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(help="With --events: how many of the test data, evenly spread. Default: all.")
    ] = None,
) -> None:
    """Test trained networks at several T.

    Accuracy of the averaged potential and of each single step, and losses. Batch norms have the statistics that
    training left: with mixed time steps, those of its greatest T.

    With --exit, of samples that leave when the network is confident (SEENN-I), the greatest of --steps being T: mean T,
    and time beside all T steps at once. auto chooses the threshold on half of the test samples: the least mean T that
    costs at most a standard error of accuracy there; the table is of the other half.
    """
    from .train.folder import grouped

    if samples is not None and (samples < 1 or not events):
        _fail(f"--samples must be at least 1 and go with --events, got {samples}")
    if events and (steps or t):
        _fail(f"--steps and --t must be left out with --events, which has no clock, got {steps or t}")
    if events:
        _events(path, overrides or [], samples, stage, best, as_json)
        return
    asked = _steps(steps) if steps else None
    thresholds = None if exit_at is None else _thresholds(exit_at)
    if t and exit_at:
        _fail(f"--t and --exit ask for different things, got {t!r} and {exit_at!r}")
    if t and steps:
        _fail(f"--t and --steps ask for different things, got {t!r} and {steps!r}")
    if calibrate < 0:
        _fail(f"--calibrate must be at least 0, got {calibrate}")
    timing = _whole("--t", t) if t else None
    with _errors(path):
        runs = grouped([path])
        found = {
            label: [_tested(run, overrides or [], asked, timing, calibrate, thresholds, stage, best) for run in held]
            for label, held in runs.items()
        }
    if as_json:
        alone = sum(map(len, found.values())) == 1
        typer.echo(json.dumps(next(iter(found.values()))[0] if alone else {"networks": found}, indent=2))
        return
    for label, tested in found.items():
        header, lines = _steps_table(tested) if thresholds is None else _exit_table(tested)
        one, several = tested[0], f"{label}: mean ± sd of {len(tested)} seeds, " if len(tested) > 1 else ""
        title = (
            f"{one['title']}\n{several}stage.{one['stage']} after epoch {one['epoch']}, {one['samples']} test samples"
        )
        if one.get("chosen_on"):
            title += f"; threshold chosen on {one['chosen_on']} others"
        Console().print(_table(header, lines, title))


def _steps_table(tested: list[dict]) -> tuple[tuple[str, ...], list[list[str]]]:
    forms = {"accuracy": (100, ".2f"), "moment": (100, ".2f"), "sdt": (1, ".4f"), "tet": (1, ".4f")}
    lines = []
    for rows in zip(*(each["rows"] for each in tested), strict=True):
        cells = [_spread([scale * row[key] for row in rows], form) for key, (scale, form) in forms.items()]
        lines.append([str(rows[0]["T"]), *cells])
    return ("T", "accuracy, %", "at step T alone, %", "SDT loss", "TET loss"), lines


def _exit_table(tested: list[dict]) -> tuple[tuple[str, ...], list[list[str]]]:
    def saved(rows: tuple[dict, ...], key: str) -> str:
        shares = [row[key] / each["rows"][0][key] for row, each in zip(rows, tested, strict=True)]
        return _spread([100 * (1 - share) for share in shares], ".0f")

    lines = []
    for rows in zip(*(each["rows"] for each in tested), strict=True):
        at = sorted({f"{row['threshold']:g}" for row in rows if row["threshold"] is not None})
        mean_steps = _spread([row["steps"] for row in rows], ".2f")
        accuracy = _spread([100 * row["accuracy"] for row in rows], ".2f")
        lines.append([", ".join(at) or "all steps", mean_steps, accuracy, saved(rows, "steps"), saved(rows, "seconds")])
    return ("leaves above", "mean T", "accuracy, %", "steps saved, %", "time saved, %"), lines


def _events(path: Path, overrides: list[str], samples: int | None, stage: int, best: bool, as_json: bool) -> None:
    from rich.progress import track

    from .train.evaluation import restore, test_events
    from .train.folder import grouped
    from .train.recipe import override

    with _errors(path):
        found: dict[str, list[dict]] = {}
        for label, run in ((label, run) for label, runs in grouped([path]).items() for run in runs):
            model, recipe, about = restore(run, stage, best)
            watch = partial(track, description=str(run), console=Console(stderr=True), transient=True)
            measured = test_events(override(recipe, overrides), model, about["stage"], samples, watch)
            found.setdefault(label, []).append({"run": str(run), "title": recipe.title, **about, **measured})
    if as_json:
        typer.echo(json.dumps({"networks": found}, indent=2))
        return
    header = "network", "clocked, %", "event-driven, %", "gap", "events", "spikes", "operations"
    lines = []
    for label, tested in found.items():
        columns = {
            "clocked": [100 * each["clocked"] for each in tested],
            "event-driven": [100 * each["event_driven"] for each in tested],
            "gap": [100 * (each["event_driven"] - each["clocked"]) for each in tested],
            "events": [each["events"] for each in tested],
            **{name: [sum(each[name].values()) for each in tested] for name in ("spikes", "operations")},
        }
        forms = dict.fromkeys(columns, ",.0f") | {"clocked": ".2f", "event-driven": ".2f", "gap": ".2f"}
        lines.append([label, *(_spread(values, forms[name]) for name, values in columns.items())])
    count = next(iter(found.values()))[0]["samples"]
    title = f"{count} test samples; events, spikes and synaptic operations are those of one sample"
    Console().print(_table(header, lines, title))


def _tested(
    path: Path,
    overrides: list[str],
    at: list[int] | None,
    t: tuple[int, ...] | None,
    calibration: int,
    thresholds: list[float] | None,
    stage: int,
    best: bool,
) -> dict:
    from .train.evaluation import calibrate, early_exit, restore, test
    from .train.recipe import override

    model, recipe, about = restore(path, stage, best)
    recipe = override(recipe, overrides)
    trained = recipe.stage[about["stage"]].steps
    at = at or list(range(1, trained + 1))
    data = recipe.load_data()
    if data.events and max(at) > data.shape[0]:
        _fail(f"--steps must be at most the number of frames, {data.shape[0]}, got {max(at)}")
    about = {"run": str(path), "title": recipe.title, **about, "trained_steps": trained}
    if thresholds is not None:
        if recipe.stage[about["stage"]].network == "ann":
            _fail(f"{path}: stage.{about['stage']} is an ANN, which has no time to leave early")
        if calibration:
            calibrate(recipe, model, data, calibration, max(at))
        return about | early_exit(recipe, model, data, max(at), thresholds)

    def tested(steps: int, t: tuple[int, ...] | None = None):
        if calibration:
            calibrate(recipe, model, data, calibration, steps, t)
        return test(recipe, model, data, steps, t=t)

    def row(label, found, i: int) -> dict:
        return {"T": label, "accuracy": found.accuracy[i], "moment": found.moments[i], "sdt": found.sdt[i],
                "tet": found.tet[i]}  # fmt: skip

    if t:
        if not isinstance(model, Staged) or len(t) != model.n_stages:
            wanted = f"a number for each of its {model.n_stages} stages" if isinstance(model, Staged) else "left out"
            _fail(f"--t must be {wanted} with {type(model).__name__}, got {len(t)} numbers")
        found = tested(max(t) if not data.events else data.shape[0], t)
        rows = [row(",".join(map(str, t)), found, -1)]
    elif calibration:  # of every T, as each has its statistics
        rows = [row(steps, found := tested(steps), -1) for steps in at]
    else:
        found = tested(max(at))
        rows = [row(steps, found, steps - 1) for steps in at]
    return about | {"samples": found.samples, "rows": rows}


def _spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of a run, a train or a compare.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; default: the one given, or plots beside several.")
    ] = None,
) -> None:
    """Draw a run, or several in the same pictures.

    Several are the seeds of a recipe, recipes, whatever folders are given.
    """
    with _errors(runs[0]):
        from .train.plot import plot as draw

        for path in draw(*runs, out=out and _folder(out)):
            typer.echo(path)


@app.command()
def export(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or a .safetensors file in it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    stage: StageOption = -1,
    best: Best = False,
) -> None:
    """Write a trained network's weights for inference.

    The batch norms are folded into the layers before them; the file is one of safetensors, or, if OUT ends in .nir, a
    graph of NIR with a time step of 0.1 ms, for other tools and chips.
    """
    from .nn import fold

    if out.is_dir() or not out.parent.is_dir():
        _fail(f"OUT must be a file in a folder that exists, got {out}")
    with _errors(path):
        from .train.evaluation import restore
        from .train.folder import grouped, save_weights

        runs = [run for held in grouped([path]).values() for run in held]
        if len(runs) > 1:
            _fail(f"{path} holds {len(runs)} runs; name one of them, such as {runs[0]}")
        model, recipe, about = restore(runs[0], stage, best)
        try:
            if out.suffix == ".nir":
                _write_nir(out, model, about["shape"])
                return
            folded = fold(model)
        except ValueError as error:
            _fail(f"{path}: {error}", 1)
        save_weights(out, folded, {**about, "folded": True, "recipe": recipe.settings()})
    typer.echo(f"{out}: for snnkern eval, snnkern report, or load_state_dict of snnkern.nn.fold(model)")


def _write_nir(out: Path, model: torch.nn.Module, shape: list[int]) -> None:
    from .nn import to_nir
    from .train.folder import writing

    frame = shape if len(shape) == 3 else shape[1:]
    graph = to_nir(model, torch.zeros(2, 2, *frame))
    import nir  # to_nir says how to install it

    held = BytesIO()
    nir.write(held, graph)
    with writing(out), replacing(out) as file:
        file.write(held.getvalue())
    typer.echo(f"{out}: for snnkern.nn.from_nir(nir.read(path)), and other tools")


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN|CHECKPOINT", help=RUNS)],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: analysis, in the one given.")] = None,
    samples: Annotated[
        int, typer.Option(help="Of the test data; of the training data for landscape and gradients.")
    ] = 1000,
    points: Annotated[int, typer.Option(help="Of the loss landscape along each direction; 0 leaves it out.")] = 15,
    steps: Annotated[
        int | None, typer.Option(help="T up to which to test; default: twice T of training; all frames.")
    ] = None,
    generalisation: Annotated[
        bool, typer.Option("--generalisation", help="Also noise on weights and inputs, gradients, 1D landscape.")
    ] = False,
    stage: StageOption = -1,
    best: Best = False,
) -> None:
    """Measure trained networks: accuracy, energy, landscape.

    Accuracy over T and at single steps, operations, energy and sparsity by layer, and the loss around the minimum, all
    on the same samples; several networks are drawn into the same pictures: mean and range over the seeds of each
    recipe, and the landscape of the first.
    """
    if samples < 1:
        _fail(f"--samples must be at least 1, got {samples}")
    if points and (points < 3 or points % 2 == 0):
        _fail(f"--points must be odd and at least 3, or 0, got {points}")
    if steps is not None and steps < 1:
        _fail(f"--steps must be at least 1, got {steps}")
    with _errors(paths[0]):
        from . import analysis
        from .train.evaluation import restore
        from .train.folder import common, grouped
        from .train.processes import working

        analysis.pictures.matplotlib()
        restored = {
            label: [(run, *restore(run, stage, best)) for run in runs] for label, runs in grouped(paths).items()
        }
        folder = _folder(out or common(paths) / "analysis")
        found: dict[str, list[dict]] = {label: [] for label in restored}
        for label, run, model, recipe, about in ((label, *each) for label, held in restored.items() for each in held):
            trained = recipe.stage[about["stage"]]
            options = {
                "steps": trained.steps,
                "samples": samples,
                "points": 0 if found[label] else points,
                "directions": 5 if points else 0,
                "generalisation": generalisation,
                **({"longest": trained.steps, "neurons": ()} if trained.network == "ann" else {"longest": steps}),
                "on_part": lambda part, run=run: typer.echo(f"{run}: {part}"),
            }
            data = recipe.load_data()
            if data.events and (steps or 1) > data.shape[0]:
                _fail(f"--steps must be at most the number of frames, {data.shape[0]}, got {steps}")
            with working(recipe.device, recipe.threads) as where:
                found[label].append(analysis.measure(model.to(where.device), data, **options))
        analysis.write(folder, found)
    typer.echo(folder / "analysis.md")


@app.command()
def search(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or that of a train: all its seeds.")],
    overrides: Overrides = None,
    budget: Annotated[int, typer.Option(help="T of the uniform network that the best may cost as much as.")] = 3,
    samples: Annotated[
        int | None,
        typer.Option(help="Configurations to fit the estimate to. Default: 18, more with more than 8 stages."),
    ] = None,
    fresh: Annotated[int, typer.Option(help="Further configurations to check it on.")] = 60,
    repeats: Annotated[int, typer.Option(help="Calibrations of the batch norms for each accuracy.")] = 3,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to, of one run; default: search, in it.")] = None,
    stage: StageOption = -1,
    best: Best = False,
) -> None:
    """Search the best temporal configuration: time steps stage by stage.

    Accuracy is estimated from a few measured configurations, energy from firing rates. The estimate is fitted, checked
    and searched on one half of the test samples; on the other, the best configuration is compared with the uniform one.
    The same command goes on where an earlier one was interrupted.
    """
    for name, value in (("fresh", fresh), ("repeats", repeats), ("budget", budget)):
        if value < 1:
            _fail(f"--{name} must be at least 1, got {value}")
    if path.is_file():
        _fail(f"RUN must be a folder: an exported network has no batch norms to calibrate, got {path}")
    with _errors(path):
        from rich.progress import Progress

        from .train.folder import grouped
        from .train.search import HEADER, rows, verdict
        from .train.search import search as found

        runs = [run for held in grouped([path]).values() for run in held]
        if out is not None and len(runs) > 1:
            _fail(f"{path} holds {len(runs)} runs; with --out name one of them, such as {runs[0]}")
        options = {"budget": budget, "samples": samples, "fresh": fresh, "repeats": repeats, "seed": seed}
        for run in runs:
            folder = out or run / "search"
            with _errors(folder), Progress(transient=True) as bar:
                watch = partial(bar.update, bar.add_task(str(run), total=None))
                result = found(run, folder, overrides or [], stage, best, watch=watch, **options)
            Console().print(_table(HEADER, rows(result), f"{run}: {result['title']}"))
            typer.echo(f"{verdict(result)}\n{folder / 'search.md'}")


@app.command()
def convert(
    target: Annotated[str, typer.Argument(metavar="FILE:NAME", help="Such as model.py:make_model; the file is run.")],
) -> None:
    """Show which neurons of a model snnkern.convert swaps, and why not the others.

    NAME is a function or a class, called without arguments, or a module that is there. The exit code is 1 if nothing is
    swapped.
    """
    from .convert import convert as swap

    report = swap(_model(target))
    shown = Table(*report.HEADER, box=SIMPLE)
    for line in report.lines():
        shown.add_row(*line)
    if report:
        Console(markup=False).print(shown)
    typer.echo(report.summary())
    if not report.swapped:
        raise typer.Exit(1)


def _model(target: str) -> torch.nn.Module:
    file, _, name = target.rpartition(":")
    if not file or not name.isidentifier():
        _fail(f"FILE:NAME must be a Python file and a name in it, such as model.py:make_model, got {target!r}")
    path = Path(file)
    if not path.is_file():
        _fail(f"{file}: no such file", 1)
    sys.path.insert(0, str(path.parent.resolve()))  # as of a script
    loader = SourceFileLoader(path.stem, str(path))
    module = module_from_spec(spec_from_loader(path.stem, loader))
    sys.modules[path.stem] = module
    loader.exec_module(module)
    if not hasattr(module, name):
        _fail(f"{file} has no {name}", 1)
    made = getattr(module, name)
    if callable(made) and not isinstance(made, torch.nn.Module):
        try:
            signature(made).bind()
        except TypeError as error:
            _fail(f"{name} of {file} is called without arguments, but: {error}", 1)
        made = made()
    if not isinstance(made, torch.nn.Module):
        _fail(f"{name} of {file} must make a torch.nn.Module, got {made!r}", 1)
    return made


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure speed beside other libraries; in a source checkout."""
    checkouts = [Path(__file__).parents[1], Path.cwd()]  # the latter measures the installed snnkern
    checkout = next((folder for folder in checkouts if (folder / "benchmarks" / "run.py").exists()), None)
    if checkout is None:
        _fail("the benchmarks are not installed: call this in a source checkout, which has them in benchmarks/", 1)
    sys.path.insert(0, str(checkout))
    try:
        from benchmarks.run import app as suite
    except ModuleNotFoundError as error:
        _fail(f"{error}; `pip install 'snnkern[bench]'` brings what the benchmarks need", 1)
    suite(["--help" if part == "-h" else part for part in context.args], prog_name="snnkern bench")


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT.py", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENT ...]", show_default=False)] = None,
) -> None:
    """Run a training script written for SpikingJelly, unchanged, with snnkern's neurons in place of its own.

    SpikingJelly need not be installed. Under torchrun: torchrun --no-python snnkern run SCRIPT.py.
    """
    if not script.is_file():
        _fail(f"SCRIPT.py must be a file, got {script}")
    from .hook import run

    try:
        run(str(script), arguments or [])
    except (Exception, KeyboardInterrupt) as error:  # typer has other codes for some, and hides where they are from
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


def main() -> None:
    app()


def _list() -> None:
    with _errors(Path("runs")):
        from .train.recipe import load, recipes

        found = {name: load(name) for name in recipes()}
    for name, recipe in found.items():
        typer.echo(f"{name:26}{recipe.title}\n{'':26}{recipe.source}")


def _steps(text: str) -> list[int]:
    return sorted(set(_whole("--steps", text)))


def _whole(option: str, text: str) -> tuple[int, ...]:
    return _numbers(option, text, int, lambda value: value >= 1, "whole numbers from 1 up with commas between")


def _thresholds(text: str) -> list[float]:
    """Empty for ``auto``."""
    wanted = "auto or numbers from 0 to 1 with commas between"
    return [] if text == "auto" else sorted(set(_numbers("--exit", text, float, lambda value: 0 <= value <= 1, wanted)))


def _numbers(option: str, text: str, kind: type, fits: Callable[[float], bool], wanted: str) -> tuple:
    try:
        numbers = tuple(kind(part) for part in text.split(","))
        if not all(map(fits, numbers)):
            raise ValueError
    except ValueError:
        _fail(f"{option} must be {wanted}, got {text!r}")
    return numbers


def _table(header, lines: list[list[str]], title: str | None) -> Table:
    shown = Table(*header, title=title, box=SIMPLE)
    for column in shown.columns[1:]:
        column.justify = "right"
    for line in lines:
        shown.add_row(*line)
    return shown


def _folder(path: Path) -> Path:
    """``path`` as a folder that can be written to: found out before the work, not after it."""
    with _errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path):
            pass
    return path


@contextmanager
def _errors(folder: Path, trains: bool = False):
    """Mistakes of the user, and what stops a training, as one line."""
    try:
        yield
    except RecipeError as error:
        _fail(str(error))
    except Interrupted as error:
        _fail(f"interrupted in {error}; all of it is safe in {folder}. The same command goes on from there.", 130)
    except KeyboardInterrupt:
        safe = f"; what the last checkpoint holds is safe in {folder}. The same command goes on from it."
        _fail(f"interrupted{safe if trains else ''}", 130)
    except FileExistsError as error:
        _fail(f"{error.filename} is a file, where a folder was to be made", 1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except (RunError, DataError, ImportError) as error:
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


def _nvrtc() -> str:
    from .backend.cuda.program import folder, missing

    if reason := missing():
        return reason
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings raise what they like where the library is missing
        return f"cannot be loaded: {error}"
    return f"{major}.{minor}; compiled kernels are kept in {folder()}"


def _instruction_set() -> str:
    try:
        from ._C import cpu_isa
    except ImportError:
        return "unknown without the compiled extension"
    return cpu_isa()


def _devices() -> list[str]:
    return [_device(i) for i in range(torch.cuda.device_count())]


def _device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
