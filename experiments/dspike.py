"""Claims of Li et al., "Differentiable Spike: Rethinking Gradient-Descent for Training Spiking Neural Networks",
NeurIPS 2021."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from snnkern import analysis, losses
from snnkern.analysis import pictures
from snnkern.methods import dspike
from snnkern.models import CNN6, ToyCNN
from snnkern.nn import LIF
from snnkern.surrogate import Dspike, Rectangle

from .protocol import LOSSES, Measure, Protocol, Size, accuracy, made, mean, train

PAPER = "Li et al., Differentiable Spike, NeurIPS 2021"


# Finite differences


# The paper's toy, for 8x8 images. It leaves open T (here 4) and the decay (0.5).
TOYS = {
    "ANN": partial(ToyCNN, size=8, steps=1, neuron=nn.ReLU),
    "SNN": partial(ToyCNN, size=8, steps=4, neuron=partial(LIF, threshold=0.5, surrogate=Rectangle())),
}
SIMILARITY_AT = (0.2, 0.1, 0.05, 0.01, 0.001)


def toy_epochs(model: nn.Module, data, epochs: int, seed: int, epoch: Callable) -> list:
    """``epoch(batches, optimiser)`` so many times: Adam 1e-2, cosine to 0, batch 128."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    shuffle, (x, y), found = torch.Generator().manual_seed(seed), data, []
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=shuffle).split(128)
        found.append(epoch([(x[index], y[index]) for index in order], optimiser))
        schedule.step()
    return found


def similarity(seed: int, size: Size) -> dict:
    data, _ = size.data(seed, noise=0.0, train=1200)
    probes = 1 if size.quick else 3
    result = {}
    for name, make in TOYS.items():
        model = made(make, seed)

        def epoch(batches, optimiser, model=model):
            return dspike.similarity_epoch(model, batches, losses.sdt, optimiser, SIMILARITY_AT, probes)

        rows = [row for rows in toy_epochs(model, data, size.epochs(5), seed, epoch) for row in rows]
        result[name] = {
            str(eps): mean(column) for eps, column in zip(SIMILARITY_AT, zip(*rows, strict=True), strict=True)
        }
    return result


def draw_similarity(path: Path, results: list[dict]) -> Path:
    at = sorted(SIMILARITY_AT)
    lines = {name: (at, [[r[name][str(eps)] for eps in at] for r in results]) for name in TOYS}
    title = "First layer: backward against finite differences"
    return pictures.curves(path, lines, "eps", "cosine", title, 10, None, at, 0.0)


SIMILARITY = Protocol(
    "Finite differences agree with an ANN's gradient at any eps, with an SNN's surrogate gradient only at large eps",
    f"{PAPER}, section 4.2, figure 2",
    "Clean; conv of 54 weights, ReLU or LIF (threshold 0.5, T = 4, rectangular surrogate), linear layer; 5 epochs of "
    "Adam (1e-2, cosine), batch 128; mean cosine over the first 3 iterations of every epoch",
    similarity,
    [
        Measure("ANN, least cosine at eps = 0.001 to 0.2", lambda r: min(r["ANN"].values()), (">", 0.98)),
        Measure("SNN, cosine at 0.1 - at 0.01", lambda r: r["SNN"]["0.1"] - r["SNN"]["0.01"], (">", 0)),
        Measure("SNN, cosine at 0.01 - at 0.001", lambda r: r["SNN"]["0.01"] - r["SNN"]["0.001"], (">", 0)),
        Measure("SNN, cosine at eps = 0.1", lambda r: r["SNN"]["0.1"], (">", 0.6)),
        Measure("SNN, cosine at eps = 0.001", lambda r: r["SNN"]["0.001"], ("<", 0.35)),
    ],
    draw_similarity,
)

TRAINED_AT = (0.5, 0.2, 0.1, 0.05, 0.01, 0.001)


def trained_with_differences(seed: int, size: Size) -> dict:
    data, test = size.data(seed, noise=0.0, train=1200)
    result = {}
    for eps in (None, *(TRAINED_AT[2:3] if size.quick else TRAINED_AT)):
        model = made(TOYS["SNN"], seed)

        def epoch(batches, optimiser, model=model, eps=eps):
            return dspike.train_epoch(model, batches, losses.sdt, optimiser, eps)

        toy_epochs(model, data, size.epochs(10), seed, epoch)
        result["surrogate" if eps is None else str(eps)] = accuracy(model, test, 4)
    return {**{str(eps): result["0.1"] for eps in TRAINED_AT}, **result}


def draw_trained_with_differences(path: Path, results: list[dict]) -> Path:
    at = sorted(TRAINED_AT)
    lines = {
        "first layer by finite differences": (at, [[r[str(eps)] for eps in at] for r in results]),
        "by the rectangular surrogate": (at, [[r["surrogate"]] * len(at) for r in results]),
    }
    return pictures.curves(path, lines, "eps", "test accuracy, %", "Training with finite differences", 10, None, at)


def best(result: dict, at: Sequence[float]) -> float:
    return max(result[str(eps)] for eps in at)


TRAINED_WITH_DIFFERENCES = Protocol(
    "Training the first layer by finite differences is best at an eps around 0.1, neither very small nor large",
    f"{PAPER}, section 4.2, table 1",
    "Clean; the SNN of the protocol before, 10 epochs, the first layer updated by its finite differences",
    trained_with_differences,
    [
        Measure(
            "best of eps 0.05, 0.1, 0.2 - eps 0.001, points", lambda r: best(r, (0.05, 0.1, 0.2)) - r["0.001"], (">", 0)
        ),
        Measure("best of eps 0.05, 0.1, 0.2 - eps 0.5, points", lambda r: best(r, (0.05, 0.1, 0.2)) - r["0.5"]),
        Measure("eps 0.1 - surrogate, points", lambda r: r["0.1"] - r["surrogate"]),
        Measure("accuracy at eps = 0.1, %", lambda r: r["0.1"]),
    ],
    draw_trained_with_differences,
    seeds=4,
)


# The temperature


class CNN3(CNN6):
    CHANNELS, POOLED = (8, 16, 32), (0, 1)


def temperature(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    probe = tuple(part[:100] for part in data)
    neuron = partial(LIF, threshold=0.5)

    def fixed(surrogate) -> float:
        model = made(partial(CNN3, 4, neuron=partial(neuron, surrogate=surrogate)), seed)
        return accuracy(train(model, data, [(losses.sdt, size.epochs(16))], seed), test, 4)

    model = made(partial(CNN3, 4, neuron=partial(neuron, surrogate=Dspike(1.0))), seed)
    trace, searches = [1.0], []

    def search(epoch: int) -> None:
        found = dspike.search(model, *probe, losses.sdt, trace[-1], step=0.2, eps=0.1)
        dspike.set_surrogate(model, Dspike(found.b))
        trace.append(found.b)
        searches.append({str(b): cosine for b, cosine in found.cosines.items()})

    train(model, data, [(losses.sdt, size.epochs(16))], seed, each=search)
    return {
        "trace": trace,
        "cosines": searches,
        "adaptive": accuracy(model, test, 4),
        "rectangle": fixed(Rectangle()),
        "b = 1": fixed(Dspike(1.0)),
        "b = 4": fixed(Dspike(4.0)),
    }


def draw_temperature(path: Path, results: list[dict]) -> Path:
    lines = {f"seed {i}": (range(len(r["trace"])), [r["trace"]]) for i, r in enumerate(results)}
    return pictures.curves(path, lines, "epoch", "temperature b", "The temperature that the search chose")


TEMPERATURE = Protocol(
    "The temperature found by finite differences moves over training, and so trains to higher accuracy",
    f"{PAPER}, algorithm 1, figure 5, table 2",
    "Three stages of conv 3x3 (8, 16, 32 channels), batch norm and LIF (threshold 0.5), T = 4, L_SDT, 16 epochs of "
    "Adam (2e-3, cosine), batch 100; b from 1 in steps of 0.2, eps = 0.1, finite differences on the same 100 images in "
    "every epoch",
    temperature,
    [
        Measure("furthest from b = 1, in steps of 0.2", lambda r: max(abs(b - 1) for b in r["trace"]) / 0.2, (">", 2)),
        Measure(
            "steps that are neither 0 nor 0.2",
            lambda r: sum(min(abs(abs(b - a) - d) for d in (0, 0.2)) > 1e-6 for a, b in pairwise(r["trace"])),
            ("=", 0),
        ),
        Measure(
            "searches whose choice is not the largest cosine",
            lambda r: sum(c[str(b)] < max(c.values()) for b, c in zip(r["trace"][1:], r["cosines"], strict=True)),
            ("=", 0),
        ),
        Measure("accuracy, adaptive - rectangle, points", lambda r: r["adaptive"] - r["rectangle"], (">", 0)),
        Measure("accuracy, adaptive - b = 1, points", lambda r: r["adaptive"] - r["b = 1"], (">", 0)),
        Measure("accuracy, adaptive - b = 4, points", lambda r: r["adaptive"] - r["b = 4"]),
        Measure("last b", lambda r: r["trace"][-1]),
        Measure("accuracy, adaptive, %", lambda r: r["adaptive"]),
    ],
    draw_temperature,
)


# Time inheritance


def long_to_short(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    plan = [(losses.sdt, size.epochs(30))]
    scratch = train(made(partial(CNN6, 2), seed), data, plan, seed)
    model = train(made(partial(CNN6, 6), seed), data, plan, seed)
    low = CNN6(2)
    low.load_state_dict(model.state_dict())
    prefix = analysis.outputs(model, test[0], 6)[:2] - analysis.outputs(low, test[0])
    untouched = accuracy(low, test, 2)
    train(low, data, [(losses.sdt, size.epochs(5))], seed, lr=8e-4)
    return {
        "prefix": prefix.abs().max().item(),
        "scratch": accuracy(scratch, test, 2),
        "untouched": untouched,
        "inherited": accuracy(low, test, 2),
        "extra": 5 / 30,
    }


def draw_long_to_short(path: Path, results: list[dict]) -> Path:
    kinds = {"scratch": "T = 2 from scratch", "untouched": "T = 6, run at 2", "inherited": "T = 6, then 2"}
    groups = {"": {text: [r[kind] for r in results] for kind, text in kinds.items()}}
    return pictures.dots(path, groups, "test accuracy at T = 2, %", "Time inheritance, from long to short")


LONG_TO_SHORT = Protocol(
    "A network for fewer steps starts from that for more, and a sixth of the epochs then suffice",
    f"{PAPER}, section 4.4",
    "CNN6, L_SDT, batch 100, Adam (cosine): T = 6 for 30 epochs (2e-3), then T = 2 for 5 (8e-4), against "
    "T = 2 for 30 (2e-3)",
    long_to_short,
    [
        Measure("greatest difference of the first outputs before fine-tuning", lambda r: r["prefix"], ("=", 0)),
        Measure("accuracy, fine-tuned - untouched, points", lambda r: r["inherited"] - r["untouched"], (">=", 0)),
        Measure("epochs of fine-tuning / from scratch", lambda r: r["extra"], ("<", 0.2)),
        Measure("accuracy, fine-tuned - scratch, points", lambda r: r["inherited"] - r["scratch"]),
        Measure("accuracy from scratch, %", lambda r: r["scratch"]),
    ],
    draw_long_to_short,
)


# Energy

# additions and multiplications in millions, and the energy printed, which is in units 1000 times too large
DSPIKE_TABLE = {
    "ANN Res-19": (2285, 2285, 12.6e-3),
    "ANN Res-18": (187, 187, 1.03e-3),
    "SNN Res-20, T = 5": (142, 8.80, 168e-6),
    "SNN Res-19, T = 2": (360, 6.8, 355e-6),
    "SNN Res-18, T = 2": (71.2, 3.52, 80.3e-6),
}
ENERGY_AT = (1, 2, 3, 4, 6, 8)


def spent(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    rows = [f"{analysis.joules(1e6 * a, 1e6 * m):.3g}" == f"{e:.3g}" for a, m, e in DSPIKE_TABLE.values()]
    result = {"rows": sum(rows)}
    for name, criterion in LOSSES.items():
        model = train(made(partial(CNN6, 4), seed), data, [(criterion, size.epochs(40))], seed)
        found = analysis.energy(model, test[0], 4)
        result[name] = {
            "joules": found.joules,
            "ann": found.ann_joules,
            "rates": found.rates,
            "curve": analysis.accuracy_over_energy(model, *test, ENERGY_AT),
        }
    return result


def draw_spent(path: Path, results: list[dict]) -> Path:
    lines = {name: [r[name]["curve"] for r in results] for name in LOSSES}
    return pictures.energy_curves(path, lines, "Accuracy against energy, trained with T = 4")


ENERGY = Protocol(
    "Energy is 0.9 pJ an addition and 4.6 pJ a multiplication; spiking networks need a fraction of their ANN's, "
    "and fire rarely",
    f"{PAPER}, section 5.4, table 3, figure 4; Deng et al., ICLR 2022, section 5.1, figure 4B",
    "The five rows of the table from their counts; and CNN6, T = 4, 40 epochs of Adam (2e-3, cosine), batch 100",
    spent,
    [
        Measure(
            "rows of the table that come out to three digits (in units 1000 times smaller)",
            lambda r: r["rows"],
            ("=", 5),
        ),
        Measure("energy / that of the ANN, TET", lambda r: r["TET"]["joules"] / r["TET"]["ann"], ("<", 1)),
        Measure("greatest rate of a layer, TET", lambda r: max(r["TET"]["rates"].values()), ("<", 0.32)),
        Measure("energy, TET / SDT", lambda r: r["TET"]["joules"] / r["SDT"]["joules"]),
        Measure(
            "accuracy at T = 4, TET - SDT, points",
            lambda r: 100 * (r["TET"]["curve"][3]["accuracy"] - r["SDT"]["curve"][3]["accuracy"]),
        ),
    ],
    draw_spent,
)
