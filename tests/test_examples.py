"""The examples run to their end, and what they print is what they promise."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import THOROUGH, needs_thorough

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {"convert": ["snntorch", "norse", "spikingjelly"], "exchange": ["nir", "safetensors"],
         "recurrent": ["aeon"], "streaming": ["aeon"]}  # fmt: skip
# Those here run elsewhere: test_benchmarks.py, test_windows.py.
OTHERS = {"swap", "cuda_graph", "long_recording"}
BRIEF = {"first", "streaming", "exchange"}


@pytest.fixture
def shown(capsys, monkeypatch):
    """Runs an example as a script; returns what it prints."""

    def run(name):
        if name not in BRIEF and not THOROUGH:
            pytest.skip("takes several seconds: `make trust` runs it")
        for module in NEEDS.get(name, ["sklearn"]):
            pytest.importorskip(module)
        monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py")])
        with torch.random.fork_rng():
            runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return run


def shares(text, unit="%"):
    """The numbers before that unit."""
    return [float(number) for number in re.findall(rf"([\d.]+) ?{re.escape(unit)}", text)]


def test_every_example_is_here_and_says_how_to_run_it():
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == OTHERS | {name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in names}
    for name in names:
        text = (FOLDER / f"{name}.py").read_text()
        assert f"examples/{name}.py``" in text.partition('"""\n\n')[0], name


def test_first(shown):
    *epochs, last = shown("first").splitlines()
    assert len(epochs) == 10 and shares(epochs[0])[0] < shares(epochs[-1])[0] > 95
    assert 5 < shares(last)[0] < 50


def test_convert(shown):
    text = shown("convert")
    assert text.count("outputs equal; ") == 3 and "DIFFERENT" not in text and "unchanged" not in text
    assert text.count("1 of 1 neurons swapped") == 2 and "2 of 2 neurons swapped" in text


def test_recurrent(shown):
    assert shares(shown("recurrent"))[-1] > 92


def test_any_time(shown):
    text = shown("any_time")
    rows = [shares(line) for line in text.splitlines() if line[:1].isdigit()]
    assert len(rows) == 6 and rows[0][0] + 10 < rows[0][1] and rows[0][0] + 10 < rows[0][2]  # at a single step
    assert min(rows[-1]) > 85
    steps = shares(text, "steps")
    assert steps == sorted(steps) and steps[-1] < 8


def test_streaming(shown):
    text = shown("streaming")
    assert shares(text)[0] < 60 and shares(text)[-1] > 95
    assert float(text.split()[-1]) < 1e-4


def test_own_surrogate(shown):
    text = shown("own_surrogate")
    assert float(re.search(r"differ .* by (\S+) of their norm", text)[1]) < 2e-4 and shares(text)[-1] > 95


def test_exchange(shown):
    text = shown("exchange")
    assert text.count("outputs equal") == 2 and "DIFFERENT" not in text and shares(text)[0] > 93
    assert "1 (LIF)" in text


@pytest.mark.skipif(sys.platform != "linux", reason="memory as Linux tells it")
@needs_thorough
def test_memory():
    ran = subprocess.run([sys.executable, FOLDER / "memory.py"], capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()  # of a process in which nothing has been freed yet
    sizes = [shares(line, "MB")[0] for line in lines]
    assert len(sizes) == 4 and sizes == sorted(sizes) and sizes[-1] > 3 * sizes[-2]
    assert [line.split("gradient ")[1].split()[0] for line in lines] == ["differs", "equal", "equal", "differs"]


@needs_thorough
def test_two_processes():
    pytest.importorskip("sklearn")
    script, last = str(FOLDER / "two_processes.py"), []
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start in ([sys.executable], several):
        ended = subprocess.run([*start, script], capture_output=True, text=True, cwd=FOLDER.parent)
        assert ended.returncode == 0, ended.stderr
        last.append(shares(ended.stdout)[-1])
    assert "weights of 2 processes: equal" in ended.stdout
    assert min(last) > 95 and abs(last[0] - last[1]) < 1
