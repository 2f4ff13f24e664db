"""What published code imports and a machine may lack. Each stand-in is named in the row that it made possible."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from types import ModuleType

import torch
from torch import nn


def module(name: str, **contents) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    made.__path__ = []
    sys.modules[name] = made
    parent, _, own = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], own, made)
    return made


def timm() -> str:
    """The five names that spiking transformers take from timm; DropPath for a rate of 0 alone."""

    class DropPath(nn.Module):
        def __init__(self, drop_prob: float = 0.0):
            super().__init__()
            if drop_prob:
                raise ValueError(f"drop_prob must be 0 where timm is not installed, got {drop_prob!r}")

        def forward(self, x):
            return x

    def to_2tuple(x):
        return x if isinstance(x, tuple) else (x, x)

    trunc_normal_ = nn.init.trunc_normal_
    for name in ("timm", "timm.models"):
        module(name, create_model=None)
    module("timm.models.layers", DropPath=DropPath, to_2tuple=to_2tuple, trunc_normal_=trunc_normal_)
    module("timm.models.registry", register_model=lambda function: function)
    module("timm.models.vision_transformer", _cfg=dict)
    return "timm: five names of it"


def cupy() -> str:
    """SpikingJelly 0.0.0.0.12 takes ``backend="cupy"`` as "torch"."""
    neuron = importlib.import_module("spikingjelly.clock_driven.neuron")
    neuron.check_backend = lambda backend: None
    return "CuPy: backend torch"


def cuda() -> str:
    """Without a GPU, ``.cuda()`` leaves things where they are."""
    if torch.cuda.is_available():
        return ""
    nn.Module.cuda = torch.Tensor.cuda = lambda self, *args, **kwargs: self
    return ".cuda(): the CPU"


def cext() -> str:
    """The nodes of SpikingJelly's compiled extension are those of ``clock_driven`` with ATan."""
    neuron = importlib.import_module("spikingjelly.clock_driven.neuron")
    surrogate = importlib.import_module("spikingjelly.clock_driven.surrogate")

    def of(cls):
        def __init__(self, *args, **kwargs):
            super(made, self).__init__(*args, **{"surrogate_function": surrogate.ATan(), **kwargs})

        made = type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
        return made

    module("spikingjelly.cext", __doc__="")
    names = "MultiStepIFNode", "MultiStepParametricLIFNode"
    module("spikingjelly.cext.neuron", **{name: of(getattr(neuron, name)) for name in names})
    return "spikingjelly.cext: clock_driven's nodes with ATan"


class _Anything(ModuleType):
    """Whatever is asked of it, and of what it is called with, is one more."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, made := _Anything(f"{self.__name__}.{name}"))
        return made

    def __call__(self, *args, **kwargs):
        return _Anything(f"{self.__name__}()")

    def __mro_entries__(self, bases):
        return (object,)


class _Finder(MetaPathFinder, Loader):
    def __init__(self, roots: list[str]) -> None:
        self.roots = roots

    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self, is_package=True) if name.partition(".")[0] in self.roots else None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module) -> None:
        pass


def imported(*names: str) -> Callable[[], str]:
    """Stands in for modules that are imported, but have no part in a forward."""

    def stand_in() -> str:
        missing = [name for name in names if not _importable(name)]
        sys.meta_path.insert(0, _Finder(missing))
        return f"{', '.join(missing)}: imported, no part of the network" if missing else ""

    return stand_in


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # whatever a broken installation raises
        for found in [each for each in sys.modules if each == name or each.startswith(name + ".")]:
            del sys.modules[found]
        return False
    return True


NEEDED = {"timm": "timm.models.layers", "cext": "spikingjelly.cext.neuron", "cupy": "cupy"}


def put(stand_ins) -> Iterator[str]:
    """Puts those in place whose original cannot be imported; yields what they say."""
    for stand_in in stand_ins:
        original = NEEDED.get(stand_in.__name__)
        if original is None or not _importable(original):
            yield stand_in()
