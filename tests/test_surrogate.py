"""The surrogate objects: values from the literature, and that formula, antiderivative and text agree."""

import copy
import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import snnkern
from snnkern import surrogate
from snnkern.surrogate import (
    ATan,
    Dspike,
    Erf,
    Exponential,
    Rectangle,
    Sigmoid,
    SoftSign,
    SuperSpike,
    Surrogate,
    Table,
    Triangle,
    from_spikingjelly,
)

ALL = [cls() for cls in Surrogate.__subclasses__() if getattr(cls, "_triton", None)]
ALL += [
    Triangle(0.4),
    Triangle(0.5, 1.0),
    Rectangle(0.6),
    Dspike(4.0, 0.7),
    ATan(3.0),
    SuperSpike(2.0),
    Exponential(5.0),
]
X = torch.linspace(-3, 3, 1201, dtype=torch.float64) + 1e-4  # off every kink


@pytest.mark.parametrize("s", ALL, ids=str)
def test_grad_is_the_derivative_of_the_primitive(s):
    x = X.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(s.primitive(x).sum(), x)
    assert torch.allclose(derivative, s.grad(X), rtol=1e-12, atol=1e-14)
    assert s.primitive(torch.zeros(1)).item() == 0.5


@pytest.mark.parametrize("s", ALL, ids=str)
def test_grad_is_even_and_vanishes_far_away(s):
    assert torch.allclose(s.grad(X), s.grad(-X), rtol=0, atol=0)
    assert (s.grad(X) >= 0).all()
    assert s.grad(torch.tensor([math.inf, -math.inf])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("s", [Triangle(0.3), Rectangle(2.0), Dspike(1.0), Dspike(9.0, 0.5)], ids=str)
def test_compact_surrogates_have_area_one(s):
    edge = torch.tensor([10.0], dtype=torch.float64)
    assert (s.primitive(edge) - s.primitive(-edge)).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "temperature, peak, edge",
    [(0.2, 1.0033, 0.9934), (1, 1.0820, 0.8509), (2, 1.3130, 0.5514), (4, 2.0746, 0.1466), (10, 5.0005, 0.0009)],
)
def test_dspike_has_the_published_peaks_and_edges(temperature, peak, edge):
    values = Dspike(float(temperature)).grad(torch.tensor([0.0, 0.5, -0.5, 0.500001], dtype=torch.float64))
    assert values[:3].tolist() == pytest.approx([peak, edge, edge], abs=6e-5)
    assert values[3] == 0


def test_dspike_tends_to_the_rectangle():
    inside = X.abs() < 0.5
    assert torch.allclose(Dspike(1e-3).grad(X), inside.double(), atol=1e-6)


def test_the_three_published_triangles_coincide_at_threshold_one():
    u = X + 1
    tet = (1 - (u - 1).abs()).clamp(min=0)
    bellec = (1 - (u / 1 - 1).abs()).clamp(min=0)
    assert torch.allclose(Triangle().grad(X), tet) and torch.allclose(Triangle().grad(X), bellec)
    half = 1 - ((X + 0.5) / 0.5 - 1).abs()
    assert torch.allclose(Triangle(0.5, peak=1.0).grad(X), half.clamp(min=0))


def test_edges_of_the_rectangle_are_outside():
    assert Rectangle(1.0).grad(torch.tensor([0.5, 0.49999, -0.5])).tolist() == [0.0, 1.0, 0.0]


def test_peaks():
    zero = torch.zeros(1, dtype=torch.float64)
    peaks = {
        Triangle(0.5): 2,
        Rectangle(0.5): 2,
        Sigmoid(4.0): 1,
        ATan(2.0): 1,
        Exponential(3.0): 1.5,
        SoftSign(2.0): 1,
    }
    peaks |= {SuperSpike(3.0): 3, Erf(2.0): 2 / math.sqrt(math.pi), Triangle(0.5, 0.3): 0.3}
    for s, peak in peaks.items():
        assert s.grad(zero).item() == pytest.approx(peak), s


@pytest.mark.parametrize("s", ALL, ids=str)
def test_objects_are_values(s):
    assert s == surrogate.parse(s.text) and hash(s) == hash(surrogate.parse(s.text))
    assert s == dataclasses.replace(s)
    assert type(s).__name__ in repr(s) and str(next(iter(dataclasses.asdict(s).values()))) in repr(s)
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.alpha = 1.0


def test_all_are_public_and_have_a_kernel():
    names = [cls.__name__ for cls in Surrogate.__subclasses__() if cls.__module__ == surrogate.__name__]
    names.remove("_Smooth")  # which has none
    assert set(names) <= set(surrogate.__all__)
    assert set(names) == set(snnkern._C.surrogates)


def test_different_parameters_differ():
    assert Triangle(1.0) != Triangle(0.5) and ATan() != Sigmoid() and SoftSign(1.0) != SuperSpike(1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 5e-324, 1e38])
def test_parameters_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        ATan(value)


@pytest.mark.parametrize("value", ["1", None, True, np.True_, np.array(1.0), [1.0]], ids=repr)
def test_parameters_must_be_floats(value):
    with pytest.raises(TypeError, match="gamma must be a float"):
        Triangle(value)


@pytest.mark.parametrize("value", [2, np.float32(2), np.float64(2), np.int64(2), Fraction(2)], ids=repr)
def test_parameters_are_any_real_number(value):
    assert Triangle(value) == Triangle(2.0) and Triangle(value).text == Triangle(2.0).text
    assert type(ATan(value).alpha) is float


class Named(ATan):
    """Another name for ATan."""


@dataclasses.dataclass(frozen=True)
class Sharp(ATan):
    """ATan with another default."""

    alpha: float = 5.0


class Doubled(ATan):
    def grad(self, x):
        return 2 * super().grad(x)


class Cosine(Surrogate):
    """Of one's own, without parameters."""

    def grad(self, x):
        return torch.cos(x).clamp(min=0)


def weight(**options):
    """What every input weighs in a sum of spikes."""
    x = torch.linspace(-2, 3, 60).view(20, 3).requires_grad_()
    return torch.autograd.grad(snnkern.lif(x, **options)[0].sum(), x)[0]


@pytest.mark.parametrize("mine, known", [(Named(3.0), ATan(3.0)), (Sharp(), ATan(5.0))], ids=repr)
def test_a_subclass_that_changes_no_formula_runs_as_what_it_is_of(mine, known):
    assert torch.equal(weight(surrogate=mine), weight(surrogate=known))
    compiled = torch.compile(lambda x: snnkern.lif(x, surrogate=mine)[1], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X.float()), snnkern.lif(X.float())[1])
    assert surrogate.parse(mine.text) == known


@pytest.mark.parametrize("mine", [Doubled(), Cosine()], ids=lambda mine: type(mine).__name__)
def test_formulas_of_ones_own_run_on_the_reference_alone(mine):
    got = weight(surrogate=mine, detach_reset=True, backend="reference", decay=0.0)
    h = torch.linspace(-2, 3, 60).view(20, 3)
    assert torch.allclose(got, mine.grad(h - 1))
    message = "surrogate: no kernel knows the formulas of .*backend='reference' runs them"
    for call in (weight, lambda **options: snnkern.lif(torch.zeros(3, 4), **options)):
        with pytest.raises(TypeError, match=message):
            call(surrogate=mine)
    with FlopCounterMode(display=False), pytest.raises(TypeError, match=message):
        snnkern.lif(torch.zeros(3, 4), surrogate=mine)


def test_what_is_no_surrogate_is_told_all_there_are():
    with pytest.raises(TypeError, match="surrogate_function must be a snnkern") as error:
        snnkern.lif(torch.zeros(3, 4), surrogate="triangle")
    assert all(type(s).__name__ in str(error.value) for s in ALL)


def test_called_it_is_a_spike_with_that_gradient():
    x = torch.tensor([-0.5, 0.0, 0.25], requires_grad=True)
    s = Triangle()(x)
    s.sum().backward()
    assert s.tolist() == [0, 0, 1] and x.grad.tolist() == [0.5, 1.0, 0.75]


# Functions of one's own


def draw(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.exp(-(ctx.saved_tensors[0] ** 2))


def straight_through(x):
    smooth = (x.clamp(-1, 1) + 1) / 2
    return ((x > 0).to(x.dtype) - smooth).detach() + smooth


@dataclasses.dataclass(frozen=True)
class Own(Surrogate):
    width: float = 0.75

    def grad(self, x):
        return (x.abs() < self.width).to(x.dtype)


@pytest.mark.parametrize(
    ("function", "formula", "bound"),
    [
        (lambda x: torch.exp(-x * x), lambda x: torch.exp(-x * x), 5e-6),
        (Spike.apply, lambda x: torch.exp(-x * x), 5e-6),
        (straight_through, lambda x: (x.abs() <= 1) / 2, 0.0),  # a jump where cells meet
        (lambda x: torch.where(x > 0, 0.25, 1.0), lambda x: torch.where(x > 0, 0.25, 1.0), 0.0),
        (Own(), Own().grad, 0.0),
        (Sigmoid(3.0), Sigmoid(3.0).grad, 1e-4),
    ],
    ids=["lambda", "autograd.Function", "straight through", "jump at 0", "Surrogate", "ours"],
)
def test_a_table_is_the_function(function, formula, bound):
    table, x = Table(function), draw((1000,), torch.float64) * 3
    assert (table.grad(x) - formula(x)).abs().max() <= bound + 1e-12
    assert table.error <= 2 * bound + 1e-12 and f"error={table.error:.1g}" in repr(table)
    assert torch.equal(copy.deepcopy(table).grad(x), table.grad(x))


def test_a_table_has_an_antiderivative_and_ends():
    table = Table(lambda x: torch.where(x < 0, 0.5, 2.0 * x).clamp(max=3.0), 2.0)
    x = torch.tensor([-9.0, -1.01, 0.3, 1.2, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(table.primitive, (x,))
    assert torch.allclose(table.grad(x), torch.tensor([0.5, 0.5, 0.6, 2.4, 3.0], dtype=torch.float64))
    assert table.primitive(torch.zeros((), dtype=torch.float64)) == 0.5
    assert table.grad(torch.tensor([math.nan, math.inf, -math.inf])).tolist() == [0.0, 0.0, 0.0]


def test_tables_find_their_width_and_tell_their_error():
    assert Table(lambda x: 1 / (1 + 25 * x.abs()) ** 2).half_width < 2
    with pytest.warns(RuntimeWarning, match="sampled with a large error"):
        from_spikingjelly(lambda x: ((x > 0).double() - torch.sin(4000 * x)).detach() + torch.sin(4000 * x))
    for function in (torch.sigmoid, torch.nn.Identity(), lambda x: torch.exp(-x * x)):
        with pytest.raises(TypeError, match="surrogate_function must be a spike, which steps from 0 to 1"):
            from_spikingjelly(function)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "function must be callable"),
        ((torch.sum,), TypeError, "must return a tensor of the shape of x"),
        ((lambda x: (x > 0).double(),), TypeError, "a step without a derivative"),
        ((lambda x: x / 0,), ValueError, "must have a finite derivative"),
        ((lambda x, y: x,), TypeError, "cannot be sampled"),
        ((torch.exp, -1.0), ValueError, "half_width must be positive"),
        ((torch.exp, 1.0, 3), ValueError, "cells must be an even int"),
    ],
)
def test_what_no_table_is_made_of(arguments, error, message):
    with pytest.raises(error, match=message):
        Table(*arguments)


def test_parameters_may_be_tensors_that_change():
    temperature = torch.tensor(1.0)
    live, x = Dspike(temperature), draw((6, 40)).requires_grad_()
    for value in (1.0, 7.0):
        temperature.fill_(value)
        assert live.now() == Dspike(value)
        gradients = [torch.autograd.grad(snnkern.lif(x, surrogate=s)[0].sum(), x)[0] for s in (live, Dspike(value))]
        assert torch.equal(*gradients)
    for value in (torch.ones(2), torch.ones((), dtype=torch.int64), torch.ones((), device="meta")):
        with pytest.raises(TypeError, match="floating tensor of one number on the CPU"):
            Dspike(value)
    with pytest.raises(TypeError, match="peak must be given"):
        Triangle(torch.ones(()))


def test_a_schedule_compiles_once():
    temperature = torch.tensor(1.0)
    live, x = Dspike(temperature), draw((6, 40)).requires_grad_()
    compiled = torch.compile(lambda x: snnkern.lif(x, surrogate=live)[0], fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (1.0, 7.0):
            temperature.fill_(value)
            wanted = torch.autograd.grad(snnkern.lif(x, surrogate=Dspike(value))[0].sum(), x)[0]
            assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], wanted)


def test_a_table_compiles():
    table, x = Table(Spike.apply), draw((20, 40)).requires_grad_()
    compiled = torch.compile(lambda x: snnkern.lif(x, surrogate=table)[0], fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(snnkern.lif(x, surrogate=table)[0].sum(), x)[0]
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], wanted)


def test_smooth_spikes_run_on_the_reference(recwarn):
    smooth = pytest.importorskip("spikingjelly.activation_based.surrogate").Sigmoid(spiking=False)
    x = draw((5, 20)).requires_grad_()
    for _ in range(2):
        y, _ = snnkern.lif(x, surrogate=smooth, reset=None)
    wanted = snnkern.nn.SmoothLIF(Sigmoid(4.0), reset=None)(x)
    assert torch.allclose(y, wanted) and torch.allclose(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, wanted)))
    assert sum("spiking=False" in str(w.message) for w in recwarn) <= 1
    with pytest.raises(ValueError, match="backend must be None or 'reference'"):
        snnkern.lif(x, surrogate=smooth, backend="cpu")


def test_dspike_in_a_region_is_seenns():
    def seenn(x, region, temp):  # its formula
        return torch.tanh(temp * x.clamp(-region, region)) / (2 * math.tanh(region * temp)) + 0.5

    x = draw((1000,), torch.float64).requires_grad_()
    wanted = torch.autograd.grad(seenn(x, 0.75, 3.0).sum(), x)[0]
    assert torch.allclose(Dspike.in_region(0.75, 3.0).grad(x.detach()), wanted, rtol=1e-12)


def test_fast_sigmoid_is_snntorchs():
    theirs = pytest.importorskip("snntorch.surrogate")
    x = draw((1000,), torch.float64).requires_grad_()
    wanted = torch.autograd.grad(theirs.fast_sigmoid(25)(x).sum(), x)[0]
    assert torch.allclose(surrogate.fast_sigmoid(25.0).grad(x.detach()), wanted, rtol=1e-12)
