"""Scripts written for SpikingJelly, unchanged: ``import snnkern.hook`` before their imports, or ``snnkern run``.

From then on ``spikingjelly.clock_driven.neuron`` (0.0.0.0.12) and ``spikingjelly.activation_based.neuron`` (0.0.0.0.14,
2.0) give the nodes of ``snnkern.nn`` under the names in ``NODES``. All else stays SpikingJelly's; so does a class that
a script derives from one of these to charge, fire or reset by itself. Where it, or one of the two packages, is not
installed, a stand-in has these nodes, the functions and containers that published training scripts call around them
(``functional``, ``layer``), and its surrogate functions. What the stand-in does not have raises ImportError or
AttributeError. A line on stderr says for each of the two what was done.

Processes that a script starts with the method "spawn" are without the hook; torchrun takes ``snnkern run`` too:
``torchrun --no-python snnkern run train.py``.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import torch

from . import nn
from .nn.imports import after_import
from .nn.node import INSTEAD, BaseNode
from .surrogate import from_spikingjelly

__all__ = ["NODES", "run"]

NODES = {
    "spikingjelly.clock_driven.neuron": (
        "IFNode",
        "LIFNode",
        "ParametricLIFNode",
        "MultiStepIFNode",
        "MultiStepLIFNode",
        "MultiStepParametricLIFNode",
    ),
    "spikingjelly.activation_based.neuron": ("IFNode", "LIFNode", "ParametricLIFNode"),
}


def run(script: str, arguments: list[str]) -> None:
    """Runs ``script`` as ``python script arguments`` would, with the hook; what it raises, SystemExit too, passes."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def _replace(module: ModuleType) -> None:
    for name in NODES[module.__name__]:
        ours = getattr(nn, name)
        if isinstance(vars(module).get(name), type):
            INSTEAD[ours] = vars(module)[name]
        setattr(module, name, ours)
    names = ", ".join(NODES[module.__name__])
    absent = "is not installed: a stand-in, whose" if isinstance(module, _StandIn) else "is as installed, but its"
    print(f"snnkern: {module.__name__} {absent} {names} are snnkern's", file=sys.stderr)


class _StandIn(ModuleType):
    def __getattr__(self, name: str):
        raise AttributeError(
            f"{self.__name__} is a stand-in by snnkern, as it is not installed, and has no {name}; it has "
            f"{', '.join(key for key in vars(self) if not key.startswith('_'))}"
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last to be asked, for what is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name in _CONTENTS:
            return importlib.util.spec_from_loader(name, self, origin=__file__, is_package=name in _PACKAGES)
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, _StandIn):
            raise ModuleNotFoundError(
                f"{name} needs SpikingJelly: {parent.__name__} is not installed, and of its stand-in by snnkern there "
                f"are {', '.join(sorted(each for each in _CONTENTS if each not in _PACKAGES))} alone",
                name=name,
            )
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = __file__  # in messages about names that it does not have
        vars(module).update(_CONTENTS[module.__name__])


def _reset_net(net: torch.nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()


def _detach_net(net: torch.nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "detach"):
            module.detach()


def _set_step_mode(net: torch.nn.Module, step_mode: str) -> None:
    for module in net.modules():
        if hasattr(module, "step_mode"):
            module.step_mode = step_mode


def _set_backend(net: torch.nn.Module, backend: str, instance: type | tuple[type, ...] = torch.nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, instance) and hasattr(module, "backend"):
            module.backend = backend


def _each(modules) -> list:
    return list(modules) if isinstance(modules, (list, tuple, torch.nn.Sequential)) else [modules]


def _seq_to_ann_forward(x_seq: torch.Tensor, stateless_module) -> torch.Tensor:
    """x [T, N, ...] through layers without time, as one batch of T*N."""
    y = x_seq.flatten(0, 1)
    for module in _each(stateless_module):
        y = module(y)
    return y.unflatten(0, x_seq.shape[:2])


def _multi_step_forward(x_seq: torch.Tensor, single_step_module) -> torch.Tensor:
    """x [T, N, ...] through single-step layers, step by step."""
    steps = []
    for x in x_seq:
        for module in _each(single_step_module):
            x = module(x)
        steps.append(x)
    return torch.stack(steps)


class _SeqToANNContainer(torch.nn.Sequential):
    def forward(self, x_seq):
        return _seq_to_ann_forward(x_seq, list(self))


class _MultiStepContainer(torch.nn.Sequential):
    def forward(self, x_seq):
        return _multi_step_forward(x_seq, list(self))


class _Surrogate(torch.nn.Module):
    """H(x), 1 at 0, with the derivative of ``from_spikingjelly(self)``."""

    def __init__(self, alpha: float | None = None, spiking: bool = True):
        super().__init__()
        if spiking is not True:
            raise ValueError(f"spiking must be True where snnkern stands in for SpikingJelly, got {spiking!r}")
        self.alpha, self.spiking = self.default if alpha is None else alpha, spiking

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return from_spikingjelly(self)(x, x >= 0)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, spiking={self.spiking}"


_ALPHAS = {
    "Sigmoid": 4.0,
    "ATan": 2.0,
    "PiecewiseQuadratic": 1.0,
    "PiecewiseExp": 1.0,
    "SoftSign": 2.0,
    "SuperSpike": 1.0,
    "Erf": 2.0,
    "Rect": 1.0,
}


def _surrogates(module: str) -> dict:
    return {
        name: type(name, (_Surrogate,), {"default": alpha, "__module__": module}) for name, alpha in _ALPHAS.items()
    }


_FUNCTIONAL = {
    "reset_net": _reset_net,
    "detach_net": _detach_net,
    "seq_to_ann_forward": _seq_to_ann_forward,
    "multi_step_forward": _multi_step_forward,
}
_LAYER = {"SeqToANNContainer": _SeqToANNContainer, "MultiStepContainer": _MultiStepContainer}
# Stand-ins by name: what each has besides submodules and, in `neuron`, NODES.
_CONTENTS = {
    "spikingjelly": {},
    "spikingjelly.clock_driven": {},
    "spikingjelly.clock_driven.neuron": {"BaseNode": BaseNode},
    "spikingjelly.clock_driven.functional": _FUNCTIONAL,
    "spikingjelly.clock_driven.layer": _LAYER,
    "spikingjelly.clock_driven.surrogate": _surrogates("spikingjelly.clock_driven.surrogate"),
    "spikingjelly.activation_based": {},
    "spikingjelly.activation_based.neuron": {"BaseNode": BaseNode},
    "spikingjelly.activation_based.functional": {
        **_FUNCTIONAL,
        "set_step_mode": _set_step_mode,
        "set_backend": _set_backend,
    },
    "spikingjelly.activation_based.layer": _LAYER,
    "spikingjelly.activation_based.surrogate": _surrogates("spikingjelly.activation_based.surrogate"),
}
_PACKAGES = ("spikingjelly", "spikingjelly.clock_driven", "spikingjelly.activation_based")

sys.meta_path.append(_Finder())
for _name in NODES:
    after_import(_name, _replace)
