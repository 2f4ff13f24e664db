// The CPU kernels, one copy per instruction set; see lif.cpp.
#pragma once
#include "../lif.h"

#define SNN_DECLARE(isa)                                                                               \
  namespace snnkern::isa {                                                                             \
  void lif_forward(const LIFSpec&, const LIFShape&, const LIFForward&, int threads, bool streaming);   \
  void lif_backward(const LIFSpec&, const LIFShape&, const LIFBackward&, int threads, bool streaming); \
  }
SNN_DECLARE(baseline)
SNN_DECLARE(avx2)
SNN_DECLARE(avx512)
#undef SNN_DECLARE
