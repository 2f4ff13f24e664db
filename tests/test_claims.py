"""What the papers state exactly, and the runner of what they claim."""

import json
import math

import pytest
import torch

from snnkern import analysis
from snnkern.backend.reference import lif as reference
from snnkern.losses import sdt, tet
from snnkern.models import CNN6
from snnkern.spec.neuron import make_spec
from snnkern.surrogate import Dspike, Rectangle, Triangle

pytest.importorskip("experiments", reason="the experiments are in the source checkout")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from experiments import claims
from experiments.dspike import DSPIKE_TABLE
from experiments.protocol import Measure, Size

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
    with torch.no_grad():
        outputs = many(x)
        assert torch.equal(outputs[:low], few(x))
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


# The runner


def test_every_protocol_runs_and_is_reported(tmp_path, capsys):
    torch.manual_seed(0)
    work, out = tmp_path / "work", tmp_path / "claims"
    work.mkdir()
    for name in claims.PROTOCOLS:
        claims.run_unit(name, 0, Size(quick=True), work / f"{name}-seed0-quick.json")
    claims.main(["--quick", "--seeds", "1", "--out", str(out), "--work", str(work)])  # nothing is left to run
    found = json.loads((out / "results.json").read_text())
    page = (tmp_path / "claims.md").read_text()
    assert list(found) == list(claims.PROTOCOLS) and "The numbers mean nothing" in page
    for name, protocol in claims.PROTOCOLS.items():
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"--only {name}`" in page and protocol.claim in page and f"({'claims'}/{name}.png)" in page
        assert len(found[name]["rows"]) == len(protocol.measures)
        assert all(math.isfinite(row["mean"]) for row in found[name]["rows"])
    exact = {row["measure"]: row for name in ("E2.7", "E2.8", "E2.20", "E2.21") for row in found[name]["rows"]}
    for start in ("cost in steps", "greatest difference", "relative error", "rows of the table"):
        assert next(row for name, row in exact.items() if name.startswith(start))["state"] == "holds"


def test_units_run_in_processes_and_finished_ones_are_kept(tmp_path, capsys):
    arguments = [
        "--quick",
        "--only",
        "E2.8",
        "--jobs",
        "2",
        "--out",
        str(tmp_path / "c"),
        "--work",
        str(tmp_path / "w"),
    ]
    claims.main([*arguments, "--seeds", "1"])
    kept = tmp_path / "w" / "E2.8-seed0-quick.json"
    before = kept.stat().st_mtime_ns
    claims.main([*arguments, "--seeds", "2"])
    assert kept.stat().st_mtime_ns == before and "seed 1" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "c" / "results.json").read_text())["E2.8"]["units"]) == 2


def test_a_seed_gives_the_same_numbers_again(tmp_path):
    results = [claims.PROTOCOLS["E2.8"].run(3, Size(quick=True)) for _ in range(2)]
    assert results[0] == results[1] != claims.PROTOCOLS["E2.8"].run(4, Size(quick=True))


def test_verdicts_follow_from_the_bounds():
    def state(values, *wanted):
        return claims.judge(Measure("", lambda r: r["x"], wanted), [{"x": v} for v in values])

    assert state([1, 2, 3], ">", 0)["state"] == "holds"
    row = state([-3, 1, 4], ">", 0)
    assert row["state"] == "within noise" and row["seeds"] == 2 and row["mean"] == pytest.approx(2 / 3)
    assert state([-1, -2, 1], ">", 0)["state"] == "does not show"
    assert state([0, 0, 0], ">", 0)["state"] == "does not show"
    assert state([0, 0, 0], ">=", 0)["state"] == state([0.5], "=", 0.5)["state"] == state([-1.9], "within", 2)["state"]
    assert state([0.5, 0.5, 0.6], "=", 0.5)["state"] == "does not show"
    assert state([-2.1], "within", 2)["state"] == state([3], "<", 2)["state"] == "does not show"
    assert "state" not in claims.judge(Measure("", lambda r: r["x"]), [{"x": 1}])

    def rows(*states):
        return [{"measure": f"m{i}", "state": s} for i, s in enumerate(states)] + [{"measure": "seen"}]

    assert claims.verdict(rows("holds", "holds")) == "holds"
    assert claims.verdict(rows("does not show", "does not show")) == "does not show"
    assert claims.verdict(rows("holds", "within noise", "does not show")) == (
        "holds in part (1 of 3 measures). Within noise: *m1*. Does not show: *m2*"
    )
    assert claims.verdict(rows("within noise", "does not show")).startswith("not shown. Within noise")


def test_options_are_checked(capsys):
    for arguments in (["--only", "E9"], ["--seeds", "0"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            claims.main(arguments)
