from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..ops.layout import positive
from .layers import Neurons, Stage, as_frames


class VGGSNN(nn.Module):
    """Eight stages of conv 3x3, batch norm and LIF, then one linear layer: TET's network for event cameras.

    ::

        [64C3, 128C3, AP2, 256C3, 256C3, AP2, 512C3, 512C3, AP2, 512C3, 512C3, AP2, FC]
        decay 0.5, threshold 1, surrogate Triangle(1)

    Batch norm takes its statistics over time, batch and space. As in TET's published code, the convolutions have
    biases, which batch norm cancels in training, and start from Kaiming's normal distribution (fan out).

    Args:
        classes: number of outputs.
        in_channels, size: of the frames, which are square; ``size`` is a multiple of 16.
        pooling: average pools; False leaves them out and gives the convolution before each stride 2 instead.
        steps: default number of time steps T for static images.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, [T, ...] to spikes of that shape, in place of the default above.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.

    Shapes: frames [T, N, C, H, W], one per step, or static images [N, C, H, W], shown unchanged at ``steps`` steps, to
    [T, N, classes].

    Parameters: 9,271,498, with pools and without.

    Source: Deng et al., ICLR 2022, sections 3 and 5, and its published code.
    """

    CHANNELS = (64, 128, 256, 256, 512, 512, 512, 512)
    HALVED = (1, 3, 5, 7)  # stages after which height and width are half of before

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 2,
        size: int = 48,
        pooling: bool = True,
        steps: int = 10,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if positive("size", size) % 16:
            raise ValueError(f"size must be a multiple of 16, got {size}")
        if not isinstance(pooling, bool):
            raise TypeError(f"pooling must be True or False, got {pooling!r}")
        self.steps = positive("steps", steps)
        self.in_channels, self.size = positive("in_channels", in_channels), size
        make = Neurons(neuron, backend, fused)
        self.stages = nn.ModuleList()
        width = in_channels
        for i, channels in enumerate(self.CHANNELS):
            halved = i in self.HALVED
            stride = 2 if halved and not pooling else 1
            self.stages.append(Stage(width, channels, make, stride, pooled=halved and pooling, bias=True))
            nn.init.kaiming_normal_(self.stages[i].conv.weight, mode="fan_out", nonlinearity="relu")
            width = channels
        self.head = nn.Linear(width * (size // 16) ** 2, positive("classes", classes))

    def forward(self, x: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        x, steps = as_frames(x, steps, self.steps, self.in_channels, self.size)
        for stage in self.stages:
            x = stage(x, steps)
        return self.head(x.flatten(2))
