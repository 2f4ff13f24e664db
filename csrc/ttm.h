// The temporal transformation: what every backend's launcher takes. Plain pointers and sizes, no framework.
#pragma once
#include "lif.h"

namespace snnkern {

// x is [outer, steps_in, inner] with the given strides and a contiguous inner dimension, y [outer, steps_out, inner]
// contiguous. The longer of the two is cut into as many groups of neighbouring steps as the shorter has steps: y sums
// the steps of each group (steps_out <= steps_in), or repeats each step of x over its group.
struct TTMShape {
  DType dtype;
  int64_t outer, steps_in, inner;
  int64_t x_outer_stride, x_step_stride;
  int64_t steps_out;

  // The steps of x, from first up to last, that make step j of y.
  SNN_HOST_DEVICE int64_t first(int64_t j) const {
    return steps_out <= steps_in ? group_start(j, steps_in, steps_out) : group_of(j, steps_out, steps_in);
  }
  SNN_HOST_DEVICE int64_t last(int64_t j) const { return steps_out <= steps_in ? first(j + 1) : first(j) + 1; }
};

void ttm_cpu(const TTMShape&, const void* x, void* y, int threads);

}  // namespace snnkern
