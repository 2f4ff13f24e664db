// The CPU kernels, one copy per instruction set; see lif.cpp and ttm.cpp.
#pragma once
#include "../lif.h"
#include "../ttm.h"

#define SNN_DECLARE(isa)                                                                               \
  namespace snnkern::isa {                                                                             \
  void lif_forward(const LIFSpec&, const LIFShape&, const LIFForward&, int threads, bool streaming);   \
  void lif_backward(const LIFSpec&, const LIFShape&, const LIFBackward&, int threads, bool streaming); \
  void ttm(const TTMShape&, const void* x, void* y, int threads, bool streaming);                      \
  }
SNN_DECLARE(baseline)
SNN_DECLARE(avx2)
SNN_DECLARE(avx512)
#undef SNN_DECLARE
