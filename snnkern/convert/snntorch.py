"""snnTorch's ``Leaky`` that resets to zero, called step by step as its own is."""

from __future__ import annotations

import snntorch
import torch
from torch import nn

from ..ops.lif import lif
from ..surrogate import ATan, FastSigmoid, Sigmoid, Surrogate

_GRADIENTS = {"atan": ATan, "fast_sigmoid": FastSigmoid, "sigmoid": Sigmoid}
_NOTHING_REACHES = torch.finfo(torch.float32).max


class Leaky(snntorch.Leaky):
    """One step in float32; in other dtypes snnTorch's own."""

    backend = None

    def forward(self, input_, mem=None):
        before = self.mem if mem is None else mem
        if input_.dtype != torch.float32 or (self.init_hidden and mem is not None):
            return super().forward(input_, mem)
        if before.shape != input_.shape:
            before = torch.zeros_like(input_)
        elif not self.reset_delay and not _is_ours(before) and (before > self.threshold).any():
            return super().forward(input_, mem)  # which takes such a start for one that is to be reset
        spikes, self.mem = (self._delayed if self.reset_delay else self._prompt)(input_, before)
        spikes = spikes * self.graded_spikes_factor
        return spikes if self.init_hidden and not self.output else (spikes, self.mem)

    def _prompt(self, x, v):
        spikes, v = self._lif(x.unsqueeze(0), v, self.threshold, detach_reset=False)
        v.after_reset = v._version
        return spikes.squeeze(0), v

    def _delayed(self, x, v):
        """The reset, left out of the gradient, comes a step later: the potential returned is that before it. So each
        neuron is there twice, for its spikes and, with a threshold that nothing reaches, for its potential."""
        threshold = self.threshold
        both = torch.stack((threshold, torch.full_like(threshold, _NOTHING_REACHES)))
        both = both.view(2, *[1] * (x.dim() - threshold.dim()), *threshold.shape)
        v = v.masked_fill(v > threshold, 0.0).expand(2, *x.shape)
        spikes, v = self._lif(x.expand(1, 2, *x.shape), v, both, detach_reset=True)
        return spikes[0, 0], v[1].clone()  # snnTorch detaches it in place, as no view can be

    def _lif(self, x, v, threshold, detach_reset):
        surrogate, backend = _surrogate(self), self.backend
        decay = self.beta.clamp(0, 1)
        neuron = {"decay": decay, "threshold": threshold, "surrogate": surrogate, "detach_reset": detach_reset}
        return lif(x, v, **neuron, backend=backend)


def _is_ours(v: torch.Tensor) -> bool:
    """Whether a potential was put out after its reset, so that it is not above the threshold."""
    return getattr(v, "after_reset", None) == v._version


def _surrogate(module: nn.Module) -> Surrogate:
    function = module.spike_grad
    name = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner")
    if getattr(function, "__module__", None) != "snntorch.surrogate" or name not in _GRADIENTS:
        raise ValueError(f"its spike_grad has no equal here; {', '.join(_GRADIENTS)} have")
    return _GRADIENTS[name](float(function.__closure__[0].cell_contents))


def _new(module: nn.Module, backend: str | None) -> nn.Module:
    mechanism = module.state_function.__func__
    if mechanism is snntorch.Leaky._base_sub:
        late = "a step late, undecayed" if module.reset_delay else "again, a step late, from what is still above it"
        raise ValueError(f"its reset_mechanism 'subtract' takes the threshold {late}; 'zero' has an equal")
    if mechanism is not snntorch.Leaky._base_zero or module.reset_mechanism != "zero":
        raise ValueError(f"its reset_mechanism is {module.reset_mechanism!r}; 'zero' has an equal")
    for name in ("inhibition", "state_quant"):
        if getattr(module, name):
            raise ValueError(f"it has {name}")
    if not module.reset_delay and (isinstance(module.threshold, nn.Parameter) or (module.threshold < 0).any()):
        raise ValueError("its threshold may be negative, where reset_delay=False resets again and again")
    _surrogate(module)
    new = Leaky.__new__(Leaky)
    new.__dict__ = {**vars(module), "backend": backend}
    return new


NEURONS = {"Leaky": _new}
