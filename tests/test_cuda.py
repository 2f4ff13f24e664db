"""The CUDA kernels without a GPU: what the compiler makes of them, how they are kept, and those of 16 bytes a thread.

With SNNKERN_EMULATE=1 (the last part of ``make test``) the op tests, and these, run the kernels on ``emulator``; on a
machine with a GPU the op tests run them there.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import warnings

import emulator
import pytest
import torch
from conftest import needs_emulator
from test_bn_lif import check as check_norm
from test_bn_lif import norm_of
from test_bn_lif import run as run_norm
from test_cuda_lif import cuobjdump
from test_lif import FORMS, RESETS, SURROGATES, check, draw, state_of
from test_neurons import STATES
from test_neurons import check as check_neuron
from test_recurrent import check as check_recurrent
from test_recurrent import spikes_before, weight_of
from test_split import ADVERSARIES

import snnkern
from snnkern import _C
from snnkern.backend import choose
from snnkern.backend.cuda import bn_once, program, recurrent
from snnkern.ops.pack import pack, unpack
from snnkern.spec.layout import arrange
from snnkern.spec.neuron import GIVEN, make_spec
from snnkern.spec.norm import Plan
from snnkern.surrogate import ATan, Integer, Table

pytestmark = [needs_emulator, pytest.mark.usefixtures("poison")]


def variants() -> list[str]:
    """Of the kernels launched since ``emulator.forget``, in C++."""
    return [emulator.built[launch.kernel.name][1] for launch in emulator.Launch.made]


def widths(name: str) -> set[int]:
    """Of the launches of the kernel ``name``, since ``emulator.forget``."""
    told = [re.match(rf"snnkern::{name}<.*\.width = \D*\(?(\d+)\)", variant) for variant in variants()]
    return {int(found[1]) for found in told if found}


# --- wide kernels: what the op tests have of odd sizes, here of packs of 16 bytes ---


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_neuron_model(form, reset, detach_reset):
    x = draw((21, 3, 8))
    v, options = state_of(x), {"reset": reset, "detach_reset": detach_reset, **form}
    check(x, v, "cuda", draw(x.shape, seed=2), state_of(x, seed=3), **options)
    assert widths("lif_forward") == widths("lif_backward") == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_every_surrogate(surrogate, dtype):
    x = draw((18, 72), dtype)
    check(x, None, "cuda", draw(x.shape, dtype, seed=2), surrogate=surrogate, fire_at_threshold=True)
    assert widths("lif_backward") == {16 // dtype.itemsize}


@pytest.mark.parametrize("bytes_of_a_channel", [16, 8])  # a thread of 16 has one channel, or two
@pytest.mark.parametrize(
    ("dtype", "leak", "kind", "spikes", "threshold", "options"),
    [
        (torch.float32, {"tau": GIVEN}, "channel", {"reset": None, "ternary": True}, "neuron",
         {"sequence": True, "states": STATES[2], "bias": "neuron"}),
        (torch.bfloat16, {"inverse_tau": GIVEN}, "scalar", {"reset": -0.3}, "channel",
         {"v_min": -0.5, "states": STATES[3], "bias": "channel"}),
        (torch.float32, {"decay": GIVEN}, "channel", {"reset": None, "surrogate": Integer(3)}, "channel", {}),
        (torch.bfloat16, {"decay": GIVEN}, "neuron", {"reset": -0.1, "surrogate": Table(torch.cos)}, 0.7,
         {"steps_out": 7}),
    ],
)  # fmt: skip
def test_every_kind_of_parameter(dtype, leak, kind, spikes, threshold, options, bytes_of_a_channel):
    x = draw((18, 2, 3, bytes_of_a_channel // dtype.itemsize), dtype)
    check_neuron("cuda", x, leak, kind, spikes, threshold, v=True, **options)
    assert widths("lif_forward") == {16 // dtype.itemsize} and widths("lif_backward") == {4}


@pytest.mark.parametrize("kind", ["channel", "neuron"])
def test_a_bias_leaves_threads_as_wide_as_they_are(kind):
    x = draw((18, 2, 3, 8), torch.bfloat16)
    check_neuron("cuda", x, {"decay": 0.9}, "scalar", {"reset": None}, 0.7, v=True, bias=kind)
    assert widths("lif_forward") == widths("lif_backward") == {8}


def test_gradients_of_parameters_over_a_long_time():
    x = draw((1000, 2, 3, 4)) + 0.2
    check_neuron("cuda", x, {"decay": GIVEN}, "scalar", {"reset": None}, "scalar", v=True, bias="scalar")


@pytest.mark.parametrize("steps", [*range(1, 10), 15, 16, 17, 31, 32, 33, 71])
def test_every_number_of_steps(steps):
    x = draw((steps, 3, 8))
    check(x, state_of(x), "cuda", draw(x.shape, seed=2), state_of(x, seed=3))
    check(x, None, "cuda", grad_v=state_of(x, seed=3))


@pytest.mark.parametrize("time_dim", [0, 1, 2])
def test_outer_and_inner_dimensions(time_dim):
    x = draw((6, 18, 8))
    check(x, None, "cuda", draw(x.shape, seed=2), time_dim=time_dim)
    x = draw((12, 18, 16))[3:9, :, :8]
    check(x, None, "cuda", draw(x.shape, seed=2), time_dim=time_dim)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_segments(force, adversary):
    make, options = ADVERSARIES[adversary]
    launches = force(48, 16)
    for dtype in (torch.float32, torch.bfloat16):
        x = make((150, 16)).to(dtype)
        v, grad = state_of(x), draw(x.shape, dtype, seed=2)
        check(x, v, "cuda", grad, state_of(x, seed=3), **{"surrogate": ATan(), **options})
    assert {time.segments for time in launches} == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps, steps_out", [(5, 2), (16, 4), (17, 16), (33, 1), (40, 9)])
def test_groups_of_steps(steps, steps_out, dtype):
    x = draw((steps, 3, 16), dtype)
    v, grad_v = state_of(x), state_of(x, seed=3)
    check(x, v, "cuda", draw((steps_out, 3, 16), dtype, seed=2), grad_v, steps_out=steps_out, surrogate=ATan())
    x = draw((3, steps, 16), dtype)
    check(x, None, "cuda", draw((3, steps_out, 16), dtype, seed=2), time_dim=1, steps_out=steps_out, reset=None)


def channels_last(y):
    return y.movedim(2, -1).contiguous().movedim(-1, 2)


# Periods that are 1, a power of two below and above a thread's neurons and a band, and odd; channels that make several
# bands, a last one that is narrower; packs that lie in two channels, and in the last one and the first.
IMAGES = [(4, 3, 16, 1, 1), (3, 2, 200, 1, 1), (2, 3, 72, 2, 2), (2, 2, 12, 4, 4), (2, 3, 16, 3, 3), (1, 5, 3, 8, 8)]
IMAGES += [(2, 9, 3, 16, 16), (2, 8, 3, 7, 7), (3, 8, 5, 1, 1)]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_norms_of_every_layout(shape, last, dtype=torch.bfloat16):
    y = draw(shape, dtype) + 0.5
    residual = draw(shape, dtype, seed=7)
    if last:
        y, residual = channels_last(y), channels_last(residual)
    check_norm(y, "cuda")
    check_norm(y, "cuda", state_of(y), residual, surrogate=ATan())


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", FORMS[::3], ids=str)
def test_norms_of_every_neuron(form, reset):
    y = draw((18, 2, 3, 16)) * 2 - 1
    check_norm(y, "cuda", state_of(y), reset=reset, **form)
    assert widths("bn_lif_backward") == {4}


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("steps", [1, 4, 16, 17, 33])
def test_norms_over_all_of_time(steps, time_dim):
    y = draw((steps, 3, 8, 4, 4) if time_dim == 0 else (3, steps, 8, 4, 4))
    residual = draw(y.shape, seed=7)
    for steps_out in {steps, -(-steps // 3)}:
        check_norm(y, "cuda", state_of(y, time_dim), residual, time_dim=time_dim, steps_out=steps_out)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_norms_of_a_repeated_frame(last):
    frame = draw((1, 3, 8, 4, 6))
    y = (channels_last(frame) if last else frame).expand(6, -1, -1, -1, -1)
    assert arrange(y, 0)[1].x_step_stride == 0
    check_norm(y, "cuda")


@pytest.mark.parametrize("shape", [(5, 0, 3, 4), (5, 2, 3, 0), (5, 2, 0, 4), (0, 2, 3, 4)], ids=str)
def test_norms_of_nothing(shape):
    y = torch.zeros(shape)
    spikes, v_last = snnkern.bn_lif(y, *norm_of(y), training=False, backend="cuda")
    assert spikes.shape == shape and v_last.shape == shape[1:]


def test_sums_in_parts_add_up_alike():
    y = draw((2, 16, 3, 24, 24)) + 3
    once, again = (run_norm(y, "cuda", grads=(draw(y.shape, seed=2), None)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once[3], again[3], strict=True))
    check_norm(y, "cuda")


@pytest.mark.parametrize("shape", [(2, 840, 2, 5, 5), (2, 160, 40, 4, 4)])
def test_more_parts_than_a_warp_has_lanes(shape):
    y = draw(shape)
    check_norm(y if shape[2] == 2 else channels_last(y), "cuda")
    moments, _, _, sums, *_ = emulator.Launch.made
    assert moments.grid[0] > 32 and sums.grid[0] > 32  # one band


# --- batch norm with one visit to memory ---


@pytest.fixture
def clusters(monkeypatch):
    """On a device that has them; what else would take two visits."""
    monkeypatch.setattr(emulator.device, "major", 9)
    bn_once._prepared.cache_clear()
    yield
    bn_once._prepared.cache_clear()


def launched() -> list[str]:
    """Names of the kernels launched since ``emulator.forget``."""
    return [variant.removeprefix("snnkern::").partition("<")[0] for variant in variants()]


# A block has nothing to do, one item, several for some of its threads, many for each.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 5, 4, 4), (4, 2, 3, 8, 8), (7, 3, 2, 4, 2), (3, 70, 1, 32, 16)], ids=str)
@pytest.mark.usefixtures("clusters")
def test_norms_with_one_visit(shape, dtype):
    y = draw(shape, dtype) + 0.5
    for residual in (None, draw(shape, dtype, seed=7)):
        emulator.forget()
        check_norm(y, "cuda", state_of(y), residual, surrogate=ATan())
        assert launched() == ["bn_lif_forward_once", "bn_lif_backward_once"]


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", FORMS[::3], ids=str)
@pytest.mark.usefixtures("clusters")
def test_norms_with_one_visit_of_every_neuron(form, reset):
    y = draw((9, 2, 3, 16)) * 2 - 1
    check_norm(y, "cuda", state_of(y), reset=reset, **form)
    assert launched() == ["bn_lif_forward_once", "bn_lif_backward_once"]


@pytest.mark.parametrize("steps", [1, 4, 9, 16])
@pytest.mark.usefixtures("clusters")
def test_norms_with_one_visit_over_all_of_time(steps):
    y = draw((3, steps, 8, 4, 4), torch.bfloat16)
    for steps_out in {steps, -(-steps // 3)}:
        emulator.forget()
        check_norm(y, "cuda", state_of(y, 1), time_dim=1, steps_out=steps_out)
        assert launched() == ["bn_lif_forward_once", "bn_lif_backward_once"]


@pytest.mark.usefixtures("clusters")
def test_one_visit_gives_the_bits_of_the_other_way_and_the_same_ones_again(monkeypatch):
    y = draw((4, 8, 6, 8, 8)) * 3 + 2
    grads = draw(y.shape, seed=2), state_of(y, seed=3)

    def found():
        emulator.forget()
        spikes, v_last, running, gradients = run_norm(y, "cuda", grads=grads, surrogate=ATan())
        return launched(), [spikes, v_last, *running], gradients

    one, again = found(), found()
    monkeypatch.setattr(emulator.device, "major", 8)
    bn_once._prepared.cache_clear()
    two = found()
    assert one[0] == again[0] != two[0] and "moments" in two[0]
    assert all(map(torch.equal, (*one[1], *one[2]), (*again[1], *again[2])))
    assert all(map(torch.equal, one[1], two[1]))


@pytest.mark.usefixtures("clusters")
def test_one_visit_is_not_for_everything():
    """More than fits, many steps, rows that do not begin aligned, a channel's elements side by side, one frame for all
    steps, the running statistics."""
    cases = [(draw((17, 2, 3, 16)), {}), (draw((4, 2, 3, 3, 3)), {}), (channels_last(draw((4, 2, 3, 4, 4))), {})]
    cases += [(draw((1, 2, 3, 16)).expand(4, -1, -1, -1), {}), (draw((4, 2, 3, 16)), {"training": False})]
    for y, options in cases:
        check_norm(y, "cuda", **options)
    layout = arrange(torch.empty((4, 80, 2, 64, 64), device="meta"), 0)[1]
    plan, spec = Plan(1.0, 1.0, 0.1, 1e-5, 1.0), make_spec(0.5, None, True, 1.0, 0.0, ATan(), False, False)
    for name in ("bn_lif_forward_once", "bn_lif_backward_once"):
        assert not bn_once._prepared(name, plan, spec, layout, 2, 64 * 64, False, torch.float32, True, True, None)
    assert not [name for name in launched() if "once" in name]


# --- recurrent layers ---

RECURRENT = {  # neurons of a layer, layers, KiB of shared memory, steps; threads of a block
    "blocks of several layers": (40, 5, 99, 19, 96, {}),
    "and of several warps each": (130, 3, 99, 19, 128, {"synapse_decay": 0.5}),
    "rows read through L1": (60, 3, 12, 19, 64, {}),
    "rows in registers, in shared memory and in L2": (150, 1, 32, 19, 64, {"v_min": -0.3}),
    "half a chunk at a time": (513, 1, 99, 9, 160, {"ternary": True}),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers(case, monkeypatch):
    size, layers, room, steps, threads, neuron = RECURRENT[case]
    monkeypatch.setattr(recurrent, "processors", lambda device: 2)
    monkeypatch.setattr(recurrent, "shared_memory", lambda device: room << 10)
    make_spec.cache_clear()  # a neuron knows how it was launched
    x = draw((steps, layers, size))
    check_recurrent("cuda", x, weight_of(size), None, spikes_before(x, 0, neuron), **neuron)
    make_spec.cache_clear()
    forward, backward, *_ = (launch for launch in emulator.Launch.made if "recurrent" in launch.kernel.name)
    assert forward.grid[:3] == (min(layers, 2), 1, threads) and backward.grid[0] == layers
    assert (forward.grid[3] > 4 * size * size) == (room == 99 and size < 200)


# --- and the rest ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("steps_in", "steps_out"), [(6, 4), (3, 5), (7, 1), (1, 7)])
def test_ttm(steps_in, steps_out, dtype):
    for x in (draw((3, steps_in, 48), dtype)[..., :40], draw((steps_in, 40), dtype)):
        y = snnkern.ttm(x, steps_out, time_dim=x.dim() - 2, backend="cuda")
        assert torch.equal(y, snnkern.ttm(x, steps_out, time_dim=x.dim() - 2, backend="reference"))
    assert widths("ttm") == {16 // dtype.itemsize}


# --- what the compiler makes of them ---


def every_kernel(dtype):
    """Calls that launch each kernel, wide; of batch norm also with groups of steps."""
    y = draw((20, 2, 3, 24), dtype)
    check_norm(y, "cuda", residual=y, surrogate=ATan(), tau=1.7)
    check_norm(y, "cuda", steps_out=5, surrogate=ATan())
    check(y, None, "cuda", y, surrogate=ATan())
    kernels = choose("cpu", dtype, "cuda")
    unpack(pack(torch.ones_like(y), kernels), y.shape, dtype, kernels)
    snnkern.ttm(y, 4, backend="cuda")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def kernels(request):
    """Header, C++ and PTX of each."""
    emulator.forget()
    every_kernel(request.param)
    made = {emulator.built[launch.kernel.name] for launch in emulator.Launch.made}
    return [(*what, program.build(*what, "compute_90")[0].decode()) for what in sorted(made)]


# Threads that a multiprocessor's 64 K registers make room for.
THREADS = {"lif_forward": 512, "lif_backward": 320, "bn_lif_backward": 320, "bn_lif_sums": 256, "moments": 512}
THREADS |= dict.fromkeys(("prepare", "gradients", "ttm", "pack", "unpack"), 1024)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code(kernels, architecture, tmp_path):
    """Nothing spills, and registers leave room for several blocks."""
    for header, expression, _ in kernels:
        (tmp_path / "kernel.cubin").write_bytes(program.build(header, expression, architecture)[0])
        run = [cuobjdump(), "-res-usage", tmp_path / "kernel.cubin"]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK"))
        name = expression.partition("<")[0].removeprefix("snnkern::")
        assert stack == 0, f"{expression} spills"
        assert (registers + 7) // 8 * 8 * THREADS[name] <= 1 << 16, f"{expression}: {registers} registers"


def test_wide_kernels_move_16_bytes_at_a_time(kernels):
    for _, expression, ptx in kernels:
        name = expression.partition("<")[0].removeprefix("snnkern::")
        loads, stores = (bool(re.search(rf"\b{move}\.global[.:\w]*\.v4\.[bfu]32", ptx)) for move in ("ld", "st"))
        assert loads == (name not in ("prepare", "gradients", "unpack")), expression
        assert stores == (name in ("lif_forward", "lif_backward", "bn_lif_backward", "ttm", "unpack")), expression


def test_charge_fire_and_reset_are_not_contracted_and_division_is_exact(kernels):
    for header, expression, ptx in kernels:
        code = re.sub(r"//.*", "", ptx)
        assert "div.full" not in code and "div.approx" not in code, expression
        if expression.startswith("snnkern::lif_forward") and header == "lif.cuh":
            assert "fma." not in code and not re.search(r"\b(add|sub|mul)\.f32", code), expression


# --- how they are compiled and kept ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled kernels; the calls of the compiler since; and a call that wants one of them."""
    calls, compile = [], program.compile
    monkeypatch.setenv("SNNKERN_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(program, "compile", lambda *call: calls.append(call) or compile(*call))
    program._warn_once.cache_clear()
    return tmp_path / "kernels", calls, lambda: program.build("ttm.cuh", TTM, "compute_90")


TTM = "snnkern::ttm<snnkern::TTMVariant{.dtype = snnkern::DType(0), .width = 1}>"


def test_a_kernel_is_compiled_once(cache):
    folder, calls, build = cache
    image, name = build()
    assert build() == (image, name) and len(calls) == 1
    assert f".entry {name}(".encode() in image
    (path,) = folder.iterdir()
    for damaged in (path.read_bytes()[:-100], b"", b"another file\n" * 9, path.read_bytes().replace(b"add", b"sub")):
        calls.clear()
        path.write_bytes(damaged)
        again = build()  # NVRTC need not give the same bytes
        assert f".entry {again[1]}(".encode() in again[0] and len(calls) == 1
        assert build() == again and len(calls) == 1
    assert list(folder.iterdir()) == [path]


def test_what_a_kernel_is_made_of_names_its_file(cache, monkeypatch):
    _, calls, build = cache
    build()
    for change in ({"OPTIONS": (*program.OPTIONS, "-DNOTHING")}, {"_text": lambda: b"other sources"}):
        for name, value in change.items():
            monkeypatch.setattr(program, name, value)
        build()
    assert len(calls) == 3


def test_many_processes_at_once(cache):
    folder, _, build = cache
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        found = pool.map(_build, [str(folder)] * 8)
    assert build() in found and len(list(folder.iterdir())) == 1


def _build(folder):
    return program.build("ttm.cuh", TTM, "compute_90")


def test_a_folder_that_cannot_be_written_is_told_once(cache, tmp_path):
    folder, calls, build = cache
    folder.write_text("a file where the folder would be")
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept"):
        build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()
    assert len(calls) == 2


def test_a_folder_that_others_can_write_is_neither_read_nor_filled(cache, monkeypatch):
    folder, calls, build = cache
    monkeypatch.setattr(program, "compile", lambda *call: calls.append(call) or (b"image", "name"))
    build()
    (path,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    planted = f"planted {program._digest(b'code')}\n".encode() + b"code"
    path.write_bytes(planted)
    assert build() == (b"code", "planted") and len(calls) == 1  # a whole file is believed
    for mode in (0o722, 0o770, 0o700):
        folder.chmod(mode)
        if mode == 0o700:  # of another user, who is not root
            os.chown(folder, 1, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 1)
        program._warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="other users can write to .*kernels: empty it and `chmod go-w` it"):
            assert build() == (b"image", "name")
    assert path.read_bytes() == planted and len(calls) == 4


def test_a_device_newer_than_the_compiler_gets_ptx(cache):
    image, name = program.compile("ttm.cuh", TTM, "sm_999")
    assert f".entry {name}(".encode() in image
    assert program.compile("ttm.cuh", TTM, "sm_90")[0].startswith(b"\x7fELF")


def test_what_is_on_disk_needs_no_compiler(cache, monkeypatch):
    _, calls, build = cache
    made = build()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert build() == made and len(calls) == 1


def test_what_does_not_compile_says_why(cache):
    folder, _, _ = cache
    with pytest.raises(RuntimeError, match=r"(?s)snnkern::ttm<7> does not compile for compute_90: .*error"):
        program.build("ttm.cuh", "snnkern::ttm<7>", "compute_90")
    assert not folder.exists()


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch):
    x = draw((5, 3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for cached in (program._kernel, sys.modules["snnkern.backend.cuda.ttm"]._launch):
        cached.cache_clear()
    with pytest.raises(RuntimeError, match=r"snnkern::ttm<.*> is not loaded yet.*make the same call once before"):
        snnkern.ttm(x, 4, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_launch_says_so():
    image, name = program.build("ttm.cuh", TTM, "sm_90")
    with pytest.raises(RuntimeError, match="NVIDIA driver cannot be loaded"):
        _C.CudaKernel(image, name, 0)
