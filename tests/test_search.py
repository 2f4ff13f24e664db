"""Estimated accuracy of temporal configurations, the search of the best, and ``snnkern search`` on a small network."""

import json
import math
import os
import random
import shutil
import signal
from fractions import Fraction
from functools import partial
from itertools import pairwise, product
from statistics import fmean

import pytest
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from snnkern.analysis import evaluate, sparsity, stage_rates
from snnkern.analysis.configurations import accuracies, right
from snnkern.cli import app
from snnkern.data import Data
from snnkern.methods import mtt
from snnkern.methods.mtt_search import Estimate, agreement, energy, fit, search
from snnkern.models import CNN6, ResNet18
from snnkern.nn import LIF
from snnkern.train.batches import Parts

CIFAR100 = Estimate((0.93, 0.53, 0.59, 0.67, 1.22, 0.48, 1.36, 0.18), 67.11)
CIFAR10 = Estimate((0.49, 0.28, 0.17, 0.37, 0.37, 0.04, 0.05, 0.17), 92.13)


def test_the_published_estimates():
    uniform = [round(CIFAR100.predict([steps] * 8), 2) for steps in range(1, 7)]
    assert uniform == [67.11, 73.07, 74.61, 75.54, 76.19, 76.69]
    assert round(CIFAR100.predict((3, 2, 2, 3, 5, 3, 6, 2)), 2) == 75.07
    assert round(CIFAR10.predict([3] * 8), 2) == 94.57
    assert round(CIFAR10.predict((4, 2, 2, 3, 5, 2, 2, 4)), 2) == 94.63


def test_a_fit_finds_what_made_the_accuracies():
    rng = random.Random(0)
    t = [tuple(rng.randint(1, 6) for _ in range(8)) for _ in range(18)]
    found = fit(t, [CIFAR100.predict(each) for each in t])
    assert found.K == pytest.approx(CIFAR100.K, abs=1e-9) and found.c == pytest.approx(67.11)
    assert agreement(found, t, [CIFAR100.predict(each) for each in t]) == pytest.approx((1, 0), abs=1e-9)
    off = [found.predict(each) + (0.5 if i % 2 else -0.5) for i, each in enumerate(t)]
    assert agreement(found, t, off).rmse == pytest.approx(0.5) and agreement(found, t, off).correlation < 1
    assert agreement(found, t[:1], off[:1]).correlation is None
    worse = fit(t, off)  # least squares: no other estimate is closer
    least = agreement(worse, t, off).rmse
    for i in range(8):
        moved = Estimate(tuple(k + 0.01 * (i == j) for j, k in enumerate(worse.K)), worse.c)
        assert agreement(moved, t, off).rmse > least


@pytest.mark.parametrize(
    ("configurations", "text"),
    [
        ([(1, 2), (2, 1)], "must be at least 3, one more than stages, got 2"),
        ([(1, 2, 5), (2, 1, 5), (2, 2, 5), (1, 1, 5)], "those of stage 3 (counted from 1) never change"),
        (
            [(1, 1, 1), (2, 2, 1), (3, 3, 1), (3, 3, 2)],
            "the steps of stage 2 (counted from 1) follow from those before",
        ),
        ([(1, 2), (2, 1), (3,)], "t must be a number of time steps for each of 2 stages, got (3,)"),
        ([(1, 2), (2, 1), (0, 2)], "t must be at least 1, got 0"),
        ([], "configurations must be at least one, got none"),
    ],
)
def test_configurations_that_settle_no_estimate(configurations, text):
    with pytest.raises(ValueError) as error:
        fit(configurations, [0.5] * len(configurations))
    assert text in str(error.value)


def brute_force(estimate, rates, budget, low, high, monotone):
    """(-accuracy, energy, t), least of all, without rounding."""
    limit = Fraction(budget) * sum(map(Fraction, rates))
    found = []
    for t in product(range(low, high + 1), repeat=len(rates)):
        spent = sum(Fraction(rate) * steps for rate, steps in zip(rates, t, strict=True))
        if spent <= limit and not (monotone and any(a < b for a, b in pairwise(t))):
            worth = sum(Fraction(k * math.sqrt(math.log2(steps))) for k, steps in zip(estimate.K, t, strict=True))
            found.append((-worth, spent, t))
    return min(found)[2]


@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_search_equals_brute_force(ties, monotone):
    rng = random.Random(1)
    for _ in range(60):
        stages, high = rng.randint(1, 4), rng.randint(1, 5)
        low = rng.randint(1, high)
        weights = [rng.choice((-0.5, 0.0, 0.5, 1.0)) if ties else rng.gauss(0.5, 1) for _ in range(stages)]
        rates = [rng.choice((0.0, 0.1, 0.2)) if ties else 0.3 * rng.random() for _ in range(stages)]
        budget = rng.choice((low, high, (low + high) / 2, rng.uniform(low, high)))
        asked = Estimate(tuple(weights), 50.0), rates, budget, low, high, monotone
        found = search(*asked)
        assert found.t == brute_force(*asked), asked
        assert found.accuracy == asked[0].predict(found.t) and found.energy == energy(found.t, rates)


def test_search_of_deep_networks():
    """More stages than can be tried: no worse than the uniform configuration, better with more to spend."""
    rng = random.Random(2)
    for stages, high in ((8, 6), (16, 6), (35, 4)):
        for alike in (False, True):
            weights = [0.7 if alike else rng.uniform(0.1, 1.4) for _ in range(stages)]
            rates = [0.1 if alike else rng.uniform(0.03, 0.3) for _ in range(stages)]
            estimate, before = Estimate(tuple(weights), 67.0), 0.0
            for budget in (1, 1.7, 3, high):
                found = search(estimate, rates, budget, 1, high)
                assert found.energy <= budget * math.fsum(rates) * (1 + 1e-12)
                assert found.accuracy >= max(before, estimate.predict([int(budget)] * stages))
                assert found.nodes < 100_000
                before = found.accuracy
            assert found.t == (high,) * stages


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"budget": 1.5}, "budget must be at least low, 2, as no configuration costs less, got 1.5"),
        ({"rates": [0.1]}, "rates must be one for each of 2 stages, got 1"),
        ({"rates": [0.1, -0.1]}, "rates must not be negative, got -0.1"),
        ({"rates": [0.1, math.nan]}, "rates must be finite, got nan"),
        ({"high": 1}, "high must be at least low, 2, got 1"),
        ({"low": 0}, "low must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_searched(changed, text):
    with pytest.raises(ValueError) as error:
        search(Estimate((1.0, 1.0), 0.0), **({"rates": [0.1, 0.2], "budget": 3, "low": 2, "high": 6} | changed))
    assert text in str(error.value)


def test_accuracy_in_a_configuration_is_that_of_calibrated_networks():
    torch.manual_seed(0)
    model = CNN6(size=8, steps=3).train()
    x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 10
    training = [[(torch.randn(8, 1, 8, 8), None)] for _ in range(2)]
    parts = [(x[:30], y[:30]), (x[30:], y[30:])]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = [(3, 2, 1, 1, 2, 3), (1,) * 6]
    found = list(accuracies(model, asked, training, parts))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    for t, accuracy in zip(asked, found, strict=True):
        calibrated = []
        for batches in training:
            mtt.calibrate(model, (x for x, _ in batches), t=t)
            calibrated.append(evaluate(model, parts, t=t).accuracy[-1])
        assert accuracy == pytest.approx(fmean(calibrated))
    shares = right(model, asked[0], training, parts)
    assert shares.shape == (40,) and set(shares.tolist()) <= {0, 0.5, 1}
    with pytest.raises(ValueError, match="calibrations must be at least one, got none"):
        right(model, asked[0], [], parts)


def test_rates_of_stages_are_over_all_of_their_neurons():
    torch.manual_seed(0)
    model, x = ResNet18(classes=10, in_channels=1, steps=2, fused=False), torch.randn(3, 1, 8, 8)
    rates, layers = stage_rates(model, x, 2), sparsity(model, x, 2)
    stem, first, second = (layers[name] for name in list(layers)[:3])  # 64 channels, 8 x 8, each
    assert len(rates) == model.n_stages == 8 and rates[0] == pytest.approx(fmean((stem, first, second)))
    for module in model.modules():
        if isinstance(module, LIF) and module in [*model.blocks[1].modules()]:
            module.threshold = 1e9
    assert stage_rates(model, x, 2)[1] == 0


TINY = "data.train=60", "batch=30", "stage.epochs=2", "stage.steps=3", "test_steps=[1]", "seeds=1"
FEW = "--samples", "8", "--fresh", "4", "--repeats", "2", "--budget", "2"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    for package in ("sklearn", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("runs")
    result = invoke("train", "digits-mtt", *TINY, "--out", root)
    assert result.exit_code == 0, result.output
    return root / "seed0"


@pytest.fixture(scope="module")
def stdout(run):
    """Of a search, whose files are in the run's folder."""
    result = invoke("search", run.parent, *FEW)
    assert result.exit_code == 0, result.output
    return result.stdout


def halves():
    """Of the test samples: to choose by, to judge by."""
    order = torch.randperm(597, generator=torch.Generator().manual_seed(0))
    return order[:298], order[298:]


def test_the_command(run, stdout, monkeypatch):
    folder = run / "search"
    assert stdout.split()[-1] == str(folder / "search.md") and "Best less uniform, judged on" in stdout
    found = json.loads((folder / "search.json").read_text())
    fitted, fresh, best, uniform = (found[key] for key in ("fitted", "fresh", "best", "uniform"))
    assert (len(fitted["rows"]), len(fresh["rows"]), len(found["rates"])) == (8, 4, 6)
    drawn = [tuple(row["t"]) for row in fitted["rows"] + fresh["rows"]]
    assert len(set(drawn)) == 12 and {steps for t in drawn for steps in t} == {1, 2, 3}
    estimate = fit(drawn[:8], [row["measured"] for row in fitted["rows"]])
    assert found["estimate"] == {"K": pytest.approx(estimate.K), "c": pytest.approx(estimate.c)}
    assert tuple(best["t"]) == search(estimate, found["rates"], 2, 1, 3).t and uniform["t"] == [2] * 6
    assert best["energy"] <= uniform["energy"] and best["estimated"] >= uniform["estimated"]
    assert found["choosing"] + found["judging"] == 597 and found["choosing"] == 298
    assert found["difference"]["mean"] == pytest.approx(best["judged"] - uniform["judged"])
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "search.md").read_text().startswith("# Best temporal configuration: Mixed time-step")

    calls = []
    monkeypatch.setattr("snnkern.train.search.right", lambda *rest: calls.append(rest) or right(*rest))
    assert invoke("search", run, *FEW).exit_code == 0
    assert len(calls) == 2 and json.loads((folder / "search.json").read_text()) == found  # judged anew, no more
    assert torch.equal(torch.cat(calls[0][3].batches), halves()[1])
    other = invoke("search", run, *FEW, "--seed", "1")
    assert other.exit_code == 1 and "seed 0 there, 1 here); choose another folder" in other.stderr


def test_an_interrupted_search_goes_on(run, stdout, tmp_path, monkeypatch):
    calls = []

    def interrupted(*rest):
        calls.append(rest)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return right(*rest)

    asked = ("search", run, *FEW, "--out", tmp_path / "new")
    monkeypatch.setattr("snnkern.train.search.right", interrupted)
    result = invoke(*asked)
    assert result.exit_code == 130 and "5 configurations measured; all of it is safe in" in result.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["measured.json"]
    assert invoke(*asked).exit_code == 0 and len(calls) <= 8 + 4 + 4
    _, _, (first, second), choosing = calls[0]
    assert torch.equal(torch.cat(choosing.batches), halves()[0])
    assert len(first.batches) == 2 and not torch.equal(first.batches[0], second.batches[0])
    again, whole = tmp_path / "new" / "search.json", run / "search" / "search.json"
    assert {**json.loads(again.read_text()), "run": ""} == {**json.loads(whole.read_text()), "run": ""}
    (tmp_path / "new" / "measured.json").write_text("{")
    assert "measured.json cannot be read" in invoke(*asked).stderr


def test_frames_of_events_are_given_time_first():
    frames, classes = torch.rand(6, 5, 2, 4, 4), torch.arange(6)
    events = TensorDataset(frames, classes)
    data = Data(events, events, 6, (5, 2, 4, 4), True, events)
    given = partial(Parts, data.test, device=torch.device("cpu"), steps=3, events=True)
    ((x, y),) = given([torch.tensor([4, 1])])
    assert torch.equal(x, frames[[4, 1], :3].movedim(1, 0)) and y.tolist() == [4, 1]
    assert torch.equal(torch.cat([each for each, _ in given([torch.tensor([4]), torch.tensor([1])])], dim=1), x)


def test_a_network_trained_otherwise(run, tmp_path):
    assert invoke("train", "digits-sdt", *TINY, "--out", tmp_path).exit_code == 0
    result = invoke("search", tmp_path, "--samples", "7", "--fresh", "1", "--repeats", "1", "--budget", "1")
    assert result.exit_code == 0 and "Trained at T = 3 alone, not with mixed time steps." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--budget", "0"], "--budget must be at least 1, got 0"),
        (["run", "--fresh", "0"], "--fresh must be at least 1, got 0"),
        (["run", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["run", "--budget", "4"], "budget must be one of the steps of training, 1 to 3, got 4"),
        (["run", "--samples", "6"], "samples must be at least 7, one more than the network has stages, got 6"),
        (
            ["run", "--samples", "700"],
            "no more than the 729 configurations of 6 stages with 1 to 3 steps, got 700 and 60",
        ),
        (["run", "stage.mtt.monotone=true"], "no more than the 28 configurations of 6 stages with 1 to 3 steps"),
        (["run", "stage.mtt.first_fixed=true"], "was trained with mtt.first_fixed"),
        (["run", "stage.mtt.low=3"], "must be trained for more than one number of steps, got 3 alone"),
        (["run/stage0-last.safetensors"], "RUN must be a folder: an exported network has no batch norms to calibrate"),
        (["both", "--out", "new"], "both holds 2 runs; with --out name one of them, such as both/a"),
        (["nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, arguments, text):
    (tmp_path / "run").symlink_to(run)
    for name in "ab":
        (tmp_path / "both" / name).mkdir(parents=True)
        shutil.copy(run / "settings.json", tmp_path / "both" / name)
    monkeypatch.chdir(tmp_path)
    result = invoke("search", *arguments)
    assert result.exit_code in (1, 2) and len(result.stderr.splitlines()) == 1 and text in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "run"]
