"""Which backends are tested, where, and within which bounds.

Every op test takes the fixture ``backend``: each backend that can run in this process. With TRITON_INTERPRET=1 in the
environment that is Triton alone, in its interpreter, and with SNNKERN_EMULATE=1 CUDA alone, on the device of
``emulator``, both on the CPU; ``make test`` runs the op tests once more each way. SNNKERN_THOROUGH=1, as ``make trust``
sets it, makes random tests draw many more inputs, differently every time, and runs what takes minutes.
"""

import json
import os
import platform
import sys
from collections import Counter, defaultdict
from pathlib import Path

import emulator
import pytest
import torch
from hypothesis import HealthCheck, settings

import snnkern
from snnkern.spec import split as splitting
from snnkern.spec.bounds import gradient_bound
from snnkern.spec.layout import DTYPES
from snnkern.spec.neuron import make_spec
from snnkern.spec.split import Split

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Relative norm of the error of a gradient, per dtype. Spikes are held to equality, not to this.
GRADIENT_BOUND = {dtype: gradient_bound(dtype, INTERPRETED) for dtype in DTYPES}
EMULATED = os.environ.get("SNNKERN_EMULATE") == "1"
if EMULATED:
    emulator.install()
THOROUGH = os.environ.get("SNNKERN_THOROUGH") == "1"
needs_thorough = pytest.mark.skipif(not THOROUGH, reason="takes minutes: `make trust` runs it")
_ALWAYS = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("brief", max_examples=25, derandomize=True, **_ALWAYS)
settings.register_profile("thorough", max_examples=2000, print_blob=True, **_ALWAYS)
settings.load_profile("thorough" if THOROUGH else "brief")
needs_emulator = pytest.mark.skipif(not EMULATED, reason="for SNNKERN_EMULATE=1, as `make test` runs this file too")
RUNNABLE = [name for name, reason in snnkern.backends().items() if reason is None and name != "reference"]
EXPECTED = ["cpu", "cuda", "triton"] if torch.cuda.is_available() else ["cpu"]
if INTERPRETED or EMULATED:
    EXPECTED = ["triton"] if INTERPRETED else ["cuda"]
BACKENDS = EXPECTED if INTERPRETED or EMULATED else RUNNABLE


def brief(values, some):
    """What a test takes: ``values`` where it is thorough, or of them ``some``."""
    return values if THOROUGH else some


def few(values, interpreted):
    """What a test takes: ``values``, or of them ``interpreted`` while Triton's interpreter, which is slow, runs it."""
    return interpreted if INTERPRETED and not THOROUGH else values


def pytest_configure():
    """Without a backend that belongs here its tests would not run, and nobody would see that. No GPU: hide it."""
    absent = [f"{name}: {reason}" for name, reason in snnkern.backends().items() if name in EXPECTED and reason]
    if absent:
        raise pytest.UsageError("what the tests are about cannot run here; " + "; ".join(absent))


HERE = (None, "", "localhost", "127.0.0.1", "::1", platform.node())


def _only_here(event, arguments):
    """Whatever a test calls in this process reaches no other machine, nor asks for the address of one."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        arguments = arguments[1]  # a path, of a Unix socket, or a host and more
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        return
    if isinstance(arguments, tuple) and arguments[0] not in HERE:
        raise PermissionError(f"{event} of {arguments[0]}: tests use no network")


sys.addaudithook(_only_here)


def pytest_addoption(parser):
    parser.addoption("--counts", type=Path, help="a file for what each test counted of what it tried (fixture `count`)")


@pytest.fixture
def count(record_property):
    """``count("inputs")``, ``count("bytes", 100)``: what a promise in the documentation rests on."""
    counted = Counter()

    def add(what, number=1):
        counted[what] += number

    yield add
    record_property("counted", dict(counted))


_counts = defaultdict(Counter)


def pytest_runtest_logreport(report):
    """Per function: how many of its cases passed, failed or were skipped, and the sums of what they counted."""
    function = _counts[report.nodeid.split("[")[0]]
    if report.when == "call" or report.outcome != "passed":
        function[report.outcome] += 1
    if report.when == "teardown":
        function.update(dict(report.user_properties).get("counted", {}))


def pytest_sessionfinish(session):
    path = session.config.getoption("--counts")
    if path and not hasattr(session.config, "workerinput"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_counts, indent=1) + "\n")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend in ("cuda", "triton") and not (INTERPRETED or EMULATED) else "cpu"


@pytest.fixture
def on_device(request):
    """New tensors are made where the test's backend works."""
    name = request.getfixturevalue("device") if "backend" in request.fixturenames else "cpu"
    with torch.device(name):
        yield


@pytest.fixture(autouse=EMULATED)
def emulated():
    """What the emulator keeps of a test's memory goes with the test."""
    yield
    emulator.forget()


@pytest.fixture
def poison():
    """Fresh memory is filled with NaN, so that an element nobody wrote shows. Not under compute-sanitizer (`make
    sanitize`), whose initcheck would take that for written."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def force(monkeypatch):
    """Makes every launch use segments of the given length and warm-up; counts the launches that were split."""

    def forced(length, warm):
        launches = []

        def segments(steps, most, shortest, warmup=0):
            time = Split(-(-steps // length), length, warm) if steps > length else Split(1, steps, 0)
            launches.append(time)
            return time

        monkeypatch.setattr(splitting, "split", segments)
        monkeypatch.setattr(splitting, "A_LAUNCH", -(1 << 30))
        monkeypatch.setattr(splitting, "A_THREAD", 0)
        make_spec.cache_clear()  # a neuron knows how it was launched
        return launches

    yield forced
    make_spec.cache_clear()


def assert_gradients_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    error = (got.double() - wanted.double()).norm()
    scale = wanted.double().norm()
    assert torch.isfinite(got).all()
    assert error <= GRADIENT_BOUND[got.dtype] * scale, f"relative error {error / scale:.2e}"
