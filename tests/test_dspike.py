"""Finite differences and the search for a temperature, on networks small enough to write out what they must give."""

import math
from functools import partial

import pytest
import torch
from conftest import brief
from torch import nn

from snnkern.losses import sdt
from snnkern.methods import dspike
from snnkern.models import CNN6
from snnkern.nn import LIF, SmoothLIF
from snnkern.surrogate import Dspike, Rectangle, Sigmoid, Triangle


class Toy(nn.Module):
    """Conv, norm, dropout, neuron and linear layer on [N, 1, 4, 4]; outputs [T, N, 3]."""

    def __init__(self, neuron, steps=2, channels=2):
        super().__init__()
        self.steps = steps
        self.conv = nn.Conv2d(1, channels, 3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)
        self.neuron = neuron()
        self.head = nn.Linear(4 * channels, 3)

    def forward(self, x):
        y = self.drop(self.norm(self.conv(x)))
        return self.head(self.neuron(y.expand(self.steps, *y.shape)).flatten(2))


def batch(samples=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 4, 4, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


def toy(neuron, **options):
    torch.manual_seed(0)
    return Toy(neuron, **options)


SMOOTH = partial(SmoothLIF, Sigmoid(3.0))
SPIKING = partial(LIF, threshold=0.5, surrogate=Rectangle())


def test_differences_of_a_smooth_network_are_its_gradient():
    model = toy(SMOOTH).double()
    x, y = batch()
    x = x.double()
    for parameter in (None, model.head.bias, model.norm.weight):
        wanted = dspike.surrogate_gradient(model, x, y, sdt, parameter)
        found = dspike.finite_differences(model, x, y, sdt, 1e-4, parameter)
        assert wanted.norm() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_differences_are_quotients_at_a_distance_of_eps():
    model, (x, y) = toy(SPIKING), batch()
    model.drop.p = 0.0
    found = dspike.finite_differences(model, x, y, sdt, 0.25)
    weight = model.conv.weight
    for i in ((0, 0, 0, 0), (1, 0, 2, 1)):
        losses = []
        for change in (0.25, -0.25):
            with torch.no_grad():
                before = weight[i].clone()
                weight[i] += change
                losses.append(sdt(model(x), y).item())
                weight[i] = before
        assert found[i].item() == pytest.approx((losses[0] - losses[1]) / 0.5, abs=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("train", [True, False])
def test_nothing_is_changed_not_even_by_an_interruption(train, layout):
    torch.manual_seed(0)
    model = CNN6(2).to(memory_format=layout).train(train)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)

    def interrupt(done, total):
        raise KeyboardInterrupt

    dspike.search(model, x, y, sdt)
    with pytest.raises(KeyboardInterrupt):
        dspike.finite_differences(model, x, y, sdt, progress=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training == train for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {m.settings["surrogate"] for m in model.modules() if isinstance(m, LIF)} == {Triangle(1.0)}


def test_search_takes_the_candidate_of_largest_cosine():
    model, (x, y) = toy(SPIKING), batch()
    seen = []
    found = dspike.search(model, x, y, sdt, b=1.0, step=0.5, eps=0.1, progress=lambda *at: seen.append(at))
    differences = dspike.finite_differences(model, x, y, sdt, 0.1)
    assert list(found.cosines) == [1.0, 1.5, 0.5]
    for b, cosine in found.cosines.items():
        dspike.set_surrogate(model, Dspike(b))
        assert cosine == dspike.cosine(differences, dspike.surrogate_gradient(model, x, y, sdt))
    assert found.cosines[found.b] == max(found.cosines.values())
    assert len(set(found.cosines.values())) == 3
    assert found.evaluations == 36 and seen[0] == (2, 36) and seen[-1] == (36, 36) and len(seen) == 18


@pytest.mark.parametrize(
    ("backend", "fused"),
    brief(
        [(name, fused) for name in (None, "reference") for fused in (True, False)], [(None, True), ("reference", False)]
    ),
)
def test_search_goes_forward_once_for_all_candidates(backend, fused):
    torch.manual_seed(0)
    neuron = partial(LIF, threshold=0.5, surrogate=Rectangle(), backend=backend)
    model = CNN6(2, size=4, neuron=neuron, fused=fused)
    x, y = batch()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(None))
    found = dspike.search(model, x, y, sdt, b=1.0, step=0.5)
    assert len(forwards) == 2 * model.stages[0].conv.weight.numel() + 1
    differences = dspike.finite_differences(model, x, y, sdt, 0.1)
    for b, cosine in found.cosines.items():
        dspike.set_surrogate(model, Dspike(b))
        assert cosine == dspike.cosine(differences, dspike.surrogate_gradient(model, x, y, sdt))
    assert len({*found.cosines.values()}) == 3


def test_search_needs_neurons_that_it_can_reach():
    model, (x, y) = toy(SPIKING), batch()
    model.neuron, unused = nn.ReLU(), model.neuron
    model.unused = unused
    with pytest.raises(ValueError, match="none is in the graph of its loss"):
        dspike.search(model, x, y, sdt)


def test_search_keeps_b_in_a_tie_and_stays_at_or_above_one_step():
    model, (x, y) = toy(partial(LIF, threshold=1e6)), batch()  # nothing ever fires: all gradients are 0
    assert dspike.search(model, x, y, sdt, b=3.0).b == 3.0
    found = dspike.search(model, x, y, sdt, b=0.4, step=0.2)
    assert list(found.cosines) == [0.4, 0.6, 0.2] and set(found.cosines.values()) == {0.0}
    assert list(dspike.search(model, x, y, sdt, b=0.3, step=0.2).cosines) == [0.3, 0.5]


def test_candidates_do_not_drift():
    model, (x, y) = toy(partial(LIF, threshold=1e6)), batch()
    assert 1.4 + 0.2 != 1.6 and list(dspike.search(model, x, y, sdt, b=1.4, step=0.2).cosines) == [1.4, 1.6, 1.2]


def test_set_surrogate_reaches_every_lif():
    model = nn.Sequential(CNN6(1), CNN6(1, fused=False), LIF())
    dspike.set_surrogate(model, Dspike(3.0, 0.5))
    settings = [m.settings["surrogate"] for m in model.modules() if isinstance(m, LIF)]
    assert settings == [Dspike(3.0, 0.5)] * 13


def test_the_networks_gradient_follows_the_surrogate():
    model, (x, y) = toy(SPIKING), batch()
    dspike.set_surrogate(model, Dspike(0.01))
    flat = dspike.surrogate_gradient(model, x, y, sdt)
    dspike.set_surrogate(model, Rectangle(1.0))
    torch.testing.assert_close(flat, dspike.surrogate_gradient(model, x, y, sdt), rtol=1e-3, atol=1e-6)
    dspike.set_surrogate(model, Dspike(8.0))
    assert dspike.cosine(flat, dspike.surrogate_gradient(model, x, y, sdt)) < 0.99


def test_cosine():
    a = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert dspike.cosine(a, 2 * a) == pytest.approx(1)
    assert dspike.cosine(a, -a) == pytest.approx(-1)
    assert dspike.cosine(a, torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.6)
    assert dspike.cosine(a, torch.zeros(2, 2)) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, *at: dspike.search(m, *at, sdt, b=0.0), "b must be positive and finite, got 0.0"),
        (lambda m, *at: dspike.search(m, *at, sdt, step=math.inf), "step must be positive"),
        (lambda m, *at: dspike.finite_differences(m, *at, sdt, -1.0), "eps must be positive"),
        (
            lambda m, *at: dspike.finite_differences(m, *at, sdt, 0.1, nn.Parameter(torch.ones(2))),
            "parameter must be one",
        ),
        (
            lambda m, *at: dspike.set_surrogate(nn.ReLU(), Rectangle()),
            "model must have an snnkern.nn.LIF, ReLU",
        ),
        (lambda m, *at: dspike.first_weight(nn.ReLU()), "model must have a convolution or linear layer, ReLU"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy(SPIKING), *batch())
    with pytest.raises(TypeError, match="surrogate must be one of"):
        dspike.set_surrogate(toy(SPIKING), "Rectangle")
