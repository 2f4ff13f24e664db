// Where a thread's numbers lie and how kernels move them: up to 16 bytes at a time, 16-bit numbers as halves of 32-bit
// words, which are floats in registers. Compiled by NVRTC alone, so no header of CUDA's is needed.
#pragma once
#include "../lif.h"
#include "../surrogate.h"

namespace snnkern {
namespace {

constexpr int size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// kBytes from device memory that no kernel writes while this one runs; read once, they are kept out of L1.
template <int kBytes>
__device__ __forceinline__ void load_words(uint32_t* to, const void* from) {
  if constexpr (kBytes > 16) {
    load_words<16>(to, from);
    load_words<kBytes - 16>(to + 4, static_cast<const char*>(from) + 16);
  } else if constexpr (kBytes == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
  } else {
    static_assert(kBytes == 2);
    uint16_t half;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(half) : "l"(from));
    to[0] = half;
  }
}

template <int kBytes>
__device__ __forceinline__ void store_words(void* to, const uint32_t* from) {
  if constexpr (kBytes > 16) {
    store_words<16>(to, from);
    store_words<kBytes - 16>(static_cast<char*>(to) + 16, from + 4);
  } else if constexpr (kBytes == 16) {
    *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = from[0];
  } else {
    static_assert(kBytes == 2);
    *static_cast<uint16_t*>(to) = uint16_t(from[0]);
  }
}

// Two floats as 16-bit numbers, rounded to nearest even: the first in the lower half.
template <DType kType>
__device__ __forceinline__ uint32_t join(float low, float high) {
  uint32_t both;
  if constexpr (kType == DType::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// kWidth neighbouring numbers. With kWidth = 1, a 16-bit one is the lower half of its word.
template <DType kType, int kWidth>
struct Pack {
  static constexpr int kBytes = size_of(kType) * kWidth, kWords = (kBytes + 3) / 4;
  uint32_t word[kWords];

  static __device__ __forceinline__ Pack load(const void* from) {
    Pack pack;
    load_words<kBytes>(pack.word, from);
    return pack;
  }
  __device__ __forceinline__ void store(void* to) const { store_words<kBytes>(to, word); }

  __device__ __forceinline__ float get(int e) const {
    if constexpr (kType == DType::f32) {
      return __uint_as_float(word[e]);
    } else if constexpr (kType == DType::bf16) {
      return __uint_as_float(e & 1 ? word[e / 2] & 0xffff0000u : word[e / 2] << 16);
    } else {
      float number;
      asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.f32.f16 %0, low;}"
          : "=f"(number)
          : "r"(e & 1 ? word[e / 2] >> 16 : word[e / 2]));
      return number;
    }
  }
  static __device__ __forceinline__ Pack rounded(const float (&numbers)[kWidth]) {
    Pack pack;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kType == DType::f32)
        pack.word[w] = __float_as_uint(numbers[w]);
      else
        pack.word[w] = join<kType>(numbers[2 * w], kWidth > 1 ? numbers[2 * w + 1] : 0.0f);
    }
    return pack;
  }
  // 1 where it fired, else 0, by choosing bits.
  static __device__ __forceinline__ Pack spikes(const bool (&fired)[kWidth]) {
    constexpr uint32_t one = kType == DType::f32 ? 0x3f800000u : kType == DType::bf16 ? 0x3f80u : 0x3c00u;
    Pack pack;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kType == DType::f32)
        pack.word[w] = fired[w] ? one : 0u;
      else
        pack.word[w] = (fired[2 * w] ? one : 0u) | (kWidth > 1 && fired[2 * w + 1] ? one << 16 : 0u);
    }
    return pack;
  }
};

template <int kWidth>
__device__ __forceinline__ void load_state(float (&v)[kWidth], const float* from) {
  const auto pack = Pack<DType::f32, kWidth>::load(from);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) v[e] = pack.get(e);
}
template <int kWidth>
__device__ __forceinline__ void store_state(float* to, const float (&v)[kWidth]) {
  Pack<DType::f32, kWidth>::rounded(v).store(to);
}

__device__ __forceinline__ int64_t this_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// n / d: in 32 bits wherever both fit, which is a fraction of the instructions.
__device__ __forceinline__ int64_t quotient(int64_t n, int64_t d) {
  return (n | d) >> 32 ? n / d : uint32_t(n) / uint32_t(d);
}

// Where neuron n of [outer * inner] and the next ones in its row lie, in numbers: in x, and in contiguous
// [outer, steps, inner], [outer, steps_out, inner] and [outer, inner].
struct Place {
  int64_t x, sequence, spikes, state, neurons;
  bool inside;

  // rows: whether there are several, outer > 1.
  __device__ __forceinline__ Place(const LIFShape& s, int64_t n, bool rows) {
    const int64_t outer = rows ? quotient(n, s.inner) : 0, inner = n - outer * s.inner;
    x = outer * s.x_outer_stride + inner;
    sequence = outer * s.steps * s.inner + inner;
    spikes = outer * s.steps_out * s.inner + inner;
    state = n;
    neurons = rows ? s.outer * s.inner : s.inner;
    inside = n < neurons;
  }
};

}  // namespace
}  // namespace snnkern
