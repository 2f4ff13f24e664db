from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .chain import Chain
from .layers import Neurons


class CNN6(Chain):
    """Six stages of conv 3x3, batch norm and LIF, then a linear layer: the network of the digits recipe.

    ::

        16C3-16C3-AP2-32C3-32C3-AP2-32C3-64C3-FC     decay 0.5, threshold 1, surrogate Triangle(1)

    Batch norm takes its statistics over time, batch and space.

    Args:
        steps: default number of time steps T for static images.
        in_channels, size: of the images, which are square and at least 4x4.
        classes: number of outputs.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, [T, ...] to spikes of that shape, in place of the default above.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.
        plan: other stages in place of the six, as ``Chain`` takes them.

    Shapes: static images [N, C, H, W], shown unchanged at ``steps`` steps, or frames [T, N, C, H, W], one per step, to
    [T, N, classes].

    Source: Deng et al., ICLR 2022, section 3 (neuron, batch norm, output layer); sized for 8x8 images.
    """

    def __init__(
        self,
        steps: int = 4,
        in_channels: int = 1,
        size: int = 8,
        classes: int = 10,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
        plan: str = "16C3-16C3-AP2-32C3-32C3-AP2-32C3-64C3",
    ) -> None:
        super().__init__(plan, Neurons(neuron, backend, fused), classes, in_channels, size, steps)
