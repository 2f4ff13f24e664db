from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..ops.layout import positive
from .layers import Neurons, Stage, as_frames


class CNN6(nn.Module):
    """Six stages of conv 3x3, batch norm and LIF, then a linear layer: the network of the digits recipe.

    ::

        [16C3, 16C3, AP2, 32C3, 32C3, AP2, 32C3, 64C3, FC]     decay 0.5, threshold 1, surrogate Triangle(1)

    Batch norm takes its statistics over time, batch and space.

    Args:
        steps: default number of time steps T for static images.
        in_channels, size: of the images, which are square; ``size`` is a multiple of 4.
        classes: number of outputs.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, [T, ...] to spikes of that shape, in place of the default above.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.

    Shapes: static images [N, C, H, W], shown unchanged at ``steps`` steps, or frames [T, N, C, H, W], one per step, to
    [T, N, classes].

    Source: Deng et al., ICLR 2022, section 3 (neuron, batch norm, output layer); sized for 8x8 images.
    """

    CHANNELS = (16, 16, 32, 32, 32, 64)
    POOLED = (1, 3)  # stages followed by an average pool

    def __init__(
        self,
        steps: int = 4,
        in_channels: int = 1,
        size: int = 8,
        classes: int = 10,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if positive("size", size) % 4:
            raise ValueError(f"size must be a multiple of 4, got {size}")
        self.steps = positive("steps", steps)
        self.in_channels, self.size = positive("in_channels", in_channels), size
        make = Neurons(neuron, backend, fused)
        inputs = (in_channels, *self.CHANNELS)
        self.stages = nn.ModuleList(
            Stage(inputs[i], inputs[i + 1], make, pooled=i in self.POOLED) for i in range(len(self.CHANNELS))
        )
        self.head = nn.Linear(self.CHANNELS[-1] * (size // 4) ** 2, positive("classes", classes))

    def forward(self, x: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        x, steps = as_frames(x, steps, self.steps, self.in_channels, self.size)
        for stage in self.stages:
            x = stage(x, steps)
        return self.head(x.flatten(2))
