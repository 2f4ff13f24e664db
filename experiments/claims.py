"""Runs the protocols and writes what they show: ``python -m experiments.claims`` (see ``--help``).

Every (protocol, seed) is a unit of work in a process with one thread. A finished unit stays in the work folder and is
not run again; remove its file to have it run again. The verdict is computed from the bounds that stand in the
protocols:

- a measure *holds* if its mean over seeds keeps the bound by more than the standard error of that mean;
- it is *within noise* if it keeps the bound by less, and *does not show* if it does not keep it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path

import torch

from snnkern.files import replacing, versions, write_json

from . import dspike, tet
from .protocol import Measure, Protocol, Size

PROTOCOLS: dict[str, Protocol] = {
    "E2.1": tet.TET_AND_SDT,
    "E2.4": dspike.SIMILARITY,
    "E2.5": dspike.TRAINED_WITH_DIFFERENCES,
    "E2.6": dspike.TEMPERATURE,
    "E2.7": tet.SHORT_TO_LONG,
    "E2.8": dspike.LONG_TO_SHORT,
    "E2.9": tet.SWITCH,
    "E2.10": tet.FLATNESS,
    "E2.20": tet.SMOOTH,
    "E2.21": dspike.ENERGY,
}
COMMAND = "python -m experiments.claims"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(COMMAND, description="The papers' claims, in miniature.")
    parser.add_argument(
        "--only", nargs="+", metavar="ID", choices=PROTOCOLS, default=[*PROTOCOLS], help="some protocols"
    )
    parser.add_argument("--seeds", type=int, help="how many, from 0 up; default: that of each protocol")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/claims"), help="results.json and pictures, beside OUT.md"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="finished units")
    parser.add_argument(
        "--quick", action="store_true", help="try the code: an epoch, a few images, numbers mean nothing"
    )
    given = parser.parse_args(arguments)
    if given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
        parser.error("--seeds and --jobs must be at least 1")
    units = [(name, seed) for name in given.only for seed in range(given.seeds or PROTOCOLS[name].seeds)]
    given.work.mkdir(parents=True, exist_ok=True)
    paths = {unit: given.work / f"{unit[0]}-seed{unit[1]}{'-quick' if given.quick else ''}.json" for unit in units}
    run_units({unit: path for unit, path in paths.items() if not path.exists()}, Size(given.quick), given.jobs)
    report({name: [json.loads(paths[u].read_text()) for u in units if u[0] == name] for name in given.only}, given.out)


def run_units(units: dict[tuple[str, int], Path], size: Size, jobs: int) -> None:
    """Runs and saves them, the units of one protocol together, and says how it goes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes as they start
    started = time.perf_counter()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(run_unit, name, seed, size, path): (name, seed) for (name, seed), path in units.items()}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                name, seed = running[future]
                seconds = future.result()
                left = (time.perf_counter() - started) / done * (len(units) - done)
                text = (
                    f"{name:6} seed {seed}: {seconds:5.0f} s   {done} of {len(units)}, about {left / 60:.0f} min left"
                )
                print(text, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_unit(name: str, seed: int, size: Size, path: Path) -> float:
    started = time.perf_counter()
    result = PROTOCOLS[name].run(seed, size)
    seconds = time.perf_counter() - started
    about = {"seed": seed, "seconds": seconds, "quick": size.quick, "commit": commit(), **versions()}
    write_json(path, {**about, "date": date.today().isoformat(), "result": result})
    return seconds


def commit() -> str:
    git = {"capture_output": True, "text": True, "cwd": Path(__file__).parent}
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **git).stdout.strip()
    return found + ("+" if changed else "")


def judge(measure: Measure, results: Sequence[dict]) -> dict:
    """The measure over seeds: values, mean, sd, and, if something is wanted, in how many seeds it is so."""
    values = [float(measure.of(result)) for result in results]
    average, sd = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    row = {"measure": measure.name, "mean": average, "sd": sd, "values": values}
    if measure.wanted is None:
        return row
    state = "does not show"
    if measure.kept(average):
        state = "within noise" if 0 < measure.margin(average) <= sd / len(values) ** 0.5 else "holds"
    return {**row, "wanted": measure.wanted, "seeds": sum(map(measure.kept, values)), "state": state}


def verdict(rows: Sequence[dict]) -> str:
    """Of a protocol, in words, from those measures of which something is wanted."""
    states = {row["measure"]: row["state"] for row in rows if "state" in row}
    held = sum(state == "holds" for state in states.values())
    if held == len(states):
        return "holds"
    if set(states.values()) == {"does not show"}:
        return "does not show"
    parts = [f"holds in part ({held} of {len(states)} measures)" if held else "not shown"]
    for state in ("within noise", "does not show"):
        if names := [f"*{name}*" for name, found in states.items() if found == state]:
            parts.append(f"{state.capitalize()}: {'; '.join(names)}")
    return ". ".join(parts)


def report(done: dict[str, list[dict]], out: Path) -> None:
    """``results.json`` and pictures in ``out``, and ``out``.md beside it. What is there of other protocols is kept."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, units in done.items():
        protocol, results = PROTOCOLS[name], [unit["result"] for unit in units]
        rows = [judge(measure, results) for measure in protocol.measures]
        protocol.draw(out / f"{name}.png", results)
        found[name] = {
            "verdict": verdict(rows),
            "rows": rows,
            "seconds": sum(unit["seconds"] for unit in units),
            "units": [{k: v for k, v in unit.items() if k != "result"} for unit in units],
        }
    found = {name: found[name] for name in PROTOCOLS if name in found}
    write_json(path, found)
    with replacing(out.with_suffix(".md")) as file:
        file.write(text(found, out.name).encode())
    print(f"{path}, {out.with_suffix('.md')}")


def text(found: dict, folder: str) -> str:
    """The page: a row per claim, then a part per claim with its numbers and picture."""
    units = [unit for claim in found.values() for unit in claim["units"]]
    machines = sorted({unit["processor"] for unit in units})
    versions = sorted({f"snnkern {unit['snnkern']} ({unit['commit']}), PyTorch {unit['torch']}" for unit in units})
    minutes = sum(claim["seconds"] for claim in found.values()) / 60
    parts = [
        "# The papers' claims, in miniature\n",
        "Handwritten digits of 8x8 pixels with noise, small networks, minutes of a CPU: what shows here gives "
        "the direction of an effect, and what does not may at full size. Methods that are compared share "
        "split, noise, initial weights and batches, seed by seed; numbers are mean ± standard deviation over seeds.\n",
        "A measure *holds* if its mean keeps the bound that was stated before by more than the standard error of the "
        "mean; *within noise*: by less; *does not show*: not at all.\n",
        f"{'; '.join(machines)}, one thread per process. {'; '.join(versions)}. {minutes:.0f} core minutes.\n",
        f"Command: `{COMMAND}`. Raw numbers: [results.json]({folder}/results.json).\n",
    ]
    if any(unit["quick"] for unit in units):
        parts.append("**A trial of the code: one epoch, a few images. The numbers mean nothing.**\n")
    rows = []
    for name, claim in found.items():
        cells = f"[{name}](#{name.lower().replace('.', '')})", PROTOCOLS[name].claim, claim["verdict"], first(claim)
        rows.append((*cells, f"`{COMMAND} --only {name}`"))
    parts.append(table(("", "claim", "verdict", "first measure", "command"), rows))
    for name, claim in found.items():
        protocol = PROTOCOLS[name]
        parts += [
            f"## {name}\n",
            f"**{protocol.claim}** ({protocol.source}).\n",
            f"Protocol: {protocol.setup}. {len(claim['units'])} seeds, {claim['seconds']:.0f} s.\n",
            table(("measure", "mean ± sd", "wanted", "seeds", ""), [cells_of(row) for row in claim["rows"]]),
            f"Verdict: {claim['verdict']}.\n",
            f"![{protocol.claim}]({folder}/{name}.png)\n",
        ]
    return "\n".join(parts)


def first(claim: dict) -> str:
    name, number, wanted, seeds, _ = cells_of(claim["rows"][0])
    return f"{name}: {number} (wanted {wanted}; {seeds})"


def cells_of(row: dict) -> tuple[str, ...]:
    few = len(row["values"]) == 1
    number = digits_of(row["mean"]) + ("" if few else f" ± {digits_of(row['sd'])}")
    if "state" not in row:
        return row["measure"], number, "", "", ""
    wanted = " ".join(map(str, row["wanted"]))
    return row["measure"], number, wanted, f"{row['seeds']} of {len(row['values'])}", row["state"]


def digits_of(value: float) -> str:
    size = abs(value)
    return f"{value:.1e}" if 0 < size < 1e-3 else f"{value:.3f}" if size < 1 else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; finished units are kept")
