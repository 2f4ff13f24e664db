"""``snnkern check``: what it draws, what it finds and what it says."""

import contextlib
import io
import math
from inspect import signature
from itertools import islice
from random import Random

import pytest
import torch
from conftest import THOROUGH, needs_thorough
from typer.testing import CliRunner

import snnkern
from snnkern import check
from snnkern.backend import cpu
from snnkern.check.calls import OPS, SURROGATES
from snnkern.cli import app
from snnkern.spec.bounds import gradient_bound

EVERY = [*OPS, "linear", "pack"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["check", *arguments])


def calls(seed, number, where=("cpu",)):
    return [call for call, _ in islice(check._calls([*where], "cpu", seed), number)]


def execute(source):
    """The variables of a printed program, and what it prints."""
    printed, variables = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(source, variables)
    return variables, printed.getvalue()


def programs(output):
    """Those in the output of a check, by the line before them."""
    found = {}
    for part in output.split("\n# ")[1:]:
        said, _, source = part.partition("\n")
        found[said] = source
    return found


def test_cpu_is_found_equal_and_measured():
    result = invoke("--seconds", "1", "--backend", "cpu")
    assert result.exit_code == 0, result.output
    *_, last = lines = result.stdout.splitlines()
    assert lines[0].startswith(f"snnkern {snnkern.__version__}, torch {torch.__version__}, ")
    assert last.startswith("0 of ") and last.endswith(" calls differ; seed 0.")
    assert " lif " in result.stdout and "equal" in result.stdout and " of a copy's " in result.stdout
    assert max(map(len, lines[3:])) <= 80 and "\x1b" not in result.stdout
    assert [line.split()[1] for line in lines if line.endswith("%  ")] == ["float32"] * 3 + ["bfloat16"]


@pytest.mark.parametrize("op", EVERY)
def test_a_printed_program_is_the_call(op, count):
    wanted = 60 if THOROUGH else 4
    drawn = [call for call in calls(3, 2000) if call.op == op and (call.elements < 3000 or op == "linear")]
    for call in drawn[:wanted]:
        variables, printed = execute(call.source("cpu"))
        for name, results in (("cpu", variables["results"]), ("reference", variables["wanted"])):
            for key, value in call.run(name).items():
                torch.testing.assert_close(results[key], value, rtol=0, atol=0, equal_nan=True)
        assert [line.partition(":")[0] for line in printed.splitlines()] == [*variables["results"]]
        assert "y: 0 of" in printed or "spikes: 0 of" in printed or op == "linear"
        count("calls")


def test_every_kind_of_call_is_drawn():
    drawn = calls(0, 4000)
    assert {call.op for call in drawn} == {*EVERY}
    for op in EVERY:
        dtypes = {call.dtype for call in drawn if call.op == op}
        assert len(dtypes) == (1 if op == "linear" else 4), op
        assert op == "linear" or min(call.steps for call in drawn if call.op == op) <= 2
    assert {call.options["surrogate"] for call in drawn if "surrogate" in call.options} == {*SURROGATES}
    assert max(call.steps for call in drawn) > 4000 and max(call.elements for call in drawn) > 500_000
    options = set().union(*(call.options for call in drawn)) | set().union(*(call.tensors for call in drawn))
    assert options >= {*signature(snnkern.lif).parameters} - {"x", "backend"} | {"x", "residual", "training", "scale"}
    views = {method for call in drawn for t in call.tensors.values() for method, *_ in t.then}
    assert views >= {"permute", "narrow", "select", "expand"}


def test_calls_depend_on_the_seed_alone():
    assert calls(5, 50) == calls(5, 50) != calls(6, 50)


def test_calls_for_a_gpu_come_in_several_sizes():
    drawn = [call for call, _ in islice(check._calls(["cuda", "triton"], "cuda", 0), 36)]
    assert "linear" not in {call.op for call in drawn} and torch.float64 not in {call.dtype for call in drawn}
    for i in range(0, 36, check.SIZES):
        group = drawn[i : i + check.SIZES]
        assert len({(call.op, call.dtype) for call in group}) == 1 and len({call.elements for call in group}) > 1
    assert all('"cuda"' in call.source("cuda").replace("'", '"') for call in drawn)


@needs_thorough
def test_cpu_equals_the_reference_in_many_calls(count):
    report = check.Report()
    for call, name, *found in islice(check.sweep({"cpu": "cpu"}, Random().randrange(1 << 30)), 1500):
        report.add(call, name, *found)
        count("calls")
        count("elements", call.elements)
    assert not report.failures, [failure.call.source("cpu") for failure in report.failures]


# What is wrong is found


@pytest.fixture
def wrong(monkeypatch):
    """Makes a launch of the CPU backend do something more, to the last tensors that it was given or to its result; and
    all calls be of one op."""

    def patch(name, more, op):
        launch = getattr(cpu, name)

        def run(*given):
            result = launch(*given)
            more(given, result)
            return result

        monkeypatch.setattr(cpu, name, run)
        monkeypatch.setattr(check, "ORDER", (op,))
        monkeypatch.setattr(check, "measure", lambda *_: [])

    return patch


def flip(spikes):
    spikes[(0,) * spikes.dim()].neg_().add_(1)


WRONG = {  # a launch, what goes wrong there, an op, what is said of it, and what its program prints
    "a spike": ("lif_forward", lambda given, _: flip(given[2].spikes), "lif", "spikes: 1 of "),
    "a gradient": ("lif_backward", lambda given, _: given[2].grad_x.mul_(1.01), "lif", "gradient of x: "),
    "feedback": ("recurrent_forward", lambda given, _: given[2].spikes.zero_(), "recurrent_lif", "spikes: "),
    "a sum": ("ttm", lambda given, _: flip(given[2]), "ttm", "y: "),
    "a product": ("linear_forward", lambda _, result: result[0].mul_(1.01), "linear", "y: "),
    "bits": ("pack", lambda given, _: given[1].zero_(), "pack", "gradient of weight: "),
    "batch norm": ("bn_prepare", lambda given, _: given[3].mul_(1.01), "bn_lif", "v_last: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_cpu_what_is_wrong_is_found_and_its_program_shows_it(wrong, monkeypatch, what):
    name, more, op, said = WRONG[what]
    wrong(name, more, op)
    result = invoke("--seconds", "0.5", "--backend", "cpu", "--seed", "4")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    ((title, source),) = programs(result.stdout).items()
    assert title.startswith("cpu differs from the reference: ") and said in title
    name = said.partition(":")[0]
    shown = next(line for line in execute(source)[1].splitlines() if line.startswith(f"{name}: "))
    monkeypatch.undo()
    again = next(line for line in execute(source)[1].splitlines() if line.startswith(f"{name}: "))
    assert shown != again and float(again.split()[-4]) < 1e-5 < float(shown.split()[-4])


def test_cpu_an_error_of_a_kernel_is_reported_with_its_call(wrong):
    def fail(*_):
        raise RuntimeError("nothing works")

    wrong("ttm", fail, "ttm")
    result = invoke("--seconds", "0.1", "--backend", "cpu")
    assert result.exit_code == 1
    ((title, source),) = programs(result.stdout).items()
    assert title == "cpu differs from the reference: RuntimeError: nothing works"
    with pytest.raises(RuntimeError, match="nothing works"):
        execute(source)


def test_after_an_error_on_a_gpu_nothing_more_is_tried_there(monkeypatch):
    def run(call, backend):
        if backend == "cuda":
            raise RuntimeError("an illegal memory access was encountered")
        return {"y": torch.ones(3), "gradient of x": torch.ones(3)}

    monkeypatch.setattr(check.Call, "run", run)
    found = [*check.sweep({"cuda": "cuda", "triton": "cuda"}, 0)]
    assert [(name, what) for _, name, what, *_ in found] == [
        ("cuda", ["RuntimeError: an illegal memory access was encountered"])
    ]
    everywhere = check.sweep({"cuda": "cuda", "cpu": "cpu"}, 0)
    assert [name for _, name, *_ in islice(everywhere, 4)] == ["cuda", "cpu", "cpu", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_held_to_the_table(dtype):
    bound = check.SLACK * gradient_bound(torch.float32)
    call = check.Call("lif", 0, dtype, 8, 1, {}, {})
    true = {"spikes": torch.ones(8, dtype=dtype), "gradient of x": torch.ones(8, dtype=dtype)}
    true["gradient of decay"] = torch.tensor(1e-3)  # a sum in which terms of the size of x's gradient cancelled
    for part, within in ((0.5, True), (2.0, False)):
        own = {**true, "gradient of decay": true["gradient of decay"] + part * 8**0.5 * bound}
        unequal, beyond, worst = check.compare(call, own, true)
        assert not unequal and bool(beyond) != within and worst == pytest.approx(part, rel=1e-2)
    own = {**true, "gradient of x": true["gradient of x"] * (1 + 2 * check.SLACK * gradient_bound(dtype))}
    assert check.compare(call, own, true)[1][0].startswith("gradient of x: differs by ")
    assert check.compare(call, {**true, "gradient of x": torch.full((8,), torch.nan, dtype=dtype)}, true)[1]
    assert check.compare(call, {**true, "spikes": torch.zeros(8, dtype=dtype)}, true)[0] == ["spikes: 8 of 8 differ"]
    assert "torch.float64" in check.compare(call, {**true, "spikes": true["spikes"].double()}, true)[0][0]
    overflown = {**true, "gradient of decay": torch.tensor(math.inf)}
    assert check.compare(call, true, overflown) == ([], [], 0.0)


# What it says


def test_cpu_ctrl_c_shows_what_is_known(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "measure", interrupt)
    result = invoke("--seconds", "0.3", "--backend", "cpu")
    assert result.exit_code == 130 and " lif " in result.stdout and "equal" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Interrupted. 0 of ")


def test_where_only_the_reference_runs(monkeypatch):
    reasons = dict.fromkeys(snnkern.backends(), "no such luck") | {"reference": None}
    monkeypatch.setattr(check, "backends", lambda: reasons)
    result = invoke()
    assert result.exit_code == 0
    _, *told, last = result.stdout.splitlines()
    assert told == [f"Not checked: {name}: no such luck." for name in ("cuda", "cpu", "triton")]
    assert last.startswith("Only the reference can run here") and last.endswith("there is nothing to check.")
    result = invoke("--backend", "triton")
    assert result.exit_code == 1 and result.stderr == "Error: backend 'triton' cannot run: no such luck\n"


def test_the_interpreter_is_left_out_unless_asked_for(monkeypatch):
    monkeypatch.setattr(check, "backends", lambda: dict.fromkeys(snnkern.backends()))
    monkeypatch.setattr(check, "interpreted", lambda: True)
    where, left = check.runnable()
    assert where["cpu"] == "cpu" and "triton" not in where and "--backend triton" in left["triton"]
    assert check.runnable("triton") == ({"triton": "cpu"}, {})
    assert {"triton", "cpu", "reference"}.isdisjoint(check.runnable("cuda")[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seconds", "0"], "--seconds must be positive and finite, got 0.0"),
        (["--seconds", "nan"], "--seconds must be positive and finite, got nan"),
        (["--backend", "reference"], "must be one of cuda, cpu, triton, which are held to the reference, got 'referen"),
        (["--backend", "gpu"], "--backend (SNNKERN_BACKEND) must be one of cuda, cpu, triton"),
    ],
)
def test_mistakes_are_one_line(arguments, text):
    result = invoke(*arguments)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and text in result.stderr
    assert not result.stdout
