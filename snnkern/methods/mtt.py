"""Mixed time-step training (MTT): every stage of a network at its own number of time steps, drawn anew for each pass.

For every batch, s temporal configurations t = (t_1, ..., t_n) are drawn, and one update follows the sum of the
gradients of all:

::

    L_MTT = sum over s samples of  L(S(x, t), y),   t_i uniform on {low, ..., high}      (eq. 10, algorithm 1)

L is any loss of the outputs; the sum is not divided by s. S is a network whose stages are joined by temporal
transformations (``snnkern.models.Staged``, ``snnkern.ttm``). Naive mixture training (NMT) draws one number for all
stages (``granularity="network"``). The trained network runs at any uniform T, once its batch norms are calibrated:
sums over steps make their running statistics a mixture that fits no T.

Source: Du et al., "Temporal Flexibility in Spiking Neural Networks: Towards Generalization Across Time Steps and
Deployment Friendliness", ICLR 2025, section 4. What it leaves open is chosen here: configurations that must not grow
(A.12) are drawn uniformly from all of these, as the others are from all there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..nn.modes import keeping_buffers, with_batch_statistics
from ..spec.arguments import positive

__all__ = ["Sampler", "calibrate"]


@dataclass(frozen=True)
class Sampler:
    """Temporal configurations, uniform over all that the settings allow.

    Args:
        low, high: bounds of every t_i, both included.
        granularity: so many neighbouring stages share one number; ``"network"``: all do.
        monotone: t_i never grows with i: for sequences, whose early stages encode time (A.12).
        first_fixed: the first stage runs at ``high``, such as all frames of a sequence.
    """

    low: int
    high: int
    granularity: int | str = 1
    monotone: bool = False
    first_fixed: bool = False

    def __post_init__(self) -> None:
        if positive("low", self.low) > positive("high", self.high):
            raise ValueError(f"low must be at most high, {self.high}, got {self.low}")
        if self.granularity != "network":
            positive("granularity", self.granularity)

    @property
    def mean(self) -> float:
        """Of every t_i that is drawn, not of one that is fixed."""
        return (self.low + self.high) / 2

    def draw(self, stages: int, generator: torch.Generator) -> tuple[int, ...]:
        """A configuration of so many stages."""
        size = positive("stages", stages) if self.granularity == "network" else self.granularity
        fixed = (self.high,) * min(size, stages) if self.first_fixed else ()
        groups, values = -(-(stages - len(fixed)) // size), self.high - self.low + 1
        if self.monotone:  # multisets of values, as subsets of a longer row: each as often
            chosen = torch.randperm(values + groups - 1, generator=generator)[:groups].sort().values
            drawn = (chosen - torch.arange(groups)).flip(0)
        else:
            drawn = torch.randint(values, (groups,), generator=generator)
        free = [self.low + value for value in drawn.tolist() for _ in range(size)]
        return (*fixed, *free)[:stages]


@torch.no_grad()
def calibrate(
    model: nn.Module, parts: Iterable[torch.Tensor], steps: int | None = None, t: Sequence[int] | None = None
) -> None:
    """Estimates the running statistics of all batch norms anew, as the averages over ``parts``.

    Weights, modes and momenta stay as they are; what else has a training mode is in eval mode meanwhile. When
    interrupted, the statistics are as before. A model without batch norms is left alone.

    Args:
        model: called as ``model(x)``, with ``steps`` or ``t`` where given.
        parts: batches of training samples as the model takes them, augmented as in training; published: 10.
        steps, t: at which to calibrate. The published choice is the greatest T of training, whose statistics serve
            every uniform T (A.7); a configuration may have its own.

    Raises: ValueError if there is no batch.

    Source: Du et al., ICLR 2025, section 4.3.2, and its published code.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not norms:
        return
    options = {name: value for name, value in (("steps", steps), ("t", t)) if value is not None}
    momenta = [norm.momentum for norm in norms]
    try:
        with keeping_buffers(model, only_on_error=True), with_batch_statistics(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average over all batches
            for x in parts:
                model(x, **options)
            if not norms[0].num_batches_tracked:
                raise ValueError("parts must hold one batch at least, got none")
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
