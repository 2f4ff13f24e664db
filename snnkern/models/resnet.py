"""The residual networks. Their default neurons and the factors of their batch norms are those of their papers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ..spec.arguments import flag, number, positive
from ..surrogate import Dspike, Sigmoid
from .layers import Neurons
from .residual import BasicBlock, Residual, SEWBlock

SQRT_HALF = 0.5**0.5  # tdBN's alpha where two norms are added up


class _TdResNet(Residual):
    """Of basic blocks, with tdBN's factors: the threshold, and alpha times it for the norms that are added up."""

    def __init__(
        self,
        stem,
        groups,
        classes,
        in_channels,
        steps,
        backend,
        neuron,
        fused,
        alpha,
        threshold,
        pooled_shortcuts=False,
        hidden=None,
        **settings,
    ) -> None:
        neurons = Neurons(neuron, backend, fused, threshold=threshold, **settings)
        scale = number("threshold", threshold)
        last = number("alpha", alpha) * scale
        flag("pooled_shortcuts", pooled_shortcuts)
        block = partial(BasicBlock, neurons=neurons, scale=scale, last=last, pooled_shortcut=pooled_shortcuts)
        super().__init__(stem, groups, block, neurons, classes, in_channels, steps, scale, hidden)


class ResNet19(_TdResNet):
    """Eight residual blocks of LIF neurons, for small images: 17 convolutions in a row and two linear layers.

    ::

        stem - 3 blocks of 128 channels - 3 of 256 - 2 of 512 - global average - FC hidden - LIF - FC classes
        block: LIF(norm(conv(LIF(norm(conv(x))))) + shortcut(x))     decay 0.5, threshold 1, surrogate Triangle(1)

    Convolutions are 3x3; the first block of 256 and of 512 channels has stride 2. The shortcut is the identity, or
    norm(conv 1x1) where the shape changes, and adds to what the neurons receive.

    The literature has this network in several forms:

    ==========================  ================================================
    Zheng et al. (tdBN)         ``alpha=0.5**0.5``
    TET's code                  ``stem=64``
    MTT's code                  ``hidden=None``
    SEENN's code                ``hidden=None, pooled_shortcuts=True``
    ==========================  ================================================

    The stem of 128 channels is the default, as it is what the name stands for and what all but one have. Batch norm
    takes its statistics over time, batch and space; it and the initial weights are PyTorch's own, as in TET's code.

    Args:
        classes: number of outputs.
        in_channels: of the images; any height and width.
        stem: channels of the first convolution.
        hidden: width of the first linear layer, counted by the name, or None to leave it out.
        steps: default number of time steps T for static images.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, [T, ...] to spikes of that shape, in place of the default above;
            ``threshold`` then is tdBN's alone.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.
        alpha: tdBN's factor on the norms that are added up, those that end a block and those of shortcuts.
        threshold: of the default neurons, and tdBN's factor on all norms.
        pooled_shortcuts: shortcuts average 2x2 spikes where the others have a stride.

    Shapes: static images [N, C, H, W], shown unchanged at ``steps`` steps, or frames [T, N, C, H, W], one per step, to
    [T, N, classes].

    Parameters: 12,697,994 (defaults), 12,569,226 (``hidden=None``), 12,630,858 (``stem=64``). MACs per 32x32 frame:
    2,285.4 M, 2,285.2 M, 2,216.5 M.

    Source: Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks", AAAI 2021 (network,
    tdBN); Deng et al., ICLR 2022 (neuron, output layer).
    """

    GROUPS = ((128, 3, 1), (256, 3, 2), (512, 2, 2))  # channels, blocks, stride of the first

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
        alpha: float = 1.0,
        threshold: float = 1.0,
        pooled_shortcuts: bool = False,
    ) -> None:
        common = classes, in_channels, steps, backend, neuron, fused, alpha, threshold, pooled_shortcuts
        super().__init__(((positive("stem", stem), 3, 1),), self.GROUPS, *common, hidden)


class ResNet18(_TdResNet):
    """Eight residual blocks for small images or, with ``in_channels=2``, an event camera's frames: MTT's network.

    ::

        64C3 - 2 blocks of 64 channels - 2 of 128 - 2 of 256 - 2 of 512 - global average - FC
        block and neurons: those of ResNet19

    Args: those of ``ResNet19``, but for ``stem`` and ``hidden``.

    Shapes: those of ``ResNet19``.

    Parameters: 11,173,962. MACs per 32x32 frame: 555.4 M.

    Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, and its published code.
    """

    GROUPS = ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2))

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        steps: int = 6,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
        alpha: float = 1.0,
        threshold: float = 1.0,
        pooled_shortcuts: bool = False,
    ) -> None:
        common = classes, in_channels, steps, backend, neuron, fused, alpha, threshold, pooled_shortcuts
        super().__init__(((64, 3, 1),), self.GROUPS, *common)


class ResNet34(ResNet18):
    """Sixteen residual blocks for small images: ``ResNet18`` with 3, 4, 6 and 3 blocks, from MTT's code.

    The ResNet-34 of its ImageNet table is ``SpikingResNet34(alpha=1.0)``.

    Parameters: 21,282,122. MACs per 32x32 frame: 1,159.4 M.
    """

    GROUPS = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


class BResNet50(ResNet18):
    """Twenty-four basic blocks, thus 50 layers, for small images: ``ResNet18`` with 3, 6, 9 and 6 blocks.

    Parameters: 39,576,906. MACs per 32x32 frame: 1,763.4 M. Source: Du et al., ICLR 2025, table 10.
    """

    GROUPS = ((64, 3, 1), (128, 6, 2), (256, 9, 2), (512, 6, 2))


class BResNet72(ResNet18):
    """Thirty-five basic blocks, thus 72 layers, for small images: ``ResNet18`` with 3, 8, 16 and 8 blocks.

    Parameters: 57,873,738. MACs per 32x32 frame: 2,593.9 M. Source: Du et al., ICLR 2025, table 10.
    """

    GROUPS = ((64, 3, 1), (128, 8, 2), (256, 16, 2), (512, 8, 2))


class SpikingResNet34(_TdResNet):
    """Sixteen residual blocks for ImageNet, without a max-pool: tdBN's network, which TET, Dspike and MTT take over.

    ::

        64C7 stride 2 - 3 blocks of 64 channels - 4 of 128 - 6 of 256 - 3 of 512 - global average - FC
        block and neurons: those of ResNet19

    Every group of blocks starts with stride 2, the first one too. The norms have tdBN's factors, ``alpha=0.5**0.5``:
    TET's ``alpha`` for this network is not published, and it names tdBN's. ``neuron=partial(LIF, decay=0.25,
    threshold=0.5, surrogate=Dspike(1.0)), threshold=0.5`` makes it Dspike's.

    Args: those of ``ResNet18``, and ``zero_init``: the last norm of every block starts with weight 0, so that at first
    only shortcuts pass.

    Shapes: those of ``ResNet19``.

    Parameters: 21,801,896. MACs per 224x224 frame: 3,676.6 M.

    Source: Zheng et al., AAAI 2021; Deng et al., ICLR 2022, section 5.
    """

    GROUPS = ((64, 3, 2), (128, 4, 2), (256, 6, 2), (512, 3, 2))

    def __init__(
        self,
        classes: int = 1000,
        in_channels: int = 3,
        steps: int = 6,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
        alpha: float = SQRT_HALF,
        threshold: float = 1.0,
        pooled_shortcuts: bool = False,
        zero_init: bool = False,
    ) -> None:
        common = classes, in_channels, steps, backend, neuron, fused, alpha, threshold, pooled_shortcuts
        super().__init__(((64, 7, 2),), self.GROUPS, *common)
        self.zero_init(zero_init)


class DspikeResNet18(_TdResNet):
    """Dspike's ResNet-18 for small images: a stem of three convolutions, and averages in the shortcuts.

    ::

        64C3 - 64C3 - 64C3 stride 2 - 2 blocks of 64 channels - 2 of 128 - 2 of 256 - 2 of 512 - global average - FC
        block: LIF(norm(conv(LIF(norm(conv(x))))) + shortcut(x)), shortcut norm(conv 1x1(AP2)) where the shape changes
        decay 0.25, threshold 0.5, surrogate Dspike(1)

    tdBN scales the norms by the threshold, and by 1/sqrt(2) those that are added up. The paper gives "three layers" for
    the stem. Widths and stride follow from its table 3: 187 M operations, 3.52 M multiplications in the first layer at
    T = 2; of the stems that come to mind only this one, or an average pool in place of its stride, has both. LIF stands
    behind every convolution of the stem. The decay is in no place of the paper: 0.25 is what the first author's next
    code (NDA) has beside the threshold of 0.5. That the first layer has 576 weights is a slip: it has 1,728.

    Args: those of ``ResNet18``.

    Shapes: those of ``ResNet19``.

    Parameters: 11,247,946. MACs per 32x32 frame: 187.4 M.

    Source: Li et al., "Differentiable Spike", NeurIPS 2021, section 5.1; He et al., "Bag of Tricks", CVPR 2019.
    """

    STEM = ((64, 3, 1), (64, 3, 1), (64, 3, 2))  # channels, kernel, stride
    GROUPS = ResNet18.GROUPS

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        steps: int = 6,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
        alpha: float = SQRT_HALF,
        threshold: float = 0.5,
        pooled_shortcuts: bool = True,
    ) -> None:
        common = classes, in_channels, steps, backend, neuron, fused, alpha, threshold, pooled_shortcuts
        super().__init__(self.STEM, self.GROUPS, *common, decay=0.25, surrogate=Dspike(1.0))


class SEWResNet34(Residual):
    """Sixteen spike-element-wise blocks of IF neurons, for ImageNet.

    ::

        64C7 stride 2 - IF - max-pool 3x3 stride 2 - 3 blocks of 64 channels - 4 of 128 - 6 of 256 - 3 of 512
        - global average - FC                              block: IF(norm(conv(IF(norm(conv(x)))))) g shortcut(x)
        decay 1, threshold 1, fires at the threshold, hard reset outside the gradient, surrogate Sigmoid(4)

    The maximum is of spikes, which stay binary. In the published code the linear layer takes the mean over T of its
    input; here it stands at every step, for losses that want its outputs, whose mean is the same. TET trains this
    network with its triangle everywhere or with these neurons, it does not say: ``neuron`` decides.

    Args:
        classes: number of outputs.
        in_channels: of the images; any height and width.
        steps: default number of time steps T for static images.
        connect: how a block joins its shortcut: "ADD", "AND" or "IAND"; see ``residual.SEWBlock``.
        zero_init: every block starts as the identity: weight 0 for its last norm, and for "AND" bias 1, at which IF
            fires at every step. A network with a large ``lamb`` in its TET loss needs it (TET, A.3).
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per IF layer, [T, ...] to spikes of that shape, in place of the default above. For an
            ANN, "ADD" alone makes sense.
        fused: run batch norm and IF in one pass; see ``snnkern.bn_lif``.

    Shapes: those of ``ResNet19``.

    Parameters: 21,797,672. MACs per 224x224 frame: 3,663.8 M.

    Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks", NeurIPS 2021, and its published code.
    """

    GROUPS = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))

    def __init__(
        self,
        classes: int = 1000,
        in_channels: int = 3,
        steps: int = 4,
        connect: str = "ADD",
        zero_init: bool = False,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ) -> None:
        settings = {"decay": 1.0, "surrogate": Sigmoid(4.0), "detach_reset": True, "fire_at_threshold": True}
        neurons = Neurons(neuron, backend, fused, **settings)
        block = partial(SEWBlock, neurons=neurons, connect=connect)
        pool = nn.MaxPool2d(3, 2, padding=1)
        super().__init__(((64, 7, 2),), self.GROUPS, block, neurons, classes, in_channels, steps, pool=pool)
        self.zero_init(zero_init, bias=1.0 if connect == "AND" else 0.0)
