from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..spec.arguments import flag, number
from ..surrogate import Dspike
from .chain import Chain
from .layers import Neurons

VGG16_PLAN = "64C3-64C3-AP2-128C3-128C3-AP2-256C3-256C3-256C3-AP2-512C3-512C3-512C3-AP2-512C3-512C3-512C3-AP2"


class VGGSNN(Chain):
    """Eight stages of conv 3x3, batch norm and LIF, then one linear layer: TET's network for event cameras.

    ::

        64C3-128C3-AP2-256C3-256C3-AP2-512C3-512C3-AP2-512C3-512C3-AP2-FC
        decay 0.5, threshold 1, surrogate Triangle(1)

    Batch norm takes its statistics over time, batch and space. As in TET's published code, the convolutions have
    biases, which batch norm cancels in training, and start from Kaiming's normal distribution (fan out).

    Args:
        classes: number of outputs.
        in_channels, size: of the frames, which are square and, with pools, at least 16x16.
        pooling: average pools; False leaves them out and gives the convolution before each stride 2 instead.
        steps: default number of time steps T for static images.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, [T, ...] to spikes of that shape, in place of the default above.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.

    Shapes: frames [T, N, C, H, W], one per step, or static images [N, C, H, W], shown unchanged at ``steps`` steps, to
    [T, N, classes].

    Parameters: 9,271,498, with pools and without. MACs per 48x48 frame: 1,361.7 M with pools, 660.9 M without.

    Source: Deng et al., ICLR 2022, sections 3 and 5, and its published code.
    """

    PLAN = "64C3-128C3-AP2-256C3-256C3-AP2-512C3-512C3-AP2-512C3-512C3-AP2"

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
        flag("pooling", pooling)
        neurons = Neurons(neuron, backend, fused)
        super().__init__(self.PLAN, neurons, classes, in_channels, size, steps, bias=True, strided=not pooling)
        self.kaiming()


class SNN5(Chain):
    """Five stages and a linear layer, with TET's name; "CNN-5" in its table of analog spikes.

    ::

        16C3-64C5-AP2-128C5-AP2-256C5-AP2-512C3-AP2-FC     decay 0.5, threshold 1, surrogate Triangle(1)

    The paper gives the line above and no more, and its code leaves this network out. Padding that keeps the size, batch
    norm in every stage, the biases of the convolutions and their initial values are therefore those of the code's other
    network of this kind, ``VGGSNN``.

    Args:
        classes: number of outputs.
        in_channels, size: of the images, which are square and at least 16x16.
        steps: default number of time steps T for static images.
        backend, neuron, fused: those of ``VGGSNN``.

    Shapes: those of ``VGGSNN``.

    Parameters: 2,253,098. MACs per 32x32 frame: 150.4 M.

    Source: Deng et al., ICLR 2022, section 5.
    """

    PLAN = "16C3-64C5-AP2-128C5-AP2-256C5-AP2-512C3-AP2"

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        size: int = 32,
        steps: int = 4,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ) -> None:
        neurons = Neurons(neuron, backend, fused)
        super().__init__(self.PLAN, neurons, classes, in_channels, size, steps, bias=True)
        self.kaiming()


class VGG14(Chain):
    """VGG-16 with one linear layer in place of three: MTT's network for CIFAR-100.

    ::

        64C3-64C3-AP2-128C3-128C3-AP2-256C3-256C3-256C3-AP2-512C3-512C3-512C3-AP2-512C3-512C3-512C3-AP2-FC
        decay 0.5, threshold 1, surrogate Triangle(1)

    Args:
        classes: number of outputs.
        in_channels, size: of the images, which are square and at least 32x32.
        steps: default number of time steps T for static images.
        backend, neuron, fused: those of ``VGGSNN``.

    Shapes: those of ``VGGSNN``.

    Parameters: 14,724,042, with 100 classes 14,770,212. MACs per 32x32 frame: 313.2 M.

    Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, A.1, and its published code.
    """

    PLAN = VGG16_PLAN

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        size: int = 32,
        steps: int = 5,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__(self.PLAN, Neurons(neuron, backend, fused), classes, in_channels, size, steps)


class DspikeVGG16(Chain):
    """VGG-16 with tdBN, Dspike's second network for ImageNet: 13 convolutions and three linear layers.

    ::

        64C3-64C3-AP2-128C3-128C3-AP2-256C3-256C3-256C3-AP2-512C3-512C3-512C3-AP2-512C3-512C3-512C3-AP2
        FC 4096 - LIF - FC 4096 - LIF - FC classes
        decay 0.25, threshold 0.5, surrogate Dspike(1)

    The paper takes "the VGG-16 of Diet-SNN", which has neither batch norm nor biases, and does not say what becomes of
    it. Here: tdBN behind the convolutions, scaled by the threshold; average pools, as the paper has them everywhere, in
    place of maxima; all three linear layers, without biases; no dropout, as batch norm regularises. Convolutions and
    linear layers start from Kaiming's normal distribution: the hidden linear layers have no norm behind them, and with
    PyTorch's smaller weights their neurons stay silent. For decay and surrogate see ``DspikeResNet18``.

    Args:
        classes: number of outputs.
        in_channels, size: of the images, which are square and at least 32x32.
        steps: default number of time steps T for static images.
        hidden: widths of the linear layers before the last.
        threshold: of the default neurons, and the factor of tdBN.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, in place of the default above; ``threshold`` then is tdBN's alone.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.

    Shapes: those of ``VGGSNN``.

    Parameters: 138,352,576. MACs per 224x224 frame: 15,470 M.

    Source: Li et al., "Differentiable Spike", NeurIPS 2021, section 5; Rathi and Roy, "DIET-SNN", IEEE TNNLS 2021.
    """

    PLAN = VGG16_PLAN

    def __init__(
        self,
        classes: int = 1000,
        in_channels: int = 3,
        size: int = 224,
        steps: int = 5,
        hidden: Sequence[int] = (4096, 4096),
        threshold: float = 0.5,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ) -> None:
        neurons = Neurons(neuron, backend, fused, decay=0.25, threshold=threshold, surrogate=Dspike(1.0))
        scale = number("threshold", threshold)
        super().__init__(
            self.PLAN, neurons, classes, in_channels, size, steps, scale=scale, hidden=hidden, linear_bias=False
        )
        self.kaiming()
        for layer in self.hidden:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
