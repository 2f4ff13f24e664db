"""Layers of neurons that receive their own spikes a step later, for all steps in one differentiable op."""

from __future__ import annotations

import inspect

import torch

from ..backend import choose
from ..spec.arguments import check_dense, check_x
from ..spec.layout import are_plain_gradients, is_plain, state_dtype
from ..spec.neuron import new_spec
from .launch import Feedback, Kept, Op, Tensors, recurrent_backward, recurrent_forward
from .lif import any_requires_grad, backend_for, check_tensors, checked_state, neuron_of, returned, spec_of
from .pack import note, pack, unpack
from .sharded import is_sharded

_NEURON = inspect.signature(neuron_of).parameters


def recurrent_lif(
    x: torch.Tensor,
    weight: torch.Tensor,
    v: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    s: torch.Tensor | None = None,
    *,
    time_dim: int = 0,
    backend: str | None = None,
    **neuron,
) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...]]:
    """A recurrent layer of LIF neurons over time: forward is one call, and so is backward.

    ::

        r[t] = sum over the neurons j that fired at t-1, in ascending j from 0, of weight[:, j]
        (spikes, v) as snnkern.lif of (x[t] + bias) + r[t]

    float32 spikes are those of this loop bit for bit, on every backend. A spike that is not 1 (ternary, integer)
    multiplies its weights.

    Args:
        x: input current [T, N, H], or with ``time_dim`` another order of T among them; H, the neurons of a layer, comes
            last of the others, of which there may be any number. dtypes and strides as ``lif`` has.
        weight: [H, H]: ``weight[k, j]`` is what neuron k receives when j has fired. Any float dtype; it is used in that
            of the state.
        v: state before the first step, as ``lif`` takes it.
        s: spikes before the first step, x without time, in x.dtype. None: there were none.
        time_dim, backend: as ``lif``.
        neuron: all other keywords of ``lif`` but ``steps_out`` and ``return_v``.

    Returns:
        ``spikes``, of which the last step is the next call's ``s``, and the state after the last step, its ``v``.

    Gradient: to x, weight, v, s and parameters that are tensors, through the spikes that feed back too. Kept for
    backward: x, the state of every 16th step, and spikes as bits (ternary and integer ones as they are). Once
    differentiable, as ``lif``.

    Raises: as ``lif``.

    Source: Cramer et al., "The Heidelberg Spiking Data Sets", IEEE TNNLS 2022, eq. 2-4; Bellec et al., NeurIPS 2018.
    Specification: ``snnkern/backend/reference/lif.py``.
    """
    for name in neuron:
        if name not in _NEURON:
            raise TypeError(f"recurrent_lif() got an unexpected keyword argument {name!r}")
    neuron, tensors = neuron_of(**neuron)
    states = v if type(v) is tuple else (v,)
    if not is_plain(x, weight, s, *states, *tensors):
        return _registered(x, weight, v, s, tensors, neuron, time_dim, backend)
    spec = spec_of(neuron)
    time_dim, weight, v, tensors = _check(x, weight, v, s, tensors, spec, time_dim)
    kernels = choose(x.device.type, x.dtype, backend_for(spec.surrogate, backend))
    op = Op(spec, time_dim, x.shape[time_dim], kernels)
    if kernels.differentiable:
        smooth = not spec.surrogate.spiking
        spikes, state = kernels.lif(x, v, spec, time_dim, None, smooth, *tensors, weight=weight, s=s)
        if spec.binary and not smooth:
            note(spikes)
    elif torch.is_grad_enabled() and any_requires_grad(x, weight, v, s, *tensors):
        spikes, state = _Recurrent.apply(x, weight, v, s, *tensors, op)
    else:
        spikes, state, *_ = recurrent_forward(op, x, weight, v, s, False, tensors)
    return spikes, returned(state, spec)


def _registered(x, weight, v, s, tensors, neuron, time_dim, backend):
    """As ``ops/lif.py``'s."""
    from . import library

    check_dense(x=x, weight=weight, v=v, s=s, leak=tensors.leak, threshold=tensors.threshold, bias=tensors.bias)
    if is_sharded(x):
        raise TypeError("x must not be a DTensor: neurons of a recurrent layer need the spikes of all others")
    spec = new_spec(*neuron)
    time_dim, weight, v, tensors = _check(x, weight, v, s, tensors, spec, time_dim)
    name = library.name_for(x.device.type, x.dtype, backend_for(spec.surrogate, backend))
    if name == "reference":
        from ..backend.reference import lif as reference

        smooth = not spec.surrogate.spiking
        spikes, state = reference(x, v, spec, time_dim, None, smooth, *tensors, weight=weight, s=s)
    else:
        spikes, state = library.recurrent_lif(x, weight, v, s, tensors, spec, time_dim, name)
    return spikes, returned(state, spec)


def _check(x, weight, v, s, tensors: Tensors, spec, time_dim):
    """Checks the tensors; returns what kernels take for what is not as they do."""
    time_dim = check_x(x, time_dim)
    v = checked_state(x, v, time_dim, spec)
    without_time = x.shape[:time_dim] + x.shape[time_dim + 1 :]
    if not without_time:
        raise ValueError(f"x must have a dimension of neurons besides time, got shape {tuple(x.shape)}")
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a floating tensor, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")
    size = without_time[-1]
    if tuple(weight.shape) != (size, size):
        raise ValueError(f"weight must be [H, H] for x with H = {size} neurons, got shape {tuple(weight.shape)}")
    if s is not None:
        if not isinstance(s, torch.Tensor):
            raise TypeError(f"s must be a tensor or None, got {type(s).__name__}")
        if s.dtype != x.dtype or s.device != x.device:
            raise TypeError(f"s must be {x.dtype} on {x.device}, as x is, got {s.dtype} on {s.device}")
        if s.shape != without_time:
            raise ValueError(f"s must have the shape of x without time, {tuple(without_time)}, got {tuple(s.shape)}")
    return time_dim, weight.to(state_dtype(x.dtype)), v, check_tensors(x, time_dim, tensors)


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, v, s, leak, threshold, bias, op):
        tensors = Tensors(leak, threshold, bias)
        spikes, state, kept, layout, feedback = recurrent_forward(op, x, weight, v, s, True, tensors)
        bits = pack(layout.arrange(spikes), op.kernels, check=False) if op.spec.binary else spikes
        ctx.save_for_backward(*kept, *feedback, bits)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.layout = op, layout
        return spikes, state

    @staticmethod
    def backward(ctx, grad_spikes, grad_state):
        if torch.is_grad_enabled():
            raise RuntimeError("recurrent_lif is once differentiable: create_graph=True needs backend='reference'")
        ctx.ran = True
        if grad_spikes is None and grad_state is None:
            return (None,) * 8
        op, layout, (*kept, weight, s, spikes) = ctx.op, ctx.layout, ctx.saved_tensors
        kept, feedback = Kept(*kept), Feedback(weight, s)
        if op.spec.binary:
            order = layout.order or range(kept.x.dim())
            spikes = layout.restore(unpack(spikes, [kept.x.shape[i] for i in order], kept.x.dtype, op.kernels))
        _, want_weight, want_v, want_s, *want_tensors, _ = ctx.needs_input_grad
        if are_plain_gradients(grad_spikes, grad_state):
            wanted = want_v, want_weight, want_s, *want_tensors
            given = kept, feedback, spikes, grad_spikes, grad_state, *wanted
            grad_x, grad_v, grad_weight, grad_s, *rest = recurrent_backward(op, layout, *given)
            return grad_x, grad_weight, grad_v, grad_s, *rest, None
        from . import library

        gradients = library.recurrent_lif_backward(op, layout, kept, feedback, spikes, grad_spikes, grad_state)
        wanted = True, want_weight, want_v, want_s, *want_tensors
        return *(grad if want else None for grad, want in zip(gradients, wanted, strict=True)), None
