"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there.

The interpreter wants TRITON_INTERPRET=1 before Triton is imported, so its tests run in processes of their own, in the
second half of ``make test``. It checks indices, masks and mathematics, not what the compiler makes of them; that is
read from the machine code. On a machine with a GPU ``test_lif.py`` runs the kernels themselves.
"""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import INTERPRETED, assert_gradients_close, brief, few
from test_bn_lif import check as check_norm
from test_lif import RESETS, SURROGATES, check, check_all, draw, state_of

import snnkern
from snnkern import backend as backends
from snnkern import surrogate as surrogates
from snnkern.spec.layout import layout_of
from snnkern.spec.neuron import GIVEN, Backward, Forward, More, Parameter, Recurrence, make_spec
from snnkern.spec.norm import Norm, Parameters, Plan
from snnkern.spec.split import CHUNK

triton = pytest.importorskip("triton", reason="Triton is not installed")
from snnkern.backend.triton import bn_lif as norms  # noqa: E402  # imports Triton
from snnkern.backend.triton import lif as kernels  # noqa: E402
from snnkern.backend.triton import recurrent as layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="for TRITON_INTERPRET=1, as `make test` runs this file too")
compiles = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")


@in_interpreter
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_bias_and_more_states(recurrent, reset):
    """What test_neurons.py and test_recurrent.py pair with all else, where the interpreter would take too long."""
    states = {"synapse_decay": 0.75, "threshold_decay": 0.5, "threshold_jump": 0.2}
    x, weight, bias = draw((18, 2, 5)), draw((5, 5), seed=1), draw((5,), seed=2)
    v, grads, found = (
        tuple(draw((2, 5), seed=i) for i in (3, 4, 5)),
        [draw(x.shape, seed=6), *draw((3, 2, 5), seed=7)],
        [],
    )
    for name in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias, *v)]
        options = {"reset": reset, "bias": inputs[2], "backend": name, **states}
        if recurrent:
            spikes, ends = snnkern.recurrent_lif(*inputs[:2], tuple(inputs[3:]), **options)
        else:
            spikes, ends = snnkern.lif(inputs[0], tuple(inputs[3:]), **options)
        outputs = spikes, *ends
        torch.autograd.backward(outputs, grads)
        found.append((outputs, [t.grad for t in inputs if t.grad is not None]))
    (got, gradients), (true, exact) = found
    assert got[0].mean() > 0.05 and all(map(torch.equal, got, true)) and len(gradients) == 5 + recurrent
    for gradient, truth in zip(gradients, exact, strict=True):
        assert_gradients_close(gradient, truth)


@in_interpreter
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("neurons", few([1, 5, 1023], [5]))
def test_every_number_of_steps(monkeypatch, neurons, wide):
    monkeypatch.setattr(kernels, "WIDE", 0 if wide else sys.maxsize)
    for steps in few((1, 2, 3, 5, 7, 8, 11, 16, 17, 31, 32, 33, 40, 71), (2, 3, 7, 8, 16, 31, 33)):
        check_all(draw((steps, neurons)), "triton")


@in_interpreter
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "shape",
    few([(3, 19, 5), (700, 19, 1), (2, 19, 4096), (3, 19, 2065), (2, 19, 2064)], [(700, 19, 1), (2, 19, 2065)]),
    ids=str,
)
def test_rows_of_every_length(monkeypatch, shape, wide):
    monkeypatch.setattr(kernels, "WIDE", 0 if wide else sys.maxsize)
    check_all(draw(shape), "triton", time_dim=1)


@in_interpreter
def test_a_frame_repeated_in_time():
    for shape in ((1, 45), (1, 3, 64)):
        check_all(draw(shape).expand(20, *shape[1:]), "triton")


@in_interpreter
@pytest.mark.parametrize("steps", [9, 20])
def test_gradients_and_states_that_are_not_there(steps):
    x = draw((steps, 40))
    for v in (None, state_of(x)):
        check(x, v, "triton", grad_spikes=draw(x.shape, seed=2))
        check(x, v, "triton", grad_v=state_of(x, seed=3))
    spikes, v_last = snnkern.lif(x.requires_grad_(), state_of(x), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip((spikes, v_last), snnkern.lif(x.detach(), state_of(x)), strict=True))


@in_interpreter
@pytest.mark.parametrize("wide", [False, True])
def test_a_repaired_segment_has_the_next_one_repaired(monkeypatch, force, wide):
    """Segments that agree with one another and are all wrong: only the first knows of the input that is remembered."""
    monkeypatch.setattr(kernels, "WIDE", 0 if wide else sys.maxsize)
    force(32, 16)
    x = torch.zeros(150, 37)
    x[0], x[-1] = 0.3, 0.8
    spikes = check(x, None, "triton", draw(x.shape, seed=2), state_of(x, seed=3), decay=1.0)[0]
    assert spikes[-1].all()


def with_channels(shape, last, dtype=torch.float32):
    """[T, N, C, ...] or [N, T, C, ...]; ``last``: channels last in memory."""
    y = draw(shape, dtype) + 0.5
    return y.movedim(2, -1).contiguous().movedim(-1, 2) if last else y


# Shapes, time_dim, channels last; and what a program of 8 neurons has of channels, which says how it finds them
NORMS = {
    "rows of 49": ((5, 3, 2, 7, 7), 0, False, "any"),
    "rows of 64, time second": ((3, 4, 3, 8, 8), 1, False, "same"),
    "rows of 4": ((17, 9, 5, 2, 2), 0, False, "any"),
    "rows of 9, in rows of time": ((5, 16, 1, 3, 3), 1, False, "any"),
    "rows of 7, in short rows of time": ((15, 4, 3, 7), 1, False, "any"),
    "channels last": ((18, 2, 17, 5), 0, True, "last"),
    "few channels last, time second": ((4, 6, 3, 11), 1, True, "last"),
    "features": ((1, 40, 37), 0, False, "last"),
}


@in_interpreter
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", few(NORMS, list(NORMS)[1::2]))
def test_norms_in_many_programs(monkeypatch, name, wide):
    """Programs of a few lanes, so that a small tensor has several blocks, parts and channels in each way there is."""
    shape, time_dim, last, span = NORMS[name]
    monkeypatch.setattr(kernels, "WIDE", 0 if wide else sys.maxsize)
    monkeypatch.setattr(kernels, "_machine", lambda: ("interpreter", 8))
    monkeypatch.setattr(norms, "_machine", lambda: ("interpreter", 2))
    monkeypatch.setattr(norms, "LINE", 8)
    monkeypatch.setattr(norms, "BLOCKS", 2)
    shared, spans = [], set()
    share, launch = norms._share, kernels.lif_forward_kernel.run
    monkeypatch.setattr(norms, "_share", lambda *arguments: shared.append(share(*arguments)) or shared[-1])
    monkeypatch.setattr(
        kernels.lif_forward_kernel, "run", lambda *a, **o: spans.add(o["SPAN"]) or launch(*a, **o), raising=False
    )
    y = with_channels(shape, last)
    residual = draw(shape, seed=7)
    steps_out = max(1, shape[time_dim] * 2 // 3) if wide else None
    check_norm(y, "triton", state_of(y, time_dim), residual, time_dim=time_dim, steps_out=steps_out)
    assert wide or spans == {span}
    assert len(shared) == 2 and all(work.parts > 1 and work.per_part > 1 for work in shared)


@in_interpreter
@pytest.mark.parametrize(
    "name", ["rows of 64, time second", "rows of 7, in short rows of time", "few channels last, time second"]
)
def test_parameters_in_many_programs(monkeypatch, name):
    """A leak of each channel and a threshold of each neuron, found as the channels of norms are."""
    shape, time_dim, last, span = NORMS[name]
    monkeypatch.setattr(kernels, "WIDE", sys.maxsize)
    monkeypatch.setattr(kernels, "_machine", lambda: ("interpreter", 8))
    launch, spans = kernels.lif_forward_kernel.run, set()
    monkeypatch.setattr(
        kernels.lif_forward_kernel, "run", lambda *a, **o: spans.add(o["LEAK"]) or launch(*a, **o), raising=False
    )
    x = with_channels(shape, last).requires_grad_()
    v = state_of(x.detach(), time_dim)
    leak = (draw((shape[2],)).sigmoid() + 1).reshape(-1, *[1] * (len(shape) - 3)).requires_grad_()
    threshold = (draw(v.shape, seed=4).sigmoid() + 0.3).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        options = {"time_dim": time_dim, "return_v": "sequence", "backend": backend}
        outputs = snnkern.lif(x, v, tau=leak, threshold=threshold, **options)
        grads = draw(x.shape, seed=2), draw(x.shape, seed=3)
        results.append((outputs, torch.autograd.grad(outputs, (x, leak, threshold), grads)))
    (got, gradients), (wanted, of_reference) = results
    assert spans == {span} and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for one, other in zip(gradients, of_reference, strict=True):
        assert_gradients_close(one, other)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_in_parts_are_the_sums(monkeypatch, dtype):
    """The moments to 1e-12 and the table to the bit, against float64: means of 1e4, and a channel that is constant."""
    monkeypatch.setattr(norms, "_machine", lambda: ("interpreter", 4))
    monkeypatch.setattr(norms, "BLOCKS", 2)
    y = (draw((6, 5, 3, 31)) + torch.tensor([1e4, -3.0, 0.0])[:, None]).to(dtype)
    y[:, :, 1] = 7.25
    norm = Norm(3, 31, torch.empty(5, 3))
    moments = norms.bn_moments(layout_of(y, 0), norm, y)
    parts = (len(moments) - 1) // 2
    from_shift = y.double() - y[0, 0, :, :1].double()
    wanted = torch.stack([from_shift.sum((0, 1, 3)), from_shift.square().sum((0, 1, 3))])
    assert parts > 1 and torch.equal(moments[-1], y[0, 0, :, 0].double())
    assert torch.allclose(moments[:-1].view(parts, 2, 3).sum(0), wanted, rtol=1e-12)
    norms.bn_prepare(Plan(930.0, 930 / 929, 0.1, 1e-5, 0.3), moments, Parameters(None, None, None, None), norm.table)
    mean, var = y.double().mean((0, 1, 3)), y.double().var((0, 1, 3), unbiased=False)
    scale = (0.3 / torch.sqrt(var + 1e-5)).float()
    assert torch.equal(norm.table[:2], torch.stack([mean.float(), scale]))
    offset = (mean.float().double() - mean) * scale.double()
    assert torch.allclose(norm.table[2].double(), offset, rtol=1e-5, atol=1e-9)


@in_interpreter
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("steps, steps_out", [(6, 4), (17, 5), (40, 39), (71, 2)])
def test_groups_of_steps(monkeypatch, steps, steps_out, wide):
    monkeypatch.setattr(kernels, "WIDE", 0 if wide else sys.maxsize)
    for shape, time_dim in (((steps, 45), 0), ((3, steps, 5), 1)):
        x = draw(shape)
        shape = [steps_out if n == steps else n for n in shape]
        options = {"time_dim": time_dim, "steps_out": steps_out}
        check(x, state_of(x, time_dim), "triton", draw(shape, seed=2), state_of(x, time_dim, 3), **options)


@in_interpreter
def test_grouped_time_is_not_split(force):
    launches = force(32, 16)
    x = draw((150, 37))
    check(x, state_of(x), "triton", draw((7, 37), seed=2), state_of(x, seed=3), steps_out=7)
    check_norm(with_channels((150, 1, 3, 5), False), "triton")
    assert not launches


# Compiled for GPUs that are not there

TARGETS = {name: (kind, arch, warp) for name, kind, arch, warp in
           [("sm_80", "cuda", 80, 32), ("sm_90", "cuda", 90, 32), ("gfx942", "hip", "gfx942", 64)]}  # fmt: skip
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
NAMES |= {int: "i32", float: "fp32"}
NAMES |= {torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8"}


def record(monkeypatch, machine):
    """The launches made from now on: kernel, grid, arguments, keywords."""
    made = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: made.append((self.kernel, grid, args, options))

    for module in (kernels, norms, layers):
        for name, kernel in KERNELS.items():
            monkeypatch.setattr(module, name, Recorder(kernel), raising=False)
        monkeypatch.setattr(module, "_machine", lambda: machine)
    monkeypatch.setattr(kernels, "_processors", lambda device: 132)
    return made


def spec_of(**neuron):
    options = {"decay": None, "tau": None, "decay_input": True, "threshold": 1.0, "reset": 0.0}
    options |= {"surrogate": surrogates.Triangle(), "detach_reset": False, "fire_at_threshold": False}
    return make_spec(**(options | neuron))


def eight(layout, dtype):
    """Eight elements stand for all: what is launched depends on shapes and alignment alone. x, a state, and saved."""
    x, state = torch.empty(8, dtype=dtype), torch.empty(8)
    return x, state, state if layout.steps > CHUNK else None


def launches(
    monkeypatch, machine, shape, dtype=torch.float32, time_dim=0, steps_out=None, parameters=(None,) * 3,
    sequence=False, **neuron
):  # fmt: skip
    """The launches that a forward and a backward pass make for x of ``shape``; ``parameters``: channels and period of a
    leak, a threshold and a bias that are tensors."""
    made, spec = record(monkeypatch, machine), spec_of(**neuron)
    layout = layout_of(torch.empty(shape, device="meta"), time_dim)
    layout = layout._replace(steps_out=steps_out or layout.steps)
    x, state, saved = eight(layout, dtype)
    leak, threshold, bias = (None if sizes is None else Parameter(state, *sizes) for sizes in parameters)
    more = More(leak, threshold, bias, threshold and state, v_seq=state if sequence else None)
    kernels.lif_forward(spec, layout, Forward(x, state, x, state, saved, more=more))
    table = state if isinstance(spec.surrogate, surrogates.Table) else None
    gradients = {"grad_v_seq": more.v_seq, "grad_leak": leak and state, "grad_threshold": threshold and state}
    gradients["grad_bias"] = bias and state
    more = more._replace(table=table, v_seq=None, **gradients)
    kernels.lif_backward(spec, layout, Backward(x, state, saved, x, state, x, state, more=more))
    return made


def norm_launches(
    monkeypatch, machine, shape, dtype=torch.float32, time_dim=0, last=False, steps_out=None, residual=True, **neuron
):
    """The same for ``bn_lif``: moments, prepare, forward; sums, gradients, backward."""
    made, spec = record(monkeypatch, machine), spec_of(**neuron)
    y = torch.empty(shape, device="meta")
    y = torch.empty(y.movedim(2, -1).shape, device="meta").movedim(-1, 2) if last else y
    layout = layout_of(y, time_dim)
    period = layout.period(y.shape, 2, time_dim)
    layout = layout._replace(steps_out=steps_out or layout.steps)
    x, state, saved = eight(layout, dtype)
    norm = Norm(shape[2], period, torch.empty(5, shape[2]), x if residual else None)
    plan = Plan(2.0, 2.0, 0.1, 1e-5, 1.0)
    norms.bn_prepare(plan, norms.bn_moments(layout, norm, x), Parameters(*[state] * 4), norm.table)
    kernels.lif_forward(spec, layout, Forward(x, state, x, state, saved, norm))
    call = Backward(x, state, saved, x, state, x, state, norm, state, x if residual else None)
    norms.bn_gradients(plan, norm.table, norms.bn_sums(spec, layout, call), None, state, state)
    kernels.lif_backward(spec, layout, call)
    return made


KERNELS = {name: getattr(kernels, name) for name in ("lif_forward_kernel", "lif_repair_kernel", "lif_backward_kernel")}
KERNELS |= {f"bn_{name}_kernel": getattr(norms, f"bn_{name}_kernel")
            for name in ("moments", "prepare", "sums", "gradients")}  # fmt: skip
KERNELS |= {f"recurrent_{name}_kernel": getattr(layers, f"recurrent_{name}_kernel") for name in ("forward", "backward")}


def compile_for(target, kernel, args, options):
    kind, arch, warp = TARGETS[target]
    signature, constants, aligned = {}, {}, {}
    for i, (param, value) in enumerate(zip(kernel.params, args, strict=False)):
        name = param.name
        if isinstance(value, torch.Tensor):
            assert value.data_ptr() % 16 == 0
            signature[name], aligned[(i,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        elif value is None:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = param.annotation_type or NAMES[type(value)]
            if type(value) is int and value % 16 == 0 and not param.do_not_specialize:
                aligned[(i,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names[len(args) :]:
        signature[name], constants[name] = "constexpr", options.get(name)
    options = {name: value for name, value in options.items() if name not in constants}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget(kind, arch, warp), options=options)


def compiled(monkeypatch, target, shape, *args, **options):
    kind, _, warp = TARGETS[target]
    made = launches(monkeypatch, (kind, warp), shape, *args, **options)
    return [compile_for(target, kernel, args, options) for kernel, _, args, options in made]


def compiled_norm(monkeypatch, target, shape, *args, only="", **options):
    """By name, those kernels whose names have ``only`` in them."""
    kind, _, warp = TARGETS[target]
    made = norm_launches(monkeypatch, (kind, warp), shape, *args, **options)
    return {
        kernel.__name__: compile_for(target, kernel, args, options)
        for kernel, _, args, options in made
        if only in kernel.__name__
    }


def sass(kernel, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout


def assert_nothing_is_spilled(kernel, tmp_path):
    if "amdgcn" in kernel.asm:
        assert re.search(r"\.private_segment_fixed_size: 0\n", kernel.asm["amdgcn"])
    else:
        assert not re.search(r"\b(STL|LDL)\b", sass(kernel, tmp_path))


def assert_nothing_is_contracted(kernel, form, tmp_path):
    """Products and sums: what is fused, in the adjoint, was written so, and all of it is in the code, no more. And
    division is exact, or by a power of two, which is a product."""
    divides = form.get("tau", 2.0) != 2.0
    fused = sum(int(n or 1) for n in re.findall(r"call .*@llvm\.fma\.(?:v(\d+))?f\d+\(", kernel.asm["llir"]))
    assert not re.search(r"\bcontract\b|fmuladd", kernel.asm["llir"])
    assert not fused or re.search("backward|moments|sums", kernel.metadata.name)
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        assert ("v_div_fixup_f32" in code) == divides
        # Whole numbers are divided with products by 2**32 and -2**32, and of 32 bits with more.
        found = re.findall(r"v_(?:pk_)?(?:fma|mad)\w*_f32.*", code)
        assert fused or divides or not [line for line in found if not re.search(r"0x[4c]f800000", line)]
    else:
        code = kernel.asm["ptx"]
        assert len(re.findall(r"\bfma\.rn\.", code)) == fused and not re.search(r"\b(?:add|sub|mul)\.f(?:32|64)", code)
        assert set(re.findall(r"\bdiv\.\S*f32", code)) == ({"div.rn.f32"} if divides else set())
        # The division of float64 looks at high words with FFMA.
        assert fused or divides or "div.rn.f64" in code or "FFMA" not in sass(kernel, tmp_path)


LARGE, SMALL = 1 << 18, 4096  # neurons
SPLIT = 4000, 256  # steps and neurons
BIASED = torch.float32, {"parameters": (None, None, (1, 1))}
SMALLEST, LARGEST = (torch.float32, {}), (torch.bfloat16, {"tau": 3.0, "surrogate": surrogates.Dspike()})


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_and_dtype_compiles(monkeypatch, tmp_path, target, dtype):
    for kernel in compiled(monkeypatch, target, (4, LARGE), dtype):
        assert_nothing_is_spilled(kernel, tmp_path)


@compiles
@pytest.mark.parametrize("surrogate", brief(SURROGATES, SURROGATES[::3]), ids=str)
def test_every_surrogate_compiles(monkeypatch, tmp_path, surrogate):
    for kernel in compiled(monkeypatch, "sm_90", (4, LARGE), surrogate=surrogate):
        assert_nothing_is_spilled(kernel, tmp_path)
        assert ".f64" not in kernel.asm["ptx"]


@compiles
@pytest.mark.parametrize("dtype, neuron", brief([SMALLEST, LARGEST], [LARGEST]), ids=str)
@pytest.mark.parametrize("target", brief(TARGETS, ["sm_90"]))
def test_many_steps_stay_in_registers(monkeypatch, tmp_path, target, dtype, neuron):
    for kernel in compiled(monkeypatch, target, (64, LARGE), dtype, **neuron):
        assert_nothing_is_spilled(kernel, tmp_path)


@compiles
@pytest.mark.parametrize(
    "form", [{"decay": 0.5}, {"tau": 2.0}, {"tau": 3.0}, {"tau": 3.0, "decay_input": False}], ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_products_and_sums_are_not_contracted_and_division_is_exact(monkeypatch, tmp_path, target, form):
    for kernel in compiled(monkeypatch, target, (4, LARGE), **form):
        assert_nothing_is_contracted(kernel, form, tmp_path)


@compiles
@pytest.mark.parametrize(
    "target, kind", brief([("sm_80", LARGEST), ("sm_90", SMALLEST), ("gfx942", BIASED)], [("sm_90", SMALLEST)])
)
def test_kernels_of_split_time(monkeypatch, tmp_path, target, kind):
    dtype, neuron = kind
    for kernel in compiled(monkeypatch, target, SPLIT, dtype, **neuron):
        assert_nothing_is_spilled(kernel, tmp_path)
        assert_nothing_is_contracted(kernel, neuron, tmp_path)
        if "ptx" in kernel.asm:
            assert max(loads_in_flight(sass(kernel, tmp_path))) >= CHUNK


ADAPTIVE = {"threshold_decay": 0.75, "threshold_jump": 0.125}
TABLE = surrogates.Table(torch.cos, 1.0, 64)
NEURONS = {  # each has some of what plain ones have not
    "parametric": ("sm_80", 64, torch.float32, {"inverse_tau": GIVEN, "parameters": ((1, 1), None, None)}),
    "ternary": ("sm_90", 4, torch.bfloat16, {"tau": GIVEN, "reset": 0.3, "ternary": True, "v_min": -1.0,
                "sequence": True, "surrogate": TABLE, "parameters": ((64, 196), None, None)}),
    "integer": ("gfx942", 4, torch.float16, {"tau": 3.0, "threshold": GIVEN, "reset": None,
                "surrogate": surrogates.Integer(), "parameters": (None, (LARGE, 1), None)}),
    "all states": ("sm_90", 4, torch.bfloat16, {"tau": 3.0, "reset": None, "synapse_decay": 0.5, **ADAPTIVE,
                   "parameters": (None, (64, 196), (64, 196))}),
}  # fmt: skip


@compiles
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_that_are_not_plain(monkeypatch, tmp_path, name):
    target, steps, dtype, neuron = NEURONS[name]
    for kernel in compiled(monkeypatch, target, (steps, LARGE), dtype, **neuron):
        assert_nothing_is_spilled(kernel, tmp_path)
        assert_nothing_is_contracted(kernel, neuron, tmp_path)


@compiles
def test_kernels_of_recurrent_layers(monkeypatch, tmp_path):
    made, spec = record(monkeypatch, ("cuda", 32)), spec_of(tau=3.0, synapse_decay=0.5, **ADAPTIVE)
    layout = layout_of(torch.empty((20, 4, 128), device="meta"), 0)
    x, state, saved = eight(layout, torch.bfloat16)
    weight, each = torch.empty(128, 8), Parameter(state, 128, 1)
    more = More(None, each, each, state)
    call = Forward(x, state, x, state, saved, more=more)
    layers.recurrent_forward(spec, layout, call, Recurrence(weight, state, x))
    call = Backward(x, state, saved, x, state, x, state, more=more._replace(grad_threshold=state, grad_bias=state))
    layers.recurrent_backward(spec, layout, call, Recurrence(weight, state, x, x, state))
    for kernel, _, args, options in made:
        code = compile_for("sm_90", kernel, args, options)
        assert_nothing_is_spilled(code, tmp_path)
        assert_nothing_is_contracted(code, {"tau": 3.0}, tmp_path)


@compiles
@pytest.mark.parametrize("shape, time_dim", [((4, LARGE), 0), ((64, 4, 4096), 1)], ids=str)
def test_forward_moves_sixteen_bytes_at_a_time(monkeypatch, tmp_path, shape, time_dim):
    code = sass(compiled(monkeypatch, "sm_90", shape, time_dim=time_dim)[0], tmp_path)
    assert set(re.findall(r"\b(?:LDG|STG)\.E\S*", code)) == {"LDG.E.128", "STG.E.128"}


@compiles
@pytest.mark.parametrize("steps, bits", [(4, 128), (64, 64)])
def test_backward_moves_four_elements_of_few_steps_at_a_time_and_two_of_many(monkeypatch, tmp_path, steps, bits):
    code = sass(compiled(monkeypatch, "sm_90", (steps, LARGE))[1], tmp_path)
    assert set(re.findall(r"\b(?:LDG|STG)\.E\S*", code)) == {f"LDG.E.{bits}", f"STG.E.{bits}"}


IMAGES, LONG = (4, 32, 64, 32, 32), (40, 32, 512, 8, 8)


NORMED = [("sm_80", IMAGES, 2, LARGEST), ("sm_90", IMAGES, None, SMALLEST), ("gfx942", IMAGES, 2, SMALLEST)]
LONGER = [("sm_80", LONG, 10, SMALLEST), ("sm_90", LONG, None, LARGEST), ("gfx942", LONG, 10, LARGEST)]


@compiles
@pytest.mark.parametrize("target, shape, steps_out, kind", brief(NORMED + LONGER, NORMED))
def test_kernels_with_a_norm(monkeypatch, tmp_path, target, shape, steps_out, kind):
    dtype, neuron = kind
    for name, kernel in compiled_norm(monkeypatch, target, shape, dtype, steps_out=steps_out, **neuron).items():
        assert_nothing_is_spilled(kernel, tmp_path)
        has_neurons = name.startswith("lif") or name == "bn_sums_kernel"
        assert_nothing_is_contracted(kernel, neuron if has_neurons else {}, tmp_path)


@compiles
def test_statistics_are_made_in_float64(monkeypatch):
    kernels = compiled_norm(monkeypatch, "sm_90", IMAGES)
    found = {name: set(re.findall(r"\b(?:div|sqrt)\.\w+\.f\d+", kernel.asm["ptx"])) for name, kernel in kernels.items()}
    assert found["bn_prepare_kernel"] == {"div.rn.f64", "sqrt.rn.f64"}
    assert found["bn_gradients_kernel"] == {"div.rn.f64"}
    assert not any(found[name] for name in found if name not in ("bn_prepare_kernel", "bn_gradients_kernel"))


@compiles
@pytest.mark.parametrize(
    "shape, options",
    [
        *brief([(IMAGES, {}), ((32, 4, 256, 28, 28), {"time_dim": 1})], []),
        ((4, 32, 512, 8, 8), {"last": True}),
        ((4, 32, 64, 14, 14), {}),
    ],
    ids=str,
)
def test_norms_are_read_sixteen_bytes_at_a_time(monkeypatch, tmp_path, shape, options):
    """By moments eight; and all but the numbers of the channels, of which four neurons side by side share the way."""
    tensors = {"bn_moments_kernel": 1, "lif_forward_kernel": 2, "bn_sums_kernel": 3, "lif_backward_kernel": 3}
    for name, kernel in compiled_norm(monkeypatch, "sm_90", shape, **options).items():
        if name in tensors:
            code = sass(kernel, tmp_path)
            loads, wide = re.findall(r"\bLDG\.E\S*", code), "LDG.E.64" if "moments" in name else "LDG.E.128"
            assert loads.count(wide) >= 4 * tensors[name] and len(loads) - loads.count(wide) <= 12
            assert name.startswith("bn") or set(re.findall(r"\bSTG\.E\S*", code)) == {"STG.E.128"}


@compiles
def test_one_kernel_with_a_norm_serves_every_size(monkeypatch):
    """Of a unit: batches, steps of one K, channels and images."""

    def kernels_of(*shape, steps_out):
        made = norm_launches(monkeypatch, ("cuda", 32), shape, steps_out=steps_out)
        return [([type(arg) for arg in args], options) for _, _, args, options in made]

    assert kernels_of(33, 2, 64, 32, 32, steps_out=5) == kernels_of(47, 1, 32, 64, 48, steps_out=16)


@compiles
def test_loads_are_in_flight_together(monkeypatch, tmp_path):
    for kernel in compiled(monkeypatch, "sm_90", (64, SMALL)):
        assert_nothing_is_spilled(kernel, tmp_path)
        assert statistics.median(loads_in_flight(sass(kernel, tmp_path))) >= 8


def loads_in_flight(code):
    """For each load, where its result is first touched: how many loads have been issued since, itself included."""
    issued, pending, counts = 0, {}, []
    for line in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", code):
        load = re.match(r"(?:@!?U?P\d+ +)?LDG\S* (R\d+),", line)
        if load:
            pending[load[1]] = issued
            issued += 1
            continue
        for register in re.findall(r"\bR\d+\b", line):
            if register in pending:
                counts.append(issued - pending.pop(register))
    return counts


@compiles
def test_one_kernel_serves_every_number_of_steps(monkeypatch):
    def kernel_of(steps, neurons):
        return [
            ([type(arg) for arg in args], options)
            for _, _, args, options in launches(monkeypatch, ("cuda", 32), (steps, neurons))
        ]

    assert kernel_of(33, 4096) == kernel_of(500, 4096) == kernel_of(501, 8192)
    assert kernel_of(4000, 256) == kernel_of(5001, 512)  # split over time
    sizes = {param.name for param in KERNELS["lif_forward_kernel"].params if param.do_not_specialize}
    assert sizes == set(kernels._sizes)
    for kernel, _, args, _ in launches(monkeypatch, ("cuda", 32), SPLIT):
        given = dict(zip(kernel.arg_names, args, strict=False))
        assert given["segment_steps"] % 16 == given.get("warmup", 0) % 16 == 0  # else Triton would make another kernel


@compiles
def test_only_split_time_takes_more_launches(monkeypatch):
    def grids(shape):
        return [grid for _, grid, _, _ in launches(monkeypatch, ("cuda", 32), shape)]

    assert grids((64, SMALL)) == [(128, 1), (128, 1)]
    assert grids(SPLIT) == [(8, 21), (8, 1), (8, 20), (8, 21)]  # forward and repair; map and backward


@compiles
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("dtype", brief([torch.float32, torch.float16, torch.bfloat16], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("target", brief(TARGETS, ["sm_90"]))
def test_packing_compiles_and_moves_16_bytes_at_a_time(monkeypatch, tmp_path, target, dtype, check):
    made, module = [], sys.modules[backends.load("triton").pack.__module__]
    for name in ("pack_kernel", "unpack_kernel"):
        kernel = getattr(module, name)
        recorder = {(32,): lambda *args, kernel=kernel, **options: made.append((kernel, args, options))}
        monkeypatch.setattr(module, name, recorder)
    x, bits = torch.empty(65536, dtype=dtype), torch.empty(8192, dtype=torch.uint8)
    module.pack(x, bits, check)
    module.unpack(bits, x)
    for (kernel, args, options), moves in zip(made, ("load", "store"), strict=True):
        code = compile_for(target, kernel, args, options)
        assert_nothing_is_spilled(code, tmp_path)
        if "amdgcn" in code.asm:
            assert re.findall(rf"\bglobal_{moves}_dwordx\d", code.asm["amdgcn"]).count(f"global_{moves}_dwordx4")
        else:
            wide = re.findall(r"\bLDG\.E\S*" if moves == "load" else r"\bSTG\.E\S*", sass(code, tmp_path))
            assert set(wide) - {"STG.E"} == ({"LDG.E.128"} if moves == "load" else {"STG.E.128"})


# The backend


def test_importing_snnkern_does_not_import_the_kernels():
    code = "import sys, snnkern; snnkern.backends(); sys.exit('snnkern.backend.triton.lif' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"CUDA_VISIBLE_DEVICES": ""})


def test_what_the_backend_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_backend = backends.load("triton")
    assert triton_backend.refuses("cuda", torch.bfloat16) is None
    assert triton_backend.refuses("xpu", torch.float32) is None
    assert "on the CPU" in triton_backend.refuses("cpu", torch.float32)
    assert "float64" in triton_backend.refuses("cuda", torch.float64)
    assert "on mps" in triton_backend.refuses("mps", torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.unavailable() is None
    assert triton_backend.refuses("cpu", torch.float32) is None


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "no GPU" in backends.load("triton").unavailable()


def test_the_tensors_device_becomes_the_current_one(monkeypatch):
    entered = SimpleNamespace(device=lambda device: f"entered {device}", current_device=lambda: 0)
    monkeypatch.setattr(torch, "cuda", entered)
    assert kernels.on(torch.device("cuda:1")) == "entered cuda:1"
    with kernels.on(torch.device("cuda:0")) as nothing:
        assert nothing is None
