"""A model looked at, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["evaluating", "keeping_buffers", "with_batch_statistics"]


def evaluating(model: nn.Module):
    """Eval mode; afterwards every module has its own mode again."""
    return _modes(model, ())


def with_batch_statistics(model: nn.Module):
    """Batch norms use the statistics of the batch, all else, such as dropout, is in eval mode; modes are afterwards
    what they were."""
    return _modes(model, _NormBase)


@contextmanager
def _modes(model: nn.Module, training: type | tuple[type, ...]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = isinstance(module, training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def keeping_buffers(model: nn.Module, only_on_error: bool = False) -> Iterator[None]:
    """Buffers, such as running statistics, are afterwards what they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    put_back = True
    try:
        yield
        put_back = not only_on_error
    finally:
        if put_back:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
