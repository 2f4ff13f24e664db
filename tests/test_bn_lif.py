"""The op ``bn_lif`` on every backend that can run, against the reference and against PyTorch's own batch norm."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import EMULATED, INTERPRETED, assert_gradients_close, few
from test_lif import FORMS, RESETS, SURROGATES, draw, state_of

import snnkern
from snnkern.surrogate import ATan, FastSigmoid, Sigmoid

pytestmark = pytest.mark.usefixtures("poison")
LARGE = {"images", "many"}  # for which an interpreter would take minutes


def norm_of(y, seed=5):
    """weight, bias, running_mean, running_var for y."""
    state = torch.float64 if y.dtype == torch.float64 else torch.float32
    numbers = draw((4, y.shape[2]), state, y.device, seed)
    return numbers[0] * 0.5 + 1, numbers[1] * 0.3 + 0.3, numbers[2] * 0.1, numbers[3].abs() + 0.5


def run(y, backend, norm=None, v=None, residual=None, grads=(None, None), training=True, **options):
    """Spikes, last potential, running statistics, and the gradients for those of spikes and v_last."""
    norm = [None if p is None else p.clone() for p in (norm_of(y) if norm is None else norm)]
    inputs = [y, *norm[:2], residual, v]
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y, weight, bias, residual, v = inputs
    options = {"residual": residual, "training": training, "backend": backend, **options}
    spikes, v_last = snnkern.bn_lif(y, weight, bias, *norm[2:], v, **options)
    found = [(o, g) for o, g in zip((spikes, v_last), grads, strict=True) if g is not None]
    outputs, upstream = zip(*found, strict=True)
    wanted = [t for t in inputs if t is not None]
    gradients = torch.autograd.grad(outputs, wanted, upstream)
    return spikes.detach(), v_last.detach(), norm[2:], gradients


def check(y, backend, v=None, residual=None, grads=None, time_dim=0, steps_out=None, **options):
    if grads is None:
        shape = list(y.shape)
        shape[time_dim] = min(steps_out or y.shape[time_dim], y.shape[time_dim])
        grads = draw(shape, y.dtype, y.device, 2), state_of(y, time_dim, 3)
    options = {"v": v, "residual": residual, "grads": grads, "time_dim": time_dim, "steps_out": steps_out, **options}
    got, wanted = (run(y, name, **options) for name in (backend, "reference"))
    assert got[0].dtype == y.dtype and got[0].shape == wanted[0].shape
    assert torch.equal(got[0], wanted[0]), "spikes"
    if y.dtype == torch.float64:  # where statistics are not rounded, the order of sums shows
        assert_gradients_close(got[1], wanted[1])
    else:
        assert torch.equal(got[1], wanted[1]), "last potential"
    for g, w in zip(got[2], wanted[2], strict=True):
        assert g is w is None or torch.allclose(g, w, rtol=1e-6, atol=1e-9), "running statistics"
    for g, w in zip(got[3], wanted[3], strict=True):
        assert_gradients_close(g, w)
    return got


# Against PyTorch's batch norm


@pytest.mark.parametrize("momentum", few([0.1, 0.7], [0.7]))
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 3, 4, 9), (5, 3, 4, 3, 6)], ids=str)
def test_statistics_are_those_of_batch_norm(backend, device, shape, affine, momentum):
    y = draw(shape, device=device) * 3 + 2
    weight, bias, mean, var = norm_of(y)
    weight, bias = (weight, bias) if affine else (None, None)
    theirs = mean.clone(), var.clone()
    for training in (True, False):
        x = F.batch_norm(y.flatten(0, 1), *theirs, weight, bias, training, momentum).view(shape)
        options = {"training": training, "momentum": momentum, "backend": backend, "threshold": 1e9}
        _, v_last = snnkern.bn_lif(y, weight, bias, mean, var, decay=0.0, **options)
        assert torch.allclose(v_last, x[-1], rtol=1e-5, atol=1e-5)  # nothing fires: what the last step received
        assert torch.allclose(mean, theirs[0], rtol=1e-5, atol=1e-6) and torch.allclose(var, theirs[1], rtol=1e-5)


def test_scale_is_a_factor_beside_weight(backend, device):
    y = draw((6, 2, 3, 5), device=device)
    weight, bias, mean, var = norm_of(y)
    options = {"training": True, "backend": backend}
    scaled = snnkern.bn_lif(y, weight, bias, mean, var, scale=0.5, **options)
    assert torch.equal(scaled[0], snnkern.bn_lif(y, weight * 0.5, bias, mean, var, **options)[0])


# Against the reference


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", few(FORMS[::4] if EMULATED else FORMS, FORMS[:5:4]), ids=str)
def test_forward_and_backward_match_the_reference(backend, device, form, reset, training):
    y = draw((18, 2, 3, 9), device=device) * 2 - 1
    check(y, backend, state_of(y), training=training, reset=reset, **form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("surrogate", few(SURROGATES[::3] if EMULATED else SURROGATES, SURROGATES[1:2]), ids=str)
def test_every_surrogate_in_every_dtype(backend, device, surrogate, dtype):
    y = draw((7, 2, 5, 16), dtype, device)
    if dtype == torch.float64 and backend != "cpu":
        with pytest.raises(RuntimeError, match="float64"):
            run(y, backend, grads=(y, None))
        return
    if dtype == torch.float64 and surrogate == FastSigmoid():  # so steep that the order of the statistics' sums shows
        surrogate = FastSigmoid(5.0)
    check(y, backend, surrogate=surrogate, threshold=0.7, reset=-0.1)


SHAPES = {
    "images": (4, 2, 3, 8, 8),
    "odd images": (5, 3, 5, 7, 7),
    "two by two": (4, 3, 17, 2, 2),
    "features": (33, 6, 37),
    "one pixel": (4, 5, 40, 1, 1),
    "one channel": (6, 3, 1, 5, 5),
    "one sample": (6, 1, 3, 4, 4),
    "sequence": (17, 2, 6, 11),
    "one step": (1, 4, 6, 10),
    "sixteen steps": (16, 2, 4, 33),
    "many": (4, 9, 24, 13, 13),
}


@pytest.mark.parametrize("detail", few(["plain", "residual", "groups", "all"], ["all"]))
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", [name for name in SHAPES if not (INTERPRETED or EMULATED) or name not in LARGE])
def test_shapes(backend, device, name, last, detail):
    y = draw(SHAPES[name], device=device) + 0.5
    residual = draw(y.shape, device=device, seed=7) if detail in ("residual", "all") else None
    if last:
        y = y.movedim(2, -1).contiguous().movedim(-1, 2)
    steps_out = max(1, y.shape[0] * 2 // 3) if detail in ("groups", "all") else None
    spikes = check(y, backend, state_of(y) if detail == "all" else None, residual, steps_out=steps_out)[0]
    if steps_out is None:
        assert spikes.stride() == y.stride() or y.shape[0] == 1 or 1 in y.shape
    assert 0.02 < (spikes > 0).float().mean() < 0.98


@pytest.mark.parametrize("steps", [4, 18])
@pytest.mark.parametrize("shape", [(3, 0, 4, 6), (5, 0, 2, 3, 3), (2, 0, 33), (40, 0, 3, 2)], ids=str)
def test_time_second(backend, device, shape, steps):
    y = draw([steps if n == 0 else n for n in shape], device=device)
    check(y, backend, state_of(y, 1), draw(y.shape, device=device, seed=7), time_dim=1)
    check(y, backend, time_dim=1, steps_out=steps // 2)


@pytest.mark.parametrize("name", ["sliced", "misaligned", "channel outermost", "expanded batch", "every second"])
def test_strides(backend, device, name):
    y = {
        "sliced": lambda: draw((9, 4, 12, 5), device=device)[2:7, :, 1:8],
        "misaligned": lambda: draw((5 * 3 * 4 * 8 + 1,), device=device)[1:].view(5, 3, 4, 8),
        "channel outermost": lambda: draw((4, 5, 3, 8), device=device).movedim(0, 2),
        "expanded batch": lambda: draw((5, 1, 4, 8), device=device).expand(5, 3, 4, 8),
        "every second": lambda: draw((5, 3, 8, 8), device=device)[:, :, ::2],
    }[name]()
    residual = draw(y.shape, device=device, seed=7)
    for steps_out in (None, 3):
        check(y, backend, state_of(y), residual, steps_out=steps_out)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_a_frame_repeated_over_time(backend, device, last):
    frame = draw((1, 3, 4, 6, 5), device=device)
    if last:
        frame = frame.movedim(2, -1).contiguous().movedim(-1, 2)
    got = check(frame.expand(6, -1, -1, -1, -1), backend)
    whole = run(frame.repeat(6, 1, 1, 1, 1), backend, grads=(draw((6, 3, 4, 6, 5), device=device, seed=2), None))
    assert torch.equal(got[0], whole[0])
    for mine, theirs in zip(got[2], whole[2], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6)  # the unbiased variance counts every step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_means(backend, device, dtype):
    """float32 sums of squares about 0 would have lost the variance."""
    y = (draw((6, 4, 3, 50), device=device) + torch.tensor([1e4, -3e3, 0.0], device=device)[:, None]).to(dtype)
    check(y, backend, surrogate=ATan())


@pytest.mark.parametrize("value", [0.0, 7.25, 1e4])
def test_constant_channels(backend, device, value):
    """Zero variance: bias alone drives the neurons, and eps alone scales the gradient."""
    y = draw((5, 3, 2, 8), device=device)
    y[:, :, 1] = value
    got = check(y, backend)
    assert all(torch.isfinite(g).all() for g in got[3])


def test_without_parameters_statistics_or_gradients(backend, device):
    y = draw((5, 3, 4, 7), device=device)
    weight, bias, mean, var = norm_of(y)
    for norm in ((None, None, mean, var), (weight, None, None, None), (None, bias, mean, var), (None,) * 4):
        check(y, backend, norm=norm)
    for grads in ((draw(y.shape, device=device, seed=2), None), (None, state_of(y, seed=3))):
        check(y, backend, grads=grads)
        check(y, backend, grads=grads, training=False)
    with torch.no_grad():
        spikes, v_last = snnkern.bn_lif(y, weight, bias, mean.clone(), var.clone(), training=True, backend=backend)
    wanted = run(y, "reference", (weight, bias, mean, var), grads=(y, None))
    assert torch.equal(spikes, wanted[0]) and torch.equal(v_last, wanted[1])


def test_only_some_gradients_are_wanted(backend, device):
    y, residual = draw((5, 3, 4, 7), device=device), draw((5, 3, 4, 7), device=device, seed=7)
    norm = norm_of(y)
    for training in (True, False):
        whole = run(y, backend, norm, residual=residual, grads=(y, None), training=training)[3]
        for i, name in enumerate(("y", "weight", "bias", "residual")):
            tensors = {"y": y, "weight": norm[0], "bias": norm[1], "residual": residual}
            tensors[name] = tensors[name].clone().requires_grad_()
            spikes, _ = snnkern.bn_lif(
                tensors["y"], tensors["weight"], tensors["bias"], norm[2].clone(), norm[3].clone(),
                residual=tensors["residual"], training=training, backend=backend,
            )  # fmt: skip
            assert torch.equal(torch.autograd.grad(spikes, tensors[name], y)[0], whole[i])


@pytest.mark.parametrize("shape", [(3, 0, 4, 5), (0, 2, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)], ids=str)
def test_nothing_to_do(backend, device, shape):
    y = draw(shape, device=device).requires_grad_()
    norm = norm_of(y)
    spikes, v_last = snnkern.bn_lif(y, *norm, training=False, backend=backend)
    assert spikes.shape == shape and v_last.shape == shape[1:] and not v_last.any()
    (grad,) = torch.autograd.grad(spikes.sum() + v_last.sum(), y)
    assert grad.shape == shape
    if 0 not in shape[2:3]:
        with pytest.raises(ValueError, match="more than one value per channel"):
            snnkern.bn_lif(y, *norm, training=True, backend=backend)


@pytest.mark.skipif(INTERPRETED or EMULATED, reason="one block runs after the other, in one order")
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("steps", [12, 40])
def test_the_same_bits_every_time(backend, device, steps, last):
    y = draw((steps, 4, 24, 13, 13), torch.bfloat16, device)
    if last:
        y = y.movedim(2, -1).contiguous().movedim(-1, 2)
    grads, threads = (draw(y.shape, y.dtype, device, 2), None), torch.get_num_threads()
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(run(y, backend, grads=grads))
    torch.set_num_threads(threads)
    for spikes, v_last, running, gradients in runs[1:]:
        for got, wanted in zip(
            (spikes, v_last, *running, *gradients), (*runs[0][:2], *runs[0][2], *runs[0][3]), strict=True
        ):
            assert torch.equal(got, wanted)


# Groups of steps


@pytest.mark.parametrize(
    "layout", few(["time first", "time last", "time in the middle", "few"], ["time in the middle"])
)
@pytest.mark.parametrize(("steps", "steps_out"), [(6, 4), (5, 2), (4, 4), (7, 1), (33, 20), (50, 3), (4, 6), (17, 40)])
def test_sums_over_groups_are_lif_then_ttm(backend, device, layout, steps, steps_out):
    shape, time_dim = {
        "time first": ((steps, 3, 67), 0),
        "time last": ((5, 9, steps), 2),
        "time in the middle": ((3, steps, 40), 1),
        "few": ((40, steps, 3), 1),
    }[layout]
    x = draw(shape, device=device)
    wanted, v_wanted = snnkern.lif(x.requires_grad_(), time_dim=time_dim, backend="reference")
    wanted = snnkern.ttm(wanted, steps_out, time_dim, backend="reference")
    got, v_last = snnkern.lif(x, steps_out=steps_out, time_dim=time_dim, backend=backend)
    assert torch.equal(got, wanted) and torch.equal(v_last, v_wanted) and got.sum() > 0
    grad, grad_v = draw(got.shape, device=device, seed=2), draw(v_last.shape, device=device, seed=3)
    for g, w in zip(
        torch.autograd.grad((got, v_last), x, (grad, grad_v)),
        torch.autograd.grad((wanted, v_wanted), x, (grad, grad_v)),
        strict=True,
    ):
        assert_gradients_close(g, w)
    assert torch.equal(snnkern.lif(x.detach(), steps_out=steps_out, time_dim=time_dim, backend=backend)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_sums_are_rounded_once(backend, device, dtype):
    x = torch.full((601, 33), 4.0, dtype=dtype, device=device)
    got = snnkern.lif(x, steps_out=2, backend=backend)[0]
    assert got[:, 0].tolist() == torch.tensor([300.0, 301.0]).to(dtype).tolist() if not INTERPRETED else got.any()


# Derivatives of the reference, compilation, arguments


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_differentiated_right(training):
    """Finite differences of the reference whose spikes are the surrogate's antiderivative."""
    from snnkern.backend.reference import bn_lif
    from snnkern.spec.neuron import make_spec
    from snnkern.spec.norm import Batch, Parameters

    y, residual = (draw((4, 2, 2, 3), torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    weight, bias, mean, var = norm_of(y)
    spec = make_spec(None, 2.0, True, 1.0, 0.0, Sigmoid(), False, False)
    batch = Batch(training, 0.1, 1e-5, 1.0, None)

    def call(y, weight, bias, residual):
        parameters = Parameters(weight, bias, mean.clone(), var)
        return bn_lif(y, parameters, None, residual, batch, spec, 0, 2, smooth=True)

    assert torch.autograd.gradcheck(call, (y, weight.requires_grad_(), bias.requires_grad_(), residual))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(backend, training, steps):
    device = torch.get_default_device()
    y, residual = (draw((steps, 2, 3, 8), device=device, seed=seed).requires_grad_() for seed in (0, 1))

    def call(y, weight, bias, mean, var, v, residual, backend):
        spikes, v = snnkern.bn_lif(
            y, weight, bias, mean, var, v, residual=residual, training=training, backend=backend, steps_out=4
        )
        return spikes * 2, v

    results = []
    for function, name in ((torch.compile(call, fullgraph=True, backend="aot_eager"), backend), (call, "reference")):
        weight, bias, mean, var = norm_of(y)
        leaves = y, weight.requires_grad_(), bias.requires_grad_(), state_of(y).requires_grad_(), residual
        spikes, v_last = function(*leaves[:3], mean, var, *leaves[3:], name)
        upstream = draw(spikes.shape, device=device, seed=2), draw(v_last.shape, device=device, seed=3)
        results.append([spikes, v_last, mean, var, *torch.autograd.grad((spikes, v_last), leaves, upstream)])
    for got, wanted in zip(*results, strict=True):
        assert_gradients_close(got.detach(), wanted.detach())
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.usefixtures("on_device")
def test_library_ops_keep_their_contract(backend):
    from snnkern.ops import library
    from snnkern.spec.neuron import make_spec
    from snnkern.spec.norm import Batch

    y = draw((20, 2, 3, 8), device=torch.get_default_device()).requires_grad_()
    spec = library.neuron(make_spec(0.5, None, True, 1.0, 0.0, ATan(), False, False))
    weight, bias, mean, var = norm_of(y)
    norm = library.batch(Batch(True, 0.1, 1e-5, 1.0, None))
    tensors = y, weight.requires_grad_(), bias.requires_grad_(), mean, var, None, None, None
    torch.library.opcheck(torch.ops.snnkern.bn_lif.default, (*tensors, spec, norm, 0, 7, False, backend))


def test_once_differentiable(backend, device):
    y = draw((3, 2, 2, 4), device=device).requires_grad_()
    spikes, _ = snnkern.bn_lif(y, None, None, None, None, training=True, backend=backend)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(spikes.sum(), y, create_graph=True)


Y = torch.ones(3, 2, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
        ({"y": torch.ones(3, 2)}, ValueError, r"y must be \[T, N, C, ...\].*got shape \(3, 2\)"),
        ({"time_dim": 2}, ValueError, "time_dim=1, got shape .* with time_dim=2"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be one number per channel, \(4,\).*got \(5,\)"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, "bias must be torch.float32"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor or None, got float"),
        ({"running_var": None}, ValueError, "running_mean and running_var belong together"),
        ({"training": 1}, TypeError, "training must be True or False, got 1"),
        ({"training": False, "running_mean": None, "running_var": None}, ValueError, "running_mean must be given"),
        ({"momentum": None}, TypeError, "momentum must be a float, got None"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ({"scale": "a"}, TypeError, "scale must be a float"),
        ({"v": torch.ones(2, 4)}, ValueError, "v must have the shape of y without time"),
        ({"residual": torch.ones(3, 2, 4)}, ValueError, "residual must have the shape and device of y"),
        ({"residual": Y.half()}, TypeError, "residual must have the dtype of y"),
        ({"steps_out": 0}, ValueError, "steps_out must be at least 1, got 0"),
        ({"tau": -1.0}, ValueError, "tau must be > 0"),
        ({"backend": "fpga"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    tensors = {"y": Y, "weight": None, "bias": None, "running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    with pytest.raises(error, match=message):
        snnkern.bn_lif(**{**tensors, "training": True, **change})


def test_half_precision_statistics_are_updated(backend, device):
    y = draw((5, 3, 4, 7), torch.bfloat16, device)
    mean, var = torch.zeros(4, dtype=torch.bfloat16, device=device), torch.ones(4, dtype=torch.bfloat16, device=device)
    snnkern.bn_lif(y, None, None, mean, var, training=True, momentum=1.0, backend=backend)
    assert torch.allclose(mean.float(), y.float().mean((0, 1, 3)), atol=1e-2)
    assert math.isclose(var.float().mean().item(), 1.0, abs_tol=0.3) and not torch.equal(var, torch.ones_like(var))


@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.usefixtures("on_device")
def test_v_last_that_nobody_wants_is_not_made(backend, steps):
    device = torch.get_default_device()
    x, grad = draw((steps, 33), device=device).requires_grad_(), draw((steps, 33), device=device, seed=2)
    norm = norm_of(x.view(steps, 1, 33))
    for call in (
        lambda **kw: snnkern.lif(x, backend=backend, **kw),
        lambda **kw: snnkern.bn_lif(x.view(steps, 1, 33), *norm, training=False, backend=backend, **kw),
    ):
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            spikes, v = function(return_v=False)
            wanted, wanted_v = function()
            assert v is None and wanted_v is not None and torch.equal(spikes, wanted)
            (got,), (gradient,) = (torch.autograd.grad(s, x, grad.view_as(s)) for s in (spikes, wanted))
            assert torch.equal(got, gradient)
