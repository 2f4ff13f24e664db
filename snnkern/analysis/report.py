"""Everything that this package measures of a network, and of several beside each other, in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from .. import losses
from ..files import replacing, versions, write_json
from ..methods.seenn import curve
from ..spec.arguments import positive
from . import pictures
from .accuracy import _parts, evaluate, outputs
from .energy import NEURONS, Energy, Layer, accuracy_over_energy, energy
from .gradients import gradient_lengths, gradient_similarity
from .landscape import Criterion, Landscape, landscape, line, rise
from .noise import Noise, input_noise, weight_noise

__all__ = ["measure", "report", "write"]

LOSSES = {"L_SDT": losses.sdt, "L_TET": losses.tet}
NOISES = {"noise_weights": "weights", "noise_inputs": "inputs"}
STATISTICS = {"running": "running statistics", "batch": "batch statistics"}  # of the batch norms
AT_ONCE = 1536  # samples times steps that run together, unless ``batch`` says otherwise


def report(model: nn.Module, data, folder: str | Path, **options) -> dict:
    """``measure``, and ``write`` of that alone. ``options`` are those of ``measure``."""
    pictures.matplotlib()  # before the work, not after it
    folder = _made(folder)
    found = measure(model, data, **options)
    write(folder, {"": [found]})
    return found


def measure(
    model: nn.Module,
    data,
    steps: int | None = None,
    samples: int = 1000,
    criteria: Mapping[str, Criterion] = LOSSES,
    points: int = 15,
    radius: float = 0.5,
    seed: int = 0,
    batch: int | None = None,
    on_part: Callable[[str], None] | None = None,
    longest: int | None = None,
    directions: int = 5,
    neurons: tuple[type[nn.Module], ...] = NEURONS,
    generalisation: bool = False,
) -> dict:
    """Accuracy over T, at single steps, with early exit and against energy, operations and sparsity by layer, and the
    loss landscape.

    Args:
        model: trained; see the package for how it is called.
        data: as ``snnkern.data.load`` gives it: ``plain`` and ``test``, data sets of (x, y), and ``events``: whether x
            are frames [T, C, H, W].
        steps: T in training. Default: the model's ``steps``, or the number of frames.
        samples: how many of the test set, and of the training set for landscape and gradients; of the latter as they
            are, without augmentation. Which, ``seed`` alone says: every network is measured on the same.
        criteria: the losses of the landscape.
        points, radius, seed: of the landscape; see there. ``points=0`` leaves its picture out: it takes longest.
        batch: samples that run together. Default: 256, fewer with more than 6 steps.
        on_part: called with the name of each part before it starts.
        longest: T up to which accuracy is measured. Default: 2 ``steps`` for static images, all frames of others.
        directions: over which the rise of the losses is averaged; 0 leaves it out.
        neurons: see ``energy``.
        generalisation: also accuracy under noise on weights and inputs, lengths of the gradients of L_SDT and, of a
            spiking network, their similarity at T // 2 and T, and the landscape in one dimension: figures 5, 6 and 9,
            table 13 and section 4.2 of Du et al., ICLR 2025.

    Returns: plain data, for JSON.
    """
    starting = on_part or (lambda name: None)
    x, y = _some(data.test, samples, data.events, seed)
    steps = steps or (len(x) if data.events else model.steps)
    longest = longest or (len(x) if data.events else 2 * steps)
    at_once = AT_ONCE * (64 if x.dim() == 3 else 1)  # a step of a sequence is small
    batch = batch or max(1, min(256, at_once // max(6, longest)))

    starting("accuracy")
    tested = evaluate(model, *_parts(x, y, longest, batch))
    found = {
        "versions": versions(),
        "steps": steps,
        "samples": len(y),
        "accuracy_over_steps": tested.accuracy,
        "moments": tested.moments,
    }
    if steps > 1:
        found["exits"] = [point._asdict() for point in curve(outputs(model, x, steps, batch), y)]
    starting("energy")
    counted = energy(model, x, steps, batch, neurons=neurons)
    at = sorted({t for t in (1, 2, 3, 4, 6, 8, 10, 16, 32, 64, steps, longest) if t <= longest})
    rows = accuracy_over_energy(model, x, y, at, batch, neurons=neurons)
    found |= {"energy": counted.as_dict(), "accuracy_over_energy": rows}
    if points or directions or generalisation:
        few = _some(data.plain, samples, data.events, seed)
    if points or directions:
        starting("landscape")
    if points:
        found["landscape"] = asdict(landscape(model, *few, criteria, radius, points, seed, steps, batch))
    if directions:
        radii = radius / 2, radius
        rises = {k: rise(model, *few, loss, radii, directions, seed, steps, batch) for k, loss in criteria.items()}
        found["rise"] = {"radii": [*radii], **rises}
    if generalisation:
        starting("noise")
        options = {"seed": seed, "steps": steps, "batch": batch}
        for key, under in zip(NOISES, (weight_noise, input_noise), strict=True):
            found[key] = asdict(under(model, x, y, **options))
        starting("landscape in one dimension")
        found["landscape_1d"] = asdict(line(model, *few, criteria, radius, **options))
        starting("gradients")
        found["gradient_lengths"] = gradient_lengths(model, *few, losses.sdt, steps, batch)._asdict()
        if neurons and steps > 1:
            at = [steps // 2, steps]
            cosines = {
                key: gradient_similarity(model, *few, losses.sdt, at, batch, key == "batch")._asdict()
                for key in STATISTICS
            }
            found["gradient_similarity"] = {"steps": at, **cosines}
    return found


def write(folder: str | Path, networks: Mapping[str, Sequence[dict]]) -> None:
    """Writes ``analysis.json``, ``analysis.md`` and pictures; files of these names in the folder are replaced.

    Args:
        folder: made where missing.
        networks: label to what ``measure`` found of each of its seeds. One network's label does not show.
    """
    folder = _made(folder)
    several = sum(map(len, networks.values())) > 1
    whole = {"networks": {label: [*runs] for label, runs in networks.items()}} if several else _only(networks)
    write_json(folder / "analysis.json", whole)
    drawn = _draw(folder, networks if several else {"": [_only(networks)]})
    with replacing(folder / "analysis.md") as file:
        file.write((_compared(networks, drawn) if several else _text(_only(networks), drawn)).encode())


def _only(networks: Mapping[str, Sequence[dict]]) -> dict:
    return next(iter(networks.values()))[0]


def _made(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _some(dataset, samples: int, events: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A draw of the samples as tensors: x [N, C, H, W], or [T, N, ...] of events, and y [N]."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[: positive("samples", samples)]
    x, y = zip(*(dataset[i] for i in chosen.tolist()), strict=True)
    return torch.stack(x, dim=1 if events else 0), torch.tensor([int(label) for label in y])


def _energy(found: dict) -> Energy:
    kept = found["energy"]
    return Energy([Layer(**layer) for layer in kept["layers"]], kept["rates"], kept["add"], kept["multiply"])


def _draw(folder: Path, networks: Mapping[str, Sequence[dict]]) -> list[Path]:
    firsts = {label: runs[0] for label, runs in networks.items()}
    trained = {found["steps"] for found in firsts.values()}
    at = f", T = {trained.pop()}" if len(trained) == 1 else ""

    def over(name: str, key: str, xlabel: str, title: str, mark: str) -> Path:
        lines = {
            label: (range(1, len(runs[0][key]) + 1), [[100 * v for v in found[key]] for found in runs])
            for label, runs in networks.items()
        }
        marks = sorted({found["steps"] for found in firsts.values() if len(found[key]) > found["steps"]})
        marks = [(t, mark) for t in marks] if len(marks) == 1 else None
        return pictures.curves(folder / name, lines, xlabel, "test accuracy, %", title, mark=marks)

    drawn = []
    if any(len(found["moments"]) > 1 for found in firsts.values()):
        drawn += [
            over("accuracy_steps.png", "accuracy_over_steps", "time steps T at test time",
                 "Accuracy of the mean output over T steps", "T in training"),
            over("accuracy_moments.png", "moments", "time step t",
                 "Accuracy of the output of a single step, O(t)", "last step in training"),
        ]  # fmt: skip
    exiting = {label: [*runs] for label, runs in networks.items() if "exits" in runs[0]}
    if exiting:
        drawn.append(_exits(folder / "accuracy_exit.png", exiting))
    rows = {label: [found["accuracy_over_energy"] for found in runs] for label, runs in networks.items()}
    counted = {label: _energy(found) for label, found in firsts.items()}
    several = any(len(runs) > 1 for runs in networks.values())
    which = ", first seed" if several else ""
    if any(len(each[0]) > 1 for each in rows.values()):
        drawn.append(pictures.energy_curves(folder / "accuracy_energy.png", rows, "Accuracy against energy"))
    drawn.append(pictures.energy(folder / "energy.png", counted, f"Energy by layer{at}{which}"))
    rates = {
        label: {name: 100 * mean(found["energy"]["rates"][name] for found in runs) for name in rates}
        for label, runs in networks.items()
        if (rates := runs[0]["energy"]["rates"])
    }
    if rates:
        title = f"Activity by neuron layer{at}"
        drawn.append(pictures.bars(folder / "sparsity.png", rates, "spikes per neuron and step, %", title))
    panels = {label or "training set": Landscape(**f["landscape"]) for label, f in firsts.items() if "landscape" in f}
    if panels:
        drawn.append(pictures.landscapes(folder / "landscape.png", panels))
    return drawn + _draw_generalisation(folder, networks, several)


def _draw_generalisation(folder: Path, networks: Mapping[str, Sequence[dict]], several: bool) -> list[Path]:
    """Bands go over the seeds where a label has several, else over the draws of noise or the directions."""

    def having(key: str) -> dict[str, list[dict]]:
        return {label: [f[key] for f in runs] for label, runs in networks.items() if all(key in f for f in runs)}

    def bands(draws: Sequence[list[list[float]]], scale: float = 1.0) -> list[list[float]]:
        chosen = [[mean(at) for at in zip(*each, strict=True)] for each in draws] if several else draws[0]
        return [[scale * value for value in run] for run in chosen]

    drawn = []
    for key, where in NOISES.items():
        if kept := having(key):
            lines = {label: (f[0]["sigmas"], bands([each["runs"] for each in f], 100)) for label, f in kept.items()}
            labels = f"sigma of the noise on the {where}", "test accuracy, %", f"Accuracy under noise on the {where}"
            options = {"ticks": next(iter(lines.values()))[0], "each": "seeds" if several else "draws"}
            drawn.append(pictures.curves(folder / f"{key}.png", lines, *labels, **options))
    if kept := having("landscape_1d"):
        first = next(iter(kept.values()))[0]
        name = next(iter(first["losses"]))
        lines = {label: (f[0]["offsets"], bands([each["losses"][name] for each in f])) for label, f in kept.items()}
        labels = "distance, filter norms", name, "Training loss along random directions"
        options = {"ticks": first["offsets"][::5], "each": "seeds" if several else "directions"}
        drawn.append(pictures.curves(folder / "landscape_1d.png", lines, *labels, **options))
    if kept := having("gradient_similarity"):
        groups = {
            f"{label}, {statistics}".lstrip(", "): {
                "whole": [each[key]["whole"] for each in found],
                **{layer: [each[key]["layers"][layer] for each in found] for layer in found[0][key]["layers"]},
            }
            for label, found in kept.items()
            for key, statistics in STATISTICS.items()
        }
        title = f"Gradients of L_SDT at {_two(found[0]['steps'] for found in kept.values())}"
        drawn.append(pictures.bars(folder / "gradient_similarity.png", groups, "cosine", title))
    return drawn


def _two(steps: Iterable[Sequence[int]]) -> str:
    pairs = {tuple(pair) for pair in steps}
    return "T = {} and {}".format(*pairs.pop()) if len(pairs) == 1 else "T / 2 and T"


def _exits(path: Path, networks: Mapping[str, Sequence[dict]]) -> Path:
    """Accuracy over the mean T of samples that leave early, and over fixed T. Source: Li et al., NeurIPS 2023."""
    lines = {}
    for label, runs in networks.items():
        name, steps = f"{label}: " if label else "", runs[0]["steps"]
        at = [mean(point["steps"] for point in points) for points in zip(*(r["exits"] for r in runs), strict=True)]
        lines[f"{name}early exit"] = at, [[100 * point["accuracy"] for point in found["exits"]] for found in runs]
        fixed = [[100 * value for value in found["accuracy_over_steps"][:steps]] for found in runs]
        lines[f"{name}T fixed"] = range(1, len(fixed[0]) + 1), fixed
    title = "Early exit at several thresholds of confidence"
    return pictures.curves(path, lines, "mean T", "test accuracy, %", title)


def _text(found: dict, drawn: list[Path]) -> str:
    counted = _energy(found)

    def percent(values: Iterable[float]) -> list[str]:
        return [f"{100 * value:.1f}" for value in values]

    at = _shown(len(found["moments"]))
    reached = ([found[name][t - 1] for t in at] for name in ("accuracy_over_steps", "moments"))
    accuracy = zip(map(str, at), *map(percent, reached), strict=True)
    parts = [
        f"# Analysis, T = {found['steps']}, {found['samples']} test samples\n",
        "## Accuracy, %\n",
        _table(("step t", "mean output up to t", "output at t alone"), accuracy),
        "## Operations and energy per sample\n",
        COUNTED,
        _table(counted.HEADER, counted.rows()),
    ]
    if counted.rates:
        rates = ((name, f"{rate:.4f}") for name, rate in counted.rates.items())
        parts += ["## Activity by neuron layer, spikes per neuron and step\n", _table(("layer", "rate"), rates)]
    if "rise" in found:
        rise = found["rise"]
        columns = [f"at {radius:g} filter norms" for radius in rise["radii"]]
        rows = ([name, *(f"{value:.4f}" for value in rise[name])] for name in rise if name != "radii")
        parts += ["## Rise of the training loss, mean over random directions\n", _table(("loss", *columns), rows)]
    for key, where in NOISES.items():
        if key in found:
            noise = Noise(**found[key])
            rows = zip(
                (f"{sigma:g}" for sigma in noise.sigmas), *map(percent, (noise.mean, noise.least, noise.greatest)),
                strict=True,
            )  # fmt: skip
            parts += [
                f"## Accuracy under Gaussian noise on the {where}, {len(noise.runs)} draws, %\n",
                _table(("sigma", "mean", "least", "greatest"), rows),
            ]
    if "gradient_lengths" in found:
        rows = ((LENGTHS[name], f"{length:.4g}") for name, length in found["gradient_lengths"].items())
        parts += ["## Gradients of L_SDT, training set\n", _table(("", "length"), rows)]
    if "gradient_similarity" in found:
        running, batch = (found["gradient_similarity"][key] for key in STATISTICS)
        rows = [("whole", running["whole"], batch["whole"])]
        rows += [(layer, value, batch["layers"][layer]) for layer, value in running["layers"].items()]
        parts += [
            f"## Cosine of the gradients at {_two([found['gradient_similarity']['steps']])}\n",
            WHOLE,
            _table(("weights of", *STATISTICS.values()), ((name, f"{a:.3f}", f"{b:.3f}") for name, a, b in rows)),
        ]
    return "\n".join([*parts, _pictures(drawn)])


def _compared(networks: Mapping[str, Sequence[dict]], drawn: list[Path]) -> str:
    """A column for every label, the mean over its seeds and their deviation."""

    def row(name: str, value: Callable[[dict], float | None], form: str) -> list[str]:
        cells = []
        for runs in networks.values():
            values = [value(found) for found in runs]
            if None in values:
                cells.append("-")
            else:
                varied = len(set(values)) > 1
                cells.append(f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if varied else ""))
        return [name, *cells]

    def at(key: str, t: int) -> Callable[[dict], float | None]:
        return lambda found: 100 * found[key][t - 1] if t <= len(found[key]) else None

    def grown(name: str, i: int) -> Callable[[dict], float | None]:
        return lambda found: found["rise"][name][i] if "rise" in found else None

    founds = [found for runs in networks.values() for found in runs]
    longest = _shown(max(len(found["moments"]) for found in founds))
    measured = next((found["rise"] for found in founds if "rise" in found), {"radii": []})
    rows = [
        row("seeds", lambda found: None, ""),
        row("T in training", lambda found: found["steps"], "g"),
        *(row(f"accuracy at T = {t}, %", at("accuracy_over_steps", t), ".1f") for t in longest),
        *(row(f"accuracy at step {t} alone, %", at("moments", t), ".1f") for t in longest),
        row("additions, millions", lambda found: found["energy"]["additions"] / 1e6, ".4g"),
        row("multiplications, millions", lambda found: found["energy"]["multiplications"] / 1e6, ".4g"),
        row("energy, µJ", lambda found: 1e6 * found["energy"]["joules"], ".4g"),
        row("energy of the ANN, µJ", lambda found: 1e6 * found["energy"]["ann_joules"], ".4g"),
        row("greatest rate of a layer, spikes per neuron and step",
            lambda found: max(found["energy"]["rates"].values(), default=None), ".3f"),
        *(row(f"rise of {name} at {radius:g} filter norms", grown(name, i), ".4f")
          for name in measured if name != "radii" for i, radius in enumerate(measured["radii"])),
        *(row(*each) for each in _generalised(founds)),
    ]  # fmt: skip
    rows[0] = ["seeds", *(str(len(runs)) for runs in networks.values())]
    title = f"# Analysis of {len(founds)} networks, {founds[0]['samples']} test samples\n"
    return "\n".join([title, _table(("mean ± sd", *networks), rows), COUNTED, _pictures(drawn)])


def _shown(longest: int) -> list[int]:
    """The steps that a table shows: all, but of a long sequence some, and the last."""
    every = max(1, longest // 32)
    return [*range(every, longest, every), longest]


def _generalised(founds: Sequence[dict]) -> Iterator[tuple[str, Callable[[dict], float | None], str]]:
    """Rows of ``_compared``: name, value, format."""

    def at(key: str, value: Callable[[dict], float]) -> Callable[[dict], float | None]:
        return lambda found: value(found[key]) if key in found else None

    for key, where in NOISES.items():
        for i, sigma in enumerate(next((found[key]["sigmas"] for found in founds if key in found), [])):
            if sigma:
                name = f"accuracy under noise of {sigma:g} on the {where}, %"
                yield name, at(key, lambda found, i=i: 100 * Noise(**found).mean[i]), ".1f"
    if any("gradient_lengths" in found for found in founds):
        for key, of in LENGTHS.items():
            yield f"length of {of}", at("gradient_lengths", itemgetter(key)), ".4g"
    if steps := [found["gradient_similarity"]["steps"] for found in founds if "gradient_similarity" in found]:
        for key, named in STATISTICS.items():
            name = f"cosine of the gradients at {_two(steps)}, {named}"
            yield name, at("gradient_similarity", lambda found, key=key: found[key]["whole"]), ".3f"


LENGTHS = {
    "weights": "the gradient over all convolution weights",
    "inputs": "the gradient over the input, mean over the samples",
}
WHOLE = "Whole: all convolution weights as one vector; in a network without convolutions, the linear ones.\n"
COUNTED = (
    "Additions are counted layer by layer, as rate of the input x T x MACs. The papers' s x T x A has one mean rate s: "
    "it is less where layers with many MACs receive many spikes, and takes the analog first layer at s.\n"
)


def _pictures(drawn: list[Path]) -> str:
    return "\n".join(["## Pictures\n", *(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in drawn)])


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
