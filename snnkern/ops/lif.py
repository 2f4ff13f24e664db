"""The leaky integrate-and-fire neuron over many time steps, as one differentiable op."""

from __future__ import annotations

import torch

from ..backend import choose
from ..spec.arguments import check_dense, check_state, check_x, plan_steps
from ..spec.layout import are_plain_gradients, is_plain
from ..spec.neuron import make_spec, new_spec
from ..surrogate import Surrogate, Triangle, from_spikingjelly
from .launch import Kept, Op, lif_backward, lif_forward
from .pack import note
from .sharded import is_sharded, on_shards
from .ttm import ttm


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
    return_v: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
        surrogate: stands for ds/dh in backward; see ``snnkern.surrogate``. SpikingJelly's objects are accepted, and on
            the ``reference`` backend formulas of one's own.
        detach_reset: leave the reset's dependence on the spike out of the gradient.
        fire_at_threshold: fire at ``h >= threshold`` instead of above it.
        steps_out: time steps of the spikes returned, which are then ``ttm(spikes, steps_out)``: sums over groups of
            steps, in one pass that writes nothing else, or each spike repeated. None: as many as x has.
        time_dim: the dimension of x that is time.
        return_v: False: v_last is None, and not written.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; default: the environment's ``SNNKERN_BACKEND``, else
            the fastest that can run.

    Returns:
        ``spikes``, 0 and 1 (with ``steps_out``, sums of them) in x.dtype, shape of x but for ``steps_out``; ``v_last``,
        the potential after the last step, dtype of the state.

    Gradient: to x and v, from spikes and v_last, through the reset unless ``detach_reset``. Kept for backward: x, and
    the potential of every 16th step; as everywhere in PyTorch, backward raises if x or v was edited in place in
    between. Once differentiable: a second derivative (``create_graph=True``) and forward mode (``jvp``) raise, except
    on the ``reference`` backend, which has both.

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
    if not is_plain(x, v):
        return _registered(x, v, neuron, steps_out, time_dim, return_v, backend)
    try:
        spec = make_spec(*neuron)
    except TypeError:  # also of what cannot be hashed, which is named here
        spec = new_spec(*neuron)
    time_dim, steps_out, repeat = _check(x, v, time_dim, steps_out)
    kernels = choose(x.device.type, x.dtype, backend)
    op = Op(spec, time_dim, steps_out, kernels, return_v)
    if kernels.differentiable:
        spikes, v_last = kernels.lif(x, v, spec, time_dim, steps_out)
        if steps_out == x.shape[time_dim]:
            note(spikes)
    elif torch.is_grad_enabled() and (x.requires_grad or (v is not None and v.requires_grad)):
        spikes, v_last = _LIF.apply(x, v, op)
    else:
        spikes, v_last = lif_forward(op, x, v, keep=False)[:2]
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), v_last if return_v else None


def _registered(x, v, neuron, steps_out, time_dim, return_v, backend):
    """``lif`` of anything but plain tensors, and inside ``torch.compile``: the same steps, through a registered op."""
    from . import library

    check_dense(x=x, v=v)
    if is_sharded(x):
        check_x(x, time_dim)
        rest = neuron, steps_out, time_dim, return_v, backend
        return on_shards(lambda x, v: _registered(x, v, *rest), x, v, time_dim)
    spec = new_spec(*neuron)
    given = steps_out
    time_dim, steps_out, repeat = _check(x, v, time_dim, steps_out)
    name = library.name_for(x.device.type, x.dtype, backend)
    if name == "reference":
        from ..backend.reference import lif as reference

        spikes, v_last = reference(x, v, spec, time_dim, steps_out)
    else:
        steps = None if given is None or repeat else steps_out
        spikes, v_last = library.lif(x, v, spec, time_dim, steps, return_v, name)
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), v_last if return_v else None


def _check(x, v, time_dim, steps_out) -> tuple[int, int, int | None]:
    """Checks the tensors. Returns ``time_dim`` counted from the front, the steps that the kernels are to put out, and
    to how many steps these are to be repeated, if they are."""
    time_dim = check_x(x, time_dim)
    check_state(x, v, time_dim)
    return time_dim, *plan_steps(x.shape[time_dim], steps_out)


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, op):
        spikes, v_last, kept, layout = lif_forward(op, x, v, keep=True)
        ctx.save_for_backward(*kept[:3])
        ctx.set_materialize_grads(False)
        ctx.op, ctx.layout = op, layout
        return spikes, v_last

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last):
        if torch.is_grad_enabled():
            raise RuntimeError("lif is once differentiable: create_graph=True needs backend='reference'")
        ctx.ran = True
        if grad_spikes is None and grad_v_last is None:
            return (None,) * 3
        kept = Kept(*ctx.saved_tensors)
        if not are_plain_gradients(grad_spikes, grad_v_last):
            from . import library

            grad_x, grad_v = library.lif_backward(ctx.op, ctx.layout, kept, grad_spikes, grad_v_last)
            return grad_x, grad_v if ctx.needs_input_grad[1] else None, None
        return *lif_backward(ctx.op, ctx.layout, kept, grad_spikes, grad_v_last, ctx.needs_input_grad[1]), None
