"""Norse's neurons without a synaptic current: ``LIFBoxCell``, ``IAFCell`` and ``IAF``."""

from __future__ import annotations

import math
from functools import lru_cache

import norse.torch as norse
import torch
from norse.torch.functional.iaf import IAFFeedForwardState, iaf_feed_forward_step
from norse.torch.functional.lif_box import LIFBoxFeedForwardState, lif_box_feed_forward_step
from norse.torch.functional.reset import reset_subtract, reset_value
from norse.torch.functional.threshold import threshold
from torch import nn

from ..ops.lif import lif
from ..spec.layout import state_dtype
from ..surrogate import SuperSpike, Surrogate, Triangle
from .gradients import sampled


class LIFBoxCell(norse.LIFBoxCell):
    backend = None

    def forward(self, input_tensor: torch.Tensor, state: LIFBoxFeedForwardState | None = None):
        p = self.p
        neuron = {
            "inverse_tau": _plain(self.dt * p.tau_mem_inv),
            "threshold": _plain(p.v_th),
            "reset": None if p.reset_method is reset_subtract else 0.0,
        }
        spikes, v = _run(self, input_tensor.unsqueeze(0), state, neuron)
        return spikes.squeeze(0), LIFBoxFeedForwardState(v)


class IAFCell(norse.IAFCell):
    backend = None

    def forward(self, input_tensor: torch.Tensor, state: IAFFeedForwardState | None = None):
        spikes, v = _run(self, input_tensor.unsqueeze(0), state, _integrator(self.p))
        return spikes.squeeze(0), IAFFeedForwardState(v)


class IAF(norse.IAF):
    backend = None

    def forward(self, input_tensor: torch.Tensor, state: IAFFeedForwardState | None = None):
        return_v = "sequence" if self.record_states else True
        spikes, v = _run(self, input_tensor, state, _integrator(self.p), return_v)
        return spikes, IAFFeedForwardState(v)


def _run(module: nn.Module, x: torch.Tensor, state, neuron: dict, return_v: bool | str = True):
    v = None if state is None else state.v.to(state_dtype(x.dtype)).expand(x.shape[1:])
    return lif(x, v, **neuron, surrogate=_surrogate(module.p), return_v=return_v, backend=module.backend)


def _integrator(p) -> dict:
    return {"tau": math.inf, "decay_input": False, "threshold": _plain(p.v_th), "reset": float(p.v_reset.detach())}


def _plain(value: torch.Tensor | float) -> torch.Tensor | float:
    """A number of the CPU as a float, as its tensor would have to lie where the input does."""
    fixed = not isinstance(value, torch.Tensor) or (value.dim() == 0 and not value.requires_grad and value.is_cpu)
    return float(value) if fixed else value


def _surrogate(p) -> Surrogate:
    return _of_method(p.method, float(p.alpha))


@lru_cache(maxsize=64)
def _of_method(method: str, alpha: float) -> Surrogate:
    if method == "super":
        return SuperSpike()  # whatever alpha is
    if method == "triangle":
        return Triangle(1.0, peak=alpha)
    if method == "heaviside":
        raise ValueError("its method 'heaviside' has no gradient")

    def derivative(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(threshold(x, method, alpha).sum(), x)[0]

    return sampled(derivative)


def _box(module: nn.Module, backend: str | None) -> nn.Module:
    p = module.p
    if not _is_number(p.v_leak, 0.0):
        raise ValueError("its v_leak is not 0, and is added to the input before the potential is subtracted")
    if p.reset_method is reset_value and not _is_number(p.v_reset, 0.0):
        raise ValueError("its v_reset is not its v_leak, the potential that it decays to")
    if p.reset_method not in (reset_value, reset_subtract):
        raise ValueError(f"its reset_method {p.reset_method!r} is none of Norse's")
    return _new(module, LIFBoxCell, lif_box_feed_forward_step, backend)


def _iaf(module: nn.Module, backend: str | None) -> nn.Module:
    if not _is_number(module.p.v_reset):
        raise ValueError("its v_reset is not one fixed number")
    return _new(module, IAF if isinstance(module, norse.IAF) else IAFCell, iaf_feed_forward_step, backend)


def _is_number(value: torch.Tensor | float, wanted: float | None = None) -> bool:
    if isinstance(value, nn.Parameter) or torch.as_tensor(value).dim():
        return False
    return wanted is None or bool(value == wanted)


def _new(module: nn.Module, cls: type[nn.Module], activation, backend: str | None) -> nn.Module:
    _surrogate(module.p)
    if module.activation is not activation:
        raise ValueError(f"its activation is {module.activation!r}")
    new = cls.__new__(cls)
    new.__dict__ = {**vars(module), "backend": backend}
    return new


NEURONS = {"LIFBoxCell": _box, "IAFCell": _iaf, "IAF": _iaf}
