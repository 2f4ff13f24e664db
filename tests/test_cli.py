"""The command line, on networks trained for an epoch."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

import snnkern
from snnkern import analysis
from snnkern.cli import app
from snnkern.nn import fold, from_nir
from snnkern.train.compare import named
from snnkern.train.evaluation import restore
from snnkern.train.folder import grouped
from snnkern.train.plot import _cosines, _Run

TINY = "data.train=60", "batch=30", "stage.epochs=1", "stage.steps=2", "test_steps=[1,2,4]"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SDT and TET with two seeds, in a comparison's folder; SDT with one, in a training's."""
    root = tmp_path_factory.mktemp("runs")
    succeed("compare", "digits-sdt", "digits-tet", *TINY, "seeds=2", "--out", root / "both")
    succeed("train", "digits-sdt", *TINY, "seeds=1", "--out", root / "one")
    return root


def test_help_and_version():
    assert succeed("--version") == f"snnkern {snnkern.__version__}\n"
    assert succeed("-h") == succeed("--help") and "report" in succeed("-h")
    for command in ("doctor", "check", "train", "compare", "eval", "plot", "export", "report", "search", "convert"):
        assert succeed(command, "-h") == succeed(command, "--help") and "Usage: " in succeed(command, "-h")


def test_eval_takes_all_seeds(runs):
    found = json.loads(succeed("eval", runs / "both", "--steps", "1,2", "--json"))["networks"]
    assert list(found) == ["digits-sdt", "digits-tet"]
    for label, tested in found.items():
        assert [each["run"] for each in tested] == [str(runs / "both" / label / f"seed{i}") for i in (0, 1)]
        alone = json.loads(succeed("eval", runs / "both" / label / "seed1", "--steps", "1,2", "--json"))
        assert alone == tested[1] and [row["T"] for row in alone["rows"]] == [1, 2]
    losses = [each["rows"][1]["tet"] for each in found["digits-tet"]]
    text = succeed("eval", runs / "both", "--steps", "1,2")
    assert "digits-tet: mean ± sd of 2 seeds" in text and f"{mean(losses):.4f} ± {stdev(losses):.4f}" in text
    one = json.loads(succeed("eval", runs / "one", "--json"))
    assert one == json.loads(succeed("eval", runs / "one" / "seed0", "--json")) and one["trained_steps"] == 2


def drawn(stdout):
    paths = [Path(line) for line in stdout.split()]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    return [path.name for path in paths]


def test_plot_of_several(runs, tmp_path):
    names = ["accuracy_epochs.png", "accuracy_steps.png", "accuracy_moments.png", "accuracy_growth.png"]
    assert drawn(succeed("plot", runs / "both")) == [*names, "accuracy_scatter.png"]  # 4 runs: enough for dots
    assert drawn(succeed("plot", runs / "one", "--out", tmp_path / "new")) == names
    assert drawn(succeed("plot", runs / "both" / "digits-sdt", runs / "one", "--out", tmp_path)) == [
        *names,
        "accuracy_scatter.png",
    ]
    before = {path.name for path in runs.iterdir()}
    succeed("plot", runs / "both" / "digits-sdt" / "seed0", runs / "one")
    assert {path.name for path in runs.iterdir()} - before == {"plots"}


def test_report_of_several(runs, tmp_path):
    out = succeed("report", runs / "both", runs / "one", "--points", "3", "--samples", "40", "--out", tmp_path / "a")
    assert out.splitlines()[-1] == str(tmp_path / "a" / "analysis.md")
    found = json.loads((tmp_path / "a" / "analysis.json").read_text())["networks"]
    assert {label: len(held) for label, held in found.items()} == {"both/digits-sdt": 2, "both/digits-tet": 2, "one": 1}
    assert found["one"][0]["moments"] == found["both/digits-sdt"][0]["moments"]  # the same network and samples
    assert [("landscape" in each, "rise" in each) for each in found["both/digits-tet"]] == [(True, True), (False, True)]
    succeed("report", runs / "one", "--points", "0", "--samples", "40", "--steps", "7", "--generalisation")
    alone = json.loads((runs / "one" / "analysis" / "analysis.json").read_text())
    assert len(alone["moments"]) == 7 and alone["steps"] == 2 and "rise" not in alone
    assert alone["moments"][:4] == found["one"][0]["moments"]
    similarity, noise = alone["gradient_similarity"], alone["noise_weights"]["runs"]
    assert similarity["steps"] == [1, 2] and len(noise) == 5 and "noise_weights" not in found["one"][0]
    text = (runs / "one" / "analysis" / "analysis.md").read_text()
    assert f"| whole | {similarity['running']['whole']:.3f} | {similarity['batch']['whole']:.3f} |" in text
    last = [100 * draw[-1] for draw in noise]
    assert f"| 0.05 | {mean(last):.1f} | {min(last):.1f} | {max(last):.1f} |" in text
    for name in ("noise_weights", "noise_inputs", "landscape_1d", "gradient_similarity"):
        assert f"({name}.png)" in text and (runs / "one" / "analysis" / f"{name}.png").exists()


def test_report_of_an_ann(tmp_path):
    succeed("train", "digits-ann", "data.train=60", "stage.epochs=1", "seeds=1", "--out", tmp_path)
    succeed("report", tmp_path, "--points", "0", "--samples", "40")
    found = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert found["energy"]["joules"] == found["energy"]["ann_joules"] and len(found["accuracy_over_steps"]) == 1
    assert [path.name for path in (tmp_path / "analysis").glob("*.png")] == ["energy.png"]


def test_export_of_one_network(runs, tmp_path):
    succeed("export", runs / "one", tmp_path / "a.safetensors")
    result = invoke("export", runs / "both", tmp_path / "b.safetensors")
    assert result.exit_code == 2 and "holds 4 runs; name one of them, such as" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_export_to_nir(runs, tmp_path):
    nir = pytest.importorskip("nir")
    succeed("export", runs / "one", tmp_path / "a.nir")
    model, x = fold(restore(runs / "one" / "seed0").model), torch.rand(3, 2, 1, 8, 8)
    assert torch.equal(from_nir(nir.read(tmp_path / "a.nir"))(x), model(x))


def test_a_network_of_a_stage_that_is_not_finished(runs, tmp_path):
    shutil.copytree(runs / "one" / "seed0", tmp_path / "seed0")
    (tmp_path / "seed0" / "stage0-last.safetensors").unlink()
    result = invoke("eval", tmp_path)
    assert result.exit_code == 1 and "stage.0 is not finished; its best epoch so far is there (--best)" in result.stderr
    succeed("eval", tmp_path, "--best")
    (tmp_path / "seed0" / "stage0-best.safetensors").unlink()
    assert "stage.0 is not finished; no epoch of it is" in invoke("eval", tmp_path, "--best").stderr


FULL = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
COMMAND = "from snnkern.cli import main; sys.argv[1:] = {arguments!r}; main()"


def on_a_full_disk(*arguments):
    """The command where no file can become larger than 100 kB."""
    program = FULL + COMMAND.format(arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_failed_export_leaves_nothing(runs, tmp_path):
    for before in (None, b"kept"):
        if before:
            (tmp_path / "folded.safetensors").write_bytes(before)
        result = on_a_full_disk("export", runs / "one" / "seed0", tmp_path / "folded.safetensors")
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("Error: ") and "folded.safetensors" in result.stderr
        assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["report", "one", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["report", "one", "--points", "-1"], "--points must be odd and at least 3, or 0, got -1"),
        (["report", "one", "--points", "4"], "--points must be odd and at least 3, or 0, got 4"),
        (["report", "one", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["report", "one", "--out", "file"], "file is a file, where a folder was to be made"),
        (["plot", "one", "--out", "file"], "file is a file, where a folder was to be made"),
        (["plot", "one", "--out", "file/more"], "file/more: Not a directory"),
        (["report", "one", "--out", "closed/new"], "closed/new: Permission denied"),
        (["plot", "one", "--out", "closed/new"], "closed/new: Permission denied"),
        (["export", "one", "new/a.safetensors"], "OUT must be a file in a folder that exists, got new/a.safetensors"),
        (["export", "one", "."], "OUT must be a file in a folder that exists, got ."),
        (["train", "digits-sdt", "--out", "file"], "file"),
        (["train", "digits-sdt", "--out", "closed/new"], "closed/new"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["eval", "nowhere"], "nowhere does not exist"),
        (["plot", "nowhere"], "nowhere: there is no run with a finished epoch in it"),
        (["eval", "file"], "file is not a file of weights"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, arguments, text):
    (tmp_path / "one").symlink_to(runs / "one")
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path)
    made = os.mkdir

    def mkdir(path, *more, **options):
        if str(path).startswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        made(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)  # for whoever runs this, root too
    before = sorted(path.name for path in runs.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert len(result.stderr.splitlines()) == 1 and text in result.stderr and result.stderr.startswith("Error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "one"]
    assert (tmp_path / "file").read_text() == "kept" and sorted(path.name for path in runs.rglob("*")) == before


def test_nothing_is_measured_without_matplotlib(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(analysis, "measure", None)
    for command in ("report", "plot"):
        result = invoke(command, runs / "one")
        assert result.exit_code == 1 and "pip install 'snnkern[train]'" in result.stderr


DOCUMENTED = Path(__file__).parents[1] / "docs" / "papers.md"


def expanded(word):
    """As bash expands the braces of a word."""
    parts = re.split(r"\{(.*?)\}", word)
    return [
        "".join(chosen) for chosen in product(*(part.split(",") if i % 2 else [part] for i, part in enumerate(parts)))
    ]


def test_documented_commands_name_recipes_and_the_folders_they_make():
    commands = re.findall(r"`snnkern (\w+) (.*?)`", DOCUMENTED.read_text())
    made = set()
    for command, rest in commands:
        words, _, out = rest.partition(" --out ")
        words = [each for word in words.split() for each in expanded(word)]
        if command in ("train", "compare"):
            recipes = named(words)
            assert out or command == "train", rest
            made.add(out or f"runs/{words[0]}")
            for recipe in recipes.values():
                assert recipe.runs()
    for command, rest in commands:
        if command in ("plot", "report", "eval"):
            folders = [word.removesuffix("/seed0") for word in rest.split() if word.startswith("runs/")]
            assert folders and set(folders) <= made, rest
    assert len(commands) > 30 and len(made) > 20


def test_probes_are_averaged_over_the_epochs_of_a_run():
    lines = [{"steps": 2, "probe": [[0.2, 0.9], [0.01, 0.3]]}, {"steps": 2, "probe": [[0.2, 0.7], [0.01, 0.1]]}]
    found = _cosines(_Run(lines, [1, 2], [], []))
    assert [*found] == [0.01, 0.2] and [*found.values()] == pytest.approx([0.2, 0.8])


def test_seeds_are_in_order(tmp_path):
    for seed in (0, 2, 10, 1):
        (tmp_path / "a" / f"seed{seed}").mkdir(parents=True)
        (tmp_path / "a" / f"seed{seed}" / "settings.json").write_text("{}")
    (tmp_path / "settings.json").write_text("{}")  # of a comparison
    assert [run.name for run in grouped([tmp_path])["a"]] == ["seed0", "seed1", "seed2", "seed10"]
