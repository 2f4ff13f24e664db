"""Others' surrogate gradients that have no formula here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..surrogate import Table

ERROR = 2e-7  # of the peak: what rounding makes of a gradient
FAR = 128.0


def sampled(derivative: Callable[[torch.Tensor], torch.Tensor]) -> Table:
    """The smallest table of ds/dh, a function of ``h - threshold``, within ``ERROR``; ValueError if there is none."""
    x = torch.linspace(-FAR, FAR, (1 << 16) + 1, dtype=torch.float64, device="cpu")
    wanted = derivative(x)
    ends = torch.where(x < 0, wanted[0], wanted[-1])
    within = x[(wanted - ends).abs() > ERROR * wanted.abs().max()]
    reach = within.abs().max().item() if len(within) else 0.0
    half_width = 2.0 ** math.ceil(math.log2(reach + FAR / (1 << 15)))
    for cells in (1 << 12, 1 << 14, 1 << 16):
        table = Table(derivative, half_width, cells)
        if max(table.error, table.tail) <= ERROR:
            return table
    raise ValueError(
        f"its surrogate gradient cannot be sampled: a table misses it by {max(table.error, table.tail):.0e} of its peak"
    )
