"""Networks of the published systems, made of ``snnkern.nn`` and PyTorch's own layers.

All return [T, N, classes]: what the last layer, which neither leaks nor fires, receives at every step. The losses take
it as it is; the argmax of its mean over T is the prediction.
"""

from .cnn6 import CNN6
from .mlp import SpikingMLP
from .resnet import ResNet19
from .vgg import VGGSNN

__all__ = ["CNN6", "VGGSNN", "ResNet19", "SpikingMLP"]
