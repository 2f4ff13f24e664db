from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..ops.layout import positive
from .layers import ConvNorm, Neurons, Stage, as_frames


class ResNet19(nn.Module):
    """Eight residual blocks of LIF neurons, for small images: 17 convolutions in a row and two linear layers.

    ::

        stem - 3 blocks of 128 channels - 3 of 256 - 2 of 512 - global average - FC hidden - LIF - FC classes
        block: LIF(norm(conv(LIF(norm(conv(x))))) + shortcut(x))     decay 0.5, threshold 1, surrogate Triangle(1)

    Convolutions are 3x3; the first block of 256 and of 512 channels has stride 2. The shortcut is the identity, or
    norm(conv 1x1) where the shape changes, and adds to what the neurons receive.

    Batch norm takes its statistics over time, batch and space. It and the initial weights are PyTorch's own, as in
    TET's code; tdBN at threshold 1 differs by a factor 1/sqrt(2) on the weight of the norm that ends a branch.

    Args:
        classes: number of outputs.
        in_channels: of the images; any height and width.
        stem: channels of the first convolution: 128 as in the paper that named the network, 64 in TET's code.
        hidden: width of the first linear layer, counted by the name, or None to leave it out.
        steps: default number of time steps T for static images.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, [T, ...] to spikes of that shape, in place of the default above.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.

    Shapes: static images [N, C, H, W], shown unchanged at ``steps`` steps, or frames [T, N, C, H, W], one per step, to
    [T, N, classes].

    Parameters: 12,697,994 (defaults), 12,569,226 (``hidden=None``), 12,630,858 (``stem=64``).

    Source: Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks", AAAI 2021 (network,
    tdBN); Deng et al., ICLR 2022 (neuron, output layer).
    """

    BLOCKS = ((128, 1), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1), (512, 2), (512, 1))  # channels, stride

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        stem: int = 128,
        hidden: int | None = 256,
        steps: int = 4,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.steps = positive("steps", steps)
        self.in_channels = positive("in_channels", in_channels)
        make = Neurons(neuron, backend, fused)
        self.stem = Stage(in_channels, positive("stem", stem), make)
        self.blocks = nn.ModuleList()
        width = stem
        for channels, stride in self.BLOCKS:
            self.blocks.append(_Block(width, channels, stride, make))
            width = channels
        if hidden is None:
            self.hidden = nn.Identity()
        else:
            self.hidden = nn.Sequential(nn.Linear(width, positive("hidden", hidden)), make())
            width = hidden
        self.head = nn.Linear(width, positive("classes", classes))

    def forward(self, x: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        x, steps = as_frames(x, steps, self.steps, self.in_channels)
        x = self.stem(x, steps)
        for block in self.blocks:
            x = block(x)
        return self.head(self.hidden(x.mean((3, 4))))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, neurons: Neurons) -> None:
        super().__init__()
        self.first = Stage(inputs, outputs, neurons, stride)
        self.second = Stage(outputs, outputs, neurons)
        identity = stride == 1 and inputs == outputs
        self.shortcut = None if identity else ConvNorm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = x.shape[0]
        shortcut = x if self.shortcut is None else self.shortcut(x, steps)
        return self.second(self.first(x, steps), steps, shortcut)
