"""Early exit: the rule, the network that stops, and the state that it carries from step to step."""

import json
import math
import re
from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from snnkern.cli import app
from snnkern.methods.seenn import GRID, Point, choose, curve, exit_early, exits
from snnkern.models import CNN6, VGGSNN, ResNet19, SpikingMLP, SpikingRNN
from snnkern.nn import BNLIF, LIF, TTM, LIFNode, SmoothLIF, TdBatchNorm, carried
from snnkern.train.recipe import load

T, N = 5, 6


def scores(classes=4, seed=0):
    return 2 * torch.randn(T, 40, classes, generator=torch.Generator().manual_seed(seed))


def by_hand(outputs, threshold, measure):
    """(step, class) of every sample, one after the other."""
    found = []
    for sample in outputs.double().unbind(1):
        for t in range(1, T + 1):
            total = sample[:t].sum(0)
            p = [math.exp(v) / sum(math.exp(w) for w in total.tolist()) for v in total.tolist()]
            entropy = -sum(v * math.log(v) for v in p) / math.log(len(p))
            if (max(p) if measure == "confidence" else 1 - entropy) > threshold or t == T:
                found.append((t, p.index(max(p))))
                break
    return found


@pytest.mark.parametrize("measure", ["confidence", "entropy"])
def test_the_rule_is_that_of_a_loop_over_samples(measure):
    outputs = scores()
    for threshold in (0.0, 0.5, 0.9, 0.99, 1.0):
        found = exits(outputs, threshold, measure)
        assert [*zip(found.steps.tolist(), found.predictions.tolist(), strict=True)] == by_hand(
            outputs, threshold, measure
        )
    assert set(exits(outputs, 0.9, measure).steps.tolist()) > {1, T}


def test_who_only_meets_the_threshold_stays():
    outputs = torch.zeros(3, 1, 2)  # confidence 1/2 at every step, whatever is added up
    assert exits(outputs, 0.5).steps.tolist() == [3] and exits(outputs, 0.5 - 1e-15).steps.tolist() == [1]
    assert exits(outputs + math.nan, 0.0).steps.tolist() == [3]


def test_curve_and_choice():
    outputs = scores()
    y = outputs.sum(0).argmax(1).where(torch.arange(40) % 5 > 0, 0)  # of which all steps know most
    points = curve(outputs, y)
    assert [point.threshold for point in points] == [*GRID] and points[0].steps == 1 and points[-1].steps == T
    for point in points:
        found = exits(outputs, point.threshold)
        right = (found.predictions == y).double().mean().item()
        assert point == Point(point.threshold, found.steps.double().mean().item(), right)
    full, good = exits(outputs, 1.0).predictions == y, []
    for point in points:
        gained = (exits(outputs, point.threshold).predictions == y).int() - full.int()
        if -gained.sum() <= gained.square().sum().sqrt():  # at most a standard error of the difference is lost
            good.append(point)
    assert 0 < len(good) < len(points) and choose(outputs, y).steps == min(point.steps for point in good)
    within = choose(outputs, y, steps=2.5)
    assert within.steps <= 2.5 and within.accuracy == max(point.accuracy for point in points if point.steps <= 2.5)
    assert choose(outputs, y, thresholds=[]).steps == T
    with pytest.raises(ValueError, match="steps must be at least 1 with these thresholds, got 0"):
        choose(outputs, y, steps=0)
    with pytest.raises(ValueError, match="y must hold a class for each of the 40 samples"):
        curve(outputs, y[:3])
    with pytest.raises(ValueError, match="measure must be one of 'confidence', 'entropy', got 'margin'"):
        exits(outputs, 0.5, "margin")
    with pytest.raises(ValueError, match="outputs must be"):
        exits(outputs[0], 0.5)
    with pytest.raises(TypeError, match="outputs must be a floating-point tensor"):
        exits(y, 0.5)


class Narrow(ResNet19):
    GROUPS = ((8, 1, 1), (16, 1, 2))


class Short(VGGSNN):
    PLAN = "8C3-16C3-AP2-16C3-AP2"


networks = {
    "CNN6": (CNN6, (1, 8, 8)),
    "CNN6, not fused": (partial(CNN6, fused=False), (1, 8, 8)),
    "CNN6, LIFNode": (partial(CNN6, neuron=partial(LIFNode, decay_input=False)), (1, 8, 8)),
    "CNN6, SmoothLIF": (partial(CNN6, neuron=SmoothLIF), (1, 8, 8)),
    "ResNet19": (partial(Narrow, stem=8, hidden=16), (3, 8, 8)),
    "VGG": (partial(Short, size=8), (2, 8, 8)),
    "SpikingMLP": (partial(SpikingMLP, hidden=(16, 16)), (70,)),
    "SpikingRNN": (partial(SpikingRNN, hidden=(16, 16)), (70,)),
}


def make(name):
    """In float64 with rounded numbers: sums are then exact, whatever the size of the batch and the order. And x."""
    build, shape = networks[name]
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, (BNLIF, TdBatchNorm)):
            nn.init.uniform_(module.running_var, 0.02, 0.2)
            nn.init.uniform_(module.bias, -0.2, 0.6)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=4 / module.in_features**0.5)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    return model.eval(), torch.randn(T, N, *shape, generator=generator).bfloat16().double()


def whole(model, x, *steps):
    for module in model.modules():
        if isinstance(module, LIFNode):
            module.reset()
    with torch.no_grad():
        return model(x, *steps)


@pytest.mark.parametrize("name", networks)
def test_a_network_that_stops_does_what_the_rule_says(name):
    model, frames = make(name)
    cases = [(frames, ())] if name in ("SpikingMLP", "SpikingRNN") else [(frames, ()), (frames[0], (T,))]
    for x, steps in cases:
        outputs = whole(model, x, *steps)
        assert 0.01 < outputs.std() and not torch.equal(outputs[0], outputs[1])
        confidence = outputs.cumsum(0).softmax(2).amax(2)
        threshold = confidence[1].median().item()  # so that samples leave at several steps
        wanted = exits(outputs, threshold)
        assert len(wanted.steps.unique()) > 1
        for batch in (256, 4):
            found = exit_early(model, x, threshold, *steps, batch=batch)
            assert torch.equal(found.steps, wanted.steps) and torch.equal(found.predictions, wanted.predictions)
        rows = torch.arange(N) % 3 > 0
        with torch.no_grad(), carried(model) as keep:  # two steps, then one by one, of some of the samples
            parts = [model(x[:2]) if not steps else model(x, 2)]
            keep(rows)
            parts += [model(x[t : t + 1, rows] if not steps else x[None, rows]) for t in range(2, T)]
        assert torch.equal(parts[0], outputs[:2]) and torch.equal(torch.cat(parts[1:]), outputs[2:, rows])
        assert torch.equal(whole(model, x, *steps), outputs)  # nothing stays behind


def test_samples_that_have_left_are_not_computed():
    model, x = make("CNN6")
    seen = []
    model.stages[3].conv.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    outputs = whole(model, x[0], T)
    threshold = outputs.cumsum(0).softmax(2).amax(2)[1].median().item()
    seen.clear()
    steps = exit_early(model, x[0], threshold, T).steps
    assert seen == [count for t in range(1, T + 1) if (count := int((steps >= t).sum()))] and seen[-1] < N
    seen.clear()
    assert exit_early(model, x[0], 0.0, T).steps.tolist() == [1] * N and seen == [N]


def test_state_of_nodes_is_left_as_it_was():
    model, x = make("CNN6, LIFNode")
    nodes = [module for module in model.modules() if isinstance(module, LIFNode)]
    first = whole(model, x[:1])
    before = [node.v for node in nodes]
    assert torch.equal(exit_early(model, x, 0.0).predictions, first[0].argmax(1))  # from rest, not from there
    assert all(node.v is v for node, v in zip(nodes, before, strict=True))


def test_spikingjelly_models_stop_too():
    pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    model = nn.Sequential(layer.Linear(8, 16), neuron.LIFNode(), layer.Linear(16, 4)).double().eval()
    functional.set_step_mode(model, "m")
    x = (4 * torch.rand(T, N, 8)).bfloat16().double()
    for parameter in model.parameters():
        parameter.data = (4 * parameter.data).bfloat16().double()
    with torch.no_grad():
        outputs = model(x)
    functional.reset_net(model)
    wanted = exits(outputs, 0.7)
    found = exit_early(model, x, 0.7)
    assert len(wanted.steps.unique()) > 1 and torch.equal(found.steps, wanted.steps)
    assert torch.equal(found.predictions, wanted.predictions)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.lif = nn.Linear(4, 4), LIF()

    def forward(self, x):
        return self.lif(self.first(self.lif(x)))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (CNN6(), ValueError, "model must be in eval mode, got CNN6 in training mode"),
        (nn.Sequential(nn.Linear(4, 4)).eval(), ValueError, "model must have neurons .* got Sequential without any"),
        (nn.Sequential(nn.Linear(4, 4), LIF(), TTM(2)).eval(), ValueError, "mix time steps .* TTM"),
        (nn.Sequential(nn.Linear(4, 4), LIF(steps_out=2)).eval(), ValueError, "steps_out must be None .* got 2"),
        (nn.Sequential(nn.Linear(4, 4), LIF(), nn.Flatten(0)).eval(), ValueError, r"model must give \[1, 3, classes\]"),
        (Twice().eval(), RuntimeError, "calls twice"),
        (nn.Sequential(nn.Linear(4, 4), LIF(), nn.RNN(4, 4)).eval(), ValueError, "mix time steps .* RNN"),
    ],
)
def test_what_cannot_run_step_by_step_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        exit_early(model, torch.ones(T, 3, 4), 0.5)
    assert all(module._memory is None for module in model.modules() if isinstance(module, LIF))


def test_mistakes():
    model, x = make("CNN6")
    with pytest.raises(ValueError, match="steps must be at most the number of frames, 5, got 6"):
        exit_early(model, x, 0.5, 6)
    with pytest.raises(TypeError, match="threshold must be a float, got 'auto'"):
        exit_early(model, x, "auto")
    with carried(model) as keep:
        model(x[:1])
        with pytest.raises(ValueError, match=r"state must be \[N, ...\] for rows of shape \(2,\)"):
            keep(torch.tensor([True, False]))
        with pytest.raises(TypeError, match="rows must be bool"):
            keep(torch.arange(N))
        with pytest.raises(RuntimeError, match="being carried already"), carried(model):
            pass


def test_published_network():
    recipe = load("seenn-cifar10")
    surrogate = recipe.make_neuron()().settings["surrogate"]
    x = torch.linspace(-3.5, 3.5, 15)
    wanted = torch.where(x.abs() <= 3, 1.5 / torch.cosh(3 * x) ** 2 / math.tanh(9), 0.0)
    torch.testing.assert_close(surrogate.grad(x), wanted)
    with torch.device("meta"):
        assert sum(p.numel() for p in recipe.make_model(0, 10, (3, 32, 32)).parameters()) == 12_569_226


def test_command(tmp_path):
    for package in ("sklearn", "safetensors", "matplotlib"):
        pytest.importorskip(package)

    def succeed(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    few = "data.train=60", "batch=30", "stage.epochs=1", "stage.steps=3", "seeds=1"
    succeed("train", "digits-seenn", *few, "--out", tmp_path)
    asked = json.loads(succeed("eval", tmp_path, "--exit", "0,0.2,1", "--json"))
    plain = json.loads(succeed("eval", tmp_path, "--json"))
    whole, first, some, last = asked["rows"]
    assert (whole["threshold"], whole["steps"], first["steps"], last["steps"]) == (None, 3, 1, 3)
    assert 1 < some["steps"] < 3 and all(row["seconds"] > 0 for row in asked["rows"])
    for row, steps in ((first, 1), (last, 3)):  # but for rounding, which hangs on the number of rows of a product
        assert row["accuracy"] == pytest.approx(plain["rows"][steps - 1]["accuracy"], abs=0.01)
    assert whole["accuracy"] == pytest.approx(last["accuracy"], abs=0.01) and asked["samples"] == plain["samples"]
    text = " ".join(succeed("eval", tmp_path, "--exit", "auto", "--steps", "2").split())
    halves = re.search(r"(\d+) test samples; threshold chosen on (\d+) others", text)
    assert sum(map(int, halves.groups())) == plain["samples"] and "all steps 2.00" in text
    succeed("report", tmp_path, "--points", "0", "--samples", "40")
    points = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["exits"]
    assert points[-1]["steps"] == 3 and (tmp_path / "analysis" / "accuracy_exit.png").exists()
    for arguments, message in (
        (["--exit", "0.5,x"], "--exit must be auto or numbers from 0 to 1"),
        (["--exit", "2"], "--exit must be auto or numbers from 0 to 1"),
        (["--exit", "auto", "--t", "1,2"], "--t and --exit ask for different things"),
    ):
        result = CliRunner().invoke(app, ["eval", str(tmp_path), *arguments])
        assert result.exit_code == 2 and message in result.stderr
