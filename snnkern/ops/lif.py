"""The leaky integrate-and-fire neuron over many time steps, as one differentiable op."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from ..backend import choose
from ..spec.arguments import check_dense, check_parameter, check_state, check_x, join_states, plan_steps
from ..spec.layout import are_plain_gradients, is_plain, state_dtype
from ..spec.neuron import GIVEN, LIFSpec, make_spec, new_spec
from ..surrogate import Surrogate, Triangle, from_spikingjelly
from .launch import NO_TENSORS, Kept, Op, Tensors, lif_backward, lif_forward
from .pack import note
from .sharded import is_sharded, on_shards
from .ttm import ttm


def lif(
    x: torch.Tensor,
    v: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    *,
    decay: float | torch.Tensor | None = None,
    tau: float | torch.Tensor | None = None,
    decay_input: bool = True,
    threshold: float | torch.Tensor = 1.0,
    reset: float | None = 0.0,
    surrogate: Surrogate = Triangle(),
    detach_reset: bool = False,
    fire_at_threshold: bool = False,
    inverse_tau: float | torch.Tensor | None = None,
    ternary: bool = False,
    v_min: float | None = None,
    bias: torch.Tensor | None = None,
    synapse_decay: float | None = None,
    threshold_decay: float | None = None,
    threshold_jump: float | None = None,
    steps_out: int | None = None,
    time_dim: int = 0,
    return_v: bool | str = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
    """Leaky integrate-and-fire over time, fused.

    ::

        h[t] = decay*v[t-1] + x[t]                       decay (the default, 0.5)
             = v[t-1] + (x[t] - (v[t-1] - rest)) / tau   tau, decay_input=True
             = v[t-1] - (v[t-1] - rest) / tau + x[t]     tau, decay_input=False
        h[t] = max(h[t], v_min)                          if there is one
        s[t] = h[t] > threshold                          >= with fire_at_threshold
        v[t] = reset if s[t] else h[t]                   hard reset
             = h[t] - threshold*s[t]                     soft reset, reset=None

    ``rest`` is ``reset`` (0 if None). With a ``bias``, x[t] above is ``x[t] + bias``. A synaptic current, in place of
    it, and an adaptive threshold are two more states, both 0 at the start::

        i[t] = synapse_decay*i[t-1] + x[t]                     is what the membrane receives for x[t]
        threshold[t] = threshold + threshold_jump*a[t-1]       is the threshold of step t, of spike and soft reset
        a[t] = threshold_decay*a[t-1] + s[t]

    float32 spikes are those of this loop bit for bit, on every backend. Ternary
    spikes are ``s = (h > threshold) - (-h > threshold)``, and both reset; integer ones are those of
    ``surrogate.Integer``.

    Args:
        x: input current, ``time_dim`` among its dimensions; float32, float64 (``cpu`` and ``reference`` backends),
            float16 or bfloat16; any strides.
        v: potential before the first step, the shape of x without time; float32 for 16-bit x, else x.dtype.
            Default: 0, or ``rest`` in the ``tau`` form. Of neurons with more states a tuple, (v, i), (v, a) or
            (v, i, a).
        decay: factor in [0, 1] kept of the potential per step. At most one of ``decay``, ``tau`` and ``inverse_tau``;
            none of them: 0.5.
        tau: membrane time constant in steps, > 0; SpikingJelly's parametrisation. ``math.inf``, with
            ``decay_input=False``: no leak, an integrate-and-fire neuron.
        decay_input: with ``tau``, whether the input is divided by tau too.
        threshold: potential above which a neuron fires.
        reset: potential after a spike (hard reset), or None to subtract the threshold (soft reset).
        surrogate: stands for ds/dh in backward; see ``snnkern.surrogate``. Other libraries' objects and functions of
            one's own are accepted: what has no formula here is sampled, see ``surrogate.Table``.
        detach_reset: leave the reset's dependence on the spike out of the gradient.
        fire_at_threshold: fire at ``h >= threshold`` instead of above it.
        inverse_tau: 1/tau, as a factor: SpikingJelly's parametric LIF multiplies by it. At least 0.
        ternary: spikes of -1 too, where ``-h`` is above the threshold. Their derivative is the surrogate at both
            thresholds; hard reset then differentiates ``|s|``.
        v_min: lower bound of the potential; where it holds, no gradient passes.
        bias: added to x in the kernel, a tensor as below: what stands before a neuron, a linear layer or a convolution,
            need neither add it nor sum its gradient.
        synapse_decay: factor in [0, 1] kept of the synaptic current per step: the current-based (CUBA) neuron.
        threshold_decay, threshold_jump: factor in [0, 1] kept of the adaptation per step, and by how much each spike
            raises the threshold: the adaptive neuron (ALIF, of LSNNs).
        steps_out: time steps of the spikes returned, which are then ``ttm(spikes, steps_out)``: sums over groups of
            steps, in one pass that writes nothing else, or each spike repeated. None: as many as x has.
        time_dim: the dimension of x that is time.
        return_v: False: v_last is None, and not written. ``"sequence"``: the potential after every step is returned
            in its place, shape of x, dtype of the state.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; default: the environment's ``SNNKERN_BACKEND``, else
            the fastest that can run.

    Returns:
        ``spikes``, 0 and 1 (with ``steps_out``, sums of them) in x.dtype, shape of x but for ``steps_out``; ``v_last``,
        the potential after the last step, dtype of the state, or all states, as ``v`` takes them.

    ``decay``, ``tau``, ``inverse_tau``, ``threshold`` and ``bias`` may be tensors of floats on x's device that
    broadcast to x without time: a scalar, [C, 1, 1], [C, H, W], ...; their values are the caller's to keep in range.
    Time is then not split (``spec/split.py``), but for a bias, nor is it with ``return_v="sequence"`` or more than one
    state.

    Gradient: to x, v and parameters that are tensors, from spikes and potentials, through the reset unless
    ``detach_reset``. Kept for backward: x, and the potential of every 16th step; as everywhere in PyTorch, backward
    raises if x or v was edited in place in between. Once differentiable: a second derivative (``create_graph=True``)
    and forward mode (``jvp``) raise, except on the ``reference`` backend, which has both.

    Not-a-number inputs never fire; an infinite potential fires, and under hard reset the neuron then recovers (a soft
    reset takes a finite threshold from an infinite potential). An infinite threshold, of a tensor, silences a neuron.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        RuntimeError: the backend asked for cannot run here, or ``v`` belongs to a graph that backward has freed.

    Source: Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR 2022,
    eq. 1-5 (decay form); Fang et al., SpikingJelly, Science Advances 2023 (tau form); Cramer et al., "The Heidelberg
    Spiking Data Sets", IEEE TNNLS 2022 (synaptic current); Bellec et al., "Long short-term memory and learning-to-learn
    in networks of spiking neurons", NeurIPS 2018 (adaptive threshold: jump = beta (1 - rho)). Specification:
    ``snnkern/backend/reference/lif.py``.
    """
    neuron, tensors = neuron_of(
        decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold, inverse_tau, ternary,
        v_min, bias, synapse_decay, threshold_decay, threshold_jump,
    )  # fmt: skip
    if return_v is not True and return_v is not False and not (type(return_v) is str and return_v == "sequence"):
        raise ValueError(f"return_v must be True, False or 'sequence', got {return_v!r}")
    if not (is_plain(x, v, *tensors) if type(v) is not tuple else is_plain(x, *v, *tensors)):
        return _registered(x, v, tensors, neuron, steps_out, time_dim, return_v, backend)
    spec = spec_of(neuron)
    time_dim = check_x(x, time_dim)
    v = checked_state(x, v, time_dim, spec)
    steps_out, repeat = plan_steps(x.shape[time_dim], steps_out)
    if tensors is not NO_TENSORS:
        tensors = check_tensors(x, time_dim, tensors)
    kernels = choose(x.device.type, x.dtype, backend_for(spec.surrogate, backend))
    op = Op(spec, time_dim, steps_out, kernels, return_v)
    if kernels.differentiable:
        smooth, sequence = not spec.surrogate.spiking, return_v == "sequence"
        spikes, v_last = kernels.lif(x, v, spec, time_dim, steps_out, smooth, *tensors, sequence)
        if steps_out == x.shape[time_dim] and spec.binary and not smooth:
            note(spikes)
    elif torch.is_grad_enabled() and (x.requires_grad or any_requires_grad(v, *tensors)):
        spikes, v_last = _LIF.apply(x, v, *tensors, op)
    else:
        spikes, v_last = lif_forward(op, x, v, False, tensors)[:2]
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), returned(v_last, spec, return_v)


def neuron_of(
    decay=None, tau=None, decay_input=True, threshold=1.0, reset=0.0, surrogate=Triangle(), detach_reset=False,
    fire_at_threshold=False, inverse_tau=None, ternary=False, v_min=None, bias=None, synapse_decay=None,
    threshold_decay=None, threshold_jump=None,
):  # fmt: skip
    """A neuron's keywords as the arguments of ``new_spec``, and those among them that are tensors."""
    if not isinstance(surrogate, Surrogate):
        surrogate = from_spikingjelly(surrogate)
    leak, tensors = None, NO_TENSORS
    if isinstance(decay, torch.Tensor) or isinstance(tau, torch.Tensor) or isinstance(inverse_tau, torch.Tensor):
        leaks = decay, tau, inverse_tau
        leak = next(each for each in leaks if isinstance(each, torch.Tensor))
        decay, tau, inverse_tau = (GIVEN if isinstance(each, torch.Tensor) else each for each in leaks)
    if leak is not None or bias is not None or isinstance(threshold, torch.Tensor):
        if bias is not None and not isinstance(bias, torch.Tensor):
            raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
        given = isinstance(threshold, torch.Tensor)
        tensors = Tensors(leak, threshold if given else None, bias)
        threshold = GIVEN if given else threshold
    flags = detach_reset, fire_at_threshold
    more = inverse_tau, ternary, v_min, synapse_decay, threshold_decay, threshold_jump
    return (decay, tau, decay_input, threshold, reset, surrogate, *flags, *more), tensors


def spec_of(neuron) -> LIFSpec:
    surrogate = neuron[5]
    if surrogate.live:
        neuron = *neuron[:5], surrogate.now(), *neuron[6:]
    try:
        return make_spec(*neuron)
    except TypeError:  # also of what cannot be hashed, which is named here
        return new_spec(*neuron)


def checked_state(x, v, time_dim: int, spec: LIFSpec):
    """v as kernels take it: of several states one tensor, the states first."""
    if spec.states > 1:
        return join_states(x, v, time_dim, spec.states)
    check_state(x, v, time_dim)
    return v


def returned(v_last, spec: LIFSpec, return_v: bool | str = True):
    """The state as callers see it: of several a tuple."""
    if not return_v:
        return None
    return v_last.unbind() if spec.states > 1 and return_v is True else v_last


def _registered(x, v, tensors, neuron, steps_out, time_dim, return_v, backend):
    """``lif`` of anything but plain tensors, and inside ``torch.compile``: the same steps, through a registered op."""
    from . import library

    check_dense(x=x, v=v, leak=tensors.leak, threshold=tensors.threshold, bias=tensors.bias)
    spec = new_spec(*neuron)
    if is_sharded(x):
        if spec.states > 1:
            raise TypeError(f"x must not be a DTensor for neurons of {spec.states} states")
        check_x(x, time_dim)
        rest = neuron, steps_out, time_dim, return_v, backend
        return on_shards(lambda x, v, *t: _registered(x, v, Tensors(*t), *rest), x, time_dim, v, *tensors)
    given = steps_out
    time_dim = check_x(x, time_dim)
    v = checked_state(x, v, time_dim, spec)
    steps_out, repeat = plan_steps(x.shape[time_dim], steps_out)
    tensors = check_tensors(x, time_dim, tensors)
    smooth = not spec.surrogate.spiking
    name = library.name_for(x.device.type, x.dtype, backend_for(spec.surrogate, backend))
    if name == "reference":
        from ..backend.reference import lif as reference

        sequence = return_v == "sequence"
        spikes, v_last = reference(x, v, spec, time_dim, steps_out, smooth, *tensors, sequence)
    else:
        steps = None if given is None or repeat else steps_out
        spikes, v_last = library.lif(x, v, tensors, spec, time_dim, steps, return_v, name)
    return (spikes if repeat is None else ttm(spikes, repeat, time_dim, backend)), returned(v_last, spec, return_v)


def backend_for(surrogate: Surrogate, backend: str | None) -> str | None:
    """``backend``; for a surrogate that does not spike the reference, or an error."""
    if surrogate.spiking:
        return backend
    if backend not in (None, "reference"):
        raise ValueError(
            f"backend must be None or 'reference' for {surrogate!r}, which does not spike, got {backend!r}"
        )
    _warn_of_smooth()
    return "reference"


@cache
def _warn_of_smooth() -> None:
    message = "a surrogate function with spiking=False runs on snnkern's reference, a loop over time: no kernel has it"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def any_requires_grad(*tensors) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def check_tensors(x, time_dim: int, tensors: Tensors) -> Tensors:
    """The parameters that are tensors, in the dtype of the state."""
    wanted, state = x.shape[:time_dim] + x.shape[time_dim + 1 :], state_dtype(x.dtype)
    names = "decay, tau or inverse_tau", "threshold", "bias"
    return Tensors(
        *(
            None if p is None else check_parameter(name, p, wanted, x.device).to(state)
            for name, p in zip(names, tensors, strict=True)
        )
    )


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, leak, threshold, bias, op):
        spikes, v_last, kept, layout = lif_forward(op, x, v, True, Tensors(leak, threshold, bias))
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.layout = op, layout
        return spikes, v_last

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last):
        if torch.is_grad_enabled():
            raise RuntimeError("lif is once differentiable: create_graph=True needs backend='reference'")
        ctx.ran = True
        if grad_spikes is None and grad_v_last is None:
            return (None,) * 6
        kept, (_, *wanted, _) = Kept(*ctx.saved_tensors), ctx.needs_input_grad
        if not are_plain_gradients(grad_spikes, grad_v_last):
            from . import library

            grad_x, *rest = library.lif_backward(ctx.op, ctx.layout, kept, grad_spikes, grad_v_last)
            return grad_x, *(grad if want else None for grad, want in zip(rest, wanted, strict=True)), None
        return *lif_backward(ctx.op, ctx.layout, kept, grad_spikes, grad_v_last, *wanted), None
