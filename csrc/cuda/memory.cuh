// How kernels move numbers: up to 16 bytes at a time, 16-bit ones as float in registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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
