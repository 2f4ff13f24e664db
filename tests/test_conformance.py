"""The conformance suite on a checkout that is written here: it says what is equal, and finds what is not."""

import json
import sys

import pytest
import torch

pytest.importorskip("conformance", reason="the suite is in the source checkout")

from conformance import __main__ as suite
from conformance import own_tests
from conformance.cases import CASES
from conformance.compare import compare, recording

LAYERS = """
import torch


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, width):
        ctx.save_for_backward(x)
        ctx.width = width
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (ctx.width - x.abs()).clamp(min=0) / ctx.width**2, None


class LIFSpike(torch.nn.Module):
    thresh, tau, gama = 1.0, 0.5, 1.0

    def forward(self, x):
        v, spikes = 0, []
        for x_t in x.unbind(1):
            v = {decay} * v + x_t
            spikes.append(Spike.apply(v - self.thresh, {width}))
            v = (1 - spikes[-1]) * v
        return torch.stack(spikes, 1)
"""
MODEL = """
from torch import nn
from models.layers import LIFSpike


def VGGSNN():
    first, second = nn.Linear(48, 8), nn.Linear(8, 4)
    nn.init.uniform_(first.weight, -0.12, 0.14)
    nn.init.uniform_(second.weight, -0.4, 0.9)
    return nn.Sequential(first, LIFSpike(), second, LIFSpike())
"""
NUMBER, CASE = next((i, case) for i, case in enumerate(CASES) if case.model == "VGGSNN")


def checkout(folder, decay: float = 0.5, width: float = 1.0):
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").touch()
    (folder / "models" / "layers.py").write_text(LAYERS.format(decay=decay, width=width))
    (folder / "models" / "VGG_models.py").write_text(MODEL)
    return folder


def test_what_is_equal(tmp_path, capsys):
    folder = checkout(tmp_path / "temporal_efficient_training")
    status = suite.main([str(tmp_path), "--only", "VGGSNN", "--rounds", "1", "--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "conformance.json").read_text())["rows"]
    assert status == 0 and suite.equal(row), row
    assert row["neurons"] == {"models.LIFSpike": 2} and row["ran"] == 2 and 0.05 < row["rate"] < 0.95
    assert row["gradient_difference"] < 1e-6 and row["ms_before"] > 0 < row["ms_after"] and row["rounds"] == 1
    text = (tmp_path / "out" / "conformance.md").read_text()
    assert "1 of 1 rows are equal." in text and "| 2 LIFSpike | equal | equal |" in text
    assert not [*folder.rglob("*.pyc")] and "2 LIFSpike" in capsys.readouterr().out


@pytest.mark.parametrize("options, differ", [({"decay": 0.51}, ["1", "3"]), ({"width": 1.1}, [])])
def test_what_differs_is_found(options, differ, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(checkout(tmp_path, **options))
    for name in ("models", "models.layers", "models.VGG_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    row = {"code": "", "model": "", **compare(CASE, 0)}
    for name in ("models", "models.layers", "models.VGG_models"):
        monkeypatch.delitem(sys.modules, name)
    assert not suite.equal(row) and row["spikes_differ"] == differ and row["gradient_difference"] > 1e-3
    assert row["outputs_equal"] == (not differ) and row["state_dict_equal"]
    assert suite.cells(row)[3] == ("differ from 1 on" if differ else "equal")


def test_what_is_not_equal_either():
    row = {"rate": 0.1, "unchanged": [], "spikes_differ": [], "outputs_equal": True, "state_dict_equal": True,
           "gradient_difference": 0.0}  # fmt: skip
    assert suite.equal(row)
    for change in ({"rate": 0}, {"unchanged": [["a", "b", "c"]]}, {"state_dict_equal": False},
                   {"gradient_difference": float("nan")}, {"outputs_equal": False}):  # fmt: skip
        assert not suite.equal({**row, **change})
    assert not suite.equal({"reason": "it did not run"}) and not suite.equal({"refused": "soft"})
    with recording(torch.nn.Sequential(torch.nn.Identity()), ["0"]) as found:
        pass
    assert found == {}


def test_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.main([str(tmp_path)])
    assert "no checkout was found: give a folder that holds some" in capsys.readouterr().err
    (tmp_path / "spikformer").mkdir()
    assert suite.main([str(tmp_path)]) == 1
    assert "spikformer, CIFAR-10: written for SpikingJelly 0.0.0.0.12: --spikingjelly-12 is missing" in (
        capsys.readouterr().out
    )


def test_spikingjellys_own_tests(monkeypatch, tmp_path):
    outcomes = [
        {"a": ("passed", ""), "b": ("passed", ""), "test_roofline::c": ("passed", "")},
        {"a": ("passed", ""), "b": ("failed", "a bug"), "test_roofline::c": ("failed", "")},
    ]
    monkeypatch.setattr(own_tests, "_run", lambda checkout, select, ours: outcomes[ours])
    found = own_tests.compare_tests(tmp_path, ["test"])
    assert suite.tests({"tests": found}) == [
        "SpikingJelly's own tests: 3 passed with its nodes; 2 failed, 1 passed with ours.",
        "- 1 differ: it counts the operations of a plain loop, where ours is one",
        "- `b`: passed, then failed: a bug",
    ]
