from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..spec.arguments import positive
from ..surrogate import Rectangle
from .layers import Neurons, Staged, as_frames, over_steps, per_frame


class ToyCNN(Staged):
    """One convolution: Dspike's network on MNIST for comparing gradients with finite differences.

    ::

        6C3 - LIF - AP2 - FC     decay 0.25, threshold 0.5, surrogate Rectangle(1)

    The convolution has no bias: its 54 weights take 108 forwards. There is no batch norm. The paper leaves open the
    padding, the size of the pool, decay and T; here the padding keeps the size and pools are 2x2, as in its other
    networks, and T is 6, its longest on still images. For the decay see ``DspikeResNet18``.

    Args:
        classes: number of outputs.
        in_channels, size: of the images, which are square and at least 2x2.
        steps: default number of time steps T for static images.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes the LIF layer, [T, ...] to spikes of that shape, in place of the default above.

    Shapes: static images [N, C, H, W], shown unchanged at ``steps`` steps, or frames [T, N, C, H, W], one per step, to
    [T, N, classes].

    Parameters: 11,824. MACs per 28x28 frame: 54,096.

    Source: Li et al., "Differentiable Spike", NeurIPS 2021, section 4.2.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 1,
        size: int = 28,
        steps: int = 6,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if positive("size", size) < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        self.steps = positive("steps", steps)
        self.in_channels, self.size = positive("in_channels", in_channels), size
        self.conv = nn.Conv2d(in_channels, 6, 3, padding=1, bias=False)
        self.neuron = Neurons(neuron, backend, decay=0.25, threshold=0.5, surrogate=Rectangle(1.0))()
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(6 * (size // 2) ** 2, positive("classes", classes))

    def stage_modules(self) -> list[tuple[nn.Module, ...]]:
        return [(self.conv, self.neuron)]

    def forward(self, x: torch.Tensor, steps: int | None = None, t: Sequence[int] | None = None) -> torch.Tensor:
        x, frames = as_frames(x, self.in_channels, self.size)
        (steps,) = self.timing(frames, steps, t)
        spikes = self.neuron(over_steps(per_frame(self.conv, x[:steps]), steps))
        return self.head(per_frame(self.pool, spikes).flatten(2))
