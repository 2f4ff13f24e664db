// Spikes to bits and back on the CPU, compiled once per instruction set like lif.cpp. A byte is eight lanes of integers
// as wide as the numbers.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "threads.h"
#include "vector.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int64_t kBlock = 8192;    // numbers that a thread takes at a time
constexpr int64_t kSerial = 65536;  // numbers below which a second thread costs more than it brings

// As much of eight lanes as a vector holds, and as 16-bit numbers.
template <class U>
struct Lanes {
  static constexpr int count = std::min<int>(8, kVectorBytes / sizeof(U));
  typedef U Vector __attribute__((vector_size(count * sizeof(U))));
  typedef int16_t Short __attribute__((vector_size(count * 2)));
};
typedef int16_t Short8 __attribute__((vector_size(16)));
typedef uint8_t Byte8 __attribute__((vector_size(8)));

// A bit per lane of a mask, whose lanes are 0 or -1.
inline uint8_t bits_of(Short8 mask) {
#if defined(__x86_64__)
  const __m128i words = bit_cast<__m128i>(mask);
  return uint8_t(_mm_movemask_epi8(_mm_packs_epi16(words, words)));
#else  // the product brings lane k, a byte of 0 or 1, to bit k of its last byte
  return bit_cast<uint64_t>(__builtin_convertvector(mask, Byte8) & 1) * 0x0102040810204080u >> 56;
#endif
}

// Whether nothing is other than 0 and one.
template <class U>
bool pack(const U* x, int64_t n, U one, uint8_t* bits) {
  using L = Lanes<U>;
  using V = typename L::Vector;
  V other{};
  const auto byte = [&](const U* from) {
    typename L::Short words[8 / L::count];
    for (int part = 0; part < 8 / L::count; ++part) {
      V v;
      std::memcpy(&v, from + part * L::count, sizeof v);
      const auto ones = v == one;
      other |= v & ~V(ones);
      words[part] = __builtin_convertvector(ones, typename L::Short);
    }
    Short8 mask;
    std::memcpy(&mask, words, sizeof mask);
    return bits_of(mask);
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) bits[i / 8] = byte(x + i);
  if (i < n) {
    U last[8]{};
    std::copy(x + i, x + n, last);
    bits[i / 8] = byte(last);
  }
  U any = 0;
  for (int k = 0; k < L::count; ++k) any |= other[k];
  return any == 0;
}

template <class U>
void unpack(const uint8_t* bits, int64_t n, U one, U* x, bool streaming) {
  using L = Lanes<U>;
  using V = typename L::Vector;
  V bit;
  for (int k = 0; k < L::count; ++k) bit[k] = U(1) << k;
  streaming = streaming && reinterpret_cast<uintptr_t>(x) % sizeof(V) == 0;
  const auto eight = [&](unsigned byte, U* to, bool past_cache) {
    for (int part = 0; part < 8; part += L::count) {
      const U here = U(byte >> part);
      const V v = V(((V{} + here) & bit) != 0) & one;
      past_cache ? stream(to + part, v) : void(std::memcpy(to + part, &v, sizeof v));
    }
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) eight(bits[i / 8], x + i, streaming);
  if (i < n) {
    U last[8];
    eight(bits[i / 8], last, false);
    std::copy(last, last + (n - i), x + i);
  }
  if (streaming) stream_fence();
}

// Calls f with an unsigned integer as wide as a number.
template <class F>
void with_width(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(uint32_t{});
    case DType::f64: return f(uint64_t{});
    default: return f(uint16_t{});
  }
}

}  // namespace

bool pack(DType dtype, int64_t n, const void* x, uint8_t* bits, int threads) {
  threads = n < kSerial ? 1 : threads;
  std::atomic<bool> binary{true};
  with_width(dtype, [&](auto width) {
    using U = decltype(width);
    parallel_for((n + kBlock - 1) / kBlock, threads, [&](int64_t block) {
      const int64_t i = block * kBlock;
      if (binary && !pack(static_cast<const U*>(x) + i, std::min(kBlock, n - i), U(one_of(dtype)), bits + i / 8))
        binary = false;
    });
  });
  return binary;
}

void unpack(DType dtype, int64_t n, const uint8_t* bits, void* x, int threads, bool streaming) {
  threads = n < kSerial ? 1 : threads;
  with_width(dtype, [&](auto width) {
    using U = decltype(width);
    parallel_for((n + kBlock - 1) / kBlock, threads, [&](int64_t block) {
      const int64_t i = block * kBlock;
      unpack(bits + i / 8, std::min(kBlock, n - i), U(one_of(dtype)), static_cast<U*>(x) + i, streaming);
    });
  });
}

}  // namespace snnkern::SNN_ISA
