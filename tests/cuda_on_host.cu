// Runs the body of the CUDA kernels on the host, one thread after the other: the same source that the device compiles,
// with the same strides, vector widths and chunks. Called from test_cuda.py through ctypes.
#include <vector>

#include "../csrc/cuda/lif.cu"

namespace {
using namespace snnkern;

template <class IO, int kVec>
void forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a) {
  const Neuron<float> n(p);
  const int64_t threads = int64_t(blocks(s, kVec, kForwardThreads)) * kForwardThreads;
  for (int64_t i = 0; i < threads; ++i)
    forward_thread<IO, kVec>(i, n, s, static_cast<const IO*>(a.x), static_cast<const float*>(a.v),
                             static_cast<IO*>(a.spikes), static_cast<float*>(a.v_last), static_cast<float*>(a.saved));
}

template <class IO, int kVec>
void backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a) {
  const Neuron<float> n(p);
  const int64_t threads = int64_t(blocks(s, kVec, kBackwardThreads<kVec>)) * kBackwardThreads<kVec>;
  std::vector<Pack<float, kVec>> column(kChunk);
  for (int64_t i = 0; i < threads; ++i)
    backward_thread<IO, kVec>(i, column.data(), 1, n, s, static_cast<const IO*>(a.x), static_cast<const float*>(a.v),
                              static_cast<const float*>(a.saved), static_cast<const IO*>(a.grad_spikes),
                              static_cast<const float*>(a.grad_v_last), static_cast<IO*>(a.grad_x),
                              static_cast<float*>(a.grad_v));
}

LIFSpec spec_of(const int* flags, const double* numbers) {
  return {Leak(flags[0]), numbers[0], numbers[1],     bool(flags[1]),      bool(flags[2]),
          numbers[2],     numbers[3], bool(flags[3]), Surrogate(flags[4]), {numbers[4], numbers[5], numbers[6]}};
}
LIFShape shape_of(const int64_t* sizes) { return {DType(sizes[0]), sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]}; }
}  // namespace

extern "C" void lif_forward_host(const int* flags, const double* numbers, const int64_t* sizes, void** t, int wide) {
  const LIFShape s = shape_of(sizes);
  with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const LIFForward a{t[0], t[1], t[2], t[3], t[4]};
    wide ? forward<IO, 16 / sizeof(IO)>(spec_of(flags, numbers), s, a) : forward<IO, 1>(spec_of(flags, numbers), s, a);
    return 0;
  });
}
extern "C" void lif_backward_host(const int* flags, const double* numbers, const int64_t* sizes, void** t, int wide) {
  const LIFShape s = shape_of(sizes);
  with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const LIFBackward a{t[0], t[1], t[2], t[3], t[4], t[5], t[6]};
    wide ? backward<IO, 16 / sizeof(IO)>(spec_of(flags, numbers), s, a)
         : backward<IO, 1>(spec_of(flags, numbers), s, a);
    return 0;
  });
}
