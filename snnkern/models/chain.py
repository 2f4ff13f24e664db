"""Stages in a row, as the papers write them down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..spec.arguments import positive
from .layers import Neurons, Stage, Staged, as_frames


class Step(NamedTuple):
    """Of a plan: a convolution, and whether an average pool follows its neurons."""

    channels: int
    kernel: int
    pooled: bool


def parse(plan: str) -> list[Step]:
    """The steps of "16C3-64C5-AP2": convolutions of 16 channels, 3x3, and 64, 5x5, the latter with a 2x2 average."""
    steps = []
    for word in plan.split("-"):
        match = re.fullmatch(r"(\d+)C(\d+)", word)
        if match:
            steps.append(Step(int(match[1]), int(match[2]), False))
        elif word == "AP2" and steps and not steps[-1].pooled:
            steps[-1] = steps[-1]._replace(pooled=True)
        else:
            raise ValueError(f"plan must be of the form 16C3-64C5-AP2, got {word!r} in {plan!r}")
    return steps


class Chain(Staged):
    """Stages of convolution, batch norm and neurons with average pools, then linear layers with neurons in between.

    Args:
        plan: of the stages, as ``parse`` reads it.
        neurons: makes the neurons.
        classes: number of outputs.
        in_channels, size: of the images, which are square and no smaller than their halvings ask for. A pool drops the
            last row and column of an odd size.
        steps: default number of time steps T for static images.
        bias: of the convolutions.
        scale: of the batch norms: tdBN's factor.
        strided: stride 2 in the convolution before each pool, in place of the pool.
        hidden: widths of the linear layers before the last, each followed by neurons.
        linear_bias: of all linear layers.

    Shapes: static images [N, C, H, W], shown unchanged at ``steps`` steps, or frames [T, N, C, H, W], one per step, to
    [T, N, classes]. Stages: those of the plan; see ``Staged`` for ``t``.
    """

    def __init__(
        self,
        plan: str,
        neurons: Neurons,
        classes: int,
        in_channels: int,
        size: int,
        steps: int,
        bias: bool = False,
        scale: float = 1.0,
        strided: bool = False,
        hidden: Sequence[int] = (),
        linear_bias: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Sequence):
            raise TypeError(f"hidden must be a sequence of widths, got {hidden!r}")
        self.steps = positive("steps", steps)
        self.in_channels, self.size = positive("in_channels", in_channels), positive("size", size)
        self.stages = nn.ModuleList()
        width = in_channels
        for channels, kernel, pooled in parse(plan):
            stride = 2 if pooled and strided else 1
            self.stages.append(Stage(width, channels, neurons, kernel, stride, pooled and not strided, bias, scale))
            width = channels
            if pooled:
                size = -(-size // 2) if strided else size // 2
        if size < 1:
            raise ValueError(f"size must be at least {2 ** plan.count('AP2')}, got {self.size}")
        width *= size * size
        self.hidden = nn.Sequential()
        for outputs in hidden:
            self.hidden.extend((nn.Linear(width, positive("hidden", outputs), bias=linear_bias), neurons()))
            width = outputs
        self.head = nn.Linear(width, positive("classes", classes), bias=linear_bias)

    def stage_modules(self) -> list[tuple[nn.Module, ...]]:
        *before, last = self.stages
        return [*((stage,) for stage in before), (last, self.hidden)]

    def forward(self, x: torch.Tensor, steps: int | None = None, t: Sequence[int] | None = None) -> torch.Tensor:
        x, frames = as_frames(x, self.in_channels, self.size)
        t = self.timing(frames, steps, t)
        x = x[: t[0]]
        for stage, here, out in zip(self.stages, t, self.handed_on(t), strict=True):
            x = stage(x, here, steps_out=out)
        return self.head(self.hidden(x.flatten(2)))

    def kaiming(self) -> None:
        """Convolutions start from Kaiming's normal distribution (fan out)."""
        for stage in self.stages:
            nn.init.kaiming_normal_(stage.conv.weight, mode="fan_out", nonlinearity="relu")
