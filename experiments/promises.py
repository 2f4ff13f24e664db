"""What the project promises, and how often it was tried: ``python -m experiments.promises`` after ``make trust``.

``make test`` and ``make trust`` leave in runs/trust, for each place where they ran tests, a file of what these counted
(``--counts`` of tests/conftest.py). ``docs/promises.json`` keeps those of them that are there, ``docs/promises.md``
shows them promise by promise.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from snnkern.files import commit, replacing, versions, write_json

COMMAND = "python -m experiments.promises"
ROOT = Path(__file__).parents[1]
PLACES = {  # the files of runs/trust
    "cpu": "thorough, C++ kernels",
    "triton": "thorough, Triton kernels in the interpreter",
    "cuda": "thorough, CUDA kernels in the emulator",
    "brief": "`make test`",
}


class Promise(NamedTuple):
    """``tests`` are functions, as ``file::name``, or whole files, of tests/."""

    says: str
    tests: tuple[str, ...]


def of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"test_{file}.py::test_{name}" for name in names) or (f"test_{file}.py",)


PROMISES = {
    "Numbers": [
        Promise(
            "Spikes and states equal the plain loop's bit for bit in float32; gradients are within the table of bounds",
            of("properties", "a_call_equals_the_reference", "recurrent_layers_equal_the_reference_and_their_pieces"),
        ),
        Promise(
            "One step is right for every input: all floats of 16 bits, all of float32",
            of(
                "properties",
                "a_step_for_every_16_bit_input",
                "a_step_for_float32_inputs_of_all_kinds",
                "a_step_for_every_float32_input",
            ),
        ),
        Promise(
            "A long time in any pieces, the state handed on, is the time in one call",
            of("properties", "pieces_of_time_with_what_they_hand_on_equal_the_whole"),
        ),
        Promise(
            "Time that runs in parallel segments gives the bits of the serial loop",
            of("properties", "time_in_segments_equals_the_serial_loop"),
        ),
        Promise(
            "No neuron knows of another: their order does not matter",
            of("properties", "an_order_of_neurons_is_that_of_their_outputs"),
        ),
        Promise(
            "Where the op is linear, backward is its adjoint",
            of(
                "properties",
                "below_the_threshold_backward_is_the_adjoint",
                "ttm_is_its_backward_turned_round",
                "a_sparse_layer_is_the_dense_one_and_backward_its_adjoint",
            ),
        ),
        Promise(
            "Batch norm and neurons in one pass are batch norm, then neurons",
            of("properties", "batch_norm_and_neurons_in_one_are_one_after_the_other"),
        ),
        Promise(
            "Spikes that are packed into bits come back as they were",
            of("properties", "packing_and_unpacking_is_the_identity"),
        ),
        Promise("`snnkern check` finds a kernel that is wrong, and prints the call", of("check")),
    ],
    "Memory and threads": [
        Promise("Wrong arguments end in an error that names them, never in a crash", of("hostile")),
        Promise(
            "Tensors may have more elements than 32 bits count",
            of(
                "memory",
                "more_elements_than_32_bits_count",
                "sums_over_more_elements_than_32_bits_count",
            ),
        ),
        Promise("Memory is flat over thousands of calls", of("memory", "memory_is_flat_over_many_calls")),
        Promise(
            "Any number of threads may call at once, and come and go",
            of("memory", "threads_that_come_and_go_with_all_ops_at_once", "one_graph_by_many_threads"),
        ),
        Promise(
            "Signals, forks and the end of the interpreter may come amid a call",
            of(
                "memory",
                "signals_and_forks_amid_calls_and_an_end_amid_them",
                "the_interpreter_ends_amid_kernels",
            ),
        ),
    ],
    "Trainings": [
        Promise(
            "A training that is killed at any moment goes on to the same weights, bit for bit",
            of(
                "survival",
                "kill_9_at_random_moments_twenty_times_over",
                "kill_9_at_an_operation_on_a_file",
                "signals_to_all_and_a_killed_worker",
                "one_of_two_processes_is_killed",
            ),
        ),
        Promise(
            "Whatever the disk refuses, nothing that was written is lost, and one line says what to do",
            of(
                "survival",
                "a_full_disk_at_any_operation",
                "results_of_a_comparison_on_a_full_disk",
                "a_small_file_system",
                "a_folder_that_disappears",
                "files_where_others_should_be",
                "what_cannot_be_read",
            ),
        ),
        Promise(
            "A damaged file is noticed and named, whatever is wrong with it",
            of(
                "survival",
                "a_damaged_checkpoint_is_found",
                "damaged_weights_are_found",
                "commands_on_a_folder_with_a_damaged_file",
                "recipes_that_are_none",
                "hostile_weights",
                "a_checkpoint_of_something_else",
            ),
        ),
        Promise("Nothing in a file is executed", of("survival", "nothing_in_a_checkpoint_is_executed")),
        Promise(
            "Numbers that are not finite stop a training with the reason",
            of("survival", "data_that_are_not_finite", "gradients_that_overflow_float16_at_any_scale"),
        ),
    ],
    "Documentation": [
        Promise(
            "Code in the documentation runs, commands exist, links lead somewhere, docstrings name every argument",
            of("docs"),
        ),
        Promise("The examples run", of("examples")),
        Promise("Neither the package nor its tests reach a network", of("house", "the_tests_reach_no_network")),
    ],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(COMMAND, description="docs/promises.md from what `make trust` counted.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/trust", help="the files of counts")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="promises.json, promises.md")
    given = parser.parse_args(arguments)
    files = {place: given.work / f"{place}.json" for place in PLACES}
    counts = {place: json.loads(path.read_text()) for place, path in files.items() if path.exists()}
    made = {"versions": versions(), "commit": commit(ROOT), "counts": tried(counts)}
    write_json(given.out / "promises.json", made)
    write(given.out, made)


def tried(counts: dict[str, dict]) -> dict[str, dict]:
    """Per promise and place, the sums of what its tests counted: their cases (passed, failed, skipped) and the rest."""
    found = {}
    for promise in (promise for room in PROMISES.values() for promise in room):
        for place, functions in counts.items():
            total = Counter()
            for function, numbers in functions.items():
                if function.removeprefix("tests/").startswith(promise.tests):
                    total.update(numbers)
            if total["passed"] or total["failed"]:
                found.setdefault(promise.says, {})[place] = dict(total)
    return found


def write(out: Path, made: dict) -> None:
    with replacing(out / "promises.md") as file:
        file.write(page(made).encode())


def page(made: dict) -> str:
    lines = [
        "# What we promise",
        "",
        "Each row is a promise, the tests that break when it is broken, and how often it was tried: briefly by",
        "`make test`, before every change, and thoroughly by `make trust`, where random tests draw thousands of",
        "inputs, processes are killed, disks are full, files damaged. Rows without thorough figures: briefly.",
        "",
        f"Tried on {made['versions']['processor']}, snnkern {made['versions']['snnkern']}, at {made['commit']} or "
        f"shortly before, PyTorch {made['versions']['torch']}; written by `{COMMAND}` from "
        "[`promises.json`](promises.json).",
        "",
    ]
    for room, promises in PROMISES.items():
        lines += [f"## {room}", "", "| promise | shown by | tried |", "| --- | --- | --- |"]
        for promise in promises:
            shown = ", ".join(f"[`{test}`](../tests/{test.split('::')[0]})" for test in promise.tests)
            tried_so = "<br>".join(sentence(*item) for item in made["counts"].get(promise.says, {}).items())
            lines.append(f"| {promise.says} | {shown} | {tried_so or 'not in these runs'} |")
        lines.append("")
    return "\n".join(lines)


def sentence(place: str, numbers: dict[str, int]) -> str:
    outcomes = {"passed", "failed", "skipped"}
    said = [f"{number:,} {what}" for what, number in numbers.items() if what not in outcomes]
    said.append(f"{numbers['passed']:,} cases" + (f", **{numbers['failed']} failed**" if numbers.get("failed") else ""))
    return f"{PLACES[place]}: {', '.join(said)}"


if __name__ == "__main__":
    main()
