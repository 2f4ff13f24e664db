"""Batch norm, then leaky integrate-and-fire neurons over time, as one differentiable op."""

from __future__ import annotations

import torch
import torch.distributed

from ..backend import choose
from ..spec.arguments import check_dense, check_group, check_residual, check_state, check_x, flag, number, plan_steps
from ..spec.layout import are_plain_gradients, is_plain, state_dtype
from ..spec.neuron import make_spec, new_spec
from ..spec.norm import Batch, Parameters
from ..surrogate import Surrogate, Triangle, from_spikingjelly
from .launch import Kept, Op, Wanted, bn_backward, bn_forward
from .lif import backend_for
from .pack import note
from .sharded import is_sharded
from .ttm import ttm


def bn_lif(
    y: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    v: torch.Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    scale: float = 1.0,
    residual: torch.Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    decay: float | None = None,
    tau: float | None = None,
    decay_input: bool = True,
    threshold: float = 1.0,
    reset: float | None = 0.0,
    surrogate: Surrogate = Triangle(),
    detach_reset: bool = False,
    fire_at_threshold: bool = False,
    inverse_tau: float | None = None,
    ternary: bool = False,
    v_min: float | None = None,
    steps_out: int | None = None,
    time_dim: int = 0,
    return_v: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Batch norm over time, batch and space, then leaky integrate-and-fire: ``lif(batch_norm(y) + residual)``, fused.

    ::

        x = (y - mean) * (scale * weight / sqrt(var + eps)) + bias [+ residual]
        spikes, v_last = lif(x, v)

    x is never written. mean and var are those of each channel over all its elements (training; var the biased one), or
    the running statistics.

    Args:
        y: [T, N, C, ...], or [N, T, C, ...] with ``time_dim=1``; float32, float64 (``cpu`` and ``reference`` backends),
            float16 or bfloat16; any strides, channels last too. One frame expanded over T is read once for its
            statistics.
        weight, bias: [C] or None; float32 (float64 for y in float64), or y.dtype.
        running_mean, running_var: [C], changed in place while training:
            ``running = (1 - momentum)*running + momentum*new``, with the unbiased variance. None: none are kept.
        v: potential before the first step; see ``lif``.
        training: normalise with the statistics of y, and update the running ones.
        momentum, eps: those of ``torch.nn.BatchNorm2d``.
        scale: a constant beside weight; ``alpha * threshold`` makes it tdBN.
        residual: added to what the neurons receive, such as a block's shortcut; shape, dtype and device of y.
        process_group: processes whose y together make the statistics, forward and backward. None: this process alone.
        decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold, inverse_tau, ternary,
            v_min, steps_out, time_dim, return_v, backend: those of ``lif``, but that no parameter is a tensor, and
            there is no sequence of potentials.

    Returns: ``spikes`` and ``v_last``, as ``lif``.

    Gradient: to y, weight, bias, residual and v; once differentiable, except on the ``reference`` backend; see ``lif``.
    Kept for backward: y, the residual, some numbers per channel and, beyond 16 steps, the potential of every 16th.

    Statistics are summed in float64, so that means far from 0 cost no accuracy, and rounded once to the dtype of the
    state; from there on every backend computes alike. float32 spikes are those of the reference bit for bit unless that
    rounding falls between two sums in different order, which happens in about one channel in ten million.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        RuntimeError: the backend asked for cannot run here, or ``v`` belongs to a graph that backward has freed.

    Source: Ioffe and Szegedy, ICML 2015; over time, and with the scale, Zheng et al., "Going Deeper With
    Directly-Trained Larger Spiking Neural Networks", AAAI 2021, eq. 4-5. Specification:
    ``snnkern/backend/reference/bn_lif.py``.
    """
    if not isinstance(surrogate, Surrogate):
        surrogate = from_spikingjelly(surrogate)
    flags = detach_reset, fire_at_threshold
    neuron = decay, tau, decay_input, threshold, reset, surrogate, *flags, inverse_tau, ternary, v_min
    flag("return_v", return_v)
    plain = is_plain(y, v, residual, weight, bias, running_mean, running_var)
    if not plain:
        check_dense(
            y=y, v=v, residual=residual, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
        )
        if is_sharded(y):
            raise NotImplementedError("bn_lif takes no DTensor: normalise apart from the neurons, which lif computes")
    if plain and surrogate.live:
        neuron = *neuron[:5], surrogate.now(), *neuron[6:]
    try:
        spec = make_spec(*neuron) if plain else new_spec(*neuron)
    except TypeError:  # also of what cannot be hashed, which is named here
        spec = new_spec(*neuron)
    given = steps_out
    time_dim, steps_out, repeat = _check(y, v, residual, time_dim, steps_out)
    norm = _check_norm(y, weight, bias, running_mean, running_var, training, momentum, eps, scale, process_group)
    state = state_dtype(y.dtype)
    weight, bias = (p if p is None or p.dtype == state else p.to(state) for p in (weight, bias))
    kept = running_mean, running_var
    running = [r if r is None or _is_as_kept(r, state) else r.detach().to(state).contiguous() for r in kept]
    if not plain:
        from . import library

        tensors = y, weight, bias, *running, v, residual
        steps = None if given is None or repeat else steps_out
        spikes, v_last, *running = library.bn_lif(tensors, norm, spec, time_dim, steps, return_v, backend)
    else:
        smooth = not surrogate.spiking
        kernels = choose(y.device.type, y.dtype, backend_for(surrogate, backend))
        op, parameters = Op(spec, time_dim, steps_out, kernels, return_v), Parameters(weight, bias, *running)
        if kernels.differentiable:
            spikes, v_last = kernels.bn_lif(y, parameters, v, residual, norm, spec, time_dim, steps_out, smooth)
            if steps_out == y.shape[time_dim] and spec.binary and not smooth:
                note(spikes)
        elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, weight, bias, v, residual)):
            spikes, v_last = _BNLIF.apply(y, weight, bias, v, residual, running, norm, op)
        else:
            spikes, v_last = bn_forward(op, norm, parameters, y, v, residual, keep=False)[:2]
    if training:
        for old, new in zip(kept, running, strict=True):
            if old is not None and (not plain or not _is_as_kept(old, state)):
                with torch.no_grad():
                    old.copy_(new)
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), v_last if return_v else None


def _is_as_kept(running: torch.Tensor, state: torch.dtype) -> bool:
    """Whether kernels may change these running statistics where they are."""
    return running.dtype == state and running.is_contiguous() and not running.requires_grad


def _check(y, v, residual, time_dim, steps_out) -> tuple[int, int, int | None]:
    """Checks what varies over time; see ``lif._check``."""
    time_dim = check_x(y, time_dim, name="y")
    if y.dim() < 3 or time_dim > 1:
        raise ValueError(
            f"y must be [T, N, C, ...], or [N, T, C, ...] with time_dim=1, got shape {tuple(y.shape)} with "
            f"time_dim={time_dim}"
        )
    check_state(y, v, time_dim, name="y")
    check_residual(residual)
    if residual is not None:
        if residual.dtype != y.dtype:
            raise TypeError(f"residual must have the dtype of y, {y.dtype}, got {residual.dtype}")
        if residual.shape != y.shape or residual.device != y.device:
            raise ValueError(
                f"residual must have the shape and device of y, {tuple(y.shape)} on {y.device}, got "
                f"{tuple(residual.shape)} on {residual.device}"
            )
    return time_dim, *plan_steps(y.shape[time_dim], steps_out)


def _check_norm(y, weight, bias, running_mean, running_var, training, momentum, eps, scale, group) -> Batch:
    channels, state = y.shape[2], state_dtype(y.dtype)
    for name, p in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if p is None:
            continue
        if not isinstance(p, torch.Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(p).__name__}")
        if p.dtype not in (state, y.dtype):
            raise TypeError(f"{name} must be {state} for y of {y.dtype}, got {p.dtype}")
        if p.shape != (channels,) or p.device != y.device:
            raise ValueError(
                f"{name} must be one number per channel, ({channels},) on {y.device}, "
                f"got {tuple(p.shape)} on {p.device}"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var belong together: give both or neither")
    flag("training", training)
    if not training and running_mean is None:
        raise ValueError("running_mean must be given where training=False: there are no other statistics")
    momentum, eps, scale = number("momentum", momentum), number("eps", eps), number("scale", scale)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    check_group(group)
    if group is not None and torch.distributed.get_world_size(group) == 1:
        group = None
    if training and channels < 1:
        raise ValueError(f"training needs a channel at least in y, got shape {tuple(y.shape)}")
    if training and group is None and y.numel() < 2 * channels:
        raise ValueError(f"training needs more than one value per channel in y, got shape {tuple(y.shape)}")
    return Batch(training, momentum, eps, scale, group)


class _BNLIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, v, residual, running, norm, op):
        parameters = Parameters(weight, bias, *running)
        spikes, v_last, kept, layout, *rest = bn_forward(op, norm, parameters, y, v, residual, keep=True)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.rest = op, (norm, layout, *rest)
        return spikes, v_last

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last):
        if torch.is_grad_enabled():
            raise RuntimeError("bn_lif is once differentiable: create_graph=True needs backend='reference'")
        ctx.ran = True
        if grad_spikes is None and grad_v_last is None:
            return (None,) * 8
        _, weight, bias, v, residual, *_ = ctx.needs_input_grad
        wanted, kept = Wanted(weight or bias, v, residual), Kept(*ctx.saved_tensors)
        if not are_plain_gradients(grad_spikes, grad_v_last):
            from . import library

            norm, layout, *_ = ctx.rest
            given = ctx.op, layout, norm, kept, grad_spikes, grad_v_last
            return *library.bn_lif_backward(*given, ctx.needs_input_grad[:5]), *(None,) * 3
        grad_y, affine, grad_v, grad_residual = bn_backward(ctx.op, *ctx.rest, kept, grad_spikes, grad_v_last, wanted)
        return grad_y, affine[0] if weight else None, affine[1] if bias else None, grad_v, grad_residual, *(None,) * 3
