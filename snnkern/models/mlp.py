from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from ..nn import BNLIF, LIF, Linear, TdBatchNorm
from ..spec.arguments import flag, positive
from .layers import Neurons, Staged, fire, fire_behind, over_steps


class SpikingMLP(Staged):
    """Linear layers, each followed by LIF, then a linear readout: for spoken digits and other long sequences.

    ::

        [FC, LIF] per hidden layer, FC     decay 0.9753, threshold 1, surrogate Triangle(1)

    The linear layers, ``nn.Linear``, have biases where no norm shifts the neurons' inputs; ``LIF`` adds them. The decay
    is exp(-0.5/20): a membrane time constant of 20 ms in steps of 0.5 ms. On sequential MNIST the paper has ``inputs=1,
    hidden=(64, 64), classes=10, decay=0.99``.

    Args:
        inputs: channels per step; 70 are the 700 of the Spiking Heidelberg Digits, summed in tens.
        hidden: widths of the hidden layers.
        classes: number of outputs: 20 for the Heidelberg digits, 35 for the speech commands.
        decay: of the default neurons.
        backend: of the default neurons; see ``snnkern.lif``.
        neuron: makes one module per LIF layer, [T, ...] to spikes of that shape, in place of the default above.
        norm: batch norm behind every hidden linear layer, its statistics over time and batch. The paper names none.
        fused: run batch norm and LIF in one pass; see ``snnkern.bn_lif``.

    Shapes: [T, N, inputs] to [T, N, classes]. Stages: the hidden layers; see ``layers.Staged`` for ``t``.

    Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025 (sizes, decay); Cramer et al., "The
    Heidelberg Spiking Data Sets", IEEE TNNLS 2022 (data, time constant).
    """

    def __init__(
        self,
        inputs: int = 70,
        hidden: Sequence[int] = (128, 128, 128),
        classes: int = 20,
        decay: float = 0.9753,
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
        norm: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Sequence) or not hidden:
            raise TypeError(f"hidden must be a sequence of one width or more, got {hidden!r}")
        flag("norm", norm)
        self.inputs = positive("inputs", inputs)
        make = Neurons(neuron, backend, fused, decay=decay)
        layers = []
        for before, after in pairwise((inputs, *hidden)):
            layers.append(Linear(before, positive("hidden", after), bias=not norm))
            layers += make.behind(TdBatchNorm(after)) if norm else (make(),)
        self.per_stage = 3 if norm else 2
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(hidden[-1], positive("classes", classes))

    def stage_modules(self) -> list[tuple[nn.Module, ...]]:
        return [*zip(*(self.layers[at :: self.per_stage] for at in range(self.per_stage)), strict=True)]

    def forward(self, x: torch.Tensor, steps: int | None = None, t: Sequence[int] | None = None) -> torch.Tensor:
        if x.dim() != 3 or x.shape[2] != self.inputs:
            raise ValueError(f"x must be [T, N, {self.inputs}], got shape {tuple(x.shape)}")
        t = self.timing(len(x), steps, t)
        x = x[: t[0]]
        for (linear, *norm, neuron), here, out in zip(self.stage_modules(), t, self.handed_on(t), strict=True):
            if not norm:
                x = fire_behind(linear, neuron, x, here, out)
                continue
            x = over_steps(linear(x), here)
            if isinstance(norm[0], (BNLIF, LIF)):  # LIF: what is left of BNLIF when the norm is folded away
                x = fire(norm[0], x, out)
            else:
                x = fire(neuron, norm[0](x), out)
        return self.head(x)
