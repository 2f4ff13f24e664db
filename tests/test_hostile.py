"""What nobody should hand to the public names and to the extension: a result that the reference has too, or an error
that names the argument. Never a crash: each fuzz runs in a process of its own.
"""

import inspect
import json
import math
import random
import resource
import subprocess
import sys
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import THOROUGH
from torch import nn as torch_nn

import snnkern
from snnkern import _C, nn, surrogate


class Text(str):
    pass


class Whole(int):
    pass


class Rude:
    """Refuses everything."""

    def _refuse(self, *_):
        raise ZeroDivisionError("rude")

    __bool__ = __eq__ = __lt__ = __float__ = __int__ = __index__ = __len__ = __iter__ = _refuse
    __hash__ = None

    def __repr__(self):
        return "Rude()"


class Float:
    def __float__(self):
        return 0.5


class Sub(torch.Tensor):
    pass


HUGE = [2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**64), 10**400, Fraction(10**400, 3)]
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1.5, 5e-324, 1e-45, 1e38, 1e39, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *(np.float32(0.5), np.float64(math.nan), np.int64(2), np.uint8(255), np.longdouble("1e4000"), Fraction(1, 3)),
    *HUGE,
]
OBJECTS = [
    *(None, True, False, np.True_, "", "text", "cpu", "reference", "m", Text("cpu"), Whole(2), b"x", bytearray(3), 1j),
    *([], [1.0], (), (1,), {}, {"a": 1}, set(), range(3), object(), float, Ellipsis, NotImplemented, Decimal("0.5")),
    *(Rude(), Float(), np.array(0.5), np.zeros((3, 4), np.float32), np.zeros(0), torch.float32, torch.device("cpu")),
    *(slice(None), lambda x: x, torch.relu, iter(()), torch.Size([3]), memoryview(b"abc"), torch_nn.ReLU(), nn.LIF()),
    *(surrogate.Triangle(), surrogate.Integer(3), surrogate.Dspike(torch.tensor(1.0)), surrogate.ATan),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHER_DTYPES = [torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]


def tensors(draw, shape):
    """A tensor that is odd in one way, of ``shape`` mostly."""
    shape = list(shape)
    if draw.random() < 0.4:
        other = [[], [0], [1], [3], [0, 4], [3, 0], [3, 4], [4, 3], [3, 2, 4], [2, 3, 0], [1] * 12, [1] * 60, [4]]
        shape = draw.choice([*other, shape[:-1], [*shape, 1], shape[1:], shape[::-1]])
    dtype = draw.choice(DTYPES if draw.random() < 0.7 else OTHER_DTYPES)
    t = torch.randn(shape).mul(2).to(dtype)
    one = torch.ones((), dtype=dtype)
    kinds = [
        lambda: t,
        lambda: t.to("meta"),
        lambda: one.expand(shape),
        lambda: one.expand([*shape[:-1], 2**40] if shape else [2**50]),
        lambda: torch.zeros([*shape, 0], dtype=dtype).expand([2**40, *shape, 0]),
        lambda: torch.zeros([0], dtype=dtype).expand([*shape, 2**40, 0]),
        lambda: torch.zeros(t.numel() + 9, dtype=dtype).as_strided(shape, [1] * len(shape)),
        lambda: torch.zeros(4 * t.numel() + 9, dtype=dtype)[3 : 3 + 2 * t.numel() : 2].view(shape),
        lambda: t.transpose(0, -1),
        lambda: t.detach().requires_grad_(),
        lambda: torch_nn.Parameter(t),
        lambda: t.as_subclass(Sub),
        lambda: torch.imag(torch.randn(shape, dtype=torch.complex64).conj()),
        lambda: torch.full(shape, math.nan).to(dtype),
        lambda: torch.full(shape, math.inf).to(dtype),
        lambda: t.to_sparse(),
        lambda: torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8),
        lambda: torch.zeros(shape, dtype=dtype).mul(2).requires_grad_() * 1,
        lambda: t.numpy(force=True),
        lambda: t.tolist(),
    ]
    try:
        return draw.choice(kinds)()
    except (RuntimeError, TypeError):  # PyTorch has no such tensor
        return t


def states(draw, shape):
    return tuple(tensors(draw, shape) for _ in range(draw.randrange(4)))


X, Y = torch.randn(20, 3, 4), torch.randn(20, 2, 3, 5)
NEURON = {
    **{"decay": None, "tau": None, "decay_input": True, "threshold": 1.0, "reset": 0.0, "surrogate": surrogate.ATan()},
    **{"detach_reset": False, "fire_at_threshold": False, "inverse_tau": None, "ternary": False, "v_min": None},
}
MORE = {"bias": None, "synapse_decay": None, "threshold_decay": None, "threshold_jump": None}
ENDS = {"time_dim": 0, "backend": None}
NORM = {"training": True, "momentum": 0.1, "eps": 1e-5, "scale": 1.0, "residual": None, "process_group": None}
SPIKES = (torch.rand(256, 128) < 0.05).float()
NORMALISED = {"weight": torch.ones(3), "bias": torch.zeros(3), "running_mean": torch.zeros(3)}
NORMALISED |= {"running_var": torch.ones(3), "v": None, **NORM}
OPS = {
    snnkern.lif: {"x": X, "v": None, **NEURON, **MORE, **ENDS, "steps_out": None, "return_v": True},
    snnkern.bn_lif: {"y": Y, **NORMALISED, **NEURON, **ENDS, "steps_out": None, "return_v": True},
    snnkern.recurrent_lif: {"x": X, "weight": torch.randn(4, 4), "v": None, "s": None, **NEURON, **MORE, **ENDS},
    snnkern.ttm: {"x": X, "steps": 4, **ENDS},
    snnkern.linear: {"spikes": SPIKES, "weight": torch.randn(64, 128), "bias": torch.zeros(64)},
    snnkern.packed_spikes: {"detect": False, "backend": None},
}
STATES = {snnkern.lif: (3, 4), snnkern.recurrent_lif: (3, 4), snnkern.bn_lif: (2, 3, 5)}
MODULES = [
    *(getattr(nn, name) for name in nn.__all__ if inspect.isclass(getattr(nn, name)) and name != "Linear")
]  # whose constructor is PyTorch's
SURROGATES = [getattr(surrogate, name) for name in surrogate.__all__ if inspect.isclass(getattr(surrogate, name))]
REQUIRED = {"num_features": 3, "features": 4, "in_features": 4, "out_features": 4, "steps": 5, "synapse_decay": 0.5,
            "threshold_decay": 0.5, "threshold_jump": 0.1, "levels": 3, "function": surrogate.ATan()}  # fmt: skip
# What messages call an argument where it has another name there, and what PyTorch says of sizes that it cannot hold.
ALIAS = {
    "surrogate": ("surrogate_function", "Table"),
    "surrogate_function": ("surrogate", "Table"),
    "v_threshold": ("threshold",),
    "v_reset": ("reset",),
    "init_tau": ("tau", "leak"),
    **dict.fromkeys(("tau", "decay", "inverse_tau"), ("leak",)),
    **dict.fromkeys(("synapse_decay", "threshold_decay"), ("v must be a tuple",)),
    "training": ("running_mean",),
    "time_dim": ("x must have dimension", "must be [H, H]"),
    **dict.fromkeys(("x", "features"), ("must be [H, H]",)),
    "y": ("one number per channel",),
    "gamma": ("peak",),
    "device": ("Device",),
    "num_features": ("y must be",),
    "function": ("Table",),
    "max_spike_count": ("levels",),
}
NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "has no memory",
    "std::bad_alloc",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
    "invalid shape dimension",
    "Overflow when unpacking long",
)


def value(draw, default):
    if isinstance(default, torch.Tensor) and draw.random() < 0.7:
        return tensors(draw, default.shape)
    return draw.choice(draw.choice([NUMBERS, OBJECTS, HUGE]))


def is_fine(error, names) -> bool:
    """Whether ``error`` tells the caller what to change."""
    text = str(error)
    if isinstance(error, (RuntimeError, TypeError, ValueError, MemoryError)) and any(
        known in text for known in NO_MEMORY
    ):
        return True
    if type(error) not in (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    if "backend" in text and ("cannot run" in text or "must be one of" in text):
        return True
    return any(name in text for given in names for name in (given, *ALIAS.get(given, ())))


def equal(a, b) -> bool:
    if not isinstance(a, torch.Tensor):
        return a is b is None or (isinstance(a, tuple) and all(map(equal, a, b)))
    if a.is_meta:
        return a.shape == b.shape and a.dtype == b.dtype
    return a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def attempt(report, what, names, call):
    """What the call returns, None if it raised what it should."""
    try:
        return call()
    except Exception as error:
        if not is_fine(error, names):
            report.append(f"{what}: {type(error).__name__}: {error}")
        return None


def shown(v) -> str:
    if isinstance(v, torch.Tensor):
        strides = v.stride() if v.layout is torch.strided else v.layout
        return f"{type(v).__name__}({tuple(v.shape)}, {v.dtype}, {v.device}, {strides}, grad={v.requires_grad})"
    return f"{v!r}"[:80]


def told(function, options) -> str:
    return f"{function.__name__}({', '.join(f'{name}={shown(v)}' for name, v in options.items())})"


def fuzz_op(draw, report):
    """One to three arguments are changed; what the op returns, the reference returns too."""
    function = draw.choice(list(OPS))
    changed = draw.sample(list(OPS[function]), min(len(OPS[function]), draw.choice([1, 1, 2, 3])))
    options = {}
    for name in changed:
        if name in ("v", "s", "residual", "bias", "decay", "tau", "inverse_tau", "threshold") and draw.random() < 0.7:
            shape = Y.shape if name == "residual" else STATES.get(function, (64,))
            options[name] = (states if name == "v" and draw.random() < 0.3 else tensors)(draw, shape)
        else:
            options[name] = value(draw, OPS[function][name])
    what, options = told(function, options), OPS[function] | options

    def called(**more):
        """With copies of what the op writes."""
        copies = {k: options[k] for k in options if k.startswith("running")}
        copies = {k: v.clone() if type(v) is torch.Tensor else v for k, v in copies.items()}
        return function(**{**options, **copies, **more})

    given = attempt(report, what, changed, called)
    if function is snnkern.packed_spikes and given is not None:
        attempt(report, what, changed, lambda: within(given))
    if given is None or function in (snnkern.linear, snnkern.packed_spikes):
        return
    outputs = [o for o in (given if isinstance(given, tuple) else (given,)) if isinstance(o, torch.Tensor)]
    if options["backend"] is None and not outputs[0].is_meta and type(outputs[0]) is torch.Tensor:
        try:
            wanted = called(backend="reference")
        except Exception as error:
            if not any(known in str(error) for known in NO_MEMORY):
                report.append(f"{what}: the reference refuses it: {type(error).__name__}: {error}")
        else:
            if not equal(given, wanted):
                report.append(f"{what}: not what the reference gives")
    total = [o.float().sum() for o in outputs if o.requires_grad]
    if total:
        attempt(report, f"backward of {what}", changed, lambda: sum(total).backward())


def within(context):
    with context:
        spikes, _ = snnkern.lif(X)
        (spikes * torch.ones_like(spikes).requires_grad_()).sum().backward()


def fuzz_module(draw, report):
    cls = draw.choice([*MODULES, *SURROGATES])
    parameters = inspect.signature(cls).parameters
    options = {name: REQUIRED[name] for name, p in parameters.items() if name in REQUIRED and p.default is p.empty}
    if cls is nn.Windows:
        options |= {"model": torch_nn.Sequential(nn.LIF())}
    possible = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    possible += [*NEURON, *MORE] if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else []
    if not possible:
        return
    names = draw.sample(possible, min(len(possible), draw.choice([1, 1, 2])))
    for name in names:
        options[name] = tensors(draw, (3, 4)) if draw.random() < 0.15 else value(draw, None)
    what = told(cls, {name: options[name] for name in names})
    made = attempt(report, what, names, lambda: cls(**options))
    if isinstance(made, torch_nn.Module):
        x = torch.randn(20, 2, 3, 5) if cls in (nn.BNLIF, nn.TdBatchNorm) else X
        attempt(report, f"forward of {what}", names, lambda: made(x))
        attempt(report, f"repr of {what}", names, lambda: repr(made))
    elif made is not None:
        attempt(report, f"repr, hash of {what}", names, lambda: (repr(made), hash(made)))
        attempt(report, f"use of {what}", names, lambda: snnkern.lif(X, surrogate=made, reset=None))


# The extension. An address is the caller's word, so shapes here have no element and addresses are 0.


class Address(int):
    pass


A = Address()
LIF_SPEC = [0, 0.5, 1.0, False, True, 0.0, 0.0, False, False, False, 0.0, 1, 1.0, 1.0, 0.0, False, 0.0, False, 0.0, 0.0]
PLAIN_CALLS = {
    "LIFSpec": LIF_SPEC, "LIFShape": [0, 0, 40, 4, 160, 4, 40, 3, 16, 16], "Norm": [2, 3, A, A],
    "More": [A, 1, 1, A, 2, 3, A, 1, 1, *[A] * 7], "Recurrence": [4, *[A] * 5], "NormParameters": [A] * 4,
    "NormPlan": [1, 0, 2, 8.0, 1.1, 0.1, 1e-5, 1.0], "TTMShape": [0, 0, 20, 4, 80, 4, 7],
    "LinearShape": [0, 64, 64, True],
    "pack_cpu": [2, 0, A, A, 2], "unpack_cpu": [3, 0, A, A, 2], "cpu_isa": [],
    "CudaKernel": [b"", "lif", 0], "CudaLaunch": [None, 1, 1, 1, 0, []],
}  # fmt: skip
ZERO = [0, 1, 3, 16, 17, 4096, 2**31, 2**40]


def kernel_calls(draw, C):
    """Calls of kernels on shapes without elements, of extents and numbers of threads as they come."""
    steps, inner, threads = draw.choice(ZERO[1:]), draw.choice(ZERO), draw.choice([1, 2, 256, 257, 2**31 - 1])
    shape = C.LIFShape(
        draw.randrange(4), 0, steps, inner, min(steps * inner, 2**62), inner, draw.randint(1, steps), 1, steps, 0
    )
    spec, norm, more = C.LIFSpec(*LIF_SPEC), C.Norm(2, 3, 0, 0), C.More(*PLAIN_CALLS["More"])
    forward, backward = C.LIFForward(*[0] * 6, norm, more), C.LIFBackward(*[0] * 8, norm, 0, 0, more)
    recurrence = C.Recurrence(4, *[0] * 5)
    ttm = C.TTMShape(draw.randrange(4), 0, steps, inner, 0, inner, draw.choice(ZERO[1:]))
    linear = C.LinearShape(0, inner, 64, True)
    return {
        "LIFForward": [*[A] * 6, norm, more], "LIFBackward": [*[A] * 8, norm, A, A, more],
        "lif_forward_cpu": [spec, shape, forward, threads], "lif_backward_cpu": [spec, shape, backward, threads],
        "recurrent_forward_cpu": [spec, shape, forward, recurrence, threads],
        "recurrent_backward_cpu": [spec, shape, backward, recurrence, threads],
        "norm_parts_cpu": [shape], "norm_kept_cpu": [shape, norm, threads],
        "ttm_cpu": [ttm, A, A, threads], "neuron": [spec], "bytes_of": [draw.choice([shape, ttm, recurrence])],
        "linear_forward_cpu": [linear, A, A, A, A, threads],
    }  # fmt: skip


def fuzz_extension(draw, report):
    calls = {**PLAIN_CALLS, **kernel_calls(draw, _C)}
    structures = [a for call in calls.values() for a in call if type(a).__module__ == "snnkern._C"]
    name = draw.choice(list(calls))
    args = list(calls[name])
    for _ in range(draw.choice([0, 1, 1, 2]) if args else 0):
        at = draw.randrange(len(args))
        numbers = [-1, -(2**40), 2**63, -(2**63), 2**64, 10**400] if isinstance(args[at], Address) else NUMBERS
        made = draw.choice(draw.choice([OBJECTS, numbers, [torch.ones(3), *structures]]))
        whole = isinstance(made, (int, np.integer)) and not isinstance(made, bool) and 0 <= made < 2**63
        if whole and (isinstance(args[at], Address) or (name in ("pack_cpu", "unpack_cpu") and at == 1)):
            made = 0
        args[at] = made
    if draw.random() < 0.1:
        args = args[: draw.randrange(len(args) + 1)] + draw.choices(OBJECTS, k=draw.choice([0, 1, 3, 300]))
    try:
        getattr(_C, name)(*args, **({"more": 1} if draw.random() < 0.05 else {}))
    except (TypeError, ValueError, OverflowError):
        pass
    except Exception as error:
        rude = isinstance(error, ZeroDivisionError) and str(error) == "rude"
        if not rude and not name.startswith("Cuda"):  # which say that there is no driver
            report.append(f"{name}({', '.join(map(shown, args))}): {type(error).__name__}: {error}")


FUZZ = {"ops": (fuzz_op, 120), "modules": (fuzz_module, 150), "extension": (fuzz_extension, 400)}


def main(calls: str, seed: str, *kinds: str) -> None:
    """As many calls of each kind as above, times ``calls``; prints what was wrong."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), resource.RLIM_INFINITY))  # or the machine's memory goes
    report = []
    for kind in kinds:
        fuzz, number = FUZZ[kind]
        for i in range(number * int(calls)):
            torch.manual_seed(i)
            fuzz(random.Random(f"{seed} {i}"), report)
    print(json.dumps(report))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_bad_arguments_end_in_errors_that_name_them(count):
    """120 calls of ops, 150 of modules' constructors, 400 of the extension's functions; in the thorough test 100 times
    as many, of numbers drawn anew."""
    times, seed = (100, random.randrange(1 << 30)) if THOROUGH else (1, 0)
    command = [sys.executable, "-X", "faulthandler", __file__, str(times), str(seed), *FUZZ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    assert ended.returncode == 0, f"seed {seed} ended with {ended.returncode}: {ended.stderr[-4000:]}"
    assert json.loads(ended.stdout) == [], f"seed {seed}"
    count("calls", times * sum(number for _, number in FUZZ.values()))


def freed(shape, value=0.0):
    t = torch.full(shape, value)
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("call", [
    lambda: snnkern.lif(freed((20, 30))),
    lambda: snnkern.lif(torch.zeros(20, 30), freed((30,))),
    lambda: snnkern.bn_lif(freed((4, 3, 5)), None, None, None, None, training=True),
    lambda: snnkern.recurrent_lif(freed((20, 3, 4)), torch.zeros(4, 4)),
    lambda: snnkern.ttm(freed((20, 30)), 7),
    lambda: snnkern.linear(freed((2048, 128)), torch.zeros(128, 128)),
])  # fmt: skip
def test_tensors_whose_memory_was_freed_are_refused(call):
    with pytest.raises(RuntimeError, match="has no memory"):
        call()


if __name__ == "__main__":
    main(*sys.argv[1:])
