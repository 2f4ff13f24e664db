"""``python -m benchmarks.run``: forward + backward of one LIF layer beside its peers, in one interleaved run.

A contender whose spikes or gradients differ from the reference gets no time. Every round runs all contenders one after
the other, so that a machine whose speed drifts drifts for all; figures are medians over rounds, ratios medians of the
rounds' ratios. Results go to ``benchmarks/results/<name>.json`` with the machine, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CASES = [(4, 262_144), (16, 262_144), (64, 262_144), (256, 4_096), (1024, 512)]
QUICK = [(16, 65_536), (256, 1_024)]


def machine(torch) -> dict:
    from snnkern import _C
    from snnkern.runs import versions

    known = versions()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": f"{known['processor']}, {torch.get_num_threads()} threads, {_C.cpu_isa()}",
        **known,
        "commit": commit,
        "date": date.today().isoformat(),
        "environment": {key: os.environ[key] for key in ("GLIBC_TUNABLES", "OMP_WAIT_POLICY") if key in os.environ},
    }


def check(layer, x, grad) -> str | None:
    """Why a contender may not be timed; None if its spikes are the reference's and its gradient is near."""
    import torch

    from .contenders import ours

    results = []
    for f in (layer, ours("reference")):
        y = x.detach().clone().requires_grad_()
        spikes = f(y)
        spikes.backward(grad)
        results.append((spikes.detach(), y.grad))
    (spikes, gradient), (true_spikes, true_gradient) = results
    if not torch.equal(spikes, true_spikes):
        return f"{(spikes != true_spikes).sum()} of {spikes.numel()} spikes differ"
    error = ((gradient - true_gradient).norm() / true_gradient.norm()).item()
    return None if error < 1e-5 else f"relative gradient error {error:.1e}"


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds per call, interleaved: ``rounds`` rounds of every call, each the median of a few repeats."""
    repeats = {name: max(1, min(20, int(0.05 / max(seconds(call), 1e-6)))) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            times[name].append(statistics.median(seconds(call) for _ in range(repeats[name])))
    return times


def layer_rows(steps: int, neurons: int, rounds: int, contenders: dict, longest_compiled: int) -> list[dict]:
    import torch

    torch.manual_seed(0)
    x = torch.randn(steps, neurons)
    grad, copy = torch.randn_like(x), torch.empty_like(x)
    leaf = x.clone().requires_grad_()
    forward = {"Tensor.copy_": lambda: copy.copy_(x)}
    both = {"Tensor.copy_": forward["Tensor.copy_"]}
    rows = []
    for name, make in contenders.items():
        row = {"op": "lif", "contender": name, "T": steps, "N": neurons, "dtype": "float32"}
        if "compile" in name and steps > longest_compiled:
            rows.append({**row, "skipped": f"unrolled over T: left out above T = {longest_compiled}"})
            continue
        layer = make()
        wrong = check(layer, x, grad)
        if wrong:
            rows.append({**row, "skipped": wrong})
            continue

        def train(layer=layer):
            leaf.grad = None
            layer(leaf).backward(grad)

        def infer(layer=layer):
            with torch.no_grad():
                layer(x)

        forward[name], both[name] = infer, train
    for mode, calls, streams in (("forward", forward, 2), ("forward + backward", both, 5)):
        times = measure(calls, rounds)
        ours, copied = times["snnkern"], times["Tensor.copy_"]
        for name, got in times.items():
            bytes_moved = (2 if name == "Tensor.copy_" else streams) * x.numel() * x.element_size()
            rows.append(
                {
                    "op": "lif",
                    "contender": name,
                    "mode": mode,
                    "T": steps,
                    "N": neurons,
                    "dtype": "float32",
                    "ms": 1e3 * statistics.median(got),
                    "ms_min": 1e3 * min(got),
                    "ms_max": 1e3 * max(got),
                    "GB/s": bytes_moved / statistics.median(got) / 1e9,
                    "over_snnkern": statistics.median(a / b for a, b in zip(got, ours, strict=True)),
                    "over_copy": statistics.median(a / b for a, b in zip(got, copied, strict=True)),
                }
            )
    return rows


def overhead_rows(rounds: int) -> list[dict]:
    """What one call costs on tensors too small to matter."""
    import torch

    import snnkern

    x = torch.randn(4, 16)
    leaf, grad = x.clone().requires_grad_(), torch.ones(4, 16)

    def infer():
        for _ in range(1000):
            snnkern.lif(x)

    def train():
        for _ in range(1000):
            leaf.grad = None
            snnkern.lif(leaf)[0].backward(grad)

    return [
        {"op": "lif", "contender": "snnkern", "mode": mode, "T": 4, "N": 16, "us": 1e3 * statistics.median(times)}
        for mode, times in measure({"forward overhead": infer, "forward + backward overhead": train}, rounds).items()
    ]


def table(rows: list[dict]) -> str:
    lines = ["| T | N | forward + backward | ms | times snnkern | times one copy |", "|---:|---:|---|---:|---:|---:|"]
    for row in rows:
        if row.get("mode") == "forward + backward":
            lines.append(
                f"| {row['T']} | {row['N']:,} | {row['contender']} | {row['ms']:.2f} | {row['over_snnkern']:.1f} "
                f"| {row['over_copy']:.1f} |"
            )
        elif "skipped" in row:
            lines.append(f"| {row['T']} | {row['N']:,} | {row['contender']} | {row['skipped']} | | |")
    for row in rows:
        if "us" in row:
            lines.append(f"\n{row['mode']}: {row['us']:.1f} us a call")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu", help="results go to benchmarks/results/NAME.json and NAME.png")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="default: PyTorch's")
    parser.add_argument("--quick", action="store_true", help="two small cases, three rounds")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    from . import plot
    from .contenders import CONTENDERS, LONGEST_COMPILED

    if args.threads:
        torch.set_num_threads(args.threads)
    rounds, rows = (3 if args.quick else args.rounds), []
    for steps, neurons in QUICK if args.quick else CASES:
        print(f"T = {steps}, N = {neurons:,} ...", file=sys.stderr, flush=True)
        rows += layer_rows(steps, neurons, rounds, CONTENDERS, LONGEST_COMPILED)
    rows += overhead_rows(rounds)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.name}.json"
    path.write_text(json.dumps({"machine": machine(torch), "rows": rows}, indent=1) + "\n")
    plot.draw(path, path.with_suffix(".png"))
    print(table(rows))
    print(f"\n{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
