"""What the CUDA backend compiles for recurrent layers, and how it launches it: no GPU is needed to see that."""

import math
import re
import subprocess

import pytest
import torch
from test_cuda_lif import cuobjdump

from snnkern import _C
from snnkern.backend.cuda import program, recurrent
from snnkern.spec.layout import layout_of
from snnkern.spec.neuron import Forward, Recurrence, make_spec
from snnkern.surrogate import ATan

if program.missing():
    pytest.skip(program.missing(), allow_module_level=True)

SPEC = make_spec(None, 2.0, True, 1.0, 0.0, ATan(), False, False)
H100, LEAST = 227 << 10, 99 << 10  # of shared memory that a block may ask for; the latter on any device


@pytest.fixture
def planned(monkeypatch):
    """Calls ``_forward`` or ``_backward`` on a device of 132 multiprocessors; returns variant, grid and what comes
    after the launch."""

    def call(make, layers, size, room=H100, given=True, spec=SPEC, **options):
        monkeypatch.setattr(recurrent, "shared_memory", lambda device: room)
        layout = layout_of(torch.empty((20, layers, size), device="meta"), 0)
        rest = (False,) if make is recurrent._backward else ()
        made = make(spec, layout, torch.float32, size, given, *rest, 0)
        (variant, grid), *more = made if rest else (made,)
        assert grid.shared <= room and grid.threads <= 1024
        return variant, grid, *more

    monkeypatch.setattr(recurrent, "processors", lambda device: 132)
    monkeypatch.setattr(recurrent, "prepare", lambda header, name, variant, grid, constants, device: (variant, grid))
    return call


def test_weights_of_forward_are_in_shared_memory_where_they_fit(planned):
    for room, most in ((H100, 238), (LEAST, 157)):
        assert planned(recurrent._forward, 64, most, room, given=False)[0].shared
        variant, grid, *_ = planned(recurrent._forward, 64, most + 3, room, given=False)
        assert not variant.shared and grid.shared < 5000


@pytest.mark.parametrize(("size", "warps", "planes"), [(1, 1, 1), (33, 1, 2), (128, 1, 4), (160, 2, 3), (1024, 8, 4)])
def test_a_thread_of_forward_has_few_neurons(planned, size, warps, planes):
    variant, grid, *_ = planned(recurrent._forward, 100, size)
    assert (variant.warps, variant.planes) == (warps, planes) and warps * planes * 32 >= size
    assert grid == (100, 1, 32 * warps, grid.shared)


def test_layers_share_a_block_where_there_are_many(planned):
    for layers, each in ((132, 1), (133, 2), (1000, 8), (100_000, 16)):
        _, grid, *_ = planned(recurrent._forward, layers, 100)
        assert grid.threads == 32 * each and grid.across == math.ceil(layers / each)


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("room", [H100, LEAST])
def test_the_rows_of_backward_lie_in_registers_then_in_shared_memory(planned, room, valued):
    found = {}
    for size in (1, 31, 128, 130, 200, 256, 300, 512, 513, 1000, 1024):
        variant, grid, kept, planes = planned(recurrent._backward, 7, size, room, valued)
        assert grid.across == 7 and grid.threads == 32 * variant.warps >= size and planes == 1
        found[size] = on_chip = min(variant.rows, size) + kept
        assert on_chip <= size and (on_chip == size or on_chip % 4 == 0) and variant.rows % 4 == 0
    assert all(found[size] == size for size in (1, 31, 128, 130)) and found[1024] < 100
    assert found[256] == 256 or room == LEAST


def test_too_many_neurons_or_steps_are_refused():
    x, weight = torch.empty((2, 1, 1025), device="meta"), torch.empty((1025, 1025), device="meta")
    recurrence = Recurrence(weight, weight, None)
    with pytest.raises(ValueError, match="recurrent layers of up to 1024 neurons, got 1025"):
        recurrent.recurrent_forward(SPEC, layout_of(x, 0), Forward(x, None, x, None, None), recurrence)
    x, weight = torch.empty((1 << 30, 1, 1), device="meta"), torch.empty((1, 1), device="meta")
    with pytest.raises(ValueError, match=r"2\*\*30 time steps"):
        recurrent.recurrent_forward(
            SPEC, layout_of(x, 0), Forward(x, None, x, None, None), Recurrence(weight, weight, None)
        )


# --- what the compiler makes of it ---

PLAIN = dict.fromkeys(recurrent.RecurrentVariant._fields, 0) | {"hard": True, "warps": 1, "planes": 4, "shared": True}
TAU = 1  # a member of csrc/lif.h's Leak, that divides
ALL = {"form": TAU, "bounded": True, "synaptic": True, "adaptive": True, "at_threshold": True, "valued": True}
TERNARY, INTEGER = {**ALL, "ternary": True}, {**ALL, "hard": False, "integer": True}


KERNELS = [
    ("sm_90", "recurrent_forward", {"dtype": 3}),
    ("sm_80", "recurrent_forward", {**INTEGER, "dtype": 2, "warps": 2}),
    ("sm_80", "recurrent_backward", {**INTEGER, "warps": 8, "grad_leak": True}),
    ("sm_90", "recurrent_backward", {**TERNARY, "warps": 12, "grad_leak": True, "surrogate": "Table"}),
    ("sm_90", "recurrent_backward", {**TERNARY, "dtype": 3, "warps": 32, "grad_leak": True, "surrogate": "Sigmoid"}),
]


@pytest.mark.parametrize(("target", "name", "variant"), KERNELS, ids=str)
def test_machine_code(target, name, variant, tmp_path):
    """Nothing spills, and what has no division is not contracted."""
    variant = PLAIN | variant
    surrogate = "Integer" if variant["integer"] else variant["surrogate"] or "ATan"
    if name == "recurrent_backward":
        variant |= {"surrogate": _C.surrogates[surrogate], "rows": recurrent.rows_in_registers(variant["warps"])}
    variant = recurrent.RecurrentVariant(**variant)
    image, _ = program.compile("recurrent.cuh", f"snnkern::{name}<{program._cpp(variant)}>", target)
    (tmp_path / "kernel.cubin").write_bytes(image)
    run = [cuobjdump(), "-sass", "-res-usage", tmp_path / "kernel.cubin"]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0\b", text) and not re.search(r"\b(LDL|STL)\b", text)
    if name == "recurrent_forward":
        assert variant.valued or not re.search(r"\bFFMA", text)
        assert not re.search(r"\bLD\.E", text), "a generic load"
