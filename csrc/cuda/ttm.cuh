// The temporal transformation on CUDA devices. A thread makes kWidth neighbouring numbers of a step of y, as a sum of
// neighbouring steps of x; 16-bit numbers are summed in float and rounded once.
#pragma once
#include "../ttm.h"
#include "memory.cuh"

namespace snnkern {

struct TTMVariant {  // what the kernel is compiled for; as in snnkern/backend/cuda/ttm.py
  DType dtype;
  int width;
};
constexpr int kTTMThreads = 256;

struct TTMTensors {
  const void* x;
  void* y;
};

template <TTMVariant kV>
__global__ void __launch_bounds__(kTTMThreads) ttm(TTMShape s, TTMTensors tensors) {
  using Numbers = Pack<kV.dtype, kV.width>;
  const int64_t per_row = s.inner / kV.width, thread = this_thread(), row = quotient(thread, per_row);
  const int64_t outer = quotient(row, s.steps_out), j = row - outer * s.steps_out;
  if (outer >= s.outer) return;
  const int64_t first = s.first(j), step = s.x_step_stride * size_of(kV.dtype);
  const int64_t at = (thread - row * per_row) * kV.width;
  const char* x =
      static_cast<const char*>(tensors.x) + (outer * s.x_outer_stride + at) * size_of(kV.dtype) + first * step;
  float total[kV.width];
  const Numbers start = Numbers::load(x);
#pragma unroll
  for (int e = 0; e < kV.width; ++e) total[e] = start.get(e);
#pragma unroll 4
  for (int left = int(s.last(j) - first) - 1; left > 0; --left) {
    const Numbers next = Numbers::load(x += step);
#pragma unroll
    for (int e = 0; e < kV.width; ++e) total[e] += next.get(e);
  }
  Numbers::rounded(total).store(static_cast<char*>(tensors.y) + (row * s.inner + at) * size_of(kV.dtype));
}

}  // namespace snnkern
