"""Neurons beyond the plain one: parameters that are tensors, ternary and integer spikes, a lower bound, the sequence of
potentials, tables, a bias, a synaptic current, an adaptive threshold: the reference against finite differences,
SpikingJelly's and snnTorch's own classes and loops written out, and every backend against the reference."""

import math
import random
from itertools import combinations

import pytest
import torch
from conftest import BACKENDS, EMULATED, INTERPRETED, assert_gradients_close
from test_bn_lif import check as check_bn_lif
from test_lif import draw, moved, state_of

import snnkern
from snnkern.backend.reference import lif as reference
from snnkern.spec.neuron import GIVEN, new_spec
from snnkern.surrogate import ATan, FastSigmoid, Integer, Sigmoid, Table, Triangle

pytestmark = pytest.mark.usefixtures("poison")

LEAKS = [  # GIVEN: a tensor
    {"decay": 0.9},
    {"decay": GIVEN},
    {"tau": 1.7},
    {"tau": GIVEN},
    {"tau": GIVEN, "decay_input": False},
    {"inverse_tau": 0.4},
    {"inverse_tau": GIVEN},
    {"inverse_tau": GIVEN, "decay_input": False},
    {"tau": math.inf, "decay_input": False},
]
SPIKES = [
    {"reset": -0.3},
    {"reset": None},
    {"reset": -0.1, "ternary": True},
    {"reset": None, "ternary": True},
    {"reset": None, "surrogate": Integer(3)},
]
STATES = [  # besides the potential; the thresholds of integer spikes stay positive
    {},
    {"synapse_decay": 0.6},
    {"threshold_decay": 0.75, "threshold_jump": 0.125},
    {"synapse_decay": 0.5, "threshold_decay": 0.5, "threshold_jump": 0.25},
]
FEW = INTERPRETED or EMULATED
SHAPES = {"scalar": (), "channel": (3, 1), "neuron": (2, 3, -1)}  # of a parameter of x [20, 2, 3, n]


def pairwise(**options):
    """Cases such that any two options occur together in one."""
    draws, cases = random.Random(0), []
    left = {((a, i), (b, j)) for a, b in combinations(options, 2)
            for i in range(len(options[a])) for j in range(len(options[b]))}  # fmt: skip
    while left:
        tried = [[(name, draws.randrange(len(of))) for name, of in options.items()] for _ in range(40)]
        best = max(tried, key=lambda case: len(left & set(combinations(case, 2))))
        left -= set(combinations(best, 2))
        cases.append({name: options[name][i] for name, i in best})
    return cases


def named(case):
    return ", ".join(f"{name}={value}" for name, value in case.items())


def parameter(kind, shape, low, high, dtype, device="cpu"):
    """Of a kind of SHAPES for x without time, multiples of 1/16 in [low, high]."""
    shape = [shape[i] if n < 0 else n for i, n in enumerate(SHAPES[kind])]
    return sixteenths(shape, low, high, dtype, device, len(shape) + 11)


def sixteenths(shape, low, high, dtype, device, seed):
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (high - low) + low
    return drawn.mul(16).round().div(16).to(dtype).to(device).requires_grad_()


def leak_of(form, kind, shape, dtype, device="cpu"):
    """The form with a tensor where one is to be given, and that tensor."""
    for name, value in form.items():
        if value is GIVEN:
            tensor = parameter(kind, shape, *((1.2, 3.0) if name == "tau" else (0.2, 0.9)), dtype, device)
            return {**form, name: tensor}, [tensor]
    return {**form}, []


def states_of(x, states):
    """A start for x without time, [states, ...] or of one state that alone, which is as the potentials of ``draw``."""
    v = state_of(x)
    more = [state_of(x, seed=k).abs().mul(8).round().div(16) for k in range(4, 3 + states)]
    return torch.stack([v, *more]) if more else v


# The reference itself


@pytest.mark.skipif(FEW, reason="nothing here depends on the kernels")
@pytest.mark.parametrize(
    "case",
    pairwise(
        leak=LEAKS,
        kind=list(SHAPES),
        spikes=SPIKES,
        v_min=[None, -0.2],
        threshold=[0.7, *SHAPES],
        surrogate=[Sigmoid(2.0), Triangle(1.5), Table(torch.cos, 1.0, 16)],
        sequence=[False, True],
        states=STATES,
        bias=[None, *SHAPES],
    ),
    ids=named,
)
def test_the_smooth_reference_passes_gradcheck(case):
    x = draw((5, 2, 3, 2), torch.float64).requires_grad_()
    _, leak = leak_of(case["leak"], case["kind"], x.shape[1:], torch.float64)
    given = dict(zip(["leak"], leak, strict=False))
    for name, low, high in (("threshold", 0.4, 0.9), ("bias", -0.3, 0.6)):
        if case[name] in SHAPES:
            given[name] = parameter(case[name], x.shape[1:], low, high, torch.float64)
    neuron = {"decay": None, "tau": None, "decay_input": True, "surrogate": case["surrogate"], "v_min": case["v_min"]}
    neuron |= {"detach_reset": False, "fire_at_threshold": False, **case["leak"], **case["spikes"], **case["states"]}
    spec = new_spec(threshold=GIVEN if "threshold" in given else case["threshold"], **neuron)
    v = states_of(x.detach(), spec.states).requires_grad_()

    def smooth(x, v, *parameters):
        parameters = dict(zip(given, parameters, strict=True))
        return reference(x, v, spec, 0, smooth=True, sequence=case["sequence"], **parameters)

    assert torch.autograd.gradcheck(smooth, (x, v, *given.values()), fast_mode=True)


def theirs(name):
    pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed")
    from spikingjelly.activation_based import neuron, surrogate

    return getattr(neuron, name), surrogate


def run_theirs(node, x):
    """Spikes, potentials after every step, and the gradients of x and of w, if there is one."""
    x = x.clone().requires_grad_()
    node.step_mode, node.store_v_seq = "m", True
    spikes = node(x)
    loss = (spikes * draw(x.shape, seed=2)).sum() + (node.v_seq * draw(x.shape, seed=3)).sum()
    return spikes, node.v_seq, *torch.autograd.grad(loss, [x, *node.parameters()])


def assert_equal_to_theirs(backend, device, node, neuron, x, w=None):
    x = x.to(device).requires_grad_()
    neuron = {"reset": node.v_reset, "threshold": node.v_threshold, "detach_reset": node.detach_reset, **neuron}
    neuron.setdefault("surrogate", node.surrogate_function)
    neuron["fire_at_threshold"] = not isinstance(neuron["surrogate"], Integer)
    spikes, v = snnkern.lif(x, backend=backend, return_v="sequence", **neuron)
    loss = (spikes * draw(x.shape, device=device, seed=2)).sum() + (v * draw(x.shape, device=device, seed=3)).sum()
    gradients = torch.autograd.grad(loss, [x] if w is None else [x, w])
    wanted = run_theirs(node, x.detach().cpu())
    assert torch.equal(spikes.cpu(), wanted[0]) and torch.equal(v.cpu(), wanted[1])
    assert spikes.any() and not spikes.all()
    for got, want in zip(gradients, wanted[2:], strict=True):
        assert_gradients_close(got.cpu(), want)


backends = pytest.mark.parametrize("backend", ["reference"] if FEW else [*BACKENDS, "reference"])


def current(*shape):
    """Multiples of 1/8, which meet thresholds exactly."""
    return (draw(shape) * 12).round() / 8


@backends
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.25, None])
@pytest.mark.parametrize("name", ["IFNode", "TernaryIFNode", "TernaryLIFNode"])
def test_neurons_equal_spikingjellys(backend, device, name, v_reset, detach_reset):
    make, _ = theirs(name)
    for decay_input in (True, False) if name == "TernaryLIFNode" else (None,):
        leaks = {} if decay_input is None else {"tau": 1.7, "decay_input": decay_input}
        node = make(v_threshold=0.75, v_reset=v_reset, detach_reset=detach_reset, **leaks)
        neuron = {**(leaks or {"tau": math.inf, "decay_input": False}), "ternary": name.startswith("Ternary")}
        assert_equal_to_theirs(backend, device, node, neuron, current(20, 3, 40))


@backends
@pytest.mark.parametrize("v_reset", [0.25, None])
@pytest.mark.parametrize("decay_input", [True, False])
def test_parametric_neurons_equal_spikingjellys(backend, device, decay_input, v_reset):
    make, surrogate = theirs("ParametricLIFNode")
    node = make(2.7, decay_input, 0.75, v_reset, surrogate.ATan())
    w = node.w.detach().clone().to(device).requires_grad_()
    neuron = {"inverse_tau": w.sigmoid(), "decay_input": decay_input}
    assert_equal_to_theirs(backend, device, node, neuron, current(20, 3, 40), w)


@backends
@pytest.mark.parametrize("detach_reset", [False, True])
def test_integer_neurons_equal_spikingjellys(backend, device, detach_reset):
    make, surrogate = theirs("ILIFNode")
    node = make(1.7, 0.75, surrogate.MultiLevelSpikeCount(3), detach_reset)
    neuron = {"decay": 1 - 1 / node.tau, "surrogate": Integer(3)}  # v*(1 - 1/tau) + x, as it computes
    assert_equal_to_theirs(backend, device, node, neuron, 2 * current(20, 3, 40))


@backends
def test_current_based_neurons_equal_snntorchs(backend, device):
    snntorch = pytest.importorskip("snntorch", reason="snnTorch is not installed")
    from snntorch.surrogate import fast_sigmoid

    node = snntorch.Synaptic(0.7, 0.6, 0.75, fast_sigmoid(25), reset_mechanism="zero", reset_delay=False)
    del snntorch.Synaptic.instances[-1:]
    x = current(20, 3, 40).requires_grad_()
    theirs, (i, v) = [], node.reset_mem()
    for x_t in x:
        spikes, i, v = node(x_t, i, v)
        theirs.append(spikes)
    grad = draw(x.shape, seed=2)
    (wanted,) = torch.autograd.grad(torch.stack(theirs), x, grad)
    neuron = {"decay": 0.6, "synapse_decay": 0.7, "threshold": 0.75, "surrogate": FastSigmoid(25)}
    spikes, (our_v, our_i) = snnkern.lif(on := x.detach().to(device).requires_grad_(), backend=backend, **neuron)
    assert torch.equal(spikes.cpu(), torch.stack(theirs)) and spikes.any()
    assert torch.equal(our_v.cpu(), v) and torch.equal(our_i.cpu(), i)
    assert_gradients_close(torch.autograd.grad(spikes, on, grad.to(device))[0].cpu(), wanted)


@backends
@pytest.mark.parametrize("fire_at_threshold", [False, True])
@pytest.mark.parametrize("reset", [0.25, None])
def test_both_states_equal_the_loop_written_out(backend, device, reset, fire_at_threshold):
    x, bias = 0.5 * current(20, 1000), torch.tensor(0.125)  # in powers of two: thresholds are met exactly
    i, v, a, wanted, met = torch.zeros(1000), torch.zeros(1000), torch.zeros(1000), [], 0
    for x_t in x:
        i = 0.5 * i + (x_t + bias)
        theta = 0.75 + 0.125 * a
        h = v + i
        s = (h >= theta if fire_at_threshold else h > theta).float()
        v = h - theta * s if reset is None else torch.where(s > 0, reset, h)
        a = 0.5 * a + s
        met += (h == theta).sum()
        wanted.append(s)
    more = {"bias": bias.to(device), "synapse_decay": 0.5, "threshold_decay": 0.5, "threshold_jump": 0.125}
    neuron = {"decay": 1.0, "threshold": 0.75, "reset": reset, "fire_at_threshold": fire_at_threshold}
    spikes, states = snnkern.lif(x.to(device), backend=backend, **neuron, **more)
    assert torch.equal(spikes.cpu(), torch.stack(wanted)) and met > 10
    assert all(torch.equal(got.cpu(), want) for got, want in zip(states, (v, i, a), strict=True))


# Every backend against the reference

LAYOUTS = {
    "time first": lambda shape: draw(shape),
    "time second": lambda shape: draw([shape[1], shape[0], *shape[2:]]).transpose(0, 1),
    "time last": lambda shape: draw([*shape[1:], shape[0]]).movedim(-1, 0),
    "narrow": lambda shape: draw([shape[1], shape[3], shape[0], shape[2]]).permute(2, 0, 3, 1),
    "channels last": lambda shape: draw([*shape[:2], shape[3], shape[2]]).transpose(2, 3),
    "sliced": lambda shape: draw([shape[0], shape[1], shape[2] + 1, shape[3]])[:, :, 1:],
}


def outcome(x, backend, v, inputs, grads, **options):
    """Spikes and potentials (with more states all of them, [states, ...]), and the gradients of ``inputs``."""
    given = tuple(v) if v is not None and v.dim() == x.dim() else v
    spikes, potentials = snnkern.lif(x, given, backend=backend, **options)
    if isinstance(potentials, tuple):
        potentials = torch.stack(potentials)
    gradients = torch.autograd.grad([spikes, potentials], inputs, grads)
    return spikes.detach(), potentials.detach(), gradients


def check(backend, x, leak, kind, spikes, threshold, v, detach_reset=False, fire_at_threshold=False, sequence=False,
          steps_out=None, states=None, bias=None, **options):  # fmt: skip
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, shape = x.requires_grad_(), x.shape[1:]
    neuron, inputs = leak_of(leak, kind, shape, state, x.device)
    if threshold in SHAPES:
        threshold = parameter(threshold, shape, 0.4, 0.9, state, x.device)
        inputs.append(threshold)
    if bias is not None:
        neuron["bias"] = parameter(bias, shape, -0.3, 0.6, state, x.device)
        inputs.append(neuron["bias"])
    states = states or {}
    count = 1 + ("synapse_decay" in states) + ("threshold_decay" in states)
    v = states_of(x.detach(), count).requires_grad_() if v else None
    inputs += [x] if v is None else [x, v]
    neuron |= {"detach_reset": detach_reset, "threshold": threshold, **options, **spikes, **states}
    neuron |= {"fire_at_threshold": fire_at_threshold and "surrogate" not in spikes, "steps_out": steps_out}
    grads = draw([steps_out or len(x), *shape], x.dtype, x.device, 2), draw(x.shape, state, x.device, 3)
    of_states = grads[1] if sequence else grads[1][:count] if count > 1 else grads[1][0]
    grads = grads[0].abs(), of_states.abs()  # so that sums over neurons do not cancel
    neuron["return_v"] = "sequence" if sequence else True
    got, wanted = (outcome(x, name, v, inputs, grads, **neuron) for name in (backend, "reference"))
    assert got[0].dtype == x.dtype and torch.equal(got[0], wanted[0]), "spikes"
    assert got[1].dtype == state and torch.equal(got[1], wanted[1]), "potentials"
    for g, w in zip(got[2], wanted[2], strict=True):
        assert_gradients_close(g, w)
    assert wanted[0].any() and not wanted[0].all()
    return got


CASES = pairwise(
    leak=LEAKS,
    kind=list(SHAPES),
    spikes=SPIKES,
    threshold=[0.7, *SHAPES],
    v_min=[None, -0.5],
    detach_reset=[False, True],
    fire_at_threshold=[False, True],
    v=[False, True],
    sequence=[False, True],
    steps_out=[None, 7],
    states=STATES,
    bias=[None, *SHAPES],
    layout=list(LAYOUTS),
    dtype=[torch.float32, torch.float64, torch.float16, torch.bfloat16],
)
CASES = CASES[:: 7 if FEW else 1]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_neuron_equals_the_reference(backend, device, case):
    dtype = case["dtype"] if backend == "cpu" or case["dtype"] != torch.float64 else torch.float32
    x = LAYOUTS[case["layout"]]((20, 2, 3, 11 if FEW else 37)).mul(16).round().div(16)  # meets thresholds
    x = moved(x.to(dtype), device)
    check(backend, x, **{name: case[name] for name in case if name not in ("layout", "dtype")})


PLAIN = pairwise(
    leak=LEAKS[:1] + LEAKS[2:3] + LEAKS[5:6],
    spikes=SPIKES[:2],
    bias=list(SHAPES),
    v=[False, True],
    steps_out=[None, 7],
    layout=list(LAYOUTS),
    dtype=[torch.float32, torch.float64, torch.float16, torch.bfloat16],
)[:: 6 if FEW else 1]


@pytest.mark.parametrize("case", PLAIN, ids=named)
def test_a_bias_before_plain_neurons(backend, device, case):
    dtype = case["dtype"] if backend == "cpu" or case["dtype"] != torch.float64 else torch.float32
    x = moved(LAYOUTS[case["layout"]]((37, 2, 3, 11 if FEW else 37)).to(dtype), device)
    rest = {name: case[name] for name in case if name not in ("layout", "dtype")}
    check(backend, x, kind="scalar", threshold=0.7, **rest)


@pytest.mark.parametrize("states", STATES[1:2] if FEW else STATES, ids=str)
def test_pieces_of_time_equal_the_whole(backend, device, states):
    """The states of one call, given to the next."""
    x = draw((37, 2, 3, 10), device=device).requires_grad_()
    bias = parameter("channel", x.shape[1:], -0.3, 0.6, torch.float32, device)
    neuron = {"bias": bias, "threshold": 0.7, "reset": None, "backend": backend, **states}
    if not states:
        neuron["decay"] = 0.9
    outcomes = []
    for cuts in ((5, 16, 16), (37,)):
        spikes, state = [], None
        for piece in x.split(cuts):
            piece, state = snnkern.lif(piece, state, **neuron)
            spikes.append(piece)
        state = torch.stack(state) if states else state
        outputs = torch.cat(spikes), state
        grads = draw(x.shape, device=device, seed=2), draw(state.shape, device=device, seed=3)
        outcomes.append((*outputs, *torch.autograd.grad(outputs, (x, bias), grads)))
    pieces, whole = outcomes
    assert torch.equal(pieces[0], whole[0]) and torch.equal(pieces[1], whole[1]) and whole[0].any()
    assert_gradients_close(pieces[2], whole[2])
    assert_gradients_close(pieces[3], whole[3])


KINDS = [{"reset": -0.1}, *SPIKES[1:4]]  # each has its own way through the surrogate


@pytest.mark.parametrize("surrogate", [Table(torch.cos, 1.0, 64), *([] if FEW else [FastSigmoid(), ATan()])], ids=str)
@pytest.mark.parametrize("spikes", KINDS, ids=str)
def test_surrogates_of_every_kind(backend, device, spikes, surrogate):
    x = draw((18, 67), device=device)
    check(backend, x, {"decay": 0.5}, "scalar", {**spikes, "surrogate": surrogate}, 0.7, True)


AFTER_NORM = [{**each, "v_min": -1.0} for each in SPIKES[:4]]
AFTER_NORM += [*SPIKES[2:], {"inverse_tau": 0.4}, {"surrogate": Table(torch.cos, 1.0, 64)}]


@pytest.mark.parametrize("kind", AFTER_NORM[1::2] if FEW else AFTER_NORM, ids=str)
@pytest.mark.parametrize(("shape", "time_dim"), [((18, 2, 16, 5), 0), ((6, 18, 3, 5), 1)][1 if FEW else 0 :], ids=str)
def test_after_batch_norm(backend, device, kind, shape, time_dim):
    y = draw(shape, device=device)
    residual = draw(shape, device=device, seed=7) if time_dim else None
    check_bn_lif(y, backend, state_of(y, time_dim), residual, None, time_dim, threshold=0.7, **kind)


@pytest.mark.skipif(FEW, reason="would take minutes, and the path is the compiled kernels' own")
@pytest.mark.parametrize("spikes", SPIKES[::2], ids=str)
def test_tensors_larger_than_the_cache(backend, device, spikes):
    x = draw((17, 2, 3, 7001), device=device)
    check(backend, x, {"decay": GIVEN}, "neuron", spikes, "channel", True, sequence=True)


@pytest.mark.parametrize("spikes", SPIKES, ids=str)
def test_time_in_segments(backend, device, force, spikes):
    launches = force(64, 16)
    x = draw((200, 2, 3, 7), device=device)
    check(backend, x, {"decay": 0.7}, "scalar", spikes, 0.7, True, v_min=-2.0, bias="neuron")
    assert any(split.segments > 1 for split in launches)


@pytest.mark.parametrize("states", [{}, STATES[3]], ids=str)
def test_a_bias_lets_time_be_split_more_states_do_not(backend, device, force, states):
    launches = force(64, 16)
    x = draw((200, 2, 3, 7), device=device)
    check(backend, x, {"decay": 0.95}, "scalar", {"reset": None}, 0.7, True, bias="neuron", states=states)
    assert all(split.segments == 1 for split in launches) == bool(states)


@pytest.mark.parametrize("spikes", [{"reset": 0.0}, {"reset": 0.0, "ternary": True}], ids=str)
def test_infinite_and_missing_numbers(backend, device, spikes):
    x = torch.full((20, 40), 4.0, device=device)
    x[3], x[7, 5] = math.inf, math.nan
    x[11, ::2] = -math.inf if "ternary" in spikes else math.inf
    surrogate = Table(lambda x: 1 + 0 * x, 1.0)  # which does not fall to 0
    x, v = x.requires_grad_(), torch.zeros(40, device=device, requires_grad=True)
    leak = torch.full((40,), 0.5, device=device, requires_grad=True)
    spikes, potentials = snnkern.lif(x, v, decay=leak, surrogate=surrogate, backend=backend, v_min=-2.0,
                                     return_v="sequence", **spikes)  # fmt: skip
    fine = torch.arange(40, device=device) != 5
    assert spikes[:, fine].abs().all() and not spikes[7:, 5].any() and potentials[7:, 5].isnan().all()
    gradients = torch.autograd.grad((spikes.sum() + potentials.sum()), (x, v, leak))
    assert potentials[:, fine].isfinite().all() and all(g[..., fine].isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, in the interpreter, about the lanes not selected
@pytest.mark.parametrize("leak", ["decay", "tau", "inverse_tau"])
def test_an_infinite_number_does_to_gradients_what_one_far_away_does(backend, device, leak):
    """The leak's too, which are multiplied by it: nothing comes back from there."""
    found, leaks = [], torch.full((40,), 0.5, device=device, requires_grad=True)
    for far in (math.inf, 1e30):
        x, v = draw((20, 40), device=device), torch.zeros(40, device=device)
        x[3], x[9, ::3] = far, -far
        if leak == "decay":
            v[::2] = far
        x, v = x.requires_grad_(), v.requires_grad_()
        outputs = snnkern.lif(x, v, reset=0.0, v_min=-2.0, backend=backend, **{leak: leaks})
        found.append(torch.autograd.grad(outputs, (x, v, leaks), (torch.ones_like(x), torch.ones_like(v))))
    for g, wanted in zip(*found, strict=True):
        assert torch.equal(g, wanted) and g.isfinite().all() and g.any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("kind", ["scalar", "neuron"])
@pytest.mark.parametrize("spikes", SPIKES, ids=str)
def test_a_neuron_of_infinite_threshold_is_silent(backend, device, spikes, kind):
    x = draw((20, 40), device=device).requires_grad_()
    threshold = torch.full(() if kind == "scalar" else (40,), math.inf, device=device)
    if kind == "neuron":
        threshold[::3] = 0.5
    threshold.requires_grad_()
    v, grads = state_of(x.detach()), (draw(x.shape, device=device, seed=5), draw(x.shape[1:], device=device, seed=6))
    got, wanted = (
        outcome(x, name, v, (x, threshold), grads, threshold=threshold, **spikes) for name in (backend, "reference")
    )
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1]) and got[1].isfinite().all()
    assert not got[0][:, threshold == math.inf].any()
    for g, w in zip(got[2], wanted[2], strict=True):
        assert_gradients_close(g, w)


@pytest.mark.parametrize("length", [16, 128])
def test_where_the_bound_holds_nothing_passes_not_what_is_none(backend, device, force, length):
    """Time in segments, too: a NaN comes back from the last of them to where the bound last held."""
    launches = force(length, 16)
    x = draw((100, 40), device=device)
    x[90] = math.nan
    x, grad = x.requires_grad_(), draw((100, 40), device=device, seed=5)
    got, wanted = (
        torch.autograd.grad(snnkern.lif(x, v_min=-0.5, surrogate=ATan(), backend=name)[0], x, grad)[0]
        for name in (backend, "reference")
    )
    assert torch.equal(got.isnan(), wanted.isnan()) and got[:40].isfinite().all()
    assert_gradients_close(got.nan_to_num(), wanted.nan_to_num())
    assert any(split.segments > 1 for split in launches) == (length < 100)


@pytest.mark.parametrize("kind", [{"reset": 0.25}, {"reset": None, "ternary": True}], ids=str)
@pytest.mark.parametrize("states", STATES[1:3], ids=str)
def test_infinite_and_missing_numbers_with_more_states(backend, device, kind, states):
    """Nothing is NaN but where the reference has one."""
    x = draw((20, 40), device=device)
    x[3, 10:], x[7, 5], x[9, ::3] = math.inf, math.nan, -math.inf
    x = x.requires_grad_()
    bias = torch.full((40,), 0.25, device=device, requires_grad=True)
    v = states_of(x.detach(), 2).requires_grad_()
    surrogate = Table(lambda x: 1 + 0 * x, 1.0)
    grads = torch.ones_like(x), torch.ones_like(v)
    got, wanted = (
        outcome(x, name, v, (x, v, bias), grads, bias=bias, threshold=0.7, surrogate=surrogate, **kind, **states)
        for name in (backend, "reference")
    )
    assert torch.equal(got[0], wanted[0]) and not got[0][7, 5]
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=0, equal_nan=True)
    for g, w in zip(got[2], wanted[2], strict=True):
        assert not (g.isnan() & ~w.isnan()).any()


def test_a_ternary_threshold_below_zero(backend, device):
    """Both signs cross it: no spike, no reset."""
    adaptive = {"threshold_decay": 1.0, "threshold_jump": 1.0}
    x = torch.tensor([-2.0, 0.25, 1.0], device=device)[:, None].expand(3, 8)
    spikes, (v, a) = snnkern.lif(x, threshold=0.5, reset=0.125, ternary=True, backend=backend, **adaptive)
    assert spikes[:, 0].tolist() == [-1, 0, 1] and v[0] == 0.125 and a[0] == 0
    kind = {"reset": -0.1, "ternary": True, "surrogate": ATan()}
    x = draw((20, 2, 3, 10), device=device) - 0.75
    check(backend, x, {"decay": 0.9}, "scalar", kind, "scalar", True, states={**adaptive, "threshold_decay": 0.9})


def test_runs_are_bit_for_bit_the_same(backend, device):
    case = {"decay": GIVEN}, "neuron", {"reset": None, "ternary": True}, "scalar"
    x = draw((33, 2, 3, 50), device=device)
    more = {"states": STATES[3], "bias": "neuron"}
    one, two = (check(backend, x, *case, True, sequence=True, **more)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_ternary_thresholds_are_positive():
    with pytest.raises(ValueError, match="threshold must be positive with ternary=True, got 0"):
        snnkern.lif(torch.zeros(3, 4), ternary=True, threshold=0.0)


BOTH = {"synapse_decay": 0.5, "threshold_decay": 0.9, "threshold_jump": 0.1}


@pytest.mark.skipif(FEW, reason="nothing here depends on the kernels")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"v": torch.zeros(4), "synapse_decay": 0.5}, TypeError, "v must be a tuple of the 2 states .* got Tensor"),
        ({"v": (torch.zeros(4),) * 2, **BOTH}, TypeError, "v must be a tuple of the 3 states .* got 2 of them"),
        ({"v": (torch.zeros(4), None), "synapse_decay": 0.5}, TypeError, "v must be a tuple of 2 tensors, got None"),
        ({"v": (torch.zeros(4), torch.zeros(5)), "synapse_decay": 0.5}, ValueError, r"v must have the shape of x"),
        ({"v": (torch.zeros(4), torch.zeros(4).double()), "synapse_decay": 0.5}, TypeError, "v must be torch.float32"),
        ({"v": (torch.zeros(4),) * 2}, TypeError, "v must be a tensor or None, got tuple"),
        ({"threshold_decay": 0.9}, ValueError, "give both: got threshold_decay=0.9 and threshold_jump=None"),
        ({"threshold_jump": 0.1}, ValueError, "give both: got threshold_decay=None and threshold_jump=0.1"),
        ({"synapse_decay": 1.5}, ValueError, r"synapse_decay must be in \[0, 1\], got 1.5"),
        ({**BOTH, "threshold_decay": -0.1}, ValueError, r"threshold_decay must be in \[0, 1\], got -0.1"),
        ({**BOTH, "threshold_jump": math.inf}, ValueError, "threshold_jump must be finite, got inf"),
        ({"synapse_decay": torch.tensor(0.5)}, TypeError, "synapse_decay must be a float, got tensor"),
        ({"bias": 0.5}, TypeError, "bias must be a tensor or None, got float"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must broadcast to x without time, \(4,\), got shape \(3,\)"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, TypeError, "bias must be a floating tensor, got torch.int32"),
    ],
    ids=str,
)
def test_bad_states_and_biases_are_named(given, error, message):
    with pytest.raises(error, match=message):
        snnkern.lif(torch.zeros(3, 4), **given)
