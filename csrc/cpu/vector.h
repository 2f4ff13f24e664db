// Numbers in registers: vectors as wide as the instruction set this file is compiled for, their loads and stores in
// every dtype, and on them what surrogate.h needs. All of it also works on a single number, for the lanes left over.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../lif.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace snnkern {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntV __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongV __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UIntV __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UShortV __attribute__((vector_size(kVectorBytes / 2)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a vector (or a number) V of the state is made of and looks like as bits, and as 16-bit numbers.
template <class V>
struct Traits;
template <>
struct Traits<FloatV> {
  using Bits = UIntV;
  using Short = UShortV;
};
template <>
struct Traits<float> {
  using Bits = uint32_t;
  using Short = uint16_t;
};
template <class S>
struct VectorOf {
  using type = FloatV;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline UIntV widen(UShortV x) { return __builtin_convertvector(x, UIntV); }
inline uint32_t widen(uint16_t x) { return x; }
inline UShortV narrow(UIntV x) { return __builtin_convertvector(x, UShortV); }
inline uint16_t narrow(uint32_t x) { return uint16_t(x); }

// 16-bit floats to and from float without branches; rounding to nearest even, as PyTorch's.
template <class V, class U>
inline V from_bits(BFloat16, U u) {
  return bit_cast<V>(u << 16);
}
template <class V, class U>
inline V from_bits(Half, U u) {
  const U magnitude = (u & 0x7fffu) << 13, sign = (u & 0x8000u) << 16;
  const U finite = bit_cast<U>(bit_cast<V>(magnitude) * 0x1p112f);  // rebias the exponent; subnormals come out right
  const U special = magnitude | 0x7f800000u;
  return bit_cast<V>(sign | (magnitude >= 0x0f800000u ? special : finite));
}
template <class V>
inline auto to_bits(BFloat16, V x) {
  using U = typename Traits<V>::Bits;
  const U u = bit_cast<U>(x);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}
template <class V>
inline auto to_bits(Half, V x) {
  using U = typename Traits<V>::Bits;
  const U u = bit_cast<U>(x), a = u & 0x7fffffffu;
  const U normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const U subnormal = bit_cast<U>(bit_cast<V>(a) + 0.5f) - 0x3f000000u;  // the addition does the rounding
  U r = a < 0x38800000u ? subnormal : normal;
  r = a >= 0x477ff000u ? 0x7c00u : r;  // 65520 and above round to infinity
  r = a > 0x7f800000u ? 0x7e00u : r;
  return r | ((u >> 16) & 0x8000u);
}

template <class V, class IO>
inline V load(const IO* from) {
  if constexpr (sizeof(IO) == 2) {
    typename Traits<V>::Short bits;
    std::memcpy(&bits, from, sizeof bits);
    return from_bits<V>(IO{}, widen(bits));
  } else {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
}

// A store that leaves the cache alone; `to` is aligned to the size of what is stored.
inline void stream(void* to, uint16_t x) { std::memcpy(to, &x, sizeof x); }
inline void stream(void* to, float x) { std::memcpy(to, &x, sizeof x); }
inline void stream(void* to, double x) { std::memcpy(to, &x, sizeof x); }
template <class R>
inline void stream(void* to, R x) {
#if defined(__AVX512F__)
  if constexpr (sizeof x == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(x));
#endif
#if defined(__AVX__)
  if constexpr (sizeof x == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(x));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof x == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(x));
#endif
  std::memcpy(to, &x, sizeof x);
}
inline void stream_fence() {  // streamed stores become visible to the other threads
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class IO, class V>
inline void store(IO* to, V x, bool streaming) {
  if constexpr (sizeof(IO) == 2) {
    const auto bits = narrow(to_bits(IO{}, x));
    streaming ? stream(to, bits) : void(std::memcpy(to, &bits, sizeof bits));
  } else {
    streaming ? stream(to, x) : void(std::memcpy(to, &x, sizeof x));
  }
}

// 1 where `fired`, which compares states, else 0.
template <class IO, class V, class Mask>
inline void store_spike(IO* to, Mask fired, bool streaming) {
  if constexpr (sizeof(IO) == 2) {
    using U = typename Traits<V>::Bits;
    const U one = U{} + (std::is_same_v<IO, Half> ? 0x3c00u : 0x3f80u);
    const auto bits = narrow(fired ? one : U{});
    streaming ? stream(to, bits) : void(std::memcpy(to, &bits, sizeof bits));
  } else {
    store(to, fired ? V{} + IO(1) : V{}, streaming);
  }
}

// In what numbers of type IO are computed with.
template <class IO>
using State = std::conditional_t<std::is_same_v<IO, double>, double, float>;

// Lanes before `out` is aligned to what a vector of them occupies there.
template <class V, class IO>
inline int lanes_until_aligned(const IO* out) {
  constexpr intptr_t bytes = sizeof(V) / sizeof(State<IO>) * sizeof(IO);
  return int((-reinterpret_cast<intptr_t>(out) & (bytes - 1)) / sizeof(IO));
}

// Calls f with a number of that type.
template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
  }
}

inline FloatV magnitude(FloatV x) { return (FloatV)((IntV)x & 0x7fffffff); }
inline DoubleV magnitude(DoubleV x) { return (DoubleV)((LongV)x & 0x7fffffffffffffff); }

// Within 2 ulp of exp for -87 <= x <= 0, 0 below: x = n ln 2 + r, Taylor series of exp(r), n into the exponent.
inline FloatV exp_nonpositive(FloatV x) {
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const FloatV clipped = x > -87.0f ? x : -87.0f;
  const FloatV n = (clipped * 1.44269504f + to_integer) - to_integer;
  const FloatV r = (clipped - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  FloatV p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntV exponent = (__builtin_convertvector(n, IntV) + 127) << 23;
  return x >= -87.0f ? p * (FloatV)exponent : 0.0f;
}
inline DoubleV exp_nonpositive(DoubleV x) {
  DoubleV y = x;
  for (unsigned i = 0; i < kVectorBytes / sizeof(double); ++i) y[i] = std::exp(x[i]);
  return y;
}

// surrogate.h's Table, for each lane.
template <class V, class K>
inline V interpolate_lanes(V at, K k) {
  V y;
  for (unsigned i = 0; i < sizeof(V) / sizeof(at[0]); ++i) {
    const int last = int(k.c) - 1, cell = int(at[i]) < last ? int(at[i]) : last;
    y[i] = (at[i] - cell) * k.table[2 * cell + 1] + k.table[2 * cell];
  }
  return y;
}
template <class K>
inline FloatV interpolate(FloatV at, K k) {
#if defined(__AVX2__)
  const IntV last = IntV{} + (int(k.c) - 1), within = __builtin_convertvector(at, IntV);
  const IntV cell = within < last ? within : last;
#if defined(__AVX512F__)
  const auto of = [&](int i) {  // masked, as GCC warns of the other's undefined value
    return (FloatV)_mm512_mask_i32gather_ps(__m512{}, __mmask16(-1), (__m512i)(2 * cell + i), k.table, 4);
  };
#else
  const auto of = [&](int i) { return (FloatV)_mm256_i32gather_ps(k.table, (__m256i)(2 * cell + i), 4); };
#endif
  return (at - __builtin_convertvector(cell, FloatV)) * of(1) + of(0);
#else
  return interpolate_lanes(at, k);
#endif
}
template <class K>
inline DoubleV interpolate(DoubleV at, K k) {
  return interpolate_lanes(at, k);
}

}  // namespace
}  // namespace snnkern
