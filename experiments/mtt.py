"""Claims of Du et al., "Temporal Flexibility in Spiking Neural Networks: Towards Generalization Across Time Steps and
Deployment Friendliness", ICLR 2025."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from snnkern import analysis, losses
from snnkern.analysis import pictures
from snnkern.methods.mtt import Sampler
from snnkern.train.evaluation import calibrate

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
ALONE = {steps: run(f"SDT{steps}", "digits-sdt", steps=steps) for steps in T if steps < 6}
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


def flatness(work: Work) -> dict:
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
    flatness,
    [
        Measure("rise at 0.25, MTT - SDT", lambda r: r["MTT"][0] - r["SDT"][0], ("<", 0)),
        Measure("rise at 0.5, MTT - SDT", lambda r: r["MTT"][1] - r["SDT"][1], ("<", 0)),
        Measure("rise at 0.5, MTT - SDT at equal cost", lambda r: r["MTT"][1] - r["SDT, equal cost"][1], ("<", 0)),
    ],
    draw_flatness,
)
