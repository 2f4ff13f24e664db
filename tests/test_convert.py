"""Models before and after ``snnkern.convert``: outputs bit for bit, gradients within the table."""

import copy
import pickle
from functools import partial

import pytest
import torch
from conftest import assert_gradients_close
from torch import nn
from typer.testing import CliRunner

import snnkern
from snnkern.cli import app
from snnkern.nn import LIF


def current(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def outputs_and_gradients(run, model, x):
    """``run(model, x)`` makes a list of outputs; gradients are of x and of all parameters."""
    x = x.clone().requires_grad_()
    outputs = run(model, x)
    loss = sum((y * current(*y.shape, seed=9 + i)).sum() for i, y in enumerate(outputs))
    return outputs, torch.autograd.grad(loss, [x, *(p for p in model.parameters() if p.requires_grad)])


def assert_converts(make, run, x):
    theirs, ours = make(), make()
    parameters, keys = [*ours.parameters()], [*ours.state_dict()]
    report = snnkern.convert(ours)
    assert report and report.swapped == report, report
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True)) and [*ours.state_dict()] == keys
    assert snnkern.convert(ours) == ()
    for _ in range(2):  # the second time from where the first one ended
        wanted, got = (outputs_and_gradients(run, model, x) for model in (theirs, ours))
        for a, b in zip(got[0], wanted[0], strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(got[1], wanted[1], strict=True):
            assert_gradients_close(a, b)
        for module in (*theirs.modules(), *ours.modules()):
            if hasattr(module, "detach"):
                module.detach()
    assert wanted[0][0].any()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours


# SpikingJelly


@pytest.fixture
def neuron():
    return pytest.importorskip("spikingjelly.activation_based.neuron")


def network(neuron, step_mode="m"):
    from spikingjelly.activation_based import functional, surrogate

    torch.manual_seed(0)
    settings = {"surrogate_function": surrogate.ATan(), "v_threshold": 0.2}
    net = nn.Sequential(
        nn.Linear(6, 8),
        neuron.LIFNode(1.7, False, v_reset=None, **settings),
        nn.Linear(8, 8),
        neuron.IFNode(**settings, detach_reset=True),
        nn.Linear(8, 5),
        neuron.ParametricLIFNode(3.0, **settings, detach_reset=True, store_v_seq=True),
    )
    functional.set_step_mode(net, step_mode)
    return net


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_network_of_spikingjelly(neuron, step_mode):
    def run(model, x):
        return [torch.stack([*map(model, x)]) if step_mode == "s" else model(x), model[1].v, model[5].v_seq]

    ours = assert_converts(partial(network, neuron, step_mode), run, current(6, 4, 6))
    assert [type(node) for node in ours[1::2]] == [getattr(snnkern.nn, type(node).__name__) for node in ours[1::2]]
    assert isinstance(ours[1], neuron.LIFNode) and ours[1].step_mode == step_mode
    assert len(pickle.loads(pickle.dumps(ours)).state_dict()) == len(copy.deepcopy(ours).state_dict()) == 7


def test_spikes_of_more_than_one_bit(neuron):
    def net():
        last = neuron.TernaryLIFNode(v_threshold=0.4, step_mode="m")
        return nn.Sequential(neuron.ILIFNode(1.7, 0.3, step_mode="m"), neuron.TernaryIFNode(step_mode="m"), last)

    assert_converts(net, lambda model, x: [model(x), *(node.v for node in model)], current(6, 4, 6))


def test_what_a_module_holds_is_kept(neuron):
    net = network(neuron).double().eval()
    node, seen, x = net[1], [], current(4, 2, 6).double()
    net.append(node).register_module("again", node)
    net.listed = [node]
    node.name = "first"
    handle = node.register_forward_hook(lambda *_: seen.append("forward"))
    node.register_full_backward_hook(lambda *_: seen.append("backward"))
    net[2:6](current(4, 2, 8).double())
    before = net[:2](x)
    v, v_seq = node.v, net[5].v_seq
    report = snnkern.convert(net)
    assert report[0].path == "1, 6, again" and len(report) == 3
    assert net[1] is net[6] is net.again is net.listed[0] is node and type(node) is snnkern.nn.LIFNode
    assert (
        node.v is v
        and v_seq.shape == (4, 2, 5)
        and net[5].v_seq is v_seq
        and node.name == "first"
        and not node.training
    )
    net[:2](x.requires_grad_()).sum().backward()
    assert seen == ["forward", "forward", "backward"]
    handle.remove()
    node.reset()
    assert torch.equal(net[:2](x), before) and len(seen) == 3


def test_an_optimizer_goes_on_with_the_same_parameters(neuron):
    from spikingjelly.activation_based import functional

    def train(convert):
        net = network(neuron)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for step in range(6):
            if convert and step == 3:
                snnkern.convert(net)
            functional.reset_net(net)
            optimizer.zero_grad()
            net(current(6, 4, 6, seed=step)).mean(0).var().backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(net.parameters())

    torch.testing.assert_close(train(True), train(False), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_a_neuron(neuron):
    from spikingjelly.activation_based import surrogate

    node = neuron.LIFNode(surrogate_function=surrogate.QPseudoSpike(), step_mode="m")
    report = snnkern.convert(node, backend="reference")
    assert type(node) is snnkern.nn.LIFNode and node.backend == "reference"
    assert report[0][:3] == ("", "spikingjelly.LIFNode", "snnkern.nn.node.LIFNode")
    assert "of its peak off" in report[0].note and "(model)" in str(report)


def test_neurons_without_an_equal_are_left_with_the_reason(neuron):
    from spikingjelly.activation_based import surrogate

    class Scaled(neuron.LIFNode):
        def neuronal_charge(self, x):
            self.v = self.v + 2 * x

    class LIFNode(neuron.LIFNode):
        def __init__(self):
            super().__init__(tau=3.0)
            self.register_buffer("seen", torch.zeros(1))

    patched = neuron.LIFNode()
    patched.forward = lambda x: x
    compiled = nn.Sequential(neuron.IFNode())
    compiled.compile()
    left = {
        "no neuron here equals it": neuron.PSN(4),
        "defines neuronal_charge": Scaled(),
        "defines forward": patched,
        "compiled": compiled,
        "rounded otherwise": neuron.ILIFNode(),
        "does not spike": neuron.IFNode(surrogate_function=surrogate.Sigmoid(spiking=False)),
        "surrogate_function does not": neuron.IFNode(surrogate_function=lambda x: x.round().clamp(0, 4)),
    }
    net = nn.Sequential(*left.values(), LIFNode())
    classes = [type(module) for module in net]
    report = snnkern.convert(net)
    assert [row.now for row in report] == [None] * 7 + ["snnkern.nn.node.LIFNode"] and net[7].tau == 3.0
    assert [*net.state_dict()] == ["0.weight", "0.bias", "7.seen"]
    for reason, row in zip(left, report, strict=False):
        assert reason in row.note
    assert [type(module) for module in net][:7] == classes[:7] and report.unchanged == report[:7]
    assert str(report).splitlines()[-1] == "1 of 8 neurons swapped"


class Early(nn.Module):
    """LIFNode as SpikingJelly 0.0.0.0.12 computes it, which folds its leak where the rest is 0, and as 0.0.0.0.14 does,
    which does not in eval mode."""

    def __init__(self, tau, v_reset):
        super().__init__()
        self._memories = {"v": 0.0, "v_threshold": 0.5, "v_reset": v_reset}
        self._memories_rv = dict(self._memories)
        self.tau, self.decay_input, self.detach_reset = tau, False, False
        self.surrogate_function = pytest.importorskip("spikingjelly.activation_based.surrogate").ATan()

    def __getattr__(self, name):
        memories = self.__dict__.get("_memories", ())
        return memories[name] if name in memories else super().__getattr__(name)

    def forward(self, x):
        folded = self.training or self.v_reset is None or "clock" in type(self).__module__
        h = self.v * (1 - 1 / self.tau) + x if folded else self.v - self.v / self.tau + x
        spikes = self.surrogate_function(h - 0.5)
        self._memories["v"] = h - spikes * 0.5 if self.v_reset is None else (1 - spikes) * h
        return spikes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("module", ["clock_driven", "activation_based"])
def test_nodes_before_2_fold_their_leak(module, v_reset, training):
    cls = type("LIFNode", (Early,), {"__module__": f"spikingjelly.{module}.neuron"})

    def run(model, x):
        spikes = torch.stack([*map(model, x)])
        return [spikes, model[0].v]

    theirs, ours = nn.Sequential(cls(3.7, v_reset)), nn.Sequential(cls(3.7, v_reset))
    for net in (theirs, ours):
        net.train(training)(current(4, 6))
    assert snnkern.convert(ours).swapped
    wanted, got = (outputs_and_gradients(run, model, current(20, 4, 6)) for model in (theirs, ours))
    assert all(map(torch.equal, got[0], wanted[0]))
    assert_gradients_close(got[1][0], wanted[1][0])
    older = type("LIFNode", (Early,), {"__module__": "spikingjelly.cext.neuron"})(2.0, v_reset)
    assert "spikingjelly.cext.neuron" in snnkern.convert(older)[0].note


# The others


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_leaky_of_snntorch(hidden, prompt):
    snntorch = pytest.importorskip("snntorch")
    from snntorch import surrogate

    learnt = not prompt

    def net():
        torch.manual_seed(0)
        settings = {"reset_mechanism": "zero", "init_hidden": hidden, "reset_delay": not prompt, "learn_beta": learnt}
        last = {"spike_grad": surrogate.fast_sigmoid(10), "learn_threshold": learnt, "graded_spikes_factor": 2.0}
        beta = torch.tensor([0.2, 0.9, 1.3, 0.5, 0.7])
        return nn.Sequential(
            nn.Linear(6, 5), snntorch.Leaky(beta, **settings), snntorch.Leaky(0.9, 0.3, **last, **settings, output=True)
        )

    def run(model, x):
        linear, first, last = model
        fired, outputs = [], []
        mem = [() if hidden else (layer.reset_mem(),) for layer in (first, last)]
        for x_t in 2 * linear(x):
            spikes = first(x_t, *mem[0])
            if not hidden:
                spikes, *mem[0] = spikes
                outputs += mem[0]
            spikes, state = last(spikes, *mem[1])
            mem[1] = () if hidden else (state,)
            fired.append(spikes)
            outputs.append(state)
        if hidden:
            snntorch.Leaky.detach_hidden()
        return [torch.stack(fired), *outputs]

    before = len(snntorch.Leaky.instances)
    try:
        assert isinstance(assert_converts(net, run, current(9, 4, 6))[1], snntorch.Leaky)
    finally:
        del snntorch.Leaky.instances[before:]


def test_leaky_that_starts_above_its_threshold():
    snntorch = pytest.importorskip("snntorch")
    theirs, ours = (snntorch.Leaky(0.9, reset_mechanism="zero", reset_delay=False) for _ in range(2))
    assert snnkern.convert(ours).swapped
    mem = [torch.full((5,), 3.0)] * 2
    for x in current(4, 5):
        (a, mem[0]), (b, mem[1]) = theirs(x, mem[0]), ours(x, mem[1])
        assert torch.equal(a, b) and torch.equal(*mem)
    del snntorch.Leaky.instances[-2:]


@pytest.mark.parametrize("method", ["super", "triangle", "tanh"])
def test_cells_of_norse(method):
    norse = pytest.importorskip("norse.torch")
    from norse.torch.functional.reset import reset_subtract

    parameters = {"method": method, "alpha": torch.tensor(2.0), "v_th": torch.tensor([0.2, 0.1, 0.3, 0.2, 0.1])}
    soft = {"reset_method": reset_subtract, "tau_mem_inv": torch.tensor([100.0, 200, 300, 500, 900])}

    def net():
        torch.manual_seed(0)
        integrator = norse.IAFParameters(v_reset=torch.tensor(-0.5), method=method, alpha=torch.tensor(2.0))
        last = norse.IAF(integrator)
        last.record_states = True
        lifted = norse.Lift(norse.LIFBoxCell(norse.LIFBoxParameters(**parameters | soft), dt=2e-3))
        cell = norse.LIFBoxCell(norse.LIFBoxParameters(**parameters))
        return nn.ModuleList([nn.Linear(6, 5), cell, lifted, norse.IAFCell(integrator), last])

    def run(model, x):
        linear, cell, lifted, integrator, integrators = model
        states, outputs = [None] * 4, []
        for steps in (x[:5], x[5:]):
            spikes = []
            for x_t in linear(steps):
                first, states[0] = cell(x_t, states[0])
                second, states[2] = integrator(first + x_t, states[2])
                spikes.append(first + second)
            third, states[1] = lifted((torch.stack(spikes), states[1]))
            fourth, recorded = integrators(third + linear(steps), states[3])
            states[3] = type(recorded)(recorded.v[-1])
            outputs += [fourth, third, recorded.v]
        return [*outputs, *(state.v for state in states)]

    ours = assert_converts(net, run, 2 * current(12, 4, 6))
    assert isinstance(ours[2].lifted_module, norse.LIFBoxCell)


@pytest.mark.parametrize("trained", [False, True])
def test_layers_of_sinabs(trained):
    layers = pytest.importorskip("sinabs.layers")
    from sinabs.activation import Gaussian, MembraneReset, SingleSpike

    def net():
        torch.manual_seed(0)
        tau = torch.tensor([2.0, 5.0, 10.0, 20.0, 50.0])
        one = {"spike_fn": SingleSpike}
        return nn.Sequential(
            nn.Linear(6, 5),
            layers.LIF(tau, **one, norm_input=False, reset_fn=MembraneReset(), record_states=True),
            layers.LIF(tau + 1, **one, train_alphas=trained, spike_threshold=torch.tensor(0.2)),
            nn.Flatten(0, 1),
            layers.LIFSqueeze(batch_size=4, tau_mem=tau, **one, norm_input=False, surrogate_grad_fn=Gaussian()),
            layers.IAFSqueeze(num_timesteps=7, **one),
            nn.Unflatten(0, (4, 7)),
            layers.IAF(**one),
        )

    def run(model, x):
        spikes = model(x)
        return [spikes, model[1].recordings["v_mem"], model[7].v_mem, model[4].firing_rate]

    def runs(model, x):
        outputs = run(model, x)
        for module in (*model[1:3], *model[4:6], model[7]):
            module.v_mem = module.v_mem.detach()
        return outputs

    ours = assert_converts(net, runs, 2 * current(4, 7, 6))
    copied = copy.deepcopy(ours)
    assert type(copied[1]) is type(ours[1]) and torch.equal(copied[1].v_mem, ours[1].v_mem)


@pytest.mark.parametrize(
    "library, make, reason",
    [
        ("snntorch", lambda s: s.Leaky(0.9), "reset_mechanism 'subtract' takes the threshold a step late"),
        ("snntorch", lambda s: s.Leaky(0.9, reset_delay=False), "takes the threshold again"),
        ("snntorch", lambda s: s.Leaky(0.9, reset_mechanism="none"), "reset_mechanism is 'none'"),
        ("snntorch", lambda s: s.Leaky(0.9, reset_mechanism="zero", state_quant=lambda v: v), "state_quant"),
        ("snntorch", lambda s: s.Leaky(0.9, reset_mechanism="zero", surrogate_disable=True), "spike_grad"),
        ("snntorch", lambda s: s.Leaky(0.9, -1.0, reset_mechanism="zero", reset_delay=False), "threshold"),
        ("snntorch", lambda s: s.Synaptic(0.9, 0.8), "no neuron here equals it"),
        ("norse.torch", lambda n: n.LIFCell(), "no neuron here equals it"),
        ("norse.torch", lambda n: n.LIFBoxCell(n.LIFBoxParameters(v_leak=torch.tensor(0.1))), "v_leak"),
        ("norse.torch", lambda n: n.LIFBoxCell(n.LIFBoxParameters(v_reset=torch.tensor(0.1))), "v_reset"),
        ("norse.torch", lambda n: n.LIFBoxCell(n.LIFBoxParameters(method="circ")), "cannot be sampled"),
        ("norse.torch", lambda n: n.LIFBoxCell(n.LIFBoxParameters(method="heaviside")), "no gradient"),
        ("sinabs.layers", lambda s: s.LIF(9.0), "spike_fn"),
        ("sinabs.layers", lambda s: single(s.LIF, 9.0, tau_syn=3.0), "tau_syn"),
        ("sinabs.layers", lambda s: single(s.IAF, min_v_mem=-1.0), "min_v_mem"),
        ("sinabs.layers", lambda s: single(s.IAF, reset_fn=activation("MembraneReset", 0.1)), "reset_fn"),
        (
            "sinabs.layers",
            lambda s: single(s.IAF, surrogate_grad_fn=activation("PeriodicExponential")),
            "cannot be sampled",
        ),
        ("sinabs.layers", lambda s: single(s.LIFRecurrent, 9.0, nn.Identity()), "recurrent"),
        ("sinabs.layers", lambda s: s.ExpLeak(9.0), "never spikes"),
        ("sinabs.layers", lambda s: s.ExpLeakSqueeze(tau_mem=9.0, batch_size=2), "never spikes"),
    ],
)
def test_what_is_not_the_same_is_left(library, make, reason):
    model = nn.Sequential(make(pytest.importorskip(library)))
    before = type(model[0])
    (row,) = snnkern.convert(model)
    assert row.now is None and reason in row.note and type(model[0]) is before


def activation(name, *args):
    return getattr(pytest.importorskip("sinabs.activation"), name)(*args)


def single(cls, *args, **settings):
    return cls(*args, spike_fn=pytest.importorskip("sinabs.activation").SingleSpike, **settings)


# Rules, errors, the command


class Spike(nn.Module):
    """[N, T, ...], a leak of one half, the triangle."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        v, spikes = 0.0, []
        for x_t in (self.scale * x).unbind(1):
            h = 0.5 * v + x_t
            spikes.append(snnkern.surrogate.Triangle()(h - 1))
            v = (1 - spikes[-1]) * h
        return torch.stack(spikes, 1)


class Fused(LIF):
    def __init__(self):
        super().__init__(time_dim=1)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(self.scale * x)


class Other(Spike):
    pass


def test_rules():
    net = nn.Sequential(Spike(), nn.Identity(), Other())
    net.append(net[0])
    theirs, scale = copy.deepcopy(net), net[0].scale
    report = snnkern.convert(net, rules={Spike: lambda module: Fused()})
    assert [row[0] for row in report] == ["0, 3", "2"] and "name Other too" in report[1].note
    assert type(net[0]) is Fused and net[0] is net[3] and net[0].scale is scale and type(net[2]) is Other
    wanted, got = (
        outputs_and_gradients(lambda model, x: [model(x)], model, current(3, 9, 4)) for model in (theirs, net)
    )
    assert torch.equal(got[0][0], wanted[0][0]) and wanted[0][0].any()
    for a, b in zip(got[1], wanted[1], strict=True):
        assert_gradients_close(a, b)
    assert "its rule leaves it" in str(snnkern.convert(net, rules={Other: lambda module: None}))
    assert str(snnkern.convert(nn.Identity())).startswith("no neurons found")


def test_errors_name_the_argument():
    net = nn.Sequential(Spike(), Other())
    for error, match, arguments in (
        (TypeError, "model must be a module", {"model": "net"}),
        (TypeError, "model must be converted before it is scripted", {"model": torch.jit.script(nn.Identity())}),
        (TypeError, "rules must be a dict", {"rules": [Spike]}),
        (TypeError, "rules must have module classes", {"rules": {"Spike": LIF}}),
        (TypeError, r"rules\[Spike\] must be a function", {"rules": {Spike: 1}}),
        (TypeError, r"rules\[Other\] must return a module", {"rules": {Spike: lambda _: Fused(), Other: lambda _: 1}}),
        (ValueError, r"rules\[Spike\] must return .* keys \['scale'\], got \[\]", {"rules": {Spike: lambda _: LIF()}}),
        (ValueError, "backend", {"backend": "cupy"}),
    ):
        with pytest.raises(error, match=match):
            snnkern.convert(**{"model": net} | arguments)
    assert type(net[0]) is Spike and type(net[1]) is Other


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "a_model_to_convert.py"
    (tmp_path / "beside_that_model.py").write_text("LEAK = 3.0\n")
    file.write_text(
        "from beside_that_model import LEAK\nfrom torch import nn\n"
        "from spikingjelly.activation_based import neuron\n"
        "def make(): return nn.Sequential(neuron.LIFNode(LEAK), neuron.PSN(4))\n"
        "class Plain(nn.Identity): pass\n"
        "def sized(n): return Plain()\n"
        "number = 3\n"
    )

    def told(target):
        result = CliRunner().invoke(app, ["convert", str(target)], env={"COLUMNS": "100"})
        return result.exit_code, result.output

    for target, code, words in (
        ("model.py", 2, "FILE:NAME must be"),
        ("nowhere.py:make", 1, "nowhere.py: no such file"),
        (f"{file}:nothing", 1, "has no nothing"),
        (f"{file}:sized", 1, "without arguments, but: missing a required argument: 'n'"),
        (f"{file}:number", 1, "must make a torch.nn.Module, got 3"),
        (f"{file}:Plain", 1, "no neurons found"),
        (f"{file}:make", 0, "1 of 2 neurons swapped"),
    ):
        if code == 0 or words.startswith(("has", "with", "must make", "no neu")):
            pytest.importorskip("spikingjelly")
        got, output = told(target)
        assert got == code and words in output, output
    assert "snnkern.nn.node.LIFNode" in output and "unchanged: no neuron here equals it" in output
