"""Layers without state between calls."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ..backend import load
from ..ops.layout import positive
from ..ops.lif import lif, make_spec
from ..ops.ttm import ttm
from ..surrogate import Surrogate, Triangle, from_spikingjelly


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons in the papers' terms, without state: every call starts at rest.

    ``forward(x, residual=None) -> spikes`` of x, plus the residual if there is one; shape and dtype are those of x, but
    for ``steps_out``. Arguments, equations, dtypes and errors are those of ``snnkern.lif``, which is there for whoever
    wants the potential too. ``settings`` holds its keywords.
    """

    def __init__(
        self,
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
    ):
        super().__init__()
        neuron = {
            "decay": decay,
            "tau": tau,
            "decay_input": decay_input,
            "threshold": threshold,
            "reset": reset,
            "surrogate": from_spikingjelly(surrogate),
            "detach_reset": detach_reset,
            "fire_at_threshold": fire_at_threshold,
        }
        make_spec(**neuron)
        if steps_out is not None:
            positive("steps_out", steps_out)
        if backend is not None:
            load(backend)
        # Not attributes: networks are reset by calling whatever is named `reset` on their modules.
        self.settings = {**neuron, "steps_out": steps_out, "time_dim": time_dim, "backend": backend}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return lif(x if residual is None else x + residual, **self.settings)[0]

    def extra_repr(self) -> str:
        defaults = inspect.signature(lif).parameters
        return ", ".join(f"{k}={v!r}" for k, v in self.settings.items() if v != defaults[k].default)


class TTM(nn.Module):
    """Temporal transformation of [T, N, ...] to ``steps`` time steps, without parameters; see ``snnkern.ttm``.

    ``steps`` is an attribute and may change between calls.
    """

    def __init__(self, steps: int, time_dim: int = 0, backend: str | None = None):
        super().__init__()
        positive("steps", steps)
        if backend is not None:
            load(backend)
        self.steps, self.time_dim, self.backend = steps, time_dim, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ttm(x, self.steps, self.time_dim, self.backend)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, time_dim={self.time_dim}"
