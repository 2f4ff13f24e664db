"""Mixed time-step training: configurations, the networks that run at them, training with them, calibration."""

import json
from collections import Counter
from functools import partial
from itertools import product
from math import comb

import pytest
import torch
from conftest import GRADIENT_BOUND
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from test_train import InterruptAt, assert_same_end, weights

import snnkern
from snnkern.analysis import evaluate, outputs
from snnkern.cli import app
from snnkern.methods.mtt import Sampler, calibrate
from snnkern.models import CNN6, VGGSNN, ResNet18, ResNet19, SEWResNet34, SpikingMLP, ToyCNN
from snnkern.models.layers import ConvNorm, per_frame
from snnkern.nn import BNLIF, LIF, LIFNode, SmoothLIF, TdBatchNorm
from snnkern.train import evaluation, fit
from snnkern.train.batches import Epoch
from snnkern.train.folder import Interrupted, read_metrics
from snnkern.train.recipe import RecipeError, load


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class SmallResNet(ResNet18):
    GROUPS = ((8, 2, 1), (12, 1, 2))


class SmallSEW(SEWResNet34):
    GROUPS = ((8, 2, 1), (12, 1, 2))

    def __init__(self, **options):
        super().__init__(classes=10, **options)


# A model, a sample's shape, whether it comes in frames, the number of stages
NETWORKS = {
    "CNN6": (CNN6, (1, 8, 8), False, 6),
    "CNN6 of frames": (CNN6, (1, 8, 8), True, 6),
    "VGGSNN": (partial(VGGSNN, size=16), (2, 16, 16), True, 8),
    "ResNet": (SmallResNet, (3, 8, 8), False, 3),
    "SEW": (SmallSEW, (3, 16, 16), False, 3),
    "hidden": (partial(ResNet19, stem=8, hidden=16), (3, 8, 8), False, 8),
    "MLP": (partial(SpikingMLP, 5, (16, 12, 8)), (5,), True, 3),
    "toy": (partial(ToyCNN, size=8), (1, 8, 8), False, 1),
}


def made(name, **options):
    torch.manual_seed(0)
    model, (_, shape, frames, stages) = NETWORKS[name][0](**options), NETWORKS[name]
    for module in model.modules():  # so that enough fires
        if isinstance(module, (BNLIF, TdBatchNorm)):
            nn.init.uniform_(module.bias, 0.0, 0.8)
        if isinstance(module, nn.Linear):
            module.weight.data *= 3
    return model, data(*((6, 3) if frames else (3,)), *shape), stages


def drawn(stages, seed=0, high=6):
    return Sampler(1, high).draw(stages, torch.Generator().manual_seed(seed))


# Networks


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_uniform_configuration_is_the_ordinary_network(name, fused):
    options = {} if name in ("MLP", "toy") else {"fused": fused}
    runs = []
    for given in ({"steps": 4}, {"t": (4,) * NETWORKS[name][3]}):
        model, x, stages = made(name, **options)
        assert model.n_stages == stages == len(model.stage_modules())
        x = x[:4] if NETWORKS[name][2] and "steps" in given else x
        got = model(x, **given)
        got.square().sum().backward()
        runs.append((got, *(p.grad for p in model.parameters()), *model.buffers()))
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


def plain(model, x, t, frames):
    """The network with the transformation written out in front of every stage, and nothing run in one pass."""

    def conv_norm(layer, x):
        return layer.norm(per_frame(layer.conv, x))

    def stage(layer, x, shortcut=0.0):
        return per_frame(layer.pool, layer.neuron(conv_norm(layer, x) + shortcut))

    x = x[: t[0]] if frames else x.expand(t[0], *x.shape)
    if isinstance(model, SpikingMLP):
        for (linear, neuron), steps in zip(model.stage_modules(), t, strict=True):
            x = neuron(linear(snnkern.ttm(x, steps)))
        return model.head(x)
    if isinstance(model, ToyCNN):
        return model.head(per_frame(model.pool, model.neuron(per_frame(model.conv, x))).flatten(2))
    if hasattr(model, "stages"):
        for layer, steps in zip(model.stages, t, strict=True):
            x = stage(layer, snnkern.ttm(x, steps))
        return model.head(model.hidden(x.flatten(2)))
    for layer in model.stem:
        x = stage(layer, x)
    x = per_frame(model.pool, x)
    for block, steps in zip(model.blocks, t, strict=True):
        x = snnkern.ttm(x, steps)
        if isinstance(model, SEWResNet34):
            y = stage(block.second, stage(block.first, x))
            x = y + (x if block.shortcut is None else stage(block.shortcut, x))
        else:
            assert block.shortcut is None or isinstance(block.shortcut, ConvNorm)
            shortcut = x if block.shortcut is None else conv_norm(block.shortcut, x)
            x = stage(block.second, stage(block.first, x), shortcut)
    return model.head(model.hidden(x.mean((3, 4))))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_a_configuration_is_the_transformation_between_stages(name, seed, fused):
    options = {} if name in ("MLP", "toy") else {"fused": fused}
    ours, x, stages = made(name, **options)
    theirs = made(name, **({"fused": False} if options else {}))[0]
    t = drawn(stages, seed)
    got, wanted = ours(x, t=t), plain(theirs, x, t, NETWORKS[name][2])
    assert got.shape == (t[-1], 3, 10 if name != "MLP" else 20) and got.std() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    weight = data(*got.shape, seed=1)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    bound = GRADIENT_BOUND[torch.float32] * 10 * stages
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not key.endswith("conv.bias"):  # batch norm takes a constant away: all that is left is rounding
            assert (p.grad - q.grad).norm() <= bound * q.grad.norm(), key
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_what_is_repeated_is_convolved_once_and_sums_are_written_by_the_neurons():
    model, x, _ = made("CNN6")
    convolved, fired = [], []
    for stage in model.stages:
        stage.conv.register_forward_hook(lambda layer, x, y: convolved.append(len(y) // 3))
        stage.norm.register_forward_hook(lambda layer, x, y: fired.append((len(x[0]), len(y))))
    model(x, t=(2, 6, 3, 3, 1, 4))
    assert convolved == [1, 2, 3, 3, 1, 1]  # the image, and then min(t_i, t_(i+1))
    assert fired == [(2, 2), (6, 3), (3, 3), (3, 1), (1, 1), (4, 4)]


@pytest.mark.parametrize("neuron", [partial(LIFNode, tau=2.0), partial(SmoothLIF, decay=0.5), nn.ReLU])
def test_other_neurons(neuron):
    model, x, _ = made("ResNet", neuron=neuron)
    assert model(x, t=(1, 4, 2)).shape == (2, 3, 10)


def test_under_autocast_with_channels_last():
    model, x, _ = made("ResNet")
    model.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x.contiguous(memory_format=torch.channels_last), t=(3, 1, 4))
    got.float().square().sum().backward()
    assert got.shape == (4, 3, 10) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("CNN6", {"t": (1, 2, 3)}, "t must be a number of time steps for each of the 6 stages, got (1, 2, 3)"),
        ("CNN6", {"t": 4}, "t must be a number of time steps for each of the 6 stages, got 4"),
        ("CNN6", {"t": (1, 2, 3, 0, 1, 1)}, "t must be"),
        ("CNN6", {"t": (1,) * 6, "steps": 3}, "steps must be left out where t is given, got 3"),
        ("MLP", {"t": (7, 1, 1)}, "t must begin with at most the number of frames, 6, got 7"),
        ("MLP", {"steps": 7}, "steps must be None or the number of frames, 6, got 7"),
    ],
)
def test_mistakes(name, given, message):
    model, x, _ = made(name)
    with pytest.raises((TypeError, ValueError)) as error:
        model(x, **given)
    assert str(error.value).startswith(message)


def test_analysis_of_a_configuration():
    model, x, _ = made("CNN6")
    y, t = torch.tensor([0, 1, 2]), (3, 1, 2, 2, 4, 5)
    found = outputs(model, x, batch=2, t=t)
    assert torch.equal(found, torch.cat([model.eval()(part, t=t) for part in x.split(2)], dim=1))
    tested = evaluate(model, [(x, y)], t=t)
    assert len(tested.accuracy) == 5 and tested.accuracy[-1] == (found.mean(0).argmax(1) == y).double().mean()


# Configurations


def test_sampler_is_uniform():
    """Chi-square of every configuration's count, below the quantile of 99.9 %."""
    generator = torch.Generator().manual_seed(0)

    def chi_square(sampler, stages, draws):
        counts = Counter(sampler.draw(stages, generator) for _ in range(draws))
        wanted = draws / len(cells)
        assert set(counts) == set(cells)
        return sum((counts[cell] - wanted) ** 2 / wanted for cell in cells)

    cells = [*product(range(2, 6), repeat=3)]
    assert chi_square(Sampler(2, 5), 3, 6400) < 103.4  # 63 degrees of freedom
    cells = [t for t in product(range(2, 6), repeat=3) if t[0] >= t[1] >= t[2]]
    assert len(cells) == comb(6, 3)
    assert chi_square(Sampler(2, 5, monotone=True), 3, 2000) < 43.8  # 19
    cells = [(7, *t) for t in product(range(1, 8), repeat=2) if t[0] >= t[1]]
    assert chi_square(Sampler(1, 7, monotone=True, first_fixed=True), 3, 2800) < 55.5  # 27
    cells = [(a, a, b) for a, b in product(range(1, 4), repeat=2)]
    assert chi_square(Sampler(1, 3, granularity=2), 3, 900) < 26.1  # 8
    cells = [(a,) * 8 for a in range(1, 7)]
    assert chi_square(Sampler(1, 6, granularity="network"), 8, 600) < 20.5  # 5


def test_sampler():
    assert drawn(8, seed=3) == drawn(8, seed=3) != drawn(8, seed=4)
    assert Sampler(4, 4).draw(3, torch.Generator()) == (4, 4, 4) and Sampler(1, 6).mean == 3.5
    first = Sampler(1, 64, monotone=True, first_fixed=True).draw(2, torch.Generator().manual_seed(0))
    assert first[0] == 64 >= first[1]
    assert Sampler(1, 9, granularity=4, first_fixed=True).draw(4, torch.Generator()) == (9, 9, 9, 9)
    for wrong, message in (
        ({"low": 3, "high": 2}, "low must be at most high, 2, got 3"),
        ({"low": 0, "high": 2}, "low must be"),
        ({"low": 1, "high": 2, "granularity": "block"}, "granularity must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            Sampler(**wrong)


# Calibration


def statistics(model):
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("given", [{"steps": 4}, {"t": (3, 1, 2, 2, 4, 5)}])
def test_calibration_averages_over_the_batches(fused, given):
    model, x, _ = made("CNN6", fused=fused)
    model.train()
    model.stages[0].eval()
    parts = [x, data(5, 1, 8, 8, seed=1)]
    seen = []
    for part in parts:
        alone = made("CNN6", fused=fused)[0].train()
        for stage in alone.stages:
            stage.norm.momentum = 1.0
        alone(part, **given)
        seen.append([b for b in statistics(alone) if b.is_floating_point()])
    before = {key: p.clone() for key, p in model.named_parameters()}
    model(10 * x)
    calibrate(model, iter(parts), **given)
    for mean, *each in zip([b for b in statistics(model) if b.is_floating_point()], *seen, strict=True):
        torch.testing.assert_close(mean, sum(each) / 2, rtol=1e-5, atol=1e-6)
    assert {stage.norm.num_batches_tracked.item() for stage in model.stages} == {2}
    assert {stage.norm.momentum for stage in model.stages} == {0.1}
    assert [stage.norm.training for stage in model.stages] == [False, *[True] * 5]
    assert all(torch.equal(p, before[key]) and p.grad is None for key, p in model.named_parameters())


def test_calibration_that_fails_leaves_the_statistics():
    model, x, _ = made("CNN6")
    model(x)
    before = statistics(model)

    def parts():
        yield x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, parts())
    with pytest.raises(ValueError, match="parts must hold one batch at least, got none"):
        calibrate(model, [])
    assert all(map(torch.equal, statistics(model), before))
    assert {stage.norm.momentum for stage in model.stages} == {0.1} and model.training
    calibrate(made("MLP")[0], [])  # has no batch norm
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    calibrate(norm, [data(40, 3)])
    torch.testing.assert_close(norm[0].running_mean, data(40, 3).mean(0))
    assert norm[1].training


def test_the_neurons_take_a_call_s_steps_out():
    x = data(5, 3, 4) + 1
    spikes = LIF(decay=0.5)(x)
    assert torch.equal(LIF(decay=0.5)(x, steps_out=2), snnkern.ttm(spikes, 2))
    assert torch.equal(LIF(decay=0.5, steps_out=3)(x, data(5, 3, 4), 2), LIF(steps_out=2)(x + data(5, 3, 4)))
    assert torch.equal(BNLIF(4)(x, steps_out=2), snnkern.ttm(BNLIF(4)(x), 2))


# Training

SMALL = "data.train=90", "batch=30", "seed=0", "stage.steps=4", "stage.epochs=2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtt") / "run"
    fit(load("digits-mtt", SMALL), folder)
    return folder


@pytest.mark.parametrize(("name", "change"), [("digits-mtt", "mtt.granularity=2"), ("digits-nmt", "mtt.samples=2")])
def test_an_update_follows_the_sum_of_the_gradients(tmp_path, name, change):
    sgd = 'stage.optimiser={name = "SGD", lr = 0.1}'
    recipe = load(name, [*SMALL, "stage.epochs=1", "batch=90", "stage.loss.name=tet", sgd, f"stage.{change}"])
    fit(recipe, tmp_path)
    after = weights(tmp_path)
    torch.manual_seed(0)
    model, (stage,) = recipe.make_model(0, 10, (1, 8, 8)).train(), recipe.stage
    plan = Epoch.of((0, 0, 0), 90, 90)
    x, y = recipe.load_data().train[plan.batches[0]]
    generator = torch.Generator().manual_seed(plan.step_seeds[0])
    ts = [stage.sampler.draw(6, generator) for _ in range(stage.mtt.samples)]
    assert len(ts) == (2 if name == "digits-nmt" else 3) and len(set(ts)) > 1
    assert all(len(set(t)) == 1 if name == "digits-nmt" else t[0] == t[1] and t[2] == t[3] for t in ts)
    losses = [snnkern.losses.tet(model(x, t=t), y) for t in ts]
    gradients = torch.autograd.grad(sum(losses), list(model.parameters()))
    for (key, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(after[key], (p - 0.1 * gradient).detach(), rtol=1e-4, atol=1e-5)
    (line,) = read_metrics(tmp_path)
    assert line["loss"] == pytest.approx(sum(loss.item() for loss in losses) / len(ts), rel=1e-5)
    assert (
        line["passes"] == len(ts)
        and line["t"] == [[*t] for t in ts]
        and line["mean_t"] == pytest.approx(sum(map(sum, ts)) / 6 / len(ts))
    )


def test_weights_are_calibrated_at_the_greatest_t(trained, tmp_path):
    model, recipe, about = evaluation.restore(trained)
    data = recipe.load_data()
    assert {stage.norm.num_batches_tracked.item() for stage in model.stages} == {3}  # of the 10, those there are
    assert about["test_accuracy"] == evaluation.test(recipe, model, data, 4).accuracy[-1]
    plan = Epoch.of((0, 0, 1, "calibration"), 90, 30)
    before = statistics(model)
    calibrate(model, [data.train[batch][0] for batch in plan.batches], 4)
    assert all(map(torch.equal, statistics(model), before))
    fit(load("digits-mtt", [*SMALL, "stage.mtt.calibration=0"]), tmp_path)  # the same weights, other statistics
    ours, theirs = weights(tmp_path), weights(trained)
    assert all(torch.equal(ours[key], value) == ("running" not in key) for key, value in theirs.items()
               if "tracked" not in key)  # fmt: skip


@pytest.mark.parametrize("call", [2, 4, 5])  # the fourth is after the last step, before the test
def test_resumes_bit_for_bit(trained, tmp_path, call):
    recipe = load("digits-mtt", SMALL)
    with pytest.raises(Interrupted):
        fit(recipe, tmp_path, InterruptAt(call))
    fit(recipe, tmp_path, InterruptAt(99))  # shows something after every step
    assert_same_end(tmp_path, trained)


def test_recipes_say_what_is_drawn():
    stage = load("digits-mtt").stage[0]
    assert stage.sampler == Sampler(1, 6) and (stage.passes, stage.cost) == (3, 10.5)
    assert load("digits-nmt").stage[0].sampler == Sampler(1, 6, "network")
    assert load("digits-mtt", ["stage.mtt=none"]).stage[0].mtt is None
    assert load("digits-mtt", ["stage.mtt=none"]).stage == load("digits-sdt").stage
    assert load("digits-mtt").total_cost == 30 * 10.5
    for changes, message in (
        (["stage.mtt.low=7"], "stage.0.mtt.low must be at most steps, 6, got 7"),
        (["stage.mtt.samples=0"], "stage.0.mtt.samples must be greater than or equal to 1, got 0"),
        (["stage.mtt.sample=3"], "stage.0.mtt.sample is no key, did you mean samples?"),
        (["stage.mtt.granularity=0"], "stage.0.mtt.granularity must be a whole number from 1 up or 'network', got 0"),
        (["stage.mtt.granularity=block"], "stage.0.mtt.granularity must be a whole number from 1 up or 'network', got"),
        (["stage.mtt=3"], "stage.0.mtt must be a table, got 3"),
        (["compile=true"], "compile must be false with stage.0.mtt"),
        (["stage.network=ann"], "stage.0.mtt does not go with an ann"),
        (["stage.0.differences.eps=0.1"], "stage.0.mtt does not go with stage.0.differences"),
    ):
        with pytest.raises(RecipeError) as error:
            load("digits-mtt", changes)
        assert str(error.value).startswith(message)


def test_eval_of_a_configuration_and_with_calibration(trained):
    def rows(*options):
        result = CliRunner().invoke(app, ["eval", str(trained), "--json", *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.output)["rows"]

    model, recipe, _ = evaluation.restore(trained)
    data, t = recipe.load_data(), (1, 2, 3, 4, 3, 2)
    wanted = evaluate(model, [data.test.tensors], t=t)
    (row,) = rows("--t", "1,2,3,4,3,2")
    assert (row["T"], row["accuracy"], row["sdt"]) == (
        "1,2,3,4,3,2",
        wanted.accuracy[-1],
        pytest.approx(wanted.sdt[-1]),
    )
    assert rows("--t", "1,2,3,4,3,2", "--calibrate", "2")[0]["sdt"] != row["sdt"]
    uniform, own = rows(), rows("--calibrate", "3")
    assert [r["T"] for r in uniform] == [r["T"] for r in own] == [1, 2, 3, 4]
    assert uniform[0]["sdt"] != own[0]["sdt"] and uniform[3]["sdt"] == pytest.approx(own[3]["sdt"], rel=1e-3)
    for options, message in (
        (("--t", "1,2"), "--t must be a number for each of its 6 stages with CNN6, got 2 numbers"),
        (("--t", "1,2,x"), "--t must be whole numbers"),
        (("--t", "1,1,1,1,1,1", "--steps", "2"), "--t and --steps ask for different things"),
        (("--calibrate", "-1"), "--calibrate must be at least 0, got -1"),
    ):
        result = CliRunner().invoke(app, ["eval", str(trained), *options])
        assert result.exit_code == 2 and message in result.output
