// The CPU kernels, one copy per instruction set; see lif.cpp, linear.cpp, recurrent.cpp, norm.cpp, pack.cpp and
// ttm.cpp.
#pragma once
#include "../lif.h"
#include "../linear.h"
#include "../norm.h"
#include "../pack.h"
#include "../ttm.h"

#define SNN_DECLARE(isa)                                                                                               \
  namespace snnkern::isa {                                                                                             \
  void lif_forward(const LIFSpec&, const LIFShape&, const LIFForward&, int threads, bool streaming);                   \
  void lif_backward(const LIFSpec&, const LIFShape&, const LIFBackward&, int threads, bool streaming);                 \
  void recurrent_forward(const LIFSpec&, const LIFShape&, const LIFForward&, const Recurrence&, int threads);          \
  void recurrent_backward(const LIFSpec&, const LIFShape&, const LIFBackward&, const Recurrence&, int threads);        \
  void recurrent_weight(const LIFSpec&, const LIFShape&, const Recurrence&, const void* grad_x, void* grad,            \
                        int threads);                                                                                  \
  int64_t norm_parts(const LIFShape&);                                                                                 \
  void moments(const LIFShape&, const Norm&, const void* x, double* moments, int threads);                             \
  void prepare(const NormPlan&, const double* moments, const NormParameters&, void* table);                            \
  void sums(const LIFSpec&, const LIFShape&, const LIFBackward&, double* sums, int threads);                           \
  void gradients(const NormPlan&, const void* table, const double* sums, const double* all_sums, void* affine,         \
                 void* pull_push);                                                                                     \
  int64_t norm_kept(const LIFShape&, const Norm&, int threads);                                                        \
  void norm_backward(const LIFSpec&, const LIFShape&, const LIFBackward&, const NormPlan&, double* sums, void* affine, \
                     int threads, bool streaming);                                                                     \
  void ttm(const TTMShape&, const void* x, void* y, int threads, bool streaming);                                      \
  bool pack(DType, int64_t n, const void* x, uint8_t* bits, int threads);                                              \
  void unpack(DType, int64_t n, const uint8_t* bits, void* x, int threads, bool streaming);                            \
  int64_t linear_count(const LinearShape&, const float* spikes, int64_t rows);                                         \
  bool linear_forward(const LinearShape&, const float* spikes, const float* weight_t, float* y, uint32_t* bits,        \
                      int threads, bool streaming);                                                                    \
  void linear_backward(const LinearShape&, const uint32_t* bits, const float* grad, float* sums, float* grad_t,        \
                       int threads);                                                                                   \
  }
SNN_DECLARE(baseline)
SNN_DECLARE(avx2)
SNN_DECLARE(avx512)
#undef SNN_DECLARE
