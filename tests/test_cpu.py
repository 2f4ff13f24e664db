"""The CPU kernels in every instruction set that this processor has, and what the extension refuses."""

import copy
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import assert_gradients_close, brief
from test_bn_lif import run
from test_lif import draw, state_of

import snnkern
from snnkern import _C
from snnkern.backend import cpu
from snnkern.spec.split import CHUNK

SETS = ["baseline", "avx2", "avx512"]
# Thoroughly all of them; else those of every size, layout, surrogate and neuron.
TESTS = [Path(__file__).parent / f"test_{name}.py" for name in ("lif", "linear", "neurons", "bn_lif", "split", "pack")]
CHOICE = "cpu and not compile" + brief(
    "", " and (sizes or shapes or every_neuron or layout or surrogate_in or bits_and_back or dense_product)"
)


@pytest.mark.parametrize("isa", SETS[: SETS.index(_C.cpu_isa())])
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    env = {**os.environ, "SNNKERN_ISA": isa}
    found = subprocess.run(
        [sys.executable, "-c", "from snnkern import _C; print(_C.cpu_isa())"], env=env, capture_output=True, text=True
    )
    assert found.stdout.strip() == isa, found.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", CHOICE]
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


class Counts:
    """What is no int, but can be read as one, and as a float."""

    def __index__(self):
        return 1

    def __float__(self):
        return 0.5


class Broken:
    def __index__(self):
        raise KeyError("mine")


SHAPE = {"dtype": 0, "outer": 2, "steps": 40, "inner": 3, "x_outer_stride": 120, "x_step_stride": 3, "steps_out": 40}
SHAPE |= {"segments": 3, "segment_steps": 16, "warmup": 16}
WRONG = [
    ({"outer": "2"}, TypeError, "LIFShape: argument 2 wants an int of 64 bits, got str"),
    ({"outer": 2.0}, TypeError, "LIFShape: argument 2 wants an int of 64 bits, got float"),
    ({"inner": True}, TypeError, "LIFShape: argument 4 wants an int, got bool"),
    ({"outer": 1 << 64}, OverflowError, "LIFShape: argument 2 wants an int of 64 bits, got a number too large"),
    ({"dtype": 4}, ValueError, "LIFShape: argument 1, a dtype, wants 0 to 3, got 4"),
    ({"dtype": -1}, ValueError, "LIFShape: argument 1, a dtype, wants 0 to 3, got -1"),
    *(({name: -1}, ValueError, f"LIFShape: {name} wants [01] or more, got -1") for name in [*SHAPE][1:]),
    ({"steps_out": 0}, ValueError, "LIFShape: steps_out wants 1 or more, got 0"),
    ({"segments": 2}, ValueError, "40 steps cannot be split into 2 segments of 16 steps after a warmup of 16"),
    ({"segment_steps": 15}, ValueError, "LIFShape: 40 steps cannot be split into 3 segments of 15"),
    ({"warmup": 8}, ValueError, "after a warmup of 8"),
    ({"outer": Broken()}, KeyError, "mine"),
]


@pytest.mark.parametrize("given, error, message", WRONG)
def test_a_structure_says_what_is_wrong_with_it(given, error, message):
    _C.LIFShape(*SHAPE.values())
    with pytest.raises(error, match=message):
        _C.LIFShape(*(SHAPE | given).values())


def test_a_kernel_says_which_argument_is_wrong():
    shape, norm = _C.LIFShape(*SHAPE.values()), _C.Norm(1, Counts(), 0, 0)
    huge, bits, plan = 1 << 62, (0, 8, 0, 0), (0, 1, 1, 1.0, 1.0)
    for call, error, message in (
        (lambda: _C.Norm(1, 1), TypeError, "Norm takes 4 arguments, got 2"),
        (lambda: _C.Norm(1, 1, -8, 0), OverflowError, r"Norm: argument 3 wants an int from 0 to \d+, got -8"),
        (lambda: _C.Norm(-1, 1, 0, 0), ValueError, "Norm: channels wants 0 or more, got -1"),
        (lambda: _C.Norm(huge, huge, 0, 0), ValueError, f"{huge} channels of {huge} neurons are too many"),
        (lambda: _C.LinearShape(1, 1, 1, 1), TypeError, "LinearShape: argument 4 wants True or False, got int"),
        (lambda: _C.NormPlan(*plan, "0", 0.0, 1.0), TypeError, "NormPlan: argument 6 wants a float, got str"),
        (lambda: _C.moments_cpu(norm, norm, 0, 0, 1), TypeError, "moments_cpu: argument 1 wants LIFShape, got Norm"),
        (lambda: _C.moments_cpu(shape, shape, 0, 0, 1), TypeError, "moments_cpu: argument 2 wants Norm, got LIFShape"),
        (lambda: _C.pack_cpu(*bits, 0), ValueError, "pack_cpu: threads wants 1 or more, got 0"),
        (lambda: _C.pack_cpu(*bits, 1 << 40), OverflowError, "pack_cpu: argument 5 wants an int from -2147483648"),
        (lambda: _C.pack_cpu(0, -8, 0, 0, 1), ValueError, "pack_cpu: n wants 0 or more, got -8"),
        (lambda: _C.bytes_of(norm), TypeError, "bytes_of: argument 1 wants a structure that kernels take, got Norm"),
        (lambda: _C.CudaKernel(1, "name", 0), TypeError, "CudaKernel: argument 1 wants bytes or str, got int"),
        (lambda: _C.CudaKernel("\ud800", "name", 0), ValueError, "CudaKernel: argument 1 wants text .* got surrogates"),
        (lambda: type(shape)(), TypeError, "cannot create"),
        (lambda: object.__new__(type(shape)), TypeError, "not safe"),
        (lambda: copy.copy(shape), TypeError, "cannot pickle"),
    ):
        with pytest.raises(error, match=message):
            call()
    numbers = _C.NormPlan(0, 1, 1, Counts(), 1, 0.0, 0.0, 1.0), _C.NormPlan(0, 1, 1, 0.5, 1.0, 0.0, 0.0, 1.0)
    assert len({_C.bytes_of(plan)[8:] for plan in numbers}) == 1


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


def with_threads(threads, call):
    """What ``call`` returns while the kernels are asked to use that many threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        return call()


def everything(dtype):
    """Outputs and gradients of all ops on the CPU, on inputs large enough for several threads."""
    results = []
    for shape, time_dim in [((110, 1300), 0), ((300, 70, 30), 1), ((4, 300, 200), 1), ((5000, 40), 0)]:
        x = draw(shape, dtype).requires_grad_()
        spikes, v = snnkern.lif(x, time_dim=time_dim, backend="cpu")
        (gradient,) = torch.autograd.grad((spikes, v), x, (draw(shape, dtype, seed=2), draw(v.shape, v.dtype, seed=3)))
        results += [spikes, v, gradient, snnkern.ttm(x, shape[time_dim] // 3, time_dim=time_dim, backend="cpu")]
    for shape in [(4, 6, 18, 20, 20), (4, 400, 90)]:
        y = draw(shape, dtype)
        grads = draw(shape, dtype, seed=2), state_of(y, seed=3)
        *outputs, gradients = run(y, "cpu", residual=draw(shape, dtype, seed=7), grads=grads)
        results += [*outputs[:2], *gradients]
    bits, x = torch.empty(40 * 1300 * 2 // 8, dtype=torch.uint8), (draw((80, 1300)) > 0).to(dtype)
    assert cpu.pack(x, bits, True)
    cpu.unpack(bits, back := torch.empty_like(x))
    return [*results, bits, back]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    wanted = with_threads(1, lambda: everything(dtype))
    for threads in (2, 3, 16, 300):
        for got, want in zip(with_threads(threads, lambda: everything(dtype)), wanted, strict=True):
            assert torch.equal(got, want), threads


def test_callers_on_several_threads_at_once():
    wanted = with_threads(1, lambda: everything(torch.float32))

    def repeat(_):
        return all(torch.equal(g, w) for _ in range(5) for g, w in zip(everything(torch.float32), wanted, strict=True))

    with ThreadPoolExecutor(6) as callers:
        assert with_threads(4, lambda: list(callers.map(repeat, range(6)))) == [True] * 6


def outcome(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


PREPARED = """
import os, resource, sys, threading, torch, snnkern
x = torch.rand(280, 480).bfloat16()
torch.set_num_threads(1)  # PyTorch's own threads do not survive a fork
wanted = snnkern.lif(x)[0]
torch.get_num_threads = lambda: 4
def right():
    return all(torch.equal(snnkern.lif(x)[0], wanted) for _ in range(200))
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
"""

FORK = """
assert right() and threads() >= before + 3
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if threads() == 1 and right() and threads() == 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and right()
"""

# A thread's stack does not fit into what memory is left: the work of those that do not come falls to the caller.
ALONE = """
snnkern.keep_freed_memory()
torch.get_num_threads = lambda: 1
assert right()
torch.get_num_threads = lambda: 4
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 18), resource.RLIM_INFINITY))
assert right() and threads() == before
"""

EXIT = """
import atexit
atexit.register(lambda: os._exit(2) if not right() else None)
caller = threading.Thread(target=right)
caller.start()
assert right()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
@pytest.mark.parametrize("script", [FORK, ALONE, EXIT], ids=["in a fork", "that cannot be had", "at exit"])
def test_threads(script):
    ended = outcome(PREPARED + script)
    assert ended.returncode == 0, ended.stderr


DAEMONS = """
import importlib.util, sys, threading, time
from array import array
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])  # without PyTorch, which takes seconds
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
x, bits = array("f", [1.0]) * (1 << 16), array("B", [0]) * (1 << 13)
def work():
    while True:
        _C.pack_cpu(0, len(x), x.buffer_info()[0], bits.buffer_info()[0], 1)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""


def test_python_exits_while_daemons_are_in_kernels():
    run = subprocess.run([sys.executable, "-c", DAEMONS, _C.__file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
