"""What the models are made of, and how they read their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ..nn import BNLIF, LIF, Linear, TdBatchNorm
from ..ops.ttm import ttm
from ..spec.arguments import flag, positive
from ..surrogate import Triangle


class Staged(nn.Module):
    """A network of n stages in a row, each of which may have its own number of time steps.

    ``forward(x, steps=None, t=None)``: static images [N, C, H, W], shown unchanged at every step of the first stage, or
    frames [T, N, ...], one per step, to outputs [T, N, classes]. ``t = (t_1, ..., t_n)`` is a temporal configuration:

    - the first stage shows a static image t_1 times, or takes the first t_1 frames; the outputs have t_n steps;
    - between stages of different time steps stands the temporal transformation ``snnkern.ttm``: spikes are summed over
      groups of steps on the way to fewer, repeated on the way to more;
    - a uniform t is the same as ``steps=t_1``, bit for bit.

    Neurons write sums over steps themselves (``steps_out``), and what is repeated is convolved once, then repeated: a
    stage hands on min(t_i, t_{i+1}) frames.

    Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, section 4.3.
    """

    steps: int | None = None  # default number of time steps for static images

    @property
    def n_stages(self) -> int:
        return len(self.stage_modules())

    def stage_modules(self) -> list[tuple[nn.Module, ...]]:
        """The modules of every stage; what follows the last and fires belongs to it."""
        raise NotImplementedError

    def timing(self, frames: int | None, steps: int | None, t: Sequence[int] | None) -> tuple[int, ...]:
        """The time steps of every stage, for so many frames, None for a static image."""
        stages = self.n_stages
        if t is None:
            if frames is None:
                return (self.steps if steps is None else positive("steps", steps),) * stages
            if steps not in (None, frames):
                raise ValueError(f"steps must be None or the number of frames, {frames}, got {steps!r}")
            return (frames,) * stages
        if steps is not None:
            raise ValueError(f"steps must be left out where t is given, got {steps!r} beside t = {t!r}")
        if not isinstance(t, Sequence) or len(t) != stages:
            raise ValueError(f"t must be a number of time steps for each of the {stages} stages, got {t!r}")
        for each in t:
            positive("t", each)
        if frames is not None and t[0] > frames:
            raise ValueError(f"t must begin with at most the number of frames, {frames}, got {t[0]}")
        return tuple(t)

    @staticmethod
    def handed_on(t: Sequence[int]) -> list[int]:
        """The frames that every stage hands on."""
        return [*map(min, t, t[1:]), t[-1]]


class ConvNorm(nn.Module):
    """Convolution and batch norm, whose statistics go over time, batch and space.

    ``scale`` is tdBN's factor, see ``nn.TdBatchNorm``.

    Shapes: [T, N, C, H, W] to the same with the outputs' C, H and W; padding keeps H and W but for the stride. A static
    image comes as [1, N, C, H, W]: it is convolved once for all ``steps``. Channels last stays channels last, and time
    and batch are folded by views.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
        self.norm = TdBatchNorm(outputs, scale)

    def convolve(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        # Repeated before batch norm, not after: the unbiased running variance counts every step.
        return over_steps(per_frame(self.conv, x), steps)

    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        y = self.convolve(x, steps)
        if y.stride(0) == 0 and steps > 1:
            y = y.clone()  # folding time would copy too, but out of channels last
        return self.norm(y)


class Stage(ConvNorm):
    """Convolution, batch norm, neuron and, where ``pooled``, a 2x2 average of the spikes.

    Batch norm and neuron run in one pass if ``neurons`` says so. ``shortcut`` [T, N, C, H, W] is added to what the
    neurons receive. Averages of spikes are multiples of 1/4: what the next convolution takes is no longer binary.
    ``steps_out``: hand on that many frames, fewer than ``steps``, as sums over steps.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        neurons: Neurons,
        kernel: int = 3,
        stride: int = 1,
        pooled: bool = False,
        bias: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias, scale)
        self.norm, self.neuron = neurons.behind(self.norm)
        self.pool = nn.AvgPool2d(2) if pooled else nn.Identity()

    def forward(
        self, x: torch.Tensor, steps: int, shortcut: torch.Tensor | None = None, steps_out: int | None = None
    ) -> torch.Tensor:
        if isinstance(self.norm, (BNLIF, LIF)):  # LIF: what is left of BNLIF when the norm is folded away
            spikes = fire(self.norm, self.convolve(x, steps), steps_out, shortcut)
        else:
            y = super().forward(x, steps)
            spikes = fire(self.neuron, y if shortcut is None else y + shortcut, steps_out)
        return per_frame(self.pool, spikes)


class Neurons:
    """Makes a model's LIF layers: with ``neuron``, or the default ones on this backend.

    Args:
        neuron: makes one module per layer, or None for ``LIF`` with ``settings``. A node with SpikingJelly's
            ``step_mode`` is switched to "m": what a model gives it are all steps at once.
        backend: of the default neurons.
        fused: whether batch norm in front of a ``LIF`` runs in one pass with it.
        settings: keywords of the default ``LIF``; those of TET where not given.

    Raises: TypeError, ValueError, which name the argument; TypeError too where ``neuron`` makes something else.
    """

    def __init__(
        self, neuron: Callable[[], nn.Module] | None, backend: str | None, fused: bool = True, **settings
    ) -> None:
        flag("fused", fused)
        if neuron is None:
            settings = {"decay": 0.5, "threshold": 1.0, "surrogate": Triangle(1.0), **settings}
            neuron = partial(LIF, **settings, backend=backend)
        elif isinstance(neuron, nn.Module) or not callable(neuron):
            raise TypeError(f"neuron must be a function that makes a module, got {neuron!r}")
        elif backend is not None:
            raise ValueError(
                f"backend is that of the default neuron, give it to your own: got {backend!r} beside neuron"
            )
        self.neuron, self.fused = neuron, fused

    def __call__(self) -> nn.Module:
        made = self.neuron()
        if not isinstance(made, nn.Module):
            raise TypeError(f"neuron must make a module, got {made!r} from it")
        if getattr(made, "step_mode", None) == "s":  # the default of SpikingJelly's nodes and of LIFNode
            made.step_mode = "m"
        return made

    def behind(self, norm: TdBatchNorm) -> tuple[nn.Module, nn.Module]:
        """The norm and the neurons behind it, or both in one and nothing behind."""
        made = self()
        if self.fused and isinstance(made, LIF) and not made.alone:
            return BNLIF.from_modules(norm, made), nn.Identity()
        return norm, made


def per_frame(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer of images on every frame of [T, N, C, H, W]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def over_steps(y: torch.Tensor, steps: int) -> torch.Tensor:
    """Frames [T, N, ...] repeated to ``steps`` or left as they are; one frame for all steps is a view."""
    if y.shape[0] == 1:
        return y.expand(steps, *y.shape[1:])
    return ttm(y, steps)


def fire(
    neuron: nn.Module, x: torch.Tensor, steps_out: int | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Spikes of x [T, N, ...]; with ``steps_out`` sums over groups of steps, where the neurons can in one pass."""
    rest = () if residual is None else (residual,)
    if steps_out in (None, x.shape[0]):
        return neuron(x, *rest)
    if isinstance(neuron, (BNLIF, LIF)):
        return neuron(x, *rest, steps_out=steps_out)
    return ttm(neuron(x, *rest), steps_out)


def fire_behind(
    linear: Linear, neuron: nn.Module, x: torch.Tensor, steps: int, steps_out: int | None = None
) -> torch.Tensor:
    """``fire`` of a linear layer's output over ``steps``; neurons with the forward of ``LIF`` add its bias."""
    if type(neuron).forward is LIF.forward and "bias" not in neuron.tensors:
        x = over_steps(linear(x, add_bias=False), steps)
        return neuron(x, steps_out=None if steps_out == steps else steps_out, bias=linear.bias)
    return fire(neuron, over_steps(linear(x), steps), steps_out)


def as_frames(x: torch.Tensor, channels: int, size: int | None = None) -> tuple[torch.Tensor, int | None]:
    """Static images [N, C, H, W] as one frame [1, N, C, H, W], and None; frames [T, N, C, H, W] as they are, and T.

    ``size`` is that of the images, which are then square; None for any.
    """
    if x.dim() not in (4, 5) or x.shape[-3] != channels or (size is not None and x.shape[-2:] != (size, size)):
        wanted = f"C = {channels}" if size is None else f"(C, H, W) = {(channels, size, size)}"
        raise ValueError(f"x must be [N, C, H, W] or [T, N, C, H, W] with {wanted}, got shape {tuple(x.shape)}")
    return (x.unsqueeze(0), None) if x.dim() == 4 else (x, x.shape[0])
