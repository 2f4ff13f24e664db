"""sinabs' ``LIF`` and ``IAF`` with ``SingleSpike``, [N, T, ...], and those that take time folded into the batch."""

from __future__ import annotations

from collections.abc import Callable

import sinabs.activation as activation
import sinabs.layers as layers
import torch
from sinabs.layers.reshape import SqueezeMixin
from torch import nn

from ..ops.lif import lif
from ..surrogate import Surrogate
from .gradients import sampled


class _Fused:
    """A layer of sinabs around ``lif``: its state is theirs, in shape and at a reset."""

    backend = None
    _gradient = None  # function, threshold and its version; surrogate

    def forward(self, input_data: torch.Tensor) -> torch.Tensor:
        if isinstance(self, SqueezeMixin):
            return self.squeeze_forward(input_data, self._advance)
        return self._advance(input_data)

    def _advance(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], *x.shape[2:])
        if not self.is_state_initialised() or not self.has_trailing_dimension(shape[1:]):
            self.init_state_with_shape(shape)
        elif not self.state_has_shape(shape):
            self.handle_state_batch_size_mismatch(shape[0])
        decay = 1.0 if isinstance(self, layers.IAF) else self.alpha_mem_calculated
        x = (1 - decay) * x if self.norm_input else x
        x = x if x.dtype == torch.float64 else x.float()
        hard = isinstance(self.reset_fn, activation.MembraneReset)
        spikes, v = lif(
            x,
            self.v_mem.to(x.dtype),
            decay=decay,
            threshold=self.spike_threshold.detach(),
            reset=0.0 if hard else None,
            surrogate=self._surrogate(),
            detach_reset=hard,
            fire_at_threshold=True,
            time_dim=1,
            return_v="sequence" if self.record_states else True,
            backend=self.backend,
        )
        self.recordings = {"v_mem": v} if self.record_states else {}
        self.v_mem = v[:, -1] if self.record_states else v
        spikes = spikes.float()
        self.firing_rate = spikes.mean()
        return spikes

    def _surrogate(self) -> Surrogate:
        function, threshold = self.surrogate_grad_fn, self.spike_threshold
        held = self._gradient
        if held is None or held[0] is not function or held[1] is not threshold or held[2] != threshold._version:
            fixed = threshold.detach().cpu().double()
            surrogate = sampled(lambda x: function(x + fixed, fixed))
            self._gradient = held = function, threshold, threshold._version, surrogate
        return held[3]

    def __deepcopy__(self, memo: dict | None = None):
        copied = super().__deepcopy__(memo)
        copied.backend = self.backend
        return copied


class LIF(_Fused, layers.LIF):
    pass


class IAF(_Fused, layers.IAF):
    pass


class LIFSqueeze(_Fused, layers.LIFSqueeze):
    pass


class IAFSqueeze(_Fused, layers.IAFSqueeze):
    pass


_CLASSES = {cls.__name__: cls for cls in _Fused.__subclasses__()}


def _new(module: nn.Module, backend: str | None) -> nn.Module:
    """Raises ValueError with the reason where ``lif`` is not the same."""
    threshold, reset = module.spike_threshold, module.reset_fn
    if module.spike_fn is not activation.SingleSpike:
        name = getattr(module.spike_fn, "__name__", module.spike_fn)
        raise ValueError(f"its spike_fn is {name}: several spikes a step; SingleSpike has an equal")
    if getattr(module, "tau_syn", None) is not None or getattr(module, "alpha_syn", None) is not None:
        raise ValueError("it has a synaptic current (tau_syn)")
    if module.min_v_mem is not None:
        raise ValueError("its min_v_mem bounds the potential after the reset, and rounds it to do so")
    if threshold.requires_grad or threshold.dim():
        raise ValueError("its spike_threshold is not one fixed number")
    hard = isinstance(reset, activation.MembraneReset) and reset.reset_value == 0
    soft = isinstance(reset, activation.MembraneSubtract) and reset.subtract_value is None
    if not hard and not soft:
        raise ValueError(
            f"its reset_fn is {reset!r}; MembraneReset to 0 and MembraneSubtract of the threshold have an equal"
        )
    theirs = next(base for base in type(module).__mro__ if base.__module__.startswith("sinabs."))
    cls = _CLASSES[theirs.__name__]
    new = cls.__new__(cls)
    new.__dict__ = {**vars(module), "backend": backend}
    new._surrogate()
    return new


def _unlike(reason: str) -> Callable[[nn.Module, str | None], nn.Module]:
    def refuse(module: nn.Module, backend: str | None) -> nn.Module:
        raise ValueError(reason)

    return refuse


NEURONS = {
    **dict.fromkeys(_CLASSES, _new),
    **dict.fromkeys(("ExpLeak", "ExpLeakSqueeze"), _unlike("it never spikes; nn.LI is a leaky integrator")),
    **dict.fromkeys(("LIFRecurrent", "IAFRecurrent"), _unlike("it is recurrent, through a module of its own")),
}
