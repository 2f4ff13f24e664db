// The LIF on the CPU. Compiled once per instruction set, in the namespace SNN_ISA; dispatch.cpp picks one at run time.
//
// Neurons are cut into tiles whose state stays in the cache for all T steps:
//   forward    read a row of x (one step of one tile), step the neurons, write a row of spikes
//   backward   in chunks of kChunk steps, last to first: recompute h from the v kept at their start, then the adjoint
// Rows of one tile lie far apart in memory, which hardware prefetchers do not follow, so each row asks for the one
// kAhead reads later. 16-bit numbers become float in registers. Inner dimensions too narrow for vectors are gathered
// into rows of the stage, a chunk at a time.
#include <algorithm>
#include <type_traits>

#include "../neuron.h"
#include "kernels.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kLanes = 1024;        // neurons in a tile
constexpr int kAhead = 2;           // rows between a prefetch and its use
constexpr int64_t kNarrow = 32;     // inner dimensions below this are gathered into tiles
constexpr int64_t kSerial = 16384;  // elements below which a second thread costs more than it brings

template <class IO>
using State = std::conditional_t<std::is_same_v<IO, double>, double, float>;

struct Tile {
  int64_t first;  // index of its first neuron in [outer * inner]
  int lanes;
};

struct Tiling {
  int64_t inner, row, per_row, count;
  int lanes;
  bool narrow;

  Tiling(const LIFShape& s, int threads) : inner(s.inner), narrow(s.outer > 1 && s.inner < kNarrow) {
    row = narrow ? s.outer * s.inner : s.inner;  // neurons that tiles may span
    const int64_t rows = narrow ? 1 : s.outer;
    const int64_t share = (row * rows + threads - 1) / threads;  // every thread gets a tile
    lanes = int(std::clamp<int64_t>((share + 31) / 32 * 32, 32, kLanes));
    per_row = (row + lanes - 1) / lanes;
    count = rows * per_row;
  }
  Tile operator[](int64_t i) const {
    const int64_t at = i % per_row * lanes;
    return {i / per_row * row + at, int(std::min<int64_t>(lanes, row - at))};
  }
};

template <class IO>
struct Sequence {  // an [outer, steps, inner] tensor
  IO* data;
  int64_t outer_stride, step_stride, inner;

  IO* at(int64_t neuron, int64_t t) const {
    return data + neuron / inner * outer_stride + t * step_stride + neuron % inner;
  }
};

template <class IO, class S>
void gather(const Sequence<const IO>& from, Tile tile, int64_t t, int steps, S* stage) {
  for (int j = 0; j < tile.lanes; ++j) {
    const IO* x = from.at(tile.first + j, t);
    for (int k = 0; k < steps; ++k) stage[k * kLanes + j] = load<S>(x + k * from.step_stride);
  }
}
template <class IO, class S>
void scatter(const Sequence<IO>& to, Tile tile, int64_t t, int steps, const S* stage) {
  for (int j = 0; j < tile.lanes; ++j) {
    IO* y = to.at(tile.first + j, t);
    for (int k = 0; k < steps; ++k) store(y + k * to.step_stride, stage[k * kLanes + j], false);
  }
}

template <class S>
void start(S* v, const S* from, S constant, Tile tile) {
  if (from)
    std::copy_n(from + tile.first, tile.lanes, v);
  else
    std::fill_n(v, tile.lanes, constant);
}

// Calls f(j, V{}) for vectors of lanes and f(j, S{}) for single ones: those before `out` is aligned and those left
// over.
template <class S, class IO, class F>
inline void for_lanes(int lanes, const IO* out, F&& f) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  constexpr intptr_t bytes = width * sizeof(IO);
  const int head = std::min<int>(lanes, int((-reinterpret_cast<intptr_t>(out) & (bytes - 1)) / sizeof(IO)));
  int j = 0;
  for (; j < head; ++j) f(j, S{});
  for (; j + width <= lanes; j += width) f(j, V{});
  for (; j < lanes; ++j) f(j, S{});
}

// One step of a tile: spikes into `out`.
template <Leak form, bool hard, class IO, class S>
void step(const Neuron<S>& neuron, const IO* x, const IO* ahead, S* v, IO* out, int lanes, bool streaming) {
  const Neuron<S> n = neuron;
  for_lanes<S>(lanes, out, [&](int j, auto width) __attribute__((always_inline)) {
    using V = decltype(width);
    __builtin_prefetch(ahead + j);
    const V h = charge(form, n, load<V>(v + j), load<V>(x + j));
    const V spike = h > n.fire_above ? S(1) : S(0);
    store(v + j, reset(hard, n, h), false);
    store(out + j, spike, streaming);
  });
}

// The same step, of which backward keeps the potential h.
template <Leak form, bool hard, class IO, class S>
void step_again(const Neuron<S>& neuron, const IO* x, const IO* ahead, S* v, S* h_row, int lanes) {
  const Neuron<S> n = neuron;
  for_lanes<S>(lanes, h_row, [&](int j, auto width) __attribute__((always_inline)) {
    using V = decltype(width);
    __builtin_prefetch(ahead + j);
    const V h = charge(form, n, load<V>(v + j), load<V>(x + j));
    store(v + j, reset(hard, n, h), false);
    store(h_row + j, h, false);
  });
}

// One step of the adjoint; grad_v becomes that of the step before.
template <class Curve, class IO, class S>
void step_back(const Neuron<S>& neuron, const S* h, const IO* grad_s, const IO* ahead, S* grad_v, IO* grad_x, int lanes,
               bool streaming) {
  const Neuron<S> n = neuron;
  for_lanes<S>(lanes, grad_x, [&](int j, auto width) __attribute__((always_inline)) {
    using V = decltype(width);
    __builtin_prefetch(ahead + j);
    const V gh = adjoint<Curve>(n, load<V>(h + j), load<V>(grad_s + j), load<V>(grad_v + j));
    store(grad_v + j, gh * n.state_gain, false);
    store(grad_x + j, gh * n.input_gain, streaming);
  });
}

// Calls f with the form and the reset as constants.
template <class F>
void with_form(const LIFSpec& p, F&& f) {
  const auto with_reset = [&](auto form) { p.hard ? f(form, std::true_type{}) : f(form, std::false_type{}); };
  switch (p.form) {
    case Leak::decay: return with_reset(std::integral_constant<Leak, Leak::decay>{});
    case Leak::tau_input: return with_reset(std::integral_constant<Leak, Leak::tau_input>{});
    case Leak::tau: return with_reset(std::integral_constant<Leak, Leak::tau>{});
  }
}

template <class IO, class S = State<IO>>
void forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  const Tiling tiles(s, threads);
  const Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, s.inner};
  const Sequence<IO> spikes{static_cast<IO*>(a.spikes), s.steps * s.inner, s.inner, s.inner};
  const auto* v0 = static_cast<const S*>(a.v);
  auto *v_last = static_cast<S*>(a.v_last), *saved = static_cast<S*>(a.saved);
  const Neuron<S> n(p);

  with_form(p, [&](auto form, auto hard) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Tile tile = tiles[i], next = tiles[std::min(i + 1, tiles.count - 1)];
      alignas(64) S v[kLanes], stage[kChunk * kLanes];
      start(v, v0, n.v_start, tile);
      for (int64_t t = 0; t < s.steps; t += kChunk) {
        const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
        if (saved && t > 0) std::copy_n(v, tile.lanes, saved + (t / kChunk - 1) * s.outer * s.inner + tile.first);
        if (tiles.narrow) {
          gather(x, tile, t, steps, stage);
          for (int k = 0; k < steps; ++k) {
            S* row = stage + k * kLanes;
            step<form(), hard()>(n, row, row, v, row, tile.lanes, false);
          }
          scatter(spikes, tile, t, steps, stage);
        } else {
          for (int64_t u = t; u < t + steps; ++u) {
            const int64_t later = u + kAhead;
            const IO* ahead = later < s.steps ? x.at(tile.first, later) : x.at(next.first, (later - s.steps) % s.steps);
            step<form(), hard()>(n, x.at(tile.first, u), ahead, v, spikes.at(tile.first, u), tile.lanes, streaming);
          }
        }
      }
      std::copy_n(v, tile.lanes, v_last + tile.first);
      if (streaming) stream_fence();
    }
  });
}

template <class IO, class S = State<IO>>
void backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  const Tiling tiles(s, threads);
  const Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, s.inner};
  const Sequence<const IO> grad_s{static_cast<const IO*>(a.grad_spikes), s.steps * s.inner, s.inner, s.inner};
  const Sequence<IO> grad_x{static_cast<IO*>(a.grad_x), s.steps * s.inner, s.inner, s.inner};
  const auto *v0 = static_cast<const S*>(a.v), *saved = static_cast<const S*>(a.saved);
  const auto* grad_v_last = static_cast<const S*>(a.grad_v_last);
  auto* grad_v0 = static_cast<S*>(a.grad_v);
  const Neuron<S> n(p);
  const int64_t chunks = (s.steps + kChunk - 1) / kChunk;
  static constexpr S zeros[kLanes] = {};

  // A chunk in two passes, so that the form of the neuron and the surrogate do not multiply.
  const auto recompute = [&](Tile tile, int64_t t, int steps, S* v, S* stage, S* h) {
    with_form(p, [&](auto form, auto hard) {
      if (tiles.narrow) gather(x, tile, t, steps, stage);
      for (int k = 0; k < steps; ++k) {
        S* h_row = h + k * kLanes;
        if (tiles.narrow) {
          S* row = stage + k * kLanes;
          step_again<form(), hard()>(n, row, row, v, h_row, tile.lanes);
          continue;
        }
        const int later = k + kAhead;
        const IO* ahead = later < steps || !a.grad_spikes
                              ? x.at(tile.first, t + std::min(later, steps - 1))
                              : grad_s.at(tile.first, t + std::max(0, 2 * steps - 1 - later));
        step_again<form(), hard()>(n, x.at(tile.first, t + k), ahead, v, h_row, tile.lanes);
      }
    });
  };

  with_surrogate(p.surrogate, [&](auto curve) {
    using Curve = decltype(curve);
    const auto back = [&](Tile tile, int64_t t, int steps, const IO* upcoming, int64_t upcoming_stride, const S* h,
                          S* stage, S* grad_v) {
      if (tiles.narrow && a.grad_spikes) gather(grad_s, tile, t, steps, stage);
      for (int k = steps - 1; k >= 0; --k) {
        const S* h_row = h + k * kLanes;
        if (tiles.narrow) {
          S* row = stage + k * kLanes;
          step_back<Curve>(n, h_row, a.grad_spikes ? row : zeros, row, grad_v, row, tile.lanes, false);
          continue;
        }
        IO* to = grad_x.at(tile.first, t + k);
        const int later = k - kAhead;
        const IO* ahead = later >= 0 && a.grad_spikes ? grad_s.at(tile.first, t + later)
                                                      : upcoming + std::max(0, -1 - later) * upcoming_stride;
        const IO* from = a.grad_spikes ? grad_s.at(tile.first, t + k) : reinterpret_cast<const IO*>(zeros);
        step_back<Curve>(n, h_row, from, ahead, grad_v, to, tile.lanes, streaming);
      }
      if (tiles.narrow) scatter(grad_x, tile, t, steps, stage);
    };

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Tile tile = tiles[i], next = tiles[std::min(i + 1, tiles.count - 1)];
      alignas(64) S v[kLanes], grad_v[kLanes], h[kChunk * kLanes], stage[kChunk * kLanes];
      start(grad_v, grad_v_last, S(0), tile);
      for (int64_t c = chunks - 1; c >= 0; --c) {
        const int64_t t = c * kChunk;
        const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
        start(v, c > 0 ? saved + (c - 1) * s.outer * s.inner : v0, n.v_start, tile);
        recompute(tile, t, steps, v, stage, h);
        const IO* upcoming = c > 0 ? x.at(tile.first, t - kChunk) : x.at(next.first, (chunks - 1) * kChunk);
        back(tile, t, steps, upcoming, s.x_step_stride, h, stage, grad_v);
      }
      if (grad_v0) std::copy_n(grad_v, tile.lanes, grad_v0 + tile.first);
      if (streaming) stream_fence();
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

int useful_threads(const LIFShape& s, int threads) { return s.outer * s.steps * s.inner < kSerial ? 1 : threads; }

}  // namespace

void lif_forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { forward<decltype(io)>(p, s, a, useful_threads(s, threads), streaming); });
}
void lif_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { backward<decltype(io)>(p, s, a, useful_threads(s, threads), streaming); });
}

}  // namespace snnkern::SNN_ISA
