"""SpikingJelly's nodes: 2.0, 0.0.0.0.14 (``activation_based``) and 0.0.0.0.12 (``clock_driven``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from .. import nn as ours


def _node(cls: type[nn.Module]) -> Callable[[nn.Module, str | None], nn.Module]:
    settings = inspect.signature(cls.__init__).parameters.keys() - {"self", "backend"}

    def make(module: nn.Module, backend: str | None) -> nn.Module:
        node = cls(**{name: getattr(module, name) for name in settings if hasattr(module, name)}, backend=backend)
        for name, value in module._memories.items():
            if name not in settings and name != "v_seq":
                node._memories[name] = value
                node._memories_rv[name] = module._memories_rv[name]
        node.v_seq = getattr(module, "v_seq", None)
        return node

    return make


_NAMES = "LIFNode", "IFNode", "ParametricLIFNode"
NEURONS = {name: _node(getattr(ours, name)) for name in _NAMES if hasattr(ours, name)}
