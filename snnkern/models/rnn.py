from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from ..nn import LI, LIF, Linear, RecurrentLIF
from ..spec.arguments import flag, number, positive
from .layers import Neurons, fire_behind


class VanillaRNN(nn.Module):
    """Recurrent layers of tanh and a linear readout: the rival of ``SpikingMLP`` on sequential MNIST.

    The readout r(t) of the last step counts. Losses and predictions take the mean of the outputs, so these are
    O(t) = t r(t) - (t - 1) r(t - 1): the mean of the first t is r(t). Nothing in it spikes: in a recipe its network is
    ``ann``.

    Args:
        inputs: channels per step.
        hidden: width of every recurrent layer.
        layers: how many.
        classes: number of outputs.

    Shapes: [T, N, inputs] to [T, N, classes].

    Parameters: 13,258.

    Source: Du et al., ICLR 2025, A.12, table 14, which names 2 layers of 64; the readout of the last step is a choice.
    """

    def __init__(self, inputs: int = 1, hidden: int = 64, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.inputs = positive("inputs", inputs)
        self.rnn = nn.RNN(inputs, positive("hidden", hidden), positive("layers", layers))
        self.head = nn.Linear(hidden, positive("classes", classes))

    def forward(self, x: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        check_sequence(x, self.inputs, steps)
        read = self.head(self.rnn(x)[0]).float()
        summed = torch.arange(1, len(x) + 1, device=x.device).view(-1, 1, 1) * read
        return summed.diff(dim=0, prepend=torch.zeros_like(read[:1]))


class SpikingRNN(nn.Module):
    """Recurrent layers of spiking neurons and a readout that leaks and does not fire: spoken digits, time series.

    ::

        [FC, recurrent LIF] per hidden layer, FC, LI

    The defaults are the network of the Heidelberg digits: one layer of 128 neurons with synaptic currents (CUBA), their
    time constants 20 ms and 10 ms in steps of 0.5 ms. ``threshold_decay`` and ``threshold_jump`` make their thresholds
    adaptive, as those of LSNNs; ``recurrent=False`` leaves out the weights among the neurons of a layer. Losses and
    predictions take the mean of the readout's potentials over time, where Cramer et al. take their maximum; all neurons
    of a layer have the same constants, where Yin et al. learn those of each.

    Args:
        inputs: channels per step.
        hidden: widths of the hidden layers.
        classes: number of outputs.
        recurrent: whether the neurons of a layer receive its spikes of the step before.
        decay, synapse_decay, threshold_decay, threshold_jump: of the default neurons; see ``snnkern.lif``.
        readout_decay: of the readout; see ``nn.LI``. 0: the last layer's outputs but for rounding.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes the neurons of a layer, a ``LIF``, in place of the default above. With ``recurrent`` its arguments
            become those of a ``RecurrentLIF``.

    Shapes: [T, N, inputs] to [T, N, classes].

    Parameters: 28,052; for all 700 channels 108,692.

    Source: Cramer et al., "The Heidelberg Spiking Data Sets", IEEE TNNLS 2022; adaptive thresholds: Bellec et al.,
    "Long short-term memory and learning-to-learn in networks of spiking neurons", NeurIPS 2018, and Yin et al.,
    "Accurate and efficient time-domain classification with adaptive spiking recurrent neural networks", Nature Machine
    Intelligence 2021.
    """

    def __init__(
        self,
        inputs: int = 70,
        hidden: Sequence[int] = (128,),
        classes: int = 20,
        recurrent: bool = True,
        decay: float = 0.9753,
        synapse_decay: float | None = 0.9512,
        threshold_decay: float | None = None,
        threshold_jump: float | None = None,
        readout_decay: float = 0.9753,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Sequence) or not hidden:
            raise TypeError(f"hidden must be a sequence of one width or more, got {hidden!r}")
        flag("recurrent", recurrent)
        self.inputs = positive("inputs", inputs)
        states = {"synapse_decay": synapse_decay, "threshold_decay": threshold_decay, "threshold_jump": threshold_jump}
        make = Neurons(neuron, backend, decay=decay, **states)
        self.layers = nn.Sequential()
        for before, after in pairwise((inputs, *hidden)):
            layer = Linear(before, positive("hidden", after))
            self.layers.extend((layer, as_recurrent(after, make()) if recurrent else make()))
        self.head = nn.Linear(hidden[-1], positive("classes", classes))
        if not 0 <= number("readout_decay", readout_decay) < 1:
            raise ValueError(f"readout_decay must be in [0, 1), got {readout_decay!r}")
        self.readout = LI(readout_decay, backend=backend)

    def forward(self, x: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        check_sequence(x, self.inputs, steps)
        for linear, neuron in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = fire_behind(linear, neuron, x, len(x))
        return self.readout(self.head(x))


def as_recurrent(features: int, made: nn.Module) -> RecurrentLIF:
    """A layer of so many neurons, those of a ``LIF``, whose learnt parameters it takes over."""
    if not isinstance(made, LIF):
        raise TypeError(f"neuron must make a LIF where recurrent is True, got {made!r}")
    return RecurrentLIF(features, **made.settings, **{name: getattr(made, name) for name in made.tensors})


def check_sequence(x: torch.Tensor, inputs: int, steps: int | None) -> None:
    if x.dim() != 3 or x.shape[2] != inputs:
        raise ValueError(f"x must be [T, N, {inputs}], got shape {tuple(x.shape)}")
    if steps not in (None, len(x)):
        raise ValueError(f"steps must be None or the number of frames, {len(x)}, got {steps!r}")
