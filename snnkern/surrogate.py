"""Surrogate derivatives of the spike ``s = H(h - threshold)``.

Each class but the last two holds, side by side: the formula in PyTorch (``grad``, the specification that every kernel
is tested against), its antiderivative (``primitive``, with which the reference becomes smooth and can be checked by
``gradcheck``), the three constants that kernels take (``constants``) and the Triton twin (``_triton``). The C++ twin is
the struct of the same name in ``csrc/surrogate.h``. Instances are
immutable, comparable, hashable and printable; ``surrogate(x)`` is a spike whose gradient is the surrogate, for use
outside the fused ops.

``Table`` stands for any other function: kernels interpolate its samples. ``Integer`` makes integers of spikes.

A parameter may be a tensor of one number, on the CPU: its value counts when a forward begins, and may change between
two of them (a schedule) without anything being compiled anew.

To add one: a class here and its name in ``__all__``, a struct there. One of your own, elsewhere, runs on the
``reference`` backend, and as ``Table(it)`` on all; a subclass of those here that changes none of the formulas runs
wherever they do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Real
from weakref import WeakValueDictionary

import torch

TINY = torch.finfo(torch.float32).tiny
tl = None  # triton.language, which the twins below speak; bound by backend/triton when it is first used

__all__ = [
    "ATan",
    "Dspike",
    "Erf",
    "Exponential",
    "FastSigmoid",
    "Integer",
    "Rectangle",
    "Sigmoid",
    "SoftSign",
    "SuperSpike",
    "Surrogate",
    "Table",
    "Triangle",
    "fast_sigmoid",
    "from_spikingjelly",
]


class Surrogate:
    """Base class. Parameters are positive finite numbers; ``x`` is ``h - threshold``, any shape."""

    text = None  # of what no kernel knows
    live = False  # whether a parameter is a tensor
    spiking = True  # False: the output is ``primitive``, a smooth spike; on the reference alone

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                if value.numel() != 1 or not value.is_floating_point() or value.device.type != "cpu":
                    got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
                    raise TypeError(
                        f"{type(self).__name__}: {field.name} must be a float, or a floating tensor of one number on "
                        f"the CPU, got {got}"
                    )
                object.__setattr__(self, "live", True)
                continue
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{type(self).__name__}: {field.name} must be a float, got {value!r}")
            try:
                found = float(value)
            except OverflowError:
                found = math.inf
            if not TINY <= found <= 1 / TINY:
                wanted = "positive and finite in float32, with its inverse"
                raise ValueError(f"{type(self).__name__}: {field.name} must be {wanted}, got {value!r}")
            object.__setattr__(self, field.name, found)
        # A plain string that `parse` reads back: torch.compile can carry it where it could not carry the object.
        twin = self._twin()
        if twin is not None:
            values = "" if self.live else ", ".join(repr(getattr(self, name)) for name in twin.__match_args__)
            object.__setattr__(self, "text", f"{twin.__name__}({values})")

    def now(self) -> Surrogate:
        """This one, with the values that its tensors have now for parameters."""
        return type(self)(*(float(getattr(self, field.name)) for field in fields(self))) if self.live else self

    def values(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """What ``text`` does not say: the parameters, float64 on the CPU, if they may change; of a Table, ``held``."""
        if not self.live:
            return None
        given = [getattr(self, field.name) for field in fields(self)]
        return torch.stack([torch.as_tensor(value, dtype=torch.float64).detach().reshape(()) for value in given])

    @classmethod
    def _twin(cls) -> type[Surrogate] | None:
        """The class here whose formulas this one has; None if it has its own."""
        for base in cls.__mro__:
            if base in _KNOWN.values():
                return base
            if {"grad", "primitive", "constants", "__call__", "_triton"} & vars(base).keys():
                break
        return None

    def twin(self) -> type[Surrogate]:
        """The class here whose formulas kernels are to run for this one; TypeError if it has its own."""
        found = self._twin()
        if found is None:
            raise TypeError(
                f"surrogate: no kernel knows the formulas of {self!r}; surrogate.Table of it samples them for all, "
                f"backend='reference' runs them; or take one of snnkern.surrogate: {', '.join(_KNOWN)}"
            )
        return found

    def grad(self, x: torch.Tensor) -> torch.Tensor:
        """dH/dx at ``x``."""
        raise NotImplementedError

    def primitive(self, x: torch.Tensor) -> torch.Tensor:
        """The antiderivative of ``grad``, 1/2 at 0: a smooth spike with exactly this gradient."""
        raise NotImplementedError

    def constants(self) -> tuple[float, float, float]:
        """The numbers a, b, c of the kernels' formula."""
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, fired: torch.Tensor | None = None) -> torch.Tensor:
        """1 where ``fired`` (default: where x > 0), else 0, with ``grad`` for a derivative."""
        spike = _Spike if _compiling() else _SpikeWithTangents
        return spike.apply(x, x > 0 if fired is None else fired, self)


_compiling = torch.compiler.is_dynamo_compiling  # which knows no function with a forward-mode derivative


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, fired, surrogate):
        return fired.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate.grad(x), None, None


class _SpikeWithTangents(_Spike):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Spike.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent, *_):
        (x,) = ctx.saved_tensors
        return tangent * ctx.surrogate.grad(x)


@dataclass(frozen=True)
class Triangle(Surrogate):
    """``peak * max(0, 1 - |x|/gamma)``; ``peak`` is 1/gamma unless given, which makes the area 1.

    Source: TET, Deng et al., ICLR 2022, eq. 5. ``gamma=threshold, peak=g`` gives the triangle of Bellec et al. 2018.
    SpikingJelly's PiecewiseQuadratic(alpha) is ``Triangle(1/alpha)``.
    """

    gamma: float = 1.0
    peak: float | None = None

    def __post_init__(self) -> None:
        if self.peak is None and isinstance(self.gamma, torch.Tensor):
            raise TypeError("Triangle: peak must be given where gamma is a tensor: it would not follow it")
        if self.peak is None and isinstance(self.gamma, Real) and self.gamma > 0:
            object.__setattr__(self, "peak", 1 / self.gamma)
        super().__post_init__()

    def grad(self, x):
        return self.peak * (1 - x.abs() * (1 / self.gamma)).clamp(min=0)

    def primitive(self, x):
        y = (x / self.gamma).clamp(-1, 1)
        return 0.5 + self.peak * self.gamma * (y - 0.5 * y * y.abs())

    def constants(self):
        return self.peak, 1 / self.gamma, 0.0

    @staticmethod
    def _triton(x, a, b, c):
        return a * tl.maximum(0.0, tl.fma(tl.abs(x), -b, 1.0))


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """``1/width`` where ``|x| < width/2``. Source: STBP, Wu et al. 2018; Dspike, Li et al., NeurIPS 2021, eq. 7."""

    width: float = 1.0

    def grad(self, x):
        return (x.abs() < self.width / 2).to(x.dtype) / self.width

    def primitive(self, x):
        return 0.5 + (x / self.width).clamp(-0.5, 0.5)

    def constants(self):
        return 1 / self.width, self.width / 2, 0.0

    @staticmethod
    def _triton(x, a, b, c):
        return tl.where(tl.abs(x) < b, a, 0.0)


@dataclass(frozen=True)
class Dspike(Surrogate):
    """``b sech^2(b x/width) / (2 width tanh(b/2))`` where ``|x| <= width/2``, b = ``temperature``; area 1.

    Larger temperatures are sharper; towards 0 it becomes the rectangle. Source: Dspike, Li et al., NeurIPS 2021.
    """

    temperature: float = 1.0
    width: float = 1.0

    @classmethod
    def in_region(cls, region: float, temp: float) -> Dspike:
        """``DSPIKE(region)(x, temp)`` of SEENN's published code, whose neurons fire at the threshold."""
        return cls(2 * temp * region, 2 * region)

    def _peak(self) -> float:
        return self.temperature / (2 * self.width * math.tanh(self.temperature / 2))

    def grad(self, x):
        inside = x.abs() <= self.width / 2
        return self._peak() * torch.where(inside, 1 - torch.tanh(self.temperature / self.width * x) ** 2, 0)

    def primitive(self, x):
        y = (x / self.width).clamp(-0.5, 0.5)
        return 0.5 + torch.tanh(self.temperature * y) / (2 * math.tanh(self.temperature / 2))

    def constants(self):
        return 4 * self._peak(), 2 * self.temperature / self.width, self.width / 2

    @staticmethod
    def _triton(x, a, b, c):
        e = tl.exp2(-1.4426950408889634 * b * tl.abs(x))
        r = tl.rsqrt((1.0 + e) * (1.0 + e))
        return tl.where(tl.abs(x) <= c, a * (e * r * r), 0.0)


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """``alpha sigmoid(alpha x) (1 - sigmoid(alpha x))``. SpikingJelly's default, with the same alpha."""

    alpha: float = 4.0

    def grad(self, x):
        s = torch.sigmoid(self.alpha * x)
        return self.alpha * s * torch.sigmoid(-self.alpha * x)

    def primitive(self, x):
        return torch.sigmoid(self.alpha * x)

    def constants(self):
        return self.alpha, self.alpha, 0.0

    @staticmethod
    def _triton(x, a, b, c):
        e = tl.exp2(-1.4426950408889634 * b * tl.abs(x))
        r = tl.rsqrt((1.0 + e) * (1.0 + e))
        return a * (e * r * r)


@dataclass(frozen=True)
class ATan(Surrogate):
    """``(alpha/2) / (1 + (pi alpha x / 2)^2)``. Source: Fang et al., ICCV 2021; SpikingJelly's and snnTorch's ATan."""

    alpha: float = 2.0

    def grad(self, x):
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * x) ** 2)

    def primitive(self, x):
        return 0.5 + torch.atan(math.pi / 2 * self.alpha * x) / math.pi

    def constants(self):
        return self.alpha / 2, math.pi / 2 * self.alpha, 0.0

    @staticmethod
    def _triton(x, a, b, c):
        y = b * x
        r = tl.rsqrt(tl.fma(y, y, 1.0))
        return a * (r * r)


@dataclass(frozen=True)
class Exponential(Surrogate):
    """``(alpha/2) exp(-alpha |x|)``. Source: Shrestha and Orchard 2018 (SLAYER); SpikingJelly's PiecewiseExp."""

    alpha: float = 1.0

    def grad(self, x):
        return self.alpha / 2 * torch.exp(-self.alpha * x.abs())

    def primitive(self, x):
        return 0.5 + 0.5 * torch.sign(x) * -torch.expm1(-self.alpha * x.abs())

    def constants(self):
        return self.alpha / 2, self.alpha, 0.0

    @staticmethod
    def _triton(x, a, b, c):
        return a * tl.exp2(-1.4426950408889634 * b * tl.abs(x))


@dataclass(frozen=True)
class SoftSign(Surrogate):
    """``(alpha/2) / (1 + alpha |x|)^2``. SpikingJelly's SoftSign."""

    alpha: float = 2.0

    def grad(self, x):
        return self.alpha / 2 / (1 + self.alpha * x.abs()) ** 2

    def primitive(self, x):
        return 0.5 + 0.5 * self.alpha * x / (1 + self.alpha * x.abs())

    def constants(self):
        return self.alpha / 2, self.alpha, 0.0

    @staticmethod
    def _triton(x, a, b, c):
        y = tl.fma(b, tl.abs(x), 1.0)
        r = tl.rsqrt(y * y)
        return a * (r * r)


@dataclass(frozen=True)
class SuperSpike(Surrogate):
    """``alpha / (1 + |x|)^2``. Source: Zenke and Ganguli 2018; SpikingJelly's SuperSpike."""

    alpha: float = 1.0

    def grad(self, x):
        return self.alpha / (1 + x.abs()) ** 2

    def primitive(self, x):
        return 0.5 + self.alpha * x / (1 + x.abs())

    def constants(self):
        return self.alpha, 1.0, 0.0

    _triton = SoftSign._triton


@dataclass(frozen=True)
class Erf(Surrogate):
    """``(alpha/sqrt(pi)) exp(-(alpha x)^2)``, a Gaussian. SpikingJelly's Erf."""

    alpha: float = 2.0

    def grad(self, x):
        return self.alpha / math.sqrt(math.pi) * torch.exp(-((self.alpha * x) ** 2))

    def primitive(self, x):
        return 0.5 + 0.5 * torch.erf(self.alpha * x)

    def constants(self):
        return self.alpha / math.sqrt(math.pi), self.alpha, 0.0

    @staticmethod
    def _triton(x, a, b, c):
        y = 1.2011224087864498 * b * x
        return a * tl.exp2(-y * y)


@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """``1 / (1 + slope |x|)^2``: snnTorch's ``fast_sigmoid``, whose peak is 1. Source: Zenke and Ganguli 2018."""

    slope: float = 25.0

    def grad(self, x):
        return 1 / (1 + self.slope * x.abs()) ** 2

    def primitive(self, x):
        return 0.5 + x / (1 + self.slope * x.abs())

    def constants(self):
        return 1.0, self.slope, 0.0

    _triton = SoftSign._triton


fast_sigmoid = FastSigmoid


@dataclass(frozen=True)
class Integer(Surrogate):
    """Integer spikes: ``s = round(clamp(h / threshold, 0, levels))``, ties to even; the reset takes s thresholds.

    The derivative of s is ``1/threshold`` where ``0 <= h <= levels threshold``. At inference, a weight applied to s is
    one applied to ``levels`` binary steps of which s fire. ``lif`` wants a positive threshold with it, ``reset=None``,
    and neither ``ternary`` nor ``fire_at_threshold``, which it has no use for.

    Source: Luo et al., "Integer-Valued Training and Spike-Driven Inference Spiking Neural Network for High-performance
    and Energy-efficient Object Detection", ECCV 2024 (I-LIF, levels = 4).
    """

    levels: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, (int, float)) or self.levels % 1:
            raise TypeError(f"Integer: levels must be an int, got {self.levels!r}")
        if not 1 <= self.levels <= 256:  # which 16-bit floats can count
            raise ValueError(f"Integer: levels must be in 1 to 256, got {self.levels!r}")
        object.__setattr__(self, "levels", int(self.levels))
        object.__setattr__(self, "text", f"Integer({self.levels})")

    def grad(self, x):
        """Of ``x = h / threshold``."""
        return ((x >= 0) & (x <= self.levels)).to(x.dtype)

    def primitive(self, x):
        return x.clamp(0, self.levels)

    def constants(self):
        return float(self.levels), 0.0, 0.0

    def __call__(self, x, fired=None):
        """Spikes for ``x = h / threshold``."""
        return _Spike.apply(x, torch.where(x > 0, x.clamp(max=self.levels), 0.0).round(), self)

    _triton = None  # its derivative is no function of h - threshold: the kernels have it


class Table(Surrogate):
    """Any derivative, sampled: a straight line in each of ``cells`` cells, the outermost values beyond, 0 at
    infinity.

    Lines begin and end with what the function is just inside of their cell, so that it may jump where cells meet.

    Args:
        function: of a tensor x = h - threshold, element by element. Either a spike, 1 where x > 0 (or >= 0) and else
            0, with the surrogate as what autograd takes for its derivative: an ``autograd.Function``'s ``apply``,
            another library's surrogate object; or the derivative itself: a lambda, a ``Surrogate`` of one's own.
        half_width: cells share out [-half_width, half_width], and one more on each side has what lies beyond. None: the
            smallest power of two (1 to 64) beyond which the derivative changes by no more than 1/200 of its peak.
        cells: their number; even, so that 0 is where two of them meet.

    ``error`` is the largest difference from ``function`` within ``half_width``, ``tail`` that from there to twice as
    far, as shares of its peak.
    """

    def __init__(self, function: Callable, half_width: float | None = None, cells: int = 2048) -> None:
        if not callable(function):
            raise TypeError(f"Table: function must be callable, got {function!r}")
        if half_width is not None and not (isinstance(half_width, Real) and 1e-30 < half_width < 1e30):
            raise ValueError(f"Table: half_width must be positive, from 1e-30 to 1e30, got {half_width!r}")
        if not isinstance(cells, int) or not 2 <= cells <= 1 << 16 or cells % 2:
            raise ValueError(f"Table: cells must be an even int in 2 to {1 << 16}, got {cells!r}")
        derivative = _derivative_of(function)
        half_width = _half_width_of(derivative) if half_width is None else float(half_width)
        size, numbers = 2 * half_width / cells, {"dtype": torch.float64, "device": "cpu"}
        starts = torch.arange(-cells // 2 - 1, cells // 2 + 1, **numbers) * size
        samples = torch.stack([derivative(starts + 1e-6 * size), derivative(starts + (1 - 1e-6) * size)], 1)
        if not samples.isfinite().all():
            raise ValueError(f"Table: function must have a finite derivative, got {function!r}")
        self._fill(samples, float(half_width + size), getattr(function, "__name__", None) or repr(function))
        far, within = torch.arange(-cells, cells, **numbers), torch.tensor([[0.1], [0.5], [0.9]], **numbers)
        points, peak = (far + within).view(-1) * size, samples.abs().max().item() or 1.0
        missed = (self.grad(points) - derivative(points)).abs() / peak
        self.error = missed[points.abs() < half_width].max().item()
        self.tail = missed[points.abs() > half_width].max().item()

    @classmethod
    def of(cls, held: torch.Tensor, half_width: float) -> Table:
        """For kernels alone: of what another one ``held``."""
        table = cls.__new__(cls)
        table._describe(len(held), half_width)
        table._held = {(held.device, held.dtype): held}
        return table

    def _fill(self, samples, half_width, name):
        self.samples, self.name, self._held = samples.detach(), name, {}
        self._describe(len(samples), half_width)
        for dtype in (torch.float32, torch.float64):  # before anyone compiles: a new one would be another graph
            self.held(samples.device, dtype)

    def _describe(self, cells, half_width):
        self.cells, self.half_width, self.text = cells, half_width, f"Table({half_width!r})"

    def held(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[cells, 2] where and as kernels want it: per cell, its value at the start and what it gains until its end."""
        key = device, dtype
        if key not in self._held:
            start, end = self.samples.unbind(1)
            pairs = torch.stack([start, end - start], 1).to(device, dtype)
            if _compiling() or type(pairs) is not torch.Tensor:  # what stands for it while tracing is not for keeps
                return pairs
            self._held[key] = pairs
        return self._held[key]

    def values(self, device, dtype):
        return self.held(device, dtype)

    def twin(self):
        return Table

    def _at(self, x):
        """Where x is: cells from the first on, within them, and the cell."""
        at = (x + self.half_width) * (self.cells / (2 * self.half_width))
        within = torch.where(at > 0, at, 0.0).clamp(max=self.cells)
        return at, within, within.detach().long().clamp(max=self.cells - 1)

    def grad(self, x):
        _, within, cell = self._at(x)
        value, gain = self.held(x.device, x.dtype)[cell].unbind(-1)
        return torch.where(x.isfinite(), value + (within - cell) * gain, 0.0)

    def primitive(self, x):
        at, within, cell = self._at(x)
        pairs = self.held(x.device, x.dtype)
        areas = (pairs[:, 0] + pairs[:, 1] / 2).cumsum(0)
        value, gain = pairs[cell].unbind(-1)
        part = within - cell
        area = torch.where(cell > 0, areas[cell - 1], 0.0) + part * (value + part * gain / 2)
        ends = torch.where(at < within, self.samples[0, 0], self.samples[-1, 1]).to(x.dtype)
        area = area - areas[self.cells // 2 - 1] + (at - within) * ends
        return 0.5 + area * (2 * self.half_width / self.cells)

    def constants(self):
        return self.half_width, self.cells / (2 * self.half_width), float(self.cells)

    def __repr__(self) -> str:
        told = f", error={self.error:.1g}, tail={self.tail:.1g}" if "error" in vars(self) else ""
        return f"Table({self.name}, half_width={self.half_width!r}, cells={self.cells}{told})"

    def __reduce__(self):
        told = {key: vars(self)[key] for key in ("name", "error", "tail") if key in vars(self)}
        return _table, (self.samples, self.half_width, told)

    _triton = None  # its kernels take the samples


def _table(samples, half_width, told):
    table = Table.__new__(Table)
    table._fill(samples, half_width, "")
    vars(table).update(told)
    return table


def _derivative_of(function: Callable) -> Callable:
    """The derivative that a Table of ``function`` samples: float64 in and out, without a graph."""
    if isinstance(function, Surrogate):
        return lambda x: function.grad(x).detach()

    def of_spike(x):
        x, y = _called(function, x)
        if not y.requires_grad:
            raise TypeError(f"Table: function is a step without a derivative: {function!r}")
        return torch.autograd.grad(y.sum(), x)[0].to(torch.float64)

    return of_spike if _is_step(function) else lambda x: _called(function, x)[1].detach().to(torch.float64)


def _is_step(function: Callable) -> bool:
    x = torch.tensor([-8.0, -1.0, -0.3, -1e-3, 1e-3, 0.3, 1.0, 8.0], dtype=torch.float64, device="cpu")
    return torch.allclose(_called(function, x)[1].detach().to(torch.float64), (x > 0).double(), atol=1e-6)


def _called(function: Callable, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x with a graph, and the function of it."""
    try:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            y = function(x)
    except Exception as error:
        raise TypeError(f"Table: function cannot be sampled, {function!r}: {error}") from error
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"Table: function must return a tensor of the shape of x, {tuple(x.shape)}, got {got}")
    return x, y


def _half_width_of(derivative: Callable) -> float:
    x = torch.linspace(-128, 128, 1 << 15, dtype=torch.float64, device="cpu")
    y = derivative(x)
    bound = y.abs().max().item() / 200
    for half_width in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        below, above = y[x <= -half_width], y[x >= half_width]
        if all((part - part[i]).abs().max() <= bound for part, i in ((below, -1), (above, 0))):
            return half_width
    return 64.0


class _Smooth(Surrogate):
    """Another library's smooth spike, ``spiking=False`` there."""

    spiking = False

    def __init__(self, function: Callable) -> None:
        self.primitive = function

    def __repr__(self) -> str:
        return f"{self.primitive!r}"


_KNOWN = {cls.__name__: cls for cls in Surrogate.__subclasses__() if not cls.__name__.startswith("_")}  # before others


def parse(text: str, values: torch.Tensor | None = None) -> Surrogate:
    """The surrogate whose ``text`` and ``values()`` these are."""
    name, _, told = text.removesuffix(")").partition("(")
    if name == "Table":
        return Table.of(values, float(told))
    if values is None:
        return _KNOWN[name](*map(float, told.split(", ")))
    return _KNOWN[name](*values.tolist())


_SAMPLED: WeakValueDictionary[int, Callable] = WeakValueDictionary()  # what ``_table_of`` got, by id
_TABLES = type("Tables", (), {})()  # of compiled code, which guards one attribute alone

# SpikingJelly's classes, by name, in ours; `a` is their alpha.
_SPIKINGJELLY = {
    "Sigmoid": Sigmoid,
    "ATan": ATan,
    "PiecewiseQuadratic": lambda a: Triangle(1 / a, a),
    "PiecewiseExp": Exponential,
    "SoftSign": SoftSign,
    "SuperSpike": SuperSpike,
    "Erf": Erf,
    "Rect": lambda a: Rectangle(1 / a),
    "DSpike": Dspike,
}


def from_spikingjelly(surrogate: object) -> Surrogate:
    """The surrogate of ours that equals an instance of SpikingJelly's ``surrogate_function`` classes, or any callable.

    ``Surrogate`` objects pass through. A subclass counts as its base only while it overrides none of the mathematics.
    What kernels have no formula for becomes a ``Table``, if it is a spike whose derivative autograd knows; with
    ``spiking=False``, a smooth spike on the reference.

    Raises:
        TypeError: for anything else, and what ``Table`` refuses.
    """
    if isinstance(surrogate, Surrogate):
        return surrogate
    if callable(surrogate) and getattr(surrogate, "spiking", True) is not True:
        return _Smooth(surrogate)
    for cls in type(surrogate).__mro__:
        if cls.__module__.startswith("spikingjelly."):
            if cls.__name__ in _SPIKINGJELLY:
                alpha = surrogate.alpha  # compiled, a tensor: a number that changes would be a symbol, without a text
                alpha = torch.as_tensor(alpha, dtype=torch.float64) if _compiling() else float(alpha)
                return _SPIKINGJELLY[cls.__name__](alpha)
            if cls.__name__ == "MultiLevelSpikeCount":
                return _integer(surrogate)
        if {"forward", "spiking_function", "primitive_function", "backward"} & vars(cls).keys():
            break
    if not callable(surrogate):
        raise TypeError(
            f"surrogate_function must be a snnkern.surrogate object ({', '.join(_KNOWN)}), one of SpikingJelly's "
            f"({', '.join(_SPIKINGJELLY)} and others) or a function for surrogate.Table, got {surrogate!r}"
        )
    numbers = tuple((k, v) for k, v in getattr(surrogate, "__dict__", {}).items() if isinstance(v, (Real, str)))
    if _compiling():
        from torch.fx.experimental.symbolic_shapes import guard_scalar  # of a number that changes, a symbol here

        numbers = tuple((k, guard_scalar(v) if isinstance(v, float) else v) for k, v in numbers)
        return getattr(_TABLES, _place_of(id(surrogate), numbers))
    return _table_of(surrogate, numbers)


@torch.compiler.assume_constant_result
def _place_of(key: int, numbers: tuple) -> str:
    """The name in ``_TABLES`` of the table of a function that was sampled before somebody compiled."""
    if key not in _SAMPLED:
        raise TypeError("a surrogate_function was never used before it was compiled: give surrogate.Table of it")
    table = _table_of(_SAMPLED[key], numbers)
    setattr(_TABLES, name := f"table{id(table)}", table)
    return name


@lru_cache(maxsize=64)
def _table_of(function: Callable, numbers: tuple) -> Table:
    """Sampled once, while its ``numbers`` are these."""
    if not _is_step(function):
        raise TypeError(
            f"surrogate_function must be a spike, which steps from 0 to 1 at 0, got {function!r}: if it is the "
            "derivative of one, give surrogate.Table of it"
        )
    with suppress(TypeError):  # of what has no weak references
        _SAMPLED[id(function)] = function
    table = Table(function)
    if table.error > 1e-3:
        table = Table(function, cells=1 << 14)
    if table.error > 0.05:
        warnings.warn(f"a surrogate was sampled with a large error: {table}", RuntimeWarning, stacklevel=4)
    return table


def _integer(counts) -> Integer:
    """SpikingJelly's MultiLevelSpikeCount."""
    levels = counts.max_spike_count
    if (counts.grad_min, counts.grad_max) != (0, levels):
        raise TypeError(f"surrogate_function must have its gradient within 0 and {levels}, got {counts!r}")
    return Integer(levels)
