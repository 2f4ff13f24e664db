"""Claims of Du et al., "Temporal Flexibility in Spiking Neural Networks: Towards Generalization Across Time Steps and
Deployment Friendliness", ICLR 2025."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from snnkern import analysis, losses
from snnkern.analysis import pictures
from snnkern.analysis.configurations import right
from snnkern.methods import mtt_search, seenn
from snnkern.methods.mtt import Sampler
from snnkern.train.evaluation import calibrate, test_events

from .protocol import Measure, Protocol, Run, Trained, Work, mean, percent

PAPER = "Du et al., Temporal Flexibility in SNNs, ICLR 2025"
NETWORK = "16C3-16C3-32C3-32C3-32C3-64C3-FC256 of LIF(decay=0.5)"
T = range(1, 7)
SETUP = "CNN6, 30 epochs of Adam (2e-3, cosine), batch 60; T_max = 6, s = 3"

# Every run of MTT costs 30 epochs x 3 samples x a mean T of 3.5 = 315 epochs x T; SDT at T = 6 for 30 epochs costs 180,
# for 53 epochs 318.


def run(name: str, recipe: str, *overrides: str, steps: int = 6, epochs: int = 30, loss: str = "sdt", mixed: str = ""):
    wanted = f"{NETWORK}, T = {steps}{mixed}: {epochs} {loss}, lr 0.002 falling"
    return Run(name, recipe, (f"stage.steps={steps}", f"stage.epochs={epochs}", *overrides), wanted)


SDT, LONG = run("SDT6", "digits-sdt"), run("SDT6x53", "digits-sdt", epochs=53)
ALONE = {steps: run(f"alone{steps}", "digits-sdt", steps=steps) for steps in T if steps < 6}
TET = run("TET6", "digits-tet", loss="tet")
GRAINS = (1, 2, 3, 6)  # stages that share a t; 6 is the whole network, which makes it NMT
MIXED = {
    grain: run(
        f"MTT{grain}",
        "digits-nmt" if grain == 6 else "digits-mtt",
        *([] if grain in (1, 6) else [f"stage.mtt.granularity={grain}"]),
        mixed=f", 3 passes, t by {grain} of 6 stages",
    )
    for grain in GRAINS
}
MTT, NMT = MIXED[1], MIXED[6]
RAW = {  # the same trainings without calibration
    name: run(
        f"{name}raw", f"digits-{name.lower()}", "stage.mtt.calibration=0", mixed=f", 3 passes, t by {grain} of 6 stages"
    )
    for name, grain in (("MTT", 1), ("NMT", 6))
}
ONCE = run("MTT1x90", "digits-mtt", "stage.mtt.samples=1", epochs=90, mixed=", 1 passes, t by 1 of 6 stages")


def over_t(trained: Trained, model: torch.nn.Module | None = None) -> list[float]:
    """Accuracy at T = 1 to 6 with the statistics that the network has, in percent."""
    return percent(analysis.accuracy_over_steps(model or trained.model(), *trained.images(), 6))


def at(trained: Trained, t: Sequence[int], calibrated: bool) -> float:
    """Accuracy of a temporal configuration, in percent."""
    model = trained.model()
    if calibrated:
        calibrate(trained.recipe, model, trained.recipe.load_data(), t=t)
    x, y = trained.images()
    return 100 * (analysis.outputs(model, x, t=t).mean(0).argmax(1) == y).double().mean().item()


def lines(results: Sequence[dict], names: dict[str, str]) -> dict:
    """For ``pictures.curves``: accuracy over T of every run, by the names of the picture."""
    return {text: (T, [result[name] for result in results]) for name, text in names.items()}


TITLE = "time steps T at test time", "test accuracy, %"


# Calibration


def calibration(work: Work) -> dict:
    result = {}
    for name, run in (("MTT", MTT), ("NMT", NMT)):
        trained = work.train(run)
        result[name] = over_t(trained)
        result[f"{name} own"] = [at(trained, (steps,) * 6, True) for steps in T]
        result[f"{name} raw"] = over_t(work.train(RAW[name]))
    result["epochs"] = {
        name: percent([line["test_accuracy"] for line in work.train(run).lines()])
        for name, run in (("MTT", MTT), ("MTT raw", RAW["MTT"]))
    }
    return result


def draw_calibration(path: Path, results: list[dict]) -> Path:
    names = {"MTT": "MTT, calibrated at T = 6", "MTT own": "MTT, calibrated at every T",
             "MTT raw": "MTT, not calibrated", "NMT raw": "NMT, not calibrated"}  # fmt: skip
    return pictures.curves(path, lines(results, names), *TITLE, "Calibration of batch norm after training", ticks=T)


CALIBRATION = Protocol(
    "After MTT, batch norm has to be calibrated; the statistics of the greatest T then serve every T",
    f"{PAPER}, section 4.3.2, figure 7C, table 12",
    f"{SETUP}; tested with the running statistics of training (momentum 0.1), with those of 10 batches at T = 6, and "
    "of 10 batches at the T of the test",
    calibration,
    [
        Measure(
            "MTT: mean accuracy over T = 1 to 6, calibrated at T = 6 - not, points",
            lambda r: mean(r["MTT"]) - mean(r["MTT raw"]),
            (">", 10),
        ),
        Measure(
            "MTT: mean accuracy over T = 1 to 5, calibrated at T = 6 - at T, points",
            lambda r: mean(r["MTT"][:5]) - mean(r["MTT own"][:5]),
            ("within", 2),
        ),
        Measure(
            "MTT: accuracy at T = 1, calibrated at T = 6 - at T, points",
            lambda r: r["MTT"][0] - r["MTT own"][0],
            ("within", 2),
        ),
        Measure(
            "NMT: mean accuracy over T = 1 to 6, calibrated at T = 6 - not, points",
            lambda r: mean(r["NMT"]) - mean(r["NMT raw"]),
        ),
        Measure(
            "MTT: test accuracy after the last epoch, calibrated - not, points",
            lambda r: r["epochs"]["MTT"][-1] - r["epochs"]["MTT raw"][-1],
            (">", 10),
        ),
    ],
    draw_calibration,
)


# Over T


def over_time(work: Work) -> dict:
    result = {name: over_t(work.train(run)) for name, run in
              (("SDT", SDT), ("SDT, equal cost", LONG), ("NMT", NMT), ("MTT", MTT))}  # fmt: skip
    alone = [100 * work.train(run).lines()[-1]["test_accuracy"] for run in ALONE.values()]
    return {**result, "SDT, one each": [*alone, result["SDT"][5]]}


def draw_over_time(path: Path, results: list[dict]) -> Path:
    names = {"SDT": "SDT, T = 6", "SDT, equal cost": "SDT, T = 6, 53 epochs", "SDT, one each": "SDT, one for each T",
             "NMT": "NMT", "MTT": "MTT"}  # fmt: skip
    return pictures.curves(path, lines(results, names), *TITLE, "One network at many T", ticks=T)


def gained(step: int, second: str = "MTT", first: str = "SDT") -> Callable[[dict], float]:
    return lambda r: r[second][step - 1] - r[first][step - 1]


OVER_TIME = Protocol(
    "One network trained with mixed time steps is accurate at every T, where one of SDT loses at few",
    f"{PAPER}, tables 1 and 4",
    f"{SETUP}; SDT at T = 6 for 30 epochs, and for 53, whose cost in epochs x T is that of MTT and NMT (318 and 315); "
    "SDT at T = 1, 2, 3, 4, 5, a network each",
    over_time,
    [
        Measure("accuracy at T = 1, MTT - SDT, points", gained(1), (">", 0)),
        Measure("accuracy at T = 2, MTT - SDT, points", gained(2), (">", 0)),
        Measure("accuracy at T = 6, MTT - SDT, points", gained(6), (">=", -1.5)),
        Measure("accuracy at T = 1, MTT - SDT at equal cost, points", gained(1, first="SDT, equal cost"), (">", 0)),
        Measure("accuracy at T = 2, MTT - SDT at equal cost, points", gained(2, first="SDT, equal cost"), (">", 0)),
        Measure("accuracy at T = 6, MTT - SDT at equal cost, points", gained(6, first="SDT, equal cost")),
        Measure(
            "mean accuracy over T = 1 to 5, MTT - SDT of that T, points",
            lambda r: mean(r["MTT"][:5]) - mean(r["SDT, one each"][:5]),
            (">=", -1.5),
        ),
        Measure("accuracy at T = 1, NMT - SDT, points", gained(1, "NMT"), (">", 0)),
        Measure(
            "mean accuracy over T = 1 to 6, MTT - NMT, points", lambda r: mean(r["MTT"]) - mean(r["NMT"]), (">", 0)
        ),
        Measure("accuracy at T = 6, MTT, %", lambda r: r["MTT"][5]),
    ],
    draw_over_time,
)


# Configurations


def configurations(work: Work) -> dict:
    generator = torch.Generator().manual_seed(work.seed)
    drawn = [Sampler(1, 6).draw(6, generator) for _ in range(2 if work.quick else 12)]
    result = {"t": drawn}
    for name, run in (("SDT", SDT), ("SDT, equal cost", LONG), ("TET", TET), ("NMT", NMT), ("MTT", MTT)):
        trained = work.train(run)
        result[name] = {
            kind: [at(trained, t, own) for t in drawn] for kind, own in (("as it is", False), ("own", True))
        }
    return result


def draw_configurations(path: Path, results: list[dict]) -> Path:
    kinds = {"as it is": "statistics of T = 6", "own": "calibrated for each"}
    names = "SDT", "SDT, equal cost", "TET", "NMT", "MTT"
    groups = {text: {name: [mean(r[name][kind]) for r in results] for name in names} for kind, text in kinds.items()}
    return pictures.dots(path, groups, "mean test accuracy, %", "12 random temporal configurations")


def of_configurations(kind: str, first: str) -> Callable[[dict], float]:
    return lambda r: mean(r["MTT"][kind]) - mean(r[first][kind])


CONFIGURATIONS = Protocol(
    "A network trained with MTT tolerates any temporal configuration",
    f"{PAPER}, section 4.3",
    "The networks of E2.3 and one of L_TET at T = 6; 12 random configurations with t_i in 1 to 6, batch norm with the "
    "statistics at T = 6 (SDT, TET: of training), and calibrated for each",
    configurations,
    [
        Measure("mean accuracy, MTT - SDT, points", of_configurations("as it is", "SDT"), (">", 0)),
        Measure(
            "mean accuracy, MTT - SDT at equal cost, points", of_configurations("as it is", "SDT, equal cost"), (">", 0)
        ),
        Measure("mean accuracy, MTT - TET, points", of_configurations("as it is", "TET"), (">", 0)),
        Measure("mean accuracy, MTT - NMT, points", of_configurations("as it is", "NMT"), (">", 0)),
        Measure("calibrated for each: mean accuracy, MTT - SDT, points", of_configurations("own", "SDT")),
        Measure("calibrated for each: mean accuracy, MTT - TET, points", of_configurations("own", "TET")),
    ],
    draw_configurations,
)


# Granularity


def granularity(work: Work) -> dict:
    found = {str(grain): over_t(work.train(run)) for grain, run in MIXED.items()}
    return {**found, "SDT": over_t(work.train(SDT)), "SDT, equal cost": over_t(work.train(LONG))}


def draw_granularity(path: Path, results: list[dict]) -> Path:
    names = {"1": "g = 1, MTT", "2": "g = 2", "3": "g = 3", "6": "g = 6, NMT", "SDT": "SDT, T = 6"}
    return pictures.curves(path, lines(results, names), *TITLE, "Stages that share a number of steps", ticks=T)


def of_grains(second: str, first: str) -> Callable[[dict], float]:
    return lambda r: mean(r[second][1:]) - mean(r[first][1:])


GRANULARITY = Protocol(
    "The finer the granularity of mixed time steps, the more accurate the network",
    f"{PAPER}, section 5.4, figure 7B",
    f"{SETUP}; g = 1, 2, 3, 6 neighbouring stages share a t; means over T = 2 to 6",
    granularity,
    [
        Measure("mean accuracy, g = 1 - g = 6, points", of_grains("1", "6"), (">", 0)),
        Measure("mean accuracy, g = 1 - g = 2, points", of_grains("1", "2"), (">", 0)),
        Measure("mean accuracy, g = 2 - g = 6, points", of_grains("2", "6"), (">", 0)),
        Measure("mean accuracy, g = 6 - SDT, points", of_grains("6", "SDT"), (">", 0)),
        Measure("mean accuracy, g = 6 - SDT at equal cost, points", of_grains("6", "SDT, equal cost")),
    ],
    draw_granularity,
)


# Samples for a batch


def samples(work: Work) -> dict:
    return {"1": over_t(work.train(ONCE)), "3": over_t(work.train(MTT))}


def draw_samples(path: Path, results: list[dict]) -> Path:
    names = {"1": "s = 1, 90 epochs", "3": "s = 3, 30 epochs"}
    return pictures.curves(path, lines(results, names), *TITLE, "Samples for a batch, at equal cost", ticks=T)


SAMPLES = Protocol(
    "At equal cost, three configurations for a batch train to higher accuracy than one",
    f"{PAPER}, A.8, table 11: 76.45 against 76.23 % at 900 epochs x samples",
    "CNN6, T_max = 6, Adam (2e-3, cosine), batch 60: s = 3 for 30 epochs, s = 1 for 90",
    samples,
    [
        Measure("accuracy at T = 6, s = 3 - s = 1, points", gained(6, "3", "1"), (">", 0)),
        Measure("accuracy at T = 1, s = 3 - s = 1, points", gained(1, "3", "1")),
    ],
    draw_samples,
)


# Flatness


def minima(work: Work) -> dict:
    found = {}
    for name, run in (("SDT", SDT), ("SDT, equal cost", LONG), ("MTT", MTT)):
        trained = work.train(run)
        x, y = trained.images("train")
        found[name] = analysis.rise(trained.model(), x, y, losses.sdt, (0.25, 0.5), 5, steps=6)
    return found


def draw_flatness(path: Path, results: list[dict]) -> Path:
    groups = {
        name: {f"{radius:g}": [r[name][i] for r in results] for i, radius in enumerate((0.25, 0.5))}
        for name in ("SDT", "SDT, equal cost", "MTT")
    }
    title = "Around the minimum, 5 random directions, both sides, T = 6"
    return pictures.dots(path, groups, "rise of the training loss L_SDT", title)


FLATNESS = Protocol(
    "MTT finds flatter minima than SDT",
    f"{PAPER}, A.10, figure 9",
    "The networks of E2.3; rise of L_SDT on the training set at T = 6, 0.25 and 0.5 filter norms away, mean over 5 "
    "random filter-normalised directions and both sides",
    minima,
    [
        Measure("rise at 0.25, MTT - SDT", lambda r: r["MTT"][0] - r["SDT"][0], ("<", 0)),
        Measure("rise at 0.5, MTT - SDT", lambda r: r["MTT"][1] - r["SDT"][1], ("<", 0)),
        Measure("rise at 0.25, MTT - SDT at equal cost", lambda r: r["MTT"][0] - r["SDT, equal cost"][0], ("<", 0)),
        Measure("rise at 0.5, MTT - SDT at equal cost", lambda r: r["MTT"][1] - r["SDT, equal cost"][1], ("<", 0)),
    ],
    draw_flatness,
)


# Noise


def noise(work: Work) -> dict:
    result = {}
    for name, run in (*NOISY.items(),):
        trained = work.train(run)
        model, images, draws = trained.model(), trained.images(), 1 if work.quick else 5
        weights = analysis.weight_noise(model, *images, WEIGHTS, draws, steps=6)
        inputs = analysis.input_noise(model, *images, INPUTS, draws, steps=6)
        result[name] = {"weights": percent(weights.mean), "inputs": percent(inputs.mean)}
    return result


NOISY = {"SDT": SDT, "SDT, equal cost": LONG, "TET": TET, "NMT": NMT, "MTT": MTT}
WEIGHTS, INPUTS = (0.0, 0.005, 0.01, 0.02, 0.05), (0.0, 0.1, 0.2, 0.5, 1.0)


def draw_noise(kind: str, sigmas: Sequence[float], title: str) -> Callable[[Path, list[dict]], Path]:
    def draw(path: Path, results: list[dict]) -> Path:
        lines = {name: (sigmas, [r[name][kind] for r in results]) for name in NOISY}
        return pictures.curves(path, lines, "standard deviation of the noise", TITLE[1], title, ticks=sigmas)

    return draw


def under_noise(kind: str, i: int, first: str = "SDT") -> Callable[[dict], float]:
    return lambda r: r["MTT"][kind][i] - r[first][kind][i]


def loses_less(kind: str, i: int, first: str) -> Callable[[dict], float]:
    """What the first loses to the noise, less what MTT loses."""
    return lambda r: under_noise(kind, i, first)(r) - under_noise(kind, 0, first)(r)


WEIGHT_NOISE = Protocol(
    "A network trained with MTT is more robust to noise on its weights",
    f"{PAPER}, section 5.3, figure 5",
    "The networks of E2.3b at T = 6; Gaussian noise on all convolution and linear weights, mean of 5 draws",
    noise,
    [
        Measure("accuracy at sigma = 0.02, MTT - SDT, points", under_noise("weights", 3), (">", 0)),
        Measure(
            "accuracy at sigma = 0.02, MTT - SDT at equal cost, points",
            under_noise("weights", 3, "SDT, equal cost"),
            (">", 0),
        ),
        Measure(
            "lost at sigma = 0.02, SDT at equal cost - MTT, points",
            loses_less("weights", 3, "SDT, equal cost"),
            (">", 0),
        ),
        Measure("accuracy at sigma = 0.05, MTT - SDT, points", under_noise("weights", 4)),
        Measure("accuracy at sigma = 0.02, MTT - TET, points", under_noise("weights", 3, "TET")),
    ],
    draw_noise("weights", WEIGHTS, "Noise on the weights, T = 6"),
)

INPUT_NOISE = Protocol(
    "A network trained with MTT is more robust to noise on its inputs",
    f"{PAPER}, section 5.3, figure 6",
    "The networks of E2.3b at T = 6; Gaussian noise on the images, standardised and noisy as they are, mean of 5 draws",
    noise,
    [
        Measure("accuracy at sigma = 0.5, MTT - SDT, points", under_noise("inputs", 3), (">", 0)),
        Measure("accuracy at sigma = 1, MTT - SDT, points", under_noise("inputs", 4), (">", 0)),
        Measure(
            "accuracy at sigma = 0.5, MTT - SDT at equal cost, points",
            under_noise("inputs", 3, "SDT, equal cost"),
            (">", 0),
        ),
        Measure("lost at sigma = 0.5, SDT - MTT, points", loses_less("inputs", 3, "SDT"), (">", 0)),
        Measure("accuracy at sigma = 0.5, MTT - TET, points", under_noise("inputs", 3, "TET")),
    ],
    draw_noise("inputs", INPUTS, "Noise on the images, T = 6"),
)


# Lengths of gradients


def lengths(work: Work) -> dict:
    result = {}
    for name, run in (("SDT", SDT), ("SDT, equal cost", LONG), ("MTT", MTT)):
        trained = work.train(run)
        images = trained.images("train")
        found = analysis.gradient_lengths(trained.model(), *images, losses.sdt, 6)
        scores = analysis.outputs(trained.model(), images[0], 6)
        loss = losses.sdt(scores, images[1]).item()
        result[name] = {"weights": found.weights, "inputs": found.inputs, "loss": loss}
    return result


def draw_lengths(path: Path, results: list[dict]) -> Path:
    kinds = {"weights": "dL/dW", "inputs": "dL/dx", "loss": "training loss"}
    groups = {
        name: {text: [r[name][kind] for r in results] for kind, text in kinds.items()}
        for name in ("SDT", "SDT, equal cost", "MTT")
    }
    return pictures.dots(path, groups, "norm of the gradient, loss", "Gradients on the training set, T = 6")


LENGTHS = Protocol(
    "MTT ends where gradients are shorter",
    f"{PAPER}, A.11, table 13: dL/dW 11.59 against 38.08 for SDT, dL/dx 1.81 against 7.78",
    "The networks of E2.3; the norm of L_SDT's gradient at T = 6, over the training set and all convolution weights, "
    "and the mean norm of a sample's gradient in its image",
    lengths,
    [
        Measure("norm of dL/dW, MTT - SDT", lambda r: r["MTT"]["weights"] - r["SDT"]["weights"], ("<", 0)),
        Measure("norm of dL/dx, MTT - SDT", lambda r: r["MTT"]["inputs"] - r["SDT"]["inputs"], ("<", 0)),
        Measure("training loss, MTT - SDT", lambda r: r["MTT"]["loss"] - r["SDT"]["loss"]),
        Measure("norm of dL/dW, SDT", lambda r: r["SDT"]["weights"]),
    ],
    draw_lengths,
)


# Similarity of gradients

EARLY = {
    epochs: Run(
        f"SDT6early{epochs}",
        "digits-sdt",
        (f"stage.epochs={epochs}", "stage.schedule=constant"),
        f"{NETWORK}, T = 6: {epochs} sdt, lr 0.002",
    )
    for epochs in (1, 3, 8)
}


def agreement(work: Work) -> dict:
    result = {}
    for name, run in (*EARLY.items(), (30, SDT)):
        trained = work.train(run)
        options = *trained.images("train"), losses.sdt, (3, 6)
        found = {
            kind: analysis.gradient_similarity(trained.model(), *options, batch=600, batch_statistics=of_batch).whole
            for kind, of_batch in (("running", False), ("batch", True))
        }
        result[str(name)] = found
    return result


def draw_similarity(path: Path, results: list[dict]) -> Path:
    epochs = (*EARLY, 30)
    lines = {
        f"{kind} statistics": (epochs, [[r[str(e)][kind] for e in epochs] for r in results])
        for kind in ("running", "batch")
    }
    title = "Gradients at T = 3 and T = 6, all convolutions"
    return pictures.curves(path, lines, "epochs of training", "cosine", title, ticks=epochs)


SIMILARITY = Protocol(
    "Gradients at T = 3 and T = 6 point the same way: their cosine is above 0.94",
    f"{PAPER}, section 4.2, which does not say of which layers, how far into training and with which statistics",
    "CNN6 trained with SDT at T = 6 for 1, 3 and 8 epochs (Adam, constant 2e-3), and for 30 (falling); gradient of "
    "L_SDT over the training set in all convolution weights, running statistics and those of the set",
    agreement,
    [
        Measure("cosine after 1 epoch, running statistics", lambda r: r["1"]["running"], (">", 0.94)),
        Measure("cosine after 3 epochs, running statistics", lambda r: r["3"]["running"], (">", 0.94)),
        Measure("cosine after 8 epochs, running statistics", lambda r: r["8"]["running"], (">", 0.94)),
        Measure("cosine after 30 epochs, running statistics", lambda r: r["30"]["running"], (">", 0.94)),
        Measure("cosine after 1 epoch, statistics of the set", lambda r: r["1"]["batch"], (">", 0.94)),
        Measure("cosine after 30 epochs, statistics of the set", lambda r: r["30"]["batch"]),
    ],
    draw_similarity,
)


# Estimate and search


def estimation(work: Work) -> dict:
    """Accuracies of random configurations, each the mean over three calibrations; half of the test images choose, all
    of them tell how good the estimate is."""
    trained, (fitted, fresh) = work.train(MTT), (8, 4) if work.quick else (18, 60)
    model, generator = trained.model(), torch.Generator().manual_seed(work.seed)
    drawn = list(dict.fromkeys(Sampler(1, 6).draw(6, generator) for _ in range(2 * (fitted + fresh))))[: fitted + fresh]
    images, labels = trained.recipe.load_data().train.tensors
    parts = [torch.randperm(len(labels), generator=generator).split(60)[:10] for _ in range(3)]
    calibrations = [[(images[part], labels[part]) for part in each] for each in parts]
    test = trained.images()
    found = [right(model, t, calibrations, [test]) for t in drawn]
    half = len(test[1]) // 2

    def fit(of: slice) -> tuple[mtt_search.Estimate, mtt_search.Agreement]:
        accuracies = [100 * shares[of].mean().item() for shares in found]
        estimate = mtt_search.fit(drawn[:fitted], accuracies[:fitted])
        return estimate, mtt_search.agreement(estimate, drawn[fitted:], accuracies[fitted:])

    whole, agreement = fit(slice(None))
    chosen, _ = fit(slice(half))
    rates = analysis.stage_rates(trained.model(), test[0], 6)
    best = mtt_search.search(chosen, rates, 3, 1, 6)
    judged = {
        name: 100 * right(model, t, calibrations, [test])[half:].mean().item()
        for name, t in (("best", best.t), ("uniform", (3,) * 6))
    }
    return {
        "K": whole.K,
        "correlation": agreement.correlation,
        "rmse": agreement.rmse,
        "fresh": [
            [whole.predict(t), 100 * s.mean().item()] for t, s in zip(drawn[fitted:], found[fitted:], strict=True)
        ],
        "t": best.t,
        "spent": best.energy / (3 * sum(rates)),
        "estimated": best.accuracy - chosen.predict((3,) * 6),
        **judged,
    }


def draw_estimation(path: Path, results: list[dict]) -> Path:
    points = {f"seed {i}": r["fresh"] for i, r in enumerate(results[:6])}
    labels = "estimated accuracy, %", "measured accuracy, %"
    return pictures.scatter(path, points, *labels, "60 fresh temporal configurations, estimated from 18")


def draw_search(path: Path, results: list[dict]) -> Path:
    groups = {"": {"uniform, T = 3": [r["uniform"] for r in results], "searched": [r["best"] for r in results]}}
    title = "At most as many spikes as at T = 3, judged on images that chose nothing"
    return pictures.dots(path, groups, TITLE[1], title)


ESTIMATION = Protocol(
    "The accuracy of a temporal configuration can be estimated from few: sum of K_i sqrt(log2 t_i) + c",
    f"{PAPER}, section 4.3.3, figures 7A and 8",
    "The network of MTT of E2.3; 18 random configurations, calibrated for each, fitted by least squares; 60 fresh "
    "ones; all test images, mean of three calibrations",
    estimation,
    [
        Measure("correlation on fresh configurations", lambda r: r["correlation"], (">", 0.6)),
        Measure("K above 0, of 6", lambda r: sum(k > 0 for k in r["K"]), (">", 3)),
        Measure("root mean square error, points", lambda r: r["rmse"]),
    ],
    draw_estimation,
)

SEARCH = Protocol(
    "The configuration that the estimate finds best is more accurate than the uniform one of the same energy",
    f"{PAPER}, section 5.3: +0.62 points on CIFAR100, +0.21 on CIFAR10",
    "As E2.15, fitted on one half of the test images and judged on the other; budget: the spikes at T = 3",
    estimation,
    [
        Measure("accuracy, searched - uniform, points", lambda r: r["best"] - r["uniform"], (">", 0)),
        Measure("estimated gain, points", lambda r: r["estimated"]),
    ],
    draw_search,
    checks=[
        Measure("energy of the searched one, of the budget", lambda r: r["spent"], ("<", 1 + 1e-9)),
        Measure("estimated accuracy, searched - uniform, points", lambda r: r["estimated"], (">=", 0)),
    ],
)


# Early exit


def early_exit(work: Work) -> dict:
    result = {}
    for name, run in NOISY.items():
        trained = work.train(run)
        x, y = trained.images()
        found = seenn.curve(analysis.outputs(trained.model(), x, 6), y)
        result[name] = {"curve": [[p.threshold, p.steps, 100 * p.accuracy] for p in found], "fixed": over_t(trained)}
    return result


def exiting(result: dict, name: str, steps: float = 1.6) -> float:
    """Accuracy at a mean T, on the line between the two thresholds beside it."""
    points = sorted((mean_t, accuracy) for _, mean_t, accuracy in result[name]["curve"])
    after = next(i for i, (mean_t, _) in enumerate(points) if mean_t >= steps)
    (a, low), (b, high) = points[after - 1], points[after]
    return low + (high - low) * (steps - a) / (b - a) if b > a else high


def exit_gain(first: str) -> Callable[[dict], float]:
    return lambda r: exiting(r, "MTT") - exiting(r, first)


def draw_early_exit(path: Path, results: list[dict]) -> Path:
    at = [1 + i / 5 for i in range(21)]
    lines = {name: (at, [[exiting(r, name, t) for t in at] for r in results]) for name in ("SDT", "TET", "MTT")}
    lines["MTT, T fixed"] = (range(1, 6), [r["MTT"]["fixed"][:5] for r in results])
    return pictures.curves(path, lines, "mean T", TITLE[1], "Early exit at several thresholds of confidence")


EARLY_EXIT = Protocol(
    "With early exit, a network trained with MTT is more accurate at the same mean T",
    f"{PAPER}, table 5, against SEENN-I trained with TET: 96.58 against 96.38 % at a mean T of 1.20",
    "The networks of E2.3b; a sample leaves where the greatest softmax of the summed outputs exceeds a threshold, at "
    "T = 6 at the latest; between thresholds on a line",
    early_exit,
    [
        Measure(
            "accuracy at mean T = 1.6, MTT - SDT, points", lambda r: exiting(r, "MTT") - exiting(r, "SDT"), (">", 0)
        ),
        Measure(
            "accuracy at mean T = 1.6, MTT - SDT at equal cost, points",
            exit_gain("SDT, equal cost"),
            (">", 0),
        ),
        Measure(
            "accuracy at mean T = 1.6, MTT - TET, points", lambda r: exiting(r, "MTT") - exiting(r, "TET"), (">", 0)
        ),
        Measure(
            "MTT: accuracy at mean T = 1.6 - at T = 1 for all, points",
            lambda r: exiting(r, "MTT") - r["MTT"]["fixed"][0],
            (">", 0),
        ),
        Measure(
            "MTT: accuracy at mean T = 1.6 - at T = 2 for all, points",
            lambda r: exiting(r, "MTT") - r["MTT"]["fixed"][1],
            (">=", -1.5),
        ),
    ],
    draw_early_exit,
)


# Sequences

SEQUENCE = "FC1-FC64-FC64 of LIF(decay=0.99), T = 64"


def sequence(name: str, recipe: str, *overrides: str, epochs: int = 30, mixed: str = "") -> Run:
    wanted = f"{SEQUENCE}{mixed}: {epochs} sdt, lr 0.002 falling"
    return Run(name, recipe, (f"stage.epochs={epochs}", *overrides), wanted)


FREE = "stage.mtt.monotone=false", "stage.mtt.first_fixed=false"
SEQUENCES = {
    "SDT": sequence("sequence-SDT", "digits-sequence-sdt"),
    "SDT, equal cost": sequence("sequence-SDTx68", "digits-sequence-sdt", epochs=68),
    "MTT, never growing": sequence(
        "sequence-MTT", "digits-sequence-mtt", mixed=", 3 passes, t by 1 of 2 stages, the first fixed, never growing"
    ),
    "MTT, free": sequence("sequence-free", "digits-sequence-mtt", *FREE, mixed=", 3 passes, t by 1 of 2 stages"),
    "RNN": Run(
        "sequence-RNN",
        "digits-sequence-rnn",
        (),
        "FC1-FC64-FC64-FC64-FC64 of VanillaRNN, T = 64: 30 sdt, lr 0.002 falling",
    ),
}


def sequences(work: Work) -> dict:
    return {name: work.train(run).accuracy() for name, run in SEQUENCES.items()}


def draw_sequences(path: Path, results: list[dict]) -> Path:
    groups = {"": {name.replace(", ", ",\n"): [r[name] for r in results] for name in SEQUENCES}}
    return pictures.dots(path, groups, TITLE[1], "Digits pixel by pixel, 64 steps, two layers of 64")


def more(second: str, first: str) -> Callable[[dict], float]:
    return lambda r: r[second] - r[first]


MONOTONE = Protocol(
    "For sequences, MTT whose t never grows from stage to stage is more accurate than SDT and than free MTT",
    f"{PAPER}, A.12, table 14: 64.56 against 55.75 % of SDT and 56.22 % of an RNN, sequential MNIST",
    "Digits without noise, pixel by pixel, T = 64; two layers of 64 neurons (decay 0.99) with batch norm; 30 epochs of "
    "Adam (2e-3, cosine), batch 60; MTT with t_1 = 64, t_2 in 1 to 64, s = 3; SDT for 68 epochs costs as much; an RNN "
    "of tanh, 2 x 64",
    sequences,
    [
        Measure("accuracy, never growing - SDT, points", more("MTT, never growing", "SDT"), (">", 0)),
        Measure("accuracy, never growing - free, points", more("MTT, never growing", "MTT, free"), (">", 0)),
        Measure(
            "accuracy, never growing - SDT at equal cost, points",
            more("MTT, never growing", "SDT, equal cost"),
            (">", 0),
        ),
        Measure("accuracy, never growing - RNN, points", more("MTT, never growing", "RNN"), (">", 0)),
        Measure("accuracy, SDT, %", lambda r: r["SDT"]),
    ],
    draw_sequences,
)


# Without a clock

CHIP = "FC64-FC96-FC96 of IAF(threshold=1.0, v_min=-1.0, Triangle(gamma=1.0, peak=1.0)), T = 16"
CHIPS = {
    "SDT": Run("chip-SDT", "digits-chip-sdt", (), f"{CHIP}: 36 sdt, lr 0.005 falling"),
    "MTT": Run(
        "chip-MTT",
        "digits-chip-mtt",
        (),
        f"{CHIP}, 3 passes, t by 1 of 2 stages, the first fixed, never growing: 12 sdt, lr 0.005 falling",
    ),
}


def chip(work: Work) -> dict:
    result = {}
    for name, run in CHIPS.items():
        trained = work.train(run)
        found = test_events(trained.recipe, trained.model(), 0, 20 if work.quick else None)
        result[name] = {
            "clocked": 100 * found["clocked"],
            "events": 100 * found["event_driven"],
            "spikes": sum(found["spikes"].values()),
        }
    return result


def draw_chip(path: Path, results: list[dict]) -> Path:
    kinds = {"clocked": "clocked, T = 16", "events": "event by event"}
    groups = {name: {text: [r[name][kind] for r in results] for kind, text in kinds.items()} for name in CHIPS}
    return pictures.dots(path, groups, TITLE[1], "Integrate-and-fire network, with a clock and without")


def lost(result: dict, name: str) -> float:
    return result[name]["clocked"] - result[name]["events"]


ASYNCHRONOUS = Protocol(
    "On hardware without a clock, a network trained with SDT loses accuracy, one trained with MTT does not",
    f"{PAPER}, table 7: 98.61 and 96.18 % for SDT, 97.79 and 98.5 % for MTT, N-MNIST on a GPU and on Speck2e",
    "Digits as events, up to 8 a pixel at random times; 64-96-96-10 without biases, integrate-and-fire, bounded below;"
    " SDT at T = 16 for 36 epochs, MTT with t_1 = 16 and s = 3 for 12: 36 passes each; then event by event in place of "
    "the chip",
    chip,
    [
        Measure("SDT: lost without a clock, points", lambda r: lost(r, "SDT"), (">", 0)),
        Measure("lost without a clock, SDT - MTT, points", lambda r: lost(r, "SDT") - lost(r, "MTT"), (">", 0)),
        Measure(
            "accuracy without a clock, MTT - SDT, points", lambda r: r["MTT"]["events"] - r["SDT"]["events"], (">", 0)
        ),
        Measure("accuracy with the clock, SDT, %", lambda r: r["SDT"]["clocked"]),
        Measure("spikes event by event, MTT / SDT", lambda r: r["MTT"]["spikes"] / r["SDT"]["spikes"]),
    ],
    draw_chip,
)
