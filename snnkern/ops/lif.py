"""The leaky integrate-and-fire neuron over many time steps, as one differentiable op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from ..backend import choose
from ..surrogate import Surrogate, Triangle, from_spikingjelly
from .pack import note
from .split import CHUNK

FORMS = ("decay", "tau_input", "tau")  # in the order of csrc/lif.h's Leak
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of its DType


def lif(
    x: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    decay: float | None = None,
    tau: float | None = None,
    decay_input: bool = True,
    threshold: float = 1.0,
    reset: float | None = 0.0,
    surrogate: Surrogate = Triangle(),
    detach_reset: bool = False,
    fire_at_threshold: bool = False,
    time_dim: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaky integrate-and-fire over time, fused.

    ::

        h[t] = decay*v[t-1] + x[t]                       decay (the default, 0.5)
             = v[t-1] + (x[t] - (v[t-1] - rest)) / tau   tau, decay_input=True
             = v[t-1] - (v[t-1] - rest) / tau + x[t]     tau, decay_input=False
        s[t] = h[t] > threshold                          >= with fire_at_threshold
        v[t] = reset if s[t] else h[t]                   hard reset
             = h[t] - threshold*s[t]                     soft reset, reset=None

    ``rest`` is ``reset`` (0 if None). float32 spikes are those of this loop bit for bit, on every backend.

    Args:
        x: input current, ``time_dim`` among its dimensions; float32, float64 (``cpu`` and ``reference`` backends),
            float16 or bfloat16; any strides.
        v: potential before the first step, the shape of x without time; float32 for 16-bit x, else x.dtype.
            Default: 0, or ``rest`` in the ``tau`` form.
        decay: factor in [0, 1] kept of the potential per step. At most one of ``decay`` and ``tau``; neither: 0.5.
        tau: membrane time constant in steps, > 0; SpikingJelly's parametrisation.
        decay_input: with ``tau``, whether the input is divided by tau too.
        threshold: potential above which a neuron fires.
        reset: potential after a spike (hard reset), or None to subtract the threshold (soft reset).
        surrogate: stands for ds/dh in backward; see ``snnkern.surrogate``. SpikingJelly's objects are accepted.
        detach_reset: leave the reset's dependence on the spike out of the gradient.
        fire_at_threshold: fire at ``h >= threshold`` instead of above it.
        time_dim: the dimension of x that is time.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; default: the environment's ``SNNKERN_BACKEND``, else
            the fastest that can run.

    Returns:
        ``spikes``, 0 and 1 in x.dtype, shape of x; ``v_last``, the potential after the last step, dtype of the state.

    Gradient: to x and v, from spikes and v_last, through the reset unless ``detach_reset``; once differentiable,
    except on the ``reference`` backend. Kept for backward: x, and the potential of every 16th step.

    Not-a-number inputs never fire; an infinite potential fires, and under hard reset the neuron then recovers (a soft
    reset takes a finite threshold from an infinite potential).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        RuntimeError: the backend asked for cannot run here, or ``v`` belongs to a graph that backward has freed.

    Source: Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR 2022,
    eq. 1-5 (decay form); Fang et al., SpikingJelly, Science Advances 2023 (tau form). Specification:
    ``snnkern/backend/reference/lif.py``.
    """
    if not isinstance(surrogate, Surrogate):
        surrogate = from_spikingjelly(surrogate)
    if torch.compiler.is_compiling():
        return _compiled(
            x,
            v,
            (decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold),
            time_dim,
            backend,
        )
    spec = make_spec(decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold)
    time_dim = _check(x, v, time_dim)
    kernels = choose(x.device.type, x.dtype, backend)
    if kernels.differentiable:
        spikes, v_last = kernels.lif(x, v, spec, time_dim)
        note(spikes)
        return spikes, v_last
    if torch.is_grad_enabled() and (x.requires_grad or (v is not None and v.requires_grad)):
        return _LIF.apply(x, v, spec, time_dim, kernels)
    return forward(x, v, spec, time_dim, kernels, keep=False)[:2]


def _compiled(x, v, neuron, time_dim, backend):
    """``lif`` inside ``torch.compile``: the same steps, without the caches, through one node of the graph."""
    from ..backend import _library

    spec = make_spec.__wrapped__(*neuron)
    time_dim = _check(x, v, time_dim)
    name = _library.name_for(x.device.type, x.dtype, backend)
    if name == "reference":
        from ..backend.reference import lif as reference

        return reference(x, v, spec, time_dim)
    return _library.lif(x, v, spec, time_dim, name)


@dataclass(frozen=True)
class LIFSpec:
    """One neuron model, checked; everything a backend needs besides tensors."""

    form: str
    leak: float
    threshold: float
    reset: float | None
    surrogate: Surrogate
    detach_reset: bool
    fire_at_threshold: bool

    @property
    def rest(self) -> float:
        return self.reset or 0.0

    @property
    def v_start(self) -> float:
        return 0.0 if self.form == "decay" else self.rest

    @property
    def state_gain(self) -> float:
        """dh[t]/dv[t-1]"""
        return self.leak if self.form == "decay" else 1 - 1 / self.leak

    @cached_property
    def compiled(self):
        """The same as the extension's LIFSpec."""
        from .. import _C

        return _C.LIFSpec(
            FORMS.index(self.form),
            self.leak,
            self.threshold,
            self.fire_at_threshold,
            self.reset is not None,
            self.rest,
            self.v_start,
            self.detach_reset,
            _C.surrogates[type(self.surrogate).__name__],
            *self.surrogate.constants(),
        )


@lru_cache(maxsize=512, typed=True)
def make_spec(decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold) -> LIFSpec:
    """Checks the neuron's parameters and puts them in one form. See ``lif`` for what they mean."""
    if decay is not None and tau is not None:
        raise ValueError(f"decay and tau are two forms of the same leak, give one: got decay={decay!r}, tau={tau!r}")
    if tau is not None:
        form, leak = ("tau_input" if decay_input else "tau"), _number("tau", tau)
        if leak <= 0:
            raise ValueError(f"tau must be > 0, got {tau!r}")
    else:
        form, leak = "decay", _number("decay", 0.5 if decay is None else decay)
        if not 0 <= leak <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay!r}")
    threshold = _number("threshold", threshold)
    reset = None if reset is None else _number("reset", reset)
    for name, flag in (
        ("decay_input", decay_input),
        ("detach_reset", detach_reset),
        ("fire_at_threshold", fire_at_threshold),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    return LIFSpec(form, leak, threshold, reset, surrogate, detach_reset, fire_at_threshold)


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def positive(name: str, value: int) -> int:
    """``value`` if it is a whole number from 1 up; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_x(x, time_dim) -> int:
    """Checks the input of an op over time; returns ``time_dim`` counted from the front."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if not isinstance(time_dim, int):
        raise TypeError(f"time_dim must be an int, got {time_dim!r}")
    dims = x.dim()
    if not -dims <= time_dim < dims:
        raise ValueError(f"time_dim must name a dimension of x, got {time_dim} for shape {tuple(x.shape)}")
    return time_dim % dims


def _check(x, v, time_dim) -> int:
    """Checks the tensors of ``lif``; returns ``time_dim`` counted from the front."""
    time_dim = check_x(x, time_dim)
    if v is not None:
        if not isinstance(v, torch.Tensor):
            raise TypeError(f"v must be a tensor or None, got {type(v).__name__}")
        if v.dtype != state_dtype(x.dtype):
            raise TypeError(f"v must be {state_dtype(x.dtype)} for x of {x.dtype}, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"v must be on the device of x, {x.device}, got {v.device}")
        wanted = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        if v.shape != wanted:
            raise ValueError(f"v must have the shape of x without time, {tuple(wanted)}, got {tuple(v.shape)}")
        if torch.is_grad_enabled() and getattr(v.grad_fn, "ran", False):
            _check_alive(v)
    return time_dim


def _check_alive(v: torch.Tensor) -> None:
    try:
        v.grad_fn.saved_tensors  # noqa: B018  # raises once backward has freed them
    except RuntimeError as error:
        raise RuntimeError(
            "the state v still belongs to a graph that backward has already used and freed: "
            "call reset() or detach() on the node (or v.detach()) before feeding it again"
        ) from error


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

    def arrange(self, t: torch.Tensor, without: int | None = None) -> torch.Tensor:
        """``t``, shaped like x (or like x without dimension ``without``), contiguous in the kernels' order."""
        order = self._order(without)
        return t.contiguous() if order is None else t.permute(order).contiguous()

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, without: int | None = None):
        """A new tensor of ``shape`` whose memory is in the kernels' order."""
        order = self._order(without)
        if order is None:
            return torch.empty(shape, dtype=dtype, device=device)
        memory = torch.empty([shape[i] for i in order], dtype=dtype, device=device)
        return memory.permute([order.index(i) for i in range(len(order))])

    def _order(self, without: int | None):
        if self.order is None or without is None:
            return self.order
        return [i - (i > without) for i in self.order if i != without]


def layout_of(x: torch.Tensor, time_dim: int) -> Layout | None:
    """The layout of x, or None if only a copy of it has one."""
    shape = x.shape
    steps = shape[time_dim]
    if x.is_contiguous():
        outer, inner = math.prod(shape[:time_dim]), math.prod(shape[time_dim + 1 :])
        return Layout(None, outer, steps, inner, steps * inner, inner)
    strides = x.stride()
    # Widest stride first; a repeated frame (stride 0 in time) is outermost.
    order = sorted(range(x.dim()), key=lambda i: -strides[i] if strides[i] else -math.inf)
    at = order.index(time_dim)
    inner = _merge(order[at + 1 :], shape, strides)
    outer = _merge(order[:at], shape, strides)
    if inner is None or outer is None or (inner[0] > 1 and inner[1] != 1):
        return None
    return Layout(tuple(order), outer[0], steps, inner[0], outer[1], strides[time_dim])


def _merge(dims, shape, strides) -> tuple[int, int] | None:
    """Size and stride of ``dims`` (widest first) seen as one dimension, or None if they are not evenly spaced."""
    size, stride = 1, 1
    for i in reversed(dims):
        if shape[i] == 1:
            continue
        if size == 1:
            stride = strides[i]
        elif strides[i] != size * stride:
            return None
        size *= shape[i]
    return size, stride


def arrange(x: torch.Tensor, time_dim: int) -> tuple[torch.Tensor, Layout]:
    """x as kernels can take it, copied only if there is no other way, and its layout."""
    layout = layout_of(x, time_dim)
    if layout is not None:
        return x, layout
    x = x.contiguous()
    return x, layout_of(x, time_dim)


def forward(x, v, spec: LIFSpec, time_dim: int, kernels, keep: bool):
    """Allocates and launches. Returns spikes, v_last and what backward needs: x, v, saved and the layout."""
    x, layout = arrange(x, time_dim)
    if v is not None:
        v = layout.arrange(v, without=time_dim)
    spikes = layout.empty(x.shape, x.dtype, x.device)
    state = state_dtype(x.dtype)
    v_last = layout.empty(x.shape[:time_dim] + x.shape[time_dim + 1 :], state, x.device, without=time_dim)
    saved = None
    if keep and layout.steps > CHUNK:
        saved = torch.empty(((layout.steps - 1) // CHUNK, layout.outer * layout.inner), dtype=state, device=x.device)
    kernels.lif_forward(spec, layout, x, v, spikes, v_last, saved)
    note(spikes)
    return spikes, v_last, (x, v, saved), layout


def backward(spec: LIFSpec, layout: Layout, x, v, saved, grad_spikes, grad_v_last, time_dim, kernels, want_v: bool):
    """The adjoint of ``forward``: gradients of x and, if wanted, of v."""
    if grad_spikes is not None:
        grad_spikes = layout.arrange(grad_spikes)
    if grad_v_last is not None:
        grad_v_last = layout.arrange(grad_v_last, without=time_dim)
    grad_x = layout.empty(x.shape, x.dtype, x.device)
    grad_v = None
    if want_v:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        grad_v = layout.empty(shape, state_dtype(x.dtype), x.device, without=time_dim)
    kernels.lif_backward(spec, layout, x, v, saved, grad_spikes, grad_v_last, grad_x, grad_v)
    return grad_x, grad_v


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, spec, time_dim, kernels):
        spikes, v_last, kept, layout = forward(x, v, spec, time_dim, kernels, keep=True)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.rest = spec, layout, time_dim, kernels
        return spikes, v_last

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last):
        if torch.is_grad_enabled():
            raise RuntimeError("lif is once differentiable: create_graph=True needs backend='reference'")
        ctx.ran = True
        if grad_spikes is None and grad_v_last is None:
            return None, None, None, None, None
        spec, layout, time_dim, kernels = ctx.rest
        grad_x, grad_v = backward(
            spec, layout, *ctx.saved_tensors, grad_spikes, grad_v_last, time_dim, kernels, ctx.needs_input_grad[1]
        )
        return grad_x, grad_v, None, None, None
