"""Recipes trained with the same seeds, and compared seed by seed.

Between seeds accuracy spreads more than two methods differ. But a seed gives all recipes the same split, noise, initial
weights and batches, so the differences per seed can tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from .evaluation import test
from .folder import claim, read_metrics, replacing, versions, write_json
from .loop import fit
from .processes import world
from .progress import Watch
from .recipe import Recipe, RecipeError

__all__ = ["compare", "run_folder", "table"]


def compare(recipes: Mapping[str, Recipe], folder: str | Path, watch: Watch | None = None) -> dict | None:
    """Fits every recipe with each of its seeds, each in a folder inside ``folder``, and tests them at ``test_steps``.

    Args:
        recipes: by name; all with the same seeds. One is only trained and tested.

    Returns:
        What it also writes to ``results.json`` (``rows``, ``runs``, recipes and versions) and, as a table, to
        ``results.md``. Every recipe but the first has its paired difference to the first in the rows. None in
        processes of torchrun other than the first.
    """
    folder, names = Path(folder), list(recipes)
    runs = {name: recipe.runs() for name, recipe in recipes.items()}
    seeds = [run.seed for run in runs[names[0]]]
    for name in names:
        if [run.seed for run in runs[name]] != seeds:
            raise RecipeError(f"seeds must be the same for all recipes, got {recipes[names[0]].seeds} for {names[0]} "
                              f"and {recipes[name].seeds} for {name}")  # fmt: skip
    with world(recipes[names[0]].device) as where:
        if where.first and len(names) > 1:
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
    results = {
        "recipes": {name: recipe.settings() for name, recipe in recipes.items()},
        "versions": versions(),
        "names": names,
        "seeds": seeds,
        "test_steps": [t for t in at if t <= len(fitted[0]["accuracy"])],
        "runs": fitted,
    }
    results["rows"] = _rows(results)
    write_json(folder / "results.json", results)
    header, lines = table(results)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    with replacing(folder / "results.md") as file:
        file.write("".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *lines]).encode())
    return results


def run_folder(folder: Path, name: str, seed: int, recipes: int) -> Path:
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
        cells = [row["measure"], _text(row[first], count, f".{places}f")]
        for name in others:
            difference = row["differences"][name]
            cells += [_text(row[name], count, f".{places}f"), _text(difference, count, f"+.{places}f")]
            cells.append(f"{difference['positive']} of {count}")
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
        "cost": run.total_cost,
        "accuracy": tested.accuracy,
        "moments": tested.moments,
        "test_sdt": tested.sdt[trained - 1],
        "test_tet": tested.tet[trained - 1],
    }


def _rows(results: dict) -> list[dict]:
    measures: dict[str, Callable[[dict], float]] = {}
    for t in results["test_steps"]:
        measures[f"accuracy at T = {t}, %"] = lambda run, t=t: 100 * run["accuracy"][t - 1]
    measures["at a single step, %"] = lambda run: 100 * statistics.mean(run["moments"][: run["steps"]])
    measures["SDT loss, test"] = lambda run: run["test_sdt"]
    measures["TET loss, test"] = lambda run: run["test_tet"]
    if len({run["cost"] for run in results["runs"]}) > 1:
        measures["cost: epochs times T"] = lambda run: run["cost"]
    (first, *others), seeds = results["names"], results["seeds"]
    found = {(run["name"], run["seed"]): run for run in results["runs"]}
    rows = []
    for measure, value in measures.items():
        values = {name: [value(found[name, seed]) for seed in seeds] for name in results["names"]}
        row = {"measure": measure} | {name: _mean_sd(v) for name, v in values.items()}
        row["differences"] = {}
        for name in others:
            differences = [after - before for before, after in zip(values[first], values[name], strict=True)]
            row["differences"][name] = {**_mean_sd(differences), "positive": sum(d > 0 for d in differences)}
        rows.append(row)
    return rows


def _mean_sd(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def _text(value: dict[str, float], count: int, form: str) -> str:
    return f"{value['mean']:{form}}" + (f" ± {value['sd']:{form.lstrip('+')}}" if count > 1 else "")
