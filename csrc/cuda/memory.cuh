// Where a thread's numbers lie and how kernels move them: up to 16 bytes at a time, 16-bit ones as float in registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "../lif.h"
#include "../surrogate.h"

namespace snnkern {
namespace {

SNN_HD float to_state(float x) { return x; }
SNN_HD float to_state(__half x) { return __half2float(x); }
SNN_HD float to_state(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class IO>
SNN_HD IO from_state(float x);
template <>
SNN_HD float from_state<float>(float x) {
  return x;
}
template <>
SNN_HD __half from_state<__half>(float x) {
  return __float2half_rn(x);
}
template <>
SNN_HD __nv_bfloat16 from_state<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T lane[kVec];
};
template <class T, int kVec>
SNN_HD Pack<T, kVec> read(const T* from) {
  return *reinterpret_cast<const Pack<T, kVec>*>(from);
}
template <class T, int kVec>
SNN_HD void write(T* to, const Pack<T, kVec>& pack) {
  *reinterpret_cast<Pack<T, kVec>*>(to) = pack;
}

template <class IO, int kVec>
SNN_HD Pack<IO, kVec> rounded(const Pack<float, kVec>& pack) {
  Pack<IO, kVec> out;
#pragma unroll
  for (int e = 0; e < kVec; ++e) out.lane[e] = from_state<IO>(pack.lane[e]);
  return out;
}

// Where neuron n of [outer * inner] and the next ones in its row lie: in x, and in contiguous [outer, steps, inner],
// [outer, steps_out, inner] and [outer, inner].
struct Place {
  int64_t x, sequence, spikes, state;
  int64_t neurons;
  bool inside;

  SNN_HD Place(const LIFShape& s, int64_t n) {
    const int64_t outer = s.outer == 1 && n < s.inner ? 0 : n / s.inner, inner = n - outer * s.inner;
    x = outer * s.x_outer_stride + inner;
    sequence = outer * s.steps * s.inner + inner;
    spikes = outer * s.steps_out * s.inner + inner;
    state = n;
    neurons = s.outer * s.inner;
    inside = outer < s.outer;
  }
};

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Calls f with a number of that type.
template <class F>
int with_io(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f16: return f(__half{});
    case DType::bf16: return f(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace snnkern
