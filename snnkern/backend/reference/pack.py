"""Spikes to bits and back in PyTorch operations: what every other backend must reproduce."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ...spec.layout import INTEGERS


def pack(x, bits, check):
    """Writes element i of x to bit i % 8 of byte i // 8 of ``bits``, uint8 [ceil(n / 8)].

    With ``check``, returns whether x holds nothing but 0 and 1, bit for bit; else True, or that if it costs nothing.
    """
    u, one = x.view(INTEGERS[x.dtype]).view(-1), _one(x)
    ones = pad(u == one, (0, -len(u) % 8)).view(-1, 8)
    torch.sum(ones << _lane(x), 1, dtype=torch.uint8, out=bits)
    return not check or bool(((u == 0) | (u == one)).all())


def unpack(bits, x):
    """The n elements of x become the first n bits."""
    x.view(-1).copy_((bits[:, None] >> _lane(x) & 1).view(-1)[: x.numel()])


def _one(x):
    return torch.ones((), dtype=x.dtype, device=x.device).view(INTEGERS[x.dtype])


def _lane(x):
    return torch.arange(8, dtype=torch.uint8, device=x.device)
