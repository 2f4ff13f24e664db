// Runs the body of the CUDA kernels on the host, one thread after the other: the same source that the device compiles,
// with the same strides, vector widths, chunks, and order of sums. Called from test_cuda.py through ctypes.
#include <vector>

#include "../csrc/cuda/lif.cu"
#include "../csrc/cuda/norm.cu"
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

template <class IO, int kVec, int kLanes>
int forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a) {
  const Neuron<float> n(p);
  const auto *x = static_cast<const IO*>(a.x), *residual = static_cast<const IO*>(a.norm.residual);
  auto* spikes = static_cast<IO*>(a.spikes);
  auto *v_last = static_cast<float*>(a.v_last), *saved = static_cast<float*>(a.saved);
  auto* scratch = static_cast<float*>(a.scratch);
  each(grid(s, kVec, kForwardThreads, s.segments), kForwardThreads, [&](int64_t i, int64_t segment) {
    forward_thread<IO, kVec, kLanes>(i, segment, n, s, a.norm, x, residual, static_cast<const float*>(a.v), spikes,
                                     v_last, saved, scratch);
  });
  if (s.segments > 1)
    each(grid(s, 1, kForwardThreads, 1), kForwardThreads,
         [&](int64_t i, int64_t) { repair_thread<IO>(i, n, s, x, spikes, v_last, saved, scratch); });
  return 0;
}

template <class IO, int kVec>
struct OwnColumn {
  std::vector<Pack<float, kVec>> h{kChunk};
  std::vector<Pack<IO, kVec>> x{kChunk};
  operator Column<IO, kVec>() { return {h.data(), x.data(), 1}; }
};

template <class IO, int kVec, int kLanes, bool kMap = false>
int backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a) {
  if constexpr (kVec == 1 && kLanes == 0 && !kMap)
    if (s.segments > 1) backward<IO, 1, 0, true>(p, s, a);
  const Neuron<float> n(p);
  OwnColumn<IO, kVec> column;
  constexpr int block = kBackwardThreads<kVec, kLanes>;
  each(grid(s, kVec, block, s.segments - int(kMap)), block, [&](int64_t i, int64_t segment) {
    backward_thread<IO, kVec, kLanes, kMap>(
        i, segment + int(kMap), column, n, s, a.norm, static_cast<const IO*>(a.x),
        static_cast<const IO*>(a.norm.residual), static_cast<const float*>(a.v), static_cast<const float*>(a.saved),
        static_cast<const IO*>(a.grad_spikes), static_cast<const float*>(a.grad_v_last),
        static_cast<const float*>(a.pull_push), static_cast<IO*>(a.grad_x), static_cast<IO*>(a.grad_residual),
        static_cast<float*>(a.grad_v), static_cast<float*>(a.scratch));
  });
  return 0;
}

// Every block's threads one after the other up to each barrier; find(share, thread, found) is what comes before the
// first.
template <int kVec, int kLanes, class Find>
void sum(const Norm& m, int64_t parts, int64_t rows, int threads, double* to, Find&& find) {
  std::vector<double> memory(Sum<kVec, kLanes>::kDoublesAThread * threads);
  for (int64_t block = 0; block < parts * bands(m); ++block) {
    const Share<kVec> share(m, block, parts, rows, threads);
    const Sum<kVec, kLanes> sum{share, memory.data()};
    for (int i = 0; i < threads; ++i) {
      double found[2][kLanes] = {};
      find(share, i, found);
      sum.put(i, found);
    }
    for (int left = sum.rows(); left > 1; left = (left + 1) / 2)
      for (int i = 0; i < threads; ++i) sum.halve(i, threads, left);
    for (int i = 0; i < threads; ++i) sum.finish(i, threads, m, to);
  }
}

template <class IO, int kVec, int kLanes>
int sums(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* to) {
  OwnColumn<IO, kVec> column;
  const auto find = [&](const Share<kVec>& share, int thread, double (&found)[2][kLanes]) {
    sums_thread<IO, kVec, kLanes>(thread, share, column, Neuron<float>(p), s, a.norm, static_cast<const IO*>(a.x),
                                  static_cast<const IO*>(a.norm.residual), static_cast<const float*>(a.v),
                                  static_cast<const float*>(a.saved), static_cast<const IO*>(a.grad_spikes),
                                  static_cast<const float*>(a.grad_v_last), found);
  };
  sum<kVec, kLanes>(a.norm, norm_parts_cuda(s, a.norm), runs_of(s, a.norm), kBackwardThreads<kVec, kLanes>, to, find);
  return 0;
}

template <class IO, int kVec, int kLanes>
int moments(const LIFShape& s, const Norm& m, const IO* x, double* to) {
  const int64_t parts = norm_parts_cuda(s, m);
  sum<kVec, kLanes>(m, parts, moment_rows(s, m), kMomentThreads, to,
                    [&](const Share<kVec>& share, int thread, double (&found)[2][kLanes]) {
                      moments_thread<IO, kVec, kLanes>(thread, share, s, m, runs_of(s, m), x, found);
                    });
  for (int64_t c = 0; c < m.channels; ++c) to[2 * parts * m.channels + c] = shift_of(s, m, c, x);
  return 0;
}

struct Call {  // the arguments of most of the functions below
  LIFSpec p;
  LIFShape s;
  Norm m;

  Call(const int* flags, const double* numbers, const int64_t* sizes, const void* table, const void* residual)
      : p{Leak(flags[0]), numbers[0], numbers[1],     bool(flags[1]),      bool(flags[2]),
          numbers[2],     numbers[3], bool(flags[3]), Surrogate(flags[4]), {numbers[4], numbers[5], numbers[6]}},
        s(shape(sizes)),
        m{sizes[10], sizes[11], table, residual} {}
  static LIFShape shape(const int64_t* n) {
    return {DType(n[0]), n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
  }
};
}  // namespace

extern "C" {
void lif_forward_host(const int* flags, const double* numbers, const int64_t* sizes, void** t, int wanted) {
  const Call c(flags, numbers, sizes, t[6], t[7]);
  const LIFForward a{t[0], t[1], t[2], t[3], t[4], t[5], c.m};
  const auto wide = [&](int vec) { return wanted && fits(c.s, vec, {t[0], t[1], t[2], t[3], t[4], t[7]}); };
  with_io(c.s.dtype, [&](auto io) {
    using IO = decltype(io);
    constexpr int vec = 16 / sizeof(IO);
    return with_widths<vec, vec>(c.s, c.m, wide,
                                 [&](auto vec, auto lanes) { return forward<IO, vec(), lanes()>(c.p, c.s, a); });
  });
}
void lif_backward_host(const int* flags, const double* numbers, const int64_t* sizes, void** t, int wanted) {
  const Call c(flags, numbers, sizes, t[8], t[9]);
  const LIFBackward a{t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], c.m, t[10], t[11]};
  const auto wide = [&](int vec) {
    return wanted && fits(c.s, vec, {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[9], t[11]});
  };
  with_io(c.s.dtype, [&](auto io) {
    using IO = decltype(io);
    return with_widths<16 / sizeof(IO), kNormBackwardVec>(
        c.s, c.m, wide, [&](auto vec, auto lanes) { return backward<IO, vec(), lanes()>(c.p, c.s, a); });
  });
}
void sums_host(const int* flags, const double* numbers, const int64_t* sizes, void** t, int wanted) {
  const Call c(flags, numbers, sizes, t[6], t[7]);
  const LIFBackward a{t[0], t[1], t[2], t[3], t[4], nullptr, nullptr, nullptr, c.m, nullptr, nullptr};
  const auto wide = [&](int vec) {
    return wanted && bands_fit(c.m, vec) && fits(c.s, vec, {t[0], t[1], t[2], t[3], t[4], t[7]});
  };
  with_io(c.s.dtype, [&](auto io) {
    using IO = decltype(io);
    return with_norm<kNormBackwardVec>(c.m, wide, [&](auto vec, auto lanes) {
      return sums<IO, vec(), lanes()>(c.p, c.s, a, static_cast<double*>(t[5]));
    });
  });
}
int64_t parts_host(const int64_t* sizes) {
  return norm_parts_cuda(Call::shape(sizes), Norm{sizes[10], sizes[11], nullptr, nullptr});
}
void moments_host(const int64_t* sizes, const void* x, double* to, int wanted) {
  const LIFShape s = Call::shape(sizes);
  const Norm m{sizes[10], sizes[11], nullptr, nullptr};
  with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    constexpr int vec = 16 / sizeof(IO);
    const auto* from = static_cast<const IO*>(x);
    if (!wanted || !wide<IO>(s, m, x)) return moments<IO, 1, 1>(s, m, from, to);
    return m.period % vec == 0 ? moments<IO, vec, 1>(s, m, from, to) : moments<IO, vec, vec>(s, m, from, to);
  });
}
static NormPlan plan_of(const int64_t* sizes, const double* numbers) {
  return {DType::f32, sizes[0], sizes[1], numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}
void prepare_host(const int64_t* sizes, const double* numbers, void** t) {
  const auto f = [&](int i) { return static_cast<float*>(t[i]); };
  for (int64_t c = 0; c < sizes[0]; ++c)
    prepare_channel(c, plan_of(sizes, numbers), static_cast<const double*>(t[0]), f(1), f(2), f(3), f(4), f(5));
}
void gradients_host(const int64_t* sizes, const double* numbers, void** t) {
  const auto f = [&](int i) { return static_cast<float*>(t[i]); };
  const auto d = [&](int i) { return static_cast<const double*>(t[i]); };
  for (int64_t c = 0; c < sizes[0]; ++c) gradients_channel(c, plan_of(sizes, numbers), f(0), d(1), d(2), f(3), f(4));
}
void ttm_host(const int64_t* sizes, const void* x, void* y) {
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
void pack_host(int dtype, int64_t n, const void* x, uint8_t* bits, int32_t* other) {
  with_one(DType(dtype), [&](auto one) {
    const auto* from = static_cast<const decltype(one)*>(x);
    each(blocks(n), kPackThreads,
         [&](int64_t i, int64_t) { pack_thread(i, n, one, aligned(x, 16), from, bits, other); });
    return 0;
  });
}
void unpack_host(int dtype, int64_t n, const uint8_t* bits, void* x) {
  with_one(DType(dtype), [&](auto one) {
    auto* to = static_cast<decltype(one)*>(x);
    each(blocks(n), kPackThreads, [&](int64_t i, int64_t) { unpack_thread(i, n, one, aligned(x, 16), bits, to); });
    return 0;
  });
}
}
