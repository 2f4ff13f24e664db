"""The leaky integrate-and-fire neuron over many time steps, as one differentiable op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..backend import choose
from ..surrogate import Surrogate, Triangle, from_spikingjelly
from .layout import Layout, arrange, check_x, positive, state_dtype
from .pack import note
from .split import CHUNK
from .ttm import ttm

FORMS = ("decay", "tau_input", "tau")  # in the order of csrc/lif.h's Leak


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
    steps_out: int | None = None,
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
        steps_out: time steps of the spikes returned, which are then ``ttm(spikes, steps_out)``: sums over groups of
            steps, in one pass that writes nothing else, or each spike repeated. None: as many as x has.
        time_dim: the dimension of x that is time.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; default: the environment's ``SNNKERN_BACKEND``, else
            the fastest that can run.

    Returns:
        ``spikes``, 0 and 1 (with ``steps_out``, sums of them) in x.dtype, shape of x but for ``steps_out``; ``v_last``,
        the potential after the last step, dtype of the state.

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
    neuron = decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold
    if torch.compiler.is_compiling():
        return _compiled(x, v, neuron, steps_out, time_dim, backend)
    spec = make_spec(*neuron)
    time_dim, steps_out, repeat = _check(x, v, time_dim, steps_out)
    kernels = choose(x.device.type, x.dtype, backend)
    if kernels.differentiable:
        spikes, v_last = kernels.lif(x, v, spec, time_dim, steps_out)
        if steps_out == x.shape[time_dim]:
            note(spikes)
    elif torch.is_grad_enabled() and (x.requires_grad or (v is not None and v.requires_grad)):
        spikes, v_last = _LIF.apply(x, v, spec, time_dim, steps_out, kernels)
    else:
        spikes, v_last = forward(x, v, spec, time_dim, steps_out, kernels, keep=False)[:2]
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), v_last


def _compiled(x, v, neuron, steps_out, time_dim, backend):
    """``lif`` inside ``torch.compile``: the same steps, without the caches, through one node of the graph."""
    from ..backend import _library

    spec = make_spec.__wrapped__(*neuron)
    time_dim, steps_out, repeat = _check(x, v, time_dim, steps_out)
    name = _library.name_for(x.device.type, x.dtype, backend)
    if name == "reference":
        from ..backend.reference import lif as reference

        spikes, v_last = reference(x, v, spec, time_dim, steps_out)
    else:
        spikes, v_last = _library.lif(x, v, spec, time_dim, steps_out, name)
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), v_last


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


def _check(x, v, time_dim, steps_out) -> tuple[int, int, int | None]:
    """Checks the tensors of ``lif``. Returns ``time_dim`` counted from the front, the steps that the kernels are to
    put out, and to how many steps these are to be repeated, if they are."""
    time_dim = check_x(x, time_dim)
    _check_state(x, v, time_dim)
    return time_dim, *plan_steps(x.shape[time_dim], steps_out)


def plan_steps(steps: int, steps_out: int | None) -> tuple[int, int | None]:
    if steps_out is None:
        return steps, None
    if steps < 1:
        raise ValueError(f"steps_out needs an x of one time step at least, got none for steps_out={steps_out!r}")
    return min(steps, positive("steps_out", steps_out)), steps_out if steps_out > steps else None


def _check_state(x, v, time_dim: int, name: str = "x") -> None:
    """Checks the potential ``v`` that belongs to x, which its caller knows by ``name``."""
    if v is not None:
        if not isinstance(v, torch.Tensor):
            raise TypeError(f"v must be a tensor or None, got {type(v).__name__}")
        if v.dtype != state_dtype(x.dtype):
            raise TypeError(f"v must be {state_dtype(x.dtype)} for {name} of {x.dtype}, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"v must be on the device of {name}, {x.device}, got {v.device}")
        wanted = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        if v.shape != wanted:
            raise ValueError(f"v must have the shape of {name} without time, {tuple(wanted)}, got {tuple(v.shape)}")
        if torch.is_grad_enabled() and getattr(v.grad_fn, "ran", False):
            _check_alive(v)


def _check_alive(v: torch.Tensor) -> None:
    try:
        v.grad_fn.saved_tensors  # noqa: B018  # raises once backward has freed them
    except RuntimeError as error:
        raise RuntimeError(
            "the state v still belongs to a graph that backward has already used and freed: "
            "call reset() or detach() on the node (or v.detach()) before feeding it again"
        ) from error


def outputs(x, layout: Layout, time_dim: int, keep: bool):
    """New tensors for spikes, v_last and, for backward, saved."""
    before, after = x.shape[:time_dim], x.shape[time_dim + 1 :]
    spikes = layout.empty(torch.Size((*before, layout.steps_out, *after)), x.dtype, x.device)
    if layout.steps_out == layout.steps:  # not sums of them
        note(spikes)
    state = state_dtype(x.dtype)
    v_last = layout.empty(before + after, state, x.device, without=time_dim)
    saved = None
    if keep and layout.steps > CHUNK:
        saved = torch.empty(((layout.steps - 1) // CHUNK, layout.outer * layout.inner), dtype=state, device=x.device)
    return spikes, v_last, saved


def gradients(x, layout: Layout, grad_spikes, grad_v_last, time_dim: int, want_v: bool):
    """The upstream gradients as kernels can take them, and new tensors for those of x and, if wanted, of v."""
    if grad_spikes is not None:
        grad_spikes = layout.arrange(grad_spikes)
    if grad_v_last is not None:
        grad_v_last = layout.arrange(grad_v_last, without=time_dim)
    grad_v = None
    if want_v:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        grad_v = layout.empty(shape, state_dtype(x.dtype), x.device, without=time_dim)
    return grad_spikes, grad_v_last, layout.empty(x.shape, x.dtype, x.device), grad_v


def forward(x, v, spec: LIFSpec, time_dim: int, steps_out: int, kernels, keep: bool):
    """Allocates and launches. Returns spikes, v_last and what backward needs: x, v, saved and the layout."""
    x, layout = arrange(x, time_dim, steps_out)
    if v is not None:
        v = layout.arrange(v, without=time_dim)
    spikes, v_last, saved = outputs(x, layout, time_dim, keep)
    kernels.lif_forward(spec, layout, x, v, spikes, v_last, saved)
    return spikes, v_last, (x, v, saved), layout


def backward(spec: LIFSpec, layout: Layout, x, v, saved, grad_spikes, grad_v_last, time_dim, kernels, want_v: bool):
    """The adjoint of ``forward``: gradients of x and, if wanted, of v."""
    made = gradients(x, layout, grad_spikes, grad_v_last, time_dim, want_v)
    kernels.lif_backward(spec, layout, x, v, saved, *made)
    return made[2:]


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, spec, time_dim, steps_out, kernels):
        spikes, v_last, kept, layout = forward(x, v, spec, time_dim, steps_out, kernels, keep=True)
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
            return (None,) * 6
        spec, layout, time_dim, kernels = ctx.rest
        grad_x, grad_v = backward(
            spec, layout, *ctx.saved_tensors, grad_spikes, grad_v_last, time_dim, kernels, ctx.needs_input_grad[1]
        )
        return grad_x, grad_v, None, None, None, None
