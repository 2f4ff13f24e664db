"""Asynchronous chips: their neuron, clocked; networks of it; and the same networks event by event."""

import copy
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import snnkern
from snnkern.analysis import event_driven, sparsity, without_biases
from snnkern.analysis.asynchronous import place, respond, row
from snnkern.models import CNN6, ChipNet, ResNet18
from snnkern.nn import IAF
from snnkern.surrogate import Rectangle, Triangle

MLP = partial(ChipNet, in_channels=1, size=4, plan="", hidden=(12, 12), classes=3)
CONV = partial(ChipNet, in_channels=2, size=8, plan="4C3s2-AP2-6C3", hidden=(8,), classes=3)


def current(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(make, scale=2.0):
    """Whose weights are multiples of 1/64: sums are exact in any order, and thresholds are often met exactly."""
    torch.manual_seed(0)
    model = make()
    for p in model.parameters():
        p.data = (64 * scale * p.data).round() / 64
    return model


def one_a_step(inputs, shape):
    x = torch.zeros(len(inputs), 1, int(np.prod(shape)))
    x[range(len(inputs)), 0, inputs] = 1
    return x.view(len(inputs), 1, *shape)


def spikes_of(model, x):
    """Of every layer [S, 2], step and neuron, in order; and what the readout receives in all."""
    trains = []
    hooks = [m.register_forward_hook(lambda *a: trains.append(a[2].flatten(2)[:, 0].nonzero().numpy()))
             for m in model.modules() if isinstance(m, IAF)]  # fmt: skip
    with torch.no_grad():
        total = model(x).sum(0)[0].numpy()
    for hook in hooks:
        hook.remove()
    return trains, total


def drawn(size, count=300, seed=0):
    return np.random.default_rng(seed).integers(0, size, count)


# The neuron


def test_neuron_fires_once_at_the_threshold_and_has_a_lower_bound():
    x = torch.tensor([0.5, 0.5, 2.5, 0.0, 0.0, -9.0, 1.5, 0.5])
    #   potential:    0.5   0   1.5  0.5  0.5   -1   0.5   0
    assert IAF()(x).tolist() == [0, 1, 1, 1, 0, 0, 0, 1]
    assert IAF(v_min=None)(x).tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert IAF(threshold=0.5, v_min=-0.25)(x).tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert IAF(time_dim=1)(torch.stack((x, -x)).half()).dtype == torch.float16


@pytest.mark.parametrize("detach_reset", [False, True])
def test_gradient_of_the_neuron_is_the_adjoint_of_its_loop(detach_reset):
    surrogate, theta, v_min = Triangle(1.0), 0.75, -0.5
    x, weight = ((8 * current(20, 6, seed=i)).round() / 8 for i in range(2))
    x.requires_grad_()
    spikes = IAF(theta, v_min, surrogate, detach_reset)(x)
    (found,) = torch.autograd.grad((spikes * weight).sum(), x)
    v, charges, potentials = torch.zeros(6), [], []
    for x_t in x.detach():
        charges.append(v + x_t)
        potentials.append(charges[-1].clamp(min=v_min))
        v = potentials[-1] - theta * (potentials[-1] >= theta)
    wanted, carried = [], torch.zeros(6)
    for weight_t, charge, h in reversed([*zip(weight, charges, potentials, strict=True)]):
        slope = surrogate.grad(h - theta)
        carried = weight_t * slope + carried * (1 if detach_reset else 1 - theta * slope)
        carried = carried * (charge > v_min)
        wanted.insert(0, carried)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-14)
    charges = torch.stack(charges)
    assert (charges < v_min).any() and (charges == v_min).any() and spikes.sum() > 5


def test_neuron_without_a_bound_is_lif():
    x, weight = (current(20, 6, seed=i).float() for i in range(2))
    settings = {"threshold": 0.75, "surrogate": Rectangle(1.0)}
    wanted = snnkern.lif(x.requires_grad_(), decay=1.0, reset=None, fire_at_threshold=True, **settings)[0]
    gradient = torch.autograd.grad((wanted * weight).sum(), x)[0]
    for v_min in (None, -1e9):
        found = IAF(v_min=v_min, **settings)(x)
        assert torch.equal(found, wanted)
        torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), x)[0], gradient)
    layer = IAF()
    assert all(torch.equal(each(x), layer(x)) for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))))
    assert torch.equal(layer(x, x), layer(x + x)) and "v_min=-1.0" in repr(layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0}, "threshold must be positive, got 0"),
        ({"v_min": 0.5}, "v_min must be at most 0, .*got 0.5"),
        ({"v_min": float("-inf")}, "v_min must be finite"),
    ],
)
def test_wrong_neurons_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        IAF(**settings)
    with pytest.raises(TypeError, match="residual must be a tensor or None, got int"):
        IAF()(torch.zeros(3, 2), 3)


# The network


def test_network_is_a_row_without_biases():
    model = ChipNet()
    assert sum(p.numel() for p in model.parameters()) == 39_312 and model.n_stages == 4
    assert not any(name.endswith("bias") for name in model.state_dict())
    assert sum(p.numel() for p in MLP(size=8, hidden=(96, 96), classes=10).parameters()) == 64 * 96 + 96 * 96 + 960
    model, x = network(CONV), 3 * current(4, 2, 2, 8, 8).float()
    first, second, hidden, head = (m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    y = snnkern.ttm(IAF()(first(x.flatten(0, 1)).unflatten(0, (4, 2))), 2)
    y = second(nn.functional.avg_pool2d(y.flatten(0, 1), 2)).unflatten(0, (2, 2))
    y = IAF()(hidden(snnkern.ttm(IAF()(y), 3).flatten(2)))
    assert torch.equal(model(x, t=(4, 2, 3)), head(y)) and y.any()
    assert list(sparsity(model, x)) == ["stages.0.1", "stages.1.1", "stages.2.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "8C3-MP2"}, "plan must be of the form .* got 'MP2'"),
        ({"plan": "", "hidden": ()}, "plan must end with a convolution where hidden is empty, got ''"),
        ({"plan": "8C3-AP2", "hidden": ()}, "plan must end with a convolution"),
        ({"size": 3}, "size must be enough for the pools of .* got 3"),
    ],
)
def test_wrong_networks_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ChipNet(**options)


# Event by event


@pytest.mark.parametrize(("make", "shape"), [(MLP, (1, 4, 4)), (CONV, (2, 8, 8))])
def test_one_event_a_step_is_the_clocked_network(make, shape):
    """Multiples of 1/64: bit for bit, though the clocked layers add in another order."""
    model, inputs = network(make, 6.0), drawn(np.prod(shape))
    layers = row(model, shape)
    trains, total = spikes_of(model, one_a_step(inputs, shape))
    found = respond(layers, inputs, serial=False)
    assert min(map(len, trains)) > 20
    assert all(map(np.array_equal, found.spikes.values(), trains))
    assert np.array_equal(found.output, total)
    with pytest.raises(AssertionError):  # spikes that come one after the other do otherwise
        np.testing.assert_array_equal(respond(layers, inputs).output, total)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [(MLP, [(1, 4, 4), (12,)]), (CONV, [(2, 8, 8), (4, 4, 4), (6, 2, 2)])],
)
def test_every_layer_is_the_clocked_one_at_one_spike_a_step(make, shapes):
    """With weights as they come: one spike a step adds one weight, so that the bits are the same."""
    torch.manual_seed(0)
    model, inputs = make(), drawn(np.prod(shapes[0]))
    for p in model.parameters():
        p.data *= 6
    found = respond(row(model, shapes[0]), inputs)
    arriving = np.stack([np.arange(len(inputs)), inputs], 1)
    for (synapses, neuron), spikes, shape in zip(model.stage_modules(), found.spikes.values(), shapes, strict=True):
        with torch.no_grad():
            charge = synapses(one_a_step(arriving[:, 1], shape)[:, 0])
            step, place = neuron(charge).flatten(1).nonzero().T.numpy()
        assert len(step) > 20
        assert np.array_equal(spikes, np.stack([arriving[step, 0], place], 1))
        arriving = spikes


def chain(*weights, **neuron):
    """[inputs] to one neuron after the other."""
    layers = []
    for weight in weights:
        weight = torch.tensor(weight, dtype=torch.float32)
        layers += nn.Linear(weight.shape[1], weight.shape[0], bias=False), IAF(**neuron)
        layers[-2].weight.data = weight
    return nn.Sequential(*layers)


def test_charge_fires_once_an_event_and_has_a_lower_bound():
    layers = row(chain([[2.5, -9.0, 0.0, 1.0]]), [4])
    assert respond(layers, [0, 2, 2]).spikes["1"].tolist() == [[0, 0], [1, 0]]  # the rest fires at the next event
    assert respond(layers, [1, 1, 3]).spikes["1"].tolist() == []  # -1, -1, 0
    assert respond(layers, [1, 1, 3, 3]).spikes["1"].tolist() == [[3, 0]]
    assert respond(row(chain([[2.5, -9.0, 0.0, 1.0]], v_min=None), [4]), [1, 1, 3, 3]).spikes["1"].tolist() == []
    assert respond(layers, [0, 2, 2]).operations == {"1": 1}  # a weight of 0 is no synapse
    assert respond(layers, [0, 2, 2]).output.tolist() == [2]
    assert respond(layers, []).output.tolist() == [0]


def test_simultaneous_events_are_taken_as_they_stand():
    layers = row(chain([[1.0, -1.0]]), [2])
    assert [respond(layers, order).output.tolist() for order in ([0, 1], [1, 0])] == [[1], [0]]
    same = np.zeros(2, int)
    assert place((same, np.array([1, 0]), same, same), (1, 1, 2)).tolist() == [1, 0]
    # Event 0 makes both neurons fire; the first arrives first, and its neuron fires before the second takes charge.
    cascade = chain([[1.0], [1.0]], [[1.0, -0.5]]), chain([[1.0], [1.0]], [[-0.5, 1.0]])
    assert [respond(row(model, [1]), [0]).output.tolist() for model in cascade] == [[1], [0]]
    assert [respond(row(model, [1]), [0], serial=False).output.tolist() for model in cascade] == [[0], [0]]


def test_place_of_events():
    events = np.array([0, 0, 7]), np.array([1, 0, 3]), np.array([4, 0, 2]), np.array([0, 1, 1])
    frame = torch.arange(40).view(2, 5, 4)
    assert place(events, (2, 5, 4)).tolist() == [frame[0, 4, 1], frame[1, 0, 0], frame[1, 2, 3]]


def test_accuracy_and_counts():
    model, shape = network(MLP, 6.0), (1, 4, 4)
    recordings = []
    for seed in range(5):
        at = drawn(16, 40, seed)
        recordings.append(((np.arange(40), at % 4, at // 4, np.zeros(40, int)), seed % 3))
    seen = []
    found = event_driven(model, recordings, shape, check=lambda: seen.append(1))
    each = [respond(row(model, shape), place(events, shape)) for events, _ in recordings]
    assert np.array_equal(found.outputs, [one.output for one in each])
    assert found.accuracy == np.mean([one.output.argmax() == y for one, (_, y) in zip(each, recordings, strict=True)])
    assert found.spikes == {name: np.mean([len(one.spikes[name]) for one in each]) for name in each[0].spikes}
    assert found.operations == {name: np.mean([one.operations[name] for one in each]) for name in each[0].operations}
    assert (found.events, found.samples, len(seen)) == (40, 5, 5)
    dense = [int((p != 0).sum(0)[0]) for p in (m.weight for m in model.modules() if isinstance(m, nn.Linear))]
    assert list(found.operations) == ["stages.0.1", "stages.1.1", "head"] and dense[0] <= 12
    with pytest.raises(ValueError, match="recordings must be one or more, got none"):
        event_driven(model, [], shape)


def test_norms_and_biases_go():
    model = CNN6(2, neuron=IAF).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.running_var, 0.05, 0.1)
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.bias, -1, 1)
    with pytest.raises(ValueError, match=r"stages\.0\.norm is a batch norm.*without_biases"):
        row(model, (1, 8, 8))
    made = without_biases(model)
    assert not any(name.endswith("bias") for name in made.state_dict()) and "stages.0.norm.bias" in model.state_dict()
    for module in model.modules():
        for name in ("bias", "running_mean"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data.zero_()
    x = 3 * current(4, 1, 1, 8, 8).float()
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
    found = respond(row(made, (1, 8, 8)), drawn(64))
    assert min(map(len, found.spikes.values())) > 0 and list(found.operations)[-1] == "head"


class Around(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), IAF()), "0 has a bias, which cannot exist without a clock"),
        (nn.Sequential(nn.Linear(4, 4, False), snnkern.nn.LIF()), "1 is a LIF, which cannot run event by event; .*IAF"),
        (nn.Sequential(nn.Linear(4, 4, False), nn.ReLU()), "1 is a ReLU, which cannot run"),
        (nn.Sequential(Around(nn.Linear(4, 4, False), IAF()), nn.Linear(4, 2, False)), "1 must take what 0.1 puts out"),
        (Around(nn.Linear(4, 4, False), IAF()), "the model must put out what 1 does"),
    ],
)
def test_what_is_no_row_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        row(model, [4])
    assert not any(module._forward_hooks for module in model.modules())


def test_residual_networks_are_no_row():
    with pytest.raises(ValueError, match="layers are not in a row"):
        row(without_biases(ResNet18(neuron=IAF, fused=False)), (3, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": [0, 2, 1]}, "events must be in order of time, number 2 is not"),
        ({"x": [0, 4, 0]}, "events must have x from 0 to 3, got 0 to 4"),
        ({"p": [0, -1, 0]}, "events must have p from 0 to 1, got -1 to 0"),
        ({"y": [0]}, "events must be four arrays .* of equal length, got"),
    ],
)
def test_wrong_events_are_named(change, message):
    events = {"t": [0, 0, 0], "x": [0, 0, 0], "y": [0, 0, 0], "p": [0, 0, 0]} | change
    with pytest.raises(ValueError, match=message):
        place(tuple(map(np.array, events.values())), (2, 4, 4))
    with pytest.raises(ValueError, match="inputs must be whole numbers from 0 to 15, got 0 to 16"):
        respond(row(network(MLP), (1, 4, 4)), [0, 16])


# Data and command


def test_digits_as_spikes():
    pytest.importorskip("sklearn")
    from snnkern.data import digits, load

    data = load("digits-spikes", seed=3, frames=5, events=4, train=50)
    assert (data.classes, data.shape, data.events, data.plain) == (10, (5, 1, 8, 8), True, data.train)
    (x, y), (_, test_y) = digits(seed=3, noise=0, train=50)
    assert torch.equal(data.train.tensors[1], y) and torch.equal(data.test.tensors[1], test_y)
    counts = data.train.tensors[0].sum(1)
    level = ((x - x.min()) / (x.max() - x.min()) * 4 + 0.5 + 1e-4).floor()
    assert torch.equal(counts, level) and counts.max() == 4
    for i in range(20):
        t, column, line, p = data.test.recording(i)
        assert (np.diff(t) >= 0).all() and not p.any()
        counted = np.histogramdd((t, line, column), (5, 8, 8), ((0, 100_000), (0, 8), (0, 8)))[0]
        assert np.array_equal(data.test[i][0][:, 0], counted) and counted.sum() == len(t)
    again = load("digits-spikes", seed=3, frames=5, events=4, train=60)
    assert torch.equal(again.test.tensors[0], data.test.tensors[0])  # whatever is trained on
    with pytest.raises(ValueError, match="events must be at least 1"):
        load("digits-spikes", events=0)


def test_events_of_a_camera():
    pytest.importorskip("sklearn")
    from snnkern.data import load

    test = load("digits-events", train=1).test
    assert all(test[i][0].sum() == len(test.recording(i)[0]) for i in range(5))
    model = network(partial(ChipNet, size=10, plan="4C3s2-AP2-8C3"), 6.0)
    found = event_driven(model, ((test.recording(i), test[i][1]) for i in range(3)), (2, 10, 10))
    assert found.outputs.any() and min(found.spikes.values()) > 0


def test_eval_event_by_event(tmp_path):
    pytest.importorskip("sklearn")
    from typer.testing import CliRunner

    from snnkern.cli import app

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    options = "stage.epochs=1", "data.train=60", "seeds=1", "--out", tmp_path
    assert call("train", "digits-chip-mtt", *options).exit_code == 0
    found = call("eval", tmp_path, "--events", "--samples", 20, "--json")
    ((tested,),) = json.loads(found.stdout)["networks"].values()
    assert (tested["samples"], tested["steps"]) == (20, 16) and 100 < tested["events"] < 250
    assert set(tested["operations"]) == {"stages.0.1", "stages.1.1", "head"}
    assert all(20 * tested[name] in range(21) for name in ("clocked", "event_driven"))
    shown = call("eval", tmp_path, "--events", "--samples", 20)
    assert shown.exit_code == 0 and "20 test samples" in shown.stdout and "gap" in shown.stdout
    for arguments, message in (
        (
            ("--events", 'data={name = "digits"}'),
            "data.name must be a set that gives the events themselves",
        ),
        (("--events", "--steps", "2"), "--steps and --t must be left out with --events"),
        (("--samples", "2"), "--samples must be at least 1 and go with --events, got 2"),
    ):
        found = call("eval", tmp_path, *arguments)
        assert found.exit_code and message in found.output, found.output
