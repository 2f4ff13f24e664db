"""Random calls of the ops, as data: drawn from a seed, run on any backend, and written down as Python that runs alone.

Sizes, layouts and values are those at which kernels go wrong: one step, one neuron, around vectors and chunks, tensors
beyond the caches, thousands of steps; strides of all kinds; potentials that meet the threshold exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..ops.bn_lif import bn_lif
from ..ops.lif import lif
from ..ops.linear import linear
from ..ops.pack import packed_spikes
from ..ops.recurrent import recurrent_lif
from ..ops.ttm import ttm
from ..spec.layout import state_dtype
from ..surrogate import Integer, Surrogate, Table

OPS = {"lif": lif, "bn_lif": bn_lif, "recurrent_lif": recurrent_lif, "ttm": ttm}  # and "linear", "pack"
# By the text that makes them: one of each class, and those that are of a kind of their own.
SURROGATES = {f"{cls.__name__}()": cls() for cls in Surrogate.__subclasses__() if getattr(cls, "_triton", None)}
SURROGATES |= {"Table(torch.sinc, 1.0, 64)": Table(torch.sinc, 1.0, 64), "Integer(3)": Integer(3)}
BETWEEN = {  # of parameters that are tensors
    "decay": (0.2, 0.9), "tau": (1.2, 3.0), "inverse_tau": (0.2, 0.9), "threshold": (0.4, 0.9), "bias": (-0.3, 0.6),
}  # fmt: skip
FROZEN = {"running_mean", "running_var"}  # what wants no gradient


class Drawn(NamedTuple):
    """A tensor of normal numbers, and what is done to it: names of methods and their arguments."""

    shape: tuple[int, ...]
    then: tuple[tuple, ...] = ()

    def make(self, generator: torch.Generator) -> torch.Tensor:
        t = torch.randn(self.shape, generator=generator)
        for method, *given in self.then:
            t = getattr(t, method)(*given)
        return t

    def __str__(self) -> str:
        methods = (f".{method}({', '.join(map(repr, given))})" for method, *given in self.then)
        return f"torch.randn({self.shape}, generator=g){''.join(methods)}"


class Call(NamedTuple):
    """A call of ``op`` with ``tensors`` by name of the argument and ``options``; a surrogate is one of SURROGATES."""

    op: str
    seed: int
    dtype: torch.dtype
    elements: int  # of the first tensor
    steps: int
    tensors: dict[str, Drawn]
    options: dict[str, object]

    def run(self, backend: str) -> dict[str, torch.Tensor]:
        """What the op returns and changes, and the gradient of each tensor for random gradients of what it returns."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {name: drawn.make(generator) for name, drawn in self.tensors.items()}
        wanted = {name: t.requires_grad_() for name, t in tensors.items() if name not in FROZEN}
        outputs = {name: t for name, t in self._outputs(tensors, backend).items() if t is not None}
        grads = [torch.randn(t.shape, generator=generator).to(t) for t in outputs.values()]
        options = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad([*outputs.values()], [*wanted.values()], grads, **options)
        results = outputs | {name: t for name, t in tensors.items() if name in FROZEN}
        return results | {f"gradient of {name}": t for name, t in zip(wanted, gradients, strict=True)}

    def _outputs(self, tensors: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor | None]:
        if self.op == "linear":
            return {"y": (linear if backend == "cpu" else F.linear)(*tensors.values())}
        if self.op == "pack":
            with packed_spikes(backend=backend):
                return {"y": lif(tensors["x"], backend=backend)[0][1:] * tensors["weight"]}
        options = {**self.options, "backend": backend}
        if "surrogate" in options:
            options["surrogate"] = SURROGATES[options["surrogate"]]
        if "v" in tensors and self._states() > 1:
            options["v"] = tuple(tensors["v"])
        returned = OPS[self.op](**tensors | options)
        if self.op == "ttm":
            return {"y": returned}
        spikes, v_last = returned
        return {"spikes": spikes, "v_last": torch.stack(v_last) if isinstance(v_last, tuple) else v_last}

    def _states(self) -> int:
        return 1 + ("synapse_decay" in self.options) + ("threshold_decay" in self.options)

    def source(self, backend: str) -> str:
        """A program that makes this call on the backend and on the reference, and prints how far they are apart."""
        lines = [f"{name} = {t}{'.requires_grad_()' * (name not in FROZEN)}" for name, t in self.tensors.items()]
        outputs, given = ["y"], ", ".join(self.tensors)
        if self.op == "linear":
            lines += ['product = snnkern.linear if backend == "cpu" else torch.nn.functional.linear']
            lines += [f"y = product({given})"]
        elif self.op == "pack":
            lines += ["with snnkern.packed_spikes(backend=backend):"]
            lines += ["    y = snnkern.lif(x, backend=backend)[0][1:] * weight"]
        else:
            named = [f"{name}={'tuple(v)' if name == 'v' and self._states() > 1 else name}" for name in self.tensors]
            named += [f"{name}={_written(name, value)}" for name, value in self.options.items()]
            outputs = outputs if self.op == "ttm" else ["spikes", "v_last"]
            lines += [f"{', '.join(outputs)} = snnkern.{self.op}({', '.join(named)}, backend=backend)"]
            if self.options.get("return_v") is False:
                outputs.remove("v_last")
            elif self._states() > 1 and self.options.get("return_v") != "sequence":
                lines += ["v_last = torch.stack(v_last)"]
        frozen = [f'"{name}": {name}' for name in self.tensors if name in FROZEN]
        name, _, _ = self.options.get("surrogate", "").partition("(")
        return _PROGRAM.format(
            imports=f"\nfrom snnkern.surrogate import {name}" if name else "",
            seed=self.seed,
            lines="\n    ".join(lines),
            outputs=", ".join(f'"{name}": {name}' for name in outputs),
            inputs=", ".join(f'"gradient of {name}": {name}' for name in self.tensors if name not in FROZEN),
            frozen=f" | {{{', '.join(frozen)}}}" if frozen else "",
            backend=backend,
        )


_PROGRAM = """\
import torch

import snnkern{imports}


def call(backend):
    g = torch.Generator().manual_seed({seed})
    {lines}
    outputs, inputs = {{{outputs}}}, {{{inputs}}}
    grads = [torch.randn(t.shape, generator=g).to(t) for t in outputs.values()]
    options = {{"allow_unused": True, "materialize_grads": True}}
    gradients = torch.autograd.grad([*outputs.values()], [*inputs.values()], grads, **options)
    return outputs{frozen} | dict(zip(inputs, gradients))


results, wanted = call("{backend}"), call("reference")
for name, got in results.items():
    true = wanted[name]
    differ, error = (got != true).sum(), (got.double() - true.double()).norm() / true.double().norm()
    print(f"{{name}}: {{differ}} of {{got.numel()}} differ, by {{error:.1e}} of the norm")
"""


def _written(name: str, value) -> str:
    return value if name == "surrogate" else 'float("inf")' if value == math.inf else repr(value)


class Variant(NamedTuple):
    """What kernels are compiled for: an op, a dtype and a neuron's options; and which of its parameters are tensors."""

    op: str
    dtype: torch.dtype
    options: dict[str, object]
    given: tuple[str, ...] = ()


def draw_variant(random: Random, op: str, dtypes: Sequence[torch.dtype]) -> Variant:
    dtype = random.choice(dtypes) if op != "linear" else torch.float32
    if op in ("ttm", "linear", "pack"):
        return Variant(op, dtype, {})
    neuron, given = _draw_neuron(random, tensors=op != "bn_lif")
    if op == "lif":
        neuron["return_v"] = random.choice((True, True, False, "sequence"))
    elif op == "bn_lif":
        # In float64 statistics are not rounded, so that the order of their sums would show.
        neuron["training"] = dtype != torch.float64 and random.random() < 0.5
        neuron |= _maybe(random, 0.2, scale=0.5)
    return Variant(op, dtype, neuron, given)


def _draw_neuron(random: Random, tensors: bool) -> tuple[dict[str, object], tuple[str, ...]]:
    """A neuron's keywords, and which more are tensors."""
    given = []
    leak = random.choice(("", "decay", "decay", "tau", "tau", "inverse_tau", "none"))
    options = {
        **{"": {}, "none": {"tau": math.inf, "decay_input": False}, "decay": {"decay": random.choice((0.0, 0.9, 1.0))}},
        **{"tau": {"tau": random.choice((1.7, 2.0, 20.0))}, "inverse_tau": {"inverse_tau": 0.4}},
    }[leak]
    if "tau" in leak:
        options |= _maybe(random, 0.5, decay_input=False)
    if tensors and leak in ("decay", "tau", "inverse_tau") and random.random() < 0.3:
        del options[leak]
        given.append(leak)
    if tensors:
        given += [name for name in ("threshold", "bias") if random.random() < 0.2]
    kind = random.random()
    if kind < 0.1:
        options |= {"reset": None, "surrogate": "Integer(3)"}
    else:
        options |= {"reset": random.choice((0.0, -0.3, None)), "surrogate": random.choice([*SURROGATES][:-1])}
        options |= {"ternary": True} if kind < 0.25 else _maybe(random, 0.2, fire_at_threshold=True)
    if "threshold" not in given:
        options["threshold"] = random.choice((1.0, 0.7))
    options |= _maybe(random, 0.3, detach_reset=True) | _maybe(random, 0.15, v_min=-0.5)
    if tensors:
        options |= _maybe(random, 0.15, synapse_decay=0.6)
        options |= _maybe(random, 0.15, threshold_decay=0.75, threshold_jump=0.125)
    return options, tuple(given)


def _maybe(random: Random, probability: float, **options) -> dict[str, object]:
    return options if random.random() < probability else {}


def draw_call(random: Random, variant: Variant, device: str, small: bool = False) -> Call:
    """``small``: for an interpreter."""
    op, dtype, options, given = variant
    options, seed = dict(options), random.getrandbits(31)
    if op == "linear":
        return _draw_linear(random, seed)
    steps, neurons = _draw_sizes(random, op, small)
    time_dim = random.randint(0, len(neurons) - (op == "recurrent_lif")) if op != "bn_lif" else random.randint(0, 1)
    shape = (*neurons[:time_dim], steps, *neurons[time_dim:])
    state = state_dtype(dtype)
    place = ("to", device, dtype), ("to", device, state)
    eighths = (("mul", 8), ("round",), ("div", 8)) if random.random() < 0.5 else ()
    if op == "pack":
        x = Drawn(shape := (steps + 1, *neurons), (place[0],))
        weight = Drawn((steps, *neurons), (place[0],))
        return Call(op, seed, dtype, math.prod(shape), steps + 1, {"x": x, "weight": weight}, {})
    memory, views = _draw_layout(random, shape, time_dim)
    x = Drawn(memory, (*eighths, place[0], *views))
    tensors = {"y" if op == "bn_lif" else "x": x}
    options["time_dim"] = time_dim
    if op == "ttm":
        options["steps"] = random.randint(1, 2 * steps)
        return Call(op, seed, dtype, math.prod(shape), steps, tensors, options)
    if op == "recurrent_lif":
        gain = round(random.choice((0.5, 1.5)) * neurons[-1] ** -0.5, 3)
        tensors["weight"] = Drawn(neurons[-1:] * 2, (("mul", gain), place[1]))
        if random.random() < 0.5:
            tensors["s"] = Drawn(neurons, (("gt", 0.5), place[0]))
    elif random.random() < 0.2:
        options["steps_out"] = random.randint(1, steps + 2)
    if op == "bn_lif":
        channels = (shape[2],)
        if math.prod(shape) < 16 * shape[2]:  # of few numbers, the gradients through their statistics cancel
            options["training"] = False
        for name, then in _NORM.items():
            if name in FROZEN or random.random() < 0.8:
                tensors[name] = Drawn(channels, (*then, place[1]))
            else:
                options[name] = None
        if random.random() < 0.3:
            tensors["residual"] = Drawn(shape, (place[0],))
    states = 1 + ("synapse_decay" in options) + ("threshold_decay" in options)
    if random.random() < 0.6:
        tensors["v"] = Drawn((states, *neurons) if states > 1 else neurons, (*eighths, place[1]))
    for name in given:
        low, high = BETWEEN[name]
        between = ("sigmoid",), ("mul", round(high - low, 3)), ("add", low)
        tensors[name] = Drawn(_draw_parameter(random, neurons), (*between, place[1]))
    return Call(op, seed, dtype, math.prod(shape), steps, tensors, options)


_NORM = {
    "weight": (("mul", 0.5), ("add", 1)),
    "bias": (("mul", 0.3), ("add", 0.3)),
    "running_mean": (("mul", 0.1),),
    "running_var": (("abs",), ("add", 0.5)),
}


def _draw_sizes(random: Random, op: str, small: bool) -> tuple[int, tuple[int, ...]]:
    """Steps, and the shape of what is not time."""
    longest = 17 if small else random.choices((17, 100, 600, 5000), (12, 6, 3, 1) if op == "lif" else (12, 6, 0, 0))[0]
    steps = random.choice((1, 2, 15, 16, 17, *[random.randint(1, longest)] * 10))
    elements = 2 ** random.uniform(3, 9 if small else 20 if random.random() < 0.05 else 15)
    count = max(1, round(elements / steps))
    if op == "recurrent_lif":
        size = random.randint(1, 24 if small else 130)
        return steps, (*[max(1, min(count // size, 20))] * random.randint(0, 2), size)
    outer = [random.randint(1, 6) for _ in range(random.randint(0, 3))]
    if op == "bn_lif":
        outer = [random.randint(2, 4), random.randint(1, 9), *outer[:2]]
    return steps, (*outer, max(1, count // math.prod(outer)))


def _draw_layout(random: Random, shape: tuple[int, ...], time_dim: int) -> tuple[tuple[int, ...], tuple[tuple, ...]]:
    """A shape in memory, and the views that make a tensor of ``shape`` of it."""
    dims = range(len(shape))
    kind = random.choice(("plain", "plain", "permuted", "permuted", "sliced", "spread", "repeated"))
    if kind == "permuted":
        order = random.sample(dims, len(dims))
        return tuple(shape[i] for i in order), (("permute", [order.index(i) for i in dims]),)
    if kind == "sliced":
        dim = random.choice(dims)
        return tuple(n + (i == dim) for i, n in enumerate(shape)), (("narrow", dim, 1, shape[dim]),)
    if kind == "spread":
        return (*shape, 2), (("select", -1, 1),)
    if kind == "repeated":
        return tuple(1 if i == time_dim else n for i, n in enumerate(shape)), (("expand", *shape),)
    return shape, ()


def _draw_parameter(random: Random, neurons: tuple[int, ...]) -> tuple[int, ...]:
    """One number, one per channel, or one per neuron."""
    channel = random.randrange(len(neurons))
    return random.choice(((), neurons, (neurons[channel], *[1] * (len(neurons) - channel - 1))))


def _draw_linear(random: Random, seed: int) -> Call:
    """Few spikes, and as large a product as the kernels take."""
    inputs, outputs = random.randint(64, 300), random.randint(64, 300)
    rows = -(-(1 << 24) // (inputs * outputs)) + random.randint(0, 99)
    tensors = {"spikes": Drawn((rows, inputs), (("gt", random.choice((0.9, 1.5))), ("to", torch.float32)))}
    tensors["weight"] = Drawn((outputs, inputs))
    if random.random() < 0.5:
        tensors["bias"] = Drawn((outputs,))
    return Call("linear", seed, torch.float32, rows * inputs, 1, tensors, {})
