"""What the papers state exactly, and the runner of what they claim."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import brief

from snnkern import analysis
from snnkern.backend.reference import lif as reference
from snnkern.losses import sdt, tet
from snnkern.models import CNN6
from snnkern.spec.neuron import make_spec
from snnkern.surrogate import Dspike, Rectangle, Triangle
from snnkern.train.folder import RunError
from snnkern.train.recipe import load

pytest.importorskip("experiments", reason="the experiments are in the source checkout")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from experiments import claims, dspike, long, mtt
from experiments import tet as tet_claims
from experiments.dspike import DSPIKE_TABLE
from experiments.protocol import Measure, Run, Work, ran, read

# Statements that hold exactly


@pytest.mark.parametrize("low, high", [(1, 2), (2, 6), (4, 5)])
@pytest.mark.parametrize("fused", [True, False])
def test_a_network_of_few_steps_is_the_beginning_of_one_of_many(low, high, fused):
    """What inheritance from long to short starts from: Li et al., NeurIPS 2021, section 4.4."""
    torch.manual_seed(0)
    many, few, x = CNN6(high, fused=fused), CNN6(low, fused=fused), torch.randn(10, 1, 8, 8)
    with torch.no_grad():
        for _ in range(60):
            many(x)
    few.load_state_dict(many.state_dict())
    many.eval(), few.eval()
    spikes = []
    for model in (many, few):
        model.head.register_forward_pre_hook(lambda layer, x: spikes.append(x[0]))
    with torch.no_grad():
        outputs = many(x)
        torch.testing.assert_close(outputs[:low], few(x))  # how a product is rounded may depend on its number of rows
        assert torch.equal(spikes[0][:low], spikes[1])
        assert not torch.equal(outputs[low], outputs[low - 1])
        few.train()
        assert not torch.allclose(outputs[:low], few(x))  # not so with the statistics of the batch


def test_gradient_of_a_spike_to_an_earlier_input_is_the_product_of_equation_15():
    """ds(t)/dI(t-n) = g(t) tau^n prod_{i=t-n}^{t-1} [(1 - s(i)) - v(i) g(i)], Du et al., ICLR 2025, eq. 15.

    Its eq. 7, whose product goes on to t, has one factor too many.
    """
    tau, steps, surrogate = 0.5, 6, Triangle()
    spec = make_spec(tau, None, True, 1.0, 0.0, surrogate, False, False)
    x = (1.5 * torch.rand(steps, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    spikes = reference(x, None, spec, 0, steps)[0]
    assert 0.1 < spikes.mean() < 0.9
    u, v = torch.zeros(50, dtype=torch.float64), []
    for x_t, s in zip(x.detach(), spikes.detach(), strict=True):
        v.append(tau * u + x_t)
        u = v[-1] * (1 - s)
    v, s = torch.stack(v), spikes.detach()
    g = surrogate.grad(v - 1)
    factor = (1 - s) - v * g
    for t in range(steps):
        (gradient,) = torch.autograd.grad(spikes[t].sum(), x, retain_graph=True)
        for n in range(t + 1):
            product = g[t] * tau**n * factor[t - n : t].prod(0)
            torch.testing.assert_close(gradient[t - n], product, rtol=1e-12, atol=1e-14)
            assert not torch.allclose(gradient[t - n], product * factor[t])


@pytest.mark.parametrize("b", [1e-3, 0.2, 1.0, 2.0, 4.0, 10.0, 100.0])
@pytest.mark.parametrize("width", [1.0, 0.5, 3.0])
def test_dspike_has_area_one_between_0_and_1(b, width):
    x = torch.linspace(-width / 2, width / 2, 20001, dtype=torch.float64)
    assert torch.trapezoid(Dspike(b, width).grad(x), x).item() == pytest.approx(1, abs=1e-6)
    ends = Dspike(b, width).primitive(torch.tensor([-width / 2, 0.0, width / 2], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0, 0.5, 1], abs=1e-12)


def test_dspike_goes_from_the_identity_to_the_step():
    """Li et al., NeurIPS 2021, lemma 4.1, in x - 0.5; the step is 0.5 at its edge."""
    x = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    torch.testing.assert_close(Dspike(1e-4).primitive(x), x + 0.5, rtol=0, atol=1e-8)
    torch.testing.assert_close(Dspike(1e-4).grad(x[1:-1]), Rectangle().grad(x[1:-1]), rtol=0, atol=1e-8)
    assert Dspike(5e3).primitive(x).tolist() == pytest.approx([0.0] * 50 + [0.5] + [1.0] * 50, abs=1e-12)


@pytest.mark.parametrize("threshold, peak", [(0.5, 1.0), (1.0, 0.3), (0.5, 0.6)])
def test_the_triangle_of_dspike_is_ours_with_half_width_threshold(threshold, peak):
    """peak max(0, 1 - |u/threshold - 1|), Li et al., NeurIPS 2021, eq. 8: of area peak * threshold, not 1."""
    u = torch.linspace(-1, 3, 40001, dtype=torch.float64)
    published = peak * (1 - (u / threshold - 1).abs()).clamp(min=0)
    torch.testing.assert_close(Triangle(threshold, peak).grad(u - threshold), published, rtol=0, atol=1e-12)
    assert torch.trapezoid(published, u).item() == pytest.approx(peak * threshold, abs=1e-6)
    tet = (0.7 - (u - threshold).abs()).clamp(min=0) / 0.7**2  # Deng et al., eq. 5, and Du et al., eq. 6
    torch.testing.assert_close(Triangle(0.7).grad(u - threshold), tet, rtol=0, atol=1e-12)


def test_the_lemma_holds_where_its_published_proof_does_not():
    """L_SDT <= L_TET (Deng et al., lemma 4.1) is the convexity of logsumexp; the step -log mean_t S(O_t) >= -log
    S(mean_t O_t) of the proof fails in about half of random cases."""
    outputs = 3 * torch.randn(4, 2000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.zeros(1, dtype=torch.int64)
    failing = 0
    for sample in outputs.unbind(1):
        sample = sample.unsqueeze(1)
        assert tet(sample, target) >= sdt(sample, target)
        failing += (-sample.softmax(-1).mean(0)[0, 0].log() < sdt(sample, target)).item()
    assert 0.4 < failing / 2000 < 0.6


@pytest.mark.parametrize("row", DSPIKE_TABLE)
def test_the_five_energies_follow_from_their_counts(row):
    additions, multiplications, printed = DSPIKE_TABLE[row]
    assert f"{analysis.joules(1e6 * additions, 1e6 * multiplications):.3g}" == f"{printed:.3g}"


# What a claim trains


def test_a_run_is_what_its_weights_and_metrics_say(tmp_path):
    """Not what a setting says that nobody reads: another network, T, loss or learning rate than claimed is an error."""
    work = Work(tmp_path, 0, quick=True)
    run = dspike.SEARCHED[0.1]
    trained = work.train(run)
    assert [line["steps"] for line in trained.lines()] == [4, 4] and work.used == ["search0.1"]
    convolutions = [p.shape for p in trained.model().parameters() if p.dim() == 4]
    assert convolutions == [(8, 1, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3)]
    folder = work.path(run.name)
    assert ran(folder) == run.wanted.replace("30 sdt", "2 sdt")
    stamp = (folder / "metrics.jsonl").stat().st_mtime_ns
    work.train(run)
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == stamp  # once
    others = {
        "network": ("model.plan=8C3-AP2-16C3-AP2-16C3",),
        "T": ("stage.steps=3",),
        "loss": ('stage.loss={name="tet"}',),
        "threshold": ("neuron.threshold=1.0",),
        "lr": ("stage.optimiser.lr=0.1",),
    }
    for name, overrides in others.items():
        with pytest.raises(AssertionError, match="turned out to be"):
            work.train(replace(run, name=name, overrides=(*run.overrides, *overrides)))
    with pytest.raises(RunError, match="other settings"):
        work.train(replace(run, overrides=(*run.overrides, "batch=50")))


def test_every_run_says_what_it_is():
    """The words that a run is held to are those of its recipe, whose epochs and losses a quick run cuts short."""
    runs = {run for module in (tet_claims, dspike, mtt) for value in vars(module).values() for run in runs_in(value)}
    assert len(runs) == len({run.name for run in runs}) > 20
    for run in runs:
        stages = load(run.recipe, run.overrides).stage
        assert len(stages) == len(run.wanted.split("; "))
        for stage, wanted in zip(stages, run.wanted.split("; "), strict=True):
            starts = [loss.from_epoch for loss in stage.loss] + [stage.epochs + 1]
            losses = [f"{b - a} {loss.name}" for loss, (a, b) in zip(stage.loss, pairwise(starts), strict=True)]
            assert f": {', '.join(losses)}, lr {stage.optimiser['lr']:g}" in wanted
            assert f"T = {stage.steps}{',' if stage.mtt else ':'}" in wanted
            assert ("passes" in wanted) == bool(stage.mtt)


def test_results_of_one_name_are_of_one_function():
    assert len({p.run for p in claims.PROTOCOLS.values()}) == len({p.key for p in claims.PROTOCOLS.values()})


def runs_in(value) -> list[Run]:
    values = value.values() if isinstance(value, dict) else [value]
    return [run for run in values if isinstance(run, Run)]


# The runner


def test_protocols_run_and_are_reported(tmp_path):
    """Two cheap ones, from two files; all where it is thorough."""
    out, chosen = tmp_path / "claims", brief([*claims.PROTOCOLS], ["E2.13", "E2.21"])
    arguments = ["--quick", "--seeds", "1", "--jobs", "1", "--out", str(out), "--work", str(tmp_path / "work")]
    claims.main([*arguments, "--only", *chosen])
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    page = (tmp_path / "claims.md").read_text()
    assert list(found["claims"]) == chosen and "The numbers mean nothing" in page
    for name in chosen:
        protocol = claims.PROTOCOLS[name]
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"--only {name}`" in page and protocol.claim in page and f"(claims/{name}.png)" in page
        rows = found["claims"][name]["rows"]
        assert len(rows) == len(protocol.measures) and all(math.isfinite(row["mean"]) for row in rows)
        assert all(row["state"] != "holds" for row in rows if "state" in row)  # one seed shows nothing
    exact = {check["check"]: check for claim in found["claims"].values() for check in claim["checks"]}
    checks = brief(("steps of b", "searches whose", "greatest difference", "relative error", "training loss"), ())
    for start in ("rows of table 3", *checks):
        assert next(check for name, check in exact.items() if name.startswith(start))["kept"]
    if "E2.1" in chosen:
        assert len(found["results"]["tet_and_sdt"][0]["result"]["TET"]["accuracy"]) == 64
    assert set(found["runs"]) == {run for units in found["results"].values() for run in units[0]["runs"]}
    assert all(len(kept) == 1 and kept[0]["ran"] in page for kept in found["runs"].values())


def test_finished_units_are_kept_and_others_added(tmp_path, capsys):
    arguments = ["--quick", "--only", "E2.26", "--out", str(tmp_path / "c"), "--work", str(tmp_path / "w")]
    claims.main([*arguments, "--seeds", "1", "--jobs", "1"])
    kept = tmp_path / "w" / "gap-seed0-quick.json"
    before = kept.stat().st_mtime_ns
    claims.main([*arguments, "--seeds", "2", "--jobs", "2"])
    assert kept.stat().st_mtime_ns == before and "seed 1: 2 of 2" in capsys.readouterr().out
    units = json.loads((tmp_path / "c" / "results.json").read_text())["results"]["gap"]
    assert [unit["seed"] for unit in units] == [0, 1] and units[0]["result"] != units[1]["result"]


def test_verdicts_follow_from_the_bounds():
    def state(values, *wanted):
        return Measure("", lambda r: r["x"], wanted).judge([{"x": v} for v in values])

    assert state([2, 3, 4], ">", 0)["state"] == "holds"
    row = state([1, 2, 7], ">", 0)  # 3.3 +- 1.9: by one standard error, not by two
    assert row["state"] == "within noise" and row["seeds"] == 3 and row["error"] == pytest.approx(1.856, abs=1e-3)
    row = state([-3, 1, 4], ">", 0)
    assert row["state"] == "within noise" and row["seeds"] == 2 and row["mean"] == pytest.approx(2 / 3)
    assert state([-1, -2, 1], ">", 0)["state"] == "does not show"
    assert state([0, 0, 0], ">", 0)["state"] == "does not show"
    assert state([0, 0, 0], ">=", 0)["state"] == state([0.5, 0.5], "=", 0.5)["state"] == "holds"
    assert state([3], ">", 0)["state"] == state([-1.9], "within", 2)["state"] == "within noise"  # one seed has no error
    assert state([0.5, 0.5, 0.6], "=", 0.5)["state"] == "does not show"
    assert state([-2.1], "within", 2)["state"] == state([3], "<", 2)["state"] == "does not show"
    assert "state" not in Measure("", lambda r: r["x"]).judge([{"x": 1}])

    def rows(*states):
        return [{"measure": f"m{i}", "state": s} for i, s in enumerate(states)] + [{"measure": "seen"}]

    assert claims.verdict(rows("holds", "holds")) == "holds"
    assert claims.verdict(rows("does not show", "does not show")) == "does not show"
    assert claims.verdict(rows("holds", "within noise", "does not show")) == (
        "holds in part (1 of 3 measures). Within noise: *m1*. Does not show: *m2*"
    )
    assert claims.verdict(rows("within noise", "does not show")).startswith("not shown. Within noise")


def test_the_jackknife_gives_the_standard_error_of_a_mean():
    values = [1.0, 2.0, 7.0, 4.0]
    results = [{"x": v} for v in values]
    together = Measure("", lambda rs: sum(r["x"] for r in rs) / len(rs), (">", 0), together=True).judge(results)
    alone = Measure("", lambda r: r["x"], (">", 0)).judge(results)
    assert together["mean"] == alone["mean"] and together["error"] == pytest.approx(alone["error"])
    assert together["seeds"] is None and together["state"] == alone["state"] == "holds"


def test_checks_take_the_worst_seed():
    check = Measure("", lambda r: r["x"], ("=", 0.5))
    assert check.check([{"x": 0.5}, {"x": 0.5}])["kept"]
    found = check.check([{"x": 0.5}, {"x": 0.7}, {"x": 0.4}])
    assert not found["kept"] and found["worst"] == 0.7


def test_the_correlation_knows_no_easy_seeds():
    """Within a seed, accuracy at moments and in total are opposed; between seeds they go together."""
    results = [
        {"a": {"moments": [s + 1], "accuracy": s}, "b": {"moments": [s], "accuracy": s + 1}} for s in (0.0, 10.0, 20.0)
    ]
    assert tet_claims.correlation(results) == pytest.approx(-1)


def test_energies_are_compared_on_the_line_between_two_points():
    sdt = [{"joules": j, "accuracy": 0.5} for j in (1.0, 2.0, 3.0, 4.0)]
    curve = [{"joules": j + 0.5, "accuracy": 0.1 * j} for j in range(6)]
    assert dspike.at_equal_energy({"SDT": {"curve": sdt}, "TET": {"curve": curve}}) == pytest.approx(100 * (0.25 - 0.5))


def test_options_are_checked(capsys):
    for arguments in (["--only", "E9"], ["--seeds", "0"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            claims.main(arguments)


def test_long_series_are_trained_with_every_network(tmp_path):
    recipe = load("long-digits")
    made = {network: long.variant(recipe, network) for network in long.NETWORKS}
    assert recipe in made.values()  # its own network is one of them
    assert {held.model["recurrent"] for held in made.values()} == {True, False}
    assert len({str(held.neuron) for held in made.values()}) == 3
    options = ["--only", "long-digits", "--networks", "feed-forward", "--out", str(tmp_path), "--work", str(tmp_path)]
    long.main([*options, "--", "seeds=2", "stage.epochs=2", "data.train=60", "model.hidden=[8]"])
    found = read(tmp_path / "results.json")["results"]["long-digits"]["accuracy"]["feed-forward"]
    assert [len(run) for run in found] == [2, 2] and all(0 <= accuracy <= 100 for run in found for accuracy in run)
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[2].startswith("| feed-forward |") and f"{(found[0][1] + found[1][1]) / 2:.1f} ±" in lines[2]
    assert lines[3] == "| nearest neighbour | 98.5 |" and (tmp_path / "accuracy.png").exists()
