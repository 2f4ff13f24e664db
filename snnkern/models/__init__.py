"""Networks of the published systems, made of ``snnkern.nn`` and PyTorch's own layers.

All return [T, N, classes]: what the last layer, which neither leaks nor fires, receives at every step. The losses take
it as it is; the argmax of its mean over T is the prediction. ``model(x, t=(t_1, ..., t_n))`` runs every stage, a
residual block or a convolution of a chain, at its own number of time steps; see ``Staged``.

The ANN of a model is the same class with ``neuron=torch.nn.ReLU``, at T = 1. Its state_dict has the keys of the SNN's,
so that ``snn.load_state_dict(ann.state_dict())`` starts the SNN from it.
"""

from .chip import ChipNet
from .cnn6 import CNN6
from .layers import Staged
from .mlp import SpikingMLP
from .resnet import (
    BResNet50,
    BResNet72,
    DspikeResNet18,
    ResNet18,
    ResNet19,
    ResNet34,
    SEWResNet34,
    SpikingResNet34,
)
from .rnn import SpikingRNN, VanillaRNN
from .toy import ToyCNN
from .vgg import SNN5, VGG14, VGGSNN, DspikeVGG16

MODELS = {
    model.__name__: model
    for model in (
        CNN6,
        BResNet50,
        BResNet72,
        ChipNet,
        DspikeResNet18,
        DspikeVGG16,
        ResNet18,
        ResNet19,
        ResNet34,
        SEWResNet34,
        SNN5,
        SpikingMLP,
        SpikingRNN,
        SpikingResNet34,
        ToyCNN,
        VGG14,
        VGGSNN,
        VanillaRNN,
    )
}

__all__ = ["MODELS", "Staged", *MODELS]
