// Spikes to bits and back on CUDA devices. A thread has a byte: it moves eight numbers, 16 bytes at a time where
// alignment allows, as integers of their width.
#include "../pack.h"
#include "memory.cuh"

namespace snnkern {
namespace {

constexpr int kPackThreads = 256;

template <class U>
SNN_HD void pack_thread(int64_t thread, int64_t n, U one, bool wide, const U* __restrict__ x, uint8_t* bits,
                        int32_t* other) {
  const int64_t at = thread * 8;
  if (at >= n) return;
  Pack<U, 8> lanes{};
  if (wide && at + 8 <= n) {
    lanes = read<U, 8>(x + at);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (at + k < n) lanes.lane[k] = x[at + k];
  }
  unsigned byte = 0;
  bool binary = true;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    byte |= unsigned(lanes.lane[k] == one) << k;
    binary = binary && (lanes.lane[k] == 0 || lanes.lane[k] == one);
  }
  bits[thread] = uint8_t(byte);
  if (other && !binary) *other = 1;  // whoever stores it stores the same
}

template <class U>
SNN_HD void unpack_thread(int64_t thread, int64_t n, U one, bool wide, const uint8_t* __restrict__ bits, U* x) {
  const int64_t at = thread * 8;
  if (at >= n) return;
  const unsigned byte = bits[thread];
  Pack<U, 8> lanes;
#pragma unroll
  for (int k = 0; k < 8; ++k) lanes.lane[k] = byte >> k & 1 ? one : U(0);
  if (wide && at + 8 <= n) {
    write(x + at, lanes);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (at + k < n) x[at + k] = lanes.lane[k];
  }
}

template <class U>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(int64_t n, U one, bool wide, const U* __restrict__ x, uint8_t* bits, int32_t* other) {
  pack_thread<U>(blockIdx.x * int64_t(kPackThreads) + threadIdx.x, n, one, wide, x, bits, other);
}
template <class U>
__global__ void __launch_bounds__(kPackThreads)
    unpack_kernel(int64_t n, U one, bool wide, const uint8_t* __restrict__ bits, U* x) {
  unpack_thread<U>(blockIdx.x * int64_t(kPackThreads) + threadIdx.x, n, one, wide, bits, x);
}

unsigned blocks(int64_t n) { return unsigned((n + 8 * kPackThreads - 1) / (8 * kPackThreads)); }

// Calls f with the 1 of that type, as an unsigned integer.
template <class F>
int with_one(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(uint32_t(one_of(dtype)));
    case DType::f16:
    case DType::bf16: return f(uint16_t(one_of(dtype)));
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

int pack_cuda(DType dtype, int64_t n, const void* x, uint8_t* bits, int32_t* other, void* stream) {
  if (n == 0) return cudaSuccess;
  return with_one(dtype, [&](auto one) {
    pack_kernel<<<blocks(n), kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        n, one, aligned(x, 16), static_cast<const decltype(one)*>(x), bits, other);
    return cudaGetLastError();
  });
}

int unpack_cuda(DType dtype, int64_t n, const uint8_t* bits, void* x, void* stream) {
  if (n == 0) return cudaSuccess;
  return with_one(dtype, [&](auto one) {
    unpack_kernel<<<blocks(n), kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(n, one, aligned(x, 16), bits,
                                                                                     static_cast<decltype(one)*>(x));
    return cudaGetLastError();
  });
}

}  // namespace snnkern
