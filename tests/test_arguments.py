"""Bad arguments are named, and a backend is chosen by one rule."""

import itertools
import math
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

import snnkern
from snnkern import backend as backends
from snnkern import surrogate as surrogates
from snnkern.backend import _extension as extension
from snnkern.surrogate import ATan

X = torch.zeros(3, 4)
Y = torch.zeros(3, 2, 4)
NONE = (None,) * 4
INTEGER = surrogates.Integer(4)
NOT_DENSE = {
    "sparse": lambda: torch.zeros(3, 4).to_sparse(),
    "compressed": lambda: torch.zeros(3, 4).to_sparse_csr(),
    "mkldnn": lambda: torch.zeros(3, 4).to_mkldnn(),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(3)], layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
}
ODD = {  # no numbers, though some could be read as one
    "list": [1.0],
    "array": np.array(1.0),
    "tensor": torch.tensor(1.0),
    "bool": True,
    "NumPy's bool": np.True_,
    "text": "1",
    "complex": 1j,
}
BAD = [
    (TypeError, "x must be a tensor", lambda: snnkern.lif([1.0])),
    (TypeError, "x must be float32", lambda: snnkern.lif(X.int())),
    (ValueError, "time_dim must name a dimension of x, got 2", lambda: snnkern.lif(X, time_dim=2)),
    (ValueError, "time_dim must name a dimension of x", lambda: snnkern.lif(torch.zeros(()))),
    (TypeError, "time_dim must be an int", lambda: snnkern.lif(X, time_dim=0.5)),
    (
        ValueError,
        r"v must have the shape of x without time, \(4,\), got \(3,\)",
        lambda: snnkern.lif(X, torch.zeros(3)),
    ),
    (TypeError, "v must be torch.float32", lambda: snnkern.lif(X, torch.zeros(4).half())),
    (TypeError, "v must be torch.float32", lambda: snnkern.lif(X.half(), torch.zeros(4).half())),
    (TypeError, "v must be a tensor", lambda: snnkern.lif(X, 0.0)),
    (ValueError, "v must be on the device of x, cpu, got meta", lambda: snnkern.lif(X, torch.zeros(4, device="meta"))),
    (ValueError, r"decay must be in \[0, 1\], got 1.5", lambda: snnkern.lif(X, decay=1.5)),
    (ValueError, "decay must be finite, got nan", lambda: snnkern.lif(X, decay=math.nan)),
    (TypeError, "decay must be a float", lambda: snnkern.bn_lif(Y, *NONE, training=True, decay=torch.tensor(0.5))),
    (TypeError, "decay, tau or inverse_tau must be a floating", lambda: snnkern.lif(X, decay=torch.tensor(1))),
    (ValueError, "threshold must broadcast to x without time", lambda: snnkern.lif(X, threshold=torch.ones(3, 1))),
    (ValueError, "inverse_tau must be at least 0", lambda: snnkern.lif(X, inverse_tau=-0.1)),
    (
        ValueError,
        "give one: got decay=0.5, tau=None, inverse_tau=0.5",
        lambda: snnkern.lif(X, decay=0.5, inverse_tau=0.5),
    ),
    (ValueError, "tau must be finite with decay_input=True", lambda: snnkern.lif(X, tau=math.inf)),
    (ValueError, "return_v must be True, False or 'sequence'", lambda: snnkern.lif(X, return_v="all")),
    (TypeError, "return_v must be True or False", lambda: snnkern.bn_lif(Y, *NONE, training=True, return_v="sequence")),
    (TypeError, "ternary must be True or False", lambda: snnkern.lif(X, ternary=1)),
    (ValueError, "v_min must be finite", lambda: snnkern.lif(X, v_min=-math.inf)),
    (ValueError, "needs reset=None, ternary=False and", lambda: snnkern.lif(X, surrogate=INTEGER)),
    (
        ValueError,
        "threshold must be positive with Integer",
        lambda: snnkern.lif(X, surrogate=surrogates.Integer(4), reset=None, threshold=0),
    ),
    (ValueError, "levels must be in 1 to 256", lambda: surrogates.Integer(0)),
    (ValueError, "tau must be > 0, got 0", lambda: snnkern.lif(X, tau=0.0)),
    (ValueError, "decay and tau", lambda: snnkern.lif(X, decay=0.5, tau=2.0)),
    (ValueError, "threshold must be finite, got inf", lambda: snnkern.lif(X, threshold=math.inf)),
    (TypeError, "reset must be a float", lambda: snnkern.lif(X, reset="soft")),
    (TypeError, "detach_reset must be True or False", lambda: snnkern.lif(X, detach_reset=3)),
    (TypeError, "surrogate_function must be a snnkern.surrogate", lambda: snnkern.lif(X, surrogate="triangle")),
    (
        ValueError,
        "backend must be one of cuda, cpu, triton, reference, got 'tpu'",
        lambda: snnkern.lif(X, backend="tpu"),
    ),
    (RuntimeError, "backend 'cuda' cannot run: ", lambda: snnkern.lif(X, backend="cuda")),
]


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


CALLS = {
    "x": lambda t: snnkern.lif(t),
    "v": lambda t: snnkern.lif(torch.zeros(2, 3, 4), t),
    "y": lambda t: snnkern.bn_lif(t, None, None, None, None, training=True),
    "weight": lambda t: snnkern.bn_lif(Y, t, None, None, None, training=True),
    "bias": lambda t: snnkern.bn_lif(Y, None, t, None, None, training=True),
    "running_mean": lambda t: snnkern.bn_lif(Y, None, None, t, torch.ones(4), training=True),
    "running_var": lambda t: snnkern.bn_lif(Y, None, None, torch.ones(4), t, training=True),
    "residual": lambda t: snnkern.bn_lif(Y, None, None, None, None, training=True, residual=t),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("name", [*CALLS, "ttm"])
def test_tensors_must_be_dense(name, kind):
    call, name = (lambda t: snnkern.ttm(t, 2), "x") if name == "ttm" else (CALLS[name], name)
    with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got"):
        call(NOT_DENSE[kind]())


@pytest.mark.parametrize("name", CALLS)
def test_tensors_are_tensors_of_real_numbers(name):
    with pytest.raises(TypeError, match=f"^{name} must be a tensor.* got ndarray"):
        CALLS[name](np.zeros((3, 4), np.float32))
    for dtype in (torch.complex64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"^{name} must .*got {dtype}"):
            CALLS[name](torch.zeros(3, 4).to(dtype))


def test_training_needs_a_channel():
    y, statistics = torch.zeros(3, 2, 0), (torch.zeros(0), torch.ones(0))
    with pytest.raises(ValueError, match=r"training needs a channel at least in y, got shape \(3, 2, 0\)"):
        snnkern.bn_lif(y, None, None, *statistics, training=True)
    assert snnkern.bn_lif(y, None, None, *statistics, training=False)[0].shape == y.shape


NUMBERS = {
    "decay": lambda n: snnkern.lif(X, decay=n),
    "tau": lambda n: snnkern.lif(X, tau=n),
    "threshold": lambda n: snnkern.lif(X, threshold=n),
    "reset": lambda n: snnkern.lif(X, reset=n),
    "eps": lambda n: snnkern.bn_lif(Y, None, None, None, None, training=True, eps=n),
    "v_threshold": lambda n: snnkern.nn.LIFNode(v_threshold=n, step_mode="m")(X),
    "scale": lambda n: snnkern.nn.BNLIF(4, scale=n)(Y),
}
WHOLE = {
    "steps": lambda n: snnkern.ttm(X, n),
    "steps_out": lambda n: snnkern.lif(X, steps_out=n),
    "time_dim": lambda n: snnkern.lif(X, time_dim=n),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_real_ones_of_python_or_numpy(name):
    results = [NUMBERS[name](n) for n in (1.0, 1, np.float32(1), np.float64(1), np.int64(1), Fraction(1))]
    results = [r if isinstance(r, torch.Tensor) else r[0] for r in results]
    assert all(torch.equal(r, results[0]) for r in results)
    for odd in ODD.values():
        if isinstance(odd, torch.Tensor) and name in ("decay", "tau", "threshold", "v_threshold"):
            continue
        with pytest.raises(TypeError, match=f"^{name} must be a float, got {re.escape(repr(odd))}"):
            NUMBERS[name](odd)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_those_of_python_or_numpy(name):
    results = [WHOLE[name](n) for n in (1, np.int64(1), np.uint8(1))]
    results = [r if isinstance(r, torch.Tensor) else r[0] for r in results]
    assert all(torch.equal(r, results[0]) for r in results)
    for odd in (*ODD.values(), 1.0, np.float64(1), torch.tensor(1), np.array(1)):
        with pytest.raises(TypeError, match=f"^{name} must be an int, got {re.escape(repr(odd))}"):
            WHOLE[name](odd)


def test_a_compiled_backend_refuses_tensors_of_other_devices(backend):
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run: .*meta"):
        snnkern.lif(torch.zeros(3, 4, device="meta"), backend=backend)


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("SNNKERN_BACKEND", "reference")
    assert type(snnkern.lif(X.clone().requires_grad_())[0].grad_fn).__name__ == "StackBackward0"
    monkeypatch.setenv("SNNKERN_BACKEND", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        snnkern.lif(X)


def test_automatic_choice_logs_why_not(caplog):
    backends._choose.cache_clear()
    with caplog.at_level("DEBUG", logger="snnkern"):
        snnkern.lif(X)
    reasons = snnkern.backends()
    for name in itertools.takewhile(lambda name: name != "cpu", reasons):
        assert f"not backend {name!r}" in caplog.text


def test_the_cpu_backend_is_built():
    assert snnkern.backends()["cpu"] is None


@pytest.fixture
def without_the_extension(monkeypatch):
    """As in a source folder after an installation elsewhere."""
    for function in (backends._choose, backends._warn_of_the_reference):
        function.cache_clear()
    monkeypatch.setattr(extension, "_missing", "nobody built it")
    yield
    for function in (backends._choose, backends._warn_of_the_reference):
        function.cache_clear()


@pytest.mark.usefixtures("without_the_extension")
def test_the_reference_for_want_of_the_extension_is_told_once(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snnkern.lif(X, backend="reference")
        monkeypatch.setenv("SNNKERN_BACKEND", "reference")
        snnkern.lif(X)
        monkeypatch.delenv("SNNKERN_BACKEND")
        snnkern.lif(torch.zeros(3, 4, device="meta"))
    with pytest.warns(RuntimeWarning, match="many times slower than the kernels: nobody built it") as told:
        snnkern.lif(X)
        snnkern.lif(X.double())
        snnkern.ttm(X, 2)
    assert len(told) == 1


def test_why_the_extension_is_missing(tmp_path):
    package, error = tmp_path / "snnkern", ImportError("wrong ELF class")
    package.mkdir()
    assert "install a C++ compiler, then snnkern again" in extension._why(error, package)
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "_C.cpython-39-x86_64-linux-gnu.so, cannot be loaded (wrong ELF class)" in extension._why(error, package)
    (tmp_path / "CMakeLists.txt").touch()
    assert f"`python -m pip install -e {tmp_path}` builds it there" in extension._why(error, package)


def test_mutable_spikingjelly_surrogates_are_read_at_every_call():
    class Fake:
        alpha = 1.0

    Fake.__module__, Fake.__name__ = "spikingjelly.activation_based.surrogate", "ATan"
    fake = Fake()
    assert surrogates.from_spikingjelly(fake) == ATan(1.0)
    fake.alpha = 3.0
    assert surrogates.from_spikingjelly(fake) == ATan(3.0)
