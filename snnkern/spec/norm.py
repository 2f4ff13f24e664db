"""Batch norm before the neurons, as plain data."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed

ROWS = 5  # of the table; csrc/norm.h's kNormRows


class Batch(NamedTuple):
    """How to normalise, besides tensors."""

    training: bool
    momentum: float
    eps: float
    scale: float
    group: torch.distributed.ProcessGroup | None


class Norm(NamedTuple):
    """What kernels need to normalise as they load: csrc/lif.h's Norm."""

    channels: int
    period: int
    table: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Plan(NamedTuple):
    """From sums to the table, and to gradients: csrc/norm.h's NormPlan but for dtype, channels and parts."""

    count: float
    unbiased: float
    momentum: float
    eps: float
    scale: float


class Parameters(NamedTuple):
    """[channels] each; None: weight 1, bias 0, no running statistics. csrc/norm.h's NormParameters."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
