import contextlib
import importlib.util
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from conftest import brief
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

pytest.importorskip("benchmarks", reason="the benchmarks are in the source checkout")
pytest.importorskip("matplotlib")

import snnkern
from benchmarks import busy, cases, pictures, report, run
from benchmarks.cases import CASES, Lif
from benchmarks.check import ROUNDED, compare_within
from benchmarks.contenders import NEURON, Contender, contenders, normed
from benchmarks.measure import Call, Clock, CudaClock, kept
from benchmarks.run import BLANK
from benchmarks.workloads import CPU, GPU, QUICK, Workload
from examples import cuda_graph, swap
from snnkern.files import commit
from snnkern.models import ResNet19, layers
from snnkern.surrogate import ATan, Triangle
from snnkern.train.folder import RunError

TINY = Workload("image", "lif", 4, (2, 4, 2, 4))
LONGER = replace(TINY, group="layer", steps=70, shape=(2, 32))
NORM = Workload("norm", "bn+lif", 4, (2, 8, 4, 4))
CHAIN = Workload("chain", "conv+bn+lif+conv", 4, (2, 8, 4, 4), "bfloat16")
SUMS = Workload("sums", "lif+ttm", 6, (2, 32), steps_out=3)
NORM_SUMS = Workload("norm-sums", "bn+lif+ttm", 6, (2, 8, 4, 4), steps_out=3)
MIXED = Workload("mixed", "CNN6", 3, (4, 1, 8, 8))
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


def test_sums_of_spikes_behind_batch_norm_are_timed_in_every_mode(ours):
    rows = measured(NORM_SUMS, *contenders("cpu")[0])
    assert not [row["reason"] for row in rows if row["reason"]]
    modes = {name: {row["mode"] for row in rows if row["contender"] == name} for name in (r["contender"] for r in rows)}
    assert modes == {"Tensor.copy_": {"copy"}, ours.name: MODES | KERNELS, f"{ours.name}, separate": MODES}
    assert CASES["bn+lif+ttm"](NORM_SUMS, "cpu").streams["both"] == 6.5

    def other(channels, steps):
        return snnkern.nn.BNLIF(channels, snnkern.nn.LIF(**NEURON, threshold=1.1, steps_out=steps))

    assert "spikes differ" in measured(NORM_SUMS, Contender("other", other, groups=("norm-sums",)))[0]["reason"]


def test_mixed_passes_are_timed_if_they_equal_the_plain_ones(tmp_path, ours, monkeypatch):
    able = [contender for contender in contenders("cpu")[0] if contender.groups == ("mixed",)]
    content = go(tmp_path / "mixed.json", MIXED, able=able)
    assert json.loads((tmp_path / "mixed.json").read_text()) == content
    mixed, sums, repeated, both, greatest, mean = rows = content["rows"]
    assert not [row["reason"] for row in rows if row["reason"]] and mixed["contender"] == ours.name
    assert all(row["mode"] == "step" and row["over_ours"] > 0 and row["kept_bytes"] for row in rows)
    assert mixed["t"] == both["t"] and len({*map(tuple, mixed["t"])}) == len(mixed["t"]) == 3
    assert greatest["t"] == [[3] * 6] * 3 and mean["t"] == [[2] * 6] * 3
    assert mixed["macs"] == sums["macs"] < repeated["macs"] == both["macs"] < greatest["macs"]
    assert greatest["macs"] - 3 * 4 * 64 * 16 * 9 == 3 * (mean["macs"] - 3 * 4 * 64 * 16 * 9) / 2  # but for the image
    drawn = "; ".join(str(tuple(t)) for t in mixed["t"])
    assert f"One update of CNN6, T up to 3, batch 4, float32, contiguous, at {drawn}" in report.tables(content)
    assert [file.name for file in pictures.draw(content, tmp_path / "some.json")] == ["some-mixed.png"]

    def wrong(y, steps):
        return y if len(y) == steps else layers.ttm(y, steps).roll(1, 0)

    monkeypatch.setattr(layers, "over_steps", wrong)
    rows = {row["contender"]: row for row in measured(MIXED, able[0], able[3])}
    assert "outputs differ" in rows[ours.name]["reason"] and rows[ours.name]["ms"] is None
    assert rows[f"{ours.name}, both apart"]["ms"] > 0  # repeats elsewhere


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


@pytest.fixture
def figures(monkeypatch):
    """What would be saved, by name; nothing is."""
    kept = {}
    monkeypatch.setattr(pictures.Figure, "savefig", lambda figure, file, **_: kept.setdefault(file.name, figure))
    return kept


def committed(name):
    path = Path(run.__file__).parent / "results" / f"{name}.json"
    return json.loads(path.read_text())


def test_pictures_say_why_lines_stop_and_what_was_measured(tmp_path, figures):
    content = committed("cpu")
    layer = [row for row in content["rows"] if row["op"] == "lif" and row["N"] == 4096 and row["dtype"] == "float32"]
    stops = {row["contender"]: row["reason"] for row in layer if row["reason"] and row["T"] == 4000}
    assert {"snnTorch", "compiled loop"} <= set(stops)
    pictures.draw(content, tmp_path / "cpu.json")
    told = {
        name.removeprefix(f"{tmp_path}/cpu-").removesuffix(".png.part"): figure.get_supxlabel().replace("\n", " ")
        for name, figure in figures.items()
    }
    assert f"snnTorch at T = 4,000, N = 4,096: {stops['snnTorch']}" in told["time-over-T"]
    assert f"compiled loop, compiled SpikingJelly: {stops['compiled loop']}" in told["time-over-T"]
    assert "compiled loop, compiled SpikingJelly elsewhere: compiled anew" in told["time-over-N"]
    for text in told.values():
        assert content["machine"]["date"] in text and f"spikingjelly {content['machine']['spikingjelly']}" in text
    assert {name for name, text in told.items() if "least to the greatest" in text} == {
        *("time-over-T", "time-over-N", "protocol", "models")
    }


def test_lines_that_coincide_are_both_seen(tmp_path, figures):
    pictures.draw(committed("cpu-scaling"), tmp_path / "cpu.json")
    kept = figures[f"{tmp_path}/cpu-memory-over-T.png.part"].axes[0]
    ours, loop, spikingjelly = kept.get_lines()  # in the order in which they are drawn
    assert (loop.get_ydata() == spikingjelly.get_ydata()[: len(loop.get_ydata())]).all()
    assert loop.get_linewidth() > spikingjelly.get_linewidth() == ours.get_linewidth()


def test_bars_of_one_library_differ_and_have_a_spread(tmp_path, figures):
    pictures.draw(committed("cpu"), tmp_path / "cpu.json")
    axes = figures[f"{tmp_path}/cpu-models.png.part"].axes[0]
    colours = [(*bar.get_facecolor(), bar.get_alpha()) for bar in axes.patches]
    assert len(set(colours)) == len(colours) == 7
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [2] * 7
    for bar, line in zip(axes.patches, axes.get_lines(), strict=True):
        assert line.get_xdata()[0] <= bar.get_width() <= line.get_xdata()[1]


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


def test_every_piece_is_run_before_it_is_timed(monkeypatch):
    """A kernel with T as a constant is compiled anew for each."""
    ran, timed = [], []

    class Layer(torch.nn.Module):
        def forward(self, x):
            ran.append(len(x))
            return x * 1

    def seconds_of(call, device):
        timed.append(ran[-1])  # the piece that is about to be timed
        call()
        assert ran[-1] == timed[-1]
        return 1e-4 * timed[-1]

    monkeypatch.setattr(cases, "seconds_of", seconds_of)
    Lif(LONGER, "cpu").foresee(Layer())
    assert timed == [4, 17]


@pytest.mark.parametrize(("seconds", "passes"), [((1e-5, 0.1), True), ((0.01, 0.16), True), ((0.1, 1.6), False)])
def test_a_disturbed_piece_does_not_refuse_the_whole(seconds, passes, monkeypatch):
    pieces = iter(seconds)
    monkeypatch.setattr(cases, "seconds_of", lambda call, device: next(pieces))
    layer = torch.nn.Softplus()
    if passes:
        Lif(LONGER, "cpu").foresee(layer)
    else:
        with pytest.raises(run.Refused, match="would take 26 s a call, more than 4"):
            Lif(LONGER, "cpu").foresee(layer)


def test_the_cache_of_a_gpu_is_emptied_by_reading():
    class Unhurried(CudaClock):
        now, between, filler = Clock.now, Clock.between, torch.zeros(10)

        def __init__(self):
            pass

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names.append(operation.name())
            return operation(*args, **kwargs or {})

    names = []
    with Operations():
        Unhurried()(Call("other", lambda i, mark: (mark(), mark()), {"both": (0, 1)}), 0)
    assert names == ["aten::sum"]


def test_whole_calls_in_fresh_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(busy, "WORKLOADS", [Workload("calls", "lif", 20, (64,), "bfloat16")])
    monkeypatch.setattr(busy, "BESIDE", ("a busy process",))
    monkeypatch.setattr(busy, "SETTINGS", brief(busy.SETTINGS, ("one thread",)))
    busy.main(tmp_path, rounds=1, seconds=0)
    rows = json.loads((tmp_path / "cpu-busy.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == list(busy.SETTINGS)
    assert all(row["ms"] > 0 and row["resident_bytes"] > 1e7 for row in rows)
    assert [row["over_one"] for row in rows if row["contender"] == "one thread"] == [1]
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
    assert result.exit_code == 2 and "--group must be one of chain, image, layer, long" in result.output
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "snnkern" / "cli.py"))  # installed elsewhere
    monkeypatch.chdir(Path(__file__).parents[1])
    result = CliRunner().invoke(cli.app, ["bench", "--group", "none"])
    assert result.exit_code == 2 and "--group must be one of chain, image, layer, long" in result.output
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["bench"])
    assert result.exit_code == 1 and "source checkout" in result.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--out", "{}/file"], "--out must be a folder that can be written to"),
        (["--out", "{}/file/within"], "--out must be a folder that can be written to"),
        (["--group", "none"], "--group must be one of"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
        (["--budget", "-1"], "Invalid value for '--budget'"),
        (["--redraw", "{}/none.json"], "none.json is no file of results: FileNotFoundError"),
        (["--redraw", "{}/file"], "file is no file of results: JSONDecodeError"),
        (["--redraw", "{}/other.json"], "other.json is no file of results: KeyError('machine')"),
        (["--redraw", "{}/list.json"], "list.json is no file of results: TypeError"),
        (["more"], "extra argument"),
    ],
)
def test_wrong_arguments_are_told(arguments, error, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run", None)
    (tmp_path / "file").write_text("text")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    result = CliRunner().invoke(run.app, [argument.format(tmp_path) for argument in arguments])
    assert result.exit_code == 2 and error in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "path", "rounds"),
    [
        (["--quick"], "runs/bench/cpu-quick.json", 5),
        (["--quick", "--rounds", "3", "--out", "here"], "here/cpu-quick.json", 3),
        (["--group", "norm", "--name", "mine"], "runs/bench/mine.json", 7),
    ],
)
def test_results_go_to_a_folder_of_the_users(arguments, path, rounds, tmp_path, monkeypatch):
    asked, empty = [], go(tmp_path / "empty.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", lambda *call, **_: asked.append(call) or run.write(call[1], empty) or empty)
    result = CliRunner().invoke(run.app, arguments)
    assert result.exit_code == 0 and path in result.output
    assert [(str(call[1]), call[3]) for call in asked] == [(path, rounds)]
    assert {file.suffix for file in Path(path).parent.iterdir()} == {".json", ".md"}


def test_redraw_writes_tables_and_pictures_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run", None)
    run.write(tmp_path / "one.json", committed("cpu-scaling"))
    before = (tmp_path / "one.json").read_bytes()
    result = CliRunner().invoke(run.app, ["--redraw", str(tmp_path / "one.json")])
    assert result.exit_code == 0
    assert (tmp_path / "one.json").read_bytes() == before
    written = {"one.json", "one.md", *(f"one-{name}.png" for name in ("time-over-T", "bandwidth", "memory-over-T"))}
    assert {path.name for path in tmp_path.iterdir()} == written == {Path(line).name for line in result.output.split()}


@pytest.mark.parametrize("peer", brief(["SpikingJelly", "plain loop"], ["SpikingJelly"]))
def test_the_swap_changes_no_bit(peer, tmp_path, monkeypatch, capsys, ours):
    if peer == "SpikingJelly":
        pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed")
    else:
        real = importlib.util.find_spec
        monkeypatch.setattr(swap, "find_spec", lambda name: None if name == "spikingjelly" else real(name))
    swap.main(tmp_path / "new", updates=4, steps=256, batch=8)
    content = json.loads((tmp_path / "new" / "swap.json").read_text())
    assert list(content["runs"]) == [peer, "snnkern"]
    theirs, ours = content["runs"].values()
    assert theirs["loss"] == ours["loss"] and len(set(ours["loss"])) == 4
    assert theirs["weights"] == ours["weights"]
    assert all(seconds > 0 for run in (theirs, ours) for seconds in run["seconds"])
    assert theirs["peak_bytes"] > ours["peak_bytes"] > 0
    assert (tmp_path / "new" / "swap.png").stat().st_size > 0
    told = capsys.readouterr().out
    assert told.count("equal") == 5 and "differ" not in told
    assert ("SpikingJelly is not installed" in told) == (peer == "plain loop")


def test_the_swap_tells_what_differs(monkeypatch):
    run = {"seconds": [1.0, 2.0], "peak_bytes": 10**6, "weights": "a" * 64, "loss": [2.0, 1.0]}
    console = Console(file=io.StringIO(), width=100)
    console.print(swap.table({"SpikingJelly": run, "snnkern": run | {"loss": [2.0, 1.1], "weights": "b" * 64}}))
    told = console.file.getvalue()
    assert told.count("equal") == 1 and told.count("differs") == 1 and told.count("differ ") == 1


def test_the_swap_ends_when_a_training_fails(monkeypatch, capfd):
    monkeypatch.setenv("SNNKERN_BACKEND", "cuda")
    if snnkern.backends().get("cuda") is None:
        pytest.skip("the backend that is to fail can run here")
    with pytest.raises(typer.Exit):
        swap.measure(["snnkern"], {"updates": 2, "steps": 4, "batch": 2}, Console(file=io.StringIO()))
    assert "the training with snnkern ended with exit status 1" in capfd.readouterr().err


def test_the_commit_of_a_folder_is_known_only_in_a_checkout(tmp_path, monkeypatch, ours):
    assert commit(tmp_path) is None
    quiet = {"cwd": tmp_path, "check": True, "capture_output": True}
    subprocess.run(["git", "init"], **quiet)
    assert commit(tmp_path) is None  # nothing committed yet
    (tmp_path / "file").write_text("one")
    subprocess.run(["git", "add", "file"], **quiet)
    who = "-c", "user.name=one", "-c", "user.email=one@example.org"
    subprocess.run(["git", *who, "commit", "-m", "one"], **quiet)
    clean = commit(tmp_path)
    assert clean and not clean.endswith("+")
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == clean + "+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None and run.machine("cpu", "kept")["commit"] is None


def test_the_example_of_a_graph_trains_where_there_is_none(monkeypatch, capsys):
    """On a GPU, ``test_gpu.py`` has the graph itself."""
    monkeypatch.setattr(cuda_graph, "TRAINING", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda_graph.main()
    assert "a CUDA graph needs a GPU" in capsys.readouterr().out
    losses = cuda_graph.train("cpu", graph=False)[0]
    assert losses[-1] < losses[0] and losses == cuda_graph.train("cpu", graph=False)[0]
