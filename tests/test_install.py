"""What an installation is made of, how CMake is called, and what works without anything optional; no compiler runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", "-q", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def files(root, *folders):
    every = [path.relative_to(root) for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return {str(path) for path in every if "__pycache__" not in path.parts and not path.name.startswith("_C.")}


def test_the_source_distribution_has_what_installing_and_testing_it_need(tmp_path):
    run = setup("egg_info", "--egg-base", tmp_path)
    assert run.returncode == 0, run.stderr
    packed = set((tmp_path / "snnkern.egg-info" / "SOURCES.txt").read_text().splitlines())
    wanted = files(ROOT, "csrc", "snnkern", "tests", "experiments", "benchmarks", "examples")
    assert "csrc/cpu/lif.cpp" in wanted
    assert wanted | {"CMakeLists.txt", "Makefile", "pyproject.toml", "requirements-dev.txt"} <= packed


def test_an_installation_has_every_file_of_the_package_and_no_other(tmp_path):
    (tmp_path / "snnkern").mkdir()
    (tmp_path / "snnkern" / "of_an_earlier_version.py").touch()
    run = setup("egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path)
    assert run.returncode == 0, run.stderr
    kernels = {f"snnkern/{name}" for name in files(ROOT, "csrc") if name.endswith((".cuh", ".h"))}
    hosts = {name for name in kernels if "/cpu/" in name or "/python/" in name} | {"snnkern/csrc/cuda/driver.h"}
    assert files(tmp_path, "snnkern") == files(ROOT, "snnkern") | kernels - hosts
    assert {"snnkern/csrc/lif.h", "snnkern/csrc/cuda/lif.cuh"} <= kernels
    assert (tmp_path / "snnkern" / "py.typed").exists()


@pytest.fixture
def tools(tmp_path):
    """A folder of a cmake and a ninja that only write down how they are called; and a compiler."""

    def folder(name):
        (tmp_path / name).mkdir()
        for tool in ("cmake", "ninja", "clang++"):
            (tmp_path / name / tool).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit ${{STATUS:-0}}\n')
            (tmp_path / name / tool).chmod(0o755)
        return f"{tmp_path / name}{os.pathsep}{os.environ['PATH']}"

    return folder


def test_cmake_starts_afresh_where_its_tools_have_changed(tmp_path, tools):
    def configure(path, **environment):
        build = "build_ext", "--build-temp", tmp_path / "build", "--build-lib", tmp_path
        run = setup("egg_info", "--egg-base", tmp_path, *build, PATH=path, **environment)
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return calls, run.stderr

    one, other = tools("one"), tools("other")  # the temporary environments of two isolated builds
    first, again, moved = configure(one)[0], configure(one)[0], configure(other)[0]
    clang = configure(other, CXX="clang++")[0]
    assert ["--fresh" in calls[0] for calls in (first, again, moved, clang)] == [True, False, True, True]
    assert f"-DCMAKE_MAKE_PROGRAM={tmp_path}/other/ninja" in moved[0] and moved[1] == "--build ."
    failed, said = configure(one, STATUS="3")
    assert len(failed) == 1 and "C++17 compiler" in said
    assert "--fresh" in configure(one)[0][0]


def test_one_wheel_serves_every_python_from_3_11_on(tmp_path, tools):
    build = "build", "--build-base", tmp_path, "--build-temp", tmp_path, "--build-lib", tmp_path / "lib"
    wheel = "bdist_wheel", "--bdist-dir", tmp_path / "wheel", "--dist-dir", tmp_path
    run = setup("egg_info", "--egg-base", tmp_path, *build, *wheel, PATH=tools("one"))
    assert run.returncode == 0, run.stderr
    (made,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in made.name
    assert importlib.util.find_spec("snnkern._C").origin.endswith(("_C.abi3.so", "_C.pyd"))


def test_a_compiler_that_is_asked_for_must_be_there():
    run = setup("--version", CXX="no-such-compiler -O2")
    assert run.returncode and "CXX=no-such-compiler -O2: there is no such compiler" in run.stderr


def test_without_a_compiler_there_is_no_extension(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_ext"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "installing without the compiled extension" in run.stderr


OPTIONAL = (
    "aeon aedat cuda h5py matplotlib nir norse pydantic safetensors sinabs sklearn snntorch spikingjelly tensorboard"
)
BARE = """
import importlib, json, pkgutil, sys, warnings
from importlib.machinery import PathFinder

absent, find, calls = set(sys.argv[1:]), PathFinder.find_spec, []
PathFinder.find_spec = staticmethod(lambda name, *at: None if name.split(".")[0] in absent else find(name, *at))
sys.modules["snnkern._C"] = None
sys.addaudithook(lambda event, _: calls.append(event) if event.startswith(("socket.", "urllib.")) else None)
import snnkern, torch
refused = {}
for name in (module.name for module in pkgutil.walk_packages(snnkern.__path__, "snnkern.")):
    if not name.startswith(("snnkern.backend.triton.", "snnkern.__main__", "snnkern._C")):
        try:
            importlib.import_module(name)
        except ImportError as error:
            refused[name] = str(error)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 30), snnkern.nn.LIF(), torch.nn.Linear(30, 4))
optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(4):
        loss = snnkern.losses.sdt(model(torch.ones(5, 2, 20)), torch.tensor([1, 3]))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

absent.remove("pydantic")  # which some versions of typer need
importlib.invalidate_caches()
from snnkern.cli import app
from typer.testing import CliRunner
said = {words: CliRunner().invoke(app, words.split()) for words in ("doctor", "train digits-tet")}
print(json.dumps({
    "calls": calls,
    "refused": refused,
    "warnings": [str(warning.message) for warning in told if "snnkern" in str(warning.message)],
    "losses": losses,
    "said": {words: [result.exit_code, result.output] for words, result in said.items()},
}))
"""


def test_what_a_bare_installation_can_do(tmp_path):
    """No extension, no Triton, nothing of the extras; and nothing asks a network."""
    command = [sys.executable, "-c", BARE, *OPTIONAL.split(), "tonic", "torchvision", "triton"]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["calls"] == []
    ours = {name: said for name, said in found["refused"].items() if not name.startswith("snnkern.convert.")}
    assert set(ours.values()) == {"training needs pydantic: pip install 'snnkern[train]'"}
    assert all(name.startswith("snnkern.train.") for name in ours)
    assert len(found["warnings"]) == 1 and "many times slower than the kernels" in found["warnings"][0]
    assert found["losses"][-1] < found["losses"][0]
    said = found["said"]
    assert said["doctor"][0] == 0 and "Triton is not installed" in said["doctor"][1]
    assert said["train digits-tet"] == [1, "Error: the digits need scikit-learn: pip install 'snnkern[train]'\n"]
