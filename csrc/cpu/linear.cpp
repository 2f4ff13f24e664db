// A linear layer of spikes on the CPU, compiled once per instruction set like lif.cpp: rows are added where a spike is,
// with a few vectors of outputs in registers, and nothing is done where there is none.
//
// Forward lists the spikes of some rows, then adds rows of the weight. Backward takes as many rows of the gradient as
// fit into the first cache; for each input, bits say which of them to add.
#include "../linear.h"

#include <atomic>

#include "kernels.h"
#include "threads.h"
#include "vector.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kWidth = kVectorBytes / sizeof(float);
constexpr int64_t kForward = std::min(8 * kWidth, 64);  // outputs that forward has in registers: half of a first cache
                                                        // holds them of 128 rows of the weight
constexpr int64_t kBackward = 8 * kWidth;               // that backward has
constexpr int64_t kBitRows = LinearShape::kBitRows;
constexpr int64_t kBlock = 2 * kBitRows;  // rows that backward has in the first cache
constexpr int64_t kRows = 4 * kBitRows;   // rows of forward that a thread takes at a time
constexpr int64_t kReduced = 4096;        // weights whose parts a thread adds at a time
constexpr int64_t kSerial = 1 << 16;      // numbers of spikes below which a second thread costs more than it brings

// Lists the positions of what is not 0 from `at` on; returns how many there are. Writes up to 16 more than these.
inline int64_t list(const float* spikes, int64_t n, int32_t* at) {
  int64_t found = 0;
#if defined(__AVX512F__)
  __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t k = 0; k < n; k += 16, here = _mm512_add_epi32(here, _mm512_set1_epi32(16))) {
    const __mmask16 inside = n - k < 16 ? __mmask16((1 << (n - k)) - 1) : __mmask16(-1);
    const __m512 x = _mm512_maskz_loadu_ps(inside, spikes + k);
    const __mmask16 fired = _mm512_cmp_ps_mask(x, __m512{}, _CMP_NEQ_UQ);
    _mm512_storeu_si512(at + found, _mm512_maskz_compress_epi32(fired, here));
    found += __builtin_popcount(fired);
  }
#else
  for (int64_t k = 0; k < n; ++k) {
    at[found] = int32_t(k);
    found += spikes[k] != 0;
  }
#endif
  return found;
}

// Shifts a row into the bits, the next of the rows that they hold: after kBitRows of them the first is in bit 0.
// Returns whether the row held other than 0 and 1.
inline bool shift_in(const float* spikes, int64_t n, uint32_t* bits) {
  uint32_t other = 0;
  for (int64_t k = 0; k < n; ++k) {
    const uint32_t x = bit_cast<uint32_t>(spikes[k]), one = x == 0x3f800000u;
    other |= one ? 0 : x;
    bits[k] = bits[k] >> 1 | one << 31;
  }
  return other;
}

// Calls f with the vectors that hold so many numbers, at most 8, as a constant.
template <class F>
inline void with_vectors(int64_t lanes, F&& f) {
  switch ((lanes + kWidth - 1) / kWidth) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

// `lanes` outputs of one row, from those listed.
template <int vectors, bool ones>
inline void add_listed(const float* spikes, const int32_t* at, int64_t count, const float* weight_t, int64_t stride,
                       const float* bias, float* y, int64_t lanes, bool streaming) {
  FloatV sum[vectors]{};
  if (bias)
    for (int j = 0; j < vectors; ++j) sum[j] = load<FloatV>(bias + j * kWidth);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = weight_t + at[i] * stride;
    for (int j = 0; j < vectors; ++j) {
      const FloatV w = load<FloatV>(row + j * kWidth);
      sum[j] += ones ? w : w * spikes[at[i]];
    }
  }
  if (lanes == vectors * kWidth) {
    for (int j = 0; j < vectors; ++j) store(y + j * kWidth, sum[j], streaming);
  } else {
    std::memcpy(y, sum, lanes * sizeof(float));
  }
}

// Adds those of kBlock rows that are marked.
template <int vectors>
inline void add_marked(uint64_t marked, const float* rows, float* to) {
  FloatV sum[vectors];
  for (int j = 0; j < vectors; ++j) sum[j] = load<FloatV>(to + j * kWidth);
  for (; marked; marked &= marked - 1) {
    const float* row = rows + __builtin_ctzll(marked) * kBackward;
    for (int j = 0; j < vectors; ++j) sum[j] += load<FloatV>(row + j * kWidth);
  }
  for (int j = 0; j < vectors; ++j) store(to + j * kWidth, sum[j], false);
}

}  // namespace

int64_t linear_count(const LinearShape& p, const float* spikes, int64_t rows) {
  int64_t found = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = spikes + i * p.rows / rows * p.inputs;
    int32_t here = 0;
    for (int64_t k = 0; k < p.inputs; ++k) here += row[k] != 0;
    found += here;
  }
  return found;
}

bool linear_forward(const LinearShape& p, const float* spikes, const float* weight_t, float* y, uint32_t* bits,
                    int threads, bool streaming) {
  constexpr int64_t listed = LinearShape::kMostInputs;
  const int64_t stride = p.stride(), at_once = std::min(kBitRows, listed / std::max<int64_t>(p.inputs, 1));
  threads = p.rows * p.inputs < kSerial ? 1 : threads;
  streaming = streaming && p.outputs % kWidth == 0 && reinterpret_cast<uintptr_t>(y) % kVectorBytes == 0;
  std::atomic<bool> binary{true};
  parallel_for((p.rows + kRows - 1) / kRows, threads, [&](int64_t chunk) {
    int32_t at[listed + 16];
    const int64_t end = std::min(p.rows, (chunk + 1) * kRows);
    for (int64_t first = chunk * kRows, last; first < end; first = last) {
      last = std::min({end, first + at_once, first / kBitRows * kBitRows + kBitRows});
      uint32_t* of = bits + first / kBitRows * p.inputs;
      if (first % kBitRows == 0) std::fill(of, of + p.inputs, 0);
      int64_t until[kBitRows], found = 0;
      bool other = false;
      for (int64_t r = first; r < last; ++r) {
        const float* row = spikes + r * p.inputs;
        other |= shift_in(row, p.inputs, of);
        until[r - first] = found += list(row, p.inputs, at + found);
      }
      if (other) binary = false;
      for (int64_t o = 0; o < p.outputs; o += kForward) {
        const int64_t lanes = std::min(kForward, p.outputs - o);
        const float *weight = weight_t + o, *bias = p.biased ? weight + p.inputs * stride : nullptr;
        const auto add = [&](auto vectors, auto ones) {
          for (int64_t r = first, from = 0; r < last; from = until[r++ - first])
            add_listed<vectors.value, ones.value>(spikes + r * p.inputs, at + from, until[r - first] - from, weight,
                                                  stride, bias, y + r * p.outputs + o, lanes, streaming);
        };
        with_vectors(lanes,
                     [&](auto vectors) { other ? add(vectors, std::false_type{}) : add(vectors, std::true_type{}); });
      }
      if (last == p.rows)
        for (int64_t k = 0; k < p.inputs; ++k) of[k] >>= -last & (kBitRows - 1);
    }
    if (streaming) stream_fence();
  });
  return binary;
}

void linear_backward(const LinearShape& p, const uint32_t* bits, const float* grad, float* sums, float* grad_t,
                     int threads) {
  const int64_t parts = p.parts(), blocks = (p.rows + kBlock - 1) / kBlock, stride = p.stride();
  threads = p.rows * p.inputs < kSerial ? 1 : threads;
  parallel_for(parts, threads, [&](int64_t part) {
    alignas(kVectorBytes) float rows[kBlock * kBackward]{};
    float* sum = sums + part * p.weights();
    std::fill(sum, sum + p.weights(), 0.0f);
    for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, p.rows - first);
      const uint32_t* low = bits + first / kBitRows * p.inputs;
      const uint32_t* high = count > kBitRows ? low + p.inputs : nullptr;
      for (int64_t o = 0; o < p.outputs; o += kBackward) {
        const int64_t lanes = std::min(kBackward, p.outputs - o);
        const float* from = grad + first * p.outputs + o;
        if (p.outputs != kBackward) {  // apart they would fall on each other in the cache
          for (int64_t r = 0; r < count; ++r) std::copy_n(from + r * p.outputs, lanes, rows + r * kBackward);
          from = rows;
        }
        with_vectors(lanes, [&](auto vectors) {
          float* to = sum + o;
          for (int64_t k = 0; k < p.inputs; ++k, to += stride)
            add_marked<vectors.value>(low[k] | (high ? uint64_t(high[k]) << kBitRows : 0), from, to);
          if (p.biased) add_marked<vectors.value>(~uint64_t(0) >> (kBlock - count), from, to);
        });
      }
    }
  });
  parallel_for((p.weights() + kReduced - 1) / kReduced, parts == 1 ? 1 : threads, [&](int64_t chunk) {
    const int64_t first = chunk * kReduced, last = std::min(p.weights(), first + kReduced);
    std::copy(sums + first, sums + last, grad_t + first);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = first; i < last; ++i) grad_t[i] += sums[part * p.weights() + i];
  });
}

}  // namespace snnkern::SNN_ISA
