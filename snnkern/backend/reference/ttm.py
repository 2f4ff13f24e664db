"""The temporal transformation in PyTorch operations: what every other backend must reproduce."""

from __future__ import annotations

from itertools import pairwise

import torch

from ...spec.layout import starts


def ttm(x, steps, time_dim):
    """``snnkern.ttm``; arguments checked by the caller. Sums are in the dtype of the state, those of gradients too."""
    frames = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).unbind(time_dim)
    first = starts(max(steps, len(frames)), min(steps, len(frames)))
    groups = [range(begin, end) for begin, end in pairwise(first)]
    if steps > len(frames):
        repeated = [frame for frame, group in zip(frames, groups, strict=True) for _ in group]
        return torch.stack(repeated, time_dim).to(x.dtype)
    return torch.stack([sum(frames[t] for t in group).to(x.dtype) for group in groups], time_dim)
