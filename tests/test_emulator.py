"""The device of ``emulator`` itself: it notices what a kernel must not do, and its numbers are a GPU's."""

import math
from fractions import Fraction

import emulator
import pytest
import torch
from conftest import EMULATED, needs_emulator

if EMULATED:
    from snnkern.backend.cuda import program

pytestmark = needs_emulator

KERNELS = r"""
enum class What { nothing, outside, before, misaligned, unwritten, unwritten_shared, outside_shared, no_barrier,
                  too_late, some_at_barrier, two_write, same_written, read_of_other, constant, absent };
struct Tensors { const float* x; float* y; const float* fresh; };

// y[i] = x[63 - i], through shared memory, and what else is asked for.
template <What kWhat>
__global__ void __launch_bounds__(64) mirror(int n, Tensors t) {
  __shared__ __align__(16) float s[64];
  const int i = threadIdx.x;
  if (kWhat != What::unwritten_shared || i != 5) s[i] = t.x[i];
  if (kWhat == What::some_at_barrier && i >= 32) return;
  if (kWhat != What::no_barrier) __syncthreads();
  float found = s[n - 1 - i + (kWhat == What::outside_shared)];
  if (kWhat == What::too_late) s[i] = 0.0f;
  if (kWhat == What::unwritten) found += t.fresh[i];
  if (kWhat == What::two_write) t.y[i / 2] = float(i);
  if (kWhat == What::same_written) t.y[n - 1] = s[0];
  t.y[kWhat == What::outside ? i + 1 : kWhat == What::before ? i - 1 : i] = found;
  if (kWhat == What::read_of_other) t.y[i] += t.y[i ^ 1];
  if (kWhat == What::constant) t.y[i] = __ldg(t.y + i);
  if (kWhat == What::misaligned) *reinterpret_cast<float4*>(t.y + i % 60) = float4{};
  if (kWhat == What::absent && (i & 1)) t.y[i] = __shfl_sync(~0u, found, 0);
}

struct Numbers {
  const float* x;
  float *product, *quotient, *sum, *down, *root, *fused, *total;
  unsigned short *half, *bfloat;
  double* wide;
  int* positive;
};

__global__ void numbers(Numbers t) {
  const int i = threadIdx.x;
  const float x = t.x[i], y = t.x[i ^ 1];
  t.product[i] = __fmul_rn(x, y);
  t.quotient[i] = __fdiv_rn(x, y);
  t.sum[i] = __fadd_rn(x, y);
  t.down[i] = __fadd_rd(x, y);
  t.root[i] = __fsqrt_rn(fabsf(x));
  t.fused[i] = __fmaf_rn(x, y, x);
  t.wide[i] = double(x) / 3.0;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(t.half[i]) : "f"(x));
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(t.bfloat[i]) : "f"(x));
  float total = x;
  for (int by = 16; by; by /= 2) total += __shfl_xor_sync(~0u, total, by);
  t.total[i] = total;
  t.positive[i] = __popc(__ballot_sync(~0u, x > 0.0f));
}
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Compiles and runs a kernel of the text above: launch(name, threads, constants, tensors)."""
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "kernels.cuh").write_text(KERNELS)
    monkeypatch.setattr(program, "sources", lambda: tmp_path)

    def launched(name, threads, constants, *tensors):
        kernel = emulator.Kernel(*program.compile("kernels.cuh", name, "compute_90"))
        emulator.Launch(kernel, 1, 1, threads, 0, constants)(0, *(t.data_ptr() for t in tensors))

    return launched


def mirror(launch, what, threads=64, n=64):
    x, memory, fresh = torch.arange(64.0), torch.zeros(80), torch.empty(64)
    y = memory[8:72]
    launch(f"mirror<What::{what}>", threads, [n.to_bytes(4, "little")], x, y, fresh)
    return x, y, memory


@pytest.mark.parametrize("what", ["nothing", "same_written"])
def test_nothing_is_found_where_nothing_is(launch, what):
    x, y, memory = mirror(launch, what)
    assert torch.equal(y[:-1], x.flip(0)[:-1]) and not memory[:8].any() and not memory[72:].any()


@pytest.mark.parametrize(
    "what, said",
    {
        "outside": "out of bounds: st.global",
        "before": "out of bounds: st.global",
        "misaligned": "misaligned: st.global.v4",
        "unwritten": "read of memory that nobody wrote: ld.global",
        "unwritten_shared": "read of memory that nobody wrote: ld.shared",
        "outside_shared": "out of bounds: ld.shared",
        "no_barrier": "race: read after write: ld.shared",
        "too_late": "race: write after read: st.shared",
        "some_at_barrier": "not all threads of the block come to this barrier",
        "two_write": "race: two threads write: st.global",
        "read_of_other": "race: read after write: ld.global",
        "constant": "read as constant of memory that is written: ld.global.nc",
    }.items(),
)
def test_a_fault_is_found_and_named(launch, what, said):
    with pytest.raises(emulator.Fault, match=said):
        mirror(launch, what)


def test_threads_that_nobody_can_wait_for(launch):
    with pytest.raises(RuntimeError, match=r"wait for others of their warp, which never come, at shfl"):
        mirror(launch, "absent")


def test_a_launch_beyond_what_a_device_takes_is_refused(launch):
    with pytest.raises(ValueError, match="its most are 64"):
        mirror(launch, "nothing", threads=65)
    with pytest.raises(ValueError, match="takes 2 arguments, not 1"):
        launch("mirror<What::nothing>", 64, [], torch.zeros(64))
    with pytest.raises(ValueError, match="argument 1 has 32 bytes, the kernel wants 24"):
        launch("mirror<What::nothing>", 64, [bytes(4)], *torch.zeros(4, 64))
    with pytest.raises(ValueError, match="argument 0 has 8 bytes, the kernel wants 4"):
        mirror(lambda name, threads, constants, *tensors: launch(name, threads, [bytes(8)], *tensors), "nothing")


def test_an_unknown_instruction_is_refused(launch, monkeypatch):
    compile = program.compile
    monkeypatch.setattr(program, "compile", lambda *a: [made.replace(b"add.", b"addc.") if k == 0 else made
                                                        for k, made in enumerate(compile(*a))])  # fmt: skip
    with pytest.raises(ValueError, match="the emulator does not have addc"):
        mirror(launch, "nothing")


def test_numbers_are_those_of_a_gpu(launch):
    """Against PyTorch: numbers of everyday size, bits at random, and the edges of halves."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (512,), generator=generator).int().view(torch.float32)
    edges = [0.0, -0.0, math.inf, 65504.0, 65519.9, 65520.0, 6e-8, 2.98e-8, 2.99e-8, 1e-40, 3.3895e38, 1.0009765625]
    for x in torch.cat([torch.randn(500, generator=generator), bits, torch.tensor(edges)]).view(-1, 64):
        y, exact = x.view(-1, 2).flip(1).reshape(-1), x.double()
        nearest = x + y
        above = [math.isfinite(a + b) and (s == math.inf or s > Fraction(a) + Fraction(b))
                 for a, b, s in zip(x.tolist(), y.tolist(), nearest.tolist(), strict=True)]  # fmt: skip
        down = torch.where(torch.tensor(above), nearest.nextafter(torch.tensor(-math.inf)), nearest)
        wanted = [x * y, x / y, nearest, down, exact.abs().sqrt().float(), (exact * y.double() + exact).float()]
        dtypes = [*[torch.float32] * 7, torch.float16, torch.bfloat16, torch.float64, torch.int32]
        *floats, total, half, bfloat, wide, positive = got = [torch.empty(64, dtype=dtype) for dtype in dtypes]
        launch("numbers", 64, [], x, *got)
        for g, w in zip([*floats, half, bfloat, wide], [*wanted, x.half(), x.bfloat16(), exact / 3], strict=True):
            assert torch.equal(g.isnan(), w.isnan()) and torch.equal(g[~g.isnan()], w[~w.isnan()])
        for warp in (0, 32):
            assert torch.allclose(total[warp : warp + 32], x[warp : warp + 32].sum(), equal_nan=True, atol=1e-5)
            assert (positive[warp : warp + 32] == (x[warp : warp + 32] > 0).sum()).all()
