"""The same training with several losses, compared seed by seed.

Between seeds accuracy spreads more than two losses differ. But a seed gives both the same split, noise, initial weights
and batches, so the differences per seed can tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from .data import digits
from .runs import claim, read_metrics, replacing, versions, write_json
from .train import Settings, evaluate, fit, using_threads

__all__ = ["TEST_STEPS", "compare", "table"]

TEST_STEPS = (1, 2, 3, 4, 6, 8, 16, 32)


def compare(
    runs: Sequence[Settings], folder: str | Path, on_epoch: Callable[[Settings, dict], None] | None = None
) -> dict:
    """Fits every run, each in its own folder inside ``folder``, and tests it at T and at the other ``TEST_STEPS``.

    Args:
        runs: settings that differ in ``loss`` and ``seed`` alone, with the same seeds for every loss.
        on_epoch: see ``fit``.

    Returns:
        What it also writes to ``results.json`` (``rows``, ``runs``, settings and versions) and, as a table, to
        ``results.md``. With two losses, rows have their paired difference: the second minus the first.
    """
    folder = Path(folder)
    names, seeds = list(dict.fromkeys(run.loss for run in runs)), sorted({run.seed for run in runs})
    common = [{k: v for k, v in asdict(run).items() if k not in ("loss", "seed")} for run in runs]
    pairs = sorted((run.loss, run.seed) for run in runs)
    if not runs or pairs != sorted((n, s) for n in names for s in seeds) or any(c != common[0] for c in common):
        raise ValueError("runs must differ in loss and seed alone, and hold each loss once with each seed")
    claim(folder, common[0])
    fitted = [_fit_and_test(run, folder / f"{run.loss}-seed{run.seed}", on_epoch) for run in runs]
    results = {
        "settings": common[0],
        "versions": versions(),
        "losses": names,
        "seeds": seeds,
        "rows": _rows(fitted, names, seeds, runs[0].steps),
        "runs": fitted,
    }
    write_json(folder / "results.json", results)
    header, lines = table(results)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    with replacing(folder / "results.md") as file:
        file.write("".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *lines]).encode())
    return results


def table(results: dict) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of ``compare``'s results, as text."""
    names, count = results["losses"], len(results["seeds"])
    header = [f"mean ± sd, {count} seeds" if count > 1 else "1 seed", *map(str.upper, names)]
    if len(names) == 2:
        header += [f"{names[1].upper()} - {names[0].upper()}", "> 0 in"]
    lines = []
    for row in results["rows"]:
        places = 1 if row["measure"].endswith("%") else 2
        cells = [_text(row[name], count, f".{places}f") for name in names]
        if len(names) == 2:
            cells += [_text(row["difference"], count, f"+.{places}f"), f"{row['difference']['positive']} of {count}"]
        lines.append([row["measure"], *cells])
    return header, lines


def _fit_and_test(run: Settings, folder: Path, on_epoch) -> dict:
    model = fit(run, folder, on_epoch)
    with using_threads(run.threads):
        _, test = digits(run.seed, run.noise, run.train)
        tested = evaluate(model, test, max(*TEST_STEPS, 2 * run.steps))
    epochs = read_metrics(folder)
    return {
        "loss": run.loss,
        "seed": run.seed,
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "test_sdt": epochs[-1]["test_sdt"],
        "test_tet": epochs[-1]["test_tet"],
        "accuracy": tested.accuracy,
        "moments": tested.moments,
    }


def _rows(fitted: list[dict], names: list[str], seeds: list[int], steps: int) -> list[dict]:
    measures: dict[str, Callable[[dict], float]] = {}
    for t in sorted({*TEST_STEPS, steps}):
        measures[f"accuracy at T = {t}, %"] = lambda run, t=t: 100 * run["accuracy"][t - 1]
    measures["at a single step, %"] = lambda run: 100 * statistics.mean(run["moments"][:steps])
    measures["SDT loss, test"] = lambda run: run["test_sdt"]
    measures["TET loss, test"] = lambda run: run["test_tet"]
    found = {(run["loss"], run["seed"]): run for run in fitted}
    rows = []
    for measure, value in measures.items():
        values = [[value(found[name, seed]) for seed in seeds] for name in names]
        row = {"measure": measure} | {name: _mean_sd(v) for name, v in zip(names, values, strict=True)}
        if len(names) == 2:
            differences = [after - before for before, after in zip(*values, strict=True)]
            row["difference"] = {**_mean_sd(differences), "positive": sum(d > 0 for d in differences)}
        rows.append(row)
    return rows


def _mean_sd(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def _text(value: dict[str, float], count: int, form: str) -> str:
    return f"{value['mean']:{form}}" + (f" ± {value['sd']:{form.lstrip('+')}}" if count > 1 else "")
