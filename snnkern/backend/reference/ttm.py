"""The temporal transformation in PyTorch operations: what every other backend must reproduce."""

from __future__ import annotations

from itertools import pairwise

import torch

from ...spec.layout import starts


def ttm(x, steps, time_dim):
    """``snnkern.ttm``; arguments checked by the caller."""
    frames = x.unbind(time_dim)
    first = starts(max(steps, len(frames)), min(steps, len(frames)))
    groups = [range(begin, end) for begin, end in pairwise(first)]
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    if steps > len(frames):  # by way of the state's dtype, in which the gradient of a frame is then summed
        pairs = zip((frame.to(state) for frame in frames), groups, strict=True)
        return torch.stack([frame for frame, group in pairs for _ in group], time_dim).to(x.dtype)
    return torch.stack([sum(frames[t].to(state) for t in group).to(x.dtype) for group in groups], time_dim)
