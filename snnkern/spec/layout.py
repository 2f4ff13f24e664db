"""How kernels see a tensor with a time dimension."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of csrc/lif.h's DType
PLAIN = (torch.Tensor, torch.nn.Parameter)
# The integers of the same width.
INTEGERS = dict(zip(DTYPES, (torch.int32, torch.int64, torch.int16, torch.int16), strict=True))


def is_plain(*tensors) -> bool:
    """Whether kernels may be given the addresses of ``tensors`` (None: there is none): they are of PyTorch's own class,
    memory holds their numbers as they are, and nobody looks on or stands in for PyTorch's operations.

    Everything else, if it is a tensor at all, goes through the registered ops of ``ops/library.py``, where PyTorch does
    for it what it does for its own ops.
    """
    if _compiling() or _dispatch_modes() or _transforms() or _is_tracing() or forward_ad._current_level >= 0:
        return False
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or t.layout is not _STRIDED or t.is_nested or t.is_neg()):
            return False
    return True


# Asked at every call, so by names that answer fast: torch.compile; FakeTensorMode and the like, which export and
# make_fx are made of; torch.func's transforms; torch.jit.trace. And of a gradient, whether it is a batch of them, as in
# jacobian(vectorize=True).
_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_STRIDED = torch.strided
_is_batch = torch._C._functorch.is_legacy_batchedtensor


def are_plain_gradients(*tensors) -> bool:
    """``is_plain`` of what backward receives."""
    for t in tensors:
        if t is not None and _is_batch(t):
            return False
    return is_plain(*tensors)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layout(NamedTuple):
    """How kernels see x: [outer, steps, inner], the inner dimension contiguous, after ``permute(order)``."""

    order: tuple[int, ...] | None  # None: the dimensions as they stand
    outer: int
    steps: int
    inner: int
    x_outer_stride: int
    x_step_stride: int
    steps_out: int  # of what the kernels write

    def arrange(self, t: torch.Tensor, without: int | None = None, states: int = 1) -> torch.Tensor:
        """``t``, shaped like x (or like x without dimension ``without``), contiguous in the kernels' order. Of several
        states, [states, ...]."""
        order = self._order(without, states)
        return t.contiguous() if order is None else t.permute(order).contiguous()

    def restore(self, t: torch.Tensor, without: int | None = None, states: int = 1) -> torch.Tensor:
        """What ``arrange`` made contiguous, as a view shaped like x again."""
        order = self._order(without, states)
        return t if order is None else t.permute([order.index(i) for i in range(len(order))])

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, without: int | None = None,
              states: int = 1):  # fmt: skip
        """A new tensor of ``shape``, behind several states, whose memory is in the kernels' order."""
        order = self._order(without, states)
        shape = shape if states == 1 else (states, *shape)
        if order is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return self.restore(torch.empty([shape[i] for i in order], dtype=dtype, device=device), without, states)

    def period(self, shape: torch.Size, dim: int, time_dim: int) -> int:
        """Neurons, in the kernels' order, from one index of dimension ``dim`` of x to the next."""
        order = self.order or range(len(shape))
        return math.prod(shape[i] for i in order[order.index(dim) + 1 :] if i != time_dim)

    def _order(self, without: int | None, states: int = 1):
        if self.order is None or without is None:
            return self.order
        order = [i - (i > without) for i in self.order if i != without]
        return order if states == 1 else [0, *(i + 1 for i in order)]


def layout_of(x: torch.Tensor, time_dim: int) -> Layout | None:
    """The layout of x, or None if only a copy of it has one."""
    seen = x.shape, x.stride(), x.is_contiguous(), time_dim
    try:
        return _layout(*seen)
    except TypeError:  # sizes that torch.compile traces cannot be hashed
        return _layout.__wrapped__(*seen)


@lru_cache(maxsize=512)
def _layout(shape, strides, contiguous: bool, time_dim: int) -> Layout | None:
    steps = shape[time_dim]
    if contiguous:
        outer, inner = math.prod(shape[:time_dim]), math.prod(shape[time_dim + 1 :])
        return Layout(None, outer, steps, inner, steps * inner if outer > 1 else 0, inner if steps > 1 else 0, steps)
    # Widest stride first; a repeated frame (stride 0 in time) is outermost.
    order = sorted(range(len(shape)), key=lambda i: -strides[i] if strides[i] else -math.inf)
    at = order.index(time_dim)
    inner = _merge(order[at + 1 :], shape, strides)
    outer = _merge(order[:at], shape, strides)
    if inner is None or outer is None or (inner[0] > 1 and inner[1] != 1):
        return None
    return Layout(tuple(order), outer[0], steps, inner[0], outer[1], strides[time_dim] if steps > 1 else 0, steps)


def _merge(dims, shape, strides) -> tuple[int, int] | None:
    """Size and stride of ``dims`` (widest first) seen as one dimension, or None if they are not evenly spaced. Where
    there is nothing to step over, the stride is 0."""
    size, stride = 1, 0
    for i in reversed(dims):
        if shape[i] == 1:
            continue
        if size == 1:
            stride = strides[i]
        elif strides[i] != size * stride:
            return None
        size *= shape[i]
    return size, stride


def arrange(x: torch.Tensor, time_dim: int, steps_out: int | None = None) -> tuple[torch.Tensor, Layout]:
    """x as kernels can take it, copied only if there is no other way, and its layout."""
    layout = layout_of(x, time_dim)
    if layout is None:
        x = x.contiguous()
        layout = layout_of(x, time_dim)
    return x, layout if steps_out is None or steps_out == layout.steps else layout._replace(steps_out=steps_out)


def starts(steps: int, groups: int) -> list[int]:
    """Where each of ``groups`` of ``steps`` begins, and ``steps``."""
    return [(2 * i * steps + groups - 1) // (2 * groups) for i in range(groups + 1)]
