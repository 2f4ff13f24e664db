"""The bandwidth that a LIF layer reaches beside that of ``Tensor.copy_``, in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops.lif import lif

# T, N, dtype. On a GPU tensors are larger than its caches.
SIZES = {
    "cpu": [(4, 262144, torch.float32), (128, 4096, torch.float32), (1000, 4096, torch.float32),
            (1000, 4096, torch.bfloat16)],
    "gpu": [(4, 1 << 24, torch.float32), (128, 1 << 19, torch.float32), (1024, 1 << 16, torch.float32),
            (1024, 1 << 16, torch.bfloat16)],
}  # fmt: skip
STREAMS = 5  # x's bytes that cannot be avoided: x in, spikes out; x and their gradient in, that of x out
ROUNDS = 5, 200  # least and most


@dataclass(frozen=True)
class Measured:
    """Forward + backward of ``lif``: seconds; ``copy``: bytes per second that a copy reads and writes; ``share``: of
    that bandwidth, medians over the rounds."""

    backend: str
    steps: int
    neurons: int
    dtype: torch.dtype
    seconds: float
    copy: float
    share: float


def measure(backends: list[str], device: str, seconds: float) -> list[Measured]:
    """All backends of one device in turn with a copy, for about as long as that."""
    found = []
    sizes = SIZES["cpu" if device == "cpu" else "gpu"]
    for i, size in enumerate(sizes) if backends else ():
        begun = time.monotonic()
        found += _measure(backends, device, *size, seconds / (len(sizes) - i))
        seconds -= time.monotonic() - begun
    return found


def _measure(backends, device, steps, neurons, dtype, seconds) -> list[Measured]:
    size = steps * neurons * dtype.itemsize
    count = min(16, max(2, (1 << 25) // size)) if device == "cpu" else 1  # inputs in turn, so that caches hold none
    xs = [torch.randn(steps, neurons, dtype=dtype, device=device) for _ in range(count)]
    grads, targets = [torch.ones_like(x) for x in xs], [torch.empty_like(x) for x in xs]

    def copy(i: int) -> None:
        targets[i].copy_(xs[i])

    def layer(backend: str) -> Callable[[int], None]:
        def both(i: int) -> None:
            x = xs[i].detach().requires_grad_()
            lif(x, return_v=False, backend=backend)[0].backward(grads[i])

        return both

    calls = {"copy": copy, **{name: layer(name) for name in backends}}
    times = {name: [] for name in calls}
    begun, turn = time.monotonic(), 0
    for i in range(count + 1):  # until code is compiled, and memory has found its places
        for call in calls.values():
            call(i % count)
    while turn < ROUNDS[0] or (turn < ROUNDS[1] and time.monotonic() - begun < seconds):
        for name, call in calls.items():
            times[name].append(_seconds(call, turn % count, device))
        turn += 1
    bandwidth = 2 * size / statistics.median(times["copy"])
    shares = {
        name: statistics.median(STREAMS / 2 * a / b for a, b in zip(times["copy"], times[name], strict=True))
        for name in backends
    }
    return [
        Measured(name, steps, neurons, dtype, statistics.median(times[name]), bandwidth, shares[name])
        for name in backends
    ]


def _seconds(call: Callable[[int], None], i: int, device: str) -> float:
    if device == "cpu":
        begun = time.perf_counter()
        call(i)
        return time.perf_counter() - begun
    event = getattr(torch, device).Event
    start, stop = event(enable_timing=True), event(enable_timing=True)
    start.record()
    call(i)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
