"""The CPU kernels in every instruction set that this processor has."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_gradients_close
from test_bn_lif import run
from test_lif import draw, state_of

from snnkern import _C
from snnkern.backend import cpu
from snnkern.spec.split import CHUNK

SETS = ["baseline", "avx2", "avx512"]
TESTS = [Path(__file__).parent / name for name in ("test_lif.py", "test_bn_lif.py", "test_split.py", "test_pack.py")]


@pytest.mark.parametrize("isa", SETS[: SETS.index(_C.cpu_isa())])
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    env = {**os.environ, "SNNKERN_ISA": isa}
    found = subprocess.run(
        [sys.executable, "-c", "from snnkern import _C; print(_C.cpu_isa())"], env=env, capture_output=True, text=True
    )
    assert found.stdout.strip() == isa, found.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", "cpu and not compile"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps_out", [None, 7])
@pytest.mark.parametrize("pixels", [9, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_norm_backward_a_few_channels_at_a_time(monkeypatch, dtype, pixels, steps_out, training):
    y = draw((20, 2, 18, pixels), dtype)
    options = {"v": state_of(y), "residual": draw(y.shape, dtype, seed=7), "training": training, "steps_out": steps_out}
    options["grads"] = draw((steps_out or 20, *y.shape[1:]), dtype, seed=2), state_of(y, seed=3)
    at_once, done = cpu.bn_backward, []
    monkeypatch.setattr(cpu, "bn_backward", lambda *a: done.append(at_once(*a)) or done[-1])
    gradients = run(y, "cpu", **options)[3]
    monkeypatch.setattr(cpu, "bn_backward", lambda *a: False)
    assert done == [True]
    for got, wanted in zip(gradients, run(y, "cpu", **options)[3], strict=True):
        assert_gradients_close(got, wanted)


def test_python_and_the_extension_agree_on_the_chunk():
    assert _C.chunk == CHUNK


def test_an_unknown_instruction_set_means_the_baseline():
    env = {**os.environ, "SNNKERN_ISA": "none"}
    found = subprocess.run(
        [sys.executable, "-c", "from snnkern import _C; print(_C.cpu_isa())"], env=env, capture_output=True, text=True
    )
    assert found.stdout.strip() == "baseline"


KEEP = """
import resource, torch, snnkern
kept = {keep} and snnkern.keep_freed_memory()
x = torch.zeros(64, 1 << 18)
for i in range(24):
    snnkern.lif(x)
    if i == 11:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_kept_memory_is_not_faulted_in_again():
    def faults(keep):
        run = subprocess.run([sys.executable, "-c", KEEP.format(keep=keep)], capture_output=True, text=True, check=True)
        return run.stdout.split()

    kept, few = faults(True)
    assert kept == "True" and int(few) < 1000 < int(faults(False)[1])
