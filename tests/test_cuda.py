"""The CUDA kernels without a GPU: what the compiler made of them, and their threads run one by one on the host.

On a machine with a GPU ``test_lif.py`` runs the kernels themselves.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_lif import FORMS, RESETS, SURROGATES, check, draw, state_of
from test_split import ADVERSARIES

import snnkern
from snnkern.backend import reference
from snnkern.ops import lif as ops
from snnkern.ops.pack import pack
from snnkern.ops.split import CHUNK, for_gpu, warmup
from snnkern.surrogate import ATan

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.usefixtures("poison"),
]
CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ["sm_80", "sm_90"]
WIDTHS = [("float", 1), ("float", 4), ("__half", 1), ("__half", 8), ("__nv_bfloat16", 1), ("__nv_bfloat16", 8)]
KERNELS = {f"lif_forward_kernel<{io}, {vec}>" for io, vec in WIDTHS}
KERNELS |= {f"lif_repair_kernel<{io}>" for io, vec in WIDTHS if vec == 1}
KERNELS |= {f"lif_backward_kernel<{io}, {vec}, false>" for io, vec in WIDTHS}
KERNELS |= {f"lif_backward_kernel<{io}, {vec}, true>" for io, vec in WIDTHS if vec == 1}  # maps of segments


def cuobjdump():
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton, which carries one, is installed")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def demangle(text):
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """The compiler's resource report and the machine code, by kernel."""
    cubin = tmp_path_factory.mktemp("cubin") / "lif.cubin"
    command = ["nvcc", "-cubin", "-O3", "--fmad=false", "-std=c++17", f"-arch={request.param}", "-Xptxas=-v"]
    report = subprocess.run([*command, CSRC / "cuda/lif.cu", "-o", cubin], capture_output=True, text=True, check=True)
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True)
    return _by_kernel(demangle(report.stderr), "Compiling entry function"), _by_kernel(
        demangle(sass.stdout), "Function :"
    )


def _by_kernel(text, marker):
    parts = {}
    for part in text.split(marker)[1:]:
        name = re.search(r"lif_\w+_kernel<[^>]*>", part)[0]
        parts[re.sub(r"\((int|bool)\)", "", name).replace(", 0>", ", false>")] = part
    return parts


def test_every_kernel_is_compiled(compiled):
    for parts in compiled:
        assert parts.keys() == KERNELS


def test_nothing_spills(compiled):
    report, sass = compiled
    for name, text in report.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, name
        assert not re.search(r"\b(LDL|STL)\b", sass[name]), name


def test_registers_leave_room_for_several_blocks(compiled):
    for name, text in compiled[0].items():
        registers, budget = int(re.search(r"Used (\d+) registers", text)[1]), 136 if "backward" in name else 104
        assert registers <= budget, f"{name}: {registers} registers"


def test_wide_kernels_move_16_bytes_at_a_time(compiled):
    for name, text in compiled[1].items():
        wide = ", 4" in name or ", 8" in name
        assert bool(re.search(r"LDG\.E\.128", text)) == wide, name
        assert bool(re.search(r"STG\.E\.128", text)) == wide, name


def test_nothing_is_contracted_and_division_is_exact(tmp_path):
    flags = (CSRC.parent / "CMakeLists.txt").read_text()
    assert "--fmad=false" in flags and "-ffp-contract=off" in flags and "fast" not in flags
    command = ["nvcc", "-ptx", "-O3", "--fmad=false", "-std=c++17", "-arch=sm_80", CSRC / "cuda/lif.cu"]
    subprocess.run([*command, "-o", tmp_path / "lif.ptx"], check=True, capture_output=True)
    kernels = [part for part in (tmp_path / "lif.ptx").read_text().split(".entry") if "lif_forward_kernel" in part]
    assert len(kernels) == 6
    for ptx in kernels:
        assert "fma." not in ptx and "mul.rn.f32" in ptx and "add.rn.f32" in ptx
        assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx


class OnHost:
    """A backend made of the CUDA source, its threads run by the processor."""

    differentiable = False

    def __init__(self, library, wide):
        self.library, self.wide = library, wide

    def lif_forward(self, spec, layout, *tensors):
        self._call(self.library.lif_forward_host, spec, layout, tensors, warmup(spec.state_gain, torch.float32))

    def lif_backward(self, spec, layout, *tensors):
        self._call(self.library.lif_backward_host, spec, layout, tensors, 0)

    def _call(self, function, spec, layout, tensors, warm):
        from snnkern import _C

        x = tensors[0]
        time = for_gpu(layout.steps, layout.outer * layout.inner, 132, 4 * CHUNK, warm)
        tensors = [*tensors, time.scratch(layout, torch.float32, x.device)]
        surrogate = _C.surrogates[type(spec.surrogate).__name__]
        flags = [
            ops.FORMS.index(spec.form),
            spec.fire_at_threshold,
            spec.reset is not None,
            spec.detach_reset,
            surrogate,
        ]
        numbers = [spec.leak, spec.threshold, spec.rest, spec.v_start, *spec.surrogate.constants()]
        sizes = [ops.DTYPES.index(x.dtype), *layout[1:], *time]
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        vec = 16 // x.element_size()
        strides = (layout.inner, layout.x_outer_stride, layout.x_step_stride)
        wide = (
            self.wide
            and time.segments == 1
            and all(n % vec == 0 for n in strides)
            and all(p is None or p % 16 == 0 for p in pointers)
        )
        function(
            (ctypes.c_int * 5)(*map(int, flags)),
            (ctypes.c_double * 7)(*numbers),
            (ctypes.c_int64 * 9)(*sizes),
            (ctypes.c_void_p * len(pointers))(*pointers),
            int(wide),
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "lif.so"
    command = ["nvcc", "-shared", "-O1", "--fmad=false", "-std=c++17", "-gencode=arch=compute_80,code=compute_80"]
    flags = ["-Xcompiler=-fPIC,-ffp-contract=off", "-cudart=static", Path(__file__).parent / "cuda_on_host.cu"]
    subprocess.run([*command, *flags, "-o", target], check=True, capture_output=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=["wide", "narrow"])
def on_host(library, request, monkeypatch):
    """Makes ``backend="cuda"`` mean the CUDA source on the host; yields that name."""
    kernels, choose = OnHost(library, request.param == "wide"), ops.choose

    def choice(device_type, dtype, backend=None):
        return kernels if backend == "cuda" else choose(device_type, dtype, backend)

    monkeypatch.setattr(ops, "choose", choice)
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
@pytest.mark.parametrize("inner", [1, 5, 16, 40])
@pytest.mark.parametrize(("steps_in", "steps_out"), [(6, 4), (5, 2), (3, 5), (4, 6), (7, 1), (1, 7)])
def test_ttm_on_the_host(library, steps_in, steps_out, inner, dtype):
    x = draw((3, steps_in, inner + 8), dtype)[..., :inner]  # 16-byte rows for some
    y = torch.empty(3, steps_out, inner, dtype=dtype)
    sizes = [ops.DTYPES.index(dtype), *ops.layout_of(x, 1)[1:], steps_out]
    library.ttm_host((ctypes.c_int64 * 7)(*sizes), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    assert torch.equal(y, snnkern.ttm(x, steps_out, time_dim=1, backend="reference"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ttm_moves_16_bytes_at_a_time_and_spills_nothing(tmp_path, architecture):
    command = ["nvcc", "-cubin", "-O3", "--fmad=false", "-std=c++17", f"-arch={architecture}", CSRC / "cuda/ttm.cu"]
    subprocess.run([*command, "-o", tmp_path / "ttm.cubin"], check=True)
    sass = subprocess.run([cuobjdump(), "-sass", tmp_path / "ttm.cubin"], capture_output=True, text=True, check=True)
    kernels = demangle(sass.stdout).split("Function :")[1:]
    assert len(kernels) == 6 and not re.search(r"\b(LDL|STL)\b", sass.stdout)
    for kernel in kernels:
        wide = not re.search(r"ttm_kernel<\w+, (\(int\))?1>", kernel)
        assert bool(re.search(r"LDG\.E\.128", kernel)) == bool(re.search(r"STG\.E\.128", kernel)) == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])  # at 16 bytes and not
@pytest.mark.parametrize("n", [1, 7, 8, 9, 5003, 8192])
def test_packing_on_the_host(library, n, offset, dtype):
    memory = (draw((n + offset,)) > 0.5).to(dtype)
    x, bits, other = memory[offset:], torch.empty(-(-n // 8), dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)

    def call(function, *tensors):
        pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
        function(ops.DTYPES.index(dtype), ctypes.c_int64(n), *pointers)

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
