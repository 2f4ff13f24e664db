"""Batch norm, then leaky integrate-and-fire neurons over time, as one differentiable op."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed

from ..backend import choose
from ..surrogate import Surrogate, Triangle, from_spikingjelly
from .layout import arrange, check_x, state_dtype
from .lif import LIFSpec, _check_state, _number, gradients, make_spec, outputs, plan_steps
from .pack import note
from .ttm import ttm

ROWS = 5  # of the table; csrc/norm.h's kNormRows


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
    steps_out: int | None = None,
    time_dim: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
        decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold, steps_out, time_dim,
            backend: those of ``lif``.

    Returns: ``spikes`` and ``v_last``, as ``lif``.

    Gradient: to y, weight, bias, residual and v; once differentiable, except on the ``reference`` backend. Kept for
    backward: y, the residual, some numbers per channel and, beyond 16 steps, the potential of every 16th.

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
    neuron = decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold
    compiling = torch.compiler.is_compiling()
    spec = make_spec.__wrapped__(*neuron) if compiling else make_spec(*neuron)
    time_dim, steps_out, repeat = _check(y, v, residual, time_dim, steps_out)
    norm = _check_norm(y, weight, bias, running_mean, running_var, training, momentum, eps, scale, process_group)
    state = state_dtype(y.dtype)
    weight, bias = (None if p is None else p.to(state) for p in (weight, bias))
    kept = running_mean, running_var
    running = [None if r is None else r.detach().to(state).contiguous() for r in kept]
    tensors = y, weight, bias, *running, v, residual
    if compiling:
        from ..backend import _library

        spikes, v_last, *running = _library.bn_lif(tensors, norm, spec, time_dim, steps_out, backend)
    else:
        kernels = choose(y.device.type, y.dtype, backend)
        if kernels.differentiable:
            spikes, v_last = kernels.bn_lif(*tensors, norm, spec, time_dim, steps_out)
            if steps_out == y.shape[time_dim]:
                note(spikes)
        elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            spikes, v_last = _BNLIF.apply(*tensors, norm, spec, time_dim, steps_out, kernels)
        else:
            spikes, v_last = forward(*tensors, norm, spec, time_dim, steps_out, kernels, keep=False)[:2]
    if training:
        for old, new in zip(kept, running, strict=True):
            if old is not None and (compiling or old.dtype != state or not old.is_contiguous()):
                with torch.no_grad():
                    old.copy_(new)
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), v_last


class Batch(NamedTuple):
    """How to normalise, besides tensors."""

    training: bool
    momentum: float
    eps: float
    scale: float
    group: torch.distributed.ProcessGroup | None


class Norm(NamedTuple):
    """What kernels need to normalise as they load: csrc/lif.h's Norm."""

    channels: int
    period: int
    table: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Plan(NamedTuple):
    """From sums to the table, and to gradients: csrc/norm.h's NormPlan but for dtype, channels and parts."""

    count: float
    unbiased: float
    momentum: float
    eps: float
    scale: float


def _check(y, v, residual, time_dim, steps_out) -> tuple[int, int, int | None]:
    """Checks what varies over time; see ``lif._check``."""
    time_dim = check_x(y, time_dim, name="y")
    if y.dim() < 3 or time_dim > 1:
        raise ValueError(
            f"y must be [T, N, C, ...], or [N, T, C, ...] with time_dim=1, got shape {tuple(y.shape)} with "
            f"time_dim={time_dim}"
        )
    _check_state(y, v, time_dim, name="y")
    if residual is not None:
        if not isinstance(residual, torch.Tensor):
            raise TypeError(f"residual must be a tensor or None, got {type(residual).__name__}")
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
    if not isinstance(training, bool):
        raise TypeError(f"training must be True or False, got {training!r}")
    if not training and running_mean is None:
        raise ValueError("running_mean must be given where training=False: there are no other statistics")
    momentum, eps, scale = _number("momentum", momentum), _number("eps", eps), _number("scale", scale)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if group is not None and torch.distributed.get_world_size(group) == 1:
        group = None
    if training and group is None and y.numel() < 2 * channels:
        raise ValueError(f"training needs more than one value per channel in y, got shape {tuple(y.shape)}")
    return Batch(training, momentum, eps, scale, group)


def forward(
    y,
    weight,
    bias,
    running_mean,
    running_var,
    v,
    residual,
    norm: Batch,
    spec: LIFSpec,
    time_dim,
    steps_out,
    kernels,
    keep,
):
    """Allocates and launches. Returns spikes, v_last, the tensors that backward needs, the layout and the elements in a
    channel, of all processes."""
    y, layout = arrange(y, time_dim, steps_out)
    if v is not None:
        v = layout.arrange(v, without=time_dim)
    if residual is not None:
        residual = layout.arrange(residual)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    channels, count = y.shape[2], y.numel() / max(y.shape[2], 1)
    table = torch.empty((ROWS, channels), dtype=state_dtype(y.dtype), device=y.device)
    shape = Norm(channels, layout.period(y.shape, 2, time_dim), table, residual)
    moments, seen = None, count
    if norm.training:
        once = layout if layout.x_step_stride or layout.steps < 2 else layout._replace(steps=1)
        seen = count * once.steps / max(layout.steps, 1)
        # A process among others may have no sample: its kernel would have no first element to shift by.
        moments = kernels.bn_moments(once, shape, y) if seen else table.new_zeros((3, channels), dtype=torch.float64)
        if norm.group is not None:
            moments, seen, count = _of_all(moments, seen, count, norm.group)
    plan = Plan(seen, count / max(count - 1, 1), norm.momentum, norm.eps, norm.scale)
    kernels.bn_prepare(plan, moments, weight, bias, running_mean, running_var, table)
    spikes, v_last, saved = outputs(y, layout, time_dim, keep)
    kernels.lif_forward(spec, layout, y, v, spikes, v_last, saved, shape)
    return spikes, v_last, (y, v, saved, table, residual), layout, count


def backward(
    kept,
    layout,
    count,
    norm: Batch,
    spec: LIFSpec,
    grad_spikes,
    grad_v_last,
    time_dim,
    kernels,
    want_v,
    want_affine,
    want_residual,
):
    """The adjoint of ``forward``: gradients of y, weight, bias, v and the residual, where wanted."""
    y, v, saved, table, residual = kept
    shape = Norm(y.shape[2], layout.period(y.shape, 2, time_dim), table, residual)
    grad_spikes, grad_v_last, grad_y, grad_v = gradients(y, layout, grad_spikes, grad_v_last, time_dim, want_v)
    grad_residual = layout.empty(y.shape, y.dtype, y.device) if want_residual else None
    affine = torch.empty_like(table[:2]) if norm.training or want_affine else None
    pull_push = torch.empty_like(table[:2]) if norm.training else None
    given = spec, layout, y, v, saved, grad_spikes, grad_v_last
    made = grad_y, grad_v, shape, pull_push, grad_residual
    _launch_backward(kernels, norm, Plan(count, 1.0, norm.momentum, norm.eps, norm.scale), given, made, affine)
    return grad_y, *((None, None) if affine is None else affine), grad_v, grad_residual


def _launch_backward(kernels, norm: Batch, plan: Plan, given, made, affine) -> None:
    _, _, shape, pull_push, _ = made
    if affine is not None:
        at_once = getattr(kernels, "bn_backward", None) if norm.group is None else None
        if at_once and at_once(plan, *given, *made, affine):
            return
        sums, all_sums = kernels.bn_sums(*given, shape), None
        if norm.group is not None and norm.training:
            all_sums = gather(sums.view(-1, 2, shape.channels).sum(0), norm.group).sum(0)
        kernels.bn_gradients(plan, shape.table, sums, all_sums, affine, pull_push)
    kernels.lif_backward(*given, *made)


def gather(t: torch.Tensor, group) -> torch.Tensor:
    """[processes, ...], in the order of ranks, so that all add them up alike."""
    parts = [torch.empty_like(t) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, t.contiguous(), group=group)
    return torch.stack(parts)


def _of_all(moments: torch.Tensor, seen: float, count: float, group):
    """The moments of all processes, as one part about their mean; and their counts."""
    total, square = moments[:-1].view(-1, 2, moments.shape[1]).sum(0)
    mean = moments[-1] + total / max(seen, 1)
    counts = torch.tensor([seen, count], dtype=torch.float64, device=moments.device).expand(moments.shape[1], 2)
    parts = gather(torch.stack([mean, square - total * total / max(seen, 1), *counts.unbind(1)]), group)
    means, squares, seens, counts = parts.unbind(1)
    mean = (means * seens).sum(0) / seens.sum(0)
    square = (squares + seens * (means - mean) ** 2).sum(0)
    seen, count = seens[:, 0].sum().item(), counts[:, 0].sum().item()
    if count < 2:
        raise ValueError("training needs more than one value per channel in the y of all processes")
    return torch.stack([torch.zeros_like(mean), square, mean]), seen, count


class _BNLIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        spikes, v_last, kept, ctx.layout, ctx.count = forward(*arguments, keep=True)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.spec, ctx.time_dim, _, ctx.kernels = arguments[7:]
        return spikes, v_last

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last):
        if torch.is_grad_enabled():
            raise RuntimeError("bn_lif is once differentiable: create_graph=True needs backend='reference'")
        ctx.ran = True
        if grad_spikes is None and grad_v_last is None:
            return (None,) * 12
        _, want_weight, want_bias, _, _, want_v, want_residual = ctx.needs_input_grad[:7]
        grad_y, grad_weight, grad_bias, grad_v, grad_residual = backward(
            ctx.saved_tensors,
            ctx.layout,
            ctx.count,
            ctx.norm,
            ctx.spec,
            grad_spikes,
            grad_v_last,
            ctx.time_dim,
            ctx.kernels,
            want_v,
            want_weight or want_bias,
            want_residual,
        )
        return (
            grad_y,
            grad_weight if want_weight else None,
            grad_bias if want_bias else None,
            None,
            None,
            grad_v,
            grad_residual,
            *(None,) * 5,
        )
