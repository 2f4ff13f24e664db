// Picks the best copy of the CPU kernels that this processor can run, and prepares the memory of large outputs.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace snnkern {
namespace {

struct Kernels {
  const char* isa;
  decltype(&baseline::lif_forward) lif_forward;
  decltype(&baseline::lif_backward) lif_backward;
  decltype(&baseline::recurrent_forward) recurrent_forward;
  decltype(&baseline::recurrent_backward) recurrent_backward;
  decltype(&baseline::recurrent_weight) recurrent_weight;
  decltype(&baseline::norm_parts) norm_parts;
  decltype(&baseline::moments) moments;
  decltype(&baseline::prepare) prepare;
  decltype(&baseline::sums) sums;
  decltype(&baseline::gradients) gradients;
  decltype(&baseline::norm_kept) norm_kept;
  decltype(&baseline::norm_backward) norm_backward;
  decltype(&baseline::ttm) ttm;
  decltype(&baseline::pack) pack;
  decltype(&baseline::unpack) unpack;
  decltype(&baseline::linear_count) linear_count;
  decltype(&baseline::linear_forward) linear_forward;
  decltype(&baseline::linear_backward) linear_backward;
};
#define SNN_KERNELS(isa)                                                                                               \
  Kernels {                                                                                                            \
    #isa, isa::lif_forward, isa::lif_backward, isa::recurrent_forward, isa::recurrent_backward, isa::recurrent_weight, \
        isa::norm_parts, isa::moments, isa::prepare, isa::sums, isa::gradients, isa::norm_kept, isa::norm_backward,    \
        isa::ttm, isa::pack, isa::unpack, isa::linear_count, isa::linear_forward, isa::linear_backward                 \
  }

// SNNKERN_ISA lowers the choice, for tests; it cannot raise it above what the processor has.
const Kernels& kernels() {
  static const Kernels chosen = [] {
#ifdef SNN_X86
    const char* wanted = std::getenv("SNNKERN_ISA");
    const auto allows = [&](const char* isa) { return !wanted || std::strcmp(wanted, isa) == 0; };
    __builtin_cpu_init();
    if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return SNN_KERNELS(avx512);
    if (allows("avx2") && __builtin_cpu_supports("avx2")) return SNN_KERNELS(avx2);
#endif
    return SNN_KERNELS(baseline);
  }();
  return chosen;
}

// Whether an output is to be streamed past the cache: if it is larger than what one can count on, it would be evicted
// before anyone reads it. What the system reports as last-level cache may be shared with many other cores, and not
// every thread may come to help, so a modest constant stands for it.
bool expect(void* output, DType dtype, int64_t numel) {
  constexpr int64_t cache = int64_t(2) << 20;
  const int64_t bytes = numel * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2);
#ifdef __linux__
  // A large output is fresh from the system, which maps it page by page as it is first written; with 4 KiB pages that
  // takes longer than the kernel. Huge pages, where a whole one fits, are a wish: nothing depends on it.
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(output) + page - 1) & ~(page - 1);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(output) + bytes) & ~(page - 1);
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  return bytes >= cache;
}

}  // namespace

const char* cpu_isa() { return kernels().isa; }

void lif_forward_cpu(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads) {
  if (a.more.v_seq) expect(a.more.v_seq, s.dtype == DType::f64 ? s.dtype : DType::f32, s.outer * s.steps * s.inner);
  kernels().lif_forward(p, s, a, threads, expect(a.spikes, s.dtype, s.outer * s.steps_out * s.inner));
}
void lif_backward_cpu(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads) {
  kernels().lif_backward(p, s, a, threads, expect(a.grad_x, s.dtype, s.outer * s.steps * s.inner));
}
void recurrent_forward_cpu(const LIFSpec& p, const LIFShape& s, const LIFForward& a, const Recurrence& r, int threads) {
  expect(a.spikes, s.dtype, s.outer * s.steps * s.inner);
  kernels().recurrent_forward(p, s, a, r, threads);
}
void recurrent_backward_cpu(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, const Recurrence& r,
                            int threads) {
  expect(a.grad_x, s.dtype, s.outer * s.steps * s.inner);
  kernels().recurrent_backward(p, s, a, r, threads);
}
void recurrent_weight_cpu(const LIFSpec& p, const LIFShape& s, const Recurrence& r, const void* grad_x, void* grad,
                          int threads) {
  kernels().recurrent_weight(p, s, r, grad_x, grad, threads);
}
int64_t norm_parts_cpu(const LIFShape& s) { return kernels().norm_parts(s); }
void moments_cpu(const LIFShape& s, const Norm& n, const void* x, double* moments, int threads) {
  kernels().moments(s, n, x, moments, threads);
}
void prepare_cpu(const NormPlan& p, const double* moments, const NormParameters& of, void* table) {
  kernels().prepare(p, moments, of, table);
}
void sums_cpu(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* sums, int threads) {
  kernels().sums(p, s, a, sums, threads);
}
void gradients_cpu(const NormPlan& p, const void* table, const double* sums, const double* all_sums, void* affine,
                   void* pull_push) {
  kernels().gradients(p, table, sums, all_sums, affine, pull_push);
}
int64_t norm_kept_cpu(const LIFShape& s, const Norm& n, int threads) { return kernels().norm_kept(s, n, threads); }
void norm_backward_cpu(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, const NormPlan& plan, double* sums,
                       void* affine, int threads) {
  const bool streaming = expect(a.grad_x, s.dtype, s.outer * s.steps * s.inner);
  kernels().norm_backward(p, s, a, plan, sums, affine, threads, streaming);
}
void ttm_cpu(const TTMShape& s, const void* x, void* y, int threads) {
  kernels().ttm(s, x, y, threads, expect(y, s.dtype, s.outer * s.steps_out * s.inner));
}
bool pack_cpu(DType dtype, int64_t n, const void* x, uint8_t* bits, int threads) {
  return kernels().pack(dtype, n, x, bits, threads);
}
void unpack_cpu(DType dtype, int64_t n, const uint8_t* bits, void* x, int threads) {
  kernels().unpack(dtype, n, bits, x, threads, expect(x, dtype, n));
}
int64_t linear_count_cpu(const LinearShape& s, const float* spikes, int64_t rows) {
  return kernels().linear_count(s, spikes, rows);
}
bool linear_forward_cpu(const LinearShape& s, const float* spikes, const float* weight_t, float* y, uint32_t* bits,
                        int threads) {
  const bool streaming = expect(y, DType::f32, s.rows * s.outputs);
  return kernels().linear_forward(s, spikes, weight_t, y, bits, threads, streaming);
}
void linear_backward_cpu(const LinearShape& s, const uint32_t* bits, const float* grad, float* sums, float* grad_t,
                         int threads) {
  kernels().linear_backward(s, bits, grad, sums, grad_t, threads);
}

}  // namespace snnkern
