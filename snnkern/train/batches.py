"""The samples of an epoch, in batches, such that an epoch can be entered at any batch.

All that is random in an epoch is a function of (seed, stage, epoch): the order of the samples and the seeds with which
each sample is augmented and each step is computed. So there is no state of a random generator to save, and neither the
number of worker processes nor what happened before the epoch matters.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ..data.base import DataError

__all__ = ["Epoch", "Parts", "fetch", "to_device"]


@dataclass(frozen=True)
class Epoch:
    batches: list[torch.Tensor]  # of indices into the samples
    sample_seeds: torch.Tensor
    step_seeds: list[int]

    @classmethod
    def of(cls, key: tuple[int, ...], samples: int, batch: int, least: int = 1) -> Epoch:
        """The epoch of this (seed, stage, epoch). A last batch of fewer than ``least`` samples is left out."""
        digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        order = torch.randperm(samples, generator=generator)
        batches = [part for part in order.split(batch) if len(part) >= least]
        seeds = torch.randint(2**31, (samples + len(batches),), generator=generator)
        return cls(batches, seeds[:samples], seeds[samples:].tolist())


def fetch(
    dataset: Dataset, batches: Sequence[torch.Tensor], seeds: torch.Tensor | None = None, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(x, y) of every batch of indices. A TensorDataset is indexed by whole batches, others sample by sample, each
    with PyTorch's generator set to the sample's seed. DataError for a sample that cannot be read."""
    if isinstance(dataset, TensorDataset):
        yield from (dataset[index] for index in batches)
        return
    loaded = DataLoader(
        _Seeded(dataset, seeds),
        batch_sampler=[index.tolist() for index in batches],
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from loaded
    except DataError as error:  # a worker's has its traceback in the message
        raise DataError(str(error).rstrip().splitlines()[-1].removeprefix(f"{_NAME}: ")) from error


def to_device(
    x: torch.Tensor, y: torch.Tensor, device: torch.device, steps: int, events: bool, channels_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As models take them: images [N, C, H, W], or the first ``steps`` frames, [N, T, ...] to [T, N, ...]."""
    if events:
        if x.shape[1] < steps:
            raise ValueError(f"steps must be at most the number of frames, {x.shape[1]}, got {steps}")
        x = x[:, :steps].movedim(1, 0)
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    if channels_last and x.dim() > 3:  # a sequence has no channels
        folded = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        x = folded.unflatten(0, x.shape[:-3])
    return x, y


@dataclass(frozen=True)
class Parts:
    """(x, y) of every batch of indices as models take them, on the device, anew each time that this is gone through.

    The rest: see ``fetch`` and ``to_device``."""

    dataset: Dataset
    batches: Sequence[torch.Tensor]
    device: torch.device
    steps: int
    events: bool
    channels_last: bool = False
    seeds: torch.Tensor | None = None
    workers: int = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in fetch(self.dataset, self.batches, self.seeds, self.workers):
            yield to_device(x, y, self.device, self.steps, self.events, self.channels_last)


class _Seeded(Dataset):
    def __init__(self, dataset: Dataset, seeds: torch.Tensor | None) -> None:
        self.dataset, self.seeds = dataset, seeds

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        if self.seeds is not None:
            torch.default_generator.manual_seed(int(self.seeds[index]))
        return self.dataset[index]


_NAME = f"{DataError.__module__}.{DataError.__qualname__}"


def _leave_signals_to_the_parent(worker: int) -> None:
    """A terminal and ``kill -- -GROUP`` ask the whole group to stop; the parent finishes its step and ends us."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
