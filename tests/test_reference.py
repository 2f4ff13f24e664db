"""The reference itself: its gradients against finite differences and against the published adjoint."""

import pytest
import torch
from conftest import assert_gradients_close
from test_lif import FORMS, RESETS, SURROGATES, draw, run

from snnkern.backend.reference import lif as reference
from snnkern.spec.neuron import make_spec


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[5]], ids=str)
def test_the_smooth_reference_passes_gradcheck(form, reset, surrogate):
    form = {"decay": None, "tau": None, "decay_input": True, **form}
    spec = make_spec(
        **form, threshold=1.0, reset=reset, surrogate=surrogate, detach_reset=False, fire_at_threshold=False
    )
    x, v = draw((5, 6), torch.float64).requires_grad_(), draw((6,), torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: reference(x, v, spec, 0, smooth=True), (x, v))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_the_reference_gradient_is_the_published_adjoint(reset, detach_reset, surrogate):
    """A hand-written adjoint in float64: a[t] = g gs + b dv/dh and b[t-1] = decay a[t]."""
    x, gs = draw((9, 40), torch.float64), draw((9, 40), torch.float64, seed=2)
    grad = run(x, None, "reference", gs, surrogate=surrogate, reset=reset, detach_reset=detach_reset)[2]
    potentials, v = [], torch.zeros(40, dtype=torch.float64)
    for x_t in x:
        h = 0.5 * v + x_t
        potentials.append(h)
        v = h - (h > 1).double() if reset is None else torch.where(h > 1, reset, h)
    b, wanted = torch.zeros(40, dtype=torch.float64), torch.empty_like(x)
    for t in reversed(range(9)):
        h, s = potentials[t], (potentials[t] > 1).double()
        g = surrogate.grad(h - 1)
        dv_ds = 0 if detach_reset else -1 if reset is None else reset - h
        dv_dh = (1 if reset is None else 1 - s) + dv_ds * g
        wanted[t] = gs[t] * g + b * dv_dh
        b = 0.5 * wanted[t]
    assert_gradients_close(grad, wanted)
