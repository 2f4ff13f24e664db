"""Everything that this package measures of one network, in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from .. import losses
from ..files import replacing, versions, write_json
from . import pictures
from .accuracy import accuracy_over_steps, moments
from .energy import accuracy_over_energy, energy
from .landscape import Criterion, landscape, rise

__all__ = ["report"]

LOSSES = {"L_SDT": losses.sdt, "L_TET": losses.tet}


def report(
    model: nn.Module,
    data,
    folder: str | Path,
    steps: int | None = None,
    samples: int = 1000,
    criteria: Mapping[str, Criterion] = LOSSES,
    points: int = 15,
    radius: float = 0.5,
    seed: int = 0,
    batch: int = 256,
    on_part: Callable[[str], None] | None = None,
) -> dict:
    """Writes ``analysis.json``, ``analysis.md`` and pictures: accuracy over T, at single steps and against energy,
    operations and sparsity by layer, and the loss landscape.

    Args:
        model: trained; see the package for how it is called.
        data: as ``snnkern.data.load`` gives it: ``train`` and ``test``, data sets of (x, y), and ``events``: whether x
            are frames [T, C, H, W].
        folder: made where missing; files of these names in it are replaced.
        steps: T in training. Default: the model's ``steps``, or the number of frames. Static images are tested up to
            2 T, frames up to T.
        samples: how many of the test set, and of the training set for the landscape, from the beginning.
        criteria: the losses of the landscape.
        points, radius, seed: of the landscape; see there. ``points=0`` leaves it out: it takes longest.
        on_part: called with the name of each part before it starts.

    Returns: what is in ``analysis.json``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starting = on_part or (lambda name: None)
    x, y = _stack(data.test, samples, data.events)
    steps = steps or (len(x) if data.events else model.steps)
    longest = steps if data.events else 2 * steps

    starting("accuracy")
    found = {
        "versions": versions(),
        "steps": steps,
        "samples": len(y),
        "accuracy_over_steps": accuracy_over_steps(model, x, y, longest, batch),
        "moments": moments(model, x, y, longest, batch),
    }
    starting("energy")
    counted = energy(model, x, steps, batch)
    at = sorted({t for t in (1, 2, 3, 4, 6, 8, 10, 16, 32, steps, longest) if t <= longest})
    found |= {"energy": counted.as_dict(), "accuracy_over_energy": accuracy_over_energy(model, x, y, at, batch)}
    surface = None
    if points:
        starting("landscape")
        few = _stack(data.train, samples, data.events)
        surface = landscape(model, *few, criteria, radius, points, seed, steps, batch)
        radii = radius / 2, radius
        rises = {k: rise(model, *few, loss, radii, 5, seed, steps, batch) for k, loss in criteria.items()}
        found |= {"landscape": asdict(surface), "rise": {"radii": [*radii], **rises}}

    starting("pictures")
    write_json(folder / "analysis.json", found)
    drawn = _draw(folder, found, counted, surface)
    with replacing(folder / "analysis.md") as file:
        file.write(_text(found, counted, drawn).encode())
    return found


def _stack(dataset, samples: int, events: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first samples as tensors: x [N, C, H, W], or [T, N, C, H, W] of events, and y [N]."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    items = [dataset[i] for i in range(min(samples, len(dataset)))]
    x, y = zip(*items, strict=True)
    return torch.stack(x, dim=1 if events else 0), torch.tensor([int(label) for label in y])


def _draw(folder: Path, found: dict, counted, surface) -> list[Path]:
    steps = found["steps"]

    def over(name: str, values: list[float], xlabel: str, title: str, mark: str) -> Path:
        line = range(1, len(values) + 1), [[100 * v for v in values]]
        mark = (steps, mark) if len(values) > steps else None
        return pictures.curves(folder / name, {"": line}, xlabel, "test accuracy, %", title, mark=mark)

    drawn = [
        over("accuracy_steps.png", found["accuracy_over_steps"], "time steps T at test time",
             "Accuracy of the mean output over T steps", "T in training"),
        over("accuracy_moments.png", found["moments"], "time step t",
             "Accuracy of the output of a single step, O(t)", "last step in training"),
        pictures.energy_curves(folder / "accuracy_energy.png", {"": found["accuracy_over_energy"]},
                               "Accuracy against energy"),
        pictures.energy(folder / "energy.png", counted, f"Energy by layer, T = {steps}"),
    ]  # fmt: skip
    if counted.rates:
        rates = {name: 100 * rate for name, rate in counted.rates.items()}
        title = f"Activity by neuron layer, T = {steps}"
        drawn.append(pictures.bars(folder / "sparsity.png", {"": rates}, "spikes per neuron and step, %", title))
    if surface is not None:
        drawn.append(pictures.landscapes(folder / "landscape.png", {"training set": surface}))
    return drawn


def _text(found: dict, counted, drawn: list[Path]) -> str:
    def percent(values: Iterable[float]) -> list[str]:
        return [f"{100 * value:.1f}" for value in values]

    at = range(1, len(found["moments"]) + 1)
    accuracy = zip(map(str, at), percent(found["accuracy_over_steps"]), percent(found["moments"]), strict=True)
    parts = [
        f"# Analysis, T = {found['steps']}, {found['samples']} test samples\n",
        "## Accuracy, %\n",
        _table(("step t", "mean output up to t", "output at t alone"), accuracy),
        "## Operations and energy per sample\n",
        _table(counted.HEADER, counted.rows()),
        "## Activity by neuron layer, spikes per neuron and step\n",
        _table(("layer", "rate"), ((name, f"{rate:.4f}") for name, rate in counted.rates.items())),
    ]
    if "rise" in found:
        rise = found["rise"]
        columns = [f"at {radius:g} filter norms" for radius in rise["radii"]]
        rows = ([name, *(f"{value:.4f}" for value in rise[name])] for name in rise if name != "radii")
        parts += ["## Rise of the training loss, mean over random directions\n", _table(("loss", *columns), rows)]
    parts += ["## Pictures\n", *(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in drawn)]
    return "\n".join(parts)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
