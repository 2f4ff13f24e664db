"""One neuron model, and the tensors of a launch, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ..surrogate import Surrogate
from .arguments import number
from .norm import Norm

FORMS = ("decay", "tau_input", "tau")  # in the order of csrc/lif.h's Leak


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


def new_spec(decay, tau, decay_input, threshold, reset, surrogate, detach_reset, fire_at_threshold) -> LIFSpec:
    """Checks the neuron's parameters and puts them in one form. See ``lif`` for what they mean."""
    if decay is not None and tau is not None:
        raise ValueError(f"decay and tau are two forms of the same leak, give one: got decay={decay!r}, tau={tau!r}")
    if tau is not None:
        form, leak = ("tau_input" if decay_input else "tau"), number("tau", tau)
        if leak <= 0:
            raise ValueError(f"tau must be > 0, got {tau!r}")
    else:
        form, leak = "decay", number("decay", 0.5 if decay is None else decay)
        if not 0 <= leak <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay!r}")
    threshold = number("threshold", threshold)
    reset = None if reset is None else number("reset", reset)
    for name, flag in (
        ("decay_input", decay_input),
        ("detach_reset", detach_reset),
        ("fire_at_threshold", fire_at_threshold),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    return LIFSpec(form, leak, threshold, reset, surrogate, detach_reset, fire_at_threshold)


make_spec = lru_cache(maxsize=512, typed=True)(new_spec)  # TypeError, too, for what cannot be hashed


class Forward(NamedTuple):
    """The tensors of a launch over time, in the kernels' order: csrc/lif.h's LIFForward but for scratch memory."""

    x: torch.Tensor
    v: torch.Tensor | None  # None: start from v_start
    spikes: torch.Tensor
    v_last: torch.Tensor | None  # None: nobody looks
    saved: torch.Tensor | None  # None: nothing is kept
    norm: Norm | None = None


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
