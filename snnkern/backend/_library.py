"""The ops as PyTorch library ops, which ``torch.compile`` can see through. Used only while compiling: in eager mode a
plain ``autograd.Function`` around the same calls costs half as much per call (see ``ops/lif.py``).

The neuron's parameters travel as one string, so that the compiled graph holds everything it needs.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .. import surrogate as surrogates
from ..ops import lif as ops
from ..ops.ttm import transform
from . import choose, load

_library = torch.library.Library("snnkern", "DEF")
_library.define(
    "lif(Tensor x, Tensor? v, str neuron, int time_dim, int steps_out, str backend) -> "
    "(Tensor spikes, Tensor v_last, Tensor saved)"
)
_library.define(
    "lif_backward(Tensor x, Tensor? v, Tensor saved, Tensor? grad_spikes, Tensor? grad_v_last, str neuron, "
    "int time_dim, int steps_out, str backend) -> (Tensor grad_x, Tensor grad_v)"
)
_library.define("ttm(Tensor x, int steps, int time_dim, str backend) -> Tensor")


@lru_cache(maxsize=512)
def _spec(neuron: str) -> ops.LIFSpec:
    form, leak, threshold, reset, detach_reset, fire_at_threshold, surrogate = neuron.split(";")
    return ops.LIFSpec(
        form,
        float(leak),
        float(threshold),
        None if reset == "None" else float(reset),
        surrogates.parse(surrogate),
        detach_reset == "True",
        fire_at_threshold == "True",
    )


@torch.compiler.assume_constant_result
def name_for(device_type: str, dtype: torch.dtype, backend: str | None) -> str:
    """The name of the backend that ``choose`` chooses."""
    return choose(device_type, dtype, backend).__name__.rpartition(".")[2]


def lif(x, v, spec: ops.LIFSpec, time_dim: int, steps_out: int, backend: str):
    """``snnkern.lif`` of checked arguments, as one node of the graph."""
    spikes, v_last, _ = torch.ops.snnkern.lif(x, v, neuron(spec), time_dim, steps_out, backend)
    return spikes, v_last


def neuron(spec: ops.LIFSpec) -> str:
    return (
        f"{spec.form};{spec.leak};{spec.threshold};{spec.reset};{spec.detach_reset};{spec.fire_at_threshold};"
        f"{spec.surrogate.text}"
    )


class _Nothing:
    """A backend that launches nothing: with it, the ops below only allocate, which is what tracing needs."""

    @staticmethod
    def lif_forward(*args):
        pass

    lif_backward = ttm = lif_forward


def _forward(kernels, x, v, neuron, time_dim, steps_out):
    spikes, v_last, (_, _, saved), _ = ops.forward(x, v, _spec(neuron), time_dim, steps_out, kernels, keep=True)
    return spikes, v_last, v_last.new_empty(0) if saved is None else saved


def _backward(kernels, x, v, saved, grad_spikes, grad_v_last, neuron, time_dim, steps_out):
    x, layout = ops.arrange(x, time_dim, steps_out)
    if v is not None:
        v = layout.arrange(v, without=time_dim)
    if layout.steps <= ops.CHUNK:
        saved = None
    return ops.backward(_spec(neuron), layout, x, v, saved, grad_spikes, grad_v_last, time_dim, kernels, want_v=True)


def _implement(name, function):
    torch.library.impl(
        name, "CompositeExplicitAutograd", lambda *args: function(load(args[-1]), *args[:-1]), lib=_library
    )
    torch.library.register_fake(name, lambda *args: function(_Nothing, *args[:-1]), lib=_library)


_implement("snnkern::ttm", lambda kernels, *args: transform(*args, kernels))
_implement("snnkern::lif", _forward)
_implement("snnkern::lif_backward", _backward)


def _setup(ctx, inputs, output):
    x, v, *ctx.rest = inputs
    ctx.save_for_backward(x, v, output[2])
    ctx.set_materialize_grads(False)


def _grad(ctx, grad_spikes, grad_v_last, _):
    x, v, saved = ctx.saved_tensors
    grad_x, grad_v = torch.ops.snnkern.lif_backward(x, v, saved, grad_spikes, grad_v_last, *ctx.rest)
    return grad_x, None if v is None else grad_v, None, None, None, None


torch.library.register_autograd("snnkern::lif", _grad, setup_context=_setup, lib=_library)


def _setup_ttm(ctx, inputs, output):
    x, _, time_dim, backend = inputs
    ctx.rest = x.shape[time_dim], time_dim, backend


torch.library.register_autograd(
    "snnkern::ttm",
    lambda ctx, grad: (torch.ops.snnkern.ttm(grad, *ctx.rest), None, None, None),
    setup_context=_setup_ttm,
    lib=_library,
)
