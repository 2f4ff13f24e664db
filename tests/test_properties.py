"""Properties of the ops that random calls must have, on every backend that can run: what is equal to the reference, to
another order of the same work, or to its own adjoint.

``calls`` draws a call of ``lif`` as plain data, which hypothesis prints and makes smaller; ``Call`` makes its tensors.
Floats that are not ordinary are among its inputs: denormal, -0.0, infinite, NaN, the largest, next to the threshold.
"""

import math
from itertools import compress, pairwise
from typing import NamedTuple

import judge
import numpy as np
import pytest
import torch
from conftest import EMULATED, GRADIENT_BOUND, INTERPRETED, needs_thorough
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_bn_lif import norm_of
from test_lif import SURROGATES, draw, moved
from test_neurons import sixteenths
from test_recurrent import states_of as recurrent_states_of
from test_recurrent import weight_of
from torch.nn import functional as F

import snnkern
from snnkern.backend import choose
from snnkern.backend.cpu import linear as sparse
from snnkern.backend.reference.bn_lif import normalise
from snnkern.check.calls import BETWEEN
from snnkern.ops.pack import pack, unpack
from snnkern.spec.layout import INTEGERS, state_dtype
from snnkern.spec.neuron import GIVEN
from snnkern.spec.norm import Batch
from snnkern.surrogate import Dspike, Integer, Sigmoid, Table, Triangle

pytestmark = pytest.mark.usefixtures("poison")
FEW = INTERPRETED or EMULATED


def examples(share=1.0):
    """As many of a profile's examples as a property is worth; fewer for an interpreter, at a second for one."""
    share, least = (0.03 * share, 2) if FEW else (share, 10)
    return settings(max_examples=max(least, int(settings.default.max_examples * share)))


# A call, as plain data

KINDS = [*SURROGATES, Triangle(0.5, peak=1.0), Dspike(3.0, 2.0), Dspike(1e4), Sigmoid(1e6), Table(torch.cos, 1.0, 64)]
LEAKS = [{}, *({"decay": d} for d in (0.0, 1.0, 0.9, 1e-40, GIVEN))]
LEAKS += [{"tau": t} for t in (1.0, 2.0, 1.7, 0.75, GIVEN)]
LEAKS += [{"tau": t, "decay_input": False} for t in (math.inf, 1.0, 4.0, 20.0, GIVEN)]
LEAKS += [{"inverse_tau": i, "decay_input": d} for i in (0.0, 0.4, 1.0, GIVEN) for d in (True, False)]
STATES = [
    {},
    {"synapse_decay": 0.6},
    {"synapse_decay": 0.0},
    {"synapse_decay": 1.0},
    {"threshold_decay": 0.75, "threshold_jump": 0.125},
    {"threshold_decay": 1.0, "threshold_jump": 0.0},
    {"synapse_decay": 0.5, "threshold_decay": 0.5, "threshold_jump": 0.25},
]
SPECIAL = ["0", "-0", "inf", "-inf", "nan", "max", "-max", "normal", "denormal", "-denormal"]
SPECIAL += ["threshold", "below", "above", "-threshold", "-below", "-above"]
FINITE = [name for name in SPECIAL if name[-3:] not in ("inf", "nan", "max")]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 0]
STEPS = [1, 2, 3, 15, 16, 17, 31, 33, 40, 0]


def special(name, threshold, dtype):
    """A float by its name; ``below`` is the next one below the threshold."""
    sign, name = (-1, name[1:]) if name[0] == "-" else (1, name)
    at, far = torch.tensor(threshold, dtype=dtype), torch.tensor(math.inf, dtype=dtype)
    known = {"threshold": at, "below": torch.nextafter(at, -far), "above": torch.nextafter(at, far)}
    numbers = torch.finfo(dtype)
    known |= {"inf": math.inf, "nan": math.nan, "max": numbers.max, "0": 0.0}
    known |= {"normal": numbers.tiny, "denormal": numbers.smallest_normal * numbers.eps}
    return sign * float(known[name])


@st.composite
def calls(draw_, steps=tuple(STEPS), numbers=SPECIAL, plain=False):
    """What ``Call`` is made of. ``plain``: neurons of one state whose parameters are numbers."""
    pick = lambda values: draw_(st.sampled_from(list(values)))  # noqa: E731
    case = {"steps": pick(steps), "dtype": pick(DTYPES), "seed": draw_(st.integers(0, 99))}
    case["shape"] = draw_(st.lists(st.sampled_from(SIZES), max_size=3).filter(lambda s: math.prod(s) <= 1100))
    case["time_dim"] = draw_(st.integers(0, len(case["shape"])))
    case["order"] = draw_(st.permutations(range(len(case["shape"]) + 1)))  # of the dimensions in memory
    case["gap"] = draw_(st.integers(0, 2))  # numbers of memory left out in front, and after each innermost row
    case["rounded"], case["offset"] = draw_(st.booleans()), pick([0.0, 0.3, -0.5])
    where = st.tuples(st.integers(0, 4000), st.sampled_from(numbers))
    case["in_x"], case["in_v"] = draw_(st.lists(where, max_size=5)), draw_(st.lists(where, max_size=3))
    case["v"], case["return_v"] = draw_(st.booleans()), pick([True, "sequence", False])
    kind = pick(["binary", "binary", "ternary", "integer"])
    leaks = [leak for leak in LEAKS if GIVEN not in leak.values()] if plain else LEAKS
    neuron = {**pick(leaks), **({} if plain else pick(STATES)), "detach_reset": draw_(st.booleans())}
    neuron["reset"] = None if kind == "integer" else pick([0.0, -0.3, None, 0.25])
    thresholds = [1.0, 0.7, 0.5, *([0.0, -0.2, 1e-40] if kind == "binary" else [])]
    neuron["threshold"] = pick(thresholds if plain else [*thresholds, GIVEN])
    neuron["surrogate"] = pick([Integer(1), Integer(3), Integer(200)] if kind == "integer" else KINDS)
    neuron["fire_at_threshold"] = kind != "integer" and draw_(st.booleans())
    neuron["ternary"] = kind == "ternary"
    neuron["v_min"] = pick([None, None, -0.5, 0.0])
    neuron["bias"] = pick([None, GIVEN])
    case["neuron"], case["mask"] = neuron, draw_(st.integers(0, 7))  # dimensions that a parameter spans
    case["steps_out"] = pick([None, None, 1, 2, 5, case["steps"] + 3]) if case["steps"] else None
    return case


class Call(NamedTuple):
    """Tensors of a call of ``lif``: its arguments, what is differentiated, and the upstream gradients."""

    x: torch.Tensor
    v: torch.Tensor | tuple | None
    neuron: dict
    inputs: list
    grads: list


def laid_out(x, order, gap):
    """x with its dimensions in memory in this order, and ``gap`` numbers left out at places."""
    padded = [*(x.shape[i] for i in order[:-1]), x.shape[order[-1]] + gap]
    memory = torch.full((math.prod(padded) + gap,), 7.0, dtype=x.dtype)[gap:].view(padded)
    view = memory.narrow(-1, 0, x.shape[order[-1]]).permute([list(order).index(i) for i in range(x.dim())])
    return view.copy_(x)


def numbers(shape, case, seed, where, dtype):
    x = draw(shape, torch.float64, seed=case["seed"] + 100 * seed)
    if case["rounded"]:
        x = (x * 8).round() / 8  # meets thresholds
    x = (x + case["offset"]).to(dtype)
    threshold = case["neuron"]["threshold"]
    for at, name in where:
        if x.numel():
            x.view(-1)[at % x.numel()] = special(name, 0.5 if threshold is GIVEN else threshold, dtype)
    return x


def made(case, backend, device):
    """The tensors of a case."""
    dtype = case["dtype"] if backend == "cpu" or case["dtype"] != torch.float64 else torch.float32
    state, shape, front = state_dtype(dtype), case["shape"], case["time_dim"]
    whole = [*shape[:front], case["steps"], *shape[front:]]
    x = laid_out(numbers(whole, case, 0, case["in_x"], dtype), case["order"], case["gap"])
    x = moved(x, device).requires_grad_()
    neuron, inputs = {**case["neuron"]}, [x]
    count = 1 + ("synapse_decay" in neuron) + ("threshold_decay" in neuron)
    v = None
    if case["v"]:
        v = numbers(shape, case, 1, case["in_v"], state)
        v = [v, *(numbers(shape, case, 2 + k, [], state).abs() / 4 for k in range(count - 1))]
        v = [each.to(device).requires_grad_() for each in v]
        inputs += v
        v = v[0] if count == 1 else tuple(v)
    own = [n if case["mask"] >> i & 1 else 1 for i, n in enumerate(shape)] if case["mask"] else []
    for k, (name, between) in enumerate(BETWEEN.items()):
        if neuron.get(name) is GIVEN:
            neuron[name] = sixteenths(own, *between, state, device, k)
            inputs.append(neuron[name])
    steps_out = case["steps_out"]
    if INTERPRETED and steps_out and dtype.itemsize == 2:  # it rounds, by truncating, before gradients cancel
        steps_out = min(steps_out, case["steps"])
    neuron |= {"time_dim": front, "return_v": case["return_v"], "steps_out": steps_out}
    out = [*shape[:front], steps_out or case["steps"], *shape[front:]]
    grads = [draw(out, dtype, device, 5)]
    if case["return_v"] == "sequence":
        grads.append(draw(whole, state, device, 6))
    elif case["return_v"]:
        grads += [draw(shape, state, device, 6 + k) for k in range(count)]
    return Call(x, v, neuron, inputs, grads)


def forward(call, backend):
    """Spikes and states, a list."""
    spikes, v = snnkern.lif(call.x, call.v, backend=backend, **call.neuron)
    return [spikes, *(v if isinstance(v, tuple) else () if v is None else (v,))]


def gradients(outputs, call):
    """Of ``call.inputs``; zeros where nothing comes back."""
    found = [(o, g) for o, g in zip(outputs, call.grads, strict=True) if o.requires_grad]
    if not found:
        return [torch.zeros_like(t) for t in call.inputs]
    outputs, grads = zip(*found, strict=True)
    return torch.autograd.grad(outputs, call.inputs, grads, allow_unused=True, materialize_grads=True)


def assert_same(got, wanted, what):
    """Bit for bit, but that one zero is as good as the other, and any NaN."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, what
    torch.testing.assert_close(got.detach(), wanted.detach(), rtol=0, atol=0, equal_nan=True, msg=lambda m: what + m)


def assert_outputs_same(got, wanted):
    spikes, other = got[0].detach(), wanted[0].detach()
    assert spikes.dtype == other.dtype and spikes.isfinite().all()
    assert torch.equal(spikes.view(INTEGERS[spikes.dtype]), other.view(INTEGERS[spikes.dtype])), "spikes"
    for i, (a, b) in enumerate(zip(got[1:], wanted[1:], strict=True)):
        assert_same(a, b, f"state {i}: ")


def assert_judged(got, call, found, overflows=False):
    """Gradients as the judge has them, number by number: each within the table's bound for its dtype, and for the
    state's times what rounding may do to it. ``overflows``: they may be infinite, or none, all the same, as the
    reference's are."""
    x, states, *parameters = judge.adjoint(found, call.x, call.neuron, call.grads)
    names = ("decay", "tau", "inverse_tau"), ("threshold",), ("bias",)
    given = [any(isinstance(call.neuron.get(name), torch.Tensor) for name in each) for each in names]
    wanted = [x, *(states if call.v is not None else []), *compress(parameters, given)]
    shape = judge.without_time(call.x, call.neuron["time_dim"])
    for g, (value, error), of in zip(got, wanted, call.inputs, strict=True):
        assert g.dtype == of.dtype and g.shape == of.shape
        if of is call.x:
            g = judge.time_first(g, call.neuron["time_dim"])
        else:
            value, error = (t.view(shape).sum_to_size(of.shape) for t in (value, error))
        denormal = [torch.finfo(t).smallest_normal * torch.finfo(t).eps for t in (g.dtype, state_dtype(g.dtype))]
        tiny = denormal[0] + 64 * denormal[1]  # on the way, some of what rounds there
        bound = GRADIENT_BOUND[state_dtype(g.dtype)] * error + GRADIENT_BOUND[g.dtype] * value.abs() + tiny
        off = (g.detach().cpu().double() - value).abs()
        known = (error < torch.finfo(state_dtype(g.dtype)).max) & (value.abs() < torch.finfo(g.dtype).max)
        known &= off.isfinite() | (not overflows)
        wrong = known & ~(off <= bound)
        assert not wrong.any(), f"{g[wrong]} for {value[wrong]}, which may be {bound[wrong]} off"


# Every backend against the reference, and both against the judge


@examples()
@given(case=calls())
def test_a_call_equals_the_reference(backend, device, count, case):
    call = made(case, backend, device)
    got, wanted = forward(call, backend), forward(call, "reference")
    assert_outputs_same(got, wanted)
    found = judge.judge(call.x, call.v, call.neuron)
    assert_found(wanted, found, call)
    count("inputs"), count("floats", call.x.numel())
    got, wanted = gradients(got, call), gradients(wanted, call)
    for g, w in zip(got, wanted, strict=True):
        assert g[w.isfinite()].isfinite().all()
    if case["steps"]:
        assert_judged(got, call, found)
        assert_judged(wanted, call, found, overflows=True)


def assert_found(got, found, call):
    """What ``lif`` returned is what the judge found."""
    front, steps_out = call.neuron["time_dim"], call.neuron["steps_out"]
    shape = judge.without_time(call.x, front)
    of_time = lambda t: torch.from_numpy(t).view(len(t), *shape).movedim(0, front)  # noqa: E731
    if steps_out is None:
        assert_same(got[0].cpu(), of_time(found.spikes).to(got[0].dtype), "spikes")
    if call.neuron["return_v"] == "sequence":
        assert_same(got[1].cpu(), of_time(found.potentials), "potentials")
    elif call.neuron["return_v"]:
        for a, b in zip(got[1:], found.states, strict=True):
            assert_same(a.cpu(), torch.from_numpy(b).view(shape), "state")


@examples(0.25)
@given(case=calls(steps=[2, 5, 16, 17, 33, 40]), cuts=st.sets(st.integers(1, 39), max_size=4))
def test_pieces_of_time_with_what_they_hand_on_equal_the_whole(backend, device, count, case, cuts):
    call = made({**case, "steps_out": None, "return_v": True}, backend, device)
    front, steps = call.neuron["time_dim"], case["steps"]
    bounds = [0, *sorted(cut for cut in cuts if cut < steps), steps]
    pieces, v = [], call.v
    for begin, end in pairwise(bounds):
        spikes, v = snnkern.lif(call.x.narrow(front, begin, end - begin), v, backend=backend, **call.neuron)
        pieces.append(spikes)
    got = [torch.cat(pieces, front), *(v if isinstance(v, tuple) else (v,))]
    assert_outputs_same(got, forward(call, backend))
    found = judge.judge(call.x, call.v, call.neuron)
    assert_judged(gradients(got, call), call, found)
    count("inputs"), count("pieces", len(pieces))


def permuted(t, dims, dim, order):
    """t, which broadcasts to ``dims`` dimensions, in another order along one of them."""
    own = None if t is None else dim - dims + t.dim()
    return t if own is None or own < 0 or t.shape[own] == 1 else t.index_select(own, order)


@examples(0.25)
@given(case=calls().filter(lambda case: case["shape"]), dim=st.integers(0, 2), seed=st.integers(0, 99))
def test_an_order_of_neurons_is_that_of_their_outputs(backend, device, count, case, dim, seed):
    call = made(case, backend, device)
    front, dims = call.neuron["time_dim"], len(case["shape"])
    dim %= dims
    order = torch.randperm(case["shape"][dim], generator=torch.Generator().manual_seed(seed)).to(device)
    of = lambda t: permuted(t, dims, dim, order)  # noqa: E731  # without time
    of_time = lambda t: t.index_select(dim + (front <= dim), order)  # noqa: E731
    v = tuple(of(each) for each in call.v) if isinstance(call.v, tuple) else of(call.v)
    neuron = {name: of(t) if isinstance(t, torch.Tensor) else t for name, t in call.neuron.items()}
    sequence = case["return_v"] == "sequence"
    other = call._replace(x=of_time(call.x), v=v, neuron=neuron, grads=[])
    for g in call.grads:
        other.grads.append(of_time(g) if sequence or not other.grads else of(g))
    outputs, wanted = forward(other, backend), forward(call, backend)
    back = [of_time(wanted[0]), *(of_time(t) if sequence else of(t) for t in wanted[1:])]
    assert_outputs_same(outputs, back)
    count("inputs")
    if case["steps"]:
        found = judge.judge(call.x, call.v, call.neuron)
        assert_judged(gradients(outputs, other._replace(inputs=call.inputs)), call, found)


@examples(0.25)
@given(
    case=calls([49, 64, 100, 129], FINITE if FEW else SPECIAL, plain=True).filter(lambda case: 0 not in case["shape"]),
    length=st.sampled_from([16, 32, 48]),
    warm=st.sampled_from([0, 16, 64]),
)
def test_time_in_segments_equals_the_serial_loop(backend, device, force, count, case, length, warm):
    launches = force(length, warm)
    call = made({**case, "steps_out": None, "return_v": True}, backend, device)
    got = forward(call, backend)
    assert_outputs_same(got, forward(call, "reference"))
    found = judge.judge(call.x, call.v, call.neuron)
    assert_judged(gradients(got, call), call, found)
    assert all(time.segments > 1 for time in launches)
    count("inputs"), count("segments", sum(time.segments for time in launches))


# Linear parts: backward is the adjoint


@examples(0.25)
@given(case=calls(numbers=FINITE[:5], steps=STEPS[:-1]))
def test_below_the_threshold_backward_is_the_adjoint(backend, device, count, case):
    """Where nothing fires, potentials and currents are linear in x, the state and the bias: <J u, w> = <u, J^T w>."""
    silent = {"threshold": 1e30, "reset": None, "surrogate": Triangle(), "ternary": False, "v_min": None}
    call = made({**case, "neuron": {**case["neuron"], **silent}, "return_v": case["return_v"] or True}, backend, device)
    got = forward(call, backend)
    assert not got[0].any()
    products = [(o.double() * g.double()).sum() for o, g in zip(got[1:], call.grads[1:], strict=True)]
    terms = [
        u.double() * g.double()
        for u, g in zip(call.inputs, gradients(got, call), strict=True)
        if not any(u is call.neuron.get(name) for name in ("decay", "tau", "inverse_tau"))
    ]
    error = (sum(products) - sum(t.sum() for t in terms)).abs()
    size = sum(t.abs().sum() for t in terms) + sum(p.abs() for p in products)
    assert error <= GRADIENT_BOUND[call.x.dtype] * size + torch.finfo(call.x.dtype).smallest_normal
    count("inputs")


@examples(0.25)
@given(case=calls(steps=STEPS[:-1]), steps=st.integers(1, 50))
def test_ttm_is_its_backward_turned_round(backend, device, count, case, steps):
    """<ttm(u), w> = <u, ttm(w)>, exactly: of integers whose sums all dtypes have."""
    x = made({**case, "in_x": []}, backend, device).x
    with torch.no_grad():
        x.copy_((x * 2).round().clamp(-3, 3))
    y = snnkern.ttm(x, steps, case["time_dim"], backend=backend)
    assert_same(y, snnkern.ttm(x, steps, case["time_dim"], backend="reference"), "ttm")
    w = (draw(y.shape, device=device, seed=9) * 2).round().clamp(-3, 3).to(y.dtype)
    (back,) = torch.autograd.grad(y, x, w)
    assert_same(back, snnkern.ttm(w, x.shape[case["time_dim"]], case["time_dim"], backend=backend), "backward")
    assert (y.double() * w.double()).sum() == (x.double() * back.double()).sum()
    count("inputs")


@pytest.mark.skipif(FEW, reason="the CPU alone has this kernel")
@examples(0.25)
@given(
    rows=st.integers(1, 150),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 150),
    rate=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    biased=st.booleans(),
    ternary=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_sparse_layer_is_the_dense_one_and_backward_its_adjoint(
    monkeypatch, count, rows, inputs, outputs, rate, biased, ternary, seed
):
    """Exactly: of integers."""
    for name, value in (("SMALLEST", 0), ("NARROWEST", 0), ("DENSEST", 2)):
        monkeypatch.setattr(sparse, name, value)
    integers = lambda *shape: (draw(shape, seed=seed + len(shape)) * 4).round().requires_grad_()  # noqa: E731
    s = (torch.rand(rows, inputs, generator=torch.Generator().manual_seed(seed)) < rate).float()
    s = (s * integers(rows, inputs).detach().sign() if ternary else s).requires_grad_()
    weight, bias = integers(outputs, inputs), integers(outputs) if biased else None
    tensors = [s, weight, *([bias] if biased else [])]
    y = snnkern.linear(s, weight, bias)
    dense = F.linear(*(t if t is None else t.double() for t in (s, weight, bias)))
    assert type(y.grad_fn).__name__ == "_LinearBackward"
    assert torch.equal(y.double(), dense)
    w = integers(rows, outputs).detach()
    back = torch.autograd.grad(y, tensors, w)
    for g, wanted in zip(back, torch.autograd.grad(dense, tensors, w.double()), strict=True):
        assert torch.equal(g, wanted)
    product = ((y if bias is None else y - bias) * w).double().sum()
    assert product == (s * back[0]).double().sum() == (weight * back[1]).double().sum()
    count("inputs")


# What is one call of two


@examples(0.25)
@given(
    steps=st.integers(1, 20),
    samples=st.integers(1, 4),
    channels=st.integers(1, 20),
    space=st.lists(st.integers(1, 9), max_size=2),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
    time_dim=st.integers(0, 1),
    last=st.booleans(),
    given_v=st.booleans(),
    residual=st.booleans(),
    steps_out=st.sampled_from([None, 1, 3, 30]),
    neuron=calls(plain=True).map(lambda case: case["neuron"]),
)
def test_batch_norm_and_neurons_in_one_are_one_after_the_other(
    backend, device, count, steps, samples, channels, space, dtype, training, time_dim, last, given_v, residual,
    steps_out, neuron,
):  # fmt: skip
    dtype = dtype if backend == "cpu" or dtype != torch.float64 else torch.float32
    shape = [samples, channels, *space]
    shape.insert(time_dim, steps)
    assume(math.prod(shape) >= 2 * channels)
    memory = [*range(2), *range(3, len(shape)), 2] if last else range(len(shape))
    y = moved(laid_out((draw(shape) * 2 + 0.5).to(dtype), memory, 0), device)
    residual = draw(shape, dtype, device, seed=7) if residual else None
    v = draw(judge.without_time(y, time_dim), state_dtype(dtype), device, 1) if given_v else None
    neuron = {name: value for name, value in neuron.items() if name != "bias"} | {"time_dim": time_dim}
    norm = norm_of(y)
    x = normalise(y, (*norm[:2], *(p.clone() for p in norm[2:])), Batch(training, 0.1, 1e-5, 1.0, None))
    x = x if residual is None else x + residual.to(x.dtype)
    got = snnkern.bn_lif(y, *norm[:2], *(p.clone() for p in norm[2:]), v, training=training, residual=residual,
                         steps_out=steps_out, backend=backend, **neuron)  # fmt: skip
    wanted = snnkern.lif(x, v, steps_out=steps_out, backend=backend, **neuron)
    assert torch.equal(got[0], wanted[0].to(dtype))
    if dtype != torch.float64:
        assert torch.equal(got[1], wanted[1])
    elif y.numel():  # where statistics are not rounded, the order of sums shows
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-12, atol=1e-12)
    count("inputs")


@examples(0.25)
@given(
    steps=st.sampled_from([1, 2, 7, 16, 17, 33]),
    batch=st.lists(st.integers(1, 4), max_size=2),
    size=st.sampled_from(SIZES[:-1]),
    dtype=st.sampled_from(DTYPES),
    before=st.booleans(),
    cut=st.integers(0, 33),
    neuron=calls(plain=True).map(lambda case: case["neuron"]),
    states=st.sampled_from(STATES),
)
def test_recurrent_layers_equal_the_reference_and_their_pieces(
    backend, device, count, steps, batch, size, dtype, before, cut, neuron, states
):
    dtype = dtype if backend == "cpu" or dtype != torch.float64 else torch.float32
    x, weight = draw((steps, *batch, size), dtype, device), weight_of(size, state_dtype(dtype), device).detach()
    neuron = {name: value for name, value in (neuron | states).items() if name != "bias"}
    v = tuple(t.detach() for t in recurrent_states_of(x, 0, neuron)) if before else None
    v = v[0] if v is not None and len(v) == 1 else v
    s = (draw(x.shape[1:], device=device, seed=8) > 0.3).to(dtype) if before else None
    whole, wanted = (snnkern.recurrent_lif(x, weight, v, s, backend=name, **neuron) for name in (backend, "reference"))
    listed = lambda made: [made[0], *(made[1] if isinstance(made[1], tuple) else made[1:])]  # noqa: E731
    assert_outputs_same(listed(whole), listed(wanted))
    first, v = snnkern.recurrent_lif(x[:cut], weight, v, s, backend=backend, **neuron)
    second, v = snnkern.recurrent_lif(x[cut:], weight, v, first[-1] if len(first) else s, backend=backend, **neuron)
    assert_outputs_same(listed((torch.cat([first, second]), v)), listed(whole))
    count("inputs")


@examples(0.25)
@given(
    n=st.one_of(st.integers(0, 80), st.integers(0, 20000)),
    offset=st.integers(0, 17),
    dtype=st.sampled_from(DTYPES),
    rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_packing_and_unpacking_is_the_identity(backend, device, count, n, offset, dtype, rate, seed):
    dtype = dtype if backend == "cpu" or dtype != torch.float64 else torch.float32
    x = (torch.rand(n + offset, generator=torch.Generator().manual_seed(seed)) < rate).to(dtype).to(device)[offset:]
    kernels = choose(x.device.type, dtype, backend)
    bits = pack(x, kernels)
    assert bits.cpu().numpy().tobytes() == np.packbits((x != 0).cpu().numpy(), bitorder="little").tobytes()
    back = unpack(bits, (n,), dtype, kernels)
    assert back.dtype == dtype and torch.equal(back.view(INTEGERS[dtype]), x.view(INTEGERS[dtype]))
    count("inputs"), count("elements", n)


# One step, for all inputs there are

# A neuron and the potentials before the step; threshold 1.
NEXT = torch.nextafter(torch.tensor(2.0), torch.tensor(3.0)).item()
STEPPED = [
    ({}, [0.0, NEXT, -1.75, 2.0, math.nan, math.inf, 1e-42]),
    ({"reset": None}, [0.5, -math.inf]),
    ({"tau": 2.0}, [0.25, math.inf]),
    ({"tau": 1.7}, [0.25]),
    ({"tau": 3.0, "decay_input": False, "reset": -0.5, "fire_at_threshold": True}, [1.0]),
    ({"ternary": True, "reset": 0.25, "v_min": -2.0, "fire_at_threshold": True}, [0.5]),
    ({"ternary": True, "reset": None}, [-0.75]),
    ({"reset": None, "surrogate": Integer(4), "threshold": 0.7}, [0.5]),
]


def assert_a_step_is_the_references(x, v, neuron, backend):
    spikes, potential = snnkern.lif(x[None], v, backend=backend, **neuron)
    wanted, other = snnkern.lif(x[None], v, backend="reference", **neuron)
    integer = INTEGERS[x.dtype]
    assert torch.equal(spikes.view(integer), wanted.view(integer)), f"spikes, {neuron}, v = {v[0]}"
    if not torch.equal(potential.view(torch.int32), other.view(torch.int32)):  # signs of zeros, bits of a NaN
        assert_same(potential, other, f"{neuron}, v = {v[0]}: ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_for_every_16_bit_input(backend, device, count, dtype):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).to(device)
    for neuron, potentials in STEPPED[1::2] if FEW else STEPPED:
        for v in potentials[: 1 if FEW else None]:
            assert_a_step_is_the_references(x, x.new_full(x.shape, v, dtype=torch.float32), neuron, backend)
            count("floats", len(x))


def test_a_step_for_float32_inputs_of_all_kinds(backend, device, count):
    """Every 65,537th, and all next to 0, to what makes the potential the threshold, to infinity and to the first
    NaN."""
    x = torch.arange(-(1 << 31), 1 << 31, 65537, dtype=torch.int64)
    near = torch.tensor([0.0, 1.0, 0.5, 0.375, 0.75, 0.7, 1.75, 2.0, math.inf]).view(torch.int32).long()
    near = (near[:, None] + torch.arange(-300, 301)).flatten()
    x = torch.cat([x, near, near + (1 << 31)])
    x = x.where(x < 1 << 31, x - (1 << 32)).clamp(min=-(1 << 31)).int().view(torch.float32).to(device)
    x = x[:: 16 if FEW else 1]
    for neuron, potentials in STEPPED[1::2] if FEW else STEPPED:
        for v in potentials[: 1 if FEW else None]:
            assert_a_step_is_the_references(x, torch.full_like(x, v), neuron, backend)
            count("floats", len(x))


EVERY = [(n, v) for k, (n, potentials) in enumerate(STEPPED) for v in potentials[: (3, 1, 0, 1, 0, 1, 0, 1)[k]]]


@needs_thorough
@pytest.mark.skipif(FEW, reason="for compiled kernels: an interpreter would take years")
@pytest.mark.parametrize("neuron, v", EVERY, ids=str)
def test_a_step_for_every_float32_input(backend, device, count, neuron, v):
    """2^32 of them, a part that fits a cache at a time."""
    part = 1 << (17 if device == "cpu" else 26)
    patterns = torch.arange(part, dtype=torch.int32, device=device)
    before = torch.full((part,), v, device=device)
    for first in range(-(1 << 31), 1 << 31, part):
        assert_a_step_is_the_references((patterns + first).view(torch.float32), before, neuron, backend)
    count("floats", 1 << 32)


@pytest.mark.skipif(FEW, reason="nothing here depends on the kernels")
@pytest.mark.parametrize(
    "neuron, message",
    [
        ({"threshold": 1e39}, "threshold must be finite in float32, got 1e[+]39"),
        ({"reset": -1e39}, "reset must be finite in float32, got -1e[+]39"),
        ({"v_min": -1e39}, "v_min must be finite in float32, got -1e[+]39"),
        ({"tau": 1e39}, "tau must be finite in float32, got 1e[+]39"),
        ({"inverse_tau": 1e39}, "inverse_tau must be finite in float32, got 1e[+]39"),
        ({"threshold_decay": 0.5, "threshold_jump": 1e39}, "threshold_jump must be finite in float32, got 1e[+]39"),
        ({"tau": 1e-40}, "tau must be at least 1.17.*e-38, a normal float32, got 1e-40"),
        ({"threshold": 1e-40, "ternary": True}, "threshold must be at least 1.17.*e-38, a normal float32, got 1e-40"),
        ({"threshold": 1e-50, "reset": None, "surrogate": Integer()}, "threshold must be at least .* got 1e-50"),
    ],
    ids=str,
)
def test_numbers_that_float32_does_not_have_are_refused(neuron, message):
    with pytest.raises(ValueError, match=message):
        snnkern.lif(torch.zeros(3, 4), **neuron)


def potential(backend, neuron, device):
    x = torch.tensor([0.5, math.inf, -math.inf, 2.0, 0.25], device=device)[:, None].repeat(1, 40)
    return snnkern.lif(x, backend=backend, return_v="sequence", **neuron)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, in the interpreter, about the lanes not selected
@pytest.mark.parametrize("threshold", [math.inf, -math.inf, math.nan, -1.0])
@pytest.mark.parametrize(
    "neuron",
    [*({"reset": reset, "ternary": ternary} for reset in (0.0, None) for ternary in (False, True)),
     {"reset": None, "surrogate": Integer(3)}],
    ids=str,
)  # fmt: skip
def test_reset_selects_whatever_the_threshold(backend, device, threshold, neuron):
    """A threshold of a tensor, whose numbers nobody checks, or one that adaptation has moved out of range."""
    neuron = {"threshold": torch.tensor(threshold, device=device), **neuron}
    for got, wanted in zip(*(potential(name, neuron, device) for name in (backend, "reference")), strict=True):
        assert_same(got, wanted, "")


def test_tensors_for_an_x_that_is_time_alone(backend, device):
    """A scalar each, as x has no other dimension."""
    x = draw((20,), device=device)
    neuron = {"decay": torch.tensor(0.75, device=device), "bias": torch.tensor(0.25, device=device)}
    got, wanted = (snnkern.lif(x, backend=name, **neuron) for name in (backend, "reference"))
    assert_outputs_same(got, wanted)
