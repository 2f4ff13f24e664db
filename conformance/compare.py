"""One model before and after ``snnkern.convert``, in a process of its own: ``python -m conformance.compare REQUEST``.

The request is JSON: the number of the case, the folder of its checkout, further folders of the path, rounds of timing,
and the file for the result.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from snnkern.convert import convert

from . import stand_ins
from .cases import CASES, Case

Pass = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


def compare(case: Case, rounds: int) -> dict:
    """Spikes of every neuron that was swapped, outputs and gradients of one forward and backward in training mode."""
    said = [*filter(None, stand_ins.put(case.stand_ins))]
    before, after = (_built(case) for _ in range(2))
    inputs, before, after = before[1], before[0], after[0]
    report = convert(after, rules=case.rules())
    paths = [path for row in report.swapped for path in row.path.split(", ")]
    if not paths:
        if not report:
            raise ValueError("no neuron was found")
        return {"refused": "; ".join(sorted({f"{row.was}: {row.why}" for row in report}))}
    with recording(before, paths) as spikes, recording(after, paths) as ours:
        passes = [run(model, inputs) for model in (before, after)]
    differ = [path for path in {**spikes, **ours} if not _equal(spikes.get(path), ours.get(path))]
    rates = [value.float().count_nonzero().item() / value.numel() for values in spikes.values() for value in values]
    result = {
        "neurons": dict(Counter(row.was for row in report.swapped)),
        "unchanged": [[row.path, row.was, row.why] for row in report.unchanged],
        "rate": statistics.mean(rates),
        "ran": len(spikes),
        "spikes_differ": differ,
        "outputs_equal": _equal(passes[0][0], passes[1][0]),
        "output_difference": _distance(*(dict(enumerate(outputs)) for outputs, _ in passes)),
        "gradient_difference": _distance(*(gradients for _, gradients in passes)),
        "state_dict_equal": _loads(before, after) and _loads(after, before),
        "stand_ins": said,
    }
    return {**result, **(timed(before, after, inputs, rounds) if rounds else {})}


def _built(case: Case) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model, inputs = case.build()
    for module in model.modules():
        if getattr(module, "backend", None) == "cupy":
            module.backend = "torch"
    return model.train(), inputs


def run(model: nn.Module, inputs: tuple) -> Pass:
    """Outputs and gradients, from rest and with the same random numbers at every call."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        for name in ("reset", "reset_states"):  # SpikingJelly, sinabs
            if callable(getattr(module, name, None)):
                getattr(module, name)()
    out = model(*tree_map(lambda x: x.clone(), inputs))
    outputs = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and each.is_floating_point()]
    generator = torch.Generator().manual_seed(3)
    torch.autograd.backward(outputs, [torch.rand(each.shape, generator=generator) for each in outputs])
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return [each.detach() for each in outputs], gradients


@contextmanager
def recording(model: nn.Module, paths: list[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What the modules at these paths put out, in the order of their first calls."""
    found, handles = {}, []
    for path in paths:

        def keep(module, args, out, path=path):
            found.setdefault(path, []).append(out.detach().clone())

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def timed(before: nn.Module, after: nn.Module, inputs: tuple, rounds: int) -> dict:
    """Milliseconds of a forward and backward, medians over rounds in which both run, and the rounds' median ratio."""
    seconds = []
    for _ in range(rounds + 1):
        pair = []
        for model in (before, after):
            start = time.perf_counter()
            run(model, inputs)
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    kept = seconds[1:]
    old, new = (1000 * statistics.median(each) for each in zip(*kept, strict=True))
    times = statistics.median(a / b for a, b in kept)
    return {"ms_before": old, "ms_after": new, "times_faster": times, "rounds": rounds}


def _equal(a: list[torch.Tensor] | None, b: list[torch.Tensor] | None) -> bool:
    return a is not None and b is not None and len(a) == len(b) and all(map(torch.equal, a, b))


def _distance(a: dict, b: dict) -> float:
    """Norm of the difference over that of ``a``; infinite where one has what the other has not."""
    if a.keys() != b.keys() or any(a[key].shape != b[key].shape for key in a):
        return float("inf")
    squares = [((a[key].double() - b[key].double()).square().sum(), a[key].double().square().sum()) for key in a]
    difference, whole = (sum(each) for each in zip(*squares, strict=True))
    return float((difference / whole).sqrt()) if whole else float(difference)


def _loads(source: nn.Module, target: nn.Module) -> bool:
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError:
        return False
    return True


def _offline(*args, **kwargs):
    raise OSError("nothing is fetched here")


def main() -> None:
    request = json.loads(sys.argv[1])
    case = CASES[request["case"]]
    folder = Path(request["checkout"]) / case.folder
    sys.path[:0] = [str(folder), *request["path"]]
    socket.create_connection = _offline
    os.chdir(folder)  # some read files by names relative to it
    try:
        result = compare(case, request["rounds"])
    except BaseException as error:
        traceback.print_exc()
        result = {"reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    Path(request["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
