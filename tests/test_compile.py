"""``lif`` inside ``torch.compile``: one graph, the same numbers, a library op as PyTorch wants it."""

import pytest
import torch
from conftest import assert_gradients_close
from test_lif import draw

import snnkern
from snnkern.surrogate import ATan, Triangle

pytestmark = pytest.mark.usefixtures("poison")


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


def test_the_library_op_passes_opcheck(backend, device):
    from snnkern.ops import library
    from snnkern.spec.neuron import make_spec

    x, v = draw((20, 12), device=device).requires_grad_(), draw((12,), device=device).requires_grad_()
    neuron = library.neuron(make_spec(0.5, None, True, 1.0, 0.0, Triangle(), False, False))
    for state, return_v in ((None, "False"), (v, "True")):
        arguments = x, state, None, None, None, neuron, 0, 20, return_v, backend
        torch.library.opcheck(torch.ops.snnkern.lif.default, arguments)
