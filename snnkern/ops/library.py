"""The ops as PyTorch library ops: what ``torch.compile`` sees through, what fake tensors, tensor subclasses, dispatch
modes and ``torch.jit.trace`` can take hold of, what gets a tensor with its sign still to be flipped as plain numbers.
Plain tensors do without in eager mode: an ``autograd.Function`` around the same calls costs half as much per call (see
``ops/lif.py``).

The neuron's parameters travel as one string, so that the compiled graph holds everything it needs; what may change
without compiling anew, as tensors: ``curve`` has the numbers of a surrogate that its text does not say.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch.autograd import forward_ad

from .. import surrogate as surrogates
from ..backend import choose, load
from ..backend.reference import bn_lif as bn_reference
from ..spec.layout import Layout, arrange, state_dtype
from ..spec.neuron import LIFSpec
from ..spec.norm import Batch, Parameters
from . import launch
from .launch import Feedback, Kept, Op, Tensors, Wanted

_library = torch.library.Library("snnkern", "DEF")
_parameters = "Tensor? leak, Tensor? threshold, Tensor? bias, Tensor? curve"
_gradients = "Tensor grad_leak, Tensor grad_threshold, Tensor grad_bias"
_library.define(
    f"lif(Tensor x, Tensor? v, {_parameters}, str neuron, int time_dim, SymInt? steps_out, str return_v, str backend) "
    "-> (Tensor spikes, Tensor v_last, Tensor saved)"
)
_library.define(
    f"lif_backward(Tensor x, Tensor? v, Tensor saved, {_parameters}, Tensor? grad_spikes, Tensor? grad_v_last, "
    "str neuron, int time_dim, SymInt? steps_out, str return_v, str backend) -> "
    f"(Tensor grad_x, Tensor grad_v, {_gradients})"
)
_library.define(
    f"recurrent_lif(Tensor x, Tensor weight, Tensor? v, Tensor? s, {_parameters}, str neuron, int time_dim, "
    "str backend) -> (Tensor spikes, Tensor v_last, Tensor saved)"
)
_library.define(
    f"recurrent_lif_backward(Tensor x, Tensor weight, Tensor? v, Tensor? s, Tensor saved, Tensor spikes, "
    f"{_parameters}, Tensor? grad_spikes, Tensor? grad_v_last, str neuron, int time_dim, str backend) -> "
    f"(Tensor grad_x, Tensor grad_weight, Tensor grad_v, Tensor grad_s, {_gradients})"
)
_norm = (
    "Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? v, Tensor? residual, "
    "Tensor? curve"
)
_library.define(
    f"bn_lif(Tensor y, {_norm}, str neuron, str norm, int time_dim, SymInt? steps_out, bool return_v, str backend) -> "
    "(Tensor spikes, Tensor v_last, Tensor saved, Tensor table, Tensor running_mean, Tensor running_var)"
)
_library.define(
    "bn_lif_backward(Tensor y, Tensor? v, Tensor saved, Tensor table, Tensor? residual, Tensor? curve, "
    "Tensor? grad_spikes, Tensor? grad_v_last, str neuron, str norm, int time_dim, SymInt? steps_out, str backend) -> "
    "(Tensor grad_y, Tensor affine, Tensor grad_v, Tensor grad_residual)"
)
_library.define("ttm(Tensor x, SymInt steps, int time_dim, str backend) -> Tensor")


def _spec(neuron: str, curve: torch.Tensor | None, kernels) -> LIFSpec:
    if curve is None:
        return _spec_of(neuron)
    if kernels is _Nothing:  # the numbers are not to be had, nor needed
        _, _, rest = neuron.partition(";")
        return _spec_of(f"{surrogates.Triangle().text};{rest}")
    return _spec_of.__wrapped__(neuron, curve)


@lru_cache(maxsize=512)
def _spec_of(neuron: str, curve: torch.Tensor | None = None) -> LIFSpec:
    surrogate, form, *rest = neuron.split(";")
    flags = [flag == "True" for flag in rest[:3]]
    numbers = [None if number == "None" else float(number) for number in rest[3:]]
    return LIFSpec(form, *numbers[:3], surrogates.parse(surrogate, curve), *flags, *numbers[3:])


@torch.compiler.assume_constant_result
def name_for(device_type: str, dtype: torch.dtype, backend: str | None) -> str:
    """The name of the backend that ``choose`` chooses. ONNX has no such op, but the operations of the reference."""
    if torch.onnx.is_in_onnx_export():
        return "reference"
    return name_of(choose(device_type, dtype, backend))


def name_of(kernels) -> str:
    return kernels.__name__.rpartition(".")[2]


def lif(x, v, tensors, spec: LIFSpec, time_dim: int, steps_out: int | None, return_v: bool | str, backend: str):
    """``snnkern.lif`` of checked arguments, as one node of the graph. ``steps_out`` None: as many as x has."""
    curve = _curve(spec, x)
    rest = neuron(spec), time_dim, steps_out, str(return_v), backend
    spikes, v_last, _ = _call("lif", x, v, *tensors, curve, *rest)
    return spikes, v_last


def recurrent_lif(x, weight, v, s, tensors, spec: LIFSpec, time_dim: int, backend: str):
    """``snnkern.recurrent_lif``, likewise."""
    spikes, v_last, _ = _call(
        "recurrent_lif", x, weight, v, s, *tensors, _curve(spec, x), neuron(spec), time_dim, backend
    )
    return spikes, v_last


def recurrent_lif_backward(op: Op, layout: Layout, kept: Kept, feedback: Feedback, spikes, grad_spikes, grad_v_last):
    """``launch.recurrent_backward``, as ``lif_backward``."""
    x, v, saved = _as_given(op, layout, kept)
    s = None if feedback.s is None else layout.restore(feedback.s, op.time_dim)
    given = x, feedback.weight, v, s, saved, spikes, *kept.tensors, _curve(op.spec, x)
    rest = grad_spikes, grad_v_last, neuron(op.spec), op.time_dim, name_of(op.kernels)
    return _call("recurrent_lif_backward", *given, *rest)


def lif_backward(op: Op, layout: Layout, kept: Kept, grad_spikes, grad_v_last):
    """``launch.lif_backward``, of what a plain forward kept and gradients that are not plain."""
    x, v, saved = _as_given(op, layout, kept)
    parameters = *kept.tensors, _curve(op.spec, x)
    rest = neuron(op.spec), op.time_dim, op.steps_out, str(op.return_v), name_of(op.kernels)
    return _call("lif_backward", x, v, saved, *parameters, grad_spikes, grad_v_last, *rest)


def ttm(x, steps: int, time_dim: int, backend: str):
    return _call("ttm", x, steps, time_dim, backend)


def _call(name: str, *arguments):
    """The registered op, as whoever looks on can bear it."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.snnkern, name)(*arguments)
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        _refuse_tangents(name)
    if torch._C._are_functorch_transforms_active():
        return _functions[name].apply(*arguments)
    return getattr(torch.ops.snnkern, name)(*arguments)


def _as_given(op: Op, layout: Layout, kept: Kept):
    """What forward kept, in the order of x's own dimensions."""
    v = None if kept.v is None else layout.restore(kept.v, op.time_dim, op.spec.states)
    return kept.x, v, _or_empty(kept.saved, kept.x)


def _curve(spec: LIFSpec, x) -> torch.Tensor | None:
    return spec.surrogate.values(x.device, state_dtype(x.dtype))


def neuron(spec: LIFSpec) -> str:
    if spec.surrogate.text is None:
        spec.surrogate.twin()  # raises
    flags = f"{spec.detach_reset};{spec.fire_at_threshold};{spec.ternary}"
    numbers = f"{spec.leak};{spec.threshold};{spec.reset};{spec.v_min};{spec.v_start}"
    more = f"{spec.synapse_decay};{spec.threshold_decay};{spec.threshold_jump}"
    return f"{spec.surrogate.text};{spec.form};{flags};{numbers};{more}"


def bn_lif(tensors, norm: Batch, spec: LIFSpec, time_dim: int, steps_out: int, return_v: bool, backend: str | None):
    """``snnkern.bn_lif`` of checked arguments; also returns the new running statistics, as nothing changes in place."""
    _refuse_group(norm)
    name = name_for(tensors[0].device.type, tensors[0].dtype, backend)
    if name == "reference":
        y, weight, bias, *running, v, residual = tensors
        running = [None if r is None else r.clone() for r in running]
        parameters = Parameters(weight, bias, *running)
        return *bn_reference(y, parameters, v, residual, norm, spec, time_dim, steps_out), *running
    rest = neuron(spec), batch(norm), time_dim, steps_out, return_v, name
    spikes, v_last, _, _, *running = _call("bn_lif", *tensors, _curve(spec, tensors[0]), *rest)
    return spikes, v_last, *running


def bn_lif_backward(op: Op, layout: Layout, norm: Batch, kept: Kept, grad_spikes, grad_v_last, wanted):
    """As ``lif_backward``; ``wanted`` says which of y, weight, bias, v and residual want a gradient."""
    _refuse_group(norm)
    y, v, saved = _as_given(op, layout, kept)
    residual = None if kept.residual is None else layout.restore(kept.residual)
    curve, rest = _curve(op.spec, y), (op.time_dim, op.steps_out, name_of(op.kernels))
    rest = curve, grad_spikes, grad_v_last, neuron(op.spec), batch(norm), *rest
    gradients = _call("bn_lif_backward", y, v, saved, kept.table, residual, *rest)
    return _wanted(wanted, *gradients)


def _wanted(wanted, grad_y, affine, grad_v, grad_residual):
    gradients = grad_y, affine[0], affine[1], grad_v, grad_residual
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def _refuse_group(norm: Batch) -> None:
    if norm.group is not None:
        raise RuntimeError(
            "bn_lif with a process_group cannot be compiled, traced or given tensors that are not plain: leave it out"
        )


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

    lif_backward = recurrent_forward = recurrent_backward = lif_forward
    ttm = bn_moments = bn_prepare = bn_sums = bn_gradients = lif_forward


def _op(kernels, x, curve, neuron, time_dim, steps_out, return_v) -> Op:
    if steps_out is not None and steps_out > x.shape[time_dim]:
        raise ValueError(f"this call was recorded for {steps_out} steps or more, got shape {tuple(x.shape)}")
    return Op(_spec(neuron, curve, kernels), time_dim, steps_out, kernels, return_v)


# What an op's ``return_v`` stands for.
_RETURNED = {"True": True, "False": False, "sequence": "sequence"}


def _forward(kernels, x, v, leak, threshold, bias, curve, neuron, time_dim, steps_out, return_v):
    op = _op(kernels, x, curve, neuron, time_dim, steps_out, _RETURNED[return_v])
    spikes, v_last, kept, _ = launch.lif_forward(op, x, v, True, Tensors(leak, threshold, bias))
    return spikes, *(_or_empty(t, x, state_dtype(x.dtype), n) for t, n in ((v_last, 0), (kept.saved, launch.LEAST)))


def _backward(kernels, x, v, saved, leak, threshold, bias, curve, grad_spikes, grad_v_last, neuron, time_dim, steps_out,
              return_v):  # fmt: skip
    op = Op(_spec(neuron, curve, kernels), time_dim, steps_out, kernels, _RETURNED[return_v])
    kept, layout = _kept(op, *arrange(x, time_dim, steps_out), v, saved, leak, threshold, bias)
    wanted = True, *(t is not None for t in kept.tensors)
    gradients = launch.lif_backward(op, layout, kept, grad_spikes, grad_v_last, *wanted)
    return *gradients[:2], *(_or_empty(t, x, state_dtype(x.dtype)) for t in gradients[2:])


def _recurrent_forward(kernels, x, weight, v, s, leak, threshold, bias, curve, neuron, time_dim):
    op = Op(_spec(neuron, curve, kernels), time_dim, x.shape[time_dim], kernels)
    spikes, v_last, kept, *_ = launch.recurrent_forward(op, x, weight, v, s, True, Tensors(leak, threshold, bias))
    return spikes, v_last, _or_empty(kept.saved, x, state_dtype(x.dtype), launch.LEAST)


def _recurrent_backward(kernels, x, weight, v, s, saved, spikes, leak, threshold, bias, curve, grad_spikes, grad_v_last,
                        neuron, time_dim):  # fmt: skip
    op = Op(_spec(neuron, curve, kernels), time_dim, x.shape[time_dim], kernels)
    kept, layout = _kept(op, *launch.arrange_layers(x, time_dim), v, saved, leak, threshold, bias)
    feedback = Feedback(weight.contiguous(), None if s is None else layout.arrange(s, time_dim))
    wanted = True, True, s is not None, *(t is not None for t in kept.tensors)
    gradients = launch.recurrent_backward(op, layout, kept, feedback, spikes, grad_spikes, grad_v_last, *wanted)
    grad_x, grad_v, grad_weight, grad_s, *rest = gradients
    state = state_dtype(x.dtype)
    return grad_x, grad_weight, grad_v, _or_empty(grad_s, x), *(_or_empty(t, x, state) for t in rest)


def _bn_forward(kernels, y, weight, bias, running_mean, running_var, v, residual, curve, neuron, norm, *rest):
    op = _op(kernels, y, curve, neuron, *rest)
    running = [None if r is None else r.clone() for r in (running_mean, running_var)]
    parameters = Parameters(weight, bias, *running)
    spikes, v_last, kept, *_ = launch.bn_forward(op, _batch(norm), parameters, y, v, residual, keep=True)
    tensors = (v_last, 0), (kept.saved, launch.LEAST), (kept.table, 0), *((r, 0) for r in running)
    return spikes, *(_or_empty(t, y, state_dtype(y.dtype), n) for t, n in tensors)


def _bn_backward(kernels, y, v, saved, table, residual, curve, grad_spikes, grad_v_last, neuron, norm, time_dim,
                 steps_out):  # fmt: skip
    op = Op(_spec(neuron, curve, kernels), time_dim, steps_out, kernels)
    kept, layout = _kept(op, *arrange(y, time_dim, steps_out), v, saved)
    kept = kept._replace(table=table, residual=None if residual is None else layout.arrange(residual))
    count, period = y.numel() / max(y.shape[2], 1), layout.period(y.shape, 2, time_dim)
    return launch.bn_backward(op, _batch(norm), layout, count, period, kept, grad_spikes, grad_v_last, Wanted())


def _kept(op: Op, x, layout: Layout, v, saved, *tensors):
    if v is not None:
        v = layout.arrange(v, op.time_dim, op.spec.states)
    return Kept(x, v, saved if launch.has_chunks(layout.steps) else None, None, None, *tensors), layout


def _or_empty(t, like, dtype=None, size=0):
    return like.new_empty(size, dtype=dtype) if t is None else t


def _setup(ctx, inputs, output):
    x, v, leak, threshold, bias, curve, *ctx.rest, ctx.returned_v, ctx.backend = inputs
    ctx.save_for_backward(x, v, output[2], leak, threshold, bias, curve)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad_spikes, grad_v_last, _):
    grad_v_last = grad_v_last if ctx.returned_v != "False" else None  # of nothing
    rest = grad_spikes, grad_v_last, *ctx.rest, ctx.returned_v, ctx.backend
    gradients = _once("lif", *ctx.saved_tensors, *rest)
    _, v, _, *tensors, _ = ctx.saved_tensors
    return *_given(gradients, (True, v, *tensors)), *(None,) * 6


def _given(gradients, tensors):
    """The gradients of the tensors that are."""
    return [grad if t is not None else None for grad, t in zip(gradients, tensors, strict=True)]


def _setup_recurrent(ctx, inputs, output):
    *tensors, curve, ctx.neuron, ctx.time_dim, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:4], output[2], output[0], *tensors[4:], curve)
    ctx.set_materialize_grads(False)


def _grad_recurrent(ctx, grad_spikes, grad_v_last, _):
    rest = grad_spikes, grad_v_last, ctx.neuron, ctx.time_dim, ctx.backend
    gradients = _once("recurrent_lif", *ctx.saved_tensors, *rest)
    _, _, v, s, _, _, *tensors, _ = ctx.saved_tensors
    return *_given(gradients, (True, True, v, s, *tensors)), *(None,) * 4


def _setup_bn(ctx, inputs, output):
    y, _, _, _, _, v, residual, curve, *ctx.rest, ctx.returned_v, ctx.backend = inputs
    ctx.save_for_backward(y, v, output[2], output[3], residual, curve)
    ctx.set_materialize_grads(False)


def _grad_bn(ctx, grad_spikes, grad_v_last, *_):
    grad_v_last = grad_v_last if ctx.returned_v else None
    gradients = _once("bn_lif", *ctx.saved_tensors, grad_spikes, grad_v_last, *ctx.rest, ctx.backend)
    y, weight, bias, _, _, v, residual, *_ = ctx.needs_input_grad
    grad_y, grad_weight, grad_bias, *rest = _wanted((y, weight, bias, v, residual), *gradients)
    return grad_y, grad_weight, grad_bias, None, None, *rest, *(None,) * 7


def _setup_ttm(ctx, inputs, output):
    x, _, time_dim, backend = inputs
    ctx.rest = x.shape[time_dim], time_dim, backend


def _grad_ttm(ctx, grad):
    return ttm(grad, *ctx.rest), None, None, None


def _once(name: str, *arguments):
    """The adjoint of an op. torch.func's transforms always build its graph; elsewhere that is asking for more."""
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        _refuse_twice(name)
    return _call(f"{name}_backward", *arguments)


def _refuse_twice(name: str, *_):
    raise RuntimeError(f"{name} is once differentiable: create_graph=True needs backend='reference'")


def _refuse_tangents(name: str, *_):
    raise RuntimeError(f"{name} has no forward-mode derivative (jvp): that needs backend='reference'")


def _one_by_one(op):
    """How ``torch.vmap`` runs an op: on one element of the batch after the other."""

    def run(info, in_dims, *arguments):
        chosen = [
            [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        results = [op(*each) for each in chosen]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return run


# Under torch.func's transforms: the same as functions, which is what these differentiate.
_functions = {}


def _register(name: str, function, setup, grad) -> None:
    """``function(kernels, *arguments)`` as an op; ``setup`` and ``grad`` as ``register_autograd`` has them."""
    full, lib = f"snnkern::{name}", {"lib": _library}
    torch.library.impl(full, "CompositeExplicitAutograd", lambda *args: function(load(args[-1]), *args[:-1]), **lib)
    torch.library.register_fake(full, lambda *args: function(_Nothing, *args[:-1]), **lib)
    op = getattr(torch.ops.snnkern, name)
    torch.library.register_vmap(full, _one_by_one(op), **lib)
    if setup:
        torch.library.register_autograd(full, grad, setup_context=setup, **lib)
    methods = {"forward": lambda *args: op(*args), "setup_context": setup or (lambda *args: None), "backward": grad}
    methods["jvp"] = partial(_refuse_tangents, name)
    of = {key: staticmethod(method) for key, method in methods.items()}
    _functions[name] = type(name, (torch.autograd.Function,), {**of, "generate_vmap_rule": True})


_register("lif", _forward, _setup, _grad)
_register("lif_backward", _backward, None, partial(_refuse_twice, "lif"))
_register("recurrent_lif", _recurrent_forward, _setup_recurrent, _grad_recurrent)
_register("recurrent_lif_backward", _recurrent_backward, None, partial(_refuse_twice, "recurrent_lif"))
_register("bn_lif", _bn_forward, _setup_bn, _grad_bn)
_register("bn_lif_backward", _bn_backward, None, partial(_refuse_twice, "bn_lif"))
_register("ttm", lambda kernels, *args: launch.ttm(*args, kernels), _setup_ttm, _grad_ttm)
