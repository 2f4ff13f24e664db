// What the shared headers need of the standard library. NVRTC, which compiles them for GPUs, has none.
#pragma once
#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int32_t = int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define SNN_HOST_DEVICE __device__ inline
#define SNN_HD __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#define SNN_HOST_DEVICE inline
#define SNN_HD inline __attribute__((always_inline))
#endif
