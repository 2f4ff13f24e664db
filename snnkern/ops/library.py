"""The ops as PyTorch library ops, which ``torch.compile`` can see through. Used only while compiling: in eager mode a
plain ``autograd.Function`` around the same calls costs half as much per call (see ``ops/lif.py``).

The neuron's parameters travel as one string, so that the compiled graph holds everything it needs.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .. import surrogate as surrogates
from ..backend import choose, load
from ..backend.reference import bn_lif as bn_reference
from ..spec.layout import arrange
from ..spec.neuron import LIFSpec
from ..spec.norm import Batch, Parameters
from ..spec.split import CHUNK
from . import launch
from .launch import Kept, Op, Wanted

_library = torch.library.Library("snnkern", "DEF")
_library.define(
    "lif(Tensor x, Tensor? v, str neuron, int time_dim, int steps_out, str backend) -> "
    "(Tensor spikes, Tensor v_last, Tensor saved)"
)
_library.define(
    "lif_backward(Tensor x, Tensor? v, Tensor saved, Tensor? grad_spikes, Tensor? grad_v_last, str neuron, "
    "int time_dim, int steps_out, str backend) -> (Tensor grad_x, Tensor grad_v)"
)
_norm = "Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? v, Tensor? residual"
_library.define(
    f"bn_lif(Tensor y, {_norm}, str neuron, str norm, int time_dim, int steps_out, str backend) -> "
    "(Tensor spikes, Tensor v_last, Tensor saved, Tensor table, Tensor running_mean, Tensor running_var)"
)
_library.define(
    "bn_lif_backward(Tensor y, Tensor? v, Tensor saved, Tensor table, Tensor? residual, Tensor? grad_spikes, "
    "Tensor? grad_v_last, str neuron, str norm, int time_dim, int steps_out, str backend) -> "
    "(Tensor grad_y, Tensor affine, Tensor grad_v, Tensor grad_residual)"
)
_library.define("ttm(Tensor x, int steps, int time_dim, str backend) -> Tensor")


@lru_cache(maxsize=512)
def _spec(neuron: str) -> LIFSpec:
    form, leak, threshold, reset, detach_reset, fire_at_threshold, surrogate = neuron.split(";")
    return LIFSpec(
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


def lif(x, v, spec: LIFSpec, time_dim: int, steps_out: int, backend: str):
    """``snnkern.lif`` of checked arguments, as one node of the graph."""
    spikes, v_last, _ = torch.ops.snnkern.lif(x, v, neuron(spec), time_dim, steps_out, backend)
    return spikes, v_last


def neuron(spec: LIFSpec) -> str:
    return (
        f"{spec.form};{spec.leak};{spec.threshold};{spec.reset};{spec.detach_reset};{spec.fire_at_threshold};"
        f"{spec.surrogate.text}"
    )


def bn_lif(tensors, norm: Batch, spec: LIFSpec, time_dim: int, steps_out: int, backend: str | None):
    """``snnkern.bn_lif`` of checked arguments; also returns the new running statistics, as nothing changes in place."""
    if norm.group is not None:
        raise RuntimeError("bn_lif cannot be compiled with a process_group: leave it out of torch.compile")
    name = name_for(tensors[0].device.type, tensors[0].dtype, backend)
    if name == "reference":
        y, weight, bias, *running, v, residual = tensors
        running = [None if r is None else r.clone() for r in running]
        parameters = Parameters(weight, bias, *running)
        return *bn_reference(y, parameters, v, residual, norm, spec, time_dim, steps_out), *running
    spikes, v_last, _, _, *running = torch.ops.snnkern.bn_lif(
        *tensors, neuron(spec), batch(norm), time_dim, steps_out, name
    )
    return spikes, v_last, *running


def batch(norm: Batch) -> str:
    return f"{norm.training};{norm.momentum};{norm.eps};{norm.scale}"


@lru_cache(maxsize=512)
def _batch(norm: str) -> Batch:
    training, *numbers = norm.split(";")
    return Batch(training == "True", *map(float, numbers), None)


class _Nothing:
    """A backend that launches nothing: with it, the ops below only allocate, which is what tracing needs."""

    @staticmethod
    def lif_forward(*args):
        pass

    lif_backward = ttm = bn_moments = bn_prepare = bn_sums = bn_gradients = lif_forward


def _forward(kernels, x, v, neuron, time_dim, steps_out):
    op = Op(_spec(neuron), time_dim, steps_out, kernels)
    spikes, v_last, kept, _ = launch.lif_forward(op, x, v, keep=True)
    return spikes, v_last, _or_empty(kept.saved, v_last)


def _backward(kernels, x, v, saved, grad_spikes, grad_v_last, neuron, time_dim, steps_out):
    op = Op(_spec(neuron), time_dim, steps_out, kernels)
    kept, layout = _kept(op, x, v, saved)
    return launch.lif_backward(op, layout, kept, grad_spikes, grad_v_last, want_v=True)


def _bn_forward(kernels, y, weight, bias, running_mean, running_var, v, residual, neuron, norm, time_dim, steps_out):
    op = Op(_spec(neuron), time_dim, steps_out, kernels)
    running = [None if r is None else r.clone() for r in (running_mean, running_var)]
    parameters = Parameters(weight, bias, *running)
    spikes, v_last, kept, *_ = launch.bn_forward(op, _batch(norm), parameters, y, v, residual, keep=True)
    return spikes, v_last, *(_or_empty(t, v_last) for t in (kept.saved, kept.table, *running))


def _bn_backward(kernels, y, v, saved, table, residual, grad_spikes, grad_v_last, neuron, norm, time_dim, steps_out):
    op = Op(_spec(neuron), time_dim, steps_out, kernels)
    kept, layout = _kept(op, y, v, saved)
    kept = kept._replace(table=table, residual=None if residual is None else layout.arrange(residual))
    count = y.numel() / max(y.shape[2], 1)
    return launch.bn_backward(op, _batch(norm), layout, count, kept, grad_spikes, grad_v_last, Wanted())


def _kept(op: Op, x, v, saved):
    x, layout = arrange(x, op.time_dim, op.steps_out)
    if v is not None:
        v = layout.arrange(v, without=op.time_dim)
    return Kept(x, v, saved if layout.steps > CHUNK else None), layout


def _or_empty(t, like):
    return like.new_empty(0) if t is None else t


def _implement(name, function):
    torch.library.impl(
        name, "CompositeExplicitAutograd", lambda *args: function(load(args[-1]), *args[:-1]), lib=_library
    )
    torch.library.register_fake(name, lambda *args: function(_Nothing, *args[:-1]), lib=_library)


_implement("snnkern::ttm", lambda kernels, *args: launch.ttm(*args, kernels))
_implement("snnkern::lif", _forward)
_implement("snnkern::lif_backward", _backward)
_implement("snnkern::bn_lif", _bn_forward)
_implement("snnkern::bn_lif_backward", _bn_backward)


def _setup(ctx, inputs, output):
    x, v, *ctx.rest = inputs
    ctx.save_for_backward(x, v, output[2])
    ctx.set_materialize_grads(False)


def _grad(ctx, grad_spikes, grad_v_last, _):
    x, v, saved = ctx.saved_tensors
    grad_x, grad_v = torch.ops.snnkern.lif_backward(x, v, saved, grad_spikes, grad_v_last, *ctx.rest)
    return grad_x, None if v is None else grad_v, None, None, None, None


torch.library.register_autograd("snnkern::lif", _grad, setup_context=_setup, lib=_library)


def _setup_bn(ctx, inputs, output):
    y, _, _, _, _, v, residual, *ctx.rest = inputs
    ctx.save_for_backward(y, v, output[2], output[3], residual)
    ctx.set_materialize_grads(False)


def _grad_bn(ctx, grad_spikes, grad_v_last, *_):
    tensors = ctx.saved_tensors
    grad_y, affine, grad_v, grad_residual = torch.ops.snnkern.bn_lif_backward(
        *tensors, grad_spikes, grad_v_last, *ctx.rest
    )
    weight, bias, _, _, v, residual = ctx.needs_input_grad[1:7]
    wanted = affine[0] if weight else None, affine[1] if bias else None, None, None
    return grad_y, *wanted, grad_v if v else None, grad_residual if residual else None, *(None,) * 5


torch.library.register_autograd("snnkern::bn_lif", _grad_bn, setup_context=_setup_bn, lib=_library)


def _setup_ttm(ctx, inputs, output):
    x, _, time_dim, backend = inputs
    ctx.rest = x.shape[time_dim], time_dim, backend


torch.library.register_autograd(
    "snnkern::ttm",
    lambda ctx, grad: (torch.ops.snnkern.ttm(grad, *ctx.rest), None, None, None),
    setup_context=_setup_ttm,
    lib=_library,
)
