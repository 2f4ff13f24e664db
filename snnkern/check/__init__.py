"""What a user runs on his own machine to believe us: every backend that can run there against the reference.

Random calls (``calls.py``) of every op, from a seed. Spikes, potentials and what is packed must be the reference's bit
for bit. What is rounded otherwise may differ by SLACK times the bound of ``spec/bounds.py``, relative to its norm:

- gradients; where it is greater, relative to the norm of the input's gradient, as gradients of parameters are sums in
  which terms cancel. The bound alone is for tens of steps; rounding adds up over the thousands of steps that are drawn
  here, most of all in neurons that forget nothing. A recurrent weight's, a product of rounded gradients, by the bound
  of the input's dtype. Those that overflow in the reference are not compared;
- the product of ``linear``, and batch norm's running statistics;
- float64 potentials behind batch norm, whose statistics are rounded in all other dtypes.

Then, ``bandwidth.py``, how near kernels come to the speed of a copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import torch

from ..backend import backends
from ..backend.triton import interpreted
from ..spec.bounds import gradient_bound
from ..spec.layout import DTYPES
from .bandwidth import Measured, measure
from .calls import Call, draw_call, draw_variant

__all__ = ["HEADER", "MEASURED_HEADER", "NOTE", "Call", "Failure", "Report", "run", "runnable"]

ORDER = ("lif", "bn_lif", "lif", "recurrent_lif", "lif", "ttm", "lif", "linear", "lif", "pack")
SLACK = 4
SIZES = 4  # calls in which a GPU's kernels are tried, as compiling them takes longer than the calls
SWEEP = 0.85  # of the seconds; in the rest bandwidth is measured
HEADER = "backend", "op", "calls", "elements", "T to", "spikes", "gradients*"
MEASURED_HEADER = "backend", "dtype", "T", "N", "ms", "copy, GB/s", "of a copy's"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


NOTE = "* The greatest error as a part of what is allowed: of the gradient's norm " + ", ".join(
    f"{SLACK * gradient_bound(dtype):.0e} in {_short(dtype)}" for dtype in DTYPES
)


@dataclass(frozen=True)
class Failure:
    """A call whose results differ from the reference's, and how."""

    call: Call
    backend: str
    what: str


@dataclass
class Tried:
    """Of one backend and op. ``worst``: the largest error of a gradient, as a part of what is allowed."""

    calls: int = 0
    elements: int = 0
    steps: int = 0
    unequal: int = 0  # calls in which something differed that must not differ at all
    failed: int = 0
    worst: float = 0.0
    failure: Failure | None = None  # the smallest


@dataclass
class Report:
    tried: dict[tuple[str, str], Tried] = field(default_factory=dict)  # by backend and op
    measured: list[Measured] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)  # backends and reasons

    @property
    def calls(self) -> int:
        return sum(each.calls for each in self.tried.values())

    @property
    def failed(self) -> int:
        return sum(each.failed for each in self.tried.values())

    @property
    def failures(self) -> list[Failure]:
        return [each.failure for each in self.tried.values() if each.failure]

    def rows(self) -> list[list[str]]:
        """Under HEADER."""
        lines = []
        order = [*backends()]
        for (backend, op), tried in sorted(self.tried.items(), key=lambda item: order.index(item[0][0])):
            steps, spikes = (f"{tried.steps:,}", "equal") if op != "linear" else ("-", "-")
            spikes = f"{tried.unequal:,} differ" if tried.unequal else spikes
            counts = [f"{tried.calls:,}", f"{tried.elements / 1e3:,.0f} k", steps]
            lines.append([backend, op, *counts, spikes, f"{tried.worst:.2g}"])
        return lines

    def measured_rows(self) -> list[list[str]]:
        """Under MEASURED_HEADER."""
        return [
            [m.backend, _short(m.dtype), f"{m.steps:,}", f"{m.neurons:,}", f"{1e3 * m.seconds:.2f}",
             f"{m.copy / 1e9:.1f}", f"{100 * m.share:.0f} %"]
            for m in self.measured
        ]  # fmt: skip

    def add(self, call: Call, backend: str, unequal: list[str], beyond: list[str], worst: float) -> None:
        tried = self.tried.setdefault((backend, call.op), Tried())
        tried.calls += 1
        tried.elements += call.elements
        tried.steps = max(tried.steps, call.steps)
        tried.worst = max(tried.worst, worst)
        tried.unequal += bool(unequal)
        if unequal or beyond:
            tried.failed += 1
            if tried.failure is None or call.elements < tried.failure.call.elements:
                tried.failure = Failure(call, backend, "; ".join(unequal + beyond))


def runnable(wish: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """The backends to check, with the device of each, and the others with the reason.

    Without a ``wish``, all that can run but Triton's interpreter.
    """
    found, left = {}, {name: reason for name, reason in backends().items() if reason and wish in (None, name)}
    for name in (name for name in backends() if name != "reference" and name not in left and wish in (None, name)):
        if name == "triton" and interpreted():
            if wish is None:
                left[name] = "TRITON_INTERPRET=1: its interpreter is checked with --backend triton"
                continue
            found[name] = "cpu"
        else:
            found[name] = "cpu" if name == "cpu" else "cuda" if torch.cuda.is_available() else "xpu"
    return found, left


def run(
    report: Report, where: dict[str, str], seconds: float, seed: int, watch: Callable[[float, str], None] = print
) -> None:
    """Fills ``report`` for the backends of ``where`` (see ``runnable``); what it holds stands when this is interrupted.

    ``watch`` is told the seconds that have passed, and what is under way.
    """
    begun, devices = time.monotonic(), dict.fromkeys(where.values())
    for call, backend, *found in sweep(where, seed):
        report.add(call, backend, *found)
        passed = time.monotonic() - begun
        watch(passed, f"{report.calls:,} calls")
        if passed >= SWEEP * seconds:
            break
    for device in devices:
        names = [name for name, other in where.items() if other == device and not (name == "triton" and interpreted())]
        watch(time.monotonic() - begun, f"bandwidth of {', '.join(names)}")
        try:
            report.measured += measure(names, device, (1 - SWEEP) * seconds / len(devices))
        except RuntimeError as error:  # such as memory that a GPU does not have
            report.not_measured |= dict.fromkeys(names, f"{type(error).__name__}: {error}")


def sweep(where: dict[str, str], seed: int) -> Iterator[tuple[Call, str, list[str], list[str], float]]:
    """A call, the backend that ran it, and what ``compare`` found, without end. Devices get equal time.

    The calls on a device are always the same for a seed. After an error on a GPU there are no more there: whatever runs
    next would meet it too.
    """
    spent = dict.fromkeys(where.values(), 0.0)
    calls = {device: _calls([name for name in where if where[name] == device], device, seed) for device in spent}
    while min(spent.values()) < math.inf:
        device = min(spent, key=spent.get)
        begun = time.monotonic()
        call, names = next(calls[device])
        wanted = call.run("reference")
        for name in names:
            try:
                found = compare(call, call.run(name), wanted)
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"], [], 0.0
                if device != "cpu":
                    spent[device] = math.inf
            yield call, name, *found
            if spent[device] == math.inf:
                break
        spent[device] += time.monotonic() - begun


def _calls(names: list[str], device: str, seed: int) -> Iterator[tuple[Call, list[str]]]:
    """Calls, and the backends that take them."""
    random, small, ops = Random(f"{seed} {device}"), device == "cpu" and "triton" in names, ORDER
    dtypes = [torch.float32, torch.float32, torch.float16]
    if not small:  # the interpreter cuts float32 off to bfloat16 where a GPU rounds
        dtypes.append(torch.bfloat16)
    if names == ["cpu"]:
        dtypes.append(torch.float64)
    if "cpu" not in names:
        ops = [op for op in ORDER if op != "linear"]  # which has kernels on the CPU alone
    while True:
        for op in ops:
            variant = draw_variant(random, op, dtypes)
            for _ in range(1 if device == "cpu" else SIZES):
                yield draw_call(random, variant, device, small), names


def compare(call: Call, got: dict, wanted: dict) -> tuple[list[str], list[str], float]:
    """What differs that must not, what differs by more than is allowed, and the greatest error as a part of that."""
    unequal, beyond, worst = [], [], 0.0
    of_input = next(wanted[name].double().norm() for name in wanted if name.startswith("gradient of "))
    for name, true in wanted.items():
        own, bound = got[name], _bound(call, name, true.dtype)
        if own.shape != true.shape or own.dtype != true.dtype:
            unequal.append(f"{name}: {own.dtype} {tuple(own.shape)}, not {true.dtype} {tuple(true.shape)}")
        elif not bound:
            if not torch.equal(own, true):
                unequal.append(f"{name}: {(own != true).sum()} of {own.numel()} differ")
        elif true.isfinite().all():
            error, norm = (own.double() - true.double()).norm(), true.double().norm()
            if name.startswith("gradient of ") and of_input.isfinite():
                norm = torch.maximum(norm, of_input)
            if not error <= bound * norm:
                beyond.append(f"{name}: differs by {error / norm:.1e} of its norm, {bound:.0e} is allowed")
            if norm:
                worst = max(worst, (error / norm).item() / bound)
    return unequal, beyond, worst


def _bound(call: Call, name: str, dtype: torch.dtype) -> float:
    """0: it must be equal."""
    if name == "gradient of weight" and call.op == "recurrent_lif":
        dtype = call.dtype
    double = call.op == "bn_lif" and name == "v_last" and dtype == torch.float64
    rounded = name.startswith(("gradient", "running")) or double or call.op == "linear"
    return SLACK * gradient_bound(dtype) if rounded else 0.0
