// Surrogate derivatives of the spike, each written once for the CPU and the GPU.
//
// A spike is s = H(x), x = h - threshold; its derivative is replaced by grad(x, k). The three constants k are computed
// in snnkern/surrogate.py (`constants`), which also cites each formula. To add a surrogate: a struct here, its name in
// SNN_SURROGATES, and a class of the same name there.
#pragma once
#include "standard.h"

#ifdef SNN_ISA
#include "cpu/vector.h"
#endif

namespace snnkern {
namespace {  // every object file its own copy: the CPU kernels are compiled for several instruction sets

template <class S>
struct Constants {
  S a, b, c;
  const S* table;  // of Table
};

// What follows is written for V = S, a number, and V = a vector of S (GCC's vector extension), in which ?: chooses lane
// by lane. cpu/vector.h has the vector overloads of the first two. A GPU approximates: derivatives are bound to no
// bits.
SNN_HD float magnitude(float x) { return fabsf(x); }
SNN_HD double magnitude(double x) { return fabs(x); }
#ifdef __CUDACC_RTC__
SNN_HD float exp_nonpositive(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
}
SNN_HD float ratio(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
SNN_HD float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SNN_HD float interpolate(float at, Constants<float> k) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: what is added is rounded to an integer, here down
  const float shifted = __fadd_rd(at < k.c - 1.0f ? at : k.c - 1.0f, kToInteger);
  const float* cell = k.table + 2 * (__float_as_uint(shifted) - 0x4b400000u);
  float value, gain;
  asm("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(value), "=f"(gain) : "l"(cell));
  return __fmaf_rn(at - (shifted - kToInteger), gain, value);
}
#else
SNN_HD float exp_nonpositive(float x) { return expf(x); }  // exp(x) for x <= 0
SNN_HD double exp_nonpositive(double x) { return exp(x); }
template <class A, class V>
SNN_HD V ratio(A a, V b) {
  return a / b;
}
template <class V, class B, class S>
SNN_HD V multiply_add(V a, B b, S c) {
  return a * b + c;
}
template <class S>
SNN_HD S interpolate(S at, Constants<S> k) {
  const int last = int(k.c) - 1, cell = int(at) < last ? int(at) : last;
  return multiply_add(at - S(cell), k.table[2 * cell + 1], k.table[2 * cell]);
}
#endif

// e / (1 + e)^2 with e = exp(-y), y >= 0: the logistic density, and sech^2(y/2) / 4. No overflow.
template <class V, class S>
SNN_HD V logistic_density(V y, S one) {
  const V e = exp_nonpositive(-y);
  return ratio(e, (one + e) * (one + e));
}

struct Triangle {  // a max(0, 1 - b|x|)
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    const V rest = multiply_add(-magnitude(x), k.b, S(1));
    return k.a * (rest > S(0) ? rest : S(0));
  }
};
struct Rectangle {  // a where |x| < b
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    return magnitude(x) < k.b ? k.a : S(0);
  }
};
struct Dspike {  // (a/4) sech^2(b x / 2) where |x| <= c
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    const V density = k.a * logistic_density(k.b * magnitude(x), S(1));
    return magnitude(x) <= k.c ? density : S(0);
  }
};
struct Sigmoid {  // a sigmoid'(b x)
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    return k.a * logistic_density(k.b * magnitude(x), S(1));
  }
};
struct ATan {  // a / (1 + (b x)^2)
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    const V y = k.b * x;
    return ratio(k.a, multiply_add(y, y, S(1)));
  }
};
struct Exponential {  // a exp(-b|x|)
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    return k.a * exp_nonpositive(-(k.b * magnitude(x)));
  }
};
struct SoftSign {  // a / (1 + b|x|)^2
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    const V y = multiply_add(magnitude(x), k.b, S(1));
    return ratio(k.a, y * y);
  }
};
struct SuperSpike : SoftSign {};  // the same curve in other parameters
struct FastSigmoid : SoftSign {};
struct Erf {  // a exp(-(b x)^2)
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    const V y = k.b * x;
    return k.a * exp_nonpositive(-(y * y));
  }
};

struct Integer {  // of x = h / threshold: 1 where 0 <= x <= a
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    const V inside = x <= k.a ? S(1) + V{} : V{};
    return x >= S(0) ? inside : V{};
  }
};
struct Table {  // a straight line through cell (x + a) b of the table's c: its value at the start, and what it gains
  template <class V, class S>
  static SNN_HD V grad(V x, Constants<S> k) {
    const V at = (x + k.a) * k.b, from = at > S(0) ? at : V{};  // a NaN is at 0
    const V y = interpolate(from < k.c ? from : k.c + V{}, k);
    return x - x == S(0) ? y : V{};  // 0 at infinity
  }
};

#define SNN_SURROGATES(X) \
  X(Triangle)             \
  X(Rectangle)            \
  X(Dspike) X(Sigmoid) X(ATan) X(Exponential) X(SoftSign) X(SuperSpike) X(FastSigmoid) X(Erf) X(Integer) X(Table)

}  // namespace
enum class Surrogate : int {
#define SNN_ITEM(name) name,
  SNN_SURROGATES(SNN_ITEM)
#undef SNN_ITEM
};
namespace {

// Calls f(Triangle{}) or whichever struct `kind` names: the one place where a run-time surrogate becomes a type.
template <class F>
SNN_HD void with_surrogate(Surrogate kind, F&& f) {
  switch (kind) {
#define SNN_ITEM(name) \
  case Surrogate::name: return f(name{});
    SNN_SURROGATES(SNN_ITEM)
#undef SNN_ITEM
  }
}

}  // namespace
}  // namespace snnkern
