"""``lif`` inside ``torch.compile``: one graph, the same numbers, a library op as PyTorch wants it."""

import pytest
import torch
from conftest import EMULATED, INTERPRETED, TORCH, assert_gradients_close
from test_lif import draw
from torch import nn
from torch._dynamo.utils import counters

import snnkern
from snnkern.nn import BNLIF, LIF, LIFNode
from snnkern.surrogate import ATan, Dspike, Table, Triangle

pytestmark = pytest.mark.usefixtures("poison")
cpu_alone = pytest.mark.skipif(INTERPRETED or EMULATED, reason="nothing there depends on the kernels")


@pytest.mark.parametrize("options", [{}, {"tau": 2.0, "reset": None, "surrogate": ATan()}, {"time_dim": 1}], ids=str)
def test_compiles_into_one_graph_with_the_same_results(backend, device, options):
    def loss(x, v):
        spikes, v_last = snnkern.lif(x * 2, v, backend=backend, **options)
        return (spikes * x).sum() + v_last.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = draw((20, 20), device=device).requires_grad_()
    for v in (None, draw((20,), device=device).requires_grad_()):
        inputs = [x] if v is None else [x, v]
        assert torch.equal(compiled(x, v), loss(x, v))
        for got, wanted in zip(
            torch.autograd.grad(compiled(x, v), inputs), torch.autograd.grad(loss(x, v), inputs), strict=True
        ):
            assert_gradients_close(got, wanted)


def test_the_library_op_passes_opcheck(backend, device):
    from snnkern.ops import library
    from snnkern.spec.neuron import make_spec

    x, v = draw((20, 12), device=device).requires_grad_(), draw((12,), device=device).requires_grad_()
    neuron = library.neuron(make_spec(0.5, None, True, 1.0, 0.0, Triangle(), False, False))
    for state, return_v in ((None, "False"), (v, "True")):
        arguments = x, state, None, None, None, None, neuron, 0, 20, return_v, backend
        torch.library.opcheck(torch.ops.snnkern.lif.default, arguments)
    weight, s = draw((12, 12), device=device, seed=1).requires_grad_(), (x[0].detach() > 0).float()
    arguments = x, weight, v, s, None, None, None, None, neuron, 0, backend
    torch.library.opcheck(torch.ops.snnkern.recurrent_lif.default, arguments)


# Whole sequences, streams and training, without compiling anew


def compiled(f, **options):
    """``f`` compiled into one graph, and how many there are by now."""
    torch.compiler.reset()
    counters.clear()
    return torch.compile(f, fullgraph=True, **{"backend": "aot_eager", **options}), lambda: counters["stats"][
        "unique_graphs"
    ]


def ramp(y):
    """A number that depends on every element of y in another way."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)).sum()


def results(f, x):
    """Output and gradient; the number of steps is left open."""
    x = x.clone().requires_grad_()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    y = f(x)
    return y.detach(), torch.autograd.grad(ramp(y), x)[0]


TABLE = Table(lambda x: 1 / (1 + x * x), 2.0, cells=8)
SEQUENCES = {
    "lif": lambda x: snnkern.lif(x, x.new_ones(3, 5))[0],
    "lif of [N, T, ...], summed": lambda x: snnkern.lif(x.transpose(0, 1), time_dim=1, steps_out=2)[0],
    "lif of tensors": lambda x: snnkern.lif(
        x, inverse_tau=x.new_full((5,), 0.4), threshold=x.new_ones(()), surrogate=TABLE, return_v="sequence"
    )[1],
    "LIF": LIF(),
    "BNLIF": BNLIF(5),
    "ttm": lambda x: snnkern.ttm(x, 2),
}


A_GRAPH = 2 if TORCH == (2, 6) else 1  # which makes another for few steps


@cpu_alone
@pytest.mark.parametrize("f", SEQUENCES.values(), ids=SEQUENCES)
def test_one_graph_serves_every_number_of_steps(f):
    graph, graphs = compiled(f)
    for steps in (20, 3, 16, 17, 33, 64):  # beyond 16 potentials are kept for backward
        x = draw((steps, 3, 5))
        for got, wanted in zip(results(graph, x), results(f, x), strict=True):
            assert_gradients_close(got, wanted)
    assert 1 <= graphs() <= A_GRAPH


@cpu_alone
def test_a_node_carries_its_state_through_two_graphs():
    """One for the first call after a reset, one for all others."""

    def train(f, node, steps):
        node.reset()
        x = draw((3 * steps, 4, 5), seed=steps).requires_grad_()
        spikes = torch.cat([f(part) for part in x.split(steps)])
        return spikes, node.v, torch.autograd.grad(ramp(spikes) + node.v.square().sum(), x)[0]

    ours, wanted = LIFNode(2.5, step_mode="m"), LIFNode(2.5, step_mode="m")
    graph, graphs = compiled(ours, dynamic=True)
    for steps in (6, 17, 3):
        (*same, gradient), (*as_these, wanted_gradient) = train(graph, ours, steps), train(wanted, wanted, steps)
        assert all(map(torch.equal, same, as_these))
        assert_gradients_close(gradient, wanted_gradient)
    assert graphs() == 2 * A_GRAPH


@cpu_alone
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_stream_is_the_whole_sequence(eager):
    x = draw((12, 4, 5))
    wanted = snnkern.lif(x, tau=2.0, reset=None, fire_at_threshold=True)[0]
    node = LIFNode(v_reset=None)
    f = node if eager else compiled(node)[0]
    with torch.no_grad():
        assert torch.equal(torch.stack([f(x_t) for x_t in x]), wanted)


@cpu_alone
def test_autocast_inside_is_as_outside(dtype=torch.bfloat16):
    """Spikes have the dtype of the current, the state is float32, gradients are those of float32 weights."""
    model = nn.Sequential(nn.Linear(5, 6), LIFNode(step_mode="m", detach_reset=True), nn.Linear(6, 5), BNLIF(5))
    x, found = draw((20, 3, 5)).mul(4), []
    for f in (model, compiled(model)[0]):
        model[1].reset()
        with torch.autocast("cpu", dtype):
            spikes = f(x)
        assert spikes.dtype == dtype and model[1].v.dtype == torch.float32
        found.append((spikes, model[1].v, *torch.autograd.grad(ramp(spikes.float()), model.parameters())))
    for got, wanted in zip(*found, strict=True):
        assert wanted.norm() > 0
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=1e-2)


@cpu_alone
def test_the_temperature_of_dspike_may_change_at_every_epoch():
    temperature = torch.tensor(1.0)
    model, x, seen = BNLIF(5, LIF(surrogate=Dspike(temperature))), draw((6, 3, 5)), []
    net, graphs = compiled(model)
    for value in (1.0, 3.0, 9.0):
        temperature.fill_(value)
        got, wanted = results(net, x)[1], results(BNLIF(5, LIF(surrogate=Dspike(value))), x)[1]
        assert_gradients_close(got, wanted)
        seen.append(got)
    assert graphs() == 1 and not torch.equal(seen[0], seen[1])


no_bare = pytest.mark.skipif(TORCH == (2, 6), reason="PyTorch 2.6 cannot compile what asks for a function's module")
bare = pytest.param("a function", marks=no_bare)


@cpu_alone
@pytest.mark.parametrize("name", ["ATan", "PiecewiseQuadratic", "QPseudoSpike", bare])
def test_surrogates_of_others_compile(name):
    """In two networks whose parameters differ, and after a change of one."""
    if name == "a function":
        functions = [lambda h: ATan(2.0)(h), lambda h: ATan(3.0)(h)]
    else:
        theirs = pytest.importorskip("spikingjelly.activation_based.surrogate")
        functions = [getattr(theirs, name)(alpha) for alpha in (2.0, 3.0)]
    nodes = [LIFNode(surrogate_function=function, step_mode="m") for function in functions]
    x, (_, graphs), seen = draw((6, 3, 5)), compiled(nodes[0]), []
    graphed = [torch.compile(node, fullgraph=True, backend="aot_eager") for node in nodes]

    def gradient(f, node):
        node.reset()
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(ramp(f(leaf)), leaf)[0]

    for _ in range(2):
        for f, node in zip(graphed, nodes, strict=True):
            seen.append(gradient(f, node))
            assert torch.equal(seen[-1], gradient(node, node))
    assert graphs() == 2 and torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    if name != "a function":
        functions[0].alpha = 5.0
        assert torch.equal(gradient(graphed[0], nodes[0]), gradient(nodes[0], nodes[0]))


@cpu_alone
def test_the_reference_compiles_too():
    model, x = LIF(surrogate=TABLE, backend="reference"), draw((2, 3, 5))
    assert_gradients_close(results(compiled(model)[0], x)[1], results(model, x)[1])
