"""Training through all of a recording of 100,000 steps, in the memory of a window of it.

``python examples/long_recording.py`` writes recordings as files, [T, channels], bytes: noise as of a filter bank, in it
a keyword (a sweep over the channels) and other words, among them the keyword backwards. A network of two layers of LIF
neurons learns to tell at every step whether the keyword has just ended. ``nn.Windows`` runs it in windows of 250 steps,
which it reads from the files when it needs them; the gradient is that through all steps. Then the peak of memory:
over T in windows, and with all steps at once.

What a DataLoader hands over is no tensor but a ``Batch``, which has a length and gives windows.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from snnkern.models import SpikingMLP
from snnkern.nn import Windows

STEPS, WINDOW, CHANNELS, WORD, RECORDINGS, EPOCHS = 100_000, 250, 24, 60, 4, 3


def word(rng: np.random.Generator, kind: int) -> np.ndarray:
    """[WORD, CHANNELS]: energy that sweeps upwards (0, the keyword), downwards (1), or stays in one place (2)."""
    middle = np.linspace(3, CHANNELS - 4, WORD)
    middle = (middle, middle[::-1], np.full(WORD, rng.uniform(3, CHANNELS - 4)))[kind]
    energy = np.exp(-((np.arange(CHANNELS) - middle[:, None]) ** 2) / 4)
    return rng.uniform(60, 100) * energy * np.hanning(WORD)[:, None] ** 0.5


def record(path: Path, steps: int, seed: int) -> np.ndarray:
    """Writes a recording, piece by piece; returns where the keyword ended at most half a word ago, bool [steps]."""
    rng, after = np.random.default_rng(seed), np.zeros(steps, bool)
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (steps, CHANNELS))
    for begin in range(0, steps, 5 * WORD):
        piece = rng.gamma(2.0, 8.0, (min(5 * WORD, steps - begin), CHANNELS))
        if len(piece) == 5 * WORD:
            kind, at = rng.integers(3), rng.integers(3 * WORD)
            piece[at : at + WORD] += word(rng, kind)
            after[begin + at + WORD : begin + at + WORD * 3 // 2] = kind == 0
        file[begin : begin + len(piece)] = piece.clip(0, 255)
    return after


class Batch:
    """Recordings [T, channels] as one [T, N, channels] of small numbers around 0, read where it is looked at."""

    def __init__(self, recordings: list[np.ndarray]):
        self.recordings = recordings

    def __len__(self) -> int:
        return min(map(len, self.recordings))

    def __getitem__(self, window: slice) -> np.ndarray:
        return (np.stack([recording[window] for recording in self.recordings], 1).astype(np.float32) - 16) / 32


def together(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Batch, torch.Tensor]:
    """For a DataLoader: the recordings, unread, and targets [T, N]."""
    recordings, targets = zip(*samples, strict=True)
    return Batch(recordings), torch.from_numpy(np.stack(targets, 1)).long()


def train(net: nn.Module, loader: DataLoader, epochs: int) -> list[float]:
    """The losses."""
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(epochs):
        for x, target in loader:
            x = x if isinstance(net, Windows) else torch.from_numpy(x[:])
            loss = F.cross_entropy(net(x).flatten(0, 1), target.flatten(), weight=torch.tensor([1.0, 20.0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def network() -> nn.Module:
    torch.manual_seed(0)
    return SpikingMLP(CHANNELS, hidden=(128, 128), classes=2)


def peak() -> float:
    """The most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main(steps: int = STEPS, epochs: int = EPOCHS) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.npy" for i in range(RECORDINGS)]
        targets = [record(path, steps, seed) for seed, path in enumerate(paths)]
        samples = [(np.load(path, mmap_mode="r"), target) for path, target in zip(paths, targets, strict=True)]

        def loader(length: int) -> DataLoader:
            cut = [(recording[:length], target[:length]) for recording, target in samples]
            return DataLoader(cut, batch_size=2, collate_fn=together)

        train(Windows(network(), WINDOW), loader(2 * WINDOW), 1)
        before = peak()
        for length in (steps // 100, steps // 10):
            train(Windows(network(), WINDOW), loader(length), 1)
            print(f"windows of {WINDOW}, T = {length:7,}: {peak() - before:6.0f} MB")
        begun = time.perf_counter()
        losses = train(Windows(network(), WINDOW), loader(steps), epochs)
        seconds = (time.perf_counter() - begun) / len(losses)
        print(f"windows of {WINDOW}, T = {steps:7,}: {peak() - before:6.0f} MB, {seconds:.1f} s a step, "
              f"loss {losses[0]:.3f} to {losses[-1]:.3f}")  # fmt: skip
        train(network(), loader(steps), 1)
        print(f"all at once,    T = {steps:7,}: {peak() - before:6.0f} MB")
    return losses


if __name__ == "__main__":
    main()
