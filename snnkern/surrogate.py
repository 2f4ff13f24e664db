"""Surrogate derivatives of the spike ``s = H(h - threshold)``.

Each class holds, side by side: the formula in PyTorch (``grad``, the specification that every kernel is tested
against), its antiderivative (``primitive``, with which the reference becomes smooth and can be checked by
``gradcheck``), the three constants that kernels take (``constants``) and the Triton twin (``_triton``). The C++ twin is
the struct of the same name in ``csrc/surrogate.h``. Instances are
immutable, comparable, hashable and printable; ``surrogate(x)`` is a spike whose gradient is the surrogate, for use
outside the fused ops.

To add one: a class here and its name in ``__all__``, a struct there. One of your own, elsewhere, runs on the
``reference`` backend; a subclass of those here that changes none of the formulas runs wherever they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real

import torch

tl = None  # triton.language, which the twins below speak; bound by backend/triton when it is first used

__all__ = [
    "ATan",
    "Dspike",
    "Erf",
    "Exponential",
    "Rectangle",
    "Sigmoid",
    "SoftSign",
    "SuperSpike",
    "Surrogate",
    "Triangle",
    "from_spikingjelly",
]


class Surrogate:
    """Base class. Parameters are positive finite floats; ``x`` is ``h - threshold``, any shape."""

    text = None  # of what no kernel knows

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{type(self).__name__}: {field.name} must be a float, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{type(self).__name__}: {field.name} must be positive and finite, got {value!r}")
            object.__setattr__(self, field.name, float(value))
        # A plain string that `parse` reads back: torch.compile can carry it where it could not carry the object.
        twin = self._twin()
        if twin is not None:
            values = ", ".join(repr(getattr(self, field.name)) for field in fields(twin))
            object.__setattr__(self, "text", f"{twin.__name__}({values})")

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
                f"surrogate: no kernel knows the formulas of {self!r}; backend='reference' runs them, or take one of "
                f"snnkern.surrogate: {', '.join(_KNOWN)}"
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
        return _Spike.apply(x, x > 0 if fired is None else fired, self)


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, fired, surrogate):
        return fired.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.surrogate = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate.grad(x), None, None

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


_KNOWN = {cls.__name__: cls for cls in Surrogate.__subclasses__()}  # those above, before anyone adds to them


def parse(text: str) -> Surrogate:
    """The surrogate whose ``text`` this is."""
    name, _, values = text.removesuffix(")").partition("(")
    return _KNOWN[name](*map(float, values.split(", ")))


# SpikingJelly's classes, by name, in ours; `a` is their alpha.
_SPIKINGJELLY = {
    "Sigmoid": Sigmoid,
    "ATan": ATan,
    "PiecewiseQuadratic": lambda a: Triangle(1 / a),
    "PiecewiseExp": Exponential,
    "SoftSign": SoftSign,
    "SuperSpike": SuperSpike,
    "Erf": Erf,
    "Rect": lambda a: Rectangle(1 / a),
    "DSpike": Dspike,
}


def from_spikingjelly(surrogate: object) -> Surrogate:
    """The surrogate of ours that equals an instance of SpikingJelly's ``surrogate_function`` classes.

    ``Surrogate`` objects pass through. A subclass counts as its base only while it overrides none of the mathematics.

    Raises:
        TypeError: for anything else (``spiking=False`` included), listing what is accepted.
    """
    if isinstance(surrogate, Surrogate):
        return surrogate
    for cls in type(surrogate).__mro__:
        if cls.__module__.startswith("spikingjelly.") and cls.__name__ in _SPIKINGJELLY:
            if getattr(surrogate, "spiking", True) is not True:
                raise TypeError(f"surrogate_function must emit spikes, got {surrogate!r} with spiking=False")
            return _SPIKINGJELLY[cls.__name__](float(surrogate.alpha))
        overridden = {"forward", "spiking_function", "primitive_function", "backward"} & vars(cls).keys()
        if overridden:
            break
    raise TypeError(
        f"surrogate_function must be a snnkern.surrogate object ({', '.join(_KNOWN)}) or one of SpikingJelly's "
        f"{', '.join(_SPIKINGJELLY)}; got {surrogate!r}"
    )
