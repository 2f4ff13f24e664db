"""Layers without state between calls."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ..backend import load
from ..backend.reference import lif as reference
from ..ops.lif import lif
from ..ops.ttm import ttm
from ..spec.arguments import check_residual, check_x, number, positive
from ..spec.layout import state_dtype
from ..spec.neuron import new_spec
from ..surrogate import Sigmoid, Surrogate, Triangle, from_spikingjelly


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons in the papers' terms, without state: every call starts at rest.

    ``forward(x, residual=None, steps_out=None) -> spikes`` of x, plus the residual if there is one; shape and dtype are
    those of x, but for ``steps_out``, which a call may give in place of the layer's own. Arguments, equations, dtypes
    and errors are those of ``snnkern.lif``, which is there for whoever wants the potential too. ``settings`` holds its
    keywords.
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
        new_spec(**neuron)
        if steps_out is not None:
            positive("steps_out", steps_out)
        if backend is not None:
            load(backend)
        # Not attributes: networks are reset by calling whatever is named `reset` on their modules.
        self.settings = {**neuron, "steps_out": steps_out, "time_dim": time_dim, "backend": backend}

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, steps_out: int | None = None
    ) -> torch.Tensor:
        check_residual(residual)
        settings = self.settings if steps_out is None else {**self.settings, "steps_out": steps_out}
        return lif(x if residual is None else x + residual, return_v=False, **settings)[0]

    def extra_repr(self) -> str:
        defaults = inspect.signature(lif).parameters
        return ", ".join(f"{k}={v!r}" for k, v in self.settings.items() if v != defaults[k].default)


class SmoothLIF(nn.Module):
    """LIF neurons without a step: the output is ``surrogate.primitive(h - threshold)``, between 0 and 1.

    The gradient is then exact, which tells what the surrogate of a spike costs: Sigmoid(k) gives ``sigmoid(k x)`` and
    the experiment of its source. The reset takes this output for the spike: ``v = reset s + (1 - s) h`` (hard).

    ``forward(x, residual=None)``, as ``LIF``; a loop of PyTorch operations, as the kernels know spikes only. Arguments
    are those of ``LIF``. As the ``neuron`` of a model: ``partial(SmoothLIF, Sigmoid(10.0))``.

    Source: Deng et al., ICLR 2022, section 5.1 and table 2 (k = 1, 10, 20).
    """

    def __init__(
        self,
        surrogate: Surrogate = Sigmoid(10.0),
        decay: float | None = None,
        tau: float | None = None,
        decay_input: bool = True,
        threshold: float = 1.0,
        reset: float | None = 0.0,
        detach_reset: bool = False,
        time_dim: int = 0,
    ):
        super().__init__()
        surrogate = from_spikingjelly(surrogate)
        self.spec = new_spec(decay, tau, decay_input, threshold, reset, surrogate, detach_reset, False)
        self.time_dim = time_dim

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        check_residual(residual)
        x = x if residual is None else x + residual
        time_dim = check_x(x, self.time_dim)
        return reference(x, None, self.spec, time_dim, x.shape[time_dim], smooth=True)[0]

    def extra_repr(self) -> str:
        return f"{self.spec.surrogate!r}, {self.spec.form}={self.spec.leak}, threshold={self.spec.threshold}"


class IAF(nn.Module):
    """Integrate-and-fire neurons of asynchronous chips, clocked: no leak, soft reset, a lower bound of the potential.

    ::

        h[t] = max(v[t-1] + x[t], v_min)    s[t] = (h[t] >= threshold)    v[t] = h[t] - threshold s[t]    v[0] = 0

    At most one spike a step: charge for more stays, and fires at the next steps. The gradient is autograd's of this
    loop with the surrogate for ds/dh; where ``v[t-1] + x[t] < v_min`` none passes. As no kernel knows the bound, it is
    a loop of PyTorch operations; with ``v_min=None`` it is ``snnkern.lif``.

    ``forward(x, residual=None)``, as ``LIF``.

    Args:
        threshold: positive.
        v_min: lower bound of the potential, at most 0; None for none.
        surrogate, detach_reset, time_dim: those of ``LIF``.
        backend: that of ``LIF`` without a bound; with one ``None`` or ``"reference"``.

    Source: sinabs' ``IAF`` with ``SingleSpike``, and -1 for ``min_v_mem`` as in the published code of Du et al.,
    "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, which lets several spikes fire a step.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        v_min: float | None = -1.0,
        surrogate: Surrogate = Triangle(),
        detach_reset: bool = False,
        time_dim: int = 0,
        backend: str | None = None,
    ):
        super().__init__()
        self.spec = new_spec(1.0, None, True, threshold, None, from_spikingjelly(surrogate), detach_reset, True)
        if self.spec.threshold <= 0:
            raise ValueError(f"threshold must be positive, got {threshold!r}")
        self.v_min = v_min if v_min is None else number("v_min", v_min)
        if v_min is not None and v_min > 0:
            raise ValueError(f"v_min must be at most 0, where the potential starts, got {v_min!r}")
        if backend is not None:
            load(backend)
            if v_min is not None and backend != "reference":
                raise ValueError(f"backend must be None or 'reference' with v_min, got {backend!r}: no kernel has it")
        self.time_dim, self.backend = time_dim, backend

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        check_residual(residual)
        x, spec = x if residual is None else x + residual, self.spec
        if self.v_min is None:
            neuron = {"decay": 1.0, "reset": None, "threshold": spec.threshold, "fire_at_threshold": True}
            options = {"surrogate": spec.surrogate, "detach_reset": spec.detach_reset, "return_v": False}
            return lif(x, **neuron, **options, time_dim=self.time_dim, backend=self.backend)[0]
        time_dim = check_x(x, self.time_dim)
        v, spikes = 0.0, []
        for x_t in x.to(state_dtype(x.dtype)).unbind(time_dim):
            h = (v + x_t).clamp(min=self.v_min)
            s = spec.surrogate(h - spec.threshold, h >= spec.threshold)
            v = h - spec.threshold * (s.detach() if spec.detach_reset else s)
            spikes.append(s.to(x.dtype))
        return torch.stack(spikes, time_dim) if spikes else torch.empty_like(x)

    def extra_repr(self) -> str:
        return f"threshold={self.spec.threshold}, v_min={self.v_min}, {self.spec.surrogate!r}"


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
