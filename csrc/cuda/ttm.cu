// The temporal transformation on CUDA devices. A thread makes 16 bytes of a step of y, where alignment allows, as a sum
// of neighbouring steps of x; 16-bit numbers are summed in float and rounded once.
#include "../ttm.h"
#include "memory.cuh"

namespace snnkern {
namespace {

constexpr int kThreads = 256;

template <class IO, int kVec>
SNN_HD void ttm_thread(int64_t thread, const TTMShape& s, const IO* __restrict__ x, IO* __restrict__ y) {
  const int64_t per_row = s.inner / kVec, row = thread / per_row, at = thread % per_row * kVec;
  const int64_t outer = row / s.steps_out, j = row % s.steps_out;
  if (outer >= s.outer) return;
  const int64_t first = s.first(j), last = s.last(j);
  x += outer * s.x_outer_stride + at;
  const Pack<IO, kVec> step = read<IO, kVec>(x + first * s.x_step_stride);
  Pack<float, kVec> total;
#pragma unroll
  for (int e = 0; e < kVec; ++e) total.lane[e] = to_state(step.lane[e]);
#pragma unroll 4
  for (int64_t t = first + 1; t < last; ++t) {
    const Pack<IO, kVec> next = read<IO, kVec>(x + t * s.x_step_stride);
#pragma unroll
    for (int e = 0; e < kVec; ++e) total.lane[e] += to_state(next.lane[e]);
  }
  Pack<IO, kVec> out;
#pragma unroll
  for (int e = 0; e < kVec; ++e) out.lane[e] = from_state<IO>(total.lane[e]);
  write(y + row * s.inner + at, out);
}

template <class IO, int kVec>
__global__ void __launch_bounds__(kThreads) ttm_kernel(TTMShape s, const IO* __restrict__ x, IO* __restrict__ y) {
  ttm_thread<IO, kVec>(blockIdx.x * int64_t(kThreads) + threadIdx.x, s, x, y);
}

template <class IO>
bool wide(const TTMShape& s, const void* x, const void* y) {
  constexpr int vec = 16 / sizeof(IO);
  return s.inner % vec == 0 && s.x_outer_stride % vec == 0 && s.x_step_stride % vec == 0 && aligned(x, 16) &&
         aligned(y, 16);
}

unsigned blocks(const TTMShape& s, int vec) {
  return unsigned((s.outer * s.steps_out * (s.inner / vec) + kThreads - 1) / kThreads);
}

template <class IO, int kVec>
int launch(const TTMShape& s, const void* x, void* y, cudaStream_t stream) {
  ttm_kernel<IO, kVec><<<blocks(s, kVec), kThreads, 0, stream>>>(s, static_cast<const IO*>(x), static_cast<IO*>(y));
  return cudaGetLastError();
}

}  // namespace

int ttm_cuda(const TTMShape& s, const void* x, void* y, void* stream) {
  if (s.outer * s.inner == 0) return cudaSuccess;
  return with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const auto to = static_cast<cudaStream_t>(stream);
    return wide<IO>(s, x, y) ? launch<IO, 16 / sizeof(IO)>(s, x, y, to) : launch<IO, 1>(s, x, y, to);
  });
}

}  // namespace snnkern
