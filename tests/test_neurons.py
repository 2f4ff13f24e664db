"""Neurons beyond the plain one: parameters that are tensors, ternary and integer spikes, a lower bound, the sequence of
potentials, tables: the reference against finite differences and SpikingJelly's own classes, and every backend against
the reference."""

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
    generator = torch.Generator().manual_seed(len(shape) + 11)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return drawn.mul(16).round().div(16).to(dtype).to(device).requires_grad_()


def leak_of(form, kind, shape, dtype, device="cpu"):
    """The form with a tensor where one is to be given, and that tensor."""
    for name, value in form.items():
        if value is GIVEN:
            tensor = parameter(kind, shape, *((1.2, 3.0) if name == "tau" else (0.2, 0.9)), dtype, device)
            return {**form, name: tensor}, [tensor]
    return {**form}, []


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
    ),
    ids=named,
)
def test_the_smooth_reference_passes_gradcheck(case):
    x, v = draw((5, 2, 3, 2), torch.float64).requires_grad_(), draw((2, 3, 2), torch.float64, seed=1).requires_grad_()
    _, leak = leak_of(case["leak"], case["kind"], v.shape, torch.float64)
    threshold = []
    if case["threshold"] in SHAPES:
        threshold = [parameter(case["threshold"], v.shape, 0.4, 0.9, torch.float64)]
    neuron = {"decay": None, "tau": None, "decay_input": True, "surrogate": case["surrogate"], "v_min": case["v_min"]}
    neuron |= {"detach_reset": False, "fire_at_threshold": False, **case["leak"], **case["spikes"]}
    spec = new_spec(threshold=GIVEN if threshold else case["threshold"], **neuron)

    def smooth(x, v, *parameters):
        given = {"leak": parameters[0] if leak else None, "threshold": parameters[-1] if threshold else None}
        return reference(x, v, spec, 0, smooth=True, sequence=case["sequence"], **given)

    assert torch.autograd.gradcheck(smooth, (x, v, *leak, *threshold), fast_mode=True)


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
    """Spikes and potentials, and the gradients of ``inputs``."""
    spikes, potentials = snnkern.lif(x, v, backend=backend, **options)
    gradients = torch.autograd.grad([spikes, potentials], inputs, grads)
    return spikes.detach(), potentials.detach(), gradients


def check(backend, x, leak, kind, spikes, threshold, v, detach_reset=False, fire_at_threshold=False, sequence=False,
          steps_out=None, **options):  # fmt: skip
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, shape = x.requires_grad_(), x.shape[1:]
    neuron, inputs = leak_of(leak, kind, shape, state, x.device)
    if threshold in SHAPES:
        threshold = parameter(threshold, shape, 0.4, 0.9, state, x.device)
        inputs.append(threshold)
    v = state_of(x.detach()).requires_grad_() if v else None
    inputs += [x] if v is None else [x, v]
    neuron |= {"detach_reset": detach_reset, "threshold": threshold, **options, **spikes}
    neuron |= {"fire_at_threshold": fire_at_threshold and "surrogate" not in spikes, "steps_out": steps_out}
    grads = draw([steps_out or len(x), *shape], x.dtype, x.device, 2), draw(x.shape, state, x.device, 3)
    grads = grads[0].abs(), (grads[1] if sequence else grads[1][0]).abs()  # so that sums over neurons do not cancel
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
    x = draw((200, 40), device=device)
    check(backend, x, {"decay": 0.7}, "scalar", spikes, 0.7, True, v_min=-2.0)
    assert any(split.segments > 1 for split in launches)


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


def test_runs_are_bit_for_bit_the_same(backend, device):
    case = {"decay": GIVEN}, "neuron", {"reset": None, "ternary": True}, "scalar"
    x = draw((33, 2, 3, 50), device=device)
    one, two = (check(backend, x, *case, True, sequence=True)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_ternary_thresholds_are_positive():
    with pytest.raises(ValueError, match="threshold must be positive with ternary=True, got 0"):
        snnkern.lif(torch.zeros(3, 4), ternary=True, threshold=0.0)
