"""``snnkern.linear``, the op, its kernels and the modules that are made of it, against PyTorch's dense product."""

import pytest
import torch
from conftest import GRADIENT_BOUND
from test_cpu import with_threads
from test_lif import draw
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import snnkern
from snnkern import analysis
from snnkern.backend.cpu import linear as kernels
from snnkern.models import SpikingMLP
from snnkern.models.layers import fire_behind
from snnkern.nn import LIF, Linear, LinearLIF, RecurrentLIF

pytestmark = pytest.mark.usefixtures("poison")
# Rows, inputs, outputs: around bits, blocks, parts and vectors.
SHAPES = [
    (1, 1, 1), (31, 70, 20), (33, 7, 200), (64, 16, 128), (65, 130, 300), (1000, 128, 128), (4100, 20, 3),
    (40, 700, 65), (3, 9000, 17),
]  # fmt: skip


@pytest.fixture
def few(monkeypatch):
    """Every plain product is taken for one that pays; counts those that the kernels do."""
    for name, value in (("SMALLEST", 0), ("NARROWEST", 0), ("DENSEST", 2)):
        monkeypatch.setattr(kernels, name, value)
    done = []
    forward = snnkern.backend.cpu.linear_forward
    monkeypatch.setattr(snnkern.backend.cpu, "linear_forward", lambda *a: done.append(1) or forward(*a))
    return done


def spikes(*shape, rate=0.2, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


def layer(rows, inputs, outputs, biased=True, kind="binary"):
    s = spikes(rows, inputs)
    if kind == "other":
        s = s * draw(s.shape, seed=5)
    weight, bias = draw((outputs, inputs), seed=1), draw((outputs,), seed=2) if biased else None
    return [t if t is None else t.requires_grad_() for t in (s, weight, bias)]


def differentiated(function, tensors, grad):
    y = function(*tensors)
    return y, *torch.autograd.grad(y, [t for t in tensors if t is not None], grad)


def assert_close(got, wanted):
    """Within the bound of one float32 sum of positive terms, or as far off as PyTorch's own product."""
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert (one.double() - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("kind", ["binary", "other"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_kernels_are_the_dense_product(few, shape, biased, kind):
    tensors = layer(*shape, biased, kind)
    grad = torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(3))
    dense = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    got = differentiated(snnkern.linear, tensors, grad)
    assert few and type(got[0].grad_fn).__name__ == "_LinearBackward"
    assert_close(got, differentiated(F.linear, dense, grad.double()))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_cpu_no_spikes_and_nothing_but_spikes(few, rate):
    s, weight, bias = layer(100, 70, 90)
    s = torch.full_like(s, rate).requires_grad_()
    dense = [t.detach().double().requires_grad_() for t in (s, weight, bias)]
    grad = draw((100, 90)).abs()
    assert_close(
        differentiated(snnkern.linear, (s, weight, bias), grad), differentiated(F.linear, dense, grad.double())
    )
    assert few


def test_cpu_sums_go_up_the_inputs_from_the_bias(few):
    s, weight, bias = (t.detach() for t in layer(50, 90, 70))
    wanted = bias.repeat(50, 1)
    for k in range(90):
        fired = s[:, k] != 0
        wanted[fired] += weight[:, k]
    assert torch.equal(snnkern.linear(s, weight, bias), wanted)
    assert torch.equal(snnkern.linear(s[7:9], weight, bias), wanted[7:9])  # whatever rows there are beside


def test_cpu_other_numbers_come_through(few):
    s, weight, _ = (t if t is None else t.detach() for t in layer(70, 40, 30, False))
    s[3, 5], s[8, 1], s[33, 2], s[34, 3] = float("nan"), float("inf"), -1.0, -0.0
    y, dense = snnkern.linear(s, weight), F.linear(s, weight)
    assert few and y[3].isnan().all() and torch.equal(y[8], dense[8])
    torch.testing.assert_close(y, dense, equal_nan=True)
    weight.requires_grad_()
    grad = draw((70, 30))
    got, wanted = (torch.autograd.grad(f(s, weight), weight, grad)[0] for f in (snnkern.linear, F.linear))
    assert got[:, 5].isnan().all() and got[:, 1].isinf().all()
    torch.testing.assert_close(got, wanted, equal_nan=True)


def test_cpu_any_number_of_threads_gives_the_same_bits(few):
    tensors, grad = layer(5000, 130, 90), draw((5000, 90))
    wanted = with_threads(1, lambda: differentiated(snnkern.linear, tensors, grad))
    for threads in (2, 3, 16, 300):
        got = with_threads(threads, lambda: differentiated(snnkern.linear, tensors, grad))
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)), threads


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("kind", ["binary", "other"])
def test_cpu_gradients_only_where_wanted(few, wanted, kind):
    tensors, grad = layer(70, 33, 20, kind=kind), draw((70, 20))
    every = differentiated(snnkern.linear, tensors, grad)[1:]
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    got = torch.autograd.grad(snnkern.linear(*some), [some[i] for i in wanted], grad)
    for one, i in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, every[i])


def test_cpu_any_leading_dimensions(few):
    s, weight, bias = layer(60, 33, 20)
    whole = snnkern.linear(s, weight, bias)
    assert torch.equal(snnkern.linear(s.view(3, 4, 5, 33), weight, bias), whole.view(3, 4, 5, 20))
    assert torch.equal(snnkern.linear(s[0], weight, bias), whole[0]) and len(few) == 3


def test_cpu_strange_gradients(few):
    """Expanded ones, a batch of them, and none that can be differentiated again."""
    s, weight, bias = layer(70, 33, 20)
    y = snnkern.linear(s, weight, bias)
    got = torch.autograd.grad(y.sum(), (s, weight, bias), retain_graph=True)
    dense = torch.autograd.grad(F.linear(s, weight, bias).sum(), (s, weight, bias))
    grads = draw((3, 70, 20))
    batch = torch.autograd.grad(y, (s, weight, bias), grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, (s, weight, bias), grad, retain_graph=True) for grad in grads]
    for one, other in [*zip(got, dense, strict=True), *zip(batch, map(torch.stack, zip(*single)), strict=True)]:  # noqa: B905
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"once differentiable .* create_graph=True"):
        torch.autograd.grad(y.sum(), weight, create_graph=True)


def test_cpu_keeps_bits_or_what_packed_spikes_make_of_others(few):
    s, weight, bias = layer(64, 40, 20)
    kept = snnkern.linear(s, weight, bias).grad_fn.saved_tensors
    assert kept[0].dtype == torch.int32 and kept[0].shape == (2, 40) and kept[1] is weight
    s, weight, bias = layer(64, 40, 20, kind="other")
    assert snnkern.linear(s, weight, bias).grad_fn.saved_tensors[0].data_ptr() == s.data_ptr()
    assert snnkern.linear(s.detach(), weight.detach(), bias).grad_fn.saved_tensors == (None, None)
    with snnkern.packed_spikes():
        x = snnkern.lif(draw((64, 40)).requires_grad_(), return_v=False)[0]
        y = snnkern.linear(x, weight, bias)
    (packed,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    torch.testing.assert_close(packed, torch.ones_like(y).t() @ x)


def test_cpu_checkpoint_takes_the_same_way_again(few):
    s, weight, bias = layer(70, 33, 20)
    grad = draw((70, 20))
    wanted = differentiated(snnkern.linear, (s, weight, bias), grad)
    got = differentiated(lambda *t: checkpoint(snnkern.linear, *t, use_reentrant=False), (s, weight, bias), grad)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)) and len(few) == 3


def taken(monkeypatch):
    done = []
    forward = snnkern.backend.cpu.linear_forward
    monkeypatch.setattr(snnkern.backend.cpu, "linear_forward", lambda *a: done.append(1) or forward(*a))
    return done


def test_cpu_few_spikes_and_large_products_alone(monkeypatch):
    """The rule, as the docstring has it."""
    done = taken(monkeypatch)

    def kernels_do(s, outputs=64):
        before = len(done)
        snnkern.linear(s, torch.zeros(outputs, s.shape[-1]))
        return len(done) > before

    assert kernels_do(spikes(4096, 64)) and kernels_do(spikes(4096, 64, rate=0.24))
    assert not kernels_do(spikes(4096, 64, rate=0.26)) and not kernels_do(torch.ones(4096, 64))
    assert (
        not kernels_do(spikes(4095, 64)) and not kernels_do(spikes(9000, 63)) and not kernels_do(spikes(9000, 64), 63)
    )
    assert kernels_do(spikes(64, 4096)) and not kernels_do(spikes(64, 20000))
    late = spikes(4096, 64, rate=0.1)
    late[2048:] = 1  # a sample is of all rows
    assert not kernels_do(late)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (3, 0, 5), (2, 4, 0)])
def test_nothing_is_as_in_pytorch(few, shape):
    s, weight, bias = torch.zeros(shape), draw((6, shape[-1])), draw((6,))
    assert torch.equal(snnkern.linear(s, weight, bias), F.linear(s, weight, bias)) and not few
    assert snnkern.linear(spikes(4, 5), torch.zeros(0, 5)).shape == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_pytorchs(few, dtype):
    tensors = [t.detach().to(dtype) for t in layer(70, 33, 20)]
    assert torch.equal(snnkern.linear(*tensors), F.linear(*tensors)) and not few


def test_what_is_not_plain_is_pytorchs(few):
    s, weight, bias = (t.detach() for t in layer(70, 33, 20))
    across = s.t().contiguous().t()
    assert torch.equal(snnkern.linear(across, weight, bias), F.linear(across, weight, bias))
    assert torch.func.vmap(lambda row: snnkern.linear(row, weight, bias))(s).shape == (70, 20)
    with torch.device("meta"):
        assert snnkern.linear(torch.empty(70, 33), torch.empty(20, 33)).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert snnkern.linear(s, weight, bias).dtype == torch.bfloat16
    compiled = torch.compile(snnkern.linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(s, weight, bias), F.linear(s, weight, bias))
    assert not few
    double = [t.double().requires_grad_() for t in (s[:5], weight, bias)]
    assert torch.autograd.gradcheck(snnkern.linear, double) and torch.autograd.gradgradcheck(snnkern.linear, double)


def test_the_reference_backend_is_pytorchs(few, monkeypatch):
    monkeypatch.setenv("SNNKERN_BACKEND", "reference")
    s, weight, bias = layer(70, 33, 20)
    assert torch.equal(snnkern.linear(s, weight, bias), F.linear(s, weight, bias)) and not few


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1, 1)), TypeError, "spikes must be a tensor, got list"),
        ((torch.zeros(2, 3), None), TypeError, "weight must be a tensor, got NoneType"),
        ((torch.zeros(2, 3), torch.zeros(4, 3), 1.0), TypeError, "bias must be a tensor or None, got float"),
        ((torch.zeros(2, 3), torch.zeros(3)), ValueError, r"weight must be \[outputs, inputs\], got shape \(3,\)"),
        ((torch.zeros(2, 3), torch.zeros(4, 2)), ValueError, r"spikes must be \[..., 2\] .* got shape \(2, 3\)"),
        ((torch.zeros(()), torch.zeros(4, 2)), ValueError, r"spikes must be \[..., 2\] .* got shape \(\)"),
        ((torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3)), ValueError, r"bias must be \[4\] .* got shape \(3,\)"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        snnkern.linear(*arguments)


# The modules


def test_linear_is_pytorchs_module():
    torch.manual_seed(0)
    ours = Linear(70, 128)
    theirs = nn.Linear(70, 128)
    theirs.load_state_dict(ours.state_dict())
    x = draw((3, 70))
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x, add_bias=False), F.linear(x, theirs.weight))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_lif_is_its_two_layers(bias):
    torch.manual_seed(0)
    fused = LinearLIF(12, 7, bias, decay=0.9)
    torch.manual_seed(0)
    plain = nn.Linear(12, 7, bias)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, fused.state_dict()[key]) for key, value in plain.state_dict().items())
    x, residual = draw((20, 3, 12)) * 3, draw((20, 3, 7))
    for rest in ({}, {"residual": residual}, {"steps_out": 4}):
        got, wanted = fused(x, **rest), LIF(decay=0.9)(plain(x), **rest)
        assert torch.equal(got, wanted) and 0 < got.mean()
    weight = draw(got.shape, seed=4)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    for one, other in zip(
        plain.parameters(), [fused.get_parameter(n) for n, _ in plain.named_parameters()], strict=True
    ):
        assert (one.grad - other.grad).norm() <= GRADIENT_BOUND[torch.float32] * one.grad.norm()
    assert repr(fused) == f"LinearLIF(12, 7, {'bias=(7,), ' if bias else ''}decay=0.9)"


def test_linear_lif_carries_its_state_and_names_its_arguments():
    layer, x = LinearLIF(12, 7, decay=0.9), draw((20, 3, 12)) * 3
    with snnkern.nn.carried(layer):
        parts = [layer(part) for part in x.split(8)]
    assert torch.equal(torch.cat(parts), layer(x))
    with pytest.raises(TypeError, match=r"lif must be plain neurons .* got bias, weight"):
        snnkern.nn.BNLIF(7, layer)
    with pytest.raises(TypeError, match="bias must be True or False, got None"):
        LinearLIF(12, 7, None)
    with pytest.raises(ValueError, match="out_features must be at least 1, got 0"):
        LinearLIF(12, 0)
    with pytest.raises(ValueError, match="decay must be in"):
        LinearLIF(12, 7, decay=2.0)
    assert LinearLIF(12, 7, dtype=torch.float64).bias.dtype == torch.float64


def test_linear_lif_costs_what_its_two_layers_cost():
    torch.manual_seed(0)
    fused = nn.Sequential(LinearLIF(12, 7, decay=0.9), LinearLIF(7, 5, decay=0.9))
    plain = nn.Sequential(nn.Linear(12, 7), LIF(decay=0.9), nn.Linear(7, 5), LIF(decay=0.9))
    for i, layer in enumerate(fused):
        plain[2 * i].load_state_dict(layer.state_dict())
    x = draw((20, 3, 12)) * 3
    found, wanted = (analysis.energy(layers, x) for layers in (fused, plain))
    assert found.macs == wanted.macs == 12 * 7 + 7 * 5
    assert found.joules == wanted.joules and [*found.rates.values()] == [*wanted.rates.values()]
    assert 0 < found.layers[1].rate < 1


@pytest.mark.parametrize("neuron", [LIF, lambda: LIF(bias=torch.ones(16)), lambda: RecurrentLIF(16), nn.ReLU])
def test_neurons_behind_a_linear_layer_receive_its_bias_once(neuron):
    torch.manual_seed(0)
    linear, neurons = Linear(12, 16), neuron()
    x = draw((5, 3, 12)) * 3
    for steps in (5, 8):
        wanted = neurons(snnkern.ttm(linear(x), steps))
        assert torch.equal(fire_behind(linear, neurons, x, steps), wanted)
        assert torch.equal(fire_behind(linear, neurons, x, steps, 4), snnkern.ttm(wanted, 4))


def test_mlp_trains_by_the_kernels(monkeypatch):
    """At the sizes of the paper, of its first layer PyTorch's product."""
    done = taken(monkeypatch)
    torch.manual_seed(0)
    model = SpikingMLP()
    for name, p in model.named_parameters():
        if p.dim() == 2 and name != "head.weight":
            nn.init.normal_(p, std=2 / p.shape[1] ** 0.5)
    x, grad = draw((300, 4, 70)), draw((300, 4, 20))
    results = []
    for smallest in (kernels.SMALLEST, 1 << 60):
        monkeypatch.setattr(kernels, "SMALLEST", smallest)
        y = model(x)
        results.append((y, *torch.autograd.grad(y, list(model.parameters()), grad)))
    assert len(done) == 2
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
