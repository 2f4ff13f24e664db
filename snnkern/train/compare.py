"""Recipes trained with the same seeds, and compared seed by seed.

Between seeds accuracy spreads more than two methods differ. But a seed gives all recipes the same split, noise, initial
weights and batches, so the differences per seed can tell.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from ..files import replacing, versions, write_json
from .evaluation import test
from .folder import claim, holding, prepared, read_metrics, reading, writing
from .loop import fit
from .processes import world
from .progress import Watch
from .recipe import Recipe, RecipeError, load

__all__ = ["compare", "named", "read_results", "run_folder", "table"]


def named(words: Iterable[str]) -> dict[str, Recipe]:
    """The recipes that words of a command line ask for, by names that tell them apart and can be folders.

    A word is a recipe, as ``load`` takes it; a recipe with overrides of its own, ``digits-tet:stage.steps=4:seeds=3``;
    or an override of all of them, ``stage.steps=4``. One recipe with several values is a sweep.
    """
    words = [re.split(r":(?=[\w.]+=)", word) for word in words]
    asked = [word for word in words if "=" not in word[0]]
    general = [text for word in words if "=" in word[0] for text in word]
    paths = [Path(first).parent / Path(first).stem for first, *_ in asked]
    alike = len(set(paths)) > len({path.stem for path in paths})  # a/my.toml, b/my.toml
    found = {}
    for (first, *own), path in zip(asked, paths, strict=True):
        parts = [str(path) if alike else path.stem, *(_short(text, asked) for text in own)]
        name = re.sub(r"[^\w.=+,-]+", "_", ",".join(parts)).strip("_")
        if name in found:
            raise RecipeError(f"recipes must differ, got {':'.join([first, *own])} twice")
        try:
            found[name] = load(first, [*general, *own])
        except RecipeError as error:
            if len(asked) == 1:
                raise
            raise RecipeError(f"{error} (in {name}; an override of one recipe alone is RECIPE:KEY=VALUE)") from error
    return found


def _short(override: str, asked: list[list[str]]) -> str:
    """An override with the last part of its key, if no other key ends alike: loss=sdt for stage.loss.name=sdt."""
    key, _, value = override.partition("=")
    others = {text.partition("=")[0] for _, *own in asked for text in own} - {key}
    last = _last(key)
    return f"{key if last in map(_last, others) else last}={value}"


def _last(key: str) -> str:
    return key.removesuffix(".name").rpartition(".")[2]


def compare(recipes: Mapping[str, Recipe], folder: str | Path, watch: Watch | None = None) -> dict | None:
    """Fits every recipe with each of its seeds, each in a folder inside ``folder``, and tests them at ``test_steps``.

    Args:
        recipes: by name; all with the same seeds. One is only trained and tested.
        watch: looks on; see ``snnkern.train.progress``.

    Returns:
        What it also writes to ``results.json`` (``rows``, ``runs``, recipes and versions) and, as a table, to
        ``results.md``: what every stage's network reached at its own T, after its last epoch and its best, and what
        the last one does at all T. Every recipe but the first has its paired difference to the first in the rows that
        both have. None in processes of torchrun other than the first.
    """
    folder, names = Path(folder), list(recipes)
    runs = {name: recipe.runs() for name, recipe in recipes.items()}
    seeds = [run.seed for run in runs[names[0]]]
    for name in names:
        if [run.seed for run in runs[name]] != seeds:
            raise RecipeError(f"seeds must be the same for all recipes, got {recipes[names[0]].seeds} for {names[0]} "
                              f"and {recipes[name].seeds} for {name}")  # fmt: skip
    with world(recipes[names[0]].device) as where, ExitStack() as until_the_end:
        if where.first and len(names) > 1:
            prepared(folder)
            until_the_end.enter_context(holding(folder))
            claim(folder, {name: recipe.settings() for name, recipe in recipes.items()})
        at = sorted({t for recipe in recipes.values() for t in _test_steps(recipe)})
        fitted = [
            _fit_and_test(name, run, run_folder(folder, name, run.seed, len(names)), at[-1], watch)
            for name in names
            for run in runs[name]
        ]
        if not where.first:
            return None
    for run in fitted:
        epochs = read_metrics(run_folder(folder, run["name"], run["seed"], len(names)))
        run["seconds"] = sum(epoch["seconds"] + epoch.get("search_seconds", 0.0) for epoch in epochs)
        run["cost"] = sum(epoch.get("passes", 1) * epoch.get("mean_t", epoch["steps"]) for epoch in epochs)
        run["stages"] = [_stage_of(epochs, stage) for stage in range(epochs[-1]["stage"] + 1)]
    results = {
        "recipes": {name: recipe.settings() for name, recipe in recipes.items()},
        "versions": versions(),
        "names": names,
        "seeds": seeds,
        "test_steps": [t for t in at if t <= len(fitted[0]["accuracy"])],
        "runs": fitted,
    }
    results["rows"] = _rows(results)
    header, lines = table(results)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    with writing(folder), replacing(folder / "results.md") as file:
        write_json(folder / "results.json", results)
        file.write("".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *lines]).encode())
    return results


def read_results(folder: Path) -> dict:
    """What ``compare`` wrote, as far as pictures need it."""
    path = folder / "results.json"
    with reading(path):
        results = json.loads(path.read_bytes())
        at, names = results["test_steps"], results["names"]
        for run in results["runs"]:
            over_time = *run["accuracy"], *run["moments"]
            if run["name"] not in names or not isinstance(run["seed"], int):
                raise ValueError(f"there is no run {run['name']!r} of seed {run['seed']!r}")
            if not all(0 <= value <= 1 for value in over_time) or not run["moments"]:
                raise ValueError(f"accuracies must be from 0 to 1, got {over_time}")
            if len(run["accuracy"]) != len(run["moments"]) or not set(at) <= {*range(1, len(over_time) // 2 + 1), 1}:
                raise ValueError(f"accuracies must be one for each of {at} steps, got {over_time}")
    return results


def run_folder(folder: Path, name: str, seed: int, recipes: int) -> Path:
    """Where ``compare`` has the run of a recipe's ``name`` and ``seed``: in a folder of its name beside several."""
    return folder / name / f"seed{seed}" if recipes > 1 else folder / f"seed{seed}"


def table(results: dict) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of ``compare``'s results, as text."""
    (first, *others), count = results["names"], len(results["seeds"])
    header = [f"mean ± sd, {count} seeds" if count > 1 else "1 seed", first]
    for name in others:
        header += [name, f"{name} - {first}" if len(others) > 1 else "difference", "> 0 in"]
    lines = []
    for row in results["rows"]:
        places = 1 if row["measure"].endswith("%") else 2
        cells = [row["measure"], _text(row.get(first), count, f".{places}f")]
        for name in others:
            difference = row["differences"].get(name)
            cells += [_text(row.get(name), count, f".{places}f"), _text(difference, count, f"+.{places}f")]
            cells.append(f"{difference['positive']} of {count}" if difference else "")
        lines.append(cells)
    return header, lines


def _test_steps(recipe: Recipe) -> list[int]:
    last = recipe.stage[-1]
    return list(recipe.test_steps or range(1, 2 * last.steps + 1 if last.network == "snn" else 2))


def _fit_and_test(name: str, run: Recipe, folder: Path, steps: int, watch: Watch | None) -> dict:
    model, trained = fit(run, folder, watch), run.stage[-1].steps
    tested = test(run, model, run.load_data(), max(steps, trained))
    return {
        "name": name,
        "seed": run.seed,
        "steps": trained,
        "accuracy": tested.accuracy,
        "moments": tested.moments,
        "test_sdt": tested.sdt[trained - 1],
        "test_tet": tested.tet[trained - 1],
    }


def _stage_of(epochs: list[dict], stage: int) -> dict:
    """What a stage's network reached on the test data, at its own T."""
    ours = [epoch for epoch in epochs if epoch["stage"] == stage]
    best = max(ours, key=lambda epoch: epoch["test_accuracy"])
    label = "ANN" if best["network"] == "ann" else f"T = {best['steps']}"
    reached = {"last": ours[-1]["test_accuracy"], "best": best["test_accuracy"], "best_epoch": best["epoch"]}
    return {"label": label, "network": best["network"], "steps": best["steps"], **reached}


def _rows(results: dict) -> list[dict]:
    runs, measures = results["runs"], {}
    several = any(len(run["stages"]) > 1 for run in runs)
    if several:
        for key in dict.fromkeys(key for run in runs for key in _by_label(run)):
            for which in ("last", "best"):
                measures[f"{key}, {which} epoch, %"] = lambda run, at=(key, which): _reached(_by_label(run), *at)
    for which in ("last", "best"):
        name = f"last stage, {which} epoch, %" if several else f"{which} epoch, %"
        measures[name] = lambda run, which=which: 100 * run["stages"][-1][which]
    for t in results["test_steps"]:
        name = f"last stage, run at T = {t}, %" if several else f"accuracy at T = {t}, %"
        measures[name] = lambda run, t=t: 100 * run["accuracy"][t - 1]
    measures["at a single step, %"] = lambda run: 100 * statistics.mean(run["moments"][: run["steps"]])
    measures["SDT loss, test"] = lambda run: run["test_sdt"]
    measures["TET loss, test"] = lambda run: run["test_tet"]
    if len({run["cost"] for run in runs}) > 1:
        measures["cost: epochs times T"] = lambda run: run["cost"]
    return [_row(measure, value, results) for measure, value in measures.items()]


def _by_label(run: dict) -> dict[str, dict]:
    """Stages by T, which is what different recipes have in common; where one has a T twice, by their numbers too."""
    labels = [stage["label"] for stage in run["stages"]]
    return {
        label if labels.count(label) == 1 else f"stage.{i}, {label}": stage
        for i, (label, stage) in enumerate(zip(labels, run["stages"], strict=True))
    }


def _reached(stages: dict[str, dict], label: str, which: str) -> float | None:
    return 100 * stages[label][which] if label in stages else None


def _row(measure: str, value: Callable[[dict], float | None], results: dict) -> dict:
    """Mean and deviation of each recipe that has the value, and of its differences to the first, seed by seed."""
    (first, *others), seeds = results["names"], results["seeds"]
    found = {(run["name"], run["seed"]): value(run) for run in results["runs"]}
    values = {name: [found[name, seed] for seed in seeds] for name in results["names"]}
    values = {name: row for name, row in values.items() if None not in row}
    row = {"measure": measure} | {name: _mean_sd(v) for name, v in values.items()}
    row["differences"] = {}
    for name in others:
        if name in values and first in values:
            differences = [after - before for before, after in zip(values[first], values[name], strict=True)]
            row["differences"][name] = {**_mean_sd(differences), "positive": sum(d > 0 for d in differences)}
    return row


def _mean_sd(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def _text(value: dict[str, float] | None, count: int, form: str) -> str:
    if value is None:
        return ""
    return f"{value['mean']:{form}}" + (f" ± {value['sd']:{form.lstrip('+')}}" if count > 1 else "")
