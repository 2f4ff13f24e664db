// The temporal transformation on the CPU, compiled once per instruction set like lif.cpp. A step of y is a sum of
// neighbouring steps of x, from the first to the last, in registers; 16-bit numbers are summed in float and rounded
// once.
#include <algorithm>

#include "kernels.h"
#include "threads.h"
#include "vector.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int64_t kLanes = 4096;    // numbers of a row that a thread takes at a time
constexpr int64_t kSerial = 32768;  // numbers below which a second thread costs more than it brings

template <class IO>
void sum(const IO* x, int64_t stride, int64_t count, IO* y, int64_t lanes, bool streaming) {
  using S = State<IO>;
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  const auto lane = [&](int64_t j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    W total = load<W>(x + j);
    for (int64_t k = 1; k < count; ++k) total += load<W>(x + k * stride + j);
    store(y + j, total, streaming);
  };
  const int64_t head = std::min<int64_t>(lanes, lanes_until_aligned<V>(y));
  int64_t j = 0;
  for (; j < head; ++j) lane(j, S{});
  for (; j + width <= lanes; j += width) lane(j, V{});
  for (; j < lanes; ++j) lane(j, S{});
}

}  // namespace

void ttm(const TTMShape& s, const void* x, void* y, int threads, bool streaming) {
  const int64_t rows = s.outer * s.steps_out, per_row = (s.inner + kLanes - 1) / kLanes;
  threads = s.outer * std::max(s.steps_in, s.steps_out) * s.inner < kSerial ? 1 : threads;
  with_dtype(s.dtype, [&](auto io) {
    using IO = decltype(io);
    parallel_for(rows * per_row, threads, [&](int64_t i) {
      const int64_t row = i / per_row, at = i % per_row * kLanes, outer = row / s.steps_out, j = row % s.steps_out;
      const int64_t first = s.first(j);
      sum(static_cast<const IO*>(x) + outer * s.x_outer_stride + first * s.x_step_stride + at, s.x_step_stride,
          s.last(j) - first, static_cast<IO*>(y) + row * s.inner + at, std::min(kLanes, s.inner - at), streaming);
      if (streaming) stream_fence();
    });
  });
}

}  // namespace snnkern::SNN_ISA
