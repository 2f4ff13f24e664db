// Runs the body of the CUDA kernels on the host, one thread after the other: the same source that the device compiles,
// with the same strides, vector widths and chunks. Called from test_cuda.py through ctypes.
#include <vector>

#include "../csrc/cuda/lif.cu"
#include "../csrc/cuda/pack.cu"
#include "../csrc/cuda/ttm.cu"

namespace {
using namespace snnkern;

// Calls f with the number of every thread of a launch.
template <class F>
void each(const dim3& grid, int block, F&& f) {
  for (int64_t i = 0; i < int64_t(grid.x) * block; ++i)
    for (int64_t segment = 0; segment < grid.y; ++segment) f(i, segment);
}

template <class IO, int kVec>
void forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a) {
  const Neuron<float> n(p);
  const auto* x = static_cast<const IO*>(a.x);
  auto* spikes = static_cast<IO*>(a.spikes);
  auto *v_last = static_cast<float*>(a.v_last), *saved = static_cast<float*>(a.saved);
  auto* scratch = static_cast<float*>(a.scratch);
  each(grid(s, kVec, kForwardThreads, s.segments), kForwardThreads, [&](int64_t i, int64_t segment) {
    forward_thread<IO, kVec>(i, segment, n, s, x, static_cast<const float*>(a.v), spikes, v_last, saved, scratch);
  });
  if (s.segments > 1)
    each(grid(s, 1, kForwardThreads, 1), kForwardThreads,
         [&](int64_t i, int64_t) { repair_thread<IO>(i, n, s, x, spikes, v_last, saved, scratch); });
}

template <class IO, int kVec, bool kMap = false>
void backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a) {
  if constexpr (kVec == 1 && !kMap)
    if (s.segments > 1) backward<IO, 1, true>(p, s, a);
  const Neuron<float> n(p);
  std::vector<Pack<float, kVec>> column(kChunk);
  constexpr int block = kBackwardThreads<kVec>;
  each(grid(s, kVec, block, s.segments - int(kMap)), block, [&](int64_t i, int64_t segment) {
    backward_thread<IO, kVec, kMap>(i, segment + int(kMap), column.data(), 1, n, s, static_cast<const IO*>(a.x),
                                    static_cast<const float*>(a.v), static_cast<const float*>(a.saved),
                                    static_cast<const IO*>(a.grad_spikes), static_cast<const float*>(a.grad_v_last),
                                    static_cast<IO*>(a.grad_x), static_cast<float*>(a.grad_v),
                                    static_cast<float*>(a.scratch));
  });
}

LIFSpec spec_of(const int* flags, const double* numbers) {
  return {Leak(flags[0]), numbers[0], numbers[1],     bool(flags[1]),      bool(flags[2]),
          numbers[2],     numbers[3], bool(flags[3]), Surrogate(flags[4]), {numbers[4], numbers[5], numbers[6]}};
}
LIFShape shape_of(const int64_t* sizes) {
  return {DType(sizes[0]), sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
}
}  // namespace

extern "C" void lif_forward_host(const int* flags, const double* numbers, const int64_t* sizes, void** t, int wide) {
  const LIFShape s = shape_of(sizes);
  with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const LIFForward a{t[0], t[1], t[2], t[3], t[4], t[5]};
    wide ? forward<IO, 16 / sizeof(IO)>(spec_of(flags, numbers), s, a) : forward<IO, 1>(spec_of(flags, numbers), s, a);
    return 0;
  });
}
extern "C" void lif_backward_host(const int* flags, const double* numbers, const int64_t* sizes, void** t, int wide) {
  const LIFShape s = shape_of(sizes);
  with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const LIFBackward a{t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]};
    wide ? backward<IO, 16 / sizeof(IO)>(spec_of(flags, numbers), s, a)
         : backward<IO, 1>(spec_of(flags, numbers), s, a);
    return 0;
  });
}
extern "C" void ttm_host(const int64_t* sizes, const void* x, void* y) {
  const TTMShape s{DType(sizes[0]), sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const auto each_thread = [&](auto vec) {
      for (int64_t i = 0; i < int64_t(blocks(s, vec())) * kThreads; ++i)
        ttm_thread<IO, vec()>(i, s, static_cast<const IO*>(x), static_cast<IO*>(y));
    };
    constexpr int vec = 16 / sizeof(IO);
    wide<IO>(s, x, y) ? each_thread(std::integral_constant<int, vec>{}) : each_thread(std::integral_constant<int, 1>{});
    return 0;
  });
}
extern "C" void pack_host(int dtype, int64_t n, const void* x, uint8_t* bits, int32_t* other) {
  with_one(DType(dtype), [&](auto one) {
    const auto* from = static_cast<const decltype(one)*>(x);
    each(blocks(n), kPackThreads,
         [&](int64_t i, int64_t) { pack_thread(i, n, one, aligned(x, 16), from, bits, other); });
    return 0;
  });
}
extern "C" void unpack_host(int dtype, int64_t n, const uint8_t* bits, void* x) {
  with_one(DType(dtype), [&](auto one) {
    auto* to = static_cast<decltype(one)*>(x);
    each(blocks(n), kPackThreads, [&](int64_t i, int64_t) { unpack_thread(i, n, one, aligned(x, 16), bits, to); });
    return 0;
  });
}
