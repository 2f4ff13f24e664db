"""The best temporal configuration of a trained network under an energy budget, as ``snnkern search`` finds it.

Accuracies of random configurations are measured, an estimate is fitted to some and checked on the others, and the best
configuration is searched with it (``methods.mtt_search``). All that is on one half of the test samples; on the other
half, which nothing was chosen by, the configuration found is compared with the uniform one that the budget stands for.
The paper chooses and judges on the same test data.

Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, section 5.3 and appendix A.3.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from ..analysis import pictures
from ..analysis.configurations import right, stage_rates
from ..analysis.report import _table
from ..files import replacing, versions, write_json
from ..methods import mtt_search
from ..methods.mtt import Sampler
from ..models import Staged
from .batches import Parts
from .evaluation import restore, training_parts
from .folder import Interrupted, Request, RunError, reading, writing
from .processes import working
from .recipe import Stage, override

__all__ = ["HEADER", "rows", "search", "verdict"]

BATCH = 256  # of test samples
RATED = 1000  # samples at most that firing rates are counted on


def search(
    run: Path,
    folder: Path,
    overrides: Iterable[str] = (),
    stage: int = -1,
    best: bool = False,
    *,
    budget: int = 3,
    samples: int | None = None,
    fresh: int = 60,
    repeats: int = 3,
    seed: int = 0,
    watch: Callable[..., None] = lambda completed, total: None,
) -> dict:
    """Searches, and writes ``search.json``, ``search.md`` and ``search.png`` to ``folder``, made where missing.

    Args:
        run, stage, best: see ``snnkern.train.evaluation.restore``.
        folder: of the files.
        overrides: ``key=value``, of the run's recipe.
        budget: T_g: the best configuration costs no more than the uniform one of so many steps.
        samples: configurations that the estimate is fitted to. Default: 18, as published for 8 stages, or twice as many
            as there are unknowns, if that is more.
        fresh: further ones that it is checked on; published: 1000.
        repeats: calibrations of the batch norms that each accuracy is the mean of.
        seed: of the configurations, the halves of the test samples and the samples for calibration.
        watch: called with ``completed=`` and ``total=``, in measurements.

    What was measured is kept in ``measured.json`` and not measured again by a later call.

    Returns: plain data, as in ``search.json``; accuracies are fractions.
    """
    model, recipe, about = restore(run, stage, best)
    recipe = override(recipe, overrides)
    trained = recipe.stage[about["stage"]]
    sampler = _sampler(run, model, trained)
    stages = model.n_stages
    samples = max(18, 2 * (stages + 1)) if samples is None else samples
    _check(sampler, stages, budget, samples, fresh)
    t = _drawn(sampler, stages, samples + fresh, seed)
    pictures.matplotlib()  # before the work, not after it

    data = recipe.load_data()
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    if not half:
        raise RunError(
            f"the test data must have two samples at least, one to choose by and one to judge by, got {half}"
        )
    of = {
        "weights": _digest(model),
        "data": {key: value for key, value in recipe.data.items() if key != "root"},
        **{key: getattr(recipe, key) for key in ("batch", "accumulate", "amp")},
        "calibration": (trained.mtt and trained.mtt.calibration) or 10,
        "repeats": repeats,
        "seed": seed,
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    kept = _Kept.open(folder / "measured.json", of)
    with Request() as asked, working(recipe.device, recipe.threads, recipe.deterministic) as where:
        model.to(where.device)
        seen = where.device, trained.steps
        calibrations = [
            training_parts(recipe, data, *seen, (seed, i, "search"), of["calibration"]) for i in range(repeats)
        ]

        def given(index: torch.Tensor) -> Parts:
            options = data.events, recipe.channels_last
            return Parts(data.test, index.split(BATCH), *seen, *options, workers=recipe.workers)

        choosing, judging = given(order[:half]), given(order[half:])
        total, count = samples + fresh + 4, itertools.count(1)

        def shares(t: tuple[int, ...], parts: Parts) -> torch.Tensor:
            if asked.stop:
                raise Interrupted(f"the search, with {len(kept.accuracies)} configurations measured")
            with where.autocast(recipe.amp):
                return right(model, t, calibrations, parts)

        def measured(t: tuple[int, ...]) -> float:
            if t not in kept.accuracies:
                kept.add(t, shares(t, choosing).mean().item())
            watch(completed=next(count), total=total)
            return kept.accuracies[t]

        def judged(t: tuple[int, ...]) -> torch.Tensor:
            found = shares(t, judging)
            watch(completed=next(count), total=total)
            return found

        accuracies = [measured(each) for each in t]
        with where.autocast(recipe.amp):
            some = torch.cat([x for x, _ in given(order[:half][:RATED])], dim=1 if data.events else 0)
            rates = stage_rates(model, some, None if data.events else trained.steps)
        estimate = mtt_search.fit(t[:samples], accuracies[:samples])
        found = mtt_search.search(estimate, rates, budget, sampler.low, sampler.high, sampler.monotone)
        compared = {"best": found.t, "uniform": (budget,) * stages}
        for each in compared.values():
            measured(each)
        judgements = {name: judged(each) for name, each in compared.items()}

    def row(t: tuple[int, ...]) -> dict:
        return {"t": t, "estimated": estimate.predict(t), "measured": kept.accuracies[t]}

    def group(part: slice) -> dict:
        return {**mtt_search.agreement(estimate, t[part], accuracies[part])._asdict(), "rows": [*map(row, t[part])]}

    difference = judgements["best"] - judgements["uniform"]
    result = {
        "run": str(run),
        "title": recipe.title,
        **about,
        "versions": versions(),
        "mixed": trained.mtt is not None,
        "sampler": asdict(sampler),
        **{"budget": budget, "repeats": repeats, "seed": seed, "choosing": half, "judging": len(order) - half},
        "rates": rates,
        "estimate": asdict(estimate),
        "fitted": group(slice(samples)),
        "fresh": group(slice(samples, None)),
        **{
            name: {**row(each), "judged": judgements[name].mean().item(), "energy": mtt_search.energy(each, rates)}
            for name, each in compared.items()
        },
        "nodes": found.nodes,
        "difference": {
            "mean": difference.mean().item(),
            "standard_error": difference.std(correction=len(difference) > 1).item() / math.sqrt(len(difference)),
        },
    }
    _write(folder, result)
    return result


def _sampler(run: Path, model: torch.nn.Module, trained: Stage) -> Sampler:
    """The bounds of training, or all that a network trained otherwise can be asked for."""
    if trained.network == "ann" or not isinstance(model, Staged):
        kind = "an ANN" if trained.network == "ann" else f"a {type(model).__name__}"
        raise RunError(f"{run} must be a spiking network in stages, got {kind}")
    mtt = trained.mtt
    if mtt and mtt.first_fixed:
        raise RunError(f"{run} was trained with mtt.first_fixed: what its first stage costs and gives cannot be told")
    sampler = Sampler(mtt.low, trained.steps, monotone=mtt.monotone) if mtt else Sampler(1, trained.steps)
    if sampler.low == sampler.high:
        raise RunError(f"{run} must be trained for more than one number of steps, got {sampler.low} alone")
    return sampler


def _check(sampler: Sampler, stages: int, budget: int, samples: int, fresh: int) -> None:
    if not sampler.low <= budget <= sampler.high:
        raise RunError(f"budget must be one of the steps of training, {sampler.low} to {sampler.high}, got {budget}")
    if samples <= stages:
        raise RunError(f"samples must be at least {stages + 1}, one more than the network has stages, got {samples}")
    values = sampler.high - sampler.low + 1
    there_are = math.comb(values + stages - 1, stages) if sampler.monotone else values**stages
    if samples + fresh > there_are:
        raise RunError(
            f"samples and fresh must be no more than the {there_are} configurations of {stages} stages with "
            f"{sampler.low} to {sampler.high} steps, got {samples} and {fresh}"
        )


def _drawn(sampler: Sampler, stages: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """So many configurations, all different."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    while len(drawn) < count:
        drawn[sampler.draw(stages, generator)] = None
    return [*drawn]


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class _Kept:
    """Accuracies that were measured, and of what."""

    path: Path
    of: dict
    accuracies: dict[tuple[int, ...], float]

    @classmethod
    def open(cls, path: Path, of: dict) -> _Kept:
        of = json.loads(json.dumps(of))
        if not path.exists():
            return cls(path, of, {})
        with reading(path, "; move it away to measure anew"):
            held = json.loads(path.read_bytes())
            before = {**held["of"]}
            found = {tuple(row["t"]): 1.0 * row["accuracy"] for row in held["measured"]}
            if not all(0 <= accuracy <= 1 for accuracy in found.values()):
                raise ValueError("an accuracy is not from 0 to 1")
        changed = [f"{k} {before.get(k)!r} there, {of[k]!r} here" for k in of if before.get(k) != of[k]]
        if changed:
            raise RunError(f"{path} holds what was measured otherwise ({'; '.join(changed)}); choose another folder")
        return cls(path, of, found)

    def add(self, t: tuple[int, ...], accuracy: float) -> None:
        self.accuracies[t] = accuracy
        rows = [{"t": t, "accuracy": accuracy} for t, accuracy in self.accuracies.items()]
        with writing(self.path):
            write_json(self.path, {"of": self.of, "measured": rows})


HEADER = ("", "t", "estimated, %", "measured, %", "judged, %", "energy")


def rows(result: dict) -> list[list[str]]:
    """Under ``HEADER``, of the result of ``search``: the best configuration and the uniform one."""
    found = []
    for name in ("best", "uniform"):
        row = result[name]
        percents = [f"{100 * row[key]:.2f}" for key in ("estimated", "measured", "judged")]
        found.append([name, " ".join(map(str, row["t"])), *percents, f"{row['energy']:.4f}"])
    return found


def verdict(result: dict) -> str:
    """What the judging half of the test samples says, in a sentence; ``result`` is that of ``search``."""
    gap, error = (100 * result["difference"][key] for key in ("mean", "standard_error"))
    known = "" if result["mixed"] else f"Trained at T = {result['sampler']['high']} alone, not with mixed time steps. "
    return (
        f"{known}Best less uniform, judged on {result['judging']} samples that nothing was chosen by: {gap:+.2f} ± "
        f"{error:.2f} points (standard error, in pairs)."
    )


def _write(folder: Path, result: dict) -> None:
    with writing(folder):
        write_json(folder / "search.json", result)
        _draw(folder / "search.png", result)
        with replacing(folder / "search.md") as file:
            file.write(_text(result).encode())


def _draw(path: Path, result: dict) -> None:
    groups = {
        f"{len(result['fitted']['rows'])} fitted": result["fitted"]["rows"],
        f"{len(result['fresh']['rows'])} fresh": result["fresh"]["rows"],
        "best": [result["best"]],
        f"uniform, T = {result['budget']}": [result["uniform"]],
    }
    dots = {label: [(100 * r["estimated"], 100 * r["measured"]) for r in rows] for label, rows in groups.items()}
    title = "Temporal configurations, half of the test samples"
    pictures.scatter(path, dots, "estimated accuracy, %", "measured accuracy, %", title)


def _text(result: dict) -> str:
    fitted, fresh, estimate, sampler = (result[key] for key in ("fitted", "fresh", "estimate", "sampler"))
    order = ", not growing from stage to stage" if sampler["monotone"] else ""

    def agrees(group: dict) -> list[str]:
        r = "-" if group["correlation"] is None else f"{group['correlation']:.2f}"
        values = [row["measured"] for row in group["rows"]]
        spread = math.sqrt(fmean((value - fmean(values)) ** 2 for value in values))
        return [str(len(values)), r, f"{100 * group['rmse']:.2f}", f"{100 * spread:.2f}"]

    return "\n".join(
        [
            f"# Best temporal configuration: {result['title']}\n",
            f"t_i from {sampler['low']} to {sampler['high']}{order}. Accuracies are means over {result['repeats']} "
            f"calibrations of the batch norms. The estimate was fitted, checked and searched on {result['choosing']} "
            f"of the test samples (measured), the result compared on the other {result['judging']} (judged).\n",
            _table(HEADER, rows(result)),
            f"{verdict(result)} Energy is the sum of t_i R_i; the best may spend as much as the uniform one.\n",
            "## Estimate: sum of K_i sqrt(log2 t_i), and c\n",
            _table(
                ("stage", "K, points", "R, spikes per neuron and step"),
                (
                    [str(i), f"{100 * k:.2f}", f"{rate:.4f}"]
                    for i, (k, rate) in enumerate(zip(estimate["K"], result["rates"], strict=True), 1)
                ),
            ),
            f"c = {100 * estimate['c']:.2f} %; the search looked at {result['nodes']} partial configurations.\n",
            _table(
                ("configurations", "number", "correlation", "RMSE, points", "their spread, points"),
                [["fitted", *agrees(fitted)], ["fresh", *agrees(fresh)]],
            ),
            "![estimated and measured accuracy](search.png)\n",
        ]
    )
