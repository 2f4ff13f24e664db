"""SpikingJelly's nodes: of 2.0, and of 0.0.0.0.14 (``activation_based``) and 0.0.0.0.12 (``clock_driven``) before it."""

from __future__ import annotations

import inspect

from torch import nn

from ..nn import node as ours

NEURONS = {}


class _Folded:
    """Nodes before 2.0 fold the leak without ``decay_input``, where rest is 0: ``h = v * (1 - 1/tau) + x``.

    That of 0.0.0.0.14 does not in eval mode with a hard reset (``folded_in_eval``).
    """

    folded_in_eval = True

    def _neuron(self) -> dict:
        neuron = super()._neuron()
        folded = self.folded_in_eval or self.training or self.v_reset is None
        if self.decay_input or self.v_reset or not folded:
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
_NAMES = (*_FOLDED, "IFNode", "MultiStepIFNode", "TernaryIFNode", "TernaryLIFNode")


def _new(module: nn.Module, backend: str | None) -> nn.Module:
    theirs = next(cls for cls in type(module).__mro__ if cls.__name__ in NEURONS)
    before_2 = theirs.__module__.endswith(".neuron")  # a package in 2.0
    cls = getattr(ours, theirs.__name__)
    if before_2 and not getattr(module, "decay_input", True):
        cls = _FOLDED[theirs.__name__]
    settings = inspect.signature(cls).parameters.keys() - {"backend"}
    node = cls(**{name: getattr(module, name) for name in settings if hasattr(module, name)}, backend=backend)
    if isinstance(node, LIFNode) and ".activation_based." in theirs.__module__:
        node.folded_in_eval = False
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


NEURONS.update(dict.fromkeys(_NAMES, _new))
