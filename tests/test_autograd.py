"""How ``lif`` lives with autograd: what it keeps, 16 bits and autocast, spent graphs, checkpointing."""

import pytest
import torch
from test_lif import FORMS, RESETS, draw, run
from torch.autograd.graph import saved_tensors_hooks

import snnkern

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

    def spy(spec, layout, call):
        seen.append(call.saved)

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
