// What the CPU's LIF and batch norm do to the rows of a tile: a row is one step of its neurons.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../neuron.h"
#include "../norm.h"
#include "tiles.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kBlock = 8;  // vectors that backward keeps in registers

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

// The leak and the threshold of each lane, for neurons that are not plain, and backward's sums over time for those that
// are tensors.
template <class S>
struct Own {
  alignas(64) S leak[kLanes], input_gain[kLanes], state_gain[kLanes], threshold[kLanes], fire_above[kLanes];
  alignas(64) double by_leak[kLanes], by_threshold[kLanes];

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
  void write(const More& more, const Tile& tile) const {
    if (more.grad_leak) std::copy_n(by_leak, tile.lanes, static_cast<S*>(more.grad_leak) + tile.first);
    if (more.grad_threshold) std::copy_n(by_threshold, tile.lanes, static_cast<S*>(more.grad_threshold) + tile.first);
  }
};

template <class S>
struct Local {  // what a tile needs from step to step
  alignas(64) S v[kLanes], totals[kLanes];
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

template <class In, class Out, class S>
void step(const Neuron<S>& neuron, const Own<S>& own, const In* x, const In* ahead, S* v, Out* out, int lanes,
          bool streaming) {
  const Neuron<S> n = neuron;
  const Kind kind = n.kind();
  over_lanes<S>(out, lanes, [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    __builtin_prefetch(ahead + j);
    const W threshold = load<W>(own.threshold + j), fire_above = load<W>(own.fire_above + j);
    W h = charge(n.form, n, load<W>(own.leak + j), load<W>(v + j), load<W>(x + j));
    if (kind.bounded) h = bound(n, h);
    const W s = spike(kind, n, threshold, fire_above, h);
    store(v + j, reset(kind, n, threshold, h, s), false);
    store(out + j, s, streaming);
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
  operator Rows<const IO>() const { return {data, stride, row}; }
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
    const Rows<S> g = norm.kept.data ? norm.kept.from(j) : cached;
    const auto recomputed = [&](auto in) {
      with_form(n, [&](auto form, auto hard) {
        recompute<form(), hard(), W, vectors()>(n, in, grad_s.from(j), v + j, h, steps);
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
      recomputed(x.from(j));
      walked(grad_x.from(j), streaming);
      return;
    }
    for (int k = 0; k < steps; ++k)
      normalise(*norm.lanes, j, x[k] + j, x[k] + j, norm.residual.data ? norm.residual[k] + j : nullptr, 0, cached[k],
                count);
    recomputed(Rows<const S>(cached));
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

// The same of neurons that are not plain, whose lanes j, j + 1, ... are `own`'s from `first` on: in the cache, and in
// the state's numbers. First pass: what they receive becomes h; the drives go to `drives`.
template <class S>
[[gnu::noinline]] void recompute(const Neuron<S>& neuron, const Own<S>& own, int first, Rows<S> h, Rows<S> drives,
                                 const S* start, int steps, int count) {
  const Neuron<S> n = neuron;
  const Kind kind = n.kind();
  over_lanes<S>(h.data, count, [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    const W leak = load<W>(own.leak + first + j), threshold = load<W>(own.threshold + first + j);
    const W fire_above = load<W>(own.fire_above + first + j);
    W v = load<W>(start + j);
    for (int k = 0; k < steps; ++k) {
      const W x = load<W>(h[k] + j);
      if (drives.data) store(drives[k] + j, drive(n.form, n, v, x), false);
      W potential = charge(n.form, n, leak, v, x);
      if (kind.bounded) potential = bound(n, potential);
      store(h[k] + j, potential, false);
      v = reset(kind, n, threshold, potential, spike(kind, n, threshold, fire_above, potential));
    }
  });
}

// Second pass. A drive becomes what its step adds to the leak's gradient, `by_threshold` what it adds to the
// threshold's.
template <class Curve, class S>
[[gnu::noinline]] void walk_back(const Neuron<S>& neuron, const Own<S>& own, int first, Rows<S> h, Rows<S> grad_s,
                                 Rows<const S> grad_v_seq, Rows<S> g, Rows<S> drives, Rows<S> by_threshold, S* grad_v,
                                 int steps, int count) {
  const Neuron<S> n = neuron;
  Kind kind = n.kind();
  kind.integer = std::is_same_v<Curve, Integer>;
  over_lanes<S>(h.data, count, [&](int j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    const W threshold = load<W>(own.threshold + first + j), fire_above = load<W>(own.fire_above + first + j);
    const W input_gain = load<W>(own.input_gain + first + j), state_gain = load<W>(own.state_gain + first + j);
    W carry = load<W>(grad_v + j);
    for (int k = steps - 1; k >= 0; --k) {
      if (grad_v_seq.data) carry = carry + load<W>(grad_v_seq[k] + j);
      const auto to = pulled<Curve>(kind, n, threshold, fire_above, load<W>(h[k] + j), load<W>(grad_s[k] + j), carry);
      // Nothing comes back from an infinite potential; the select keeps 0 * inf out.
      if (drives.data) store(drives[k] + j, to.h != S(0) ? to.h * load<W>(drives[k] + j) : W{}, false);
      if (by_threshold.data) store(by_threshold[k] + j, to.threshold, false);
      carry = to.h * state_gain;
      store(g[k] + j, to.h * input_gain, false);
    }
    store(grad_v + j, carry, false);
  });
}

template <class IO, class S>
void chunk_back(const LIFSpec& p, const Neuron<S>& n, const More& more, Own<S>& own, const Normed<IO, S>& norm,
                Rows<const IO> x, Rows<const IO> grad_s, Rows<const S> grad_v_seq, Rows<IO> grad_x, const S* v,
                S* grad_v, int lanes, int steps, bool streaming) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S), most = kBlock * width;
  alignas(64) S received[kChunk * most], upstream[kChunk * most], driven[kChunk * most], moved[kChunk * most];
  const Rows<S> h{received, most}, gs{upstream, most};
  const Rows<S> drives{more.grad_leak ? driven : nullptr, most};
  const Rows<S> by_threshold{more.grad_threshold ? moved : nullptr, most};
  const int head = lanes_until_aligned<V>(grad_x.data);
  for (int j = 0, count = head ? most - width + head : most; j < lanes; j += count, count = most) {
    count = std::min(count, lanes - j);
    const Rows<S> g = norm.kept.data ? norm.kept.from(j) : gs;
    for (int k = 0; k < steps; ++k) {
      const IO* in = x[k] + j;
      if (norm.lanes)
        normalise(*norm.lanes, j, in, in + most, norm.residual.data ? norm.residual[k] + j : nullptr, most, h[k],
                  count);
      else
        copy<S>(in, in + most, h[k], count, false);
      copy<S>(grad_s[k] + j, grad_s[k] + j + most, gs[k], count, false);
    }
    recompute(n, own, j, h, drives, v + j, steps, count);
    with_surrogate(p.surrogate, [&](auto curve) {
      const Rows<const S> of_v{grad_v_seq.data ? grad_v_seq.data + j : nullptr, grad_v_seq.stride};
      walk_back<decltype(curve)>(n, own, j, h, gs, of_v, g, drives, by_threshold, grad_v + j, steps, count);
    });
    const auto add_steps = [&](Rows<S> rows, double* totals) {
      for (int k = 0; k < steps && rows.data; ++k)
        for (int i = 0; i < count; ++i) totals[j + i] += rows[k][i];
    };
    add_steps(drives, own.by_leak);
    add_steps(by_threshold, own.by_threshold);
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
