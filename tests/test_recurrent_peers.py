"""CubaLIF, AdaptiveLIF and RecurrentLIF beside the cells of snnTorch, Norse and SpikingJelly that have the same
equations, on numbers that round nowhere; and where the equations part."""

import pytest
import torch
from torch import nn

from snnkern.nn import AdaptiveLIF, CubaLIF, RecurrentLIF
from snnkern.surrogate import ATan, Rectangle, SuperSpike

T, N, INPUTS, H = 12, 3, 5, 8


def dyadic(*shape, seed=0, scale=8):
    """Multiples of 1/8: sums and products of a few of them, and their halves, are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-scale, scale + 1, shape, generator=generator).div(8)


def walk(cell, x, state=None, first=lambda out: (out[0], out[1:])):
    """A cell of a library, step by step."""
    spikes = []
    for x_t in x:
        s, state = first(cell(x_t, *(state or ())))
        spikes.append(s)
    return torch.stack(spikes)


def gradients(y, *tensors):
    upstream = dyadic(*y.shape, seed=9)
    return torch.autograd.grad(y, tensors, upstream)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 0 and (a - b).norm() <= 1e-5 * b.norm()


def test_snntorchs_synaptic():
    snntorch = pytest.importorskip("snntorch", reason="a peer")
    cell = snntorch.Synaptic(0.5, 0.75, reset_mechanism="zero", reset_delay=False)
    ours = CubaLIF(0.5, decay=0.75, surrogate=ATan(2.0))
    x, start = dyadic(T, N, H).requires_grad_(), [torch.zeros(N, H) for _ in range(2)]
    theirs = walk(cell, x, start)
    assert 0.05 < theirs.mean() < 0.6 and torch.equal(ours(x), theirs)
    assert_close(gradients(ours(x), x), gradients(theirs, x))
    # With its default, reset_delay=True, the potential is 0 for the whole step after a spike, whose input is lost.
    late = walk(snntorch.Synaptic(0.5, 0.75, reset_mechanism="zero"), x, start)
    assert not torch.equal(ours(x), late) and (late[1:] * late[:-1]).sum() == 0


def test_snntorchs_recurrent_leaky():
    """Not RSynaptic: its zero reset is that of Synaptic with a delay, and without one it does not run as it should."""
    snntorch = pytest.importorskip("snntorch", reason="a peer")
    cell = snntorch.RLeaky(0.75, linear_features=H, reset_mechanism="zero", reset_delay=False)
    ours = RecurrentLIF(H, decay=0.75, surrogate=ATan(2.0), bias=nn.Parameter(dyadic(H, seed=2, scale=1)))
    with torch.no_grad():
        ours.weight.copy_(dyadic(H, H, seed=1, scale=4))
        cell.recurrent.weight.copy_(ours.weight)
        cell.recurrent.bias.copy_(ours.bias)
    x = dyadic(T, N, H).requires_grad_()
    theirs = walk(cell, x, [torch.zeros(N, H) for _ in range(2)], lambda out: (out[0], out))
    assert 0.05 < theirs.mean() < 0.6 and torch.equal(ours(x), theirs)
    got = gradients(ours(x), x, ours.weight, ours.bias)
    assert_close(got, gradients(theirs, x, cell.recurrent.weight, cell.recurrent.bias))


def test_norses_recurrent_lif():
    norse = pytest.importorskip("norse.torch", reason="a peer")
    p = norse.LIFParameters(torch.tensor(0.25), torch.tensor(0.5))
    cell = norse.LIFRecurrentCell(INPUTS, H, p=p, dt=1.0, autapses=True)  # else: no neuron feeds itself
    ours = RecurrentLIF(H, inverse_tau=0.5, synapse_decay=0.75, surrogate=SuperSpike(1.0), detach_reset=True)
    with torch.no_grad():
        cell.input_weights.copy_(dyadic(H, INPUTS, seed=3))
        cell.recurrent_weights.copy_(dyadic(H, H, seed=1, scale=4))
        ours.weight.copy_(cell.recurrent_weights)
    x = dyadic(T, N, INPUTS).requires_grad_()
    theirs = walk(cell, x, first=lambda out: (out[0], (out[1],)))
    mine = ours(nn.functional.linear(x, cell.input_weights))
    assert 0.05 < theirs.mean() < 0.6 and torch.equal(mine, theirs)
    got = gradients(mine, x, cell.input_weights, ours.weight)
    assert_close(got, gradients(theirs, x, cell.input_weights, cell.recurrent_weights))


def test_norses_adaptive_cell():
    """Its neurons receive what comes a step later. In LSNNRecurrentCell spikes that come back wait for one step more,
    and nothing flows back through the adaptation: it has no equal here."""
    pytest.importorskip("norse.torch", reason="a peer")
    from norse.torch import LSNNCell
    from norse.torch.functional.lsnn import LSNNParameters

    rates = torch.tensor(0.25), torch.tensor(0.5), torch.tensor(0.25)
    cell = LSNNCell(p=LSNNParameters(*rates, beta=torch.tensor(0.5)), dt=1.0)
    # Its threshold decays before it is compared: the jump is (1 - 1/4) beta.
    ours = AdaptiveLIF(0.75, 0.375, inverse_tau=0.5, synapse_decay=0.75, surrogate=SuperSpike(1.0))
    x = (dyadic(T, N, H) + 0.5).requires_grad_()
    theirs = walk(cell, x, first=lambda out: (out[0], (out[1],)))[1:]
    mine = ours(x)[:-1]
    assert 0.05 < theirs.mean() < 0.6 and torch.equal(mine, theirs)
    assert_close(gradients(mine, x), gradients(theirs, x))


def test_spikingjellys_current_based_node():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="a peer")
    from spikingjelly.activation_based import surrogate

    node = neuron.CUBALIFNode(0.5, 0.75, 1.0, surrogate_function=surrogate.Rect(alpha=1.0))
    node.step_mode = "m"
    ours = CubaLIF(0.5, decay=0.75, surrogate=Rectangle(1.0), fire_at_threshold=True)
    x = dyadic(T, N, H).requires_grad_()
    theirs = node(x)
    assert 0.05 < theirs.mean() < 0.6 and torch.equal(ours(x), theirs)
    assert_close(gradients(ours(x), x), gradients(theirs, x))
