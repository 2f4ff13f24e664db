"""The op ``recurrent_lif`` and its layer: the reference against a loop of dense layers and finite differences, and
every backend against the reference."""

import math

import pytest
import torch
from conftest import BACKENDS, EMULATED, GRADIENT_BOUND, INTERPRETED, assert_gradients_close
from test_lif import draw, moved
from test_neurons import LEAKS, SPIKES, named, pairwise
from torch.nn.functional import linear

import snnkern
from snnkern.backend.reference import lif as reference
from snnkern.nn import RecurrentLIF
from snnkern.spec.layout import state_dtype
from snnkern.spec.neuron import GIVEN, new_spec
from snnkern.surrogate import ATan, Integer, Sigmoid, Table, Triangle

pytestmark = pytest.mark.usefixtures("poison")

FEW = INTERPRETED or EMULATED
STATES = {
    "plain": {},
    "synaptic": {"synapse_decay": 0.75},
    "adaptive": {"threshold_decay": 0.75, "threshold_jump": 0.09},  # ternary spikes leave it above 0
    "both": {"synapse_decay": 0.6, "threshold_decay": 0.5, "threshold_jump": 0.15},
}
KINDS = {  # of a parameter, from the shape of x without time
    "neuron": lambda shape: shape[-1:],
    "each": lambda shape: shape,
    "layer": lambda shape: (*shape[:-1], 1),
}
LAYOUTS = {  # x of t steps of layers of h neurons, and its dimension of time
    "TNH": lambda t, h: (draw((t, 3, h)), 0),
    "NTH": lambda t, h: (draw((3, t, h)), 1),
    "NHT": lambda t, h: (draw((3, h, t)), -1),
    "TH": lambda t, h: (draw((t, h)), 0),
    "TABH": lambda t, h: (draw((t, 2, 2, h)), 0),
    "ATBH": lambda t, h: (draw((2, t, 2, h)), 1),
    "batch outside": lambda t, h: (draw((3, t, h)).transpose(0, 1), 0),
    "neurons outside": lambda t, h: (draw((h, t, 3)).permute(1, 2, 0), 0),
    "sliced": lambda t, h: (draw((t, 3, h + 1))[..., 1:], 0),
    "repeated": lambda t, h: (draw((1, 3, h)).expand(t, 3, h), 0),
}


def weight_of(size, dtype=torch.float32, device="cpu", gain=1.5, seed=5):
    return draw((size, size), dtype, device, seed).mul(gain * size**-0.5).requires_grad_()


def without_time(x, time_dim):
    return x.select(time_dim, 0).shape


def parameter(kind, shape, low, high, dtype, device):
    drawn = torch.rand(KINDS[kind](shape), generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return (drawn * (high - low) + low).to(dtype).to(device).requires_grad_()


def states_of(x, time_dim, neuron):
    """As many as these neurons have."""
    count = 1 + ("synapse_decay" in neuron) + ("threshold_decay" in neuron)
    shape = without_time(x, time_dim)
    return [draw(shape, state_dtype(x.dtype), x.device, 20 + i).requires_grad_() for i in range(count)]


def as_v(states):
    return states[0] if len(states) == 1 else tuple(states)


def as_states(v):
    return [v] if isinstance(v, torch.Tensor) else list(v)


def spikes_before(x, time_dim, neuron):
    """Some, of a kind that these neurons have."""
    drawn = (draw(without_time(x, time_dim), seed=8) > 0.3).float()
    if neuron.get("ternary"):
        drawn = drawn * draw(drawn.shape, seed=9).sign()
    elif isinstance(neuron.get("surrogate"), Integer):
        drawn = 2 * drawn
    return drawn.to(x.dtype).to(x.device).requires_grad_()


def outcome(backend, x, weight, v, s, inputs, grads, **neuron):
    """Spikes, states, and the gradients of ``inputs``."""
    spikes, v = snnkern.recurrent_lif(x, weight, None if v is None else as_v(v), s, backend=backend, **neuron)
    outputs = [spikes, *as_states(v)]
    gradients = torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in outputs], gradients  # one step without s has no use for the weight


def check(backend, x, weight, v=None, s=None, parameters=(), time_dim=0, **neuron):
    """Runs the backend and the reference; returns what the backend made."""
    x = x.detach().requires_grad_()
    inputs = [x, weight, *(v or ()), *(() if s is None else (s,)), *parameters]
    count = len(states_of(x, time_dim, neuron))
    grads = [draw(x.shape, x.dtype, x.device, 2)]
    shape = without_time(x, time_dim)
    grads += [draw(shape, state_dtype(x.dtype), x.device, 3 + i) for i in range(count)]
    given = x, weight, v, s, inputs, grads
    got, wanted = (outcome(name, *given, time_dim=time_dim, **neuron) for name in (backend, "reference"))
    assert got[0][0].dtype == x.dtype and got[0][0].shape == x.shape and torch.equal(got[0][0], wanted[0][0]), "spikes"
    for i, (a, b) in enumerate(zip(got[0][1:], wanted[0][1:], strict=True)):
        assert a.dtype == state_dtype(x.dtype) and torch.equal(a, b), f"state {i}"
    for g, w, of in zip(got[1], wanted[1], inputs, strict=True):
        if of is weight and x.element_size() == 2:  # a product of 16-bit gradients, which may cancel
            assert g.dtype == w.dtype and g.shape == w.shape and g.isfinite().all()
            error, norm = (g.double() - w.double()).norm(), w.double().norm()
            assert error <= 4 * GRADIENT_BOUND[x.dtype] * norm, f"weight: relative error {error / norm:.2e}"
        else:
            assert_gradients_close(g, w)
    return got


# The reference itself


class Fire(torch.autograd.Function):
    """A step, whose derivative is that of ``arctan(pi x) / pi``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + (math.pi * x) ** 2)


def dense_loop(x, weight, bias, v, i, a, s, hard):
    """A recurrent layer of adaptive neurons with a synaptic current, as one writes it with dense layers."""
    spikes = []
    for x_t in x:
        i = 0.6 * i + x_t + linear(s, weight, bias)
        h, threshold = 0.8 * v + i, 0.7 + 0.2 * a
        s = Fire.apply(h - threshold)
        v = h * (1 - s) + 0.1 * s if hard else h - threshold * s
        a = 0.9 * a + s
        spikes.append(s)
    return torch.stack(spikes), v, i, a


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("name", ["reference", *([] if FEW else ["cpu"])])
def test_a_loop_of_dense_layers_has_the_same_gradients(name, hard):
    x, weight = draw((20, 4, 9), torch.float64).requires_grad_(), weight_of(9, torch.float64)
    bias, *states = (draw((9,), torch.float64, seed=6).requires_grad_(), *(draw((4, 9), torch.float64, seed=i)
                     .requires_grad_() for i in (7, 8, 9)))  # fmt: skip
    s = (draw((4, 9), torch.float64, seed=10) > 0).double().requires_grad_()
    neuron = {"decay": 0.8, "threshold": 0.7, "reset": 0.1 if hard else None, "surrogate": ATan(), "bias": bias}
    neuron |= {"synapse_decay": 0.6, "threshold_decay": 0.9, "threshold_jump": 0.2}
    spikes, last = snnkern.recurrent_lif(x, weight, tuple(states), s, backend=name, **neuron)
    got, wanted = [spikes, *last], dense_loop(x, weight, bias, *states, s, hard)
    grads = [draw(t.shape, t.dtype, seed=30 + i) for i, t in enumerate(got)]
    inputs = [x, weight, bias, *states, s]
    assert 0.1 < spikes.mean() < 0.9
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(got, inputs, grads), torch.autograd.grad(wanted, inputs, grads), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(FEW, reason="nothing here depends on the kernels")
@pytest.mark.parametrize(
    "case",
    pairwise(leak=LEAKS[:4:2], spikes=SPIKES, states=list(STATES), surrogate=[Sigmoid(2.0), Triangle(1.5)]),
    ids=named,
)
def test_the_smooth_reference_passes_gradcheck(case):
    x, weight = draw((5, 2, 3), torch.float64).requires_grad_(), weight_of(3, torch.float64)
    neuron = {"decay": None, "tau": None, "decay_input": True, "threshold": 0.7, "surrogate": case["surrogate"]}
    neuron |= {"detach_reset": False, "fire_at_threshold": False}
    spec = new_spec(**{**neuron, **case["leak"], **STATES[case["states"]], **case["spikes"]})
    v, s = draw((spec.states, 2, 3), torch.float64, seed=1), draw((2, 3), torch.float64, seed=2).sigmoid()
    bias = draw((3,), torch.float64, seed=3)

    def smooth(x, weight, v, s, bias):
        v = v if spec.states > 1 else v[0]
        return reference(x, v, spec, 0, smooth=True, bias=bias, weight=weight, s=s)

    inputs = x, weight, v.requires_grad_(), s.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(smooth, inputs, fast_mode=True)


# Every backend against the reference

CASES = pairwise(
    leak=LEAKS,
    spikes=SPIKES,
    states=list(STATES),
    kind=list(KINDS),
    threshold=[0.7, GIVEN],
    bias=[False, True],
    v_min=[None, -0.5],
    detach_reset=[False, True],
    fire_at_threshold=[False, True],
    before=["", "v", "s", "vs"],
    layout=list(LAYOUTS),
    size=[17, 5, 1, 64, 130],
    steps=[35, 1, 7, 16],
    dtype=[torch.float32, torch.float64, torch.float16, torch.bfloat16],
)
CASES = CASES[:: 8 if FEW else 1]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_layer_equals_the_reference(backend, device, case):
    dtype = case["dtype"] if backend == "cpu" or case["dtype"] != torch.float64 else torch.float32
    x, time_dim = LAYOUTS[case["layout"]](case["steps"], case["size"])
    x = moved(x.to(dtype), device)
    state, shape = state_dtype(dtype), without_time(x, time_dim)
    neuron = {**case["leak"], **STATES[case["states"]], "threshold": case["threshold"], "v_min": case["v_min"]}
    neuron |= {"detach_reset": case["detach_reset"], **case["spikes"]}
    neuron["fire_at_threshold"] = case["fire_at_threshold"] and "surrogate" not in case["spikes"]
    ranges = {"tau": (1.2, 3.0), "decay": (0.2, 0.9), "inverse_tau": (0.2, 0.9), "threshold": (0.4, 0.9)}
    ranges["bias"] = -0.5, 0.5
    parameters = {name: parameter(case["kind"], shape, *ranges[name], state, device)
                  for name in ranges if neuron.get(name) is GIVEN or (name == "bias" and case["bias"])}  # fmt: skip
    neuron |= parameters
    v = states_of(x, time_dim, neuron) if "v" in case["before"] else None
    s = spikes_before(x, time_dim, neuron) if "s" in case["before"] else None
    weight = weight_of(case["size"], device=device)
    made, _ = check(backend, x, weight, v, s, list(parameters.values()), time_dim, **neuron)
    assert made[0].any() or x.numel() < 64


@pytest.mark.parametrize("surrogate", [Triangle(2.0), ATan(), Table(torch.cos, 1.0, 64)], ids=str)
@pytest.mark.parametrize("states", ["plain"] if FEW else list(STATES))
def test_surrogates(backend, device, states, surrogate):
    x, neuron = draw((18, 2, 24), device=device), {"surrogate": surrogate, "threshold": 0.7, **STATES[states]}
    check(backend, x, weight_of(24, device=device), states_of(x, 0, neuron), spikes_before(x, 0, neuron), **neuron)


def test_parameters_that_are_numbers_of_no_dimension(backend, device):
    x, weight = draw((18, 2, 24), device=device).abs(), weight_of(24, device=device).detach().abs().requires_grad_()
    parameters = [torch.tensor(n, device=device, requires_grad=True) for n in (0.6, 0.7, -0.3)]
    neuron = {**dict(zip(("decay", "threshold", "bias"), parameters, strict=True)), "detach_reset": True}
    check(backend, x - 0.5, weight, None, None, parameters, **neuron)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_weight_may_have_another_dtype(backend, device, dtype):
    weight = weight_of(24, dtype, device)
    x = draw((18, 2, 24), device=device).requires_grad_()
    loss = [snnkern.recurrent_lif(x, weight, backend=name)[1].square().sum() for name in (backend, "reference")]
    assert torch.equal(*loss)
    got, wanted = (torch.autograd.grad(each, (x, weight)) for each in loss)
    assert got[1].dtype == dtype
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-2 if g.dtype == torch.bfloat16 else 2e-5, atol=1e-6)


@pytest.mark.skipif(FEW, reason="would take minutes")
def test_many_neurons_in_many_layers(backend, device):
    neuron = {"threshold": 1.5, "tau": 2.0}
    check(backend, draw((19, 11, 131), device=device), weight_of(131, device=device), **neuron)
    if backend == "cpu":
        x = draw((18, 2, 1100), device=device)
        check(backend, x, weight_of(1100), None, spikes_before(x, 0, neuron), synapse_decay=0.5, **neuron)


@pytest.mark.parametrize("dtype", [torch.float32] if FEW else [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", list(STATES)[:: 3 if FEW else 1])
def test_parts_of_time_with_what_they_hand_on_equal_the_whole(backend, device, states, dtype):
    dtype = torch.float32 if backend != "cpu" and dtype == torch.float64 else dtype
    neuron = {**STATES[states], "reset": None, "threshold": 0.8, "backend": backend}
    x, weight = draw((41, 2, 13), dtype, device).requires_grad_(), weight_of(13, state_dtype(dtype), device)
    whole, last = snnkern.recurrent_lif(x, weight, **neuron)
    parts, v, s = [], None, None
    for part in x.split([7, 16, 1, 17]):
        spikes, v = snnkern.recurrent_lif(part, weight, v, s, **neuron)
        s = spikes[-1]
        parts.append(spikes)
    parts = torch.cat(parts)
    assert torch.equal(parts, whole) and whole.any()
    assert all(torch.equal(a, b) for a, b in zip(as_states(v), as_states(last), strict=True))
    grads = [draw(whole.shape, dtype, device, 2), *(draw(t.shape, t.dtype, device, 3) for t in as_states(last))]
    got = torch.autograd.grad([parts, *as_states(v)], (x, weight), grads)
    wanted = torch.autograd.grad([whole, *as_states(last)], (x, weight), grads)
    assert wanted[0][:7].norm() > 0
    for g, w in zip(got, wanted, strict=True):
        error = (g.double() - w.double()).norm() / w.double().norm()
        assert error <= 3 * GRADIENT_BOUND[dtype], f"relative error {error:.2e}"


def test_only_one_of_the_outputs_or_inputs_counts(backend, device):
    x, weight = draw((20, 2, 24), device=device), weight_of(24, device=device)
    v, s = states_of(x, 0, {})[0], spikes_before(x, 0, {})
    for wanted, used in (([x], 0), ([weight], 1), ([v], 0), ([s], 1), ([v, s, x], 0)):
        free = [t.detach().requires_grad_(any(t is w for w in wanted)) for t in (x, weight, v, s)]
        inputs = [t for t in free if t.requires_grad]
        got, want = (
            torch.autograd.grad(snnkern.recurrent_lif(*free, backend=name)[used].cos().sum(), inputs)
            for name in (backend, "reference")
        )
        for g, w in zip(got, want, strict=True):
            assert_gradients_close(g, w)


@pytest.mark.parametrize("shape", [(0, 2, 5), (6, 0, 5)], ids=str)
def test_no_steps_or_no_layers(backend, device, shape):
    x, weight = torch.zeros(shape, device=device, requires_grad=True), weight_of(5, device=device)
    neuron = STATES["both"]
    v, s = states_of(torch.zeros((1, *shape[1:]), device=device), 0, neuron), torch.zeros(shape[1:], device=device)
    spikes, last = snnkern.recurrent_lif(x, weight, tuple(v), s, backend=backend, **neuron)
    assert spikes.shape == shape and all(torch.equal(a, b) for a, b in zip(last, v, strict=True))
    loss, unused = spikes.sum() + sum(t.sum() for t in last), {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(loss, (x, weight, *v), **unused)
    assert gradients[0].shape == shape and not gradients[1].any() and all((g == 1).all() for g in gradients[2:])


def test_the_weights_of_silent_neurons_are_not_touched(backend, device):
    x = draw((20, 3, 24), device=device).abs()
    silent = torch.arange(24, device=device) % 3 == 0
    x[..., silent] = -1000.0
    weight = weight_of(24, device=device).detach()
    spikes, v = snnkern.recurrent_lif(x, weight, backend=backend)
    for value in (math.inf, math.nan):
        weight[:, silent] = value
        got = snnkern.recurrent_lif(x, weight, backend=backend)
        assert torch.equal(got[0], spikes) and torch.equal(got[1], v) and v.isfinite().all() and spikes.any()


@pytest.mark.parametrize("states", ["plain", "both"])
def test_infinite_numbers(backend, device, states):
    """They fire, and the neurons recover; weights of both infinities make a sum that is not a number."""
    x = draw((20, 3, 24), device=device)
    x[3], x[7, 1, 5], x[9, 2] = math.inf, math.nan, -math.inf
    neuron = {k: v for k, v in STATES[states].items() if k != "synapse_decay"}  # a current would stay infinite
    leak = torch.full((24,), 0.5, device=device, requires_grad=True)
    weight = weight_of(24, device=device)
    x = x.requires_grad_()
    got, wanted = [], []
    for name, to in ((backend, got), ("reference", wanted)):
        spikes, v = snnkern.recurrent_lif(x, weight, decay=leak, backend=name, **neuron)
        fine = torch.ones(3, dtype=torch.bool, device=device)
        fine[1:] = False
        loss = spikes[:, fine].sum() + sum(t[fine].sum() for t in as_states(v))
        to += [spikes, *as_states(v), *torch.autograd.grad(loss, (x, weight, leak))]
    count = 1 + len(as_states(v))
    for g, w in zip(got[:count], wanted[:count], strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
    assert got[0][3, 0].all() and got[0][4:, 0].any()
    assert_gradients_close(got[count][:, :1], wanted[count][:, :1])
    weight = torch.zeros(24, 24, device=device)
    weight[0, 1], weight[0, 2], weight[3, 1] = math.inf, -math.inf, math.inf
    x = torch.zeros(3, 1, 24, device=device)
    x[0, 0, 1:3] = 2.0
    spikes = snnkern.recurrent_lif(x, weight, backend=backend)[0]
    assert spikes[1].nonzero().tolist() == [[0, 3]]


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, in the interpreter, about the lanes not selected
def test_an_infinite_number_does_to_gradients_what_one_far_away_does(backend, device):
    found, leak = [], torch.full((24,), 0.5, device=device, requires_grad=True)
    weight = weight_of(24, device=device)
    for far in (math.inf, 1e30):
        x = draw((20, 3, 24), device=device)
        x[3, 1:] = far
        x = x.requires_grad_()
        spikes, v = snnkern.recurrent_lif(x, weight, inverse_tau=leak, reset=0.0, backend=backend)
        found.append(torch.autograd.grad(spikes.sum() + v.sum(), (x, weight, leak)))
    for g, wanted in zip(*found, strict=True):
        assert torch.equal(g, wanted) and g.isfinite().all() and g.any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("spikes", SPIKES, ids=str)
def test_a_neuron_of_infinite_threshold_is_silent(backend, device, spikes):
    threshold = torch.full((24,), 0.5, device=device)
    threshold[::3] = math.inf
    threshold.requires_grad_()
    x, weight = draw((20, 3, 24), device=device), weight_of(24, device=device)
    (fired, *states), _ = check(backend, x, weight, threshold=threshold, parameters=(threshold,), **spikes)
    assert not fired[..., ::3].any() and fired.any() and all(t.isfinite().all() for t in states)


def test_runs_are_bit_for_bit_the_same(backend, device):
    x, weight, neuron = draw((33, 6, 40), device=device), weight_of(40, device=device), STATES["both"]
    v, s = states_of(x, 0, neuron), spikes_before(x, 0, neuron)
    grads = [draw(x.shape, device=device, seed=2), *(torch.ones(6, 40, device=device) for _ in v)]
    x = x.requires_grad_()
    given = backend, x, weight, v, s, [x, weight, *v, s], grads
    one, two = (outcome(*given, **neuron) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True))


@pytest.mark.skipif(FEW or "cpu" not in BACKENDS, reason="of the threads of the CPU kernels")
def test_the_number_of_threads_changes_nothing():
    threads, results = torch.get_num_threads(), []
    x, weight, leak = draw((130, 9, 48)).requires_grad_(), weight_of(48), torch.full((48,), 0.7).requires_grad_()
    v, s = states_of(x, 0, {}), spikes_before(x, 0, {})
    grads = [draw(x.shape, seed=2), draw((9, 48), seed=3)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made, gradients = outcome("cpu", x, weight, v, s, [x, *v, s, leak, weight], grads, decay=leak)
            results.append([*made, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for each in results[1:] for a, b in zip(each, results[0], strict=True))


@pytest.mark.parametrize(("binary", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
def test_kept_for_backward_are_x_and_spikes_as_bits(backend, device, binary, dtype):
    x, weight = draw((40, 3, 16), dtype, device).requires_grad_(), weight_of(16, device=device)
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        spikes, _ = snnkern.recurrent_lif(x, weight, ternary=not binary, backend=backend)
    of_spikes = x.numel() // 8 if binary else 4 * x.numel()
    assert sum(kept.values()) - kept[x.data_ptr()] - kept[weight.data_ptr()] == of_spikes + 2 * 4 * 3 * 16
    with torch.no_grad():
        assert torch.equal(snnkern.recurrent_lif(x, weight, ternary=not binary, backend=backend)[0], spikes)


def test_compiles_into_one_graph_with_the_same_results(backend, device):
    def loss(x, weight, v, s, bias):
        spikes, v = snnkern.recurrent_lif(x * 2, weight, v, s, bias=bias, synapse_decay=0.5, backend=backend)
        return (spikes * x).sum() + sum(t.square().sum() for t in v)

    torch.compiler.reset()
    x, weight = draw((20, 2, 8), device=device).requires_grad_(), weight_of(8, device=device)
    v = tuple(states_of(x, 0, {"synapse_decay": 0.5}))
    s, bias = spikes_before(x, 0, {}), draw((8,), device=device, seed=4).requires_grad_()
    got, wanted = (f(x, weight, v, s, bias) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss))
    assert torch.equal(got, wanted)
    inputs = x, weight, *v, s, bias
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert_gradients_close(g, w)


def test_double_backward_is_refused(backend, device):
    x, weight = draw((3, 1, 4), device=device).requires_grad_(), weight_of(4, device=device)
    spikes, _ = snnkern.recurrent_lif(x, weight, backend=backend)
    with pytest.raises(RuntimeError, match="recurrent_lif is once differentiable"):
        torch.autograd.grad(spikes.sum(), x, create_graph=True)


X, W = torch.zeros(4, 2, 3), torch.zeros(3, 3)
ERRORS = {
    "weight must be a tensor, got list": (TypeError, lambda: (X, [[0.0]])),
    "weight must be a floating tensor, got torch.int64": (TypeError, lambda: (X, W.long())),
    r"weight must be \[H, H\] for x with H = 3 neurons, got shape \(3, 4\)": (
        ValueError,
        lambda: (X, torch.zeros(3, 4)),
    ),
    "weight must be on the device of x, cpu, got meta": (ValueError, lambda: (X, W.to("meta"))),
    "s must be a tensor or None, got int": (TypeError, lambda: (X, W, None, 1)),
    "s must be torch.float32 on cpu, as x is, got torch.float64": (TypeError, lambda: (X, W, None, X[0].double())),
    r"s must have the shape of x without time, \(2, 3\), got \(4, 2, 3\)": (ValueError, lambda: (X, W, None, X)),
    "v must be a tensor or None, got tuple": (TypeError, lambda: (X, W, (X[0],))),
    "x must have a dimension of neurons besides time": (ValueError, lambda: (X[:, 0, 0], W)),
}


@pytest.mark.skipif(FEW, reason="nothing here depends on the kernels")
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    error, arguments = ERRORS[message]
    with pytest.raises(error, match=message):
        snnkern.recurrent_lif(*arguments())


@pytest.mark.skipif(FEW, reason="nothing here depends on the kernels")
def test_errors_of_the_other_arguments():
    with pytest.raises(TypeError, match="v must be a tuple of the 3 states of these neurons, or None, got Tensor"):
        snnkern.recurrent_lif(X, W, X[0], **STATES["both"])
    with pytest.raises(TypeError, match="v must be a tuple of the 2 states of these neurons, or None, got 3 of them"):
        snnkern.recurrent_lif(X, W, (X[0],) * 3, synapse_decay=0.5)
    for name in ("steps_out", "return_v"):
        with pytest.raises(TypeError, match=name):
            snnkern.recurrent_lif(X, W, **{name: 2})


# The layer


def test_the_layer_is_the_op(backend, device):
    x, bias = draw((20, 2, 12), device=device), draw((12,), device=device, seed=3)
    layer = RecurrentLIF(12, tau=2.0, synapse_decay=0.5, bias=torch.nn.Parameter(bias), backend=backend).to(device)
    assert layer.weight.shape == (12, 12) and 0 < layer.weight.abs().max() <= 12**-0.5
    neuron = {"tau": 2.0, "synapse_decay": 0.5, "bias": bias, "backend": backend}
    residual = draw(x.shape, device=device, seed=4)
    spikes, _ = snnkern.recurrent_lif(x + residual, layer.weight, **neuron)
    assert torch.equal(layer(x, residual), spikes) and spikes.any()
    assert torch.equal(layer(x, residual, steps_out=5), snnkern.ttm(spikes, 5, backend="reference"))
    layer(x).sum().backward()
    assert layer.weight.grad.any() and layer.bias.grad.any()


def test_the_layer_carries_its_states_and_spikes(backend, device):
    x = draw((20, 2, 12), device=device)
    for neuron in (STATES["plain"], STATES["both"]):
        layer = RecurrentLIF(12, threshold=0.5, backend=backend, **neuron).to(device)
        whole = layer(x)
        assert torch.equal(layer(x), whole)  # nothing stays
        with snnkern.nn.carried(layer):
            assert torch.equal(torch.cat([layer(part) for part in x.split([7, 1, 12])]), whole)
        assert not torch.equal(torch.cat([layer(part) for part in x.split([7, 1, 12])]), whole)


@pytest.mark.skipif(FEW, reason="nothing here depends on the kernels")
def test_the_layer_is_saved_and_says_what_it_is():
    layer, other = RecurrentLIF(5, threshold=0.5), RecurrentLIF(5, threshold=0.5)
    assert list(layer.state_dict()) == ["weight"]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert repr(layer) == "RecurrentLIF(5, threshold=0.5)"
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        RecurrentLIF(0)
    with pytest.raises(ValueError, match=r"weight must be \[H, H\] for x with H = 4"):
        layer(torch.zeros(3, 2, 4))
