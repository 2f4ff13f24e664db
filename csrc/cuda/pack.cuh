// Spikes to bits and back on CUDA devices. A thread has a byte: it moves eight numbers, 16 bytes at a time where
// alignment allows, as integers of their width.
#pragma once
#include "../pack.h"
#include "memory.cuh"

namespace snnkern {

struct PackVariant {  // as in snnkern/backend/cuda/pack.py
  DType dtype;
  bool wide, check;  // x is aligned to 16 bytes; whether anything else is in it is to be told
};
constexpr int kPackThreads = 256;

struct PackTensors {
  void* x;
  uint8_t* bits;
  int32_t* other;  // with kV.check: becomes 1 if x holds anything but 0 and 1
  int64_t n;
};

namespace {

template <DType kType>
struct Eight {
  Pack<kType, 8> pack{};

  __device__ __forceinline__ uint32_t get(int e) const {
    if constexpr (kType == DType::f32) return pack.word[e];
    return e & 1 ? pack.word[e / 2] >> 16 : pack.word[e / 2] & 0xffff;
  }
  __device__ __forceinline__ void set(int e, uint32_t bits) {
    if constexpr (kType == DType::f32)
      pack.word[e] = bits;
    else
      pack.word[e / 2] |= bits << 16 * (e & 1);
  }
};

}  // namespace

template <PackVariant kV>
__global__ void __launch_bounds__(kPackThreads) pack(PackTensors tensors) {
  constexpr auto one = uint32_t(one_of(kV.dtype));
  constexpr int size = size_of(kV.dtype);
  const int64_t thread = this_thread(), at = thread * 8, n = tensors.n;
  if (at >= n) return;
  const char* x = static_cast<const char*>(tensors.x) + at * size;
  Eight<kV.dtype> numbers;
  if (kV.wide && at + 8 <= n) {
    numbers.pack = Pack<kV.dtype, 8>::load(x);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (at + e < n) numbers.set(e, Pack<kV.dtype, 1>::load(x + e * size).word[0]);
  }
  uint32_t byte = 0;
  bool binary = true;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t number = numbers.get(e);
    byte |= number == one ? 1u << e : 0u;
    binary = binary && (number == 0 || number == one);
  }
  tensors.bits[thread] = uint8_t(byte);
  if (kV.check && !binary) *tensors.other = 1;  // whoever stores it stores the same
}

template <PackVariant kV>
__global__ void __launch_bounds__(kPackThreads) unpack(PackTensors tensors) {
  constexpr auto one = uint32_t(one_of(kV.dtype));
  constexpr int size = size_of(kV.dtype);
  const int64_t thread = this_thread(), at = thread * 8, n = tensors.n;
  if (at >= n) return;
  char* x = static_cast<char*>(tensors.x) + at * size;
  const uint32_t byte = tensors.bits[thread];
  Eight<kV.dtype> numbers;
#pragma unroll
  for (int e = 0; e < 8; ++e) numbers.set(e, byte >> e & 1 ? one : 0u);
  if (kV.wide && at + 8 <= n) {
    numbers.pack.store(x);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (at + e < n) Pack<kV.dtype, 1>{numbers.get(e)}.store(x + e * size);
  }
}

}  // namespace snnkern
