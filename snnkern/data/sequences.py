"""Images shown pixel by pixel or row by row: MNIST, and scikit-learn's digits in its place offline."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import TensorDataset

from .base import Data, one_of
from .images import mnist
from .scikit import load_digits_data


def sequential_mnist(root: Path | None = None, seed: int = 0, *, by: str = "pixel") -> Data:
    """``images.mnist``, normalised as there, as sequences.

    Args:
        by: ``"pixel"``: 784 steps of 1, row by row from the upper left; ``"row"``: 28 steps of 28.
    """
    one_of("by", by, ("pixel", "row"))
    return as_sequences(mnist(root, seed), by)


def sequential_digits(
    root: Path | None = None, seed: int = 0, *, by: str = "pixel", noise: float = 0.0, train: int = 600
) -> Data:
    """``scikit.digits`` as sequences: 64 steps of 1 pixel, or by row 8 steps of 8. They are hard enough without noise.

    ``by`` as of ``sequential_mnist``, ``noise`` and ``train`` as of ``digits``.
    """
    one_of("by", by, ("pixel", "row"))
    return as_sequences(load_digits_data(root, seed, noise=noise, train=train), by)


def as_sequences(data: Data, by: str) -> Data:
    """Images [1, H, W], all in memory, as [H W, 1] or [H, W]."""

    def part(held: TensorDataset) -> TensorDataset:
        x, y = held.tensors
        return TensorDataset(x.flatten(1).unsqueeze(2) if by == "pixel" else x.squeeze(1), y)

    train, test = part(data.train), part(data.test)
    return Data(train, test, data.classes, tuple(train.tensors[0].shape[1:]), True, train)
