"""SpikingJelly's nodes: of 2.0, and of 0.0.0.0.14 and 0.0.0.0.12 (``clock_driven``) before it."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ..nn import node as ours

NEURONS = {}


class _Folded:
    """Nodes before 2.0 fold the leak without ``decay_input``, where rest is 0: ``h = v * (1 - 1/tau) + x``.

    ``folded`` holds the modes, ``training`` or not, in which they do: 0.0.0.0.14's LIFNode does in eval mode only with
    a soft reset.
    """

    folded = ()

    def _neuron(self) -> dict:
        neuron = super()._neuron()
        if self.decay_input or self.v_reset or (self.training or self.v_reset is None) not in self.folded:
            return neuron
        inverse = 1 / neuron.pop("tau") if "tau" in neuron else neuron.pop("inverse_tau")
        return {**neuron, "decay_input": True, "decay": 1 - inverse}


class LIFNode(_Folded, ours.LIFNode):
    pass


class ParametricLIFNode(_Folded, ours.ParametricLIFNode):
    pass


class MultiStepLIFNode(_Folded, ours.MultiStepLIFNode):
    pass


class MultiStepParametricLIFNode(_Folded, ours.MultiStepParametricLIFNode):
    pass


_FOLDED = {cls.__name__: cls for cls in _Folded.__subclasses__()}
_NAMES = (*_FOLDED, "IFNode", "MultiStepIFNode", "TernaryIFNode", "TernaryLIFNode", "ILIFNode")


def _new(module: nn.Module, backend: str | None) -> nn.Module:
    """Raises ValueError or TypeError with the reason where no node here is the same."""
    known = (cls for cls in type(module).__mro__ if cls.__name__ in NEURONS)
    theirs = next(cls for cls in known if cls.__module__.startswith("spikingjelly."))
    if not theirs.__module__.startswith(("spikingjelly.activation_based.neuron", "spikingjelly.clock_driven.neuron")):
        raise ValueError(f"it is of {theirs.__module__}, which is not known")
    if theirs.__name__ != "ILIFNode":
        _check_spikes(module.surrogate_function)
    elif module.step_mode == "s":
        raise ValueError("its single steps are rounded otherwise than the steps of multi-step mode")
    if getattr(module, "backend", None) == "lava" or getattr(module, "_neuron_precision", None) is not None:
        raise ValueError("it has numbers of its own: backend 'lava' or a precision that was set")
    before_2 = theirs.__module__.endswith(".neuron")  # a package in 2.0
    cls = getattr(ours, theirs.__name__)
    if before_2 and not getattr(module, "decay_input", True):
        cls = _FOLDED[theirs.__name__]
    settings = inspect.signature(cls).parameters.keys() - {"backend"}
    node = cls(**{name: getattr(module, name) for name in settings if hasattr(module, name)}, backend=backend)
    if isinstance(node, _Folded):
        node.folded = (True,) if cls is LIFNode and ".activation_based." in theirs.__module__ else (True, False)
    for name, value in module._memories.items():
        if name not in settings and name != "v_seq":
            node._memories[name], node._memories_rv[name] = value, module._memories_rv[name]
    node.v_seq = getattr(module, "v_seq", None)
    for name, child in module._modules.items():  # of a subclass
        node._modules.setdefault(name, child)
    for name, value in vars(module).items():  # what its user has put there
        if not hasattr(cls, name):
            vars(node).setdefault(name, value)
    for kind in ("_parameters", "_buffers"):
        vars(node)[kind].update(vars(module)[kind])
    return node


def _check_spikes(surrogate_function) -> None:
    x = torch.linspace(-2, 2, 17)
    with torch.no_grad():
        spikes = surrogate_function(x)
    if not torch.equal(spikes, (x >= 0).to(x)):
        raise ValueError("its surrogate_function does not spike, 1 from the threshold on and 0 below")


NEURONS.update(dict.fromkeys(_NAMES, _new))
