// What the CPU's LIF and batch norm do to the rows of a tile: a row is one step of its neurons.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../neuron.h"
#include "../norm.h"
#include "tiles.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kBlock = 8;       // vectors that backward keeps in registers
constexpr int kMostStates = 3;  // of a neuron; those of a tile's lanes lie kLanes apart

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

// The leak and the threshold of each lane, for neurons that are not plain; the bias; and backward's sums over time for
// those that are tensors.
template <class S>
struct Own {
  alignas(64) S leak[kLanes], input_gain[kLanes], state_gain[kLanes], threshold[kLanes], fire_above[kLanes];
  alignas(64) S biases[kLanes];
  alignas(64) double by_leak[kLanes], by_threshold[kLanes], by_bias[kLanes];
  const S* bias = nullptr;  // null: there is none

  void fill_bias(const More& more, const Tile& tile) {
    if (!more.bias.data) return;
    spread(more.bias, tile, static_cast<const S*>(more.bias.data), biases);
    bias = biases;
    if (more.grad_bias) std::fill_n(by_bias, tile.lanes, 0.0);
  }

  void fill(const Neuron<S>& n, const More& more, const Tile& tile) {
    const auto fill = [&](const Parameter& p, const void* data, S number, S* lanes) {
      if (data)
        spread(p, tile, static_cast<const S*>(data), lanes);
      else
        std::fill_n(lanes, tile.lanes, number);
    };
    fill(more.leak, more.leak.data, n.leak, leak);
    fill(more.threshold, more.threshold.data, n.threshold, threshold);
    fill(more.threshold, more.fire_above, n.fire_above, fire_above);
  }
  void fill_back(const Neuron<S>& n, const More& more, const Tile& tile) {
    fill(n, more, tile);
    if (more.leak.data) {
      for (int j = 0; j < tile.lanes; ++j) {
        input_gain[j] = gain_of_input(n.form, leak[j]);
        state_gain[j] = gain_of_state(n.form, leak[j]);
      }
    } else {
      std::fill_n(input_gain, tile.lanes, n.input_gain);
      std::fill_n(state_gain, tile.lanes, n.state_gain);
    }
    if (more.grad_leak) std::fill_n(by_leak, tile.lanes, 0.0);
    if (more.grad_threshold) std::fill_n(by_threshold, tile.lanes, 0.0);
  }
  void write(const More& more, const Tile& tile, int64_t neurons) const {
    const auto write = [&](const double* sums, void* to, int64_t segment) {
      if (to) std::copy_n(sums, tile.lanes, static_cast<S*>(to) + segment * neurons + tile.first);
    };
    write(by_leak, more.grad_leak, 0);
    write(by_threshold, more.grad_threshold, 0);
    write(by_bias, more.grad_bias, tile.segment);
  }
};

template <class S>
struct Local {  // what a tile needs from step to step
  alignas(64) S v[kMostStates * kLanes], totals[kLanes];
  Lanes<S> lanes;
  Own<S> own;
};

// Calls f(j, V{}) or f(j, S{}) for all lanes, vectors from where `out` is aligned on. Inlined, or else what f captures
// would be read anew for each of them.
template <class S, class IO, class F>
[[gnu::always_inline]] inline void over_lanes(const IO* out, int lanes, F&& f) {
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

// One step of a tile: spikes into `out`; bias null: none.
template <Leak form, bool hard, class In, class Out, class S>
void step(const Neuron<S>& neuron, const In* x, const S* bias, const In* ahead, S* v, Out* out, int lanes,
          bool streaming) {
  const Neuron<S> n = neuron;
  over_lanes<S>(out, lanes, [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    __builtin_prefetch(ahead + j);
    W received = load<W>(x + j);
    if (bias) received = received + load<W>(bias + j);
    const W h = charge(form, n, load<W>(v + j), received);
    store(v + j, reset(hard, n, h), false);
    store_spike<Out, W>(out + j, h > n.fire_above, streaming);
  });
}

// The states of a kind of neurons, one plane after the other.
template <class W, class S>
[[gnu::always_inline]] inline States<W> load_states(Kind kind, const S* planes, int64_t apart) {
  States<W> at{load<W>(planes), {}, {}};
  if (kind.synaptic) at.i = load<W>(planes + apart);
  if (kind.adaptive) at.a = load<W>(planes + (1 + kind.synaptic) * apart);
  return at;
}
template <class W, class S>
[[gnu::always_inline]] inline void store_states(Kind kind, S* planes, int64_t apart, const States<W>& at) {
  store(planes, at.v, false);
  if (kind.synaptic) store(planes + apart, at.i, false);
  if (kind.adaptive) store(planes + (1 + kind.synaptic) * apart, at.a, false);
}

// The same of neurons of any kind, of which `j` is a lane of their tile.
template <class W, class S>
[[gnu::always_inline]] inline Stepped<W> advance(Kind kind, const Neuron<S>& n, const Own<S>& own, int j, S* v, W x) {
  if (own.bias) x = x + load<W>(own.bias + j);
  States<W> at = load_states<W>(kind, v + j, kLanes);
  const auto to =
      snnkern::advance(kind, n, load<W>(own.leak + j), load<W>(own.threshold + j), load<W>(own.fire_above + j), at, x);
  store_states(kind, v + j, kLanes, at);
  return to;
}
template <class In, class Out, class S>
void step(const Neuron<S>& neuron, const Own<S>& own, const In* x, const In* ahead, S* v, Out* out, int lanes,
          bool streaming) {
  const Neuron<S> n = neuron;
  const Kind kind = n.kind();
  over_lanes<S>(out, lanes, [&](int j, auto vector) __attribute__((always_inline)) {
    __builtin_prefetch(ahead + j);
    store(out + j, advance(kind, n, own, j, v, load<decltype(vector)>(x + j)).s, streaming);
  });
}

template <class S, class From, class To>
void copy(const From* from, const From* ahead, To* to, int lanes, bool streaming) {
  over_lanes<S>(to, lanes, [&](int j, auto vector) __attribute__((always_inline)) {
    __builtin_prefetch(ahead + j);
    store(to + j, load<decltype(vector)>(from + j), streaming);
  });
}

template <class IO>
struct Rows {  // a row per step, `stride` apart; or, with `row`, those of its group
  IO* data;
  int64_t stride;
  const int* row = nullptr;
  IO* operator[](int k) const { return data + (row ? row[k] : k) * stride; }
  Rows from(int lane) const { return {data + lane, stride, row}; }
  Rows<const char> bytes() const { return {reinterpret_cast<const char*>(data), stride * int64_t(sizeof(IO)), row}; }
  operator Rows<const IO>() const { return {data, stride, row}; }
};

// Backward works on blocks of a few vectors, whose state stays in registers for a chunk. First pass: the potentials h.
template <Leak form, bool hard, bool biased, class V, int kVectors, class In, class IO, class S>
void recompute(const Neuron<S>& neuron, Rows<const In> x, const S* bias, Rows<const IO> ahead, const S* start, S* h,
               int steps) {
  constexpr int width = sizeof(V) / sizeof(S);
  const Neuron<S> n = neuron;
  V v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = load<V>(start + i * width);
  for (int k = 0; k < steps; ++k, h += kVectors * width) {
    const In* from = x[k];
    const IO* next = ahead[steps - 1 - k];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      __builtin_prefetch(next + i * width);
      V received = load<V>(from + i * width);
      if (biased) received = received + load<V>(bias + i * width);
      const V potential = charge(form, n, v[i], received);
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
    const IO *upstream = grad_s[k], *next = ahead[steps - 1 - k];
    Out* out = grad_x[k];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      __builtin_prefetch(next + i * width);
      const V gh = adjoint<Curve>(n, load<V>(potentials + i * width), load<V>(upstream + i * width), carry[i]);
      carry[i] = gh * n.state_gain;
      store(out + i * width, gh * n.input_gain, streaming);
    }
  }
  for (int i = 0; i < kVectors; ++i) store(grad_v + i * width, carry[i], false);
}

// g, in the cache, to the gradient of x, and its sums over the chunk to the bias's.
template <class V, int kVectors, class IO, class S>
void sum_up(double* by_bias, Rows<const S> g, Rows<IO> grad_x, int steps, bool streaming) {
  constexpr int width = sizeof(V) / sizeof(S);
  V total[kVectors]{};
  for (int k = 0; k < steps; ++k) {
    const S* from = g[k];
    IO* out = grad_x[k];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const V now = load<V>(from + i * width);
      total[i] = total[i] + now;
      store(out + i * width, now, streaming);
    }
  }
  alignas(64) S sums[kVectors * width];
  for (int i = 0; i < kVectors; ++i) store(sums + i * width, total[i], false);
  for (int j = 0; j < kVectors * width; ++j) by_bias[j] += sums[j];
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

// Batch norm around a chunk of backward; see LIFBackward. IO is the type of its rows.
template <class IO, class S>
struct Normed {
  const Lanes<S>* lanes;  // null: no norm
  Rows<const IO> residual;
  Rows<IO> grad_residual;
  double *totals, *moments;  // per lane: sums of g and of g * (x - mean). Null: gradients are written
  Rows<S> kept;              // where g goes as it is summed; null: nowhere
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

// A chunk of a tile, whose rows are where they lie in memory or on the stage; bias, by_bias null: none, not wanted.
template <class IO, class S>
void chunk_back(const LIFSpec& p, const Neuron<S>& n, const Normed<IO, S>& norm, Rows<const IO> x, const S* bias,
                double* by_bias, Rows<const IO> grad_s, Rows<IO> grad_x, const S* v, S* grad_v, int lanes, int steps,
                bool streaming) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  alignas(64) S h[kChunk * kBlock * width];
  const auto block = [&](int j, auto vector, auto vectors) {
    using W = decltype(vector);
    constexpr int count = vectors() * sizeof(W) / sizeof(S);
    const Rows<S> cached{h, count};  // what the neurons receive, then h, then g
    const Rows<S> g = norm.kept.data ? norm.kept.from(j) : cached;
    const auto recomputed = [&](auto in, auto biased) {
      with_form(n, [&](auto form, auto hard) {
        recompute<form(), hard(), biased(), W, vectors()>(n, in, bias + (biased() ? j : 0), grad_s.from(j), v + j, h,
                                                          steps);
      });
    };
    const auto walked = [&](auto out, bool past_cache) {
      with_surrogate(p.surrogate, [&](auto curve) {
        if constexpr (!std::is_same_v<decltype(curve), Integer>)
          walk_back<decltype(curve), W, vectors()>(n, h, grad_s.from(j), out, x.from(j + count), grad_v + j, steps,
                                                   past_cache);
      });
    };
    if (!norm.lanes) {
      bias ? recomputed(x.from(j), std::true_type{}) : recomputed(x.from(j), std::false_type{});
      if (by_bias) {
        walked(cached, false);
        sum_up<W, vectors(), IO, S>(by_bias + j, cached, grad_x.from(j), steps, streaming);
      } else {
        walked(grad_x.from(j), streaming);
      }
      return;
    }
    for (int k = 0; k < steps; ++k)
      normalise(*norm.lanes, j, x[k] + j, x[k] + j, norm.residual.data ? norm.residual[k] + j : nullptr, 0, cached[k],
                count);
    recomputed(Rows<const S>(cached), std::false_type{});
    walked(g, false);
    if (norm.totals)
      sum_up<IO, S>(norm, j, g, x.from(j), steps, count);
    else
      finish<IO, S>(norm, j, g, x.from(j), grad_x.from(j), steps, count, streaming);
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

// The same of neurons that are not plain, whose lanes j, j + 1, ... are those of the tile from `first` on: in the
// cache, and in the state's numbers. First pass: what they receive becomes h; the drives go to `drives`, the thresholds
// of the steps to `thresholds`, if they change. Lanes are in the inner loop, as a step has to wait for the one before;
// `ahead` is what is read next, numbers of `size` bytes.
template <class S>
[[gnu::noinline]] void recompute(const Neuron<S>& neuron, const Own<S>& own, int first, Rows<S> h, Rows<S> drives,
                                 Rows<S> thresholds, Rows<const char> ahead, int size, S* v, int steps, int count) {
  const Neuron<S> n = neuron;
  const Kind kind = n.kind();
  for (int k = 0; k < steps; ++k) {
    S *row = h[k], *driven = drives.data ? drives[k] : nullptr, *raised = thresholds[k];
    const char* next = ahead[steps - 1 - k];
    over_lanes<S>(row, count, [&](int j, auto vector) __attribute__((always_inline)) {
      __builtin_prefetch(next + j * size);
      const auto to = advance(kind, n, own, first + j, v, load<decltype(vector)>(row + j));
      store(row + j, to.h, false);
      if (driven) store(driven + j, drive(n.form, n, to.before, to.x), false);
      if (kind.adaptive) store(raised + j, to.threshold, false);
    });
  }
}

// Second pass: g, and the sums over time for the parameters that are tensors, within a chunk in the dtype of the state.
template <class Curve, class S>
[[gnu::noinline]] void walk_back(const Neuron<S>& neuron, const More& more, Own<S>& own, int first, Rows<S> h,
                                 Rows<S> grad_s, Rows<const S> grad_v_seq, Rows<S> g, Rows<S> drives,
                                 Rows<S> thresholds, Rows<const char> ahead, int size, S* grad_v, int steps,
                                 int count) {
  constexpr int most = kBlock * sizeof(typename VectorOf<S>::type) / sizeof(S);
  alignas(64) S by_leak[most] = {}, by_threshold[most] = {}, by_bias[most] = {};
  const Neuron<S> n = neuron;
  Kind kind = n.kind();
  kind.integer = std::is_same_v<Curve, Integer>;
  for (int k = steps - 1; k >= 0; --k) {
    const S *potentials = h[k], *upstream = grad_s[k];
    const S *of_v = grad_v_seq.data ? grad_v_seq[k] : nullptr, *driven = drives.data ? drives[k] : nullptr;
    const S* threshold = kind.adaptive ? thresholds[k] : own.threshold + first;
    const char* next = ahead[steps - 1 - k];
    S* out = g[k];
    over_lanes<S>(out, count, [&](int j, auto vector) __attribute__((always_inline)) {
      using W = decltype(vector);
      const int l = first + j;
      __builtin_prefetch(next + j * size);
      States<W> grad = load_states<W>(kind, grad_v + l, kLanes);
      if (of_v) grad.v = grad.v + load<W>(of_v + l);
      const auto to =
          retreat<Curve>(kind, n, load<W>(threshold + j), load<W>(own.fire_above + l), load<W>(own.input_gain + l),
                         load<W>(own.state_gain + l), load<W>(potentials + j), load<W>(upstream + j), grad);
      store_states(kind, grad_v + l, kLanes, grad);
      store(out + j, to.x, false);
      if (driven) store(by_leak + j, load<W>(by_leak + j) + by_drive(to.h, load<W>(driven + j)), false);
      if (more.grad_threshold) store(by_threshold + j, load<W>(by_threshold + j) + to.threshold, false);
      if (more.grad_bias) store(by_bias + j, load<W>(by_bias + j) + to.x, false);
    });
  }
  const auto add = [&](const S* chunk, double* sums) {
    for (int j = 0; j < count; ++j) sums[first + j] += chunk[j];
  };
  if (more.grad_leak) add(by_leak, own.by_leak);
  if (more.grad_threshold) add(by_threshold, own.by_threshold);
  if (more.grad_bias) add(by_bias, own.by_bias);
}

template <class IO, class S>
void chunk_back(const LIFSpec& p, const Neuron<S>& n, const More& more, Own<S>& own, const Normed<IO, S>& norm,
                Rows<const IO> x, Rows<const IO> grad_s, Rows<const S> grad_v_seq, Rows<IO> grad_x, S* v, S* grad_v,
                int lanes, int steps, bool streaming) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S), most = kBlock * width;
  alignas(64) S received[kChunk * most], upstream[kChunk * most], driven[kChunk * most], moved[kChunk * most];
  const Rows<S> h{received, most}, gs{upstream, most};
  const Rows<S> drives{more.grad_leak ? driven : nullptr, most}, thresholds{moved, most};
  const int head = lanes_until_aligned<V>(grad_x.data);
  for (int j = 0, count = head ? most - width + head : most; j < lanes; j += count, count = most) {
    count = std::min(count, lanes - j);
    const Rows<S> g = norm.kept.data ? norm.kept.from(j) : gs;
    for (int k = 0; k < steps; ++k) {
      const IO* in = x[k] + j;
      if (norm.lanes)
        normalise(*norm.lanes, j, in, in, norm.residual.data ? norm.residual[k] + j : nullptr, most, h[k], count);
      else
        copy<S>(in, in, h[k], count, false);
    }
    recompute(n, own, j, h, drives, thresholds, grad_s.from(j).bytes(), sizeof(IO), v, steps, count);
    for (int k = 0; k < steps; ++k) copy<S>(grad_s[k] + j, grad_s[k] + j, gs[k], count, false);
    with_surrogate(p.surrogate, [&](auto curve) {
      walk_back<decltype(curve)>(n, more, own, j, h, gs, grad_v_seq, g, drives, thresholds, x.from(j + count).bytes(),
                                 sizeof(IO), grad_v, steps, count);
    });
    if (!norm.lanes)
      for (int k = 0; k < steps; ++k) copy<S>(g[k], g[k], grad_x[k] + j, count, streaming);
    else if (norm.totals)
      sum_up<IO, S>(norm, j, g, x.from(j), steps, count);
    else
      finish<IO, S>(norm, j, g, x.from(j), grad_x.from(j), steps, count, streaming);
  }
}

}  // namespace
}  // namespace snnkern::SNN_ISA
