"""What the networks named ResNet share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ..ops.ttm import ttm
from ..spec.arguments import flag, positive
from .layers import ConvNorm, Neurons, Stage, Staged, as_frames, over_steps, per_frame


class BasicBlock(nn.Module):
    """``LIF(norm(conv(LIF(norm(conv(x))))) + shortcut(x))``: the shortcut adds to what the second neurons receive.

    Convolutions are 3x3, the first with the stride. The shortcut is the identity or, where the shape changes,
    norm(conv 1x1) with the stride; ``pooled_shortcut``: with an average over stride x stride instead, which at the end
    of an odd size is one over what is there.

    ``scale`` is tdBN's factor for the first norm, ``last`` for the two that are added up.

    Source: Zheng et al., AAAI 2021 (block); He et al., "Bag of Tricks", CVPR 2019 (pooled shortcut).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        neurons: Neurons,
        scale: float = 1.0,
        last: float = 1.0,
        pooled_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.first = Stage(inputs, outputs, neurons, stride=stride, scale=scale)
        self.second = Stage(outputs, outputs, neurons, scale=last)
        self.pool = nn.Identity()
        if stride == 1 and inputs == outputs:
            self.shortcut = None
        elif pooled_shortcut:
            if stride > 1:
                self.pool = nn.AvgPool2d(stride, ceil_mode=True)
            self.shortcut = ConvNorm(inputs, outputs, kernel=1, scale=last)
        else:
            self.shortcut = ConvNorm(inputs, outputs, kernel=1, stride=stride, scale=last)

    def forward(self, x: torch.Tensor, steps: int, steps_out: int | None = None) -> torch.Tensor:
        if self.shortcut is None:
            shortcut = over_steps(x, steps)
        else:
            shortcut = self.shortcut(per_frame(self.pool, x), steps)
        return self.second(self.first(x, steps), steps, shortcut, steps_out)


class SEWBlock(nn.Module):
    """``IF(norm(conv(IF(norm(conv(x)))))) g shortcut(x)``: the neurons fire before the two meet.

    ``connect`` names g, of the block's output y and the shortcut's x: ADD, x + y, whole numbers that grow by one per
    block; AND, x*y; IAND, x*(1 - y); these two are binary. The shortcut is the identity, or IF(norm(conv 1x1)) where
    the shape changes.

    Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks", NeurIPS 2021, section 3.2 and table 1.
    """

    CONNECT = {  # noqa: RUF012
        "ADD": lambda x, y: x + y,
        "AND": lambda x, y: x * y,
        "IAND": lambda x, y: x * (1 - y),
    }

    def __init__(self, inputs: int, outputs: int, stride: int, neurons: Neurons, connect: str = "ADD") -> None:
        super().__init__()
        if not isinstance(connect, str) or connect not in self.CONNECT:
            raise ValueError(f"connect must be one of {', '.join(self.CONNECT)}, got {connect!r}")
        self.connect = connect
        self.first = Stage(inputs, outputs, neurons, stride=stride)
        self.second = Stage(outputs, outputs, neurons)
        identity = stride == 1 and inputs == outputs
        self.shortcut = None if identity else Stage(inputs, outputs, neurons, kernel=1, stride=stride)

    def forward(self, x: torch.Tensor, steps: int, steps_out: int | None = None) -> torch.Tensor:
        y = self.second(self.first(x, steps), steps)
        shortcut = over_steps(x, steps) if self.shortcut is None else self.shortcut(x, steps)
        joined = self.CONNECT[self.connect](shortcut, y)
        return joined if steps_out is None else ttm(joined, steps_out)


class Residual(Staged):
    """A stem, blocks, the average over space, linear layers. Every block is a stage; the stem belongs to the first.

    Args:
        stem: (channels, kernel, stride) of each stage.
        groups: (channels, number of blocks, stride of the first) of each group of blocks.
        block: makes one, of (inputs, outputs, stride).
        neurons: makes the neurons.
        classes: number of outputs.
        in_channels: of the images; any height and width.
        steps: default number of time steps T for static images.
        scale: of the stem's norms: tdBN's factor.
        hidden: width of a linear layer with neurons before the last, or None for none.
        pool: of the stem's spikes.
    """

    def __init__(
        self,
        stem: Iterable[tuple[int, int, int]],
        groups: Iterable[tuple[int, int, int]],
        block: Callable[[int, int, int], nn.Module],
        neurons: Neurons,
        classes: int,
        in_channels: int,
        steps: int,
        scale: float = 1.0,
        hidden: int | None = None,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.steps = positive("steps", steps)
        self.in_channels = width = positive("in_channels", in_channels)
        self.stem, self.blocks = nn.ModuleList(), nn.ModuleList()
        for channels, kernel, stride in stem:
            self.stem.append(Stage(width, channels, neurons, kernel, stride, scale=scale))
            width = channels
        self.pool = nn.Identity() if pool is None else pool
        for channels, number, stride in groups:
            for i in range(number):
                self.blocks.append(block(width, channels, 1 if i else stride))
                width = channels
        self.hidden = nn.Sequential()
        if hidden is not None:
            self.hidden.extend((nn.Linear(width, positive("hidden", hidden)), neurons()))
            width = hidden
        self.head = nn.Linear(width, positive("classes", classes))

    def stage_modules(self) -> list[tuple[nn.Module, ...]]:
        stages = [(block,) for block in self.blocks]
        stages[0] = (*self.stem, *stages[0])
        stages[-1] = (*stages[-1], self.hidden)
        return stages

    def forward(self, x: torch.Tensor, steps: int | None = None, t: Sequence[int] | None = None) -> torch.Tensor:
        x, frames = as_frames(x, self.in_channels)
        t = self.timing(frames, steps, t)
        x = x[: t[0]]
        for stage in self.stem:
            x = stage(x, t[0])
        x = per_frame(self.pool, x)
        for block, here, out in zip(self.blocks, t, self.handed_on(t), strict=True):
            x = block(x, here, out)
        return self.head(self.hidden(x.mean((3, 4))))

    def zero_init(self, wanted: bool, bias: float = 0.0) -> None:
        """If wanted, the last norm of every block starts with weight 0 and this bias: at first only shortcuts count."""
        flag("zero_init", wanted)
        if wanted:
            for block in self.blocks:
                nn.init.zeros_(block.second.norm.weight)
                nn.init.constant_(block.second.norm.bias, bias)
