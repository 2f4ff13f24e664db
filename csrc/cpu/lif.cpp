// The LIF on the CPU. Compiled once per instruction set (SNN_ISA names the namespace); dispatch.cpp picks one at run time.
//
// Neurons are cut into tiles. A tile stays in the cache for all T steps and walks over time in chunks of kChunk:
//   forward    load a chunk of x, step the neurons, store a chunk of spikes; v never leaves L1
//   backward   from the last chunk to the first: recompute h from the v kept at the chunk's start, then run the adjoint
// A chunk is used where it lies if its rows are contiguous and need no conversion; else it is staged through L1, which is
// also where 16-bit numbers become float, narrow inner dimensions are transposed, and large outputs are streamed past
// the cache.
#include <algorithm>
#include <type_traits>

#include "../neuron.h"
#include "convert.h"
#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace snnkern::SNN_ISA {
namespace {

constexpr int kLanes = 512;         // neurons in a tile
constexpr int64_t kNarrow = 32;     // inner dimensions below this are gathered into tiles
constexpr int64_t kSerial = 16384;  // elements below which a second thread costs more than it brings

template <class IO>
using State = std::conditional_t<std::is_same_v<std::remove_const_t<IO>, double>, double, float>;

struct Tile {
  int64_t first;  // index of its first neuron in [outer * inner]
  int lanes;
};

struct Tiling {
  int64_t outer, inner, count, per_row;
  int lanes;
  bool narrow;

  Tiling(const LIFShape& s, int threads) : outer(s.outer), inner(s.inner) {
    narrow = outer > 1 && inner < kNarrow;
    const int64_t row = narrow ? outer * inner : inner, rows = narrow ? 1 : outer;
    const int64_t share = (row * rows + threads - 1) / threads;  // every thread gets a tile
    lanes = int(std::clamp<int64_t>((share + 31) / 32 * 32, 32, kLanes));
    per_row = (row + lanes - 1) / lanes;
    count = rows * per_row;
  }
  Tile tile(int64_t i) const {
    const int64_t row = narrow ? outer * inner : inner, at = i % per_row * lanes;
    return {i / per_row * row + at, int(std::min<int64_t>(lanes, row - at))};
  }
};

template <class S>
struct Rows {  // kChunk rows of a tile: step k's neurons are at data + k*stride
  S* data;
  int64_t stride;
  S* operator[](int k) const { return data + k * stride; }
};

// Copies past the cache: an output that nobody reads before it would be evicted need not be read in first.
void stream(void* to, const void* from, size_t bytes) {
  auto* d = static_cast<char*>(to);
  auto* s = static_cast<const char*>(from);
#if defined(__x86_64__)
  const size_t head = std::min(bytes, size_t(-reinterpret_cast<intptr_t>(d) & 63));
  std::memcpy(d, s, head);
  for (d += head, s += head, bytes -= head; bytes >= 64; d += 64, s += 64, bytes -= 64)
    for (int i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(d + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
#endif
  std::memcpy(d, s, bytes);
}

void fence() {  // streamed stores become visible before the parallel region ends
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class IO>
struct Sequence {  // an [outer, steps, inner] tensor seen tile by tile
  using S = State<IO>;
  IO* data;
  int64_t outer_stride, step_stride;
  const Tiling& tiling;

  static constexpr bool converts = !std::is_same_v<std::remove_const_t<IO>, S>;

  IO* at(int64_t neuron, int64_t t) const {
    return data + neuron / tiling.inner * outer_stride + t * step_stride + neuron % tiling.inner;
  }
  bool in_place() const { return !converts && !tiling.narrow; }

  Rows<const S> read(Tile tile, int64_t t, int steps, S* stage) const {
    if constexpr (!converts)
      if (!tiling.narrow) return {at(tile.first, t), step_stride};
    if (tiling.narrow) {
      for (int j = 0; j < tile.lanes; ++j) {
        const IO* from = at(tile.first + j, t);
        for (int k = 0; k < steps; ++k) stage[k * kLanes + j] = load(from[k * step_stride]);
      }
    } else {
      for (int k = 0; k < steps; ++k) {
        const IO* from = at(tile.first, t + k);
        S* to = stage + k * kLanes;
#pragma omp simd
        for (int j = 0; j < tile.lanes; ++j) to[j] = load(from[j]);
      }
    }
    return {stage, kLanes};
  }

  // Asks for step t of a tile ahead of its use: rows of one tile lie far apart, which hardware prefetchers do not follow.
  void prefetch(Tile tile, int64_t t) const {
    if (tiling.narrow) return;
    const auto* row = reinterpret_cast<const char*>(at(tile.first, t));
    for (int64_t i = 0; i < tile.lanes * int64_t(sizeof(IO)); i += 64) __builtin_prefetch(row + i, 0, 2);
  }

  Rows<S> target(Tile tile, int64_t t, bool streaming, S* stage) const {
    if constexpr (!converts)
      if (!tiling.narrow && !streaming) return {at(tile.first, t), step_stride};
    return {stage, kLanes};
  }

  void write(Tile tile, int64_t t, int steps, bool streaming, const S* stage) const {
    if (in_place() && !streaming) return;
    if (tiling.narrow) {
      for (int j = 0; j < tile.lanes; ++j) {
        IO* to = at(tile.first + j, t);
        for (int k = 0; k < steps; ++k) store(to[k * step_stride], stage[k * kLanes + j]);
      }
      return;
    }
    for (int k = 0; k < steps; ++k) {
      const S* from = stage + k * kLanes;
      IO* to = at(tile.first, t + k);
      if constexpr (converts) {
        IO row[kLanes];
        IO* out = streaming ? row : to;
#pragma omp simd
        for (int j = 0; j < tile.lanes; ++j) store(out[j], from[j]);
        if (streaming) stream(to, row, tile.lanes * sizeof(IO));
      } else {
        stream(to, from, tile.lanes * sizeof(S));
      }
    }
  }
};

template <class S>
void start(S* __restrict v, const S* from, S constant, int lanes) {
  if (from)
    std::copy_n(from, lanes, v);
  else
    std::fill_n(v, lanes, constant);
}

// Calls f(j, V{}) for vectors of lanes and f(j, S{}) for those left over.
template <class S, class F>
inline void for_lanes(int lanes, F&& f) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  int j = 0;
  for (; j + width <= lanes; j += width) f(j, V{});
  for (; j < lanes; ++j) f(j, S{});
}

// One step of a tile. Backward asks for the potential h instead of the spike.
template <Leak form, bool hard, bool keep_h, class S>
void step(const Neuron<S>& neuron, const S* __restrict x, S* __restrict v, S* __restrict out, int lanes) {
  const Neuron<S> n = neuron;
  for_lanes<S>(lanes, [&](int j, auto width) {
    using V = decltype(width);
    const V h = charge(form, n, load_as<V>(v + j), load_as<V>(x + j));
    const V spike = h > n.fire_above ? S(1) : S(0);
    store_as(out + j, keep_h ? h : spike);
    store_as(v + j, reset(hard, n, h));
  });
}

template <bool keep_h, class S>
auto pick_step(const LIFSpec& p) {
  using F = void (*)(const Neuron<S>&, const S*, S*, S*, int);
  static constexpr F table[3][2] = {
      {step<Leak::decay, false, keep_h, S>, step<Leak::decay, true, keep_h, S>},
      {step<Leak::tau_input, false, keep_h, S>, step<Leak::tau_input, true, keep_h, S>},
      {step<Leak::tau, false, keep_h, S>, step<Leak::tau, true, keep_h, S>}};
  return table[int(p.form)][p.hard];
}

template <class Curve, class S>
void step_back(const Neuron<S>& neuron, const S* __restrict h, const S* __restrict grad_s, S* __restrict grad_v,
               S* __restrict grad_x, int lanes) {
  const Neuron<S> n = neuron;
  for_lanes<S>(lanes, [&](int j, auto width) {
    using V = decltype(width);
    const V gh = adjoint<Curve>(n, load_as<V>(h + j), load_as<V>(grad_s + j), load_as<V>(grad_v + j));
    store_as(grad_x + j, gh * n.input_gain);
    store_as(grad_v + j, gh * n.state_gain);
  });
}

template <class IO>
void forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  using S = State<IO>;
  const Tiling tiling(s, threads);
  const Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, tiling};
  const Sequence<IO> spikes{static_cast<IO*>(a.spikes), s.steps * s.inner, s.inner, tiling};
  const auto* v0 = static_cast<const S*>(a.v);
  auto *v_last = static_cast<S*>(a.v_last), *saved = static_cast<S*>(a.saved);
  const Neuron<S> n(p);
  const auto one_step = pick_step<false, S>(p);

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tiling.count; ++i) {
    const Tile tile = tiling.tile(i);
    alignas(64) S v[kLanes], in[kChunk * kLanes], out[kChunk * kLanes];
    start(v, v0 ? v0 + tile.first : nullptr, S(p.v_start), tile.lanes);
    for (int64_t t = 0; t < s.steps; t += kChunk) {
      const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
      if (saved && t > 0) std::copy_n(v, tile.lanes, saved + (t / kChunk - 1) * s.outer * s.inner + tile.first);
      const auto from = x.read(tile, t, steps, in);
      const auto to = spikes.target(tile, t, streaming, out);
      const bool last = t + kChunk >= s.steps;
      const Tile next = last ? tiling.tile(i + 1) : tile;
      const int64_t ahead = last ? 0 : t + kChunk;
      for (int k = 0; k < steps; ++k) {
        if (ahead + k < s.steps && i + 1 < tiling.count) x.prefetch(next, ahead + k);
        one_step(n, from[k], v, to[k], tile.lanes);
      }
      spikes.write(tile, t, steps, streaming, out);
    }
    std::copy_n(v, tile.lanes, v_last + tile.first);
    if (streaming) fence();
  }
}

template <class IO>
void backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  using S = State<IO>;
  const Tiling tiling(s, threads);
  const Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, tiling};
  const Sequence<const IO> grad_s{static_cast<const IO*>(a.grad_spikes), s.steps * s.inner, s.inner, tiling};
  const Sequence<IO> grad_x{static_cast<IO*>(a.grad_x), s.steps * s.inner, s.inner, tiling};
  const auto *v0 = static_cast<const S*>(a.v), *saved = static_cast<const S*>(a.saved);
  const auto* grad_v_last = static_cast<const S*>(a.grad_v_last);
  auto* grad_v0 = static_cast<S*>(a.grad_v);
  const Neuron<S> n(p);
  const auto one_step = pick_step<true, S>(p);
  static constexpr S zeros[kLanes] = {};

  with_surrogate(p.surrogate, [&](auto curve) {
    using Curve = decltype(curve);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiling.count; ++i) {
      const Tile tile = tiling.tile(i);
      alignas(64) S v[kLanes], grad_v[kLanes], h[kChunk * kLanes], in[kChunk * kLanes], out[kChunk * kLanes];
      start(grad_v, grad_v_last ? grad_v_last + tile.first : nullptr, S(0), tile.lanes);
      for (int64_t t = (s.steps - 1) / kChunk * kChunk; t >= 0 && s.steps > 0; t -= kChunk) {
        const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
        const S* kept = t > 0 ? saved + (t / kChunk - 1) * s.outer * s.inner : v0;
        start(v, kept ? kept + tile.first : nullptr, S(p.v_start), tile.lanes);
        const auto from = x.read(tile, t, steps, in);
        for (int k = 0; k < steps; ++k) {
          if (a.grad_spikes) grad_s.prefetch(tile, t + steps - 1 - k);
          one_step(n, from[k], v, h + k * kLanes, tile.lanes);
        }
        const auto upstream = a.grad_spikes ? grad_s.read(tile, t, steps, in) : Rows<const S>{zeros, 0};
        const auto to = grad_x.target(tile, t, streaming, out);
        const Tile next = t == 0 ? tiling.tile(i + 1) : tile;
        const int64_t ahead = t == 0 ? (s.steps - 1) / kChunk * kChunk : t - kChunk;
        for (int k = steps - 1; k >= 0; --k) {
          const int64_t r = ahead + steps - 1 - k;
          if (r < s.steps && (t > 0 || i + 1 < tiling.count)) x.prefetch(next, r);
          step_back<Curve>(n, h + k * kLanes, upstream[k], grad_v, to[k], tile.lanes);
        }
        grad_x.write(tile, t, steps, streaming, out);
      }
      if (grad_v0) std::copy_n(grad_v, tile.lanes, grad_v0 + tile.first);
      if (streaming) fence();
    }
  });
}

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
  }
}

int useful_threads(const LIFShape& s, int threads) {
  return s.outer * s.steps * s.inner < kSerial ? 1 : threads;
}

}  // namespace

void lif_forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { forward<decltype(io)>(p, s, a, useful_threads(s, threads), streaming); });
}
void lif_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { backward<decltype(io)>(p, s, a, useful_threads(s, threads), streaming); });
}

}  // namespace snnkern::SNN_ISA
