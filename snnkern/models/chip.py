from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ..nn import IAF
from ..spec.arguments import positive
from .layers import Neurons, Staged, as_frames, fire, over_steps, per_frame


class ChipNet(Staged):
    """Convolutions and linear layers of integrate-and-fire neurons, for asynchronous chips: no bias, no norm, no leak.

    ::

        8C3s2-AP2-16C3-AP2-32C3 - FC 64 - FC     each convolution and hidden layer followed by IAF
        threshold 1, fires at it, potential at least -1, soft reset, surrogate Triangle(1)

    The paper describes no network for N-MNIST, and its code has none. The default is a choice: the code's network for
    DVS-Gesture, AP2-8C3s2-AP2-16C3-AP2-32C3-AP2-32C3 - FC 64 - FC at 128 x 128, without its first pool and its last
    pool and convolution, so that FC 64 takes 32 channels of 4 x 4 at 34 x 34 too. ``plan=""`` and ``hidden=(96, 96)``
    make a plain multilayer perceptron. All weights start from Kaiming's normal distribution: with PyTorch's smaller
    ones few spikes get through. ``analysis.event_driven`` runs the trained network without a clock.

    Args:
        classes: number of outputs.
        in_channels, size: of the frames, which are square.
        steps: default number of time steps T for static images.
        plan: convolutions such as 8C3, of 8 channels and 3x3, or 8C3s2, with stride 2; AP2 is a 2x2 average pool.
        hidden: widths of the linear layers before the last.
        backend: of the default neurons; see ``nn.IAF``.
        neuron: makes one module per layer, [T, ...] to spikes of that shape, in place of the default above.

    Shapes: frames [T, N, C, H, W] of event counts, one per step, or static images [N, C, H, W], shown unchanged at
    ``steps`` steps, to [T, N, classes]. Stages: the convolutions and hidden layers; see ``Staged`` for ``t``.

    Parameters: 39,312. MACs per 34x34 frame: 0.2 M.

    Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, table 7, and its published code.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 2,
        size: int = 34,
        steps: int = 16,
        plan: str = "8C3s2-AP2-16C3-AP2-32C3",
        hidden: Sequence[int] = (64,),
        backend: str | None = None,
        neuron: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Sequence):
            raise TypeError(f"hidden must be a sequence of widths, got {hidden!r}")
        make = Neurons(partial(IAF, backend=backend), None) if neuron is None else Neurons(neuron, backend)
        self.steps = positive("steps", steps)
        self.in_channels, self.size = positive("in_channels", in_channels), positive("size", size)
        self.stages, pools = nn.ModuleList(), []
        width = in_channels
        for word in filter(None, plan.split("-")):
            match = re.fullmatch(r"(\d+)C(\d+)(s2)?", word)
            if match:
                stride = 2 if match[3] else 1
                conv = nn.Conv2d(width, int(match[1]), int(match[2]), stride, int(match[2]) // 2, bias=False)
                self.stages.append(nn.ModuleList((nn.Sequential(*pools, conv), make())))
                width, size, pools = conv.out_channels, -(-size // stride), []
            elif word == "AP2":
                size //= 2
                pools.append(nn.AvgPool2d(2))
            else:
                raise ValueError(f"plan must be of the form 8C3s2-AP2-16C3, got {word!r} in {plan!r}")
        if size < 1:
            raise ValueError(f"size must be enough for the pools of {plan!r}, got {self.size}")
        width *= size * size
        for outputs in hidden:
            linear = nn.Linear(width, positive("hidden", outputs), bias=False)
            self.stages.append(nn.ModuleList((nn.Sequential(*pools, nn.Flatten(), linear), make())))
            width, pools = outputs, []
        if not self.stages or pools:
            raise ValueError(f"plan must end with a convolution where hidden is empty, got {plan!r}")
        self.head = nn.Linear(width, positive("classes", classes), bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def stage_modules(self) -> list[tuple[nn.Module, ...]]:
        return [tuple(stage) for stage in self.stages]

    def forward(self, x: torch.Tensor, steps: int | None = None, t: Sequence[int] | None = None) -> torch.Tensor:
        x, frames = as_frames(x, self.in_channels, self.size)
        t = self.timing(frames, steps, t)
        x = x[: t[0]]
        for (synapses, neuron), here, out in zip(self.stages, t, self.handed_on(t), strict=True):
            x = fire(neuron, over_steps(per_frame(synapses, x), here), out)
        return self.head(x.flatten(2))
