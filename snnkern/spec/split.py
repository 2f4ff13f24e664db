"""Exact parallelism over time, for when neurons alone cannot keep a device busy.

Time is cut into segments that run side by side. Each begins from a guess and is checked:

1. The state forgets. After a hard reset it does not depend on the past; without one a difference shrinks by the leak at
   every step, until the floats coincide. So a segment first runs through the ``warmup`` steps before it, from rest and
   without output, and then knows its true start, nearly always.
2. Nearly is not enough: the end of each segment is compared, bit for bit, with the start that the next one assumed.
   Neurons that differ run through that segment again, from the true start.

The spikes are those of the serial loop for every input; only the time taken depends on it. The adjoint is a linear
recurrence in time, backwards; each backend says how it splits that one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

CHUNK = 16  # csrc/lif.h's kChunk: steps between the potentials kept for backward
# Powers of 2 by which a difference between potentials shrinks while a segment warms up. Floats have 24 (53) bits; in
# simulations (benchmarks/NOTES.md) all but one in a thousand coincided within 48. The rest are repaired.
BITS = {torch.float32: 56, torch.float64: 120}

A_THREAD = 65536  # elements that are worth waking another one; csrc/cpu/lif.cpp's kWorth, twice
A_LAUNCH = 512  # steps of a GPU's serial loop that take about as long as one more launch


class Split(NamedTuple):
    """Segments of time, their length in steps (the last may be shorter), and the steps each warms up on before it."""

    segments: int
    steps: int
    warmup: int

    def scratch(self, layout, state: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """What the kernels need beyond the tensors of one segment; see csrc/lif.h."""
        if self.segments == 1:
            return None
        return torch.empty((2, self.segments, layout.outer * layout.inner), dtype=state, device=device)


def parts_of(whole: torch.Tensor | None, segments: int) -> torch.Tensor | None:
    """Where segments write their parts of a sum over time, [segments, n]; of one segment, or no sum, ``whole``."""
    return whole if whole is None or segments == 1 else whole.new_empty((segments, whole.numel()))


def add_up(parts: torch.Tensor | None, whole: torch.Tensor | None) -> None:
    """Makes the sum, whose memory is dense in any order of its dimensions, of what ``parts_of`` gave room for."""
    if parts is not whole:
        torch.sum(parts, 0, out=whole.as_strided(parts.shape[1:], (1,)))


@lru_cache(maxsize=512)
def split(steps: int, most: int, shortest: int, warmup: int = 0) -> Split:
    """At most ``most`` segments, none but the last shorter than ``shortest`` steps."""
    segments = min(most, steps // shortest)
    if segments < 2:
        return Split(1, steps, 0)
    length = _chunks(steps / segments)
    return Split(-(-steps // length), length, warmup)


@lru_cache(maxsize=512)
def warmup(gain: float, state: torch.dtype) -> int:
    """Steps after which a potential that is multiplied by ``gain`` at each has forgotten where it started."""
    if not abs(gain) < 1:
        return 1 << 30
    return _chunks(BITS[state] / -math.log2(abs(gain))) if gain else CHUNK


def for_cpu(steps: int, neurons: int, gain: float, state: torch.dtype, threads: int) -> Split:
    """Both directions. Threads can share neurons too: that leaves each with short rows, and needs no warm-up."""
    if steps * neurons < A_THREAD:
        return Split(1, steps, 0)
    warm = warmup(gain, state)
    return split(steps, threads // -(-neurons // 512), 4 * warm, warm)


def for_gpu(steps: int, neurons: int, processors: int, shortest: int, warm: int = 0) -> Split:
    """Forward, and with ``warm = 0`` backward, whose split needs no warm-up."""
    enough = processors * 1024 // max(neurons, 1)
    quickly_composed = math.isqrt(steps) // 3  # one thread looks at all segments of a neuron
    found = split(steps, min(enough, quickly_composed), shortest, warm)
    return found if found.warmup + found.steps + A_LAUNCH <= steps else Split(1, steps, 0)


def _chunks(steps: float) -> int:
    return math.ceil(steps / CHUNK) * CHUNK
