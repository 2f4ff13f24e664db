"""A linear layer that uses that spikes are few."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..backend import choose, cpu
from ..spec.arguments import check_dense
from ..spec.layout import are_plain_gradients, is_plain


def linear(spikes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``, which on the CPU adds rows of the weight where spikes are, if these are few.

    ::

        y[..., o] = bias[o] + sum over the k where spikes[..., k] is not 0, ascending, of spikes[..., k]*weight[o, k]

    So does the gradient of weight and bias, where spikes are 0 and 1: it adds rows of y's. This way is taken for
    contiguous float32 spikes of which a sample of 64 rows has less than a quarter other than 0, if ``weight`` has 64
    inputs and outputs or more and the product 2**24 multiplications. All else is PyTorch's dense product, as is the
    gradient of spikes.

    Args:
        spikes: [..., inputs], any numbers: those other than 0 and 1 are multiplied.
        weight: [outputs, inputs].
        bias: [outputs], or None.

    Returns: [..., outputs].

    The two ways differ in the last bits; each gives a row the same bits among any others, on any number of threads,
    which PyTorch's does not promise. Where a spike is 0, a weight or gradient that is infinite or not a number is not
    seen: 0 times it is 0 here. Spikes that are not numbers are.

    Gradient: to all three; once differentiable where spikes are few. Kept for backward then: 0 and 1 as bits.

    Raises: TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    _check(spikes, weight, bias)
    kernels = _kernels(spikes, weight, bias)
    if kernels is None:
        return F.linear(spikes, weight, bias)
    return _Linear.apply(spikes, weight, bias, kernels)


def _check(spikes, weight, bias) -> None:
    for name, t in (("spikes", spikes), ("weight", weight), ("bias", bias)):
        if not isinstance(t, torch.Tensor) and not (t is None and name == "bias"):
            wanted = "a tensor or None" if name == "bias" else "a tensor"
            raise TypeError(f"{name} must be {wanted}, got {type(t).__name__}")
    check_dense(bias=bias)
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"weight must be [outputs, inputs], got shape {tuple(shape)}")
    if spikes.shape[-1:] != shape[1:]:
        raise ValueError(f"spikes must be [..., {shape[1]}] for this weight, got shape {tuple(spikes.shape)}")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias must be [{shape[0]}] for this weight, got shape {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None or (t.dtype == spikes.dtype and t.device == spikes.device):
            continue
        if t.device != spikes.device:
            raise ValueError(f"{name} must be on the device of spikes, {spikes.device}, got {t.device}")
        if spikes.is_meta or not torch.is_autocast_enabled(spikes.device.type):
            raise TypeError(f"{name} must have the dtype of spikes, {spikes.dtype}, got {t.dtype}")


def _kernels(spikes, weight, bias):
    """The backend whose kernels are to do it, None for the dense product."""
    if not is_plain(spikes, weight, bias) or not spikes.is_cpu or not spikes.is_contiguous():
        return None
    float32 = spikes.dtype == weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    if not float32 or not cpu.linear_pays(spikes, len(weight)) or torch.is_autocast_enabled("cpu"):
        return None
    of_one_device = weight.is_cpu and (bias is None or bias.is_cpu)
    return cpu if of_one_device and choose("cpu", torch.float32) is cpu else None


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.detach().reshape(-1, t.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spikes, weight, bias, kernels):
        y, bits = kernels.linear_forward(_rows(spikes), weight.detach(), bias)
        to_spikes, to_weight, to_bias, _ = ctx.needs_input_grad
        ctx.kernels, ctx.biased, ctx.binary = kernels, bias is not None, bits is not None
        kept = (spikes if bits is None else bits) if to_weight or (to_bias and bits is not None) else None
        ctx.save_for_backward(kept, weight if to_spikes else None)
        return y.view(*spikes.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("linear is once differentiable where spikes are few: create_graph=True needs F.linear")
        (kept, weight), (to_spikes, to_weight, to_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_spikes = grad_weight = grad_bias = None
        if to_spikes:
            grad_spikes = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
        if kept is not None and ctx.binary and are_plain_gradients(grad):
            grad_weight, grad_bias = ctx.kernels.linear_backward(kept, rows.contiguous(), ctx.biased)
        else:
            if to_weight:
                grad_weight = rows.t() @ (_numbers(kept, len(rows)) if ctx.binary else _rows(kept))
            if to_bias:
                grad_bias = rows.sum(0)
        return grad_spikes, grad_weight if to_weight else None, grad_bias if to_bias else None, None


def _numbers(bits: torch.Tensor, rows: int) -> torch.Tensor:
    """What forward kept as bits, as numbers again."""
    one = torch.arange(32, dtype=torch.int32)[:, None]
    return (bits[:, None] >> one & 1).flatten(0, 1)[:rows].float()
