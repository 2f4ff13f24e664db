"""What the CUDA backend compiles for the LIF, and how it launches it: no GPU is needed to see that."""

import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import brief

from snnkern import _C
from snnkern.backend._extension import neuron_of
from snnkern.backend.cuda import lif, program
from snnkern.spec.layout import layout_of
from snnkern.spec.neuron import Forward, make_spec
from snnkern.surrogate import ATan, Table

if program.missing():
    pytest.skip(program.missing(), allow_module_level=True)

F32, BF16 = torch.float32, torch.bfloat16
SPEC = make_spec(None, 2.0, True, 1.0, 0.0, ATan(), False, False)
WIDE = {F32: 4, BF16: 8}


@pytest.fixture
def made(monkeypatch):
    """Calls ``make``, lif._forward or lif._backward, on a device of 132 multiprocessors: {kernel: (variant, grid)}."""

    def call(make, x, aligned=True, time_dim=0, steps_out=None, spec=SPEC):
        layout = layout_of(x, time_dim)
        layout = layout._replace(steps_out=steps_out or layout.steps)
        found = make(spec, layout, x.dtype, aligned, make is lif._backward, 0)
        return {name: (variant, grid) for name, variant, grid in found.kernels}

    monkeypatch.setattr(lif, "processors", lambda device: 132)
    monkeypatch.setattr(lif, "prepare", lambda header, name, variant, grid, constants, device: (name, variant, grid))
    return call


def meta(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("make", [lif._forward, lif._backward])
def test_threads_are_wide_where_enough_are_left(made, make, dtype):
    """Of few steps all is on its way, and 64 wide threads a multiprocessor do; later it takes several hundred."""
    name = f"lif{make.__name__}"

    def width(steps, threads, **options):
        x = meta(steps, threads * WIDE[dtype], dtype=dtype)
        variant, grid = made(make, x, **options)[name]
        assert grid.across * grid.threads * variant.width >= x.shape[1]
        return variant.width

    for steps in (1, 4, 8):
        assert width(steps, 132 * 64) == WIDE[dtype]
        assert width(steps, 132 * 64 - 1) == 1
        assert width(steps, 132 * 64, aligned=False) == 1
    for steps in (9, 64):
        assert width(steps, 132 * 420) == WIDE[dtype]
        assert width(steps, 132 * 190) == 1


def test_any_dense_layout_is_as_wide_as_a_contiguous_one(made):
    contiguous = made(lif._forward, meta(4, 32, 64, 16, 16))
    channels_last = meta(4, 32, 16, 16, 64).permute(0, 1, 4, 2, 3)
    assert made(lif._forward, channels_last) == contiguous
    assert contiguous["lif_forward"][0].width == 4
    batch_first, _ = made(lif._forward, meta(32, 4, 64, 16, 16), time_dim=1)["lif_forward"]
    assert batch_first == contiguous["lif_forward"][0]._replace(rows=True)
    odd, _ = made(lif._forward, meta(32, 4, 65, 15, 15), time_dim=1)["lif_forward"]  # rows begin anywhere
    assert odd.width == 1


def test_few_steps_are_constants(made):
    for steps in (1, 4, 8):
        variant, _ = made(lif._backward, meta(steps, 100))["lif_backward"]
        assert variant.steps == steps
    for steps in (9, 100):
        variant, grid = made(lif._backward, meta(steps, 100))["lif_backward"]
        assert variant.steps == 0
        assert grid.shared == min(steps, 16) * grid.threads * variant.width * 4


def test_a_forward_pass_is_one_kernel_for_all_surrogates(made, monkeypatch):
    (forward,) = made(lif._forward, meta(4, 100)).values()
    assert forward[0].surrogate == 0 and not forward[0].given and not forward[0].detached
    assert made(lif._backward, meta(4, 100))["lif_backward"][0].given


def test_a_rest_of_zero_is_a_constant(made):
    def rests(decay, tau, reset):
        spec = make_spec(decay, tau, True, 1.0, reset, ATan(), False, False)
        return made(lif._forward, meta(4, 100), spec=spec)["lif_forward"][0].rest

    assert rests(None, 2.0, -0.5) and rests(None, 3.0, 0.25)
    assert not (rests(None, 2.0, 0.0) or rests(None, 2.0, None) or rests(0.5, None, -0.5))


def test_long_times_of_few_neurons_are_split(made):
    x = meta(4000, 100)
    forward, backward = made(lif._forward, x), made(lif._backward, x)
    assert list(forward) == ["lif_forward", "lif_repair"] and list(backward) == ["lif_map", "lif_backward"]
    for variant, _ in (*forward.values(), *backward.values()):
        assert variant.split and variant.width == 1
    segments = backward["lif_backward"][1].down
    assert segments > 1 and backward["lif_map"][1].down == segments - 1 and forward["lif_repair"][1].down == 1
    states = replace(SPEC, synapse_decay=0.5)
    assert list(made(lif._forward, x, spec=states)) == ["lif_forward"]
    assert list(made(lif._backward, x, spec=states)) == ["lif_backward"]
    grouped = made(lif._forward, x, steps_out=1000)  # a group may lie in two segments
    assert list(grouped) == ["lif_forward"] and grouped["lif_forward"][0].grouped


def test_nothing_is_launched_for_no_neuron_and_time_has_an_end(made):
    assert made(lif._forward, meta(4, 0)) == made(lif._backward, meta(4, 0)) == {}
    with pytest.raises(ValueError, match=r"2\*\*30"):
        made(lif._forward, meta(1 << 30, 1))


def test_a_neuron_remembers_its_launches_and_not_too_many(monkeypatch):
    kernels, asked = [], []
    monkeypatch.setattr(lif, "stream_of", lambda device: 0)
    monkeypatch.setattr(lif, "MOST_LAUNCHES", 2)
    monkeypatch.setattr(lif, "processors", lambda device: 132)
    monkeypatch.setattr(lif, "prepare", lambda *given: asked.append(given) or (lambda *words: kernels.append(words)))
    spec = make_spec(None, 2.0, True, 1.25, 0.0, ATan(), False, False)

    def call(neurons):
        x, v_last = torch.zeros(4, neurons), torch.zeros(neurons)
        lif.lif_forward(spec, layout_of(x, 0), Forward(x, None, x, v_last, None))
        assert kernels[-1] == (0, x.data_ptr(), 0, x.data_ptr(), v_last.data_ptr(), 0)
        return len(asked)

    assert [call(8), call(8), call(16), call(8), call(24), call(24), call(8)] == [1, 1, 2, 2, 3, 3, 4]
    assert len(kernels) == 7


# --- what the compiler makes of it ---


def cuobjdump():
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton, which carries one, is installed")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def machine_code(name, variant, target, tmp_path):
    """Its text and registers; nothing spills."""
    image, _ = program.compile("lif.cuh", f"snnkern::{name}<{program._cpp(variant)}>", target)
    (tmp_path / "kernel.cubin").write_bytes(image)
    run = [cuobjdump(), "-sass", "-res-usage", tmp_path / "kernel.cubin"]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK"))
    assert stack == 0 and not re.search(r"\b(LDL|STL)\b", text)
    return text, registers


DECAY, DIVIDED, INVERSE = 0, 1, 3  # members of csrc/lif.h's Leak
KERNELS = [
    ("lif_forward", 0, 4, 4, INVERSE),
    ("lif_forward", 3, 8, 0, DECAY),
    ("lif_forward", 2, 8, 0, DIVIDED),
    ("lif_forward", 3, 1, 0, DECAY),
    ("lif_backward", 0, 4, 0, DECAY),
    ("lif_backward", 3, 8, 4, INVERSE),
    ("lif_backward", 3, 8, 4, DIVIDED),
    ("lif_backward", 2, 8, 0, DECAY),
    ("lif_repair", 0, 1, 0, INVERSE),
    ("lif_map", 3, 1, 0, DIVIDED),
]


@pytest.mark.parametrize("target", brief(["sm_80", "sm_90"], ["sm_90"]))
@pytest.mark.parametrize(("name", "dtype", "width", "steps", "form"), KERNELS)
def test_machine_code(name, dtype, width, steps, form, target, tmp_path):
    """Nothing spills, registers leave room for enough threads, wide ones move 16 bytes at a time, and charge, fire and
    reset are not contracted: what is fused there belongs to an exact division."""
    backward, split = name in ("lif_backward", "lif_map"), name in ("lif_repair", "lif_map")
    variant = lif.LIFVariant(dtype, width, steps, False, form, True, True, False, 4 * backward, backward, split, False)
    text, registers = machine_code(name, variant, target, tmp_path)
    assert math.ceil(registers / 8) * 8 * (384 if backward else 1024) <= 1 << 16
    for move in (r"LDG\.E\.NA\.128", r"STG\.E\.128"):
        assert bool(re.search(move, text)) == (width > 1), move
    assert bool(re.search(r"\bFCHK", text)) == (form == DIVIDED)
    if not backward and form != DIVIDED:
        assert not re.search(r"\bFFMA", text)


SOFT, INTEGER = {"hard": False}, {"hard": False, "integer": True, "unit": True}
TERNARY, LANES = {"ternary": True, "bounded": True}, {"leak": 4, "threshold": 4, "rows": True, "sequence": True}
STATES = {"synaptic": True, "adaptive": True, "at_threshold": True}
MORE = [
    ("lif_forward", 3, 8, 4, INVERSE, {**TERNARY, "leak": 8, "threshold": 8, "sequence": True}),
    ("lif_forward", 3, 8, 0, DECAY, INTEGER),
    ("lif_backward", 3, 8, 4, INVERSE, TERNARY),
    ("lif_backward", 3, 8, 0, DECAY, INTEGER),
    ("lif_backward", 3, 4, 8, INVERSE, {"leak": 1}),
    ("lif_backward", 0, 4, 0, DIVIDED, {**TERNARY, **LANES}),
    ("lif_backward", 3, 4, 0, DECAY, {**SOFT, **LANES, "grouped": True}),
    ("lif_forward", 3, 8, 4, INVERSE, {"bias": 8, **STATES}),
    ("lif_backward", 3, 8, 0, DECAY, {"bias": 8}),
    ("lif_backward", 0, 4, 0, INVERSE, {"bias": 1, **STATES}),
    ("lif_backward", 3, 4, 8, INVERSE, {**SOFT, "adaptive": True, "threshold": 1}),
    ("lif_backward", 3, 4, 0, DECAY, {**INTEGER, "unit": False, "bias": 4, **STATES}),
]


@pytest.mark.parametrize(("name", "dtype", "width", "steps", "form", "more"), MORE)
def test_machine_code_of_what_only_some_neurons_have(name, dtype, width, steps, form, more, tmp_path):
    backward = name == "lif_backward"
    surrogate = _C.surrogates["Integer" if more.get("integer") else "ATan"] * backward
    variant = lif.LIFVariant(dtype, width, steps, False, form, False, True, False, surrogate, backward, False, False)
    parameters = {f"grad_{name}": backward and more.get(name, 0) > 0 for name in ("leak", "threshold", "bias")}
    _, registers = machine_code(name, variant._replace(**more, **parameters), "sm_90", tmp_path)
    assert math.ceil(registers / 8) * 8 * (384 if backward else 1024) <= 1 << 16


@pytest.mark.parametrize(("dtype", "width"), [(0, 4), (3, 8)])
def test_a_table_is_read_in_a_loop(dtype, width, tmp_path):
    table = _C.surrogates["Table"]
    variant = lif.LIFVariant(dtype, width, 0, False, INVERSE, False, True, False, table, True, False, False)
    text, _ = machine_code("lif_backward", variant, "sm_90", tmp_path)
    assert re.search(r"LDG\.E\.64\.CONSTANT", text)
    spec = replace(SPEC, surrogate=Table(torch.cos))
    assert lif.adjoint_of(spec, variant._replace(steps=4), _C.neuron(neuron_of(spec)), True).steps == 0


def test_everything_at_once_does_not_spill(tmp_path):
    """Three columns of shared memory leave room for 256 threads."""
    variant = lif.LIFVariant(0, 4, 0, False, DIVIDED, True, True, False, 4, True, False, False, bias=4, grad_bias=True)
    parameters = {**TERNARY, **LANES, **STATES, "grad_leak": True, "grad_threshold": True}
    machine_code("lif_backward", variant._replace(**parameters), "sm_90", tmp_path)
    spec = replace(SPEC, leak=1.7, threshold_decay=0.9, threshold_jump=0.1)
    variant = variant._replace(adaptive=True, steps=8)
    assert lif.adjoint_of(spec, variant, _C.neuron(neuron_of(spec)), True).steps == 0
    assert lif.adjoint_of(spec, variant._replace(form=INVERSE), _C.neuron(neuron_of(spec)), True).steps == 8
