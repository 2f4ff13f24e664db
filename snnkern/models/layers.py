"""What the models are made of, and how they read their arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..nn import BNLIF, LIF, TdBatchNorm
from ..spec.arguments import positive
from ..surrogate import Triangle


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
        self.neuron = neurons()
        if neurons.fused and isinstance(self.neuron, LIF):
            self.norm, self.neuron = BNLIF.from_modules(self.norm, self.neuron), nn.Identity()
        self.pool = nn.AvgPool2d(2) if pooled else nn.Identity()

    def forward(self, x: torch.Tensor, steps: int, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(self.norm, (BNLIF, LIF)):  # LIF: what is left of BNLIF when the norm is folded away
            spikes = self.norm(self.convolve(x, steps), shortcut)
        else:
            y = super().forward(x, steps)
            spikes = self.neuron(y if shortcut is None else y + shortcut)
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
        if not isinstance(fused, bool):
            raise TypeError(f"fused must be True or False, got {fused!r}")
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


def per_frame(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer of images on every frame of [T, N, C, H, W]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def over_steps(y: torch.Tensor, steps: int) -> torch.Tensor:
    """A view of [1, N, ...], one frame for all steps, as [steps, N, ...]; frames [steps, N, ...] as they are."""
    return y if y.shape[0] == steps else y.expand(steps, *y.shape[1:])


def as_frames(
    x: torch.Tensor, steps: int | None, default: int, channels: int, size: int | None = None
) -> tuple[torch.Tensor, int]:
    """Static images [N, C, H, W] as one frame [1, N, C, H, W], frames [T, N, C, H, W] as they are; and T.

    ``size`` is that of the images, which are then square; None for any.
    """
    if x.dim() not in (4, 5) or x.shape[-3] != channels or (size is not None and x.shape[-2:] != (size, size)):
        wanted = f"C = {channels}" if size is None else f"(C, H, W) = {(channels, size, size)}"
        raise ValueError(f"x must be [N, C, H, W] or [T, N, C, H, W] with {wanted}, got shape {tuple(x.shape)}")
    if x.dim() == 4:
        return x.unsqueeze(0), default if steps is None else positive("steps", steps)
    if steps not in (None, x.shape[0]):
        raise ValueError(f"steps must be None or the number of frames, {x.shape[0]}, got {steps!r}")
    return x, x.shape[0]
