"""Runs the protocols and writes what they show: ``python -m experiments.claims`` (see ``--help``).

A claim is tested on trainings, which are recipes run by ``snnkern.train.fit``; one that several claims need is trained
once. A seed at a time, in a process with one thread. What is finished stays in the work folder and is not run again,
trainings and results alike; remove its folder or file to have it run again. Verdicts are computed from the bounds that
stand in the protocols; see ``protocol.Measure.judge``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from snnkern.files import replacing

from . import dspike, mtt, tet
from .protocol import Protocol, Work, read

PROTOCOLS: dict[str, Protocol] = {
    "E2.1": tet.TET_AND_SDT,
    "E2.2": mtt.CALIBRATION,
    "E2.3": mtt.OVER_TIME,
    "E2.3b": mtt.CONFIGURATIONS,
    "E2.4": dspike.SIMILARITY,
    "E2.5": dspike.TRAINED_WITH_DIFFERENCES,
    "E2.6": dspike.TEMPERATURE,
    "E2.7": tet.SHORT_TO_LONG,
    "E2.8": dspike.LONG_TO_SHORT,
    "E2.9": tet.SWITCH,
    "E2.10": tet.FLATNESS,
    "E2.11": mtt.WEIGHT_NOISE,
    "E2.12": mtt.INPUT_NOISE,
    "E2.13": mtt.LENGTHS,
    "E2.14": mtt.SIMILARITY,
    "E2.15": mtt.ESTIMATION,
    "E2.16": mtt.SEARCH,
    "E2.17": mtt.EARLY_EXIT,
    "E2.18": mtt.MONOTONE,
    "E2.19": mtt.ASYNCHRONOUS,
    "E2.20": tet.SMOOTH,
    "E2.21": dspike.ENERGY,
    "E2.22": tet.SECOND_TERM,
    "E2.23": tet.MOMENTS_AND_TOTAL,
    "E2.24": tet.MOMENTS,
    "E2.25": tet.GROWTH,
    "E2.26": tet.GAP,
    "E2.27": dspike.DISTANCE,
    "E2.28": dspike.WHOLE_CHAIN,
    "E2.29": dspike.SHAPE,
    "E2.30": mtt.GRANULARITY,
    "E2.31": mtt.SAMPLES,
    "E2.32": mtt.FLATNESS,
}
COMMAND = "python -m experiments.claims"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(COMMAND, description="The papers' claims, in miniature.")
    parser.add_argument(
        "--only", nargs="+", metavar="ID", choices=PROTOCOLS, default=[*PROTOCOLS], help="some protocols"
    )
    parser.add_argument("--seeds", type=int, help="at most so many, from 0 up; default: those of each protocol")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/claims"), help="results.json and pictures, beside OUT.md"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="finished trainings and results")
    parser.add_argument(
        "--quick", action="store_true", help="try the code: two epochs, a few images, numbers mean nothing"
    )
    given = parser.parse_args(arguments)
    if given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
        parser.error("--seeds and --jobs must be at least 1")
    seeds = {name: min(given.seeds or sys.maxsize, PROTOCOLS[name].seeds) for name in given.only}
    works = [Work(given.work, seed, given.quick) for seed in range(max(seeds.values()))]
    given.work.mkdir(parents=True, exist_ok=True)
    run_seeds({work.seed: [name for name in seeds if work.seed < seeds[name]] for work in works}, works, given.jobs)
    done = {name: [read(work.path(PROTOCOLS[name].key, ".json")) for work in works[: seeds[name]]] for name in seeds}
    report(done, given.work, given.out)


def run_seeds(names: dict[int, list[str]], works: Sequence[Work], jobs: int) -> None:
    """Each seed in one process, as its protocols share trainings."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes as they start
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = [pool.submit(run_seed, names[work.seed], work) for work in works if names[work.seed]]
        try:
            for done, future in enumerate(as_completed(running), start=1):
                print(f"seed {future.result()}: {done} of {len(running)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_seed(names: Sequence[str], work: Work) -> int:
    for name in names:
        began, clock = time.process_time(), time.perf_counter()
        PROTOCOLS[name].unit(work)
        seconds, clock = time.process_time() - began, time.perf_counter() - clock
        print(f"{name:6} seed {work.seed}: {seconds:5.0f} s of the processor, {clock:5.0f} by the clock", flush=True)
    return work.seed


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


def report(done: dict[str, list[dict]], work: Path, out: Path) -> None:
    """``results.json`` and pictures in ``out``, and ``out``.md beside it. What is there of other protocols is kept."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    found = read(path) if path.exists() else {"claims": {}, "results": {}, "runs": {}}
    for name, units in done.items():
        protocol, results = PROTOCOLS[name], [unit["result"] for unit in units]
        rows = [measure.judge(results) for measure in protocol.measures]
        checks = [check.check(results) for check in protocol.checks]
        protocol.draw(out / f"{name}.png", results)
        found["claims"][name] = {"verdict": verdict(rows), "rows": rows, "checks": checks}
        found["results"][protocol.key] = units
        for run in {run for unit in units for run in unit["runs"]}:
            folders = [Work(work, unit["seed"], unit["quick"]).path(run) for unit in units if run in unit["runs"]]
            found["runs"][run] = [read(folder / "ran.json") for folder in folders]
    used = {run for units in found["results"].values() for unit in units for run in unit["runs"]}
    for part, names in (("claims", PROTOCOLS), ("results", {p.key for p in PROTOCOLS.values()}), ("runs", used)):
        found[part] = {
            name: found[part][name] for name in (names if part == "claims" else sorted(names)) if name in found[part]
        }
    with replacing(path) as file:
        file.write(_lines(found).encode())
    with replacing(out.with_suffix(".md")) as file:
        file.write(text(found, out.name).encode())
    print(f"{path}, {out.with_suffix('.md')}")


def _lines(value, depth: int = 4) -> str:
    """As JSON, with a line for each seed, row and check."""
    if not depth or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    keys = [json.dumps(key) + ": " for key in value] if isinstance(value, dict) else [""] * len(value)
    items = value.values() if isinstance(value, dict) else value
    inside = ",\n".join(key + _lines(item, depth - 1) for key, item in zip(keys, items, strict=True))
    return "{\n" + inside + "\n}" if isinstance(value, dict) else "[\n" + inside + "\n]"


def text(found: dict, folder: str) -> str:
    """The page: a row per claim, then a part per claim with its numbers and picture, the checks and the trainings."""
    claims, runs = found["claims"], found["runs"]
    units = [unit for kept in found["results"].values() for unit in kept]
    made = units + [ran for kept in runs.values() for ran in kept]
    versions = sorted({f"snnkern {about['snnkern']} ({about['commit']}), PyTorch {about['torch']}" for about in made})
    minutes = sum(ran["seconds"] for kept in runs.values() for ran in kept) / 60
    parts = [
        "# The papers' claims, in miniature\n",
        "Handwritten digits of 8x8 pixels with noise, small networks, minutes of a CPU: what shows here gives "
        "the direction of an effect, and what does not may at full size. Methods that are compared share "
        "split, noise, initial weights and batches, seed by seed; numbers are mean ± standard error over seeds.\n",
        "A measure *holds* if its mean keeps the bound that was stated before by more than two standard errors of the "
        "mean; *within noise*: by less; *does not show*: not at all. What is so by arithmetic or by construction is no "
        "evidence and stands under [checks](#checks).\n",
        f"{'; '.join(sorted({about['processor'] for about in made}))}, one thread per process. {'; '.join(versions)}. "
        f"{minutes:.0f} core minutes of training.\n",
        f"Command: `{COMMAND}`. Numbers and curves of every seed: [results.json]({folder}/results.json).\n",
    ]
    if any(unit["quick"] for unit in units):
        parts.append("**A trial of the code: two epochs, a few images. The numbers mean nothing.**\n")
    rows = []
    for name, claim in claims.items():
        cells = f"[{name}](#{name.lower().replace('.', '')})", PROTOCOLS[name].claim, claim["verdict"], first(claim)
        rows.append((*cells, f"`{COMMAND} --only {name}`"))
    parts.append(table(("", "claim", "verdict", "first measure", "command"), rows))
    for name, claim in claims.items():
        protocol, kept = PROTOCOLS[name], found["results"][PROTOCOLS[name].key]
        parts += [
            f"## {name}\n",
            f"**{protocol.claim}** ({protocol.source}).\n",
            f"Protocol: {protocol.setup}. {len(kept)} seeds. Trainings: {', '.join(kept[0]['runs'])}.\n",
            table(("measure", "mean ± error", "wanted", "seeds", ""), [cells_of(row) for row in claim["rows"]]),
            f"Verdict: {claim['verdict']}.\n",
            f"![{protocol.claim}]({folder}/{name}.png)\n",
        ]
    checks = [
        (name, c["check"], digits_of(c["worst"]), _bound(c), "yes" if c["kept"] else "**no**")
        for name, claim in claims.items()
        for c in claim["checks"]
    ]
    if checks:
        parts += [
            "## Checks\n",
            "So by arithmetic or by construction; the value is that of the worst seed.\n",
            table(("", "check", "value", "has to be", "is so"), checks),
        ]
    parts += [
        "## Trainings\n",
        "Read back from the weights and metrics that each run left behind; a run that turns out to be another than its "
        "protocol says is an error.\n",
        table(
            ("", "network, T, epochs of a loss, learning rate", "seeds", "core seconds each"),
            [(run, "; ".join({r["ran"]: 0 for r in kept}), str(len(kept)), _each(kept)) for run, kept in runs.items()],
        ),
    ]
    return "\n".join(parts)


def _each(kept: Sequence[dict]) -> str:
    return f"{sum(ran['seconds'] for ran in kept) / len(kept):.0f}"


def first(claim: dict) -> str:
    name, number, wanted, seeds, _ = cells_of(claim["rows"][0])
    return f"{name}: {number} (wanted {wanted}{'; ' if seeds else ''}{seeds})"


def cells_of(row: dict) -> tuple[str, ...]:
    number = digits_of(row["mean"]) + ("" if row["error"] is None else f" ± {digits_of(row['error'])}")
    if "state" not in row:
        return row["measure"], number, "", "", ""
    seeds = "" if row["seeds"] is None else f"{row['seeds']} of {len(row['values'])}"
    return row["measure"], number, _bound(row), seeds, row["state"]


def _bound(row: dict) -> str:
    sign, bound = row["wanted"]
    return f"{sign} {bound:.4g}"


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
        sys.exit("interrupted; finished trainings and results are kept")
