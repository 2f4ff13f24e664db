"""One process, or the several that torchrun starts, on one machine or more.

Every process holds the same model. Of each batch, process r takes the samples r, r + size, ...; batch norms take their
statistics from all processes, and gradients are summed. What comes out is therefore, but for rounding, what one process
computes with the whole batch. Only the first process writes.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..nn import BNLIF, TdBatchNorm
from .folder import RunError, reason

__all__ = ["World", "leave", "working", "world"]


@dataclass(frozen=True)
class World:
    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def autocast(self, amp: str):
        """To ``bfloat16`` or ``float16``; ``off``: no autocast."""
        return torch.autocast(self.device.type, getattr(torch, amp, None), enabled=amp != "off")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all processes, which all must call this."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For every flag, whether a process has it set; all call this at the same step and get the same answer."""
        if self.size == 1:
            return list(flags)
        return [value > 0 for value in self.sum(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def share(self, value):
        """The first process's value, to all."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as one of many: its norms take the statistics of all processes, backward averages gradients."""
        if self.size == 1:
            return model
        for module in model.modules():
            if isinstance(module, (BNLIF, TdBatchNorm)):
                module.process_group = dist.group.WORLD
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise TypeError(f"with several processes, batch norms must be snnkern.nn's; the model has {module!r}")
        ddp = nn.parallel.DistributedDataParallel
        # Running statistics come from the same sums everywhere: they are equal without being sent.
        buffers = {"forward_sync_buffers", "broadcast_buffers"} & inspect.signature(ddp).parameters.keys()
        ids = [self.device.index] if self.device.type == "cuda" else None
        return ddp(model, device_ids=ids, **{max(buffers): False})  # the former, newer one where there are both


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """This process and its place among those that torchrun started, if it did (RANK and WORLD_SIZE are set).

    ``auto`` is the GPU that belongs to this process (LOCAL_RANK), if there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    try:
        place = torch.device("cuda", local) if device == "cuda" else torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        found = str(error).splitlines()[0]
        raise RunError(f"device must be one that PyTorch can use here, got {device!r}: {found}") from error
    ours = size > 1 and not dist.is_initialized()
    try:
        if ours:
            # gloo, too, where there are GPUs: World.any and World.share talk between processors
            dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
        if place.type == "cuda" and size > 1:
            torch.cuda.set_device(place)
        yield World(place, dist.get_rank(), size) if size > 1 else World(place)
    except RuntimeError as error:
        if isinstance(error, RunError) or not (what := _from_outside(error)):
            raise
        raise RunError(f"{what} ({reason(error)}); a training goes on from its last checkpoint") from error
    finally:
        if ours and dist.is_initialized():
            leave()


def _from_outside(error: RuntimeError) -> str | None:
    """What happened to the process rather than in it; PyTorch has few classes for that."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another of the processes ended or cannot be reached"
    if "DataLoader worker" in str(error):
        return "a worker that loads data was killed, as where memory runs out; fewer workers need less"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "memory ran out; a smaller batch, accumulate, packed or windows need less"
    return None


def leave() -> None:
    """Ends the process group, and gives gloo's threads, which outlive it where there was DDP, the time to let go of the
    last call's tensors. For that they need the interpreter: if it ended before, the process would sometimes abort."""
    dist.destroy_process_group()
    time.sleep(0.2)


@contextmanager
def working(device: str = "auto", threads: int = 0, deterministic: bool = False) -> Iterator[World]:
    """``world``, with so many threads of the processor (0: as many as PyTorch has now); generators, thread count and
    determinism are afterwards what they were."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with world(device) as where, torch.random.fork_rng([where.device] if where.device.type == "cuda" else []):
        torch.set_num_threads(threads or before[0])
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        try:
            yield where
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])
