// A linear layer of spikes: what the launchers take. Plain pointers and sizes, no framework.
#pragma once
#include <algorithm>
#include <cstdint>

namespace snnkern {

// All numbers are float32. spikes is [rows, inputs], y and grad [rows, outputs], contiguous. weight_t, the weight's
// transpose, and grad_t, its gradient's, are [inputs, stride], and one row more if biased: the bias. stride is
// outputs, rounded up to whole kLanes.
//
// Of spikes, bit i of bits[b][k] tells whether spikes[32 b + i][k] is 1: [ceil(rows / 32), inputs].
struct LinearShape {
  static constexpr int64_t kLanes = 16, kBitRows = 32, kMostInputs = 16384;
  int64_t rows, inputs, outputs;
  bool biased;

  int64_t stride() const { return (outputs + kLanes - 1) / kLanes * kLanes; }
  int64_t weights() const { return (inputs + biased) * stride(); }
  // Backward sums rows in so many parts: of the shape alone, so that threads change no bit.
  int64_t parts() const {
    return std::max<int64_t>(1, std::min<int64_t>(32, rows / std::max<int64_t>(1024, 4 * inputs)));
  }
};

// How many numbers of spikes are not 0, in `rows` of its rows, evenly spaced.
int64_t linear_count_cpu(const LinearShape&, const float* spikes, int64_t rows);

// y[r] = bias (or 0) + spikes[r][k] * weight_t[k], added where spikes[r][k] is not 0, one after the other in ascending
// k. Returns whether spikes held nothing but 0 and 1 (-0 is neither); if not, the bits are of no use.
bool linear_forward_cpu(const LinearShape&, const float* spikes, const float* weight_t, float* y, uint32_t* bits,
                        int threads);

// grad_t[k] = the sum of grad[r] over the r where there is a spike of k; of the bias, over all r. sums: of parts()
// times weights() numbers.
void linear_backward_cpu(const LinearShape&, const uint32_t* bits, const float* grad, float* sums, float* grad_t,
                         int threads);

}  // namespace snnkern
