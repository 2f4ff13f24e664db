"""One neuron model, and the tensors of a launch, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

import torch

from ..surrogate import TINY, Integer, Surrogate
from .arguments import flag, number
from .norm import Norm

FORMS = ("decay", "tau_input", "tau", "tau_input_inverse", "tau_inverse")  # in the order of csrc/lif.h's Leak


class _Given:
    """Stands for a tensor among the numbers of a neuron."""

    def __repr__(self) -> str:
        return "a tensor"


GIVEN = _Given()


@dataclass(frozen=True)
class LIFSpec:
    """One neuron model, checked; everything a backend needs besides tensors."""

    form: str
    leak: float | None  # None: a tensor, as is the threshold
    threshold: float | None
    reset: float | None
    surrogate: Surrogate
    detach_reset: bool
    fire_at_threshold: bool
    ternary: bool = False
    v_min: float | None = None
    v_start: float = 0.0  # where the potential starts when no v is given
    synapse_decay: float | None = None  # None: no synaptic current
    threshold_decay: float | None = None  # None: no adaptation
    threshold_jump: float = 0.0

    @property
    def states(self) -> int:
        """The potential, the synaptic current if there is one, the adaptation if there is one; in this order, as the
        first dimension of what holds more than one."""
        return 1 + (self.synapse_decay is not None) + (self.threshold_decay is not None)

    @property
    def rest(self) -> float:
        return self.reset or 0.0

    @property
    def levels(self) -> int:
        """Of an integer spike, 0 of any other."""
        return self.surrogate.levels if isinstance(self.surrogate, Integer) else 0

    @property
    def binary(self) -> bool:
        """Whether spikes are 0 and 1."""
        return not (self.ternary or self.levels)

    @property
    def state_gain(self) -> float:
        """dh[t]/dv[t-1]"""
        if self.form == "decay":
            return self.leak
        return 1 - (self.leak if self.form.endswith("inverse") else 1 / self.leak)


def new_spec(
    decay,
    tau,
    decay_input,
    threshold,
    reset,
    surrogate,
    detach_reset,
    fire_at_threshold,
    inverse_tau=None,
    ternary=False,
    v_min=None,
    synapse_decay=None,
    threshold_decay=None,
    threshold_jump=None,
) -> LIFSpec:
    """Checks the neuron's parameters and puts them in one form. See ``lif`` for what they mean; ``GIVEN``: a tensor."""
    if sum(leak is not None for leak in (decay, tau, inverse_tau)) > 1:
        inverse = "" if inverse_tau is None else f", inverse_tau={inverse_tau!r}"
        raise ValueError(
            f"decay and tau are two forms of the same leak, give one: got decay={decay!r}, tau={tau!r}{inverse}"
        )
    flag("decay_input", decay_input)
    flag("detach_reset", detach_reset)
    flag("fire_at_threshold", fire_at_threshold)
    flag("ternary", ternary)
    reset = None if reset is None else number("reset", reset)
    v_start = 0.0 if tau is None and inverse_tau is None else reset or 0.0
    of_tau = "tau_input" if decay_input else "tau"
    if isinstance(tau, Real) and tau == math.inf:
        if decay_input:
            raise ValueError("tau must be finite with decay_input=True, where an infinite one lets no input in")
        form, leak = "decay", 1.0
    elif tau is not None:
        form, leak = of_tau, _leak("tau", tau)
        if leak is not None and leak <= 0:
            raise ValueError(f"tau must be > 0, got {tau!r}")
        _normal("tau", leak)
    elif inverse_tau is not None:
        form, leak = f"{of_tau}_inverse", _leak("inverse_tau", inverse_tau)
        if leak is not None and leak < 0:
            raise ValueError(f"inverse_tau must be at least 0, got {inverse_tau!r}")
    else:
        form, leak = "decay", _leak("decay", 0.5 if decay is None else decay)
        if leak is not None and not 0 <= leak <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay!r}")
    threshold = _leak("threshold", threshold)
    v_min = None if v_min is None else number("v_min", v_min)
    if isinstance(surrogate, Integer):
        if reset is not None or ternary or fire_at_threshold:
            what = "reset=None, ternary=False and fire_at_threshold=False"
            got = f"reset={reset!r}, ternary={ternary!r} and fire_at_threshold={fire_at_threshold!r}"
            raise ValueError(f"surrogate {surrogate!r} needs {what}, got {got}")
        if threshold is not None and threshold <= 0:
            raise ValueError(f"threshold must be positive with {surrogate!r}, got {threshold!r}")
    if ternary and threshold is not None and threshold <= 0:
        raise ValueError(f"threshold must be positive with ternary=True, got {threshold!r}")
    if ternary or isinstance(surrogate, Integer):
        _normal("threshold", threshold)
    if synapse_decay is not None:
        synapse_decay = _factor("synapse_decay", synapse_decay)
    if (threshold_decay is None) != (threshold_jump is None):
        got = f"threshold_decay={threshold_decay!r} and threshold_jump={threshold_jump!r}"
        raise ValueError(f"threshold_decay and threshold_jump make one adaptive threshold, give both: got {got}")
    adaptation = None, 0.0
    if threshold_decay is not None:
        adaptation = _factor("threshold_decay", threshold_decay), number("threshold_jump", threshold_jump)
    flags = detach_reset, fire_at_threshold, ternary
    return LIFSpec(form, leak, threshold, reset, surrogate, *flags, v_min, v_start, synapse_decay, *adaptation)


def _factor(name: str, value) -> float:
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return value


def _leak(name: str, value) -> float | None:
    return None if value is GIVEN else number(name, value)


def _normal(name: str, value: float | None) -> None:
    """ValueError for a positive number that kernels divide by, unless its inverse is finite in float32."""
    if value is not None and value < TINY:
        raise ValueError(f"{name} must be at least {TINY}, a normal float32, got {value!r}")


make_spec = lru_cache(maxsize=512, typed=True)(new_spec)  # TypeError, too, for what cannot be hashed


class Parameter(NamedTuple):
    """A leak, a threshold or a bias that is a tensor, as kernels take it: neuron n of [outer * inner] has number
    n // period % channels of ``data``, in the dtype of the state. csrc/lif.h's Parameter."""

    data: torch.Tensor
    channels: int
    period: int


class More(NamedTuple):
    """What only some neurons have. None: there is none; of gradients, zero where it is read, not wanted where it is
    written. csrc/lif.h's More."""

    leak: Parameter | None = None
    threshold: Parameter | None = None
    bias: Parameter | None = None  # the neurons receive x + bias
    fire_above: torch.Tensor | None = None  # with threshold, and as its data: s = h > fire_above
    table: torch.Tensor | None = None  # [cells, 2], of surrogate.Table; of backward
    v_seq: torch.Tensor | None = None  # [outer, steps, inner], the potential after every step; of forward
    grad_v_seq: torch.Tensor | None = None  # its gradient; of backward, as what follows
    grad_leak: torch.Tensor | None = None  # [outer, inner]: see ops/launch.py's lif_backward
    grad_threshold: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None  # the sum of grad_x over time


class Recurrence(NamedTuple):
    """Spikes that come back to the H neurons of their layer, the innermost of a launch's, a step later; csrc/lif.h's
    Recurrence, of forward and, with all of it, of backward."""

    weight: torch.Tensor  # [H, H] in the dtype of the state: row k is what neuron k receives
    outgoing: torch.Tensor  # its transpose: row j is what neuron j sends
    s: torch.Tensor | None  # [outer, inner], as spikes: those before the first step; None: none
    spikes: torch.Tensor | None = None  # forward's
    grad_s: torch.Tensor | None = None  # [outer, inner] in the dtype of the state; None: not wanted


class Forward(NamedTuple):
    """The tensors of a launch over time, in the kernels' order: csrc/lif.h's LIFForward but for scratch memory."""

    x: torch.Tensor
    v: torch.Tensor | None  # None: start from v_start
    spikes: torch.Tensor
    v_last: torch.Tensor | None  # None: nobody looks
    saved: torch.Tensor | None  # None: nothing is kept
    norm: Norm | None = None
    more: More | None = None


class Backward(NamedTuple):
    """Those of its adjoint: csrc/lif.h's LIFBackward. None: zero where it is read, not wanted where it is written."""

    x: torch.Tensor
    v: torch.Tensor | None
    saved: torch.Tensor | None
    grad_spikes: torch.Tensor | None
    grad_v_last: torch.Tensor | None
    grad_x: torch.Tensor | None = None
    grad_v: torch.Tensor | None = None
    norm: Norm | None = None
    pull_push: torch.Tensor | None = None
    grad_residual: torch.Tensor | None = None
    more: More | None = None
