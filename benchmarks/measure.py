"""Clocks, memory, and rounds in which all take turns. Nothing here knows what is measured."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

Mark = Callable[[], None]


@dataclass(frozen=True)
class Call:
    """``run(i, mark)`` does the work on the i-th buffers and marks moments; a mode is the time between two of them."""

    contender: str
    run: Callable[[int, Mark], None]
    modes: dict[str, tuple[int, int]]


class Clock:
    """Seconds per mode of one call."""

    def __call__(self, call: Call, i: int) -> list[float]:
        moments = []
        call.run(i, lambda: moments.append(self.now()))
        return [self.between(moments[start], moments[stop]) for start, stop in call.modes.values()]

    def now(self):
        return time.perf_counter()

    def between(self, start, stop) -> float:
        return stop - start


class WaitingClock(Clock):
    """On a GPU, what the caller waits for a single call."""

    def now(self):
        torch.cuda.synchronize()
        return time.perf_counter()


class CudaClock(Clock):
    """On a GPU, its own time, with nothing of the inputs left in its second-level cache.

    It is emptied by reading: what is written would be written back during the call.
    """

    def __init__(self):
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.filler = torch.zeros(size, device="cuda")  # of 4 bytes

    def __call__(self, call, i):
        self.filler.sum()
        return super().__call__(call, i)

    def now(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, stop):
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


def clock_for(workload, device: str) -> Clock:
    if device == "cpu":
        return Clock()
    return WaitingClock() if workload.group == "overhead" else CudaClock()


def interleave(
    calls: list[Call], clock: Clock, rounds: int, share: float, least: int = 3
) -> dict[tuple[str, str], list[float]]:
    """Seconds by contender and mode, one per round: the median of as many repeats as fit ``share`` seconds, 1 to 20.

    Every round runs all calls one after the other, so that a machine whose speed drifts drifts for all. Calls that take
    long leave after ``least`` rounds, or as many as fit 20 shares.
    """
    longest = [max(clock(call, 0)) for call in calls]
    for turn in range(1, 4):  # until memory has found its places
        longest = [max(clock(call, turn)) if s < 20 * share else s for call, s in zip(calls, longest, strict=True)]
    repeats = [max(1, min(20, int(share / max(s, 1e-7)))) for s in longest]
    last = [max(least, min(rounds, int(20 * share / max(s, 1e-7)))) for s in longest]
    count = 0
    times = {(call.contender, mode): [] for call in calls for mode in call.modes}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for call, repeat, stop, s in zip(calls, repeats, last, longest, strict=True):
                if turn >= stop:
                    continue
                if s < 10 * share:
                    clock(call, count)  # code, buffers and memory have gone to others since its last turn
                spans = [clock(call, count + i + 1) for i in range(repeat)]
                count += repeat
                for mode, seconds in zip(call.modes, zip(*spans, strict=True), strict=True):
                    times[call.contender, mode].append(statistics.median(seconds))
    finally:
        gc.enable()
    return times


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Of one call, roughly."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def kept(run: Callable[[], object], besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward of what ``run`` returns, but for those of ``besides``.

    Where ``run`` has saved-tensor hooks of its own, what they make of a tensor counts.
    """
    seen, enter = {}, saved_tensors_hooks.__enter__

    def counted(hooks):
        pack = hooks.pack_hook

        def count(tensor):
            packed = pack(tensor)
            for leaf in tree_leaves(packed.args if isinstance(packed, partial) else packed):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
            return packed

        hooks.pack_hook = count
        return enter(hooks)

    with patch.object(saved_tensors_hooks, "__enter__", counted), saved_tensors_hooks(lambda t: t, lambda t: t):
        result = run()
    del result  # until here it kept the storages, and their addresses, apart
    apart = {tensor.untyped_storage().data_ptr() for tensor in besides}
    return sum(size for address, size in seen.items() if address not in apart)


def peak(run: Callable[[], object], device: str) -> int | None:
    """Most memory during ``run``, beyond that before it, in bytes; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory would be used again without a trace
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, reset = _status("VmRSS"), _status("VmHWM")
    except (OSError, AttributeError, KeyError):
        return None
    run()
    return max(0, _status("VmHWM") - before) if reset - before < 2**20 else None


def _status(field: str, path: str = "/proc/self/status") -> int:
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


def available(device: str) -> float:
    """Bytes of memory that are free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        return _status("MemAvailable", "/proc/meminfo")
    except (OSError, KeyError):
        return math.inf


def buffers(size: int, device: str) -> int:
    """Inputs of ``size`` bytes to take in turn, so that none is in the cache when its turn comes; 16 at most.

    On a GPU the clock sees to that.
    """
    if device == "cuda":
        return 1
    try:
        cache = 1024 * int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().removesuffix("K\n"))
    except (OSError, ValueError):
        cache = 2**25
    return max(1, min(16, math.ceil(2 * cache / size)))
