// The LIF on the CPU. Compiled once per instruction set, in the namespace SNN_ISA; dispatch.cpp picks one at run time.
//
// Neurons are cut into tiles whose state stays in the cache for all T steps:
//   forward    read a row of x (one step of one tile), step the neurons, write a row of spikes
//   backward   in chunks of kChunk steps, last to first: per block of a few vectors, recompute h from the v kept at the
//              chunk's start, then walk back over it, the state in registers
// The rows of a tile lie far apart in memory, which hardware prefetchers do not follow, so every access asks for one
// that comes later. 16-bit numbers become float in registers. Inner dimensions too narrow for vectors are gathered into
// rows of a stage, a chunk at a time. Batch norm before the neurons, and sums over groups of steps after them, are
// passes of their own over a row (in backward, over a block) that is in the cache.
//
// Segments of time are tiles like any other. Each warms up on the steps before it (in backward: after it), without
// output, and notes the state from which it then starts, and with which it ends; these are compared bit for bit, and
// what differs runs again. So all outputs, gradients too, are those of the serial loop, whatever the number of threads.
#include <algorithm>
#include <type_traits>

#include "../neuron.h"
#include "../norm.h"
#include "kernels.h"
#include "tiles.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kBlock = 8;           // vectors that backward keeps in registers
constexpr int kAhead = 2;           // rows between a prefetch and its use
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

// What the lanes of a tile are normalised with.
template <class S>
struct Lanes {
  alignas(64) S mean[kLanes], scale[kLanes], offset[kLanes];
  alignas(64) S pull[kLanes], push[kLanes];  // of backward's second pass

  void fill(const Norm& n, const Tile& tile) {
    const auto* table = static_cast<const S*>(n.table);
    spread(n, tile, table + kMean * n.channels, mean);
    spread(n, tile, table + kScale * n.channels, scale);
    spread(n, tile, table + kOffset * n.channels, offset);
  }
  void fill(const Norm& n, const Tile& tile, const void* pull_push) {
    fill(n, tile);
    if (const auto* rows = static_cast<const S*>(pull_push)) {
      spread(n, tile, rows, pull);
      spread(n, tile, rows + n.channels, push);
    } else {
      std::fill_n(pull, tile.lanes, S(0));
      std::fill_n(push, tile.lanes, S(0));
    }
  }
};

template <class S>
struct Local {  // what a tile needs from step to step
  alignas(64) S v[kLanes], totals[kLanes];
  Lanes<S> lanes;
};

// Calls f(j, V{}) or f(j, S{}) for all lanes, vectors from where `out` is aligned on.
template <class S, class IO, class F>
inline void over_lanes(const IO* out, int lanes, F&& f) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  const int head = std::min(lanes, lanes_until_aligned<V>(out));
  int j = 0;
  for (; j < head; ++j) f(j, S{});
  for (; j + width <= lanes; j += width) f(j, V{});
  for (; j < lanes; ++j) f(j, S{});
}

// A row of what the neurons receive, from lane `first` of the tile on; residual null: none.
template <class IO, class S>
void normalise(const Lanes<S>& n, int first, const IO* x, const IO* ahead, const IO* residual, int64_t residual_ahead,
               S* out, int lanes) {
  const S *mean = n.mean + first, *scale = n.scale + first, *offset = n.offset + first;
  over_lanes<S>(out, lanes, [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    __builtin_prefetch(ahead + j);
    W z = (load<W>(x + j) - load<W>(mean + j)) * load<W>(scale + j) + load<W>(offset + j);
    if (residual) {
      __builtin_prefetch(residual + residual_ahead + j);
      z = z + load<W>(residual + j);
    }
    store(out + j, z, false);
  });
}

// totals (first: are, else +=) row; with `out`, they go there.
template <class IO, class S>
void add(const S* row, bool first, S* totals, IO* out, int lanes, bool streaming) {
  over_lanes<S>(out, lanes, [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    const W total = first ? load<W>(row + j) : load<W>(totals + j) + load<W>(row + j);
    out ? store(out + j, total, streaming) : store(totals + j, total, false);
  });
}

// One step of a tile: spikes into `out`.
template <Leak form, bool hard, class In, class Out, class S>
void step(const Neuron<S>& neuron, const In* x, const In* ahead, S* v, Out* out, int lanes, bool streaming) {
  const Neuron<S> n = neuron;
  over_lanes<S>(out, lanes, [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    __builtin_prefetch(ahead + j);
    const W h = charge(form, n, load<W>(v + j), load<W>(x + j));
    store(v + j, reset(hard, n, h), false);
    store_spike<Out, W>(out + j, h > n.fire_above, streaming);
  });
}

template <class IO>
struct Rows {  // a row per step, `stride` apart; or, with `row`, those of its group
  IO* data;
  int64_t stride;
  const int* row = nullptr;
  IO* operator[](int k) const { return data + (row ? row[k] : k) * stride; }
  Rows from(int lane) const { return {data + lane, stride, row}; }
};

// Backward works on blocks of a few vectors, whose state stays in registers for a chunk. First pass: the potentials h.
template <Leak form, bool hard, class V, int kVectors, class In, class IO, class S>
void recompute(const Neuron<S>& neuron, Rows<const In> x, Rows<const IO> ahead, const S* start, S* h, int steps) {
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
template <class Curve, class V, int kVectors, class IO, class Out, class S>
void walk_back(const Neuron<S>& neuron, const S* h, Rows<const IO> grad_s, Rows<Out> grad_x, Rows<const IO> ahead,
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
template <class S, class F>
void with_form(const Neuron<S>& n, F&& f) {
  const auto with_reset = [&](auto form) { n.hard ? f(form, std::true_type{}) : f(form, std::false_type{}); };
  switch (n.form) {
    case Leak::decay: return with_reset(std::integral_constant<Leak, Leak::decay>{});
    case Leak::tau_input: return with_reset(std::integral_constant<Leak, Leak::tau_input>{});
    case Leak::tau: return with_reset(std::integral_constant<Leak, Leak::tau>{});
    case Leak::tau_input_inverse: return with_reset(std::integral_constant<Leak, Leak::tau_input_inverse>{});
    case Leak::tau_inverse: return with_reset(std::integral_constant<Leak, Leak::tau_inverse>{});
  }
}

template <class IO, class S = State<IO>>
void forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  const Tiling tiles(s, threads);
  const Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, s.inner};
  const Sequence<const IO> residual{static_cast<const IO*>(a.norm.residual), s.steps * s.inner, s.inner, s.inner};
  const Sequence<IO> spikes{static_cast<IO*>(a.spikes), s.steps_out * s.inner, s.inner, s.inner};
  const auto* v0 = static_cast<const S*>(a.v);
  auto *v_last = static_cast<S*>(a.v_last), *saved = static_cast<S*>(a.saved);
  const Neuron<S> n(p);
  const Seams<S> seams(a.scratch, s);

  with_form(n, [&](auto form, auto hard) {
    // The steps from t on, at most a chunk and not beyond `end`; `next` is what is read after `end`.
    const auto chunk = [&](const Tile& tile, Local<S>& at, int64_t t, int64_t end, const IO* next, bool output) {
      alignas(64) S stage[kChunk * kPitch];
      const int steps = int(std::min<int64_t>(kChunk, end - t));
      const int64_t group = group_of(t, s.steps, s.steps_out);
      // A row of spikes that belongs to step u; `to(g)` is where the sums of group g go.
      const auto add_to_group = [&](int64_t u, const S* row, auto to) {
        const int64_t g = group_of(u, s.steps, s.steps_out);
        const bool last = u + 1 == group_start(g + 1, s.steps, s.steps_out);
        add(row, u == group_start(g, s.steps, s.steps_out), at.totals, last ? to(g) : nullptr, tile.lanes, streaming);
        return g + last;  // groups that are finished
      };
      if (tiles.narrow) {
        alignas(64) S residual_stage[kChunk * kPitch];
        gather(x, tile, t, steps, stage);
        if (residual.data) gather(residual, tile, t, steps, residual_stage);
        int64_t finished = t + steps;
        for (int k = 0; k < steps; ++k) {
          S* row = stage + k * kPitch;
          if (a.norm.table)
            normalise<S>(at.lanes, 0, row, row, residual.data ? residual_stage + k * kPitch : nullptr, 0, row,
                         tile.lanes);
          step<form(), hard()>(n, row, row, at.v, row, tile.lanes, false);
          if (s.grouped()) finished = add_to_group(t + k, row, [&](int64_t g) { return stage + (g - group) * kPitch; });
        }
        const int64_t first = s.grouped() ? group : t;
        if (output && finished > first) scatter(spikes, tile, first, int(finished - first), stage);
        return;
      }
      S *received = stage, *fired = stage + kLanes;
      for (int64_t u = t; u < t + steps; ++u) {
        const IO *row = x.at(tile.first, u),
                 *ahead = u + kAhead < end ? x.at(tile.first, u + kAhead) : next + (u + kAhead - end) * s.x_step_stride;
        const auto spike = [&](const auto* in, const auto* in_ahead) {
          if (s.grouped()) {
            step<form(), hard()>(n, in, in_ahead, at.v, fired, tile.lanes, false);
            add_to_group(u, fired, [&](int64_t g) { return spikes.at(tile.first, g); });
          } else {
            IO* out = output ? spikes.at(tile.first, u) : reinterpret_cast<IO*>(fired);
            step<form(), hard()>(n, in, in_ahead, at.v, out, tile.lanes, streaming && output);
          }
        };
        if (a.norm.table) {
          const IO* shortcut = residual.data ? residual.at(tile.first, u) : nullptr;
          normalise(at.lanes, 0, row, ahead, shortcut, u + kAhead < end ? kAhead * s.inner : 0, received, tile.lanes);
          spike(received, received);
        } else {
          spike(row, ahead);
        }
      }
    };
    const auto saved_at = [&](const Tile& tile, int64_t t) {
      return saved + (t / kChunk - 1) * s.outer * s.inner + tile.first;
    };

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Tile tile = tiles[i], next = tiles[std::min(i + 1, tiles.count - 1)];
      Local<S> at;
      if (a.norm.table) at.lanes.fill(a.norm, tile);
      S* v = at.v;
      const int64_t from = std::max<int64_t>(0, tile.begin - s.warmup);
      start(v, from > 0 ? nullptr : v0, n.v_start, tile);
      for (int64_t t = from; t < tile.begin; t += kChunk)
        chunk(tile, at, t, tile.begin, x.at(tile.first, tile.begin), false);
      seams.note(seams.starts, tile, v);
      for (int64_t t = tile.begin; t < tile.end; t += kChunk) {
        if (saved && t > 0) std::copy_n(v, tile.lanes, saved_at(tile, t));
        chunk(tile, at, t, tile.end, x.at(next.first, next.begin), true);
      }
      seams.note(seams.ends, tile, v);
      if (tile.end == s.steps) std::copy_n(v, tile.lanes, v_last + tile.first);
      if (streaming) stream_fence();
    }
    if (s.segments == 1 || seams.all_meet(1)) return;

    // Repair.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tiles.per_segment; ++i) {
      Local<S> at;
      S* v = at.v;
      for (int64_t q = 1; q < s.segments; ++q) {
        const Tile tile = seams.differing(tiles[q * tiles.per_segment + i], q - 1);
        if (tile.lanes == 0) continue;
        if (a.norm.table) at.lanes.fill(a.norm, tile);
        std::copy_n(seams.ends + (q - 1) * seams.neurons + tile.first, tile.lanes, v);
        bool met = false;  // again where the first run was: from there on that one is right
        for (int64_t t = tile.begin; t < tile.end; t += kChunk) {
          if (saved) {
            met = std::memcmp(v, saved_at(tile, t), tile.lanes * sizeof(S)) == 0;
            if (met) break;
            std::copy_n(v, tile.lanes, saved_at(tile, t));
          }
          chunk(tile, at, t, tile.end, x.at(tile.first, tile.begin), true);
        }
        if (met) continue;
        seams.note(seams.ends, tile, v);
        if (tile.end == s.steps) std::copy_n(v, tile.lanes, v_last + tile.first);
      }
      if (streaming) stream_fence();
    }
  });
}

// Batch norm around a chunk of backward; see LIFBackward. IO is the type of its rows.
template <class IO, class S>
struct Normed {
  const Lanes<S>* lanes;  // null: no norm
  Rows<const IO> residual;
  Rows<IO> grad_residual;
  double *totals, *moments;  // per lane: sums of g and of g * (x - mean). Null: gradients are written
};

// g, [steps][count] in the cache, into the sums of lanes j, j + 1, ...; within a chunk in the dtype of the state.
template <class IO, class S>
void sum_up(const Normed<IO, S>& norm, int j, Rows<const S> g, Rows<const IO> x, int steps, int count) {
  alignas(64) S totals[kLanes], moments[kLanes];
  over_lanes<S>(totals, count, [&](int i, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    const W mean = load<W>(norm.lanes->mean + j + i);
    W total{}, moment{};
    for (int k = 0; k < steps; ++k) {
      const W now = load<W>(g[k] + i);
      total = total + now;
      moment = moment + now * (load<W>(x[k] + i) - mean);
    }
    store(totals + i, total, false);
    store(moments + i, moment, false);
  });
  for (int i = 0; i < count; ++i) {
    norm.totals[j + i] += totals[i];
    norm.moments[j + i] += moments[i];
  }
}

// g, [steps][count], into the gradients of x and of the residual; x and grad_x begin at lane j.
template <class IO, class S>
void finish(const Normed<IO, S>& norm, int j, Rows<const S> g, Rows<const IO> x, Rows<IO> grad_x, int steps, int count,
            bool streaming) {
  using V = typename VectorOf<S>::type;
  const Lanes<S>& n = *norm.lanes;
  for (int k = 0; k < steps; ++k) {
    IO *out = grad_x[k], *shortcut = norm.grad_residual.data ? norm.grad_residual[k] + j : nullptr;
    const bool alike = lanes_until_aligned<V>(shortcut) == lanes_until_aligned<V>(out);
    over_lanes<S>(out, count, [&](int i, auto vector) __attribute__((always_inline)) {
      using W = decltype(vector);
      const int l = j + i;
      const W now = load<W>(g[k] + i), centred = load<W>(x[k] + i) - load<W>(n.mean + l);
      store(out + i, load<W>(n.scale + l) * now - (load<W>(n.pull + l) + centred * load<W>(n.push + l)), streaming);
      if (shortcut) store(shortcut + i, now, streaming && alike);
    });
  }
}

// A chunk of a tile, whose rows are where they lie in memory or on the stage.
template <class IO, class S>
void chunk_back(const LIFSpec& p, const Neuron<S>& n, const Normed<IO, S>& norm, Rows<const IO> x,
                Rows<const IO> grad_s, Rows<IO> grad_x, const S* v, S* grad_v, int lanes, int steps, bool streaming) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  alignas(64) S h[kChunk * kBlock * width];
  const auto block = [&](int j, auto vector, auto vectors) {
    using W = decltype(vector);
    constexpr int count = vectors() * sizeof(W) / sizeof(S);
    const Rows<S> cached{h, count};  // what the neurons receive, then h, then g
    const Rows<const S> g{h, count};
    const auto recomputed = [&](auto in) {
      with_form(n, [&](auto form, auto hard) {
        recompute<form(), hard(), W, vectors()>(n, in, grad_s.from(j), v + j, h, steps);
      });
    };
    const auto walked = [&](auto out, bool past_cache) {
      with_surrogate(p.surrogate, [&](auto curve) {
        walk_back<decltype(curve), W, vectors()>(n, h, grad_s.from(j), out, x.from(j + count), grad_v + j, steps,
                                                 past_cache);
      });
    };
    if (!norm.lanes) {
      recomputed(x.from(j));
      walked(grad_x.from(j), streaming);
      return;
    }
    for (int k = 0; k < steps; ++k)
      normalise(*norm.lanes, j, x[k] + j, x[k] + j, norm.residual.data ? norm.residual[k] + j : nullptr, 0, cached[k],
                count);
    recomputed(g);
    walked(cached, false);
    if (norm.totals)
      sum_up(norm, j, g, x.from(j), steps, count);
    else
      finish(norm, j, g, x.from(j), grad_x.from(j), steps, count, streaming);
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
struct Backward {
  const LIFSpec& p;
  const LIFShape& s;
  const LIFBackward& a;
  bool narrow, streaming;
  Neuron<S> n{p};

  template <class T>
  Sequence<T> of(T* data, int64_t steps) const {
    return {data, steps * s.inner, s.inner, s.inner};
  }

  // The gradient of a tile's last potential (0 if it is not the last), to start from.
  void start_from(S* grad_v, const Tile& tile, int64_t from) const {
    start(grad_v, from < s.steps ? nullptr : static_cast<const S*>(a.grad_v_last), S(0), tile);
  }

  // Back over the chunks that begin at or after `begin` and before `end`.
  void walk(const Tile& tile, const Normed<IO, S>& norm, S* grad_v, int64_t begin, int64_t end, bool output) const {
    static constexpr S zeros[kLanes] = {};
    alignas(64) S v[kLanes], x_stage[kChunk * kPitch], grad_stage[kChunk * kPitch];
    alignas(64) S residual_stage[kChunk * kPitch], shortcut_stage[kChunk * kPitch];
    const Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, s.inner};
    const auto residual = of(static_cast<const IO*>(a.norm.residual), s.steps);
    const auto grad_s = of(static_cast<const IO*>(a.grad_spikes), s.steps_out);
    const auto grad_x = of(static_cast<IO*>(a.grad_x), s.steps);
    const auto grad_residual = of(static_cast<IO*>(a.grad_residual), s.steps);
    const auto *v0 = static_cast<const S*>(a.v), *saved = static_cast<const S*>(a.saved);

    for (int64_t t = (end - 1) / kChunk * kChunk; t >= begin && end > begin; t -= kChunk) {
      const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
      start(v, t > 0 ? saved + (t / kChunk - 1) * s.outer * s.inner : v0, n.v_start, tile);
      int group[kChunk];
      const int64_t first = group_of(t, s.steps, s.steps_out);
      for (int k = 0; k < steps; ++k) group[k] = int(group_of(t + k, s.steps, s.steps_out) - first);
      const int* row = s.grouped() ? group : nullptr;
      if (narrow) {
        gather(x, tile, t, steps, x_stage);
        if (residual.data) gather(residual, tile, t, steps, residual_stage);
        if (grad_s.data) gather(grad_s, tile, first, group[steps - 1] + 1, grad_stage);
        // In place: a step's upstream row is never below its own.
        const Rows<const S> upstream{grad_s.data ? grad_stage : zeros, grad_s.data ? kPitch : 0, row};
        const Normed<S, S> staged{norm.lanes,
                                  {residual.data ? residual_stage : nullptr, kPitch},
                                  {grad_residual.data ? shortcut_stage : nullptr, kPitch},
                                  norm.totals,
                                  norm.moments};
        chunk_back(p, n, staged, Rows<const S>{x_stage, kPitch}, upstream, Rows<S>{grad_stage, kPitch}, v, grad_v,
                   tile.lanes, steps, false);
        if (!output) continue;
        scatter(grad_x, tile, t, steps, grad_stage);
        if (grad_residual.data) scatter(grad_residual, tile, t, steps, shortcut_stage);
      } else {
        const auto rows = [&](const auto& in, int64_t step) {
          return Rows<std::remove_pointer_t<decltype(in.data)>>{in.data ? in.at(tile.first, step) : nullptr,
                                                                in.step_stride};
        };
        const Rows<const IO> upstream{grad_s.data ? grad_s.at(tile.first, first) : reinterpret_cast<const IO*>(zeros),
                                      grad_s.data ? s.inner : 0, row};
        const Rows<IO> out = output ? rows(grad_x, t) : Rows<IO>{reinterpret_cast<IO*>(grad_stage), 0};
        const Normed<IO, S> here{norm.lanes, rows(residual, t), rows(grad_residual, t), norm.totals, norm.moments};
        chunk_back(p, n, here, rows(x, t), upstream, out, v, grad_v, tile.lanes, steps, streaming && output);
      }
    }
  }
};

template <class IO, class S = State<IO>>
void backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  const Tiling tiles(s, threads);
  const Backward<IO> pass{p, s, a, tiles.narrow, streaming};
  auto* grad_v0 = static_cast<S*>(a.grad_v);
  const Seams<S> seams(a.scratch, s);

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tiles.count; ++i) {
    const Tile tile = tiles[i];
    alignas(64) S grad_v[kLanes];
    Lanes<S> lanes;
    if (a.norm.table) lanes.fill(a.norm, tile, a.pull_push);
    const Normed<IO, S> norm{a.norm.table ? &lanes : nullptr, {}, {}, nullptr, nullptr};
    const int64_t from = std::min(tile.end + s.warmup, s.steps);
    pass.start_from(grad_v, tile, from);
    pass.walk(tile, norm, grad_v, tile.end, from, false);
    seams.note(seams.starts, tile, grad_v);
    pass.walk(tile, norm, grad_v, tile.begin, tile.end, true);
    seams.note(seams.ends, tile, grad_v);
    if (grad_v0 && tile.segment == 0) std::copy_n(grad_v, tile.lanes, grad_v0 + tile.first);
    if (streaming) stream_fence();
  }
  if (s.segments == 1 || seams.all_meet(-1)) return;

  // Repair.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tiles.per_segment; ++i) {
    alignas(64) S grad_v[kLanes];
    Lanes<S> lanes;
    const Normed<IO, S> norm{a.norm.table ? &lanes : nullptr, {}, {}, nullptr, nullptr};
    for (int64_t q = s.segments - 2; q >= 0; --q) {
      const Tile tile = seams.differing(tiles[q * tiles.per_segment + i], q + 1);
      if (tile.lanes == 0) continue;
      if (a.norm.table) lanes.fill(a.norm, tile, a.pull_push);
      std::copy_n(seams.ends + (q + 1) * seams.neurons + tile.first, tile.lanes, grad_v);
      pass.walk(tile, norm, grad_v, tile.begin, tile.end, true);
      seams.note(seams.ends, tile, grad_v);
      if (grad_v0 && q == 0) std::copy_n(grad_v, tile.lanes, grad_v0 + tile.first);
    }
    if (streaming) stream_fence();
  }
}

// The sums of backward's first pass, [parts, 2, channels]. Tiles and parts do not depend on the number of threads.
template <class IO, class S = State<IO>>
void sums_of(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* sums, int threads) {
  const Tiling tiles(s, kMostParts);
  const Backward<IO> pass{p, s, a, tiles.narrow, false};
  const int64_t parts = parts_of(s), channels = a.norm.channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    double* to = std::fill_n(sums + part * 2 * channels, 2 * channels, 0.0) - 2 * channels;
    for (int64_t i = tiles.count * part / parts; i < tiles.count * (part + 1) / parts; ++i) {
      const Tile tile = tiles[i];
      alignas(64) S grad_v[kLanes];
      alignas(64) double totals[kLanes] = {}, moments[kLanes] = {};
      Lanes<S> lanes;
      lanes.fill(a.norm, tile);
      pass.start_from(grad_v, tile, s.steps);
      pass.walk(tile, {&lanes, {}, {}, totals, moments}, grad_v, 0, s.steps, false);
      fold(a.norm, tile, totals, to);
      fold(a.norm, tile, moments, to + channels);
    }
  }
}

int useful_threads(const LIFShape& s, int threads) { return s.outer * s.steps * s.inner < kSerial ? 1 : threads; }

}  // namespace

void lif_forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { forward<decltype(io)>(p, s, a, useful_threads(s, threads), streaming); });
}
void sums(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* to, int threads) {
  with_dtype(s.dtype, [&](auto io) { sums_of<decltype(io)>(p, s, a, to, useful_threads(s, threads)); });
}
void lif_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { backward<decltype(io)>(p, s, a, useful_threads(s, threads), streaming); });
}

}  // namespace snnkern::SNN_ISA
