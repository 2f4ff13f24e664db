from __future__ import annotations

import torch
from torch import nn

from ..spec.arguments import positive


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
        if x.dim() != 3 or x.shape[2] != self.inputs:
            raise ValueError(f"x must be [T, N, {self.inputs}], got shape {tuple(x.shape)}")
        if steps not in (None, len(x)):
            raise ValueError(f"steps must be None or the number of frames, {len(x)}, got {steps!r}")
        read = self.head(self.rnn(x)[0]).float()
        summed = torch.arange(1, len(x) + 1, device=x.device).view(-1, 1, 1) * read
        return summed.diff(dim=0, prepend=torch.zeros_like(read[:1]))
