"""How ``lif`` lives with autograd: what it keeps, 16 bits and autocast, spent graphs, checkpointing, compilation."""

import importlib

import pytest
import torch
from conftest import INTERPRETED, assert_gradients_close
from test_lif import FORMS, RESETS, SURROGATES, draw, run
from torch.autograd.graph import saved_tensors_hooks

import snnkern
from snnkern.surrogate import ATan, Triangle

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 4, 16, 17, 64])
def test_kept_for_backward_is_x_and_half_a_byte_at_most(backend, device, dtype, steps):
    x = draw((steps, 64), dtype, device).requires_grad_()
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        spikes, _ = snnkern.lif(x, backend=backend)
    assert spikes.requires_grad
    assert kept.pop(x.untyped_storage().data_ptr())
    assert sum(kept.values()) <= 0.5 * x.numel()


def test_without_gradient_nothing_is_kept(backend, device, monkeypatch):
    kernels = snnkern.ops.lif.choose(device, torch.float32, backend)
    seen = []

    def spy(spec, layout, x, v, spikes, v_last, saved):
        seen.append(saved)

    monkeypatch.setattr(kernels, "lif_forward", spy)
    with torch.no_grad():
        snnkern.lif(draw((40, 8), device=device).requires_grad_(), backend=backend)
    snnkern.lif(draw((40, 8), device=device), backend=backend)
    assert seen == [None, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_stay_fused_with_a_float32_state(backend, device, dtype):
    spikes, v_last = snnkern.lif(draw((5, 8), dtype, device).requires_grad_(), backend=backend)
    assert spikes.dtype == dtype and v_last.dtype == torch.float32
    assert type(spikes.grad_fn).__name__ == "_LIFBackward"


def test_autocast_models_stay_fused_and_train(backend, device):
    layer = torch.nn.Linear(12, 30, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        current = layer(draw((6, 4, 12), device=device))
        spikes, v_last = snnkern.lif(current, backend=backend)
    assert spikes.dtype == torch.bfloat16 and v_last.dtype == torch.float32
    assert type(spikes.grad_fn).__name__ == "_LIFBackward"
    spikes.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_a_state_whose_graph_is_spent_says_so(backend, device):
    x = draw((5, 8), device=device).requires_grad_()
    spikes, v = snnkern.lif(x, backend=backend)
    spikes.sum().backward()
    with pytest.raises(RuntimeError, match=r"reset\(\) or detach\(\)"):
        snnkern.lif(x, v, backend=backend)
    snnkern.lif(x, v.detach(), backend=backend)
    with torch.no_grad():
        snnkern.lif(x, v, backend=backend)


def test_a_state_whose_graph_is_retained_may_be_used_again(backend, device):
    x = draw((5, 8), device=device).requires_grad_()
    spikes, v = snnkern.lif(x, backend=backend)
    spikes.sum().backward(retain_graph=True)
    snnkern.lif(x, v, backend=backend)[0].sum().backward()


def test_double_backward_is_refused(backend, device):
    x = draw((5, 8), device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(snnkern.lif(x, backend=backend)[1].sum(), x, create_graph=True)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", FORMS[:1] + FORMS[4:6], ids=str)
def test_checkpointing_recomputes_the_same(backend, device, form, reset, detach_reset):
    x = draw((18, 20), device=device)
    options = {"reset": reset, "detach_reset": detach_reset, "backend": backend, **form}
    direct = run(x, None, grad_spikes=x, **options)[2]
    y = x.clone().requires_grad_()
    spikes = torch.utils.checkpoint.checkpoint(lambda z: snnkern.lif(z, **options)[0], y, use_reentrant=False)
    spikes.backward(x)
    assert torch.equal(y.grad, direct)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("detach_reset", [False])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[5]], ids=str)
@pytest.mark.skipif(INTERPRETED, reason="about the reference, which the first run has checked")
def test_the_smooth_reference_passes_gradcheck(form, reset, detach_reset, surrogate):
    from snnkern.backend.reference import lif as reference
    from snnkern.ops.lif import make_spec

    form = {"decay": None, "tau": None, "decay_input": True, **form}
    spec = make_spec(
        **form, threshold=1.0, reset=reset, surrogate=surrogate, detach_reset=detach_reset, fire_at_threshold=False
    )
    x, v = draw((5, 6), torch.float64).requires_grad_(), draw((6,), torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: reference(x, v, spec, 0, smooth=True), (x, v))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.skipif(INTERPRETED, reason="about the reference, which the first run has checked")
def test_the_reference_gradient_is_the_published_adjoint(reset, surrogate):
    """A hand-written adjoint in float64: a[t] = g (gs + b dv/ds) + b (1 - s) and b[t-1] = decay a[t]."""
    x, gs = draw((9, 40), torch.float64), draw((9, 40), torch.float64, seed=2)
    grad = run(x, None, "reference", gs, surrogate=surrogate, reset=reset)[2]
    potentials, v = [], torch.zeros(40, dtype=torch.float64)
    for x_t in x:
        h = 0.5 * v + x_t
        potentials.append(h)
        v = h - (h > 1).double() if reset is None else torch.where(h > 1, reset, h)
    b, wanted = torch.zeros(40, dtype=torch.float64), torch.empty_like(x)
    for t in reversed(range(9)):
        h, s = potentials[t], (potentials[t] > 1).double()
        g = surrogate.grad(h - 1)
        dv_dh = 1 - g if reset is None else 1 - s + (reset - h) * g
        wanted[t] = gs[t] * g + b * dv_dh
        b = 0.5 * wanted[t]
    assert_gradients_close(grad, wanted)


@pytest.mark.skipif(INTERPRETED, reason="the compiler and the interpreter exclude each other")
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


@pytest.mark.skipif(INTERPRETED, reason="the compiler and the interpreter exclude each other")
def test_the_library_op_passes_opcheck(backend, device):
    importlib.import_module("snnkern.backend._library")
    x, v = draw((20, 12), device=device).requires_grad_(), draw((12,), device=device).requires_grad_()
    for state in (None, v):
        neuron = "decay;0.5;1.0;0.0;False;False;" + Triangle().text
        torch.library.opcheck(torch.ops.snnkern.lif.default, (x, state, neuron, 0, backend))
