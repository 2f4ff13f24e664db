"""The op ``lif`` on every backend that can run, against the plain loop of the reference backend."""

import math

import pytest
import torch
from conftest import EMULATED, INTERPRETED, assert_gradients_close, few

import snnkern
from snnkern.surrogate import ATan, Dspike, Sigmoid, Surrogate, Triangle

pytestmark = pytest.mark.usefixtures("poison")

FORMS = [{}, {"decay": 0.9}, {"decay": 0.0}, {"decay": 1.0}]
FORMS += [{"tau": tau, "decay_input": inputs} for tau in (1.7, 2.0, 20.0) for inputs in (True, False)]
RESETS = [0.0, -0.3, None]
SURROGATES = [cls() for cls in Surrogate.__subclasses__() if getattr(cls, "_triton", None)]


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def state_of(x, time_dim=0, seed=1):
    shape = [n for i, n in enumerate(x.shape) if i != time_dim % x.dim()]
    return draw(shape, torch.float64 if x.dtype == torch.float64 else torch.float32, x.device, seed)


def run(x, v, backend, grad_spikes=None, grad_v=None, **options):
    """Spikes, last potential and the gradients of x and v for the given upstream gradients."""
    x = x.detach().requires_grad_()
    v = None if v is None else v.detach().requires_grad_()
    spikes, v_last = snnkern.lif(x, v, backend=backend, **options)
    outputs, upstream = [], []
    for output, grad in ((spikes, grad_spikes), (v_last, grad_v)):
        if grad is not None:
            outputs.append(output)
            upstream.append(grad)
    inputs = [x] if v is None else [x, v]
    return (spikes.detach(), v_last.detach(), *torch.autograd.grad(outputs, inputs, upstream))


def check(x, v, backend, grad_spikes=None, grad_v=None, **options):
    got = run(x, v, backend, grad_spikes, grad_v, **options)
    wanted = run(x, v, "reference", grad_spikes, grad_v, **options)
    assert got[0].dtype == x.dtype and got[0].shape == wanted[0].shape
    assert torch.equal(got[0], wanted[0]), "spikes"
    assert torch.equal(got[1], wanted[1]), "last potential"
    for g, w in zip(got[2:], wanted[2:], strict=True):
        assert_gradients_close(g, w)
    return got


def check_all(x, backend, time_dim=0, **options):
    v = state_of(x, time_dim)
    return check(
        x, v, backend, draw(x.shape, x.dtype, x.device, 2), state_of(x, time_dim, 3), time_dim=time_dim, **options
    )


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", few(FORMS, FORMS[1:6:2]), ids=str)
def test_forward_and_backward_match_the_reference(backend, device, form, reset, detach_reset):
    x = draw((21, 5, 9), device=device)
    check_all(x, backend, reset=reset, detach_reset=detach_reset, **form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_every_surrogate_in_every_dtype(backend, device, surrogate, dtype):
    if dtype == torch.float64 and backend != "cpu":
        with pytest.raises(RuntimeError, match="float64"):
            snnkern.lif(draw((3, 4), dtype, device), backend=backend)
        return
    check_all(draw((18, 67), dtype, device), backend, surrogate=surrogate, threshold=0.7, reset=-0.1)


@pytest.mark.parametrize(
    "surrogate", [Triangle(0.5), Triangle(0.5, peak=1.0), Dspike(3.0, 0.8), ATan(5.0), Sigmoid(1.0)]
)
def test_surrogate_parameters_reach_the_kernel(backend, device, surrogate):
    check_all(draw((9, 40), device=device), backend, surrogate=surrogate)


@pytest.mark.parametrize("neurons", few([1, 5, 31, 127, 521], [5, 521]))
@pytest.mark.parametrize("steps", few([1, 2, 15, 16, 17, 33, 48], [1, 17, 48]))
def test_odd_sizes(backend, device, steps, neurons):
    check_all(draw((steps, neurons), device=device), backend)


@pytest.mark.parametrize("shape", [(1, 5), (7, 257, 3, 7), (16, 2, 3), (3,)], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_shapes_with_and_without_a_state(backend, device, shape, with_state):
    x = draw(shape, device=device)
    v = state_of(x) if with_state else None
    check(x, v, backend, draw(shape, device=device, seed=2), tau=2.0, reset=-0.3)


@pytest.mark.parametrize("fire_at_threshold", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_potentials_exactly_at_the_threshold(backend, device, reset, fire_at_threshold):
    x = (draw((16, 301), device=device) * 8).round() / 8
    options = {"reset": None if reset is None else round(reset * 8) / 8, "fire_at_threshold": fire_at_threshold}
    spikes = check_all(x, backend, **options)[0]
    at_threshold = snnkern.lif(torch.ones(1, 4, device=device), backend=backend, **options)[0]
    assert at_threshold.sum() == (4 if fire_at_threshold else 0)
    assert 0 < spikes.mean() < 1


@pytest.mark.parametrize("threshold", [0.3, 0.0, -0.2])
def test_thresholds_that_are_not_one(backend, device, threshold):
    check_all(draw((11, 33), device=device), backend, threshold=threshold, fire_at_threshold=True)


def test_state_carried_over_two_calls_equals_one_long_call(backend, device):
    x = draw((37, 50), device=device)
    whole, v_whole = snnkern.lif(x, backend=backend)
    first, v = snnkern.lif(x[:20], backend=backend)
    second, v = snnkern.lif(x[20:], v, backend=backend)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(v, v_whole)


def test_gradient_crosses_the_carried_state(backend, device):
    def loss(backend):
        x = draw((37, 50), device=device).requires_grad_()
        _, v = snnkern.lif(x[:20], backend=backend)
        second, v = snnkern.lif(x[20:], v, backend=backend)
        return torch.autograd.grad((second * draw((17, 50), device=device, seed=4)).sum() + v.sum(), x)[0]

    assert loss(backend)[:20].norm() > 0
    assert_gradients_close(loss(backend), loss("reference"))


# Layouts

LAYOUTS = {
    "transposed": (lambda: draw((6, 19)).t(), 0),
    "time last": (lambda: draw((5, 7, 20)), -1),
    "time in the middle": (lambda: draw((4, 19, 40)), 1),
    "narrow inner": (lambda: draw((40, 18, 3)), 1),
    "sliced in time": (lambda: draw((40, 33))[3:37:2], 0),
    "sliced in batch": (lambda: draw((19, 8, 35))[:, 2:6], 0),
    "sliced neurons": (lambda: draw((19, 70))[:, 1:40], 0),
    "every second neuron": (lambda: draw((19, 70))[:, ::2], 0),
    "misaligned": (lambda: draw(19 * 64 + 1)[1:].view(19, 64), 0),
    "repeated in time": (lambda: draw((1, 45)).expand(20, 45), 0),
    "repeated in batch": (lambda: draw((20, 1, 9)).expand(20, 4, 9), 0),
    "channels last": (
        lambda: draw((4 * 5, 3, 6, 7)).contiguous(memory_format=torch.channels_last).view(4, 5, 3, 6, 7),
        0,
    ),
    "flipped order": (lambda: draw((3, 4, 18)).permute(2, 1, 0), 0),
    "size one dimensions": (lambda: draw((1, 18, 1, 40)).permute(1, 2, 3, 0), 0),
}


def moved(x, device):
    """x on another device, with its strides, at its place in a memory as large."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_strides(backend, device, name):
    make, time_dim = LAYOUTS[name]
    check_all(moved(make(), device), backend, time_dim=time_dim)


def test_the_misaligned_case_is_misaligned(backend, device):
    make, _ = LAYOUTS["misaligned"]
    assert moved(make(), device).data_ptr() % 16 == 4


@pytest.mark.parametrize("shape", [(50, 40), (300, 33), (20, 35, 20), (3, 18, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_short_rows_are_transposed(backend, device, dtype, shape):
    if dtype == torch.float64 and backend != "cpu":
        pytest.skip("float64 is for the CPU")
    check_all(draw(shape, dtype, device), backend, time_dim=1)


@pytest.mark.parametrize("name", ["transposed", "channels last", "flipped order"])
def test_dense_inputs_are_not_copied_and_spikes_keep_their_strides(backend, device, name):
    x = moved(LAYOUTS[name][0](), device)
    assert snnkern.spec.layout.layout_of(x, 0) is not None
    spikes, v_last = snnkern.lif(x, backend=backend)
    assert spikes.stride() == x.stride()
    assert v_last.dim() != 4 or v_last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_incoming_gradients_of_any_strides(backend, device, kind):
    x = draw((18, 40), device=device)
    grad = {
        "expanded": torch.ones((), device=device).expand(18, 40),
        "transposed": draw((40, 18), device=device).t(),
        "sliced": draw((18, 80), device=device)[:, ::2],
    }[kind]
    check(x, None, backend, grad)


def test_gradient_of_a_sum(backend, device):
    grads = []
    for name in (backend, "reference"):
        x = draw((18, 40), device=device).requires_grad_()
        snnkern.lif(x, backend=name)[0].sum().backward()
        grads.append(x.grad)
    assert_gradients_close(*grads)


def test_only_one_of_the_outputs_is_used(backend, device):
    x = draw((18, 40), device=device)
    check(x, state_of(x), backend, grad_spikes=draw(x.shape, device=device, seed=2))
    check(x, state_of(x), backend, grad_v=draw((40,), device=device, seed=3))


def test_only_the_state_wants_a_gradient(backend, device):
    grads = []
    for name in (backend, "reference"):
        v = draw((40,), device=device).requires_grad_()
        snnkern.lif(draw((18, 40), device=device), v, backend=name)[0].sum().backward()
        grads.append(v.grad)
    assert_gradients_close(*grads)


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 3), (5, 3, 0)], ids=str)
def test_no_neurons(backend, device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    spikes, v_last = snnkern.lif(x, backend=backend)
    (spikes.sum() + v_last.sum()).backward()
    assert spikes.shape == shape and v_last.shape == shape[1:] and x.grad.shape == shape


def test_no_steps_leave_the_state_as_it_is(backend, device):
    v = draw((4,), device=device).requires_grad_()
    spikes, v_last = snnkern.lif(torch.zeros(0, 4, device=device), v, backend=backend)
    assert spikes.shape == (0, 4) and torch.equal(v_last, v)
    v_last.sum().backward()
    assert torch.equal(v.grad, torch.ones_like(v))


@pytest.mark.skipif(INTERPRETED or EMULATED, reason="would take minutes, and the path is the compiled kernels' own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_larger_than_the_cache(backend, device, dtype):
    check_all(draw((19, 600_011), dtype, device), backend)


# Numbers


@pytest.mark.parametrize("reset", RESETS)
def test_nan_never_fires_and_stays_in_its_neuron(backend, device, reset):
    x = torch.full((20, 40), 2.0, device=device)
    x[3, 7] = math.nan
    spikes, v_last = snnkern.lif(x, reset=reset, backend=backend)
    assert spikes[:3, 7].all() and not spikes[3:, 7].any() and v_last[7].isnan()
    others = torch.arange(40, device=device) != 7
    assert spikes[:, others].all() and v_last[others].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, in the interpreter, about the lanes not selected
@pytest.mark.parametrize("form", [{}, {"tau": 2.0}, {"tau": 2.0, "decay_input": False}], ids=str)
def test_an_infinite_input_fires_and_the_neuron_recovers(backend, device, form):
    x = torch.full((20, 40), 4.0, device=device)
    x[3] = math.inf
    x.requires_grad_()
    for name in (backend, "reference"):
        x.grad = None
        spikes, v_last = snnkern.lif(x, backend=name, **form)
        assert spikes.all() and v_last.isfinite().all()
        (spikes.sum() + v_last.sum()).backward()
        assert x.grad.isfinite().all()


def test_runs_are_bit_for_bit_the_same(backend, device):
    x = draw((33, 700), device=device)
    results = [run(x, state_of(x), backend, x, state_of(x), surrogate=Sigmoid()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_number_of_threads_changes_nothing():
    x = draw((40, 3001))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(x, state_of(x), "cpu", x, state_of(x)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
