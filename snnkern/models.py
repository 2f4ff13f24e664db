"""Networks of the published systems, made of ``snnkern.nn`` and PyTorch's own layers."""

from __future__ import annotations

import torch
from torch import nn

from .nn import LIF
from .surrogate import Triangle

__all__ = ["CNN6"]


class CNN6(nn.Module):
    """Six stages of conv 3x3, batch norm and LIF, then a linear layer: the network of the digits recipe.

    ::

        [16C3, 16C3, AP2, 32C3, 32C3, AP2, 32C3, 64C3, FC]     decay 0.5, threshold 1, surrogate Triangle(1)

    Batch norm takes its statistics over time, batch and space.

    Args:
        steps: default number of time steps T for static images.
        in_channels, size: of the images, which are square; ``size`` is a multiple of 4.
        classes: number of outputs.
        backend: of the LIF op; see ``snnkern.lif``.

    Shapes: static images [N, C, H, W], shown unchanged at ``steps`` steps, or frames [T, N, C, H, W], one per step, to
    [T, N, classes]: what the last layer receives at every step. It neither leaks nor fires; the argmax of the mean over
    T is the prediction.

    Source: Deng et al., ICLR 2022, section 3 (neuron, batch norm, output layer); sized for 8x8 images.
    """

    CHANNELS = (16, 16, 32, 32, 32, 64)
    POOLED = (1, 3)  # stages followed by an average pool

    def __init__(
        self, steps: int = 4, in_channels: int = 1, size: int = 8, classes: int = 10, backend: str | None = None
    ) -> None:
        super().__init__()
        if size < 4 or size % 4:
            raise ValueError(f"size must be a positive multiple of 4, got {size!r}")
        self.steps = _check_steps(steps)
        self.in_channels, self.size = in_channels, size
        inputs = (in_channels, *self.CHANNELS)
        self.stages = nn.ModuleList(
            _Stage(inputs[i], inputs[i + 1], i in self.POOLED, backend) for i in range(len(self.CHANNELS))
        )
        self.head = nn.Linear(self.CHANNELS[-1] * (size // 4) ** 2, classes)

    def forward(self, x: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        if x.dim() not in (4, 5) or x.shape[-3:] != (self.in_channels, self.size, self.size):
            raise ValueError(
                f"x must be [N, C, H, W] or [T, N, C, H, W] with (C, H, W) = "
                f"{(self.in_channels, self.size, self.size)}, got shape {tuple(x.shape)}"
            )
        if x.dim() == 4:
            steps = self.steps if steps is None else _check_steps(steps)
            x = x.unsqueeze(0)
        elif steps not in (None, x.shape[0]):
            raise ValueError(f"steps must be None or the number of frames, {x.shape[0]}, got {steps!r}")
        else:
            steps = x.shape[0]
        for stage in self.stages:
            x = stage(x, steps)
        return self.head(x.flatten(2))


class _Stage(nn.Module):
    """[T, N, C, H, W] to spikes; T may be 1 for a static image, which is then convolved once for all steps."""

    def __init__(self, inputs: int, outputs: int, pooled: bool, backend: str | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.lif = LIF(decay=0.5, threshold=1.0, surrogate=Triangle(1.0), backend=backend)
        self.pool = nn.AvgPool2d(2) if pooled else nn.Identity()

    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        batch = x.shape[1]
        y = self.conv(x.flatten(0, 1)).unflatten(0, (-1, batch))
        # Repeated before batch norm, not after: the unbiased running variance counts every step.
        y = self.norm(y.expand(steps, *y.shape[1:]).flatten(0, 1))
        spikes = self.lif(y.unflatten(0, (steps, batch)))
        return self.pool(spikes.flatten(0, 1)).unflatten(0, (steps, batch))


def _check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps
