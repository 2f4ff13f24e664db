"""The CUDA kernels without a GPU: what the compiler made of them, and their threads run one by one on the host.

On a machine with a GPU ``test_lif.py`` runs the kernels themselves.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bn_lif import check as check_norm
from test_bn_lif import norm_of
from test_bn_lif import run as run_norm
from test_lif import FORMS, RESETS, SURROGATES, check, draw, state_of
from test_split import ADVERSARIES

import snnkern
from snnkern.backend import reference
from snnkern.ops import lif as ops
from snnkern.ops.pack import pack
from snnkern.spec.layout import DTYPES, arrange
from snnkern.spec.neuron import FORMS as LEAKS
from snnkern.spec.neuron import Backward, Forward, make_spec
from snnkern.spec.norm import Norm, Parameters, Plan
from snnkern.spec.split import CHUNK, Split, for_gpu, warmup
from snnkern.surrogate import ATan

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.usefixtures("poison"),
]
CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ["sm_80", "sm_90"]
TYPES = {"float": 4, "__half": 8, "__nv_bfloat16": 8}  # and neurons in 16 bytes
# Neurons a thread, and channels a thread has parameters of: without a norm 0, with one 1 or as many as neurons.
PLAIN = [(io, vec, 0) for io, full in TYPES.items() for vec in (1, full)]
FORWARD = PLAIN + [(io, *widths) for io, full in TYPES.items() for widths in ((1, 1), (full, 1), (full, full))]
BACKWARD = [(io, *widths) for io in TYPES for widths in ((1, 1), (4, 1), (4, 4))]
KERNELS = {
    "lif": {f"lif_forward_kernel<{io}, {vec}, {lanes}>" for io, vec, lanes in FORWARD}
    | {f"lif_repair_kernel<{io}>" for io in TYPES}
    | {f"lif_backward_kernel<{io}, {vec}, {lanes}, false>" for io, vec, lanes in PLAIN + BACKWARD}
    | {f"lif_backward_kernel<{io}, 1, 0, true>" for io in TYPES}  # maps of segments
    | {f"lif_sums_kernel<{io}, {vec}, {lanes}>" for io, vec, lanes in BACKWARD},
    "norm": {f"moments_kernel<{io}, {vec}, {lanes}>" for io, vec, lanes in FORWARD if lanes > 0}
    | {"prepare_kernel", "gradients_kernel"},
    "ttm": {f"ttm_kernel<{io}, {vec}>" for io, vec, _ in PLAIN},
}
# Registers: 64 K of them make room for this many threads in a multiprocessor.
THREADS = {"forward": 512, "repair": 512, "backward": 384, "sums": 320, "moments": 512, "prepare": 1024}
THREADS |= {"gradients": 1024, "ttm": 1024}


def cuobjdump():
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton, which carries one, is installed")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def demangle(text):
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=[(name, target) for name in KERNELS for target in ARCHITECTURES], ids="-".join)
def compiled(request, tmp_path_factory):
    """The source's name, and by kernel: the compiler's resource report, the machine code and what it was made of."""
    name, target = request.param
    folder = tmp_path_factory.mktemp("cubin")
    command = ["nvcc", "-cubin", "-O3", "--fmad=false", "-std=c++17", f"-arch={target}", "-Xptxas=-v"]
    command += ["--keep", "--keep-dir", folder, CSRC / f"cuda/{name}.cu", "-o", folder / "kernels.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    sass = subprocess.run([cuobjdump(), "-sass", folder / "kernels.cubin"], capture_output=True, text=True, check=True)
    marked = (
        (report, "Compiling entry function"),
        (sass.stdout, "Function :"),
        (next(folder.glob("*.ptx")).read_text(), ".entry"),
    )
    return name, *(_by_kernel(demangle(text), marker) for text, marker in marked)


def _by_kernel(text, marker):
    parts = {}
    for part in text.split(marker)[1:]:
        name = re.search(r"\w+_kernel(<[^>]*>)?", part)[0]
        name = re.sub(r"\((int|bool)\)", "", name)
        if "backward" in name:
            name = name.replace(", 0>", ", false>").replace(", 1>", ", true>")
        parts[name] = part
    return parts


def test_every_kernel_is_compiled(compiled):
    name, *found = compiled
    for parts in found:
        assert parts.keys() == KERNELS[name]


def test_nothing_spills(compiled):
    _, report, sass, _ = compiled
    for name, text in report.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, name
        assert not re.search(r"\b(LDL|STL)\b", sass[name]), name


def test_registers_leave_room_for_several_blocks(compiled):
    for name, text in compiled[1].items():
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        threads = THREADS[re.search(r"(\w+?)_kernel", name)[1].removeprefix("lif_")]
        if name.startswith("lif_forward_kernel") and name.endswith(", 8, 8>"):
            threads = 384  # three numbers for each of 8 channels
        assert (registers + 7) // 8 * 8 * threads <= 1 << 16, f"{name}: {registers} registers"


def test_wide_kernels_move_16_bytes_at_a_time(compiled):
    """8 bytes where the backward of a norm takes 4 16-bit numbers."""
    source, _, sass, _ = compiled
    for name, text in sass.items():
        found = re.search(r"<(\w+), (\d)", name)
        if not found:
            continue
        bits = int(found[2]) * 128 // TYPES[found[1]]
        x = rf"LDG\.E\.{bits}" if bits > 32 else r"LDG\.E"
        assert re.search(x, text), name
        assert bool(re.search(r"LDG\.E\.128", text)) == (int(found[2]) > 1), name
        if "sums" not in name and source != "norm":
            assert bool(re.search(rf"STG\.E\.{max(bits, 64)}", text)) == (int(found[2]) > 1), name


def test_nothing_is_contracted_and_division_is_exact(compiled):
    flags = (CSRC.parent / "CMakeLists.txt").read_text()
    assert "--fmad=false" in flags and "-ffp-contract=off" in flags and "fast" not in flags
    for name, ptx in compiled[3].items():
        assert "div.full" not in ptx and "div.approx" not in ptx, name
        if "lif_forward_kernel" in name:
            assert "fma." not in ptx and "mul.rn.f32" in ptx and "add.rn.f32" in ptx and "div.rn.f32" in ptx, name


class OnHost:
    """A backend made of the CUDA source, its threads run by the processor."""

    differentiable = False

    def __init__(self, library, wide):
        self.library, self.wide = library, int(wide)

    def lif_forward(self, spec, layout, call):
        *tensors, norm = call
        split = self._split(layout, norm, warmup(spec.state_gain, torch.float32))
        tensors = *tensors, split.scratch(layout, torch.float32, call.x.device)
        self._call("lif_forward_host", spec, layout, split, norm, call.x, *tensors, *_table(norm))

    def lif_backward(self, spec, layout, call):
        *tensors, norm, pull_push, grad_residual = call
        split = self._split(layout, norm, 0)
        tensors = *tensors, split.scratch(layout, torch.float32, call.x.device), *_table(norm)
        self._call("lif_backward_host", spec, layout, split, norm, call.x, *tensors, pull_push, grad_residual)

    def bn_moments(self, layout, norm, y):
        sizes = _sizes(layout, Split(1, layout.steps, 0), norm, y)
        moments = torch.empty((2 * self.library.parts_host(sizes) + 1, norm.channels), dtype=torch.float64)
        self.library.moments_host(sizes, *_pointers(y, moments), self.wide)
        return moments

    def bn_prepare(self, plan, moments, parameters, table):
        pointers = _array(ctypes.c_void_p, _pointers(moments, *parameters, table))
        self.library.prepare_host(*_plan(plan, moments, table), pointers)

    def bn_sums(self, spec, layout, call):
        y, norm, split = call.x, call.norm, Split(1, layout.steps, 0)
        parts = self.library.parts_host(_sizes(layout, split, norm, y))
        sums = torch.empty((2 * parts, norm.channels), dtype=torch.float64)
        self._call("sums_host", spec, layout, split, norm, y, *call[:5], sums, *_table(norm))
        return sums

    def bn_gradients(self, plan, table, sums, all_sums, affine, pull_push):
        pointers = _array(ctypes.c_void_p, _pointers(table, sums, all_sums, affine, pull_push))
        self.library.gradients_host(*_plan(plan, sums, table), pointers)

    @staticmethod
    def _split(layout, norm, warm):
        if norm is not None or layout.steps_out < layout.steps:
            return Split(1, layout.steps, 0)
        return for_gpu(layout.steps, layout.outer * layout.inner, 132, 4 * CHUNK, warm)

    def _call(self, function, spec, layout, split, norm, x, *tensors):
        from snnkern import _C

        surrogate = _C.surrogates[type(spec.surrogate).__name__]
        form, hard = LEAKS.index(spec.form), spec.reset is not None
        flags = [form, spec.fire_at_threshold, hard, spec.detach_reset, surrogate]
        numbers = [spec.leak, spec.threshold, spec.rest, spec.v_start, *spec.surrogate.constants()]
        pointers = _array(ctypes.c_void_p, _pointers(*tensors))
        neuron = _array(ctypes.c_int, map(int, flags)), _array(ctypes.c_double, numbers)
        getattr(self.library, function)(*neuron, _sizes(layout, split, norm, x), pointers, self.wide)


def _array(kind, numbers):
    numbers = list(numbers)
    return (kind * len(numbers))(*numbers)


def _pointers(*tensors):
    return [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors]


def _table(norm):
    return (None, None) if norm is None else (norm.table, norm.residual)


def _sizes(layout, split, norm, x):
    channels = (1, 1) if norm is None else norm[:2]
    return _array(ctypes.c_int64, [DTYPES.index(x.dtype), *layout[1:], *split, *channels])


def _plan(plan, sums, table):
    parts = 0 if sums is None else len(sums) // 2
    return _array(ctypes.c_int64, [table.shape[1], parts]), _array(ctypes.c_double, plan)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "lif.so"
    command = ["nvcc", "-shared", "-O1", "--fmad=false", "-std=c++17", "-gencode=arch=compute_80,code=compute_80"]
    flags = ["-Xcompiler=-fPIC,-ffp-contract=off", "-cudart=static", Path(__file__).parent / "cuda_on_host.cu"]
    subprocess.run([*command, *flags, "-o", target], check=True, capture_output=True)
    found = ctypes.CDLL(str(target))
    found.parts_host.restype = ctypes.c_int64
    return found


@pytest.fixture(params=["wide", "narrow"])
def on_host(library, request, monkeypatch):
    """Makes ``backend="cuda"`` mean the CUDA source on the host; yields that name."""
    kernels, choose = OnHost(library, request.param == "wide"), ops.choose

    def choice(device_type, dtype, backend=None):
        return kernels if backend == "cuda" else choose(device_type, dtype, backend)

    for op in ("lif", "bn_lif"):
        monkeypatch.setattr(f"snnkern.ops.{op}.choose", choice)
    return "cuda"


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_threads_on_the_host_match_the_reference(on_host, form, reset, detach_reset):
    x = draw((37, 3, 8))
    v, options = state_of(x), {"reset": reset, "detach_reset": detach_reset, **form}
    check(x, v, on_host, draw(x.shape, seed=2), state_of(x, seed=3), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_every_surrogate_on_the_host(on_host, surrogate, dtype):
    x = draw((18, 72), dtype)
    check(x, None, on_host, draw(x.shape, dtype, seed=2), surrogate=surrogate, fire_at_threshold=True)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 15, 16, 17, 20, 32, 33])
@pytest.mark.parametrize("shape", [(8,), (5,), (3, 16)], ids=str)
def test_every_tail_on_the_host(on_host, steps, shape):
    x = draw((steps, *shape))
    check(x, state_of(x), on_host, draw(x.shape, seed=2), state_of(x, seed=3))
    check(x, None, on_host, grad_v=state_of(x, seed=3))


@pytest.mark.parametrize("time_dim", [0, 1, 2])
def test_outer_and_inner_dimensions_on_the_host(on_host, time_dim):
    x = draw((6, 18, 8))
    check(x, None, on_host, draw(x.shape, seed=2), time_dim=time_dim)
    x = draw((12, 18, 16))[3:9, :, :8]
    check(x, None, on_host, draw(x.shape, seed=2), time_dim=time_dim)


@pytest.mark.parametrize("warm", [0, 16, 64])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_segments_on_the_host_match_the_reference(on_host, force, adversary, warm):
    make, options = ADVERSARIES[adversary]
    x = make((150, 16))
    launches = force(48, warm)
    for dtype in (torch.float32, torch.bfloat16):
        x = x.to(dtype)
        v, grad = state_of(x), draw(x.shape, dtype, seed=2)
        check(x, v, on_host, grad, state_of(x, seed=3), **{"surrogate": ATan(), **options})
        check(x, None, on_host, None, state_of(x, seed=3), **options)
    assert {time.segments for time in launches} == {4}


def test_segments_of_outer_dimensions_on_the_host(on_host, force):
    force(16, 0)
    x = draw((3, 70, 8))
    check(x, None, on_host, draw(x.shape, seed=2), time_dim=1)
    spikes, v = ops.lif(x, time_dim=1, backend=on_host)
    wanted, v_wanted = ops.lif(x, time_dim=1, backend="reference")
    assert torch.equal(spikes, wanted) and torch.equal(v, v_wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps, steps_out", [(5, 2), (16, 4), (17, 16), (33, 1), (40, 9)])
@pytest.mark.parametrize("shape", [(8,), (5,), (3, 16)], ids=str)
def test_groups_of_steps_on_the_host(on_host, shape, steps, steps_out, dtype):
    x = draw((steps, *shape), dtype)
    v, grad_v = state_of(x), state_of(x, seed=3)
    check(x, v, on_host, draw((steps_out, *shape), dtype, seed=2), grad_v, steps_out=steps_out, surrogate=ATan())
    x = draw((3, steps, *shape), dtype)
    check(x, None, on_host, draw((3, steps_out, *shape), dtype, seed=2), time_dim=1, steps_out=steps_out, reset=None)


def channels_last(y):
    return y.movedim(2, -1).contiguous().movedim(-1, 2)


# Periods that are 1, a power of two below and above a thread's neurons and a band, and odd; channels that make several
# bands, a last one that is narrower; packs that lie in two channels, and in the last one and the first.
IMAGES = [(4, 3, 16, 1, 1), (2, 5, 7, 1, 1), (3, 2, 200, 1, 1), (2, 3, 5, 2, 2), (2, 3, 72, 2, 2), (2, 2, 12, 4, 4)]
IMAGES += [
    (2, 3, 3, 7, 7),
    (2, 3, 16, 3, 3),
    (1, 5, 3, 8, 8),
    (2, 9, 3, 16, 16),
    (2, 1, 2, 5, 9),
    (2, 8, 3, 7, 7),
    (3, 8, 5, 1, 1),
]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_norms_of_every_layout_on_the_host(on_host, shape, dtype, last):
    y = draw(shape, dtype) + 0.5
    if last:
        y = channels_last(y)
    check_norm(y, on_host)
    residual = draw(shape, dtype, seed=7)
    check_norm(y, on_host, state_of(y), channels_last(residual) if last else residual, surrogate=ATan())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_norms_of_every_neuron_on_the_host(on_host, form, reset, training):
    y = draw((18, 2, 3, 16)) * 2 - 1
    check_norm(y, on_host, state_of(y), training=training, reset=reset, **form)


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("steps", [1, 4, 16, 17, 33])
def test_norms_over_all_of_time_on_the_host(on_host, steps, time_dim):
    y = draw((steps, 3, 8, 4, 4) if time_dim == 0 else (3, steps, 8, 4, 4))
    residual = draw(y.shape, seed=7)
    for steps_out in {steps, -(-steps // 3)}:
        check_norm(y, on_host, state_of(y, time_dim), residual, time_dim=time_dim, steps_out=steps_out)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_norms_of_a_repeated_frame_on_the_host(on_host, last):
    frame = draw((1, 3, 8, 4, 6))
    y = (channels_last(frame) if last else frame).expand(6, -1, -1, -1, -1)
    assert arrange(y, 0)[1].x_step_stride == 0
    check_norm(y, on_host)


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_norms_of_large_means_and_constants_on_the_host(on_host, value):
    y = draw((6, 4, 3, 48)) + torch.tensor([1e4, -3e3, 0.0])[:, None]
    y[:, :, 2] = value
    check_norm(y, on_host, surrogate=ATan())


@pytest.mark.parametrize("shape", [(5, 0, 3, 4), (5, 2, 3, 0), (5, 2, 0, 4), (0, 2, 3, 4)], ids=str)
def test_norms_of_nothing_on_the_host(on_host, shape):
    y = torch.empty(shape)
    weight, bias, mean, var = norm_of(y)
    spikes, v_last = snnkern.bn_lif(y, weight, bias, mean, var, training=False, backend=on_host)
    assert spikes.shape == shape and v_last.shape == shape[1:]


def test_parts_are_many_where_neurons_are_and_add_up_alike(library, on_host):
    y = draw((2, 16, 3, 24, 24)) + 3
    layout = arrange(y, 0)[1]
    parts = [
        library.parts_host(_sizes(layout, Split(1, 2, 0), Norm(channels, period), y))
        for channels, period in ((3, 24 * 24), (1, 1), (10**6, 1))
    ]
    assert parts == [36, 64, 1]
    grads = draw(y.shape, seed=2), None
    once, again = (run_norm(y, on_host, grads=grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once[3], again[3], strict=True))
    check_norm(y, on_host)
    check_norm(channels_last(y), on_host)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: other tests run the kernels")
def test_launchers_get_as_far_as_the_missing_device(monkeypatch):
    """Every argument finds its place in the extension, which then cannot launch."""
    from snnkern import _C
    from snnkern.backend import cuda

    if not hasattr(_C, "lif_forward_cuda"):
        pytest.skip("the extension was compiled without CUDA")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda.lif, "_processors", lambda device: 132)
    y = draw((5, 2, 4, 6))
    layout, spec = arrange(y, 0)[1], make_spec(None, 2.0, True, 1.0, 0.0, ATan(), False, False)
    table, sums = torch.zeros(5, 4), torch.zeros(2, 4, dtype=torch.float64)
    norm, plan, rows = Norm(4, 6, table, y), Plan(60, 1.0, 0.1, 1e-5, 1.0), table[:2]
    v = state_of(y)
    calls = {
        "lif_forward": (spec, layout, Forward(y, v, y, v, None)),
        "lif_backward": (spec, layout, Backward(y, v, None, y, v, y, v, norm, rows, y)),
        "bn_moments": (layout, norm, y),
        "bn_prepare": (plan, None, Parameters(rows[0], rows[1], table[2], table[3]), table),
        "bn_sums": (spec, layout, Backward(y, v, None, y, v, norm=norm)),
        "bn_gradients": (plan, table, sums, None, rows, rows),
    }
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match=rf"{name.removeprefix('bn_')}_cuda .*: .*(driver|device)"):
            getattr(cuda, name)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", [1, 5, 16, 40])
@pytest.mark.parametrize(("steps_in", "steps_out"), [(6, 4), (5, 2), (3, 5), (4, 6), (7, 1), (1, 7)])
def test_ttm_on_the_host(library, steps_in, steps_out, inner, dtype):
    x = draw((3, steps_in, inner + 8), dtype)[..., :inner]  # 16-byte rows for some
    y = torch.empty(3, steps_out, inner, dtype=dtype)
    sizes = [DTYPES.index(dtype), *arrange(x, 1, steps_out)[1][1:]]
    library.ttm_host((ctypes.c_int64 * 7)(*sizes), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    assert torch.equal(y, snnkern.ttm(x, steps_out, time_dim=1, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])  # at 16 bytes and not
@pytest.mark.parametrize("n", [1, 7, 8, 9, 5003, 8192])
def test_packing_on_the_host(library, n, offset, dtype):
    memory = (draw((n + offset,)) > 0.5).to(dtype)
    x, bits, other = memory[offset:], torch.empty(-(-n // 8), dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)

    def call(function, *tensors):
        pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
        function(DTYPES.index(dtype), ctypes.c_int64(n), *pointers)

    call(library.pack_host, x, bits, other)
    assert torch.equal(bits, pack(x, reference)) and other.item() == 0
    y = torch.full((n + offset,), 7, dtype=dtype)
    call(library.unpack_host, bits, y[offset:])
    assert torch.equal(y[offset:], x) and (y[:offset] == 7).all()
    for value in (-0.0, 0.5, 2.0, float("nan")):
        for at in (0, n // 2, n - 1):
            x[at] = value
            call(library.pack_host, x, bits, other)
            assert other.item() == 1
            other.zero_()
            call(library.pack_host, x, bits, None)
            assert torch.equal(bits, pack(x, reference, check=False))
            x[at] = 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_moves_16_bytes_at_a_time_and_spills_nothing(tmp_path, architecture):
    command = ["nvcc", "-cubin", "-O3", "--fmad=false", "-std=c++17", f"-arch={architecture}", CSRC / "cuda/pack.cu"]
    subprocess.run([*command, "-o", tmp_path / "pack.cubin"], check=True)
    sass = subprocess.run([cuobjdump(), "-sass", tmp_path / "pack.cubin"], capture_output=True, text=True, check=True)
    kernels = sass.stdout.split("Function :")[1:]
    assert len(kernels) == 4 and not re.search(r"\b(LDL|STL)\b", sass.stdout)
    for kernel in kernels:
        moves = "STG" if "unpack_kernel" in kernel.partition("\n")[0] else "LDG"
        assert re.search(rf"{moves}\.E\.128", kernel)
