// Vectors as wide as the instruction set this file is compiled for, and on them what surrogate.h needs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatV;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
};

template <class V, class S>
inline V load_as(const S* from) {  // V: a vector, or S itself for the tail of a row
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class S>
inline void store_as(S* to, V v) {
  std::memcpy(to, &v, sizeof v);
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
  DoubleV y;
  for (unsigned i = 0; i < kVectorBytes / sizeof(double); ++i) y[i] = exp(x[i]);
  return y;
}

}  // namespace
}  // namespace snnkern
