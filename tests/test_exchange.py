"""NIR: what is exported says the same, here and in other tools; what NIR cannot say is refused."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from snnkern.models import MODELS
from snnkern.nn import BNLIF, IAF, LIF, IFNode, LIFNode, LinearLIF, fold, from_nir, to_nir
from snnkern.surrogate import ATan

nir = pytest.importorskip("nir")
pytestmark = pytest.mark.filterwarnings("ignore:::nirtorch|norse|snntorch")


def seeded(*layers) -> nn.Sequential:
    """With weights that let neurons fire."""
    net, generator = nn.Sequential(*layers), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (
            weight for layer in layers if isinstance(layer, (nn.Linear, nn.Conv1d)) for weight in layer.parameters()
        ):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return net


def dense(neuron, inputs: int = 8) -> nn.Sequential:
    return seeded(nn.Linear(inputs, 16), neuron(), nn.Linear(16, 16, bias=False), neuron())


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def written(graph, folder):
    """The graph after a file."""
    nir.write(folder / "graph.nir", graph)
    return nir.read(folder / "graph.nir")


NEURONS = {
    "decay": lambda: LIF(0.9753, threshold=0.7),
    "no leak": lambda: LIF(1.0, fire_at_threshold=True),
    "tau, input decays": lambda: LIF(tau=3.3, threshold=0.1, reset=-0.1),
    "tau": lambda: LIF(tau=7.0, decay_input=False, surrogate=ATan()),
    "no leak, node": lambda: IFNode(v_threshold=0.9, v_reset=0.25, step_mode="m"),
    "decays": lambda: LIF(nn.Parameter(torch.linspace(0.5, 0.99, 16)), threshold=torch.linspace(0.4, 0.6, 16)),
    "node": lambda: LIFNode(tau=2.0, decay_input=False, v_threshold=0.5, v_reset=-0.2, step_mode="m"),
}


@pytest.mark.parametrize("dt", [1e-4, 1 / 3])
@pytest.mark.parametrize("name", NEURONS)
def test_a_neuron_goes_there_and_back(name, dt, tmp_path):
    net, x = dense(NEURONS[name]), drawn(12, 3, 8)
    if name.startswith("no leak"):
        with torch.no_grad():  # potentials are exactly the threshold
            net[0].weight.copy_(net[0].weight.mul(4).round().div(4)), net[0].bias.zero_()
        x = x.mul(2).round().div(2)
    got = from_nir(written(to_nir(net, x, dt), tmp_path), dt, surrogate=ATan(), detach_reset=True)
    wanted = net(x)
    assert 0.02 < wanted.mean() < 0.9 and torch.equal(got(x), wanted)
    settings = LIF(**net[1]._neuron()).settings if "node" in name else net[1].settings
    found = got.get_submodule("1")
    assert all(torch.equal(getattr(found, key), getattr(net[1], key)) for key in found.tensors)
    assert found.tensors == getattr(net[1], "tensors", ()) and found.settings == {
        **settings,
        "surrogate": ATan(),
        "detach_reset": True,
    }


@pytest.mark.parametrize("name", ["CNN6", "SNN5", "ResNet19", "SpikingMLP", "DspikeResNet18"])
def test_a_model_goes_there_and_back(name):
    torch.manual_seed(0)
    options = {"norm": True} if name == "SpikingMLP" else {}
    model = MODELS[name](**options)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    size = getattr(model, "size", 16)
    x = torch.rand(2, 2, 70) if name == "SpikingMLP" else torch.rand(2, 2, model.in_channels, size, size)
    graph = to_nir(model, x)
    assert graph.check_types() and {type(node).__name__ for node in graph.nodes.values()} >= {"LIF", "Affine"}
    with torch.no_grad():
        wanted = fold(model)(x)
        assert wanted.std() > 0 and torch.equal(from_nir(graph)(x), wanted)
    assert model.training


def test_a_bias_that_neurons_add_is_of_the_layer_before_them():
    torch.manual_seed(0)
    model, x = MODELS["SpikingMLP"](), 9 * torch.rand(6, 2, 70)
    graph = to_nir(model, x)
    kinds = [type(graph.nodes[name]).__name__ for name in ("layers.0", "layers.1", "head")]
    assert kinds == ["Affine", "LIF", "Affine"]
    with torch.no_grad():
        wanted = model(x)
        assert wanted.std() > 0
        torch.testing.assert_close(from_nir(graph)(x), wanted)


class ForeignBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.neuron, self.bias = LIF(), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.neuron(x, bias=self.bias)


def test_the_graph_in_numbers():
    net = seeded(nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=False), nn.Flatten(1), nn.Linear(12, 5))

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.neuron, self.last = net, LIF(0.75, threshold=2.0, reset=-1.0), nn.Linear(5, 5)

        def forward(self, x):
            y = self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return y + self.last(y + self.neuron(y))

    graph = to_nir(Frames(), torch.zeros(4, 2, 2, 8), dt=1e-3)
    to_sum = [("net.2", "last"), ("neuron", "last"), ("net.2", "output"), ("last", "output")]
    assert graph.edges == [*pairwise(("input", "net.0", "net.0.flatten", "net.2", "neuron")), *to_sum]
    node = graph.nodes["neuron"]
    found = [value.tolist() for value in (node.tau, node.r, node.v_leak, node.v_threshold, node.v_reset)]
    assert found == [[each] * 5 for each in (0.004, 4.0, 0.0, 2.0, -1.0)]
    assert graph.nodes["net.0"].bias.tolist() == [0, 0, 0] and graph.nodes["net.0"].weight.shape == (3, 2, 3)


def test_neurons_that_others_describe():
    """A gain, a leak towards elsewhere than the reset, a loop in float64 from the equations."""
    import numpy as np

    tau, r, leak, threshold, reset, dt = 0.02, 1.7, 0.3, 0.8, -0.4, 0.005
    node = nir.LIF(*(np.full(4, each) for each in (tau, r, leak, threshold, reset)))
    scale = nir.Scale(np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32))
    nested = nir.NIRGraph.from_list(nir.Input(np.array([4])), scale, nir.Output(np.array([4])))
    nodes = {"input": nir.Input(np.array([4])), "scaled": nested, "lif": node, "output": nir.Output(np.array([4]))}
    graph = nir.NIRGraph(nodes, [("input", "scaled"), ("scaled", "lif"), ("lif", "output")])
    x, v, wanted = drawn(30, 2, 4).abs(), torch.full((2, 4), leak, dtype=torch.float64), []
    for given in x.double() * torch.tensor([1.0, 2.0, 3.0, 4.0]):
        v = v + dt / tau * (leak - v + r * given)
        wanted.append(v > threshold)
        v = torch.where(wanted[-1], reset, v)
    assert torch.equal(from_nir(graph, dt)(x), torch.stack(wanted).float())


def test_spikingjelly_says_the_same():
    pytest.importorskip("nirtorch")
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.nir_exchange import export_to_nir, import_from_nir

    x = drawn(12, 3, 8)
    for options in (
        {"tau": 2.0, "v_threshold": 0.2},
        {"tau": 3.0, "decay_input": False, "v_reset": -0.1, "v_threshold": 0.3},
    ):
        ours, theirs = (dense(lambda: kind(**options, step_mode="m")) for kind in (LIFNode, neuron.LIFNode))  # noqa: B023
        assert 0.02 < ours(x).mean() < 0.9
        for module in ours[1], ours[3]:
            module.reset()
        assert torch.equal(import_from_nir(to_nir(ours, x), step_mode="m")(x)[0], ours(x))
        for net in (theirs, ours):  # by its own tool, ours too
            functional.reset_net(theirs)
            assert torch.equal(from_nir(export_to_nir(net, x))(x), theirs(x))


def test_snntorch_and_norse_say_the_same():
    pytest.importorskip("nirtorch")
    snntorch = pytest.importorskip("snntorch.import_nir")
    norse = pytest.importorskip("norse.torch")
    x = drawn(12, 3, 8)
    for load, net, dt in (
        (snntorch.import_from_nir, dense(lambda: LIF(0.9, threshold=0.6)), 1e-4),
        (norse.from_nir, dense(lambda: LIF(tau=3.0, threshold=0.3)), 1e-3),
    ):
        theirs, state, spikes = load(to_nir(net, x, dt)), None, []
        for step in x:
            out, state = theirs(step, state)
            spikes.append(out)
        assert torch.equal(torch.stack(spikes), net(x)) and 0.02 < net(x).mean() < 0.9


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(x, self.linear(x))


def test_sums_in_place_and_dropout():
    def summed(x, y):
        y += x
        return y.reshape(12, 8).view(4, 3, 8)

    net = nn.Sequential(Of(summed), nn.Dropout(0.5), LIF())
    graph, x = to_nir(net, torch.zeros(4, 3, 8)), torch.rand(4, 3, 8)
    wanted = [("input", "0.linear"), ("0.linear", "2"), ("input", "2"), ("2", "output")]
    assert sorted(graph.edges) == sorted(wanted) and torch.equal(from_nir(graph)(x), net.eval()(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.linear(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dense(lambda: LIF(reset=None)), "1: NIR's neurons have a hard reset, got reset=None"),
        (lambda: dense(IAF), "1: NIR's neurons have a hard reset, IAF the soft one"),
        (lambda: dense(LIFNode), "1: step_mode must be 'm', got 's'"),
        (lambda: dense(lambda: LIF(steps_out=2)), "1 must put out as many steps as it gets"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "NIR has no node for relu of a tensor of shape"),
        (lambda: nn.Sequential(LIF(), nn.BatchNorm1d(3)), "1: NIR has no batch norm, and nn.fold found no layer"),
        (lambda: nn.Sequential(LIF(), BNLIF(8)), "1: NIR has no batch norm"),
        (lambda: nn.Conv1d(4, 4, 3, groups=2), "layer: NIR's types have no groups"),
        (lambda: Of(lambda x, y: y.relu_()), "NIR has no node for relu_ of"),
        (lambda: Of(lambda x, y: y.__setitem__(0, 0.0)), "NIR has no node for __setitem__ of"),
        (lambda: Of(lambda x, y: y.reshape(3, 4, 8)), "NIR has no node for reshape of"),
        (lambda: Of(lambda x, y: y[1:]), "NIR has no node for __getitem__ of"),
        (lambda: Of(lambda x, y: y + y), "output must not get the same spikes twice"),
        (lambda: Of(lambda x, y: torch.cat((x, y), -1)), "the output must come from layers that NIR has"),
        (Twice, "linear must run once, got a second call"),
        (ForeignBias, "neuron: NIR has no bias, got one that is not of the Linear before it"),
        (lambda: nn.Sequential(LinearLIF(8, 8)), "0: to_nir has no node for neurons with bias, got bias="),
        (lambda: nn.Sequential(LinearLIF(8, 8, False)), "0: to_nir has no node for neurons with weight, got weight="),
        (lambda: nn.MaxPool1d(2), "layer: NIR has no node for MaxPool1d"),
    ],
)
def test_what_nir_cannot_say_is_refused(make, message):
    x = torch.rand(4, 4, 8) if "groups" in message else torch.rand(4, 3, 8)
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        to_nir(make(), x)


def test_what_cannot_be_imported_is_refused():
    import numpy as np

    graph = to_nir(dense(LIF), torch.zeros(4, 3, 8))
    ones = np.ones(16)
    graph.nodes["1"] = nir.CubaLIF(ones, ones, ones, ones, ones)
    with pytest.raises(ValueError, match=r"^1: there is no module for nir.CubaLIF$"):
        from_nir(graph)
    graph.nodes["1"] = nir.LIF(ones, ones, 0 * ones, ones, np.arange(16.0))
    with pytest.raises(ValueError, match=r"^1: v_reset must be the same for all neurons of a layer, got 16 values"):
        from_nir(graph)
    graph.edges.append(("3", "0"))
    with pytest.raises(ValueError, match=r"^graph must have no loops, got .*0 -> 1"):
        from_nir(graph)
    for call in (lambda: to_nir(dense(LIF), torch.zeros(4, 3, 8), 0.0), lambda: from_nir(graph, -1.0)):
        with pytest.raises(ValueError, match=r"^dt must be > 0, got"):
            call()


def test_without_nir(monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ModuleNotFoundError, match=r"exchange with NIR needs nir: pip install 'snnkern\[nir\]'"):
        to_nir(dense(LIF), torch.zeros(4, 3, 8))
