"""A model of others' neurons, made one of ours. One file a library, imported where that is in use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple

import torch
from torch import nn

from ..backend import load
from ..surrogate import from_spikingjelly
from .gradients import ERROR

__all__ = ["Report", "Row", "convert"]

_LIBRARIES = ("norse", "sinabs", "snntorch", "spikingjelly")
# Where their neurons are defined, those without an equal here too.
_NEURONS = re.compile(
    r"spikingjelly\.\w+\.neuron|snntorch\._neurons|norse\.torch\.module\.snn\.SNN|sinabs\.layers\.stateful_layer"
)
_OWN = {
    "__init__",
    "__doc__",
    "__module__",
    "__qualname__",
    "__annotations__",
    "__firstlineno__",
    "__static_attributes__",
}

Rules = Mapping[type[nn.Module], Callable[[nn.Module], nn.Module | None]]


class Row(NamedTuple):
    """A neuron that ``convert`` found."""

    path: str  # in the model, as ``named_modules`` has it; with commas between where it stands in several places
    was: str
    now: str | None  # None: it is what it was
    note: str | None  # why; of one that was swapped, what is not equal


class Report(tuple[Row, ...]):
    """The neurons that ``convert`` found, in the order of ``named_modules``; printed, a table."""

    HEADER = "module", "was", "now, or why not"

    @property
    def swapped(self) -> tuple[Row, ...]:
        return tuple(row for row in self if row.now)

    @property
    def unchanged(self) -> tuple[Row, ...]:
        return tuple(row for row in self if not row.now)

    def lines(self) -> list[tuple[str, str, str]]:
        """The table's, below its header."""
        told = (f"{row.now or 'unchanged'}: {row.note}" if row.note else row.now for row in self)
        return [(row.path or "(model)", row.was, now) for row, now in zip(self, told, strict=True)]

    def summary(self) -> str:
        if not self:
            return f"no neurons found of {', '.join(_LIBRARIES)}, nor of a class that rules name"
        return f"{len(self.swapped)} of {len(self)} neurons swapped"

    def __repr__(self) -> str:
        table = [self.HEADER, *self.lines()] if self else []
        first, second = (max((len(line[i]) for line in table), default=0) + 2 for i in (0, 1))
        return "\n".join([*(f"{a:{first}}{b:{second}}{c}" for a, b, c in table), self.summary()])


def convert(model: nn.Module, rules: Rules | None = None, backend: str | None = None) -> Report:
    """Swaps the neurons of a model for fused ones, in place; its outputs stay what they were, bit for bit in float32.

    ::

        print(snnkern.convert(model))

    Neurons are those of SpikingJelly (2.0, and 0.0.0.0.14 and 0.0.0.0.12 before it), snnTorch, Norse and sinabs, as far
    as an equal is known here, and whatever ``rules`` names. One without is left as it was; the report says why: a
    subclass that defines more than a constructor, for one. Gradients are equal up to rounding, but where it says so.

    Each neuron stays the object that it was, and becomes one of another class, in all places where the model or anybody
    else holds it, the model itself if it is one. Parameters, buffers, state, hooks, mode and the keys of the state_dict
    are kept, and how it is called. SpikingJelly's become nodes of ``snnkern.nn`` (``v_seq`` of 0.0.0.0.12's multi-step
    nodes is None from then on, unless ``store_v_seq`` is set; where 0.0.0.0.14 has no gradient, in eval mode, there is
    one), others' a subclass of their own. Converting again finds nothing to do. Convert before ``torch.compile``.

    Args:
        model: a module.
        rules: for classes of one's own: {class: function of a module that returns a new one, or None to leave it}.
            A class stands for itself, not for its subclasses, and goes before what is known of it here. The new module
            must have the same keys in its state_dict; parameters and buffers are those of the old.
        backend: a backend of ``snnkern.lif`` for the new neurons.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or a rule's module cannot take the place; the
            message names it. The model is then as it was.
        RuntimeError: the backend cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {model!r}")
    if compiled := _compiled(model):
        raise TypeError(f"model must be converted before it is {compiled}")
    rules = _checked(rules)
    if backend is not None:
        load(backend)
    found: dict[nn.Module, tuple[list[str], nn.Module | str]] = {}

    def visit(path: str, module: nn.Module, compiled: str | None) -> None:
        compiled = compiled or _compiled(module)
        if module not in found:
            outcome = _outcome(module, rules, backend)
            if outcome is not None:
                found[module] = [], f"it is {compiled}: convert before" if compiled else outcome
        if module in found:
            found[module][0].append(path)
            if isinstance(found[module][1], nn.Module):
                return
        for name, child in module._modules.items():
            if child is not None:
                visit(f"{path}.{name}" if path else name, child, compiled)

    visit("", model, None)
    rows = []
    for module, (paths, outcome) in found.items():  # nothing was touched before everything was known to fit
        new = outcome if isinstance(outcome, nn.Module) else None
        was, now = type(module), new and type(new)
        if new is not None:
            _become(module, new)
        name = f"{was.__module__.partition('.')[0]}.{was.__qualname__}"
        note = outcome if new is None else _note(new)
        rows.append(Row(", ".join(paths), name, now and f"{now.__module__}.{now.__qualname__}", note))
    return Report(rows)


def _checked(rules: Rules | None) -> Rules:
    if rules is None:
        return {}
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a dict of module classes and functions, got {rules!r}")
    for cls, make in rules.items():
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            raise TypeError(f"rules must have module classes for keys, got {cls!r}")
        if not callable(make):
            raise TypeError(f"rules[{cls.__name__}] must be a function of a module, got {make!r}")
    return rules


def _compiled(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    return "compiled" if "_orig_mod" in module._modules or module._compiled_call_impl is not None else None


def _outcome(module: nn.Module, rules: Rules, backend: str | None) -> nn.Module | str | None:
    """What is to take a module's place, or why nothing does; None if it is no neuron, or one of ours."""
    classes = type(module).__mro__
    if type(module) in rules:
        return _ruled(module, rules[type(module)])
    for base in classes:
        root = base.__module__.partition(".")[0]
        if root == __package__.partition(".")[0]:
            return None
        make = import_module(f".{root}", __name__).NEURONS.get(base.__name__) if root in _LIBRARIES else None
        if make is None:
            continue
        own = {name for cls in classes[: classes.index(base)] for name in vars(cls)} - _OWN
        own |= {name for name in vars(module) if callable(getattr(base, name, None))}
        if own:
            return f"it defines {', '.join(sorted(own))} where {base.__name__} has its own"
        try:
            return make(module, backend)
        except (TypeError, ValueError) as error:
            return str(error)
    if any(base in rules for base in classes):
        return f"rules name a class that it is a subclass of; name {type(module).__name__} too"
    known = any(_NEURONS.match(f"{base.__module__}.{base.__name__}") for base in classes)
    return "no neuron here equals it" if known else None


def _ruled(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module | str:
    name = f"rules[{type(module).__name__}]"
    keys, new = module.state_dict().keys(), make(module)
    if new is None or new is module:
        return "its rule leaves it"
    if not isinstance(new, nn.Module):
        raise TypeError(f"{name} must return a module or None, got {new!r}")
    if new.state_dict().keys() != keys:
        wanted, got = ([*each] for each in (keys, new.state_dict().keys()))
        raise ValueError(f"{name} must return a module whose state_dict has the keys {wanted}, got {got}")
    return new


def _become(module: nn.Module, new: nn.Module) -> None:
    """Makes a module one of the class of ``new``, whose contents it shares from then on: whoever holds it, holds that.

    Hooks, mode, parameters and buffers are its own, the same objects.
    """
    old, contents, parts = vars(module), vars(new), dict(new.named_modules())
    for name in vars(nn.Module()):
        if "hook" in name:
            if isinstance(old[name], dict):
                old[name].update(contents[name])  # stays the same dict: hooks' handles know it
            contents[name] = old[name]
    for kind, tensors in (("_parameters", module.named_parameters()), ("_buffers", module.named_buffers())):
        for path, tensor in list(tensors):
            parent, _, name = path.rpartition(".")
            if parent in parts and name in vars(parts[parent])[kind]:
                vars(parts[parent])[kind][name] = tensor
    new.train(module.training)
    object.__setattr__(module, "__class__", type(new))
    object.__setattr__(module, "__dict__", contents)


def _note(new: nn.Module) -> str | None:
    surrogate = getattr(new, "surrogate_function", None)
    error = getattr(surrogate and from_spikingjelly(surrogate), "error", 0.0)
    return f"its surrogate gradient is sampled, up to {error:.0e} of its peak off" if error > ERROR else None
