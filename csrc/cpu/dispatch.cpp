// Picks the best copy of the CPU kernels that this processor can run, and decides when outputs bypass the cache.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace snnkern {
namespace {

struct Kernels {
  const char* isa;
  decltype(&baseline::lif_forward) lif_forward;
  decltype(&baseline::lif_backward) lif_backward;
};

// SNNKERN_ISA lowers the choice, for tests; it cannot raise it above what the processor has.
const Kernels& kernels() {
  static const Kernels chosen = [] {
#ifdef SNN_X86
    const char* wanted = std::getenv("SNNKERN_ISA");
    const auto allows = [&](const char* isa) { return !wanted || std::strcmp(wanted, isa) == 0; };
    __builtin_cpu_init();
    if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Kernels{"avx512", avx512::lif_forward, avx512::lif_backward};
    if (allows("avx2") && __builtin_cpu_supports("avx2")) return Kernels{"avx2", avx2::lif_forward, avx2::lif_backward};
#endif
    return Kernels{"baseline", baseline::lif_forward, baseline::lif_backward};
  }();
  return chosen;
}

// An output larger than the cache that its threads can count on would be evicted before anyone reads it: stream it.
// What the system reports as last-level cache may be shared with many other cores, so a modest constant stands for it.
bool outgrows_cache(const LIFShape& s, int threads) {
  constexpr int64_t cache_per_thread = int64_t(4) << 20;
  const int64_t width = s.dtype == DType::f64 ? 8 : s.dtype == DType::f32 ? 4 : 2;
  return width * s.outer * s.steps * s.inner > cache_per_thread * threads;
}

}  // namespace

const char* cpu_isa() { return kernels().isa; }

void lif_forward_cpu(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads) {
  kernels().lif_forward(p, s, a, threads, outgrows_cache(s, threads));
}
void lif_backward_cpu(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads) {
  kernels().lif_backward(p, s, a, threads, outgrows_cache(s, threads));
}

}  // namespace snnkern
