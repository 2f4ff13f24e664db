// The LIF on the CPU. Compiled once per instruction set, in the namespace SNN_ISA; dispatch.cpp picks one at run time.
//
// Neurons are cut into tiles whose state stays in the cache for all T steps:
//   forward    read a row of x (one step of one tile), step the neurons, write a row of spikes
//   backward   in chunks of kChunk steps, last to first: per block of a few vectors, recompute h from the v kept at the
//              chunk's start, then walk back over it, the state in registers
// The rows of a tile lie far apart in memory, which hardware prefetchers do not follow, so every access asks for one
// that comes later. 16-bit numbers become float in registers. Inner dimensions too narrow for vectors are gathered into
// rows of a stage, a chunk at a time.
//
// Segments of time are tiles like any other. Each warms up on the steps before it (in backward: after it), without
// output, and notes the state from which it then starts, and with which it ends; these are compared bit for bit, and
// what differs runs again. So all outputs, gradients too, are those of the serial loop, whatever the number of threads.
#include <algorithm>
#include <type_traits>

#include "../neuron.h"
#include "kernels.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kBlock = 8;  // vectors that backward keeps in registers
constexpr int kAhead = 2;  // rows between a prefetch and its use
constexpr int64_t kSerial = 16384;  // elements below which a second thread costs more than it brings

// The states with which the segments of a split start and end, [segments, neurons].
template <class S>
struct Seams {
  S *starts, *ends;
  int64_t segments, neurons;

  Seams(void* scratch, const LIFShape& s)
      : starts(static_cast<S*>(scratch)), segments(s.segments), neurons(s.outer * s.inner) {
    ends = starts ? starts + segments * neurons : nullptr;
  }
  void note(S* seams, const Tile& tile, const S* v) const {
    if (segments > 1) std::copy_n(v, tile.lanes, seams + tile.segment * neurons + tile.first);
  }
  // Whether every segment `by` after another starts where that one ended: then there is no need to wake the threads.
  bool all_meet(int by) const {
    const S* is = starts + std::max(by, 0) * neurons;
    const S* should = ends + std::max(-by, 0) * neurons;
    return std::memcmp(is, should, (segments - 1) * neurons * sizeof(S)) == 0;
  }
  // The lanes of `tile` whose start is not the end of the segment `from`, as far as they span.
  Tile differing(Tile tile, int64_t from) const {
    const S* is = starts + tile.segment * neurons + tile.first;
    const S* should = ends + from * neurons + tile.first;
    const auto differs = [&](int j) { return std::memcmp(is + j, should + j, sizeof(S)) != 0; };
    int first = 0, last = tile.lanes;
    while (first < last && !differs(first)) ++first;
    while (last > first && !differs(last - 1)) --last;
    tile.first += first;
    tile.lanes = last - first;
    return tile;
  }
};

template <class S>
void start(S* v, const S* from, S constant, Tile tile) {
  if (from)
    std::copy_n(from + tile.first, tile.lanes, v);
  else
    std::fill_n(v, tile.lanes, constant);
}

// One step of a tile: spikes into `out`.
template <Leak form, bool hard, class IO, class S>
void step(const Neuron<S>& neuron, const IO* x, const IO* ahead, S* v, IO* out, int lanes, bool streaming) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  const Neuron<S> n = neuron;
  const auto lane = [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    __builtin_prefetch(ahead + j);
    const W h = charge(form, n, load<W>(v + j), load<W>(x + j));
    store(v + j, reset(hard, n, h), false);
    store_spike<IO, W>(out + j, h > n.fire_above, streaming);
  };
  const int head = std::min(lanes, lanes_until_aligned<V>(out));
  int j = 0;
  for (; j < head; ++j) lane(j, S{});
  for (; j + width <= lanes; j += width) lane(j, V{});
  for (; j < lanes; ++j) lane(j, S{});
}

template <class IO>
struct Rows {  // a row per step, `stride` apart
  IO* data;
  int64_t stride;
  IO* operator[](int k) const { return data + k * stride; }
};

// Backward works on blocks of a few vectors, whose state stays in registers for a chunk. First pass: the potentials h.
template <Leak form, bool hard, class V, int kVectors, class IO, class S>
void recompute(const Neuron<S>& neuron, Rows<const IO> x, Rows<const IO> ahead, const S* start, S* h, int steps) {
  constexpr int width = sizeof(V) / sizeof(S);
  const Neuron<S> n = neuron;
  V v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = load<V>(start + i * width);
  for (int k = 0; k < steps; ++k, h += kVectors * width) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      __builtin_prefetch(ahead[steps - 1 - k] + i * width);
      const V potential = charge(form, n, v[i], load<V>(x[k] + i * width));
      store(h + i * width, potential, false);
      v[i] = reset(hard, n, potential);
    }
  }
}

// Second pass: the adjoint, from the last step of the chunk to the first.
template <class Curve, class V, int kVectors, class IO, class S>
void walk_back(const Neuron<S>& neuron, const S* h, Rows<const IO> grad_s, Rows<IO> grad_x, Rows<const IO> ahead,
               S* grad_v, int steps, bool streaming) {
  constexpr int width = sizeof(V) / sizeof(S);
  const Neuron<S> n = neuron;
  V carry[kVectors];
  for (int i = 0; i < kVectors; ++i) carry[i] = load<V>(grad_v + i * width);
  for (int k = steps - 1; k >= 0; --k) {
    const S* potentials = h + k * kVectors * width;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      __builtin_prefetch(ahead[steps - 1 - k] + i * width);
      const V gh = adjoint<Curve>(n, load<V>(potentials + i * width), load<V>(grad_s[k] + i * width), carry[i]);
      carry[i] = gh * n.state_gain;
      store(grad_x[k] + i * width, gh * n.input_gain, streaming);
    }
  }
  for (int i = 0; i < kVectors; ++i) store(grad_v + i * width, carry[i], false);
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
  const Seams<S> seams(a.scratch, s);

  with_form(p, [&](auto form, auto hard) {
    // The steps from t on, at most a chunk and not beyond `end`; `next` is what is read after `end`.
    const auto chunk = [&](const Tile& tile, S* v, int64_t t, int64_t end, const IO* next, bool output) {
      alignas(64) S stage[kChunk * kPitch];
      const int steps = int(std::min<int64_t>(kChunk, end - t));
      if (tiles.narrow) {
        gather(x, tile, t, steps, stage);
        for (int k = 0; k < steps; ++k) {
          S* row = stage + k * kPitch;
          step<form(), hard()>(n, row, row, v, row, tile.lanes, false);
        }
        if (output) scatter(spikes, tile, t, steps, stage);
      } else {
        for (int64_t u = t; u < t + steps; ++u) {
          const IO* ahead =
              u + kAhead < end ? x.at(tile.first, u + kAhead) : next + (u + kAhead - end) * s.x_step_stride;
          IO* out = output ? spikes.at(tile.first, u) : reinterpret_cast<IO*>(stage);
          step<form(), hard()>(n, x.at(tile.first, u), ahead, v, out, tile.lanes, streaming && output);
        }
      }
    };
    const auto saved_at = [&](const Tile& tile, int64_t t) {
      return saved + (t / kChunk - 1) * s.outer * s.inner + tile.first;
    };

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Tile tile = tiles[i], next = tiles[std::min(i + 1, tiles.count - 1)];
      alignas(64) S v[kLanes];
      const int64_t from = std::max<int64_t>(0, tile.begin - s.warmup);
      start(v, from > 0 ? nullptr : v0, n.v_start, tile);
      for (int64_t t = from; t < tile.begin; t += kChunk)
        chunk(tile, v, t, tile.begin, x.at(tile.first, tile.begin), false);
      seams.note(seams.starts, tile, v);
      for (int64_t t = tile.begin; t < tile.end; t += kChunk) {
        if (saved && t > 0) std::copy_n(v, tile.lanes, saved_at(tile, t));
        chunk(tile, v, t, tile.end, x.at(next.first, next.begin), true);
      }
      seams.note(seams.ends, tile, v);
      if (tile.end == s.steps) std::copy_n(v, tile.lanes, v_last + tile.first);
      if (streaming) stream_fence();
    }
    if (s.segments == 1 || seams.all_meet(1)) return;

    // Repair.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiles.per_segment; ++i) {
      alignas(64) S v[kLanes];
      for (int64_t q = 1; q < s.segments; ++q) {
        const Tile tile = seams.differing(tiles[q * tiles.per_segment + i], q - 1);
        if (tile.lanes == 0) continue;
        std::copy_n(seams.ends + (q - 1) * seams.neurons + tile.first, tile.lanes, v);
        bool met = false;  // again where the first run was: from there on that one is right
        for (int64_t t = tile.begin; t < tile.end; t += kChunk) {
          if (saved) {
            met = std::memcmp(v, saved_at(tile, t), tile.lanes * sizeof(S)) == 0;
            if (met) break;
            std::copy_n(v, tile.lanes, saved_at(tile, t));
          }
          chunk(tile, v, t, tile.end, x.at(tile.first, tile.begin), true);
        }
        if (met) continue;
        seams.note(seams.ends, tile, v);
        if (tile.end == s.steps) std::copy_n(v, tile.lanes, v_last + tile.first);
      }
      if (streaming) stream_fence();
    }
  });
}

// A chunk of a tile, whose rows are where they lie in memory or on the stage.
template <class IO, class S>
void chunk_back(const LIFSpec& p, const Neuron<S>& n, Rows<const IO> x, Rows<const IO> grad_s, Rows<IO> grad_x,
                const S* v, S* grad_v, int lanes, int steps, bool streaming) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  alignas(64) S h[kChunk * kBlock * width];
  const auto at = [](auto rows, int j) { return decltype(rows){rows.data + j, rows.stride}; };
  const auto block = [&](int j, auto vector, auto count) {
    using W = decltype(vector);
    constexpr int lanes_done = count() * sizeof(W) / sizeof(S);
    with_form(p, [&](auto form, auto hard) {
      recompute<form(), hard(), W, count()>(n, at(x, j), at(grad_s, j), v + j, h, steps);
    });
    with_surrogate(p.surrogate, [&](auto curve) {
      walk_back<decltype(curve), W, count()>(n, h, at(grad_s, j), at(grad_x, j), at(x, j + lanes_done), grad_v + j,
                                             steps, streaming);
    });
  };
  constexpr std::integral_constant<int, kBlock> many{};
  constexpr std::integral_constant<int, 1> one{};
  const int head = std::min(lanes, lanes_until_aligned<V>(grad_x.data));
  if (lanes_until_aligned<V>(grad_x[1]) != lanes_until_aligned<V>(grad_x.data)) streaming = false;
  int j = 0;
  for (; j < head; ++j) block(j, S{}, one);
  for (; j + kBlock * width <= lanes; j += kBlock * width) block(j, V{}, many);
  for (; j + width <= lanes; j += width) block(j, V{}, one);
  for (; j < lanes; ++j) block(j, S{}, one);
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
  const Seams<S> seams(a.scratch, s);
  static constexpr S zeros[kLanes] = {};

  // Back over the chunks that begin at or after `begin` and before `end`.
  const auto walk = [&](const Tile& tile, S* grad_v, int64_t begin, int64_t end, bool output) {
    alignas(64) S v[kLanes], x_stage[kChunk * kPitch], grad_stage[kChunk * kPitch];
    for (int64_t t = (end - 1) / kChunk * kChunk; t >= begin && end > begin; t -= kChunk) {
      const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
      start(v, t > 0 ? saved + (t / kChunk - 1) * s.outer * s.inner : v0, n.v_start, tile);
      if (tiles.narrow) {
        gather(x, tile, t, steps, x_stage);
        if (a.grad_spikes) gather(grad_s, tile, t, steps, grad_stage);
        const Rows<const S> upstream{a.grad_spikes ? grad_stage : zeros, a.grad_spikes ? kPitch : 0};
        chunk_back(p, n, Rows<const S>{x_stage, kPitch}, upstream, Rows<S>{grad_stage, kPitch}, v, grad_v, tile.lanes,
                   steps, false);
        if (output) scatter(grad_x, tile, t, steps, grad_stage);
      } else {
        const Rows<const IO> upstream{a.grad_spikes ? grad_s.at(tile.first, t) : reinterpret_cast<const IO*>(zeros),
                                      a.grad_spikes ? s.inner : 0};
        const Rows<IO> out =
            output ? Rows<IO>{grad_x.at(tile.first, t), s.inner} : Rows<IO>{reinterpret_cast<IO*>(grad_stage), 0};
        chunk_back(p, n, Rows<const IO>{x.at(tile.first, t), s.x_step_stride}, upstream, out, v, grad_v, tile.lanes,
                   steps, streaming && output);
      }
    }
  };

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tiles.count; ++i) {
    const Tile tile = tiles[i];
    alignas(64) S grad_v[kLanes];
    const int64_t from = std::min(tile.end + s.warmup, s.steps);
    start(grad_v, from < s.steps ? nullptr : grad_v_last, S(0), tile);
    walk(tile, grad_v, tile.end, from, false);
    seams.note(seams.starts, tile, grad_v);
    walk(tile, grad_v, tile.begin, tile.end, true);
    seams.note(seams.ends, tile, grad_v);
    if (grad_v0 && tile.segment == 0) std::copy_n(grad_v, tile.lanes, grad_v0 + tile.first);
    if (streaming) stream_fence();
  }
  if (s.segments == 1 || seams.all_meet(-1)) return;

  // Repair.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tiles.per_segment; ++i) {
    alignas(64) S grad_v[kLanes];
    for (int64_t q = s.segments - 2; q >= 0; --q) {
      const Tile tile = seams.differing(tiles[q * tiles.per_segment + i], q + 1);
      if (tile.lanes == 0) continue;
      std::copy_n(seams.ends + (q + 1) * seams.neurons + tile.first, tile.lanes, grad_v);
      walk(tile, grad_v, tile.begin, tile.end, true);
      seams.note(seams.ends, tile, grad_v);
      if (grad_v0 && q == 0) std::copy_n(grad_v, tile.lanes, grad_v0 + tile.first);
    }
    if (streaming) stream_fence();
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
