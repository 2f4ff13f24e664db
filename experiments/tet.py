"""Claims of Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR
2022."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from snnkern import analysis, losses
from snnkern.analysis import pictures
from snnkern.methods import dspike
from snnkern.models import CNN6
from snnkern.nn import SmoothLIF
from snnkern.surrogate import Sigmoid

from .protocol import LOSSES, Measure, Protocol, Size, accuracy, gain, made, mean, percent, train

PAPER = "Deng et al., Temporal Efficient Training, ICLR 2022"


# The loss


def tet_and_sdt(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    result = {}
    for name, criterion in LOSSES.items():
        model = train(made(partial(CNN6, 4), seed), data, [(criterion, size.epochs(40))], seed)
        outputs = analysis.outputs(model, test[0], 4)
        result[name] = {
            "accuracy": percent(analysis.accuracy_over_steps(model, *test, 32)),
            "moments": percent(analysis.moments(model, *test, 8)),
            "test": {loss: f(outputs, test[1]).item() for loss, f in LOSSES.items()},
        }
    return result


def draw_tet_and_sdt(path: Path, results: list[dict]) -> Path:
    at = (1, 2, 3, 4, 6, 8, 16, 32)
    lines = {name: (at, [[r[name]["accuracy"][t - 1] for t in at] for r in results]) for name in LOSSES}
    title = "Trained with T = 4, tested with fewer and more steps"
    mark = 4, "T in training"
    return pictures.curves(path, lines, "time steps T at test time", "test accuracy, %", title, 2, mark, at)


TET_AND_SDT = Protocol(
    "Training with L_TET gives higher accuracy than with L_SDT, also at other T than in training and at single moments",
    f"{PAPER}, tables 1 and 4, figure 8",
    "CNN6, T = 4, 40 epochs of Adam (2e-3, cosine), batch 100; L_TET with lambda = 0",
    tet_and_sdt,
    [
        Measure("accuracy at T = 4, TET - SDT, points", gain("accuracy", 3), (">", 0)),
        Measure("accuracy at T = 8, TET - SDT, points", gain("accuracy", 7), (">", 0)),
        Measure("accuracy at T = 32, TET - SDT, points", gain("accuracy", 31), (">", 0)),
        Measure(
            "accuracy at single moments 1 to 4, TET - SDT, points",
            gain("moments", of=lambda m: mean(m[:4])),
            (">", 0),
        ),
        Measure("L_TET on the test set, TET - SDT", gain("test", "TET"), ("<", 0)),
        Measure("L_SDT on the test set, TET - SDT", gain("test", "SDT")),
        Measure("accuracy at T = 4, SDT, %", lambda r: r["SDT"]["accuracy"][3]),
        Measure("accuracy at T = 4, TET, %", lambda r: r["TET"]["accuracy"][3]),
    ],
    draw_tet_and_sdt,
)


# Time inheritance


def short_to_long(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    long, more = size.epochs(30), size.epochs(5)
    result = {"cost": {"scratch": 6 * 30, "inherited": 2 * 30 + 6 * 5}}
    for name, criterion in LOSSES.items():
        scratch = train(made(partial(CNN6, 6), seed), data, [(criterion, long)], seed)
        model = train(made(partial(CNN6, 2), seed), data, [(criterion, long)], seed)
        untouched = accuracy(model, test, 6)
        train(model, data, [(criterion, more)], seed, lr=2e-4, steps=6)
        result[name] = {
            "scratch": accuracy(scratch, test, 6),
            "untouched": untouched,
            "inherited": accuracy(model, test, 6),
        }
    return result


def draw_short_to_long(path: Path, results: list[dict]) -> Path:
    kinds = {"scratch": "T = 6 from scratch", "untouched": "T = 2, run at 6", "inherited": "T = 2, then 6"}
    groups = {name: {text: [r[name][kind] for r in results] for kind, text in kinds.items()} for name in LOSSES}
    return pictures.dots(path, groups, "test accuracy at T = 6, %", "Time inheritance, from short to long")


SHORT_TO_LONG = Protocol(
    "Training at small T and fine-tuning at large T costs half as much as large T from scratch and is more accurate",
    f"{PAPER}, section 4.3, figure 4A",
    "CNN6, batch 100, Adam (cosine): T = 6 for 30 epochs (2e-3), against T = 2 for 30 epochs (2e-3) and then T = 6 "
    "for 5 (2e-4)",
    short_to_long,
    [
        Measure(
            "cost in steps times epochs, inherited / scratch",
            lambda r: r["cost"]["inherited"] / r["cost"]["scratch"],
            ("=", 0.5),
        ),
        Measure(
            "L_TET: accuracy, inherited - scratch, points, no worse than -3",
            lambda r: r["TET"]["inherited"] - r["TET"]["scratch"],
            (">=", -3),
        ),
        Measure(
            "L_TET: accuracy, inherited - scratch, points, better",
            lambda r: r["TET"]["inherited"] - r["TET"]["scratch"],
            (">", 0),
        ),
        Measure(
            "L_TET: accuracy, inherited - untouched, points", lambda r: r["TET"]["inherited"] - r["TET"]["untouched"]
        ),
        Measure("L_SDT: accuracy, inherited - scratch, points", lambda r: r["SDT"]["inherited"] - r["SDT"]["scratch"]),
        Measure("L_TET: accuracy from scratch, %", lambda r: r["TET"]["scratch"]),
    ],
    draw_short_to_long,
)


# The switch


def switch(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    before, after = size.epochs(30), size.epochs(15)
    result = {}
    for name, second in (("control", losses.sdt), ("switch", losses.tet)):
        model = made(partial(CNN6, 4), seed)
        curves = {"SDT": [], "TET": [], "accuracy": []}

        def look(epoch, model=model, curves=curves):
            outputs = analysis.outputs(model, test[0])
            for loss, f in LOSSES.items():
                curves[loss].append(f(outputs, test[1]).item())
            curves["accuracy"].append(100 * (outputs.mean(0).argmax(-1) == test[1]).double().mean().item())

        train(model, data, [(losses.sdt, before), (second, after)], seed, constant=True, each=look)
        look(before + after)
        result[name] = curves
    return result


def draw_switch(path: Path, results: list[dict]) -> Path:
    shown = slice(8, None)  # the fall of the first epochs would squeeze the rest
    epochs = range(len(results[0]["control"]["TET"]))[shown] or [0]
    lines = {
        f"L_{loss}, {text}": (epochs, [r[name][loss][shown] or r[name][loss][:1] for r in results])
        for loss in ("TET", "SDT")
        for name, text in {"control": "no switch", "switch": "switch"}.items()
    }
    title = "From L_SDT to L_TET while training"
    return pictures.curves(path, lines, "epoch", "loss on the test set", title, None, (30, "switch"))


def settled(loss: str) -> Callable[[dict], float]:
    """Switch minus control, mean over the epochs from 35 to 45."""
    return gain(loss, of=lambda values: mean(values[35:] or values), first="control", second="switch")


SWITCH = Protocol(
    "Changing from L_SDT to L_TET in training lowers both losses on the test set",
    f"{PAPER}, section 5.1, figure 3",
    "CNN6, T = 4, batch 100, Adam (2e-3, constant): 30 epochs of L_SDT, then 15 of L_TET, against 45 of L_SDT; mean "
    "over the epochs from 35 on",
    switch,
    [
        Measure("L_TET on the test set, switch - control", settled("TET"), ("<", -0.1)),
        Measure("L_SDT on the test set, switch - control", settled("SDT"), ("<", 0)),
        Measure("accuracy, switch - control, points", settled("accuracy")),
    ],
    draw_switch,
)


# Flatness


RADII = (0.25, 0.5)


def flatness(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    result = {}
    for name, criterion in LOSSES.items():
        model = train(made(partial(CNN6, 6), seed), data, [(criterion, size.epochs(30))], seed, batch=60)
        count = 2 if size.quick else 5
        result[name] = {
            "rise": analysis.rise(model, *data, losses.sdt, RADII, count, seed),
            "accuracy": accuracy(model, test, 6),
        }
        if seed == 0:
            criteria = {f"L_{loss}": f for loss, f in LOSSES.items()}
            surface = analysis.landscape(model, *data, criteria, 0.5, 3 if size.quick else 17, seed)
            result[name]["landscape"] = {"offsets": surface.offsets, "losses": surface.losses}
    return result


def draw_flatness(path: Path, results: list[dict]) -> Path:
    found = next(r for r in results if "landscape" in r["SDT"])
    panels = {f"minimum of {name}": analysis.Landscape(**found[name]["landscape"]) for name in LOSSES}
    return pictures.landscapes(path, panels)


FLATNESS = Protocol(
    "L_TET finds flatter minima than L_SDT",
    f"{PAPER}, section 5.1, figures 2 and 5",
    "CNN6, T = 6, 30 epochs of Adam (2e-3, cosine), batch 60; rise of L_SDT on the training set, mean over 5 random "
    "filter-normalised directions, to both sides; picture of the first seed",
    flatness,
    [
        Measure("rise of L_SDT at 0.25 filter norms, TET - SDT", gain("rise", 0), ("<", 0)),
        Measure("rise of L_SDT at 0.5 filter norms, TET - SDT", gain("rise", 1), ("<", 0)),
        Measure("rise at 0.5, SDT", lambda r: r["SDT"]["rise"][1]),
        Measure("rise at 0.5, TET", lambda r: r["TET"]["rise"][1]),
        Measure("accuracy at T = 6, TET - SDT, points", gain("accuracy")),
    ],
    draw_flatness,
)


# Smooth spikes

SLOPES = (1, 10, 20)


def smooth(seed: int, size: Size) -> dict:
    data, test = size.data(seed)
    result = {"error": smooth_error(seed)}
    for name, criterion in LOSSES.items():
        result[name] = {}
        for k in SLOPES:
            model = made(partial(CNN6, 4, neuron=partial(SmoothLIF, Sigmoid(float(k)))), seed)
            train(model, data, [(criterion, size.epochs(30))], seed)
            result[name][str(k)] = accuracy(model, test, 4)
    return result


def smooth_error(seed: int) -> float:
    """Relative error of the first layer's gradient against central differences, in float64."""
    model = made(partial(CNN6, 2, size=4, neuron=partial(SmoothLIF, Sigmoid(10.0))), seed).double()
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(8)
    exact = dspike.surrogate_gradient(model, x, y, losses.sdt)
    return ((dspike.finite_differences(model, x, y, losses.sdt, 1e-6) - exact).norm() / exact.norm()).item()


def draw_smooth(path: Path, results: list[dict]) -> Path:
    groups = {name: {f"k = {k}": [r[name][str(k)] for r in results] for k in SLOPES} for name in LOSSES}
    return pictures.dots(path, groups, "test accuracy, %", "Spikes replaced by sigmoid(k x), exact gradient")


SMOOTH = Protocol(
    "With smooth spikes and the exact gradient, L_TET and L_SDT do alike: what L_TET gains, it gains from surrogates",
    f"{PAPER}, section 5.1, table 2",
    "CNN6 with sigmoid(k (v - threshold)) for the spike, T = 4, 30 epochs of Adam (2e-3, cosine), batch 100; gradient "
    "of the first layer checked in float64 at k = 10",
    smooth,
    [
        *(Measure(f"accuracy at k = {k}, TET - SDT, points", gain(str(k)), ("within", 2)) for k in SLOPES),
        Measure("relative error of the gradient", lambda r: r["error"], ("<", 1e-6)),
        Measure("accuracy at k = 10, SDT, %", lambda r: r["SDT"]["10"]),
    ],
    draw_smooth,
    seeds=4,
)
