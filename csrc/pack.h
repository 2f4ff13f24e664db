// Spikes as bits: what every backend's launcher takes. Plain pointers and sizes, no framework.
#pragma once
#include "lif.h"

namespace snnkern {

// Element i of n is bit i % 8 of byte i / 8; the bits after the last are 0. Numbers are compared as integers of their
// width: a 1 is the one that unpack writes, and all else becomes 0.
constexpr uint64_t one_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return 0x3f800000;
    case DType::f64: return 0x3ff0000000000000;
    case DType::f16: return 0x3c00;
    case DType::bf16: return 0x3f80;
  }
  return 0;
}

// Returns whether x held nothing but 0 and 1, bit for bit (-0 is neither); if not, the bits are of no use.
bool pack_cpu(DType, int64_t n, const void* x, uint8_t* bits, int threads);
void unpack_cpu(DType, int64_t n, const uint8_t* bits, void* x, int threads);

}  // namespace snnkern
