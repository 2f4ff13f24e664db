"""Claims of Li et al., "Differentiable Spike: Rethinking Gradient-Descent for Training Spiking Neural Networks",
NeurIPS 2021."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from snnkern import analysis
from snnkern.analysis import pictures

from .protocol import Measure, Protocol, Run, Work, mean
from .tet import DOWN, FOUR, LOSSES, UP

PAPER = "Li et al., Differentiable Spike, NeurIPS 2021"


# Finite differences

# The paper's toy, for 8x8 images. It leaves open T (here 4) and the decay (0.5).
TOY = (
    'data={name="digits", noise=0.0, train=1200}',
    "batch=128",
    'model={name="ToyCNN"}',
    'neuron={decay=0.5, threshold=0.5, surrogate={name="Rectangle"}}',
    "stage.optimiser.lr=0.01",
    "stage.steps=4",
)
SIMILARITY_AT = (0.1, 0.01, 0.001)
PROBED = (*TOY, "stage.epochs=5", f"stage.probe={{eps=[{', '.join(map(str, SIMILARITY_AT))}], iterations=3}}")
NEURON = "LIF(decay=0.5, threshold=0.5, surrogate=Rectangle(width=1.0))"
TOYS = {
    "ANN": Run(
        "toy-ann",
        "digits-sdt",
        (*PROBED, 'stage.network="ann"', "stage.steps=1"),
        "6C3-FC96 of ReLU(), T = 1: 5 sdt, lr 0.01 falling",
    ),
    "SNN": Run("toy-snn", "digits-sdt", PROBED, f"6C3-FC96 of {NEURON}, T = 4: 5 sdt, lr 0.01 falling"),
}


def similarity(work: Work) -> dict:
    """The cosines of every epoch, and their means."""
    result = {}
    for name, run in TOYS.items():
        lines = [dict((str(eps), cosine) for eps, cosine in line["probe"]) for line in work.train(run).lines()]
        result[name] = {eps: mean([line[eps] for line in lines]) for eps in lines[0]}
        result[name + " by epoch"] = lines
    return result


def draw_similarity(path: Path, results: list[dict]) -> Path:
    at = sorted(SIMILARITY_AT)
    lines = {name: (at, [[r[name][str(eps)] for eps in at] for r in results]) for name in TOYS}
    title = "First layer: backward against finite differences"
    return pictures.curves(path, lines, "eps", "cosine", title, 10, None, at, 0.0)


SIMILARITY = Protocol(
    "Finite differences agree with an ANN's gradient at any eps, with an SNN's surrogate gradient only at large eps",
    f"{PAPER}, section 4.2, figure 2: above 0.99 for the ANN; for the SNN above 0.8 at eps = 0.1, about 0 at 0.001",
    "Clean, 1200 images; conv of 54 weights, ReLU or LIF (threshold 0.5, T = 4, rectangular surrogate), linear layer; "
    "5 epochs of Adam (1e-2, cosine), batch 128; mean cosine over the first 3 iterations of every epoch",
    similarity,
    [
        Measure("ANN, least cosine at eps = 0.001, 0.01, 0.1", lambda r: min(r["ANN"].values()), (">", 0.99)),
        Measure("SNN, cosine at 0.1 - at 0.01", lambda r: r["SNN"]["0.1"] - r["SNN"]["0.01"], (">", 0)),
        Measure("SNN, cosine at 0.01 - at 0.001", lambda r: r["SNN"]["0.01"] - r["SNN"]["0.001"], (">", 0)),
        Measure("SNN, cosine at eps = 0.1", lambda r: r["SNN"]["0.1"], (">", 0.8)),
        Measure("SNN, cosine at eps = 0.001", lambda r: r["SNN"]["0.001"], ("<", 0.35)),
    ],
    draw_similarity,
    seeds=6,
)

TRAINED_AT = (0.5, 0.1, 0.001)
TEN = (*TOY, "data.train=600", "stage.epochs=10")
DIFFERENCES = {
    "surrogate" if eps is None else str(eps): Run(
        f"toy-{eps or 'surrogate'}",
        "digits-sdt",
        TEN if eps is None else (*TEN, f"stage.differences={{eps={eps}}}"),
        f"6C3-FC96 of {NEURON}, T = 4: 10 sdt, lr 0.01 falling",
    )
    for eps in (None, *TRAINED_AT)
}


def trained_with_differences(work: Work) -> dict:
    return {
        name: [100 * line["test_accuracy"] for line in work.train(run).lines()] for name, run in DIFFERENCES.items()
    }


def draw_trained_with_differences(path: Path, results: list[dict]) -> Path:
    kinds = {"surrogate": "surrogate", **{str(eps): f"eps = {eps}" for eps in sorted(TRAINED_AT)}}
    groups = {"": {text: [r[name][-1] for r in results] for name, text in kinds.items()}}
    return pictures.dots(path, groups, "test accuracy, %", "First layer by its surrogate, and by finite differences")


def contrast(first: str, second: str):
    return lambda r: r[first][-1] - r[second][-1]


TRAINED_WITH_DIFFERENCES = Protocol(
    "Training the first layer by finite differences is best at eps = 0.1, neither very small nor large",
    f"{PAPER}, section 4.2, table 1",
    "Clean, 600 images; the SNN of E2.4, 10 epochs, the first layer updated by its finite differences",
    trained_with_differences,
    [
        Measure("accuracy, eps 0.1 - 0.001, points", contrast("0.1", "0.001"), (">", 0)),
        Measure("accuracy, eps 0.1 - 0.5, points", contrast("0.1", "0.5"), (">", 0)),
        Measure("accuracy, eps 0.1 - surrogate, points", contrast("0.1", "surrogate"), (">", 0)),
        Measure("accuracy at eps = 0.1, %", lambda r: r["0.1"][-1]),
    ],
    draw_trained_with_differences,
)


# The temperature

PLAN, SMALL = 'model={name="CNN6", plan="8C3-AP2-16C3-AP2-32C3"}', "8C3-16C3-32C3-FC128"
EPOCHS = 30
SEARCH_AT = (0.01, 0.1)


def small(name: str, surrogate: str, printed: str, eps: float | None = None) -> Run:
    """Three stages, whose temperature is searched with ``eps``, or stays."""
    search = () if eps is None else (f"stage.temperature={{start=1.0, step=0.2, eps={eps}, batch=100}}",)
    return Run(
        name,
        "digits-sdt",
        (
            "batch=100",
            PLAN,
            f"neuron={{decay=0.5, threshold=0.5, surrogate={{name={surrogate}}}}}",
            "stage.steps=4",
            f"stage.epochs={EPOCHS}",
            *search,
        ),
        f"{SMALL} of LIF(decay=0.5, threshold=0.5, surrogate={printed}), T = 4: {EPOCHS} sdt, lr 0.002 falling",
    )


FIXED = {
    "rectangle": small("rectangle", '"Rectangle"', "Rectangle(width=1.0)"),
    **{
        f"b = {b}": small(f"b{b}", f'"Dspike", temperature={b}.0', f"Dspike(temperature={b}.0, width=1.0)")
        for b in (1, 4)
    },
}
SEARCHED = {eps: small(f"search{eps}", '"Dspike"', "Dspike(temperature=1.0, width=1.0)", eps) for eps in SEARCH_AT}
SEARCHING = (
    "Three stages of conv 3x3 (8, 16, 32 channels, two pools), batch norm and LIF (threshold 0.5), T = 4, L_SDT, "
    f"{EPOCHS} epochs of Adam (2e-3, cosine), batch 100; b from 1 in steps of 0.2, finite differences on 100 images "
    "before every epoch"
)


def temperature(work: Work) -> dict:
    result = {name: work.train(run).accuracy() for name, run in FIXED.items()}
    for eps, run in SEARCHED.items():
        lines = work.train(run).lines()
        result[str(eps)] = {
            "accuracy": 100 * lines[-1]["test_accuracy"],
            "trace": [1.0, *(line["b"] for line in lines)],
            "cosines": [line["cosines"] for line in lines],
        }
    return result


def wrong_choices(result: dict) -> int:
    """Searches of which the candidate chosen is not the one with the largest cosine."""
    found = result["0.1"]
    return sum(dict(c)[b] < max(dict(c).values()) for b, c in zip(found["trace"][1:], found["cosines"], strict=True))


def wrong_steps(result: dict) -> int:
    return sum(min(abs(abs(b - a) - d) for d in (0, 0.2)) > 1e-6 for a, b in pairwise(result["0.1"]["trace"]))


def draw_temperature(path: Path, results: list[dict]) -> Path:
    kinds = {**{name: name for name in FIXED}, "0.1": "searched"}
    runs = [{**r, "0.1": r["0.1"]["accuracy"]} for r in results]
    groups = {"": {text: [r[name] for r in runs] for name, text in kinds.items()}}
    return pictures.dots(path, groups, "test accuracy, %", "A fixed surrogate, and Dspike's temperature searched")


def over(name: str):
    return lambda r: r["0.1"]["accuracy"] - r[name]


TEMPERATURE = Protocol(
    "The temperature found by finite differences moves over training, and so trains to higher accuracy",
    f"{PAPER}, algorithm 1, table 2",
    f"{SEARCHING}, eps = 0.1",
    temperature,
    [
        Measure("last b, from 1, in steps of 0.2", lambda r: (r["0.1"]["trace"][-1] - 1) / 0.2, (">", 2)),
        Measure("accuracy, searched - rectangle, points", over("rectangle"), (">", 0)),
        Measure("accuracy, searched - b = 1, points", over("b = 1"), (">", 0)),
        Measure("accuracy, searched - b = 4, points", over("b = 4")),
        Measure("accuracy, searched, %", lambda r: r["0.1"]["accuracy"]),
    ],
    draw_temperature,
    checks=[
        Measure("steps of b that are neither 0 nor 0.2", wrong_steps, ("=", 0)),
        Measure("searches whose choice is not the largest cosine", wrong_choices, ("=", 0)),
    ],
)


def draw_distance(path: Path, results: list[dict]) -> Path:
    groups = {"": {f"eps = {eps}": [r[str(eps)]["accuracy"] for r in results] for eps in SEARCH_AT}}
    return pictures.dots(path, groups, "test accuracy, %", "Distance of the finite differences in the search")


def by_distance(first: float, second: float):
    return lambda r: r[str(first)]["accuracy"] - r[str(second)]["accuracy"]


DISTANCE = Protocol(
    "The temperature search trains to higher accuracy with eps = 0.1 than with 0.01",
    f"{PAPER}, section 5.5, table 5: 91.78 and 94.07 % on CIFAR10, 70.97 and 74.31 % on CIFAR100",
    SEARCHING,
    temperature,
    [
        Measure("accuracy, eps 0.1 - 0.01, points", by_distance(0.1, 0.01), (">", 0)),
        *(Measure(f"last b, eps = {eps}", lambda r, eps=eps: r[str(eps)]["trace"][-1]) for eps in SEARCH_AT),
    ],
    draw_distance,
)


def b_at(result: dict, share: float) -> float:
    """The b of training after this share of the epochs."""
    trace = result["0.1"]["trace"][1:]
    return trace[max(0, round(share * len(trace)) - 1)]


def between(first: float, second: float):
    return lambda r: b_at(r, second) - b_at(r, first)


def draw_shape(path: Path, results: list[dict]) -> Path:
    epochs = range(1, len(results[0]["0.1"]["trace"]))
    lines = {f"eps = {eps}": (epochs, [r[str(eps)]["trace"][1:] for r in results]) for eps in SEARCH_AT}
    return pictures.curves(path, lines, "epoch", "temperature b", "The temperature that the search chose")


SHAPE = Protocol(
    "The temperature first falls below 1, then rises until about a quarter of the epochs, falls until five sixths, and "
    "rises again",
    f"{PAPER}, section 5.6, figure 5: on CIFAR10-DVS, of 300 epochs, below 1 until 25, up to 4.0 at 80, down to 1.6 at "
    "250",
    f"{SEARCHING}, eps = 0.1; b at the same shares of the epochs as there",
    temperature,
    [
        Measure("b after 25/300 of the epochs", lambda r: b_at(r, 25 / 300), ("<", 1)),
        Measure("b after 80/300 - after 25/300", between(25 / 300, 80 / 300), (">", 0)),
        Measure("b after 250/300 - after 80/300", between(80 / 300, 250 / 300), ("<", 0)),
        Measure("b at the end - after 250/300", between(250 / 300, 1), (">", 0)),
        Measure("b at the end", lambda r: b_at(r, 1)),
    ],
    draw_shape,
)


# Time inheritance


def long_to_short(work: Work) -> dict:
    down, scratch = work.train(DOWN["SDT"]), work.train(UP["SDT"])
    x, y = down.images()
    high, low = (down.recipe.make_model(stage, 10, (1, 8, 8)) for stage in (0, 1))
    for model in (high, low):
        model.load_state_dict(down.model(0).state_dict())
    prefix = analysis.outputs(high, x)[: low.steps] - analysis.outputs(low, x)
    return {
        "prefix": prefix.abs().max().item(),
        "scratch": scratch.accuracy(0),
        "untouched": 100 * analysis.accuracy_over_steps(low, x, y)[-1],
        "inherited": down.accuracy(),
        "epochs": [len(down.lines(1)), len(scratch.lines(0))],
    }


def draw_long_to_short(path: Path, results: list[dict]) -> Path:
    kinds = {"scratch": "T = 2 from scratch", "untouched": "T = 6, run at 2", "inherited": "T = 6, then 2"}
    groups = {"": {text: [r[kind] for r in results] for kind, text in kinds.items()}}
    return pictures.dots(path, groups, "test accuracy at T = 2, %", "Time inheritance, from long to short")


LONG_TO_SHORT = Protocol(
    "A network for fewer steps that starts from that for more needs a sixth of the epochs to be as accurate as from "
    "scratch, to a point",
    f"{PAPER}, section 4.4",
    "CNN6, L_SDT, batch 100, Adam (cosine): T = 6 for 30 epochs (2e-3), then T = 2 for 5 (8e-4), against "
    "T = 2 for 30 (2e-3)",
    long_to_short,
    [
        Measure("accuracy, fine-tuned - scratch, points", lambda r: r["inherited"] - r["scratch"], (">=", -1)),
        Measure("accuracy, fine-tuned - untouched, points", lambda r: r["inherited"] - r["untouched"], (">", 0)),
        Measure("accuracy from scratch, %", lambda r: r["scratch"]),
    ],
    draw_long_to_short,
    checks=[
        Measure("greatest difference of the first outputs before fine-tuning", lambda r: r["prefix"], ("=", 0)),
        Measure("epochs of fine-tuning / from scratch", lambda r: r["epochs"][0] / r["epochs"][1], ("=", 5 / 30)),
    ],
)

NDA = "LIF(decay=0.25, threshold=0.5, surrogate=Dspike(temperature=1.0, width=1.0))"
CHAIN = Run(
    "dspike-tit",
    "digits-dspike-tit",
    (PLAN,),
    f"{SMALL} of ReLU(), T = 1: 30 sdt, lr 0.002 falling; "
    + "; ".join(
        f"{SMALL} of {NDA}, T = {steps}: {epochs} sdt, lr {lr:g} falling"
        for steps, epochs, lr in ((6, 10, 0.002), (4, 3, 0.0008), (2, 3, 0.0008))
    ),
)
TWO = Run(
    "dspike-2",
    "digits-dspike",
    (PLAN, "stage.steps=2"),
    f"{SMALL} of {NDA}, T = 2: 16 sdt, lr 0.002 falling",
)


def whole_chain(work: Work) -> dict:
    chain, scratch = work.train(CHAIN), work.train(TWO)
    x, y = chain.images()
    return {
        "ANN": chain.accuracy(0),
        "6": chain.accuracy(1),
        "4": chain.accuracy(2),
        "2": chain.accuracy(3),
        "6 at 2": 100 * analysis.accuracy_over_steps(chain.model(1), x, y, 2)[-1],
        "scratch": scratch.accuracy(),
        "b": [[line.get("b") for line in chain.lines(stage)] for stage in range(4)],
    }


def draw_whole_chain(path: Path, results: list[dict]) -> Path:
    kinds = {
        "ANN": "ANN",
        "6": "T = 6",
        "4": "T = 4",
        "2": "T = 2",
        "6 at 2": "6 at 2",
        "scratch": "2, scratch",
    }
    groups = {"": {text: [r[kind] for r in results] for kind, text in kinds.items()}}
    return pictures.dots(path, groups, "test accuracy, %", "From an ANN to T = 6, 4 and 2, with the search")


WHOLE_CHAIN = Protocol(
    "From an ANN to T = 6, 4 and 2, with the temperature searched: the network keeps close to the ANN, and at T = 2 to "
    "one from scratch",
    f"{PAPER}, sections 4.4 and 5.2, table 2: on CIFAR10 95.46 for the ANN, 94.25, 93.66 and 93.13 at T = 6, 4, 2, and "
    "93.13 at T = 2 from scratch",
    "The network of E2.6, with decay 0.25, in the recipe digits-dspike-tit (30 epochs of the ANN, 10 at T = 6, 3 at 4, "
    "3 at 2), and in digits-dspike at T = 2 (16 epochs)",
    whole_chain,
    [
        Measure("accuracy at T = 2, inherited - scratch, points", lambda r: r["2"] - r["scratch"], (">=", -1)),
        Measure("accuracy, ANN - T = 6, points", lambda r: r["ANN"] - r["6"], ("<", 1.5)),
        Measure("accuracy, T = 6 - T = 2, points", lambda r: r["6"] - r["2"], ("<", 1.5)),
        Measure("accuracy at T = 2, inherited - T = 6 run at 2, points", lambda r: r["2"] - r["6 at 2"], (">", 0)),
        Measure("accuracy at T = 6, %", lambda r: r["6"]),
    ],
    draw_whole_chain,
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


def spent(work: Work) -> dict:
    rows = [f"{analysis.joules(1e6 * a, 1e6 * m):.3g}" == f"{e:.3g}" for a, m, e in DSPIKE_TABLE.values()]
    result = {"rows": sum(rows)}
    for name, run in FOUR.items():
        trained = work.train(run)
        model, (x, y) = trained.model(), trained.images()
        found = analysis.energy(model, x, 4)
        result[name] = {
            "joules": found.joules,
            "ann": found.ann_joules,
            "rates": found.rates,
            "curve": analysis.accuracy_over_energy(model, x, y, ENERGY_AT),
        }
    searched = work.train(SEARCHED[0.1])
    return {**result, "Dspike rates": analysis.sparsity(searched.model(), searched.images()[0], 4)}


def at_equal_energy(result: dict) -> float:
    """Accuracy of TET, on the line between its points, less that of SDT, at the energies of SDT at T = 2, 3 and 4."""
    curve, gains = result["TET"]["curve"], []
    for row in result["SDT"]["curve"][1:4]:
        low, high = next((a, b) for a, b in pairwise(curve) if b["joules"] >= row["joules"])
        share = (row["joules"] - low["joules"]) / (high["joules"] - low["joules"])
        gains.append(low["accuracy"] + share * (high["accuracy"] - low["accuracy"]) - row["accuracy"])
    return 100 * mean(gains)


def draw_spent(path: Path, results: list[dict]) -> Path:
    lines = {name: [r[name]["curve"] for r in results] for name in LOSSES}
    return pictures.energy_curves(path, lines, "Accuracy against energy, trained with T = 4")


ENERGY = Protocol(
    "Spiking networks need a fraction of their ANN's energy and fire rarely; with L_TET they are more accurate at the "
    "same energy",
    f"{PAPER}, section 5.4, table 3, figure 4: no layer fires at more than 32 %; Deng et al., ICLR 2022, section 5.1, "
    "figure 4B",
    "The networks of E2.1 at T = 4, and for the rates that of E2.6; 0.9 pJ an addition, 4.6 pJ a multiplication",
    spent,
    [
        Measure("energy / that of the ANN, TET", lambda r: r["TET"]["joules"] / r["TET"]["ann"], ("<", 1)),
        Measure("greatest rate of a layer, Dspike", lambda r: max(r["Dspike rates"].values()), ("<", 0.32)),
        Measure("accuracy at the energy of SDT at T = 2, 3, 4, TET - SDT, points", at_equal_energy, (">", 0)),
        Measure("energy at T = 4, TET / SDT", lambda r: r["TET"]["joules"] / r["SDT"]["joules"]),
        Measure("greatest rate of a layer, TET", lambda r: max(r["TET"]["rates"].values())),
    ],
    draw_spent,
    checks=[
        Measure(
            "rows of table 3 that come out to three digits (in units 1000 times smaller)", lambda r: r["rows"], ("=", 5)
        )
    ],
)
