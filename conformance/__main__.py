"""Runs the official models of published code before and after ``snnkern.convert`` and prints a table: equal or not.

Nothing of that code is here and nothing is fetched: give the checkouts, in one folder under their repositories' names
or one by one. Every model runs in a process of its own, with stand-ins for what it imports and this machine lacks; the
table names them. Exit status 1: something differs, or a model did not run; not where ``convert`` refused, nor for a
test of SpikingJelly's that is known to differ: these stand there with their reasons.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from snnkern.files import commit, replacing, versions, write_json

from .cases import CASES, CHECKOUTS, Case
from .own_tests import compare_tests, reason

ROUNDING = 2e-5  # greatest relative difference of gradients that a row may have and count as equal
HEADER = "code", "model", "neurons", "spikes", "outputs", "gradients", "state_dict", "a step, ms", "faster", "note"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m conformance", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="holds checkouts, under their repositories' names")
    for name, address in CHECKOUTS.items():
        parser.add_argument(f"--{name}", dest=name, type=Path, metavar="PATH", help=f"a checkout of {address}")
    how = "folder made by `pip install --no-deps --target PATH spikingjelly==0.0.0.0.12`"
    parser.add_argument("--spikingjelly-12", type=Path, metavar="PATH", help=how)
    how = "folder of further packages that the checkouts import; may be given several times"
    parser.add_argument("--packages", type=Path, action="append", default=[], metavar="PATH", help=how)
    parser.add_argument("--only", metavar="TEXT", help="models of which the table's first two columns contain it")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, both ways in each; 0: none. Default: 5")
    parser.add_argument("--tests", nargs="*", metavar="PATH", help="SpikingJelly's own tests too: those files, or all")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write conformance.json and conformance.md there")
    return parser


def main(words: list[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(words)
    console = Console(stderr=True)
    checkouts = {name: getattr(options, name) or (options.folder and options.folder / name) for name in CHECKOUTS}
    rows = []
    for number, case in enumerate(CASES):
        checkout, title = checkouts[case.checkout], f"{case.checkout}, {case.model}"
        if (options.only or "").lower() not in title.lower():
            continue
        if checkout is None or not checkout.is_dir():
            console.print(f"{title}: no checkout{f' in {checkout}' if checkout else ''}", highlight=False)
            continue
        console.print(title, highlight=False)
        rows.append({"code": case.checkout, "model": case.model, "commit": commit(checkout),
                     **one(number, case, checkout, options)})  # fmt: skip
    found = {"machine": machine(), "rows": rows}
    if options.tests is not None:
        if not (checkout := checkouts["spikingjelly"]) or not checkout.is_dir():
            parser.error("--tests needs a checkout of SpikingJelly")
        console.print("SpikingJelly's own tests", highlight=False)
        found["tests"] = {"commit": commit(checkout), **compare_tests(checkout, options.tests or ["test"])}
    if not rows and "tests" not in found:
        parser.error("no checkout was found: give a folder that holds some, or the path of one")
    table = Table(*HEADER[:-1], box=SIMPLE)
    for row in rows:
        table.add_row(*cells(row)[:-1])
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    notes = [f"{row['code']}, {row['model']}: {cells(row)[-1]}" for row in rows if cells(row)[-1]]
    print("\n".join([*notes, *tests(found)]))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "conformance.json", found)
        with replacing(options.out / "conformance.md") as file:
            file.write(markdown(found).encode())
    unknown = [name for name in found.get("tests", {}).get("differ", ()) if not reason(name)]
    return int(bool(unknown) or not all(equal(row) or "refused" in row for row in rows))


def one(number: int, case: Case, checkout: Path, options: argparse.Namespace) -> dict:
    """The result of a case's process, or the reason that there is none."""
    if case.spikingjelly and not options.spikingjelly_12:
        return {"reason": "written for SpikingJelly 0.0.0.0.12: --spikingjelly-12 is missing"}
    path = [*options.packages, *([options.spikingjelly_12] if case.spikingjelly else [])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        request = {"case": number, "checkout": str(checkout.resolve()), "path": [str(each.resolve()) for each in path],
                   "rounds": options.rounds, "out": str(out)}  # fmt: skip
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "conformance.compare", json.dumps(request)]
        root = Path(__file__).parents[1]
        ended = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        if not out.exists():
            return {"reason": f"the process ended with status {ended.returncode}"}
        return json.loads(out.read_text())


def machine() -> dict:
    peers = {name: metadata.version(name) for name in ("spikingjelly", "sinabs") if _installed(name)}
    return {**versions(), **peers, "threads": torch.get_num_threads(), "commit": commit(Path(__file__).parent),
            "date": date.today().isoformat()}  # fmt: skip


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def equal(row: dict) -> bool:
    """Every bit of spikes and outputs, gradients up to rounding; and something fired."""
    return (
        "rate" in row
        and not row["unchanged"]
        and row["rate"] > 0
        and not row["spikes_differ"]
        and row["outputs_equal"]
        and row["state_dict_equal"]
        and row["gradient_difference"] <= ROUNDING
    )


def cells(row: dict) -> list[str]:
    if "rate" not in row:
        why = row["reason"] if "reason" in row else f"refused: {row['refused']}"
        return [row["code"], row["model"], *["-"] * (len(HEADER) - 3), why]
    neurons = ", ".join(f"{count} {name.rpartition('.')[2]}" for name, count in row["neurons"].items())
    spikes = "equal" if not row["spikes_differ"] else f"differ from {row['spikes_differ'][0]} on"
    outputs = "equal" if row["outputs_equal"] else f"differ by {row['output_difference']:.1e}"
    times = ["-", "-"]
    if "rounds" in row:
        times = [f"{row['ms_before']:.0f} to {row['ms_after']:.0f}", f"{row['times_faster']:.2f}x"]
    notes = [*row["stand_ins"], *(f"{path} unchanged: {why}" for path, _, why in row["unchanged"])]
    if row["ran"] < sum(row["neurons"].values()):
        notes.append(f"{row['ran']} of the neurons run")
    if not row["rate"]:
        notes.append("nothing fires")
    return [row["code"], row["model"], neurons, spikes if row["rate"] else "none", outputs,
            f"{row['gradient_difference']:.1e}", "equal" if row["state_dict_equal"] else "differs", *times,
            "; ".join(notes)]  # fmt: skip


def tests(found: dict) -> list[str]:
    if "tests" not in found:
        return []
    if "reason" in found["tests"]:
        return [f"SpikingJelly's own tests: {found['tests']['reason']}"]

    def counted(counts: dict) -> str:
        return ", ".join(f"{counts[key]} {key}" for key in sorted(counts))

    theirs, ours, differ = (found["tests"][key] for key in ("theirs", "ours", "differ"))
    lines = [f"SpikingJelly's own tests: {counted(theirs)} with its nodes; {counted(ours)} with ours."]
    known = Counter(why for name in differ if (why := reason(name)))
    lines += [f"- {count} differ: {why}" for why, count in known.items()]
    rest = {name: row for name, row in differ.items() if not reason(name)}
    return lines + [f"- `{name}`: {a}, then {b}{f': {why}' if why else ''}" for name, (a, b, why) in rest.items()]


def markdown(found: dict) -> str:
    about = found["machine"]
    rows = found["rows"]
    lines = [
        "# Conformance",
        "",
        "Official models of published code, before and after `snnkern.convert`: one forward and backward in training",
        "mode from the same weights, inputs and random numbers. Spikes are those of every neuron that was swapped;",
        '"equal" is every bit. Gradients: norm of the difference over the norm, of all parameters together. Stand-ins',
        "for what was not installed are named. Written by `python -m conformance`.",
        "",
        f"{sum(map(equal, rows))} of {len(rows)} rows are equal. {about['processor']}, {about['threads']} threads, "
        f"PyTorch {about['torch']}, snnkern {about['snnkern']} ({about['commit']}), {about['date']}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + " --- |" * len(HEADER),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows),
        "",
        *(f"- {code}: {CHECKOUTS[code]} at {at}" for code, at in {row["code"]: row["commit"] for row in rows}.items()),
    ]
    return "\n".join([*lines, *(["", *tests(found)] if "tests" in found else [])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
