import contextlib
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("benchmarks", reason="the benchmarks are in the source checkout")
pytest.importorskip("matplotlib")

import snnkern
from benchmarks import busy, pictures, report, run
from benchmarks.cases import CASES, Lif
from benchmarks.check import ROUNDED, compare_within
from benchmarks.contenders import NEURON, Contender, contenders, normed
from benchmarks.measure import kept
from benchmarks.run import BLANK
from benchmarks.workloads import CPU, GPU, QUICK, Workload
from snnkern.models import ResNet19
from snnkern.runs import RunError
from snnkern.surrogate import ATan, Triangle

TINY = Workload("image", "lif", 4, (2, 4, 2, 4))
LONGER = replace(TINY, group="long", steps=70, shape=(2, 32))
NORM = Workload("norm", "bn+lif", 4, (2, 8, 4, 4))
CHAIN = Workload("chain", "conv+bn+lif+conv", 4, (2, 8, 4, 4), "bfloat16")
SUMS = Workload("sums", "lif+ttm", 6, (2, 32), steps_out=3)
TWIN = Workload("twin", "ResNet19", 2, (2, 3, 8, 8))
MODES = {"inference", "forward", "backward", "both"}
KERNELS = {"kernel forward", "kernel backward"}


def neuron(name="other", **options):
    return Contender(name, lambda: snnkern.nn.LIF(**{**NEURON, **options}))


@pytest.fixture
def ours():
    if "cpu" not in snnkern.backends() or snnkern.backends()["cpu"]:
        pytest.skip("needs the compiled extension")
    return contenders("cpu")[0][0]


@pytest.fixture
def small(monkeypatch):
    """ResNet-19 of two blocks."""
    monkeypatch.setattr(ResNet19, "GROUPS", ((8, 1, 1), (16, 1, 2)))


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setitem(run.SHARE, "cpu", 0.001)


def measured(workload, *able):
    return run.measure(workload, list(able), "cpu", rounds=2)


def go(path, *chosen, **options):
    return run.run(list(chosen), path, rounds=2, console=Console(file=io.StringIO()), **options)


@pytest.mark.parametrize(
    "workload", [TINY, replace(TINY, layout="channels last"), replace(TINY, dtype="bfloat16"), LONGER]
)
def test_a_right_contender_is_timed_in_every_mode(workload, ours):
    rows = measured(workload, ours, neuron(backend="reference"))
    assert not any(row["reason"] for row in rows)
    assert all(set(row) == set(BLANK) for row in rows)
    assert {row["mode"] for row in rows if row["contender"] == "other"} == {"inference", "forward", "backward", "both"}
    assert {row["mode"] for row in rows if row["contender"] == ours.name} >= {"kernel forward", "kernel backward"}
    for row in rows:
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["rounds"] == 2


@pytest.mark.parametrize(
    ("dtype", "wrong", "reason"),
    [
        ("float32", {"threshold": 1.1}, "spikes differ"),
        ("float32", {"tau": 2.1}, "spikes differ"),
        ("float32", {"surrogate": ATan(2.001)}, "gradient differs"),
        ("float32", {"detach_reset": True}, "gradient differs"),
        ("bfloat16", {"tau": 2.1}, "spikes differ"),
        ("bfloat16", {"surrogate": Triangle()}, "gradient differs"),
    ],
)
def test_a_wrong_contender_gets_its_reason_and_no_time(dtype, wrong, reason):
    (row,) = [row for row in measured(replace(LONGER, dtype=dtype), neuron(**wrong)) if row["contender"] == "other"]
    assert reason in row["reason"]
    assert row["ms"] is None and row["mode"] is None


def test_a_wrong_neuron_in_a_model_gets_its_reason_and_no_time(ours):
    workload = Workload("models", "SpikingMLP", 4, (2, 70))
    right, wrong = neuron("right"), neuron("wrong", threshold=1.01)
    rows = {row["contender"]: row for row in measured(workload, ours, right, wrong)}
    assert rows["right"]["per_second"] > 0 and rows["right"]["spike_rate"] > 0
    assert "spikes differ" in rows["wrong"]["reason"] and rows["wrong"]["ms"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_batch_norm_and_neurons_are_timed_in_every_mode(dtype, layout, ours):
    able = [contender for contender in contenders("cpu")[0] if not contender.compiled]
    rows = measured(replace(NORM, dtype=dtype, layout=layout), *able)
    assert not [row["reason"] for row in rows if row["reason"]]
    modes = {name: {row["mode"] for row in rows if row["contender"] == name} for name in (r["contender"] for r in rows)}
    assert list(modes)[:3] == ["Tensor.copy_", ours.name, f"{ours.name}, separate"]
    assert modes.pop("Tensor.copy_") == {"copy"} and modes.pop(ours.name) == MODES | KERNELS
    assert all(found == MODES for found in modes.values())
    both = next(row for row in rows if row["contender"] == ours.name and row["mode"] == "both")
    assert both["spikes_differ"] == 0 and both["spike_rate"] > 0.05


def batch_normed(change=lambda norm: None, **options):
    def make(channels):
        layer = normed(lambda: snnkern.nn.LIF(**{**NEURON, **options}), channels)
        change(layer.norm)
        return layer

    return Contender("other", make, rounded=True, groups=("norm",))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (batch_normed(lambda norm: setattr(norm, "eps", 0.1)), "spikes differ"),
        (batch_normed(lambda norm: setattr(norm, "momentum", 0.9)), "spikes differ"),
        (batch_normed(threshold=1.02), "spikes differ"),
        (batch_normed(surrogate=ATan(2.001)), "gradient differs"),
        (batch_normed(lambda norm: norm.weight.register_hook(lambda g: 1.01 * g)), "gradient of weight or bias"),
    ],
)
def test_a_wrong_batch_norm_gets_its_reason_and_no_time(wrong, reason):
    (row,) = [row for row in measured(replace(NORM, shape=(4, 8, 8, 8)), wrong) if row["contender"] == "other"]
    assert reason in row["reason"] and row["ms"] is None


@pytest.mark.parametrize(("flips", "passes"), [(1, True), (2, False)])
def test_of_the_spikes_behind_another_batch_norm_only_so_many_may_differ(flips, passes):
    true = torch.zeros(4, 1000), torch.ones(4, 1000)
    spikes, gradient = true[0].clone(), true[1].clone()
    spikes[0, :flips] = 1
    gradient[:, :flips] = 7  # what a spike does to its own neuron's gradient
    if passes:
        assert compare_within((spikes, gradient), true, ROUNDED["float32"])["gradient_error"] == 0
    else:
        with pytest.raises(run.Refused, match="2 of 4000 spikes differ from the reference, more than 1e-05"):
            compare_within((spikes, gradient), true, ROUNDED["float32"])


def test_sums_of_spikes_are_timed_in_every_mode(ours):
    able = [contender for contender in contenders("cpu")[0] if not contender.compiled]
    rows = measured(SUMS, *able)
    assert not [row["reason"] for row in rows if row["reason"]]
    assert {row["mode"] for row in rows if row["contender"] == ours.name} == MODES | KERNELS
    case = CASES["lif+ttm"](SUMS, "cpu")
    assert case.streams["both"] == 4 and case.grads[0].shape == (3, 2, 32)
    other = Contender("other", lambda steps: snnkern.nn.LIF(**NEURON, threshold=1.1, steps_out=steps), groups=("sums",))
    assert "spikes differ" in measured(SUMS, other)[0]["reason"]


def test_the_twin_of_a_network_of_neurons(ours, small):
    able = [contender for contender in contenders("cpu")[0] if contender.name.startswith(("snnkern", "ReLU"))]
    wrong = replace(neuron("wrong"), make=lambda: snnkern.nn.LIF(**{**NEURON, "threshold": 1.1}))
    unfused = replace(wrong, name="wrong, separate", model={"fused": False})
    rows = {row["contender"]: row for row in measured(TWIN, *able, wrong, unfused)}
    assert list(rows)[:2] == ["wrong", "wrong, separate"]  # what has no time comes first
    for name in ("wrong", "wrong, separate"):
        assert "spikes differ" in rows[name]["reason"] and rows[name]["ms"] is None
    for name in (ours.name, f"{ours.name}, separate batch norm"):
        assert rows[name]["spikes_differ"] == 0 and rows[name]["spike_rate"] > 0.05
        assert rows[name]["over_twin"] > 0
    assert rows["ReLU twin"]["over_twin"] == 1 and rows["ReLU twin"]["spike_rate"] is None
    assert rows[ours.name]["kept_bytes"] < rows[f"{ours.name}, separate batch norm"]["kept_bytes"]


def test_packed_spikes_are_measured_where_they_exist(monkeypatch, ours, small):
    asked = []

    @contextlib.contextmanager
    def packed_spikes():
        asked.append(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t[:0].clone(), lambda t: t):
            yield

    assert ("packed" in " ".join(c.name for c in contenders("cpu")[0])) == hasattr(snnkern, "packed_spikes")
    monkeypatch.setattr(snnkern, "packed_spikes", packed_spikes, raising=False)
    packed = [contender for contender in contenders("cpu")[0] if contender.name == f"{ours.name}, packed spikes"]
    assert [contender.groups for contender in packed] == [("chain",), ("twin",)]
    case = CASES[CHAIN.op](CHAIN, "cpu")
    module = case.module(packed[0])
    assert asked == [] and case.keeps(module) < 1000 and asked == [True]  # whatever the hooks within keep


def test_a_contender_that_fails_gets_its_error_and_no_time():
    def fail():
        raise RuntimeError("no such chip\nmore")

    (row,) = [row for row in measured(TINY, Contender("other", fail)) if row["contender"] == "other"]
    assert row["reason"] == "RuntimeError: no such chip" and row["ms"] is None


@pytest.mark.parametrize(("distance", "passes"), [(0.0, True), (5e-7, True), (1e-4, False)])
def test_only_a_tie_excuses_a_spike(distance, passes):
    case = Lif(TINY, "cpu")
    with torch.no_grad():
        case.xs[0][:, 0, 0, 0, 0] = torch.tensor([0.5, 0.75 + distance, 0.0, 2.0])
    later = neuron(threshold=1 + distance + 1e-7)  # does not fire at the second step
    if passes:
        assert case.check(later.make(), later)["spikes_differ"] > 0
    else:
        with pytest.raises(run.Refused, match="spikes differ"):
            case.check(later.make(), later)


def test_every_contender_here_passes_the_gate(ours):
    able, unable = contenders("cpu")
    able = [contender for contender in able if not contender.compiled]
    if unable:
        pytest.skip(f"not installed: {', '.join(unable)}")
    for workload in (replace(LONGER, only=()), replace(LONGER, dtype="bfloat16")):
        rows = measured(workload, *able)
        assert not [row["reason"] for row in rows if row["reason"]]


def test_a_file_of_results(tmp_path, ours, small):
    path = tmp_path / "tiny.json"
    chosen = [
        *(TINY, LONGER, replace(TINY, shape=(2, 8, 2, 4)), replace(TINY, dtype="bfloat16")),
        *(replace(LONGER, group="scaling", steps=steps, shape=(16, 256)) for steps in (16, 32)),
        *(Workload("protocol", "linear+lif", 20, (2, n)) for n in (16, 32)),
        Workload("overhead", "lif", 4, (16,)),
        Workload("models", "SpikingMLP", 4, (2, 70)),
    ]
    able = [ours, neuron("plain loop", backend="reference"), neuron("SpikingJelly", threshold=1.5)]
    chosen += [NORM, replace(NORM, dtype="bfloat16", shape=(2, 8, 2, 4)), CHAIN, SUMS, TWIN]
    able += [contender for contender in contenders("cpu")[0] if contender.groups and not contender.compiled]
    content = go(path, *chosen, able=able)
    assert json.loads(path.read_text()) == content
    assert content["finished"] == [str(workload) for workload in chosen] and not content["not_reached"]
    assert all(set(row) == set(BLANK) for row in content["rows"])
    assert {"device", "torch", "commit", "date", "environment"} <= set(content["machine"])
    layers = [row for row in content["rows"] if row["op"] == "lif"]
    assert {row["reason"] is None for row in layers if row["contender"] == "SpikingJelly"} == {False}
    timed = [row for row in content["rows"] if row["contender"] in ("plain loop", ours.name)]
    assert {row["group"] for row in timed if row["over_ours"]} == {workload.group for workload in chosen}
    text = report.tables(content)
    assert "spikes differ from the reference" in text and content["machine"]["device"] in text
    assert "over the ReLU twin" in text and "may differ: 0.001 % in float32" in text and "| 6 to 3 |" in text
    drawn = pictures.draw(content, path)
    assert {p.name for p in drawn} == {
        f"tiny-{name}.png"
        for name in (
            *("time-over-T", "time-over-N", "bandwidth", "memory-over-T", "protocol", "models"),
            *("norm", "kept", "twin", "peak-memory"),
        )
    }
    assert all(p.stat().st_size > 0 for p in drawn)


def test_pictures_of_nothing_are_left_out(tmp_path):
    content = go(tmp_path / "empty.json")
    assert pictures.draw(content, tmp_path / "empty.json") == []
    assert report.tables(content)


def test_resume_measures_what_is_missing_and_no_more(tmp_path, monkeypatch):
    path, seen = tmp_path / "some.json", []

    def measure(workload, *rest):
        if len(seen) == 1:
            seen.append("interrupted")
            raise KeyboardInterrupt
        seen.append(str(workload))
        return [BLANK | {"contender": str(workload)}]

    monkeypatch.setattr(run, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        go(path, TINY, LONGER)
    assert json.loads(path.read_text())["not_reached"] == [str(LONGER)]
    content = go(path, TINY, LONGER, resume=True)
    assert seen == [str(TINY), "interrupted", str(LONGER)]
    assert [row["contender"] for row in content["rows"]] == [str(TINY), str(LONGER)]
    with pytest.raises(RunError, match="rounds 2 there, 3 here"):
        run.run([TINY], path, rounds=3, resume=True)


def test_what_the_budget_does_not_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_: [])
    content = go(tmp_path / "none.json", TINY, LONGER, budget=1e-9)
    assert content["not_reached"] == [str(TINY), str(LONGER)]
    assert str(LONGER) in report.tables(content)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "old.json"
    run.write(path, {"machine": {}, "rows": [{"a": 1}, {"a": 2}]})
    old = path.read_text()
    assert json.loads(old) == {"machine": {}, "rows": [{"a": 1}, {"a": 2}]}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.write(path, {"machine": {}, "rows": []})
    assert path.read_text() == old


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_are_counted_per_element(dtype, size):
    case = Lif(replace(TINY, dtype=dtype), "cpu")
    elements = 4 * 64
    for mode, streams in {"inference": 2, "forward": 2, "backward": 3, "both": 5}.items():
        times = {("other", mode): [2.0, 4.0, 3.0], ("Tensor.copy_", "copy"): [1.0, 2.0, 1.0]}
        row = run.figures(case, mode, times["other", mode], times, None)
        assert row["ms"] == 3000 and (row["ms_min"], row["ms_max"]) == (2000, 4000)
        assert row["GB/s"] == pytest.approx(streams * size * elements / 3 / 1e9)
        assert row["over_copy"] == 2 and row["percent_of_copy"] == 100 * streams / 2 / 2


def test_kept_and_peak_memory(ours):
    workload = replace(LONGER, steps=80, shape=(16, 1024))
    rows = {(row["contender"], row["mode"]): row for row in measured(workload, ours)}
    row = rows[ours.name, "both"]
    assert row["kept_bytes"] == 4 * 80 * 16384 + 4 * 4 * 16384  # x, and the potential after 16, 32, 48 and 64 steps
    assert row["peak_bytes"] is None or row["peak_bytes"] > 2 * 4 * 80 * 16384 * 0.9  # spikes and gradient at least


def test_what_a_stage_keeps(ours):
    elements, channels = 4 * 2 * 8 * 4 * 4, 8
    rows = {(row["contender"], row["mode"]): row for row in measured(CHAIN, *contenders("cpu")[0])}
    table = 5 * 4 * channels
    assert rows[ours.name, "both"]["kept_bytes"] == 2 * elements + 2 * elements + table  # y, spikes
    statistics = 2 * 4 * channels
    more = rows[f"{ours.name}, separate", "both"]["kept_bytes"]
    assert more == 3 * 2 * elements + statistics  # and what batch norm puts out


def test_kept_leaves_out_what_is_there_anyway():
    x, w = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    x.requires_grad_()
    assert kept(lambda: x @ w) == 4 * (15 + 35)
    assert kept(lambda: x @ w, [w]) == 4 * 15
    assert kept(lambda: (x @ w).tanh(), [x, w]) == 4 * 21

    def halved():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.bfloat16(), "half"), lambda kept: kept[0].float()):
            y = x @ w
        return y.tanh()

    assert kept(halved) == 2 * (15 + 35) + 4 * 21


def test_whole_calls_in_fresh_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(busy, "WORKLOADS", [Workload("calls", "lif", 20, (64,), "bfloat16")])
    monkeypatch.setattr(busy, "BESIDE", ("a busy process",))
    monkeypatch.setattr(busy, "RESULTS", tmp_path)
    busy.main("cpu-busy", rounds=1, seconds=0)
    rows = json.loads((tmp_path / "cpu-busy.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == list(busy.SETTINGS)
    assert all(row["ms"] > 0 and row["resident_bytes"] > 1e7 for row in rows) and rows[1]["over_one"] == 1
    assert "Beside a busy process, bfloat16" in (tmp_path / "cpu-busy.md").read_text()


def test_the_quick_choice_has_batch_norm():
    assert "norm" in {workload.group for workload in QUICK}


@pytest.mark.parametrize("chosen", [CPU, GPU, QUICK])
def test_workloads_are_distinct_and_known(chosen):
    assert len({str(workload) for workload in chosen}) == len(chosen)
    assert {workload.op for workload in chosen} <= set(CASES)


def test_the_command_forwards_to_the_checkout(monkeypatch, tmp_path):
    from snnkern import cli

    result = CliRunner().invoke(cli.app, ["bench", "--group", "none"])
    assert result.exit_code == 2 and "--group must be one of chain, image, long" in result.output
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "snnkern" / "cli.py"))
    result = CliRunner().invoke(cli.app, ["bench"])
    assert result.exit_code == 1 and "source checkout" in result.output
