"""Spikes, potentials and gradients against SpikingJelly's own LIFNode."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from conftest import RUNNABLE, assert_gradients_close
from torch import nn

import snnkern
from snnkern.nn import LIF, LIFNode

pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed")
from spikingjelly.activation_based import base, functional, layer, monitor, neuron, surrogate

backends = pytest.mark.parametrize("backend", [*RUNNABLE, "reference"])
pytestmark = pytest.mark.usefixtures("on_device")

SHAPES = [(1, 5), (2, 1), (5, 3, 4), (40, 3), (7, 257, 3, 7)]
TAUS = [1.7, 2.0, 20.0]
RESETS = [0.0, -0.3, None]
SURROGATES = [
    surrogate.Sigmoid(),
    surrogate.ATan(),
    surrogate.PiecewiseQuadratic(alpha=0.7),
    surrogate.PiecewiseExp(),
    surrogate.SoftSign(),
    surrogate.SuperSpike(alpha=0.5),
    surrogate.Erf(),
    surrogate.Rect(alpha=0.6),
]


def current(*shape, seed=0):
    """Multiples of 1/8, so that potentials meet the threshold exactly."""
    noise = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return noise.mul(2).add(0.5).mul(8).round().div(8).to(torch.get_default_device())


def run(node, inputs, v=None):
    """Outputs of consecutive calls, the last potential, and gradients of inputs, parameters and the first state."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    leaves = [*inputs, *node.parameters()]
    if v is not None:
        node.v = v.clone().requires_grad_()
        leaves.append(node.v)
    outputs = [node(x) for x in inputs]
    weights = [current(*y.shape, seed=9 + i) for i, y in enumerate([*outputs, node.v])]
    loss = sum((w * y).sum() for w, y in zip(weights, [*outputs, node.v], strict=True))
    return outputs, node.v, torch.autograd.grad(loss, leaves)


def assert_same(ours, theirs):
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours[1], theirs[1])
    for a, b in zip(ours[2], theirs[2], strict=True):
        assert_gradients_close(a, b)


@backends
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("tau", TAUS)
def test_multi_step_equals_spikingjelly_over_two_calls(backend, tau, decay_input, v_reset, detach_reset):
    settings = dict(tau=tau, decay_input=decay_input, v_reset=v_reset, detach_reset=detach_reset, step_mode="m")
    for shape in SHAPES:
        inputs = [current(*shape, seed=1), current(*shape, seed=2)]
        ours = LIFNode(**settings, backend=backend)
        theirs = neuron.LIFNode(**settings)
        assert_same(run(ours, inputs), run(theirs, inputs))


@backends
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("tau", TAUS)
def test_gradient_of_initial_state_equals_spikingjelly(backend, tau, decay_input, v_reset):
    settings = dict(tau=tau, decay_input=decay_input, v_reset=v_reset, step_mode="m")
    inputs, v = [current(20, 3, 4, seed=1)], current(3, 4, seed=3) / 2
    assert_same(run(LIFNode(**settings, backend=backend), inputs, v), run(neuron.LIFNode(**settings), inputs, v))


def grid(*leaks):
    """Settings of a node: its leaks, resets and gradients."""
    return [
        dict(leak, v_reset=v_reset, detach_reset=detach_reset)
        for leak, v_reset, detach_reset in product(leaks, RESETS, [False, True])
    ]


LEAKS = [{"tau": tau, "decay_input": decay_input} for tau, decay_input in product([1.7, 20.0], [True, False])]
NODES = {
    "IFNode": grid({}),
    "ParametricLIFNode": grid(*({"init_tau": leak["tau"], "decay_input": leak["decay_input"]} for leak in LEAKS)),
    "TernaryIFNode": grid({}),
    "TernaryLIFNode": grid(*LEAKS),
    "ILIFNode": [dict(tau=tau, detach_reset=detach_reset) for tau in TAUS for detach_reset in [False, True]],
}


@backends
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", NODES)
def test_every_node_equals_its_namesake(backend, name, step_mode):
    of_w = []  # in some settings its many parts cancel out to nearly nothing: together they say what the error is
    for settings in NODES[name]:
        if name == "ILIFNode" and step_mode == "s" and settings["tau"] != 2.0:  # theirs is then rounded otherwise
            continue
        settings = dict(settings, v_threshold=0.75, step_mode=step_mode)
        inputs = [current(12, 3, 4, seed=1), current(12, 3, 4, seed=2)] if step_mode == "m" else [*current(6, 3, 4)]
        ours, theirs = (getattr(module, name)(**settings) for module in (snnkern.nn, neuron))
        ours.backend = backend
        ours.load_state_dict(theirs.state_dict())
        got, wanted = run(ours, inputs), run(theirs, inputs)
        of_w += [[run[2][len(inputs) :] for run in (got, wanted)]]
        assert_same(*((*run[:2], run[2][: len(inputs)]) for run in (got, wanted)))
        assert isinstance(ours, type(theirs)) and isinstance(ours, neuron.LIFNode) == isinstance(theirs, neuron.LIFNode)
        theirs.load_state_dict(ours.state_dict())
    got, wanted = (sum(each, ()) for each in zip(*of_w, strict=True))
    if got:
        assert_gradients_close(torch.stack(got), torch.stack(wanted))


@backends
def test_multi_step_classes_equal_their_nodes_in_multi_step_mode(backend):
    inputs = [current(12, 3, 4, seed=1), current(12, 3, 4, seed=2)]
    for name, leak in (("IFNode", ()), ("LIFNode", (1.7, False)), ("ParametricLIFNode", (1.7, False))):
        settings = *leak, 0.75, None, surrogate.ATan(), True
        ours = getattr(snnkern.nn, f"MultiStep{name}")(*settings, backend)
        assert_same(run(ours, inputs), run(getattr(neuron, name)(*settings, "m"), inputs))


@backends
@pytest.mark.parametrize("v_reset", RESETS)
def test_single_steps_equal_spikingjelly(backend, v_reset):
    inputs = list(current(9, 5, 3))
    ours = LIFNode(tau=1.7, v_reset=v_reset, backend=backend)
    assert_same(run(ours, inputs), run(neuron.LIFNode(tau=1.7, v_reset=v_reset), inputs))


@backends
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("surrogate_function", SURROGATES, ids=lambda s: type(s).__name__)
def test_surrogate_objects_of_spikingjelly_give_its_gradients(backend, surrogate_function, v_reset):
    settings = dict(v_threshold=0.75, v_reset=v_reset, surrogate_function=surrogate_function, step_mode="m")
    inputs = [current(20, 7, 3)]
    assert_same(run(LIFNode(**settings, backend=backend), inputs), run(neuron.LIFNode(**settings), inputs))


@pytest.mark.filterwarnings("ignore")  # of what SpikingJelly's models import
@backends
def test_dspike_object_of_spikingjelly_gives_its_gradients(backend):
    from spikingjelly.activation_based.model import spike_dhs

    settings = dict(surrogate_function=spike_dhs.DSpike(), step_mode="m")
    inputs = [current(20, 7, 3)]
    assert_same(run(LIFNode(**settings, backend=backend), inputs), run(neuron.LIFNode(**settings), inputs))


@backends
def test_lif_function_equals_functional_lif_multi_step(backend):
    for tau, decay_input, v_reset, detach_reset in product(TAUS, [True, False], RESETS, [False, True]):
        x, v = current(12, 4, 5), current(4, 5, seed=3)
        ours = snnkern.lif(
            x,
            v,
            tau=tau,
            decay_input=decay_input,
            reset=v_reset,
            detach_reset=detach_reset,
            fire_at_threshold=True,
            backend=backend,
        )
        theirs = functional.lif_multi_step(
            x, v, tau, decay_input, 1.0, v_reset, surrogate.Sigmoid(), detach_reset, False
        )
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@backends
def test_change_of_surrogate_alpha_takes_effect(backend):
    x, alpha = [current(6, 5)], surrogate.ATan(alpha=2.0)
    node = LIFNode(surrogate_function=alpha, step_mode="m", backend=backend)
    before = run(node, x)[2][0]
    node.reset()
    alpha.alpha = 5.0
    after = run(node, x)
    assert not torch.equal(before, after[2][0])
    assert_same(after, run(neuron.LIFNode(surrogate_function=surrogate.ATan(alpha=5.0), step_mode="m"), x))


@backends
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_v_seq_equals_spikingjelly_and_is_differentiable(backend, step_mode):
    def v_seq_and_gradient(node):
        x = current(6, 4, 3).requires_grad_()
        calls = [x] if step_mode == "m" else x
        for part in calls:
            node(part)
        (gradient,) = torch.autograd.grad((node.v_seq * current(6, 4, 3, seed=4)).sum(), x)
        return node.v_seq, gradient

    settings = dict(v_reset=-0.3, step_mode=step_mode, store_v_seq=True)
    ours = v_seq_and_gradient(LIFNode(**settings, backend=backend))
    theirs = v_seq_and_gradient(neuron.LIFNode(**settings))
    assert torch.equal(ours[0], theirs[0])
    assert_gradients_close(ours[1], theirs[1])


def mixed_network(node):
    torch.manual_seed(0)
    return nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        node(),
        layer.MaxPool2d(2),
        layer.Flatten(),
        neuron.IFNode(v_threshold=0.5),
        layer.Linear(36, 5),
        node(),
    )


def test_set_step_mode_reset_net_and_detach_net_reach_our_nodes():
    net = nn.Sequential(*mixed_network(LIFNode), LIF())
    functional.set_step_mode(net, "m")
    assert net[2].step_mode == net[7].step_mode == "m"
    net(current(3, 2, 2, 6, 6))
    assert net[7].v.grad_fn is not None
    functional.detach_net(net)
    assert net[7].v.grad_fn is None and net[2].v.grad_fn is None
    functional.reset_net(net)
    assert net[2].v == net[5].v == net[7].v == 0.0
    functional.set_step_mode(net, "s")
    assert net[2].step_mode == net[7].step_mode == "s"
    net(current(2, 2, 6, 6))


@pytest.mark.filterwarnings("ignore")  # of what its counters import
def test_tools_of_spikingjelly_find_our_nodes():
    from spikingjelly.activation_based import memopt, op_counter

    x, seen = 3 * current(3, 2, 20), []
    for make in (LIFNode, neuron.LIFNode):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 9, False), make(step_mode="m"), nn.Linear(9, 5, False), make(step_mode="m"))
        outputs = monitor.OutputMonitor(net, instance=neuron.LIFNode)
        net(x)
        outputs.remove_hooks()
        functional.reset_net(net)
        energy = op_counter.estimate_lemaire_energy(net, x)
        functional.reset_net(net)
        net[1] = memopt.checkpoint_module(net[1])
        net(x).sum().backward()
        seen.append([*outputs.records, torch.tensor(energy.total_pj), net[0].weight.grad])
    assert len(seen[1]) == 4 and seen[1][0].any()
    for ours, theirs in zip(*seen, strict=True):
        assert_gradients_close(ours, theirs)


def test_what_theirs_would_compute_by_itself_is_missing():
    for name in ("neuronal_charge", "_append_v_seq", "apply_hard_reset"):
        assert not hasattr(LIFNode(), name) and not hasattr(LIFNode, name)
    with pytest.raises(TypeError, match="neuronal_charge"):
        type("Custom", (LIFNode,), {"neuronal_charge": lambda self, x: None})


def test_functional_forward_of_a_node_leaves_its_state():
    x = current(5, 3)
    for step_mode in ("s", "m"):
        node = LIFNode(step_mode=step_mode, v_reset=-0.3)
        part = x if step_mode == "m" else x[0]
        (v,) = node.materialize_states((part,), (-0.3,), step_mode)
        (spikes,), (after,) = node.functional_forward((part,), (v,))
        assert torch.equal(v, torch.full((3,), -0.3)) and node.v == -0.3
        assert torch.equal(spikes, node(part)) and torch.equal(after, node.v)


def test_our_nodes_count_as_memory_modules_where_spikingjelly_is_used():
    class Early(LIFNode):
        pass

    for node in (LIFNode(), Early(), copy.deepcopy(LIFNode())):
        assert isinstance(node, base.MemoryModule)
        assert isinstance(node, base.StepModule)
        assert list(base.named_memories(nn.Sequential(node))) == [("0.v", 0.0)]


def test_functional_forward_of_a_network_holds_our_state_explicitly():
    net = mixed_network(LIFNode)
    functional.set_step_mode(net, "m")
    x = current(3, 2, 2, 6, 6)
    outputs, states = base.to_functional_forward(net)((x,), (0.0, 0.0, 0.0))
    assert net[2].v == 0.0
    assert torch.equal(outputs[0], net(x))
    assert all(torch.equal(a, b) for a, b in zip(states, base.extract_memories(net), strict=True))


def test_attribute_monitor_records_v_seq():
    net = nn.Sequential(layer.Linear(3, 4), LIFNode(store_v_seq=True))
    functional.set_step_mode(net, "m")
    watch = monitor.AttributeMonitor("v_seq", pre_forward=False, net=net, instance=LIFNode)
    net(current(5, 2, 3))
    assert torch.equal(watch.records[0], net[1].v_seq)
    assert watch.records[0].shape == (5, 2, 4)


@backends
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_swapping_the_nodes_of_a_model_changes_nothing(backend, step_mode):
    theirs = mixed_network(lambda: neuron.LIFNode(tau=1.7, v_threshold=0.05, surrogate_function=surrogate.ATan()))
    ours = copy.deepcopy(theirs)
    for name, module in ours.named_children():
        if type(module) is neuron.LIFNode:
            node = LIFNode(
                module.tau,
                module.decay_input,
                module.v_threshold,
                module.v_reset,
                module.surrogate_function,
                module.detach_reset,
                backend=backend,
            )
            setattr(ours, name, node)
    assert ours.state_dict().keys() == theirs.state_dict().keys()

    x = current(*((4, 2, 2, 6, 6) if step_mode == "m" else (2, 2, 6, 6)))
    gradients = []
    for net in (ours, theirs):
        functional.set_step_mode(net, step_mode)
        out = net(x)
        (out * current(*out.shape, seed=5)).sum().backward()
        gradients.append((out, *(p.grad for p in net.parameters())))
        functional.reset_net(net)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert gradients[0][0].sum() > 0
    for a, b in zip(*(g[1:] for g in gradients), strict=True):
        assert_gradients_close(a, b)


@pytest.mark.skipif("cpu" not in RUNNABLE, reason="the last bits are the CPU's")
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("tau", [2.0, 8.0])
@pytest.mark.parametrize("decay_input", [True, False])
def test_training_with_atan_and_detached_reset_is_theirs_to_the_last_bit(decay_input, tau, v_reset):
    def train(make):
        torch.manual_seed(0)
        node = partial(make, tau, decay_input, 1.0, v_reset, surrogate.ATan(), detach_reset=True, step_mode="m")
        net = nn.Sequential(nn.Linear(20, 32), node(), nn.Linear(32, 32), node(), nn.Linear(32, 5))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for step in range(10):
            functional.reset_net(net)
            loss = nn.functional.cross_entropy(net(3 * current(20, 8, 20, seed=step)).mean(0), torch.arange(8) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    ours, theirs = train(partial(LIFNode, backend="cpu")), train(neuron.LIFNode)
    assert all(map(torch.equal, ours, theirs))
    torch.manual_seed(0)
    assert not torch.equal(ours[0], nn.Linear(20, 32).weight)


@backends
def test_state_recovers_from_an_infinite_input(backend):
    x = torch.ones(4, 3)
    x[1, 0] = float("inf")
    node = LIFNode(step_mode="m", decay_input=False, backend=backend)
    node(x)
    fresh = neuron.LIFNode(step_mode="m", decay_input=False)
    fresh(x[2:])
    assert torch.equal(node.v[0], fresh.v[0])
