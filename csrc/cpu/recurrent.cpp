// Recurrent layers on the CPU. Compiled once per instruction set, as lif.cpp.
//
// Neurons of a layer wait for each other's spikes at every step, for those of other layers never. So a thread takes a
// few layers through all of time, and there is nothing to wait for:
//   forward    of the neurons that fired at the step before, add up the rows of `outgoing`, in registers, for a few
//              vectors of receivers at a time; step the neurons; list those that fire
//   backward   in chunks of kChunk steps, last to first: recompute h of the chunk, then walk back over it. What comes
//              back to a spike is a sum over rows of `weight`, each read once for all layers of the thread, and not at
//              all where no receiver has a gradient, as where a surrogate is 0
#include <algorithm>
#include <memory>

#include "kernels.h"
#include "rows.h"
#include "threads.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kTogether = 4;       // layers that a thread runs side by side
constexpr int kAhead = 2;          // steps between a prefetch and its use
constexpr int64_t kWorth = 16384;  // neurons times steps that another thread is worth
constexpr int64_t kPart = 2048;    // rows that are summed in one part, if more than one but not kMostParts

// A row that is used later: rows lie too far apart for the hardware to foresee them.
template <int write, class T>
[[gnu::always_inline]] inline void ask_for(const T* row, int64_t size) {
  for (int64_t j = 0; j < size && row; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j, write);
}

// A bit for each lane that is not 0.
template <class V>
inline unsigned nonzero(V x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return x != 0;
  } else {
    unsigned bits = 0;
    for (unsigned i = 0; i < kVectorBytes / sizeof x[0]; ++i) bits |= unsigned(x[i] != 0) << i;
    return bits;
  }
}
#if defined(__AVX512F__)
inline unsigned nonzero(FloatV x) { return _mm512_cmp_ps_mask((__m512)x, __m512{}, _CMP_NEQ_UQ); }
#elif defined(__AVX__)
inline unsigned nonzero(FloatV x) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, __m256{}, _CMP_NEQ_UQ)); }
#elif defined(__x86_64__)
inline unsigned nonzero(FloatV x) { return _mm_movemask_ps(_mm_cmpneq_ps((__m128)x, __m128{})); }
#endif

// sum + g * w, in whatever way is fast: of gradients, which are bound to no bits.
template <class V, class S>
inline V add_product(V sum, S g, V w) {
  return sum + g * w;
}
#if defined(__AVX512F__)
inline FloatV add_product(FloatV sum, float g, FloatV w) {
  return (FloatV)_mm512_fmadd_ps(_mm512_set1_ps(g), (__m512)w, (__m512)sum);
}
inline DoubleV add_product(DoubleV sum, double g, DoubleV w) {
  return (DoubleV)_mm512_fmadd_pd(_mm512_set1_pd(g), (__m512d)w, (__m512d)sum);
}
#endif

// Calls f(j, V{}) for the vectors of a row, and f(j, S{}) for the lanes left over.
template <class S, class F>
[[gnu::always_inline]] inline void over_row(int64_t size, F&& f) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  int64_t j = 0;
  for (; j + width <= size; j += width) f(j, V{});
  for (; j < size; ++j) f(j, S{});
}

// Calls f(j, V{}, n) for n vectors of a row, `most` or fewer, from j on, and f(j, S{}, 1) for the lanes left over, or
// `again`, if f may take a lane twice, for a vector that overlaps others.
template <class S, int most, bool again, class F>
[[gnu::always_inline]] inline void over_blocks(int64_t size, F&& f, int64_t j = 0) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  constexpr std::integral_constant<int, most> n{};
  for (; j + most * width <= size; j += most * width) f(j, V{}, n);
  if constexpr (most > 1) {
    over_blocks<S, most / 2, again>(size, f, j);
  } else if (again && size >= width) {
    if (j < size) f(size - width, V{}, n);
  } else {
    for (; j < size; ++j) f(j, S{}, n);
  }
}

// The numbers, ascending, of the lanes of a row for which bits(j, V{}) or bits(j, S{}) has a 1. Returns how many.
template <class S, class F>
[[gnu::always_inline]] inline int list(int64_t size, int* to, F&& bits) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  int count = 0;
  for (int64_t j = 0; j < size; j += 64) {
    const int64_t lanes = std::min<int64_t>(64, size - j);
    uint64_t word = 0;
    int64_t l = 0;
    for (; l + width <= lanes; l += width) word |= uint64_t(bits(j + l, V{})) << l;
    for (; l < lanes; ++l) word |= uint64_t(bits(j + l, S{})) << l;
    for (; word; word &= word - 1) to[count++] = int(j + __builtin_ctzll(word));
  }
  return count;
}

// The rows of numbers that a layer has in the cache; those of backward after those of forward.
enum Row {
  kState,  // the potential and other states, one after the other
  kReceived = kState + 3,
  kBias,
  kLeak,
  kThreshold,
  kFireAbove,
  kSent,  // spikes that are not 1, in the order of the list
  kForwardRows,
  kInputGain = kForwardRows,
  kStateGain,
  kGradState,
  kGrad = kGradState + 3,  // dL/d(what is received)
  kUpstream,               // dL/ds
  kSums,                   // over a chunk: for the leak, the threshold, the bias
  kPotentials = kSums + 3,
  kThresholds = kPotentials + kChunk,
  kDrives = kThresholds + kChunk,
  kBackwardRows = kDrives + kChunk,
};

template <class S>
struct Layer {
  int64_t first;  // index of its first neuron in [outer * inner]
  S* rows;
  int64_t pitch;
  int* fired;      // neurons that fired at the step before
  double* totals;  // over all steps, as kSums
  int count = 0;   // of `fired`

  S* operator[](int row) const { return rows + row * pitch; }
};

// Memory for the layers that every thread has at a time.
template <class S>
class Memory {
 public:
  Memory(int64_t size, int64_t threads, int rows)
      : rows_(rows),
        pitch_((size + 15) / 16 * 16),
        bytes_((rows * sizeof(S) + sizeof(int) + 3 * sizeof(double)) * pitch_) {
    memory_.reset(new char[threads * kTogether * bytes_ + 64]);
  }
  Layer<S> layer(int thread, int b, int64_t first) const {
    char* from = memory_.get() + (-reinterpret_cast<intptr_t>(memory_.get()) & 63) + (thread * kTogether + b) * bytes_;
    double* totals = reinterpret_cast<double*>(from);
    S* rows = reinterpret_cast<S*>(totals + 3 * pitch_);
    return {first, rows, pitch_, reinterpret_cast<int*>(rows + rows_ * pitch_), totals};
  }

 private:
  int64_t rows_, pitch_, bytes_;
  std::unique_ptr<char[]> memory_;
};

// What a layer receives, z = (x + bias) + r.
template <bool multiplied, class IO, class S>
[[gnu::noinline]] void receive(const S* outgoing, int64_t size, const Layer<S>& layer, const IO* x, const S* bias) {
  const int* fired = layer.fired;
  const int count = layer.count;
  const S* sent = layer[kSent];
  S* z = layer[kReceived];
  over_blocks<S, 8, true>(size, [&](int64_t j, auto vector, auto n) __attribute__((always_inline)) {
    using W = decltype(vector);
    constexpr int width = sizeof(W) / sizeof(S), vectors = n();
    W r[vectors] = {};
    for (int c = 0; c < count; ++c) {
      const S* row = outgoing + fired[c] * size + j;
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) {
        const W w = load<W>(row + i * width);
        r[i] = r[i] + (multiplied ? sent[c] * w : w);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      W in = load<W>(x + j + i * width);
      if (bias) in = in + load<W>(bias + j + i * width);
      store(z + j + i * width, in + r[i], false);
    }
  });
}

// One step of plain neurons: spikes into `out`, or, of null, h into `potentials`.
template <Leak form, bool hard, class IO, class S>
void step(const Neuron<S>& neuron, const Layer<S>& layer, int64_t size, IO* out, S* potentials) {
  const Neuron<S> n = neuron;
  S* v = layer[kState];
  const S* z = layer[kReceived];
  over_row<S>(size, [&](int64_t j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    const W h = charge(form, n, load<W>(v + j), load<W>(z + j));
    store(v + j, reset(hard, n, h), false);
    if (out) {
      store_spike<IO, W>(out + j, h > n.fire_above, false);
    } else {
      store(potentials + j, h, false);
    }
  });
}

// Of any kind. Without `out`, for backward's step k of a chunk: h, and, if wanted, thresholds and drives.
template <class IO, class S>
[[gnu::noinline]] void step_any(const Neuron<S>& neuron, const Layer<S>& layer, int64_t size, IO* out, int k,
                                bool drives) {
  const Neuron<S> n = neuron;
  const Kind kind = n.kind();
  S *states = layer[kState], *potentials = layer[kPotentials + k], *thresholds = layer[kThresholds + k];
  S* driven = drives ? layer[kDrives + k] : nullptr;
  const S *z = layer[kReceived], *leak = layer[kLeak], *base = layer[kThreshold], *above = layer[kFireAbove];
  over_row<S>(size, [&](int64_t j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    States<W> at = load_states<W>(kind, states + j, layer.pitch);
    const auto to = advance(kind, n, load<W>(leak + j), load<W>(base + j), load<W>(above + j), at, load<W>(z + j));
    store_states(kind, states + j, layer.pitch, at);
    if (out) {
      store(out + j, to.s, false);
      return;
    }
    store(potentials + j, to.h, false);
    if (kind.adaptive) store(thresholds + j, to.threshold, false);
    if (driven) store(driven + j, drive(n.form, n, to.before, to.x), false);
  });
}

// What comes back to the spikes of the layers: of each, the sum over k of weight[k] * dL/d(received by k).
template <int layers, class S>
[[gnu::noinline]] void send_back(const S* weight, int64_t size, const int* receivers, int count, const Layer<S>* of) {
  const S* grad[layers];
  S* to[layers];
  for (int b = 0; b < layers; ++b) {
    grad[b] = of[b][kGrad];
    to[b] = of[b][kUpstream];
  }
  constexpr int most = kVectorBytes == 64 ? (layers > 2 ? 4 : 8) : layers > 2 ? 2 : 4;  // as registers go
  over_blocks<S, most, true>(size, [&](int64_t j, auto vector, auto n) __attribute__((always_inline)) {
    using W = decltype(vector);
    constexpr int width = sizeof(W) / sizeof(S), vectors = n();
    W sums[layers][vectors] = {};
    for (int c = 0; c < count; ++c) {
      const int k = receivers[c];
      const S* row = weight + k * size + j;
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) {
        const W w = load<W>(row + i * width);
#pragma GCC unroll 4
        for (int b = 0; b < layers; ++b) sums[b][i] = add_product(sums[b][i], grad[b][k], w);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < layers; ++b)
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) store(to[b] + j + i * width, sums[b][i], false);
  });
}

template <class S>
void send_back(const S* weight, int64_t size, const Layer<S>* layers, int count) {
  int* receivers = layers[0].fired;  // of no use to backward after h is recomputed
  const int listed = list<S>(size, receivers, [&](int64_t j, auto vector) __attribute__((always_inline)) {
    unsigned bits = 0;
    for (int b = 0; b < count; ++b) bits |= nonzero(load<decltype(vector)>(layers[b][kGrad] + j));
    return bits;
  });
  switch (count) {
    case 1: return send_back<1>(weight, size, receivers, listed, layers);
    case 2: return send_back<2>(weight, size, receivers, listed, layers);
    case 3: return send_back<3>(weight, size, receivers, listed, layers);
    case 4: return send_back<4>(weight, size, receivers, listed, layers);
  }
}

// One step back, of plain neurons, whose h is in row k of the chunk.
template <class Curve, class S>
[[gnu::noinline]] void back(const Neuron<S>& neuron, const Layer<S>& layer, int64_t size, int k, bool by_bias) {
  const Neuron<S> n = neuron;
  const S *h = layer[kPotentials + k], *grad_s = layer[kUpstream];
  S *grad_v = layer[kGradState], *grad = layer[kGrad], *sum = by_bias ? layer[kSums + 2] : nullptr;
  over_row<S>(size, [&](int64_t j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    const W to_h = adjoint<Curve>(n, load<W>(h + j), load<W>(grad_s + j), load<W>(grad_v + j));
    const W g = to_h * n.input_gain;
    store(grad_v + j, to_h * n.state_gain, false);
    store(grad + j, g, false);
    if (sum) store(sum + j, load<W>(sum + j) + g, false);
  });
}

// Of any kind.
template <class Curve, class S>
[[gnu::noinline]] void back_any(const Neuron<S>& neuron, const Layer<S>& layer, int64_t size, int k, bool by_leak,
                                bool by_threshold, bool by_bias) {
  const Neuron<S> n = neuron;
  Kind kind = n.kind();
  kind.integer = std::is_same_v<Curve, Integer>;
  const S *potentials = layer[kPotentials + k], *upstream = layer[kUpstream], *driven = layer[kDrives + k];
  const S *thresholds = layer[kind.adaptive ? kThresholds + k : kThreshold], *above = layer[kFireAbove];
  const S *input_gain = layer[kInputGain], *state_gain = layer[kStateGain];
  S *states = layer[kGradState], *received = layer[kGrad];
  S *of_leak = layer[kSums], *of_threshold = layer[kSums + 1], *of_bias = layer[kSums + 2];
  over_row<S>(size, [&](int64_t j, auto vector) __attribute__((always_inline)) {
    using W = decltype(vector);
    States<W> grad = load_states<W>(kind, states + j, layer.pitch);
    const auto to = retreat<Curve>(kind, n, load<W>(thresholds + j), load<W>(above + j), load<W>(input_gain + j),
                                   load<W>(state_gain + j), load<W>(potentials + j), load<W>(upstream + j), grad);
    store_states(kind, states + j, layer.pitch, grad);
    store(received + j, to.x, false);
    if (by_leak) store(of_leak + j, load<W>(of_leak + j) + by_drive(to.h, load<W>(driven + j)), false);
    if (by_threshold) store(of_threshold + j, load<W>(of_threshold + j) + to.threshold, false);
    if (by_bias) store(of_bias + j, load<W>(of_bias + j) + to.x, false);
  });
}

// What forward and backward have in common.
template <class IO, class S = State<IO>>
struct Layers {
  const LIFSpec& p;
  const LIFShape& s;
  const Recurrence& r;
  const More& more;
  const S* v;
  int threads;
  Neuron<S> n{p, more.table};
  bool any = !n.kind().plain() || more.leak.data || more.threshold.data;
  bool multiplied = n.ternary || n.surrogate == Surrogate::Integer;
  int64_t size = r.size, neurons = s.outer * s.inner, count = size > 0 ? neurons / size : 0;
  int64_t together = std::clamp<int64_t>((count + threads - 1) / threads, 1, kTogether);
  const S* outgoing = static_cast<const S*>(r.outgoing);

  template <class T>
  Sequence<T> of(T* data) const {
    return {data, s.steps * s.inner, s.inner, s.inner};
  }
  Sequence<const IO> x_of(const void* x) const {
    return {static_cast<const IO*>(x), s.x_outer_stride, s.x_step_stride, s.inner};
  }

  // Calls f(layers, count) for the layers that a thread runs side by side.
  template <class F>
  void share(int rows, F&& f) const {
    const int64_t shares = (count + together - 1) / together;
    const Memory<S> memory(size, std::min<int64_t>(threads, shares), rows);
    parallel_for(shares, threads, [&](int64_t i, int thread) {
      Layer<S> layers[kTogether];
      const int here = int(std::min(together, count - i * together));
      for (int b = 0; b < here; ++b) layers[b] = memory.layer(thread, b, (i * together + b) * size);
      f(layers, here);
    });
  }

  void fill_parameters(const Layer<S>& layer) const {
    const Tile tile{layer.first, int(size), 0, 0, 0};
    const auto fill = [&](const Parameter& of, const void* data, S number, S* row) {
      data ? spread(of, tile, static_cast<const S*>(data), row) : void(std::fill_n(row, size, number));
    };
    if (more.bias.data) fill(more.bias, more.bias.data, 0, layer[kBias]);
    if (!any) return;
    fill(more.leak, more.leak.data, n.leak, layer[kLeak]);
    fill(more.threshold, more.threshold.data, n.threshold, layer[kThreshold]);
    fill(more.threshold, more.fire_above, n.fire_above, layer[kFireAbove]);
  }

  // States before step t, a multiple of kChunk.
  void start(const Layer<S>& layer, int64_t t, const S* saved) const {
    const S* from = t > 0 ? saved + (t / kChunk - 1) * n.states() * neurons : v;
    for (int i = 0; i < n.states(); ++i) {
      if (from)
        std::copy_n(from + i * neurons + layer.first, size, layer[kState + i]);
      else
        std::fill_n(layer[kState + i], size, i ? S(0) : n.v_start);
    }
  }

  // Lists who fired, from a row of spikes; null: nobody.
  void listen(Layer<S>& layer, const IO* spikes, bool sizes) const {
    layer.count = 0;
    if (!spikes) return;
    layer.count = list<S>(size, layer.fired, [&](int64_t j, auto vector) __attribute__((always_inline)) {
      return nonzero(load<decltype(vector)>(spikes + j));
    });
    if (sizes)
      for (int c = 0; c < layer.count; ++c) layer[kSent][c] = load<S>(spikes + layer.fired[c]);
  }
  void listen_before(Layer<S>& layer) const {
    listen(layer, r.s ? static_cast<const IO*>(r.s) + layer.first : nullptr, true);
  }

  void received(const Layer<S>& layer, int64_t t, const IO* x) const {
    const S* bias = more.bias.data ? layer[kBias] : nullptr;
    if (multiplied || t == 0)
      receive<true>(outgoing, size, layer, x, bias);
    else
      receive<false>(outgoing, size, layer, x, bias);
  }
  void stepped(const Layer<S>& layer, IO* out, int k, bool drives) const {
    if (any) return step_any<IO>(n, layer, size, out, k, drives);
    with_form(n, [&](auto form, auto hard) {
      step<form(), hard()>(n, layer, size, out, out ? nullptr : layer[kPotentials + k]);
    });
  }
};

template <class IO, class S = State<IO>>
void forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, const Recurrence& r, int threads) {
  const Layers<IO> of{p, s, r, a.more, static_cast<const S*>(a.v), threads};
  const auto x = of.x_of(a.x);
  const auto spikes = of.of(static_cast<IO*>(a.spikes));
  const int64_t size = of.size;

  of.share(kForwardRows, [&](Layer<S>* layers, int here) {
    for (int b = 0; b < here; ++b) {
      of.fill_parameters(layers[b]);
      of.start(layers[b], 0, nullptr);
      of.listen_before(layers[b]);
    }
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t ahead = std::min(t + kAhead, s.steps - 1);
      for (int b = 0; b < here; ++b) {
        Layer<S>& layer = layers[b];
        if (a.saved && t > 0 && t % kChunk == 0)
          for (int i = 0; i < of.n.states(); ++i)
            std::copy_n(layer[kState + i], size,
                        static_cast<S*>(a.saved) + ((t / kChunk - 1) * of.n.states() + i) * of.neurons + layer.first);
        IO* out = spikes.at(layer.first, t);
        ask_for<0>(x.at(layer.first, ahead), size);
        ask_for<1>(spikes.at(layer.first, ahead), size);
        of.received(layer, t, x.at(layer.first, t));
        of.stepped(layer, out, 0, false);
        of.listen(layer, out, of.multiplied);
      }
    }
    for (int b = 0; b < here && a.v_last; ++b)
      for (int i = 0; i < of.n.states(); ++i)
        std::copy_n(layers[b][kState + i], size, static_cast<S*>(a.v_last) + i * of.neurons + layers[b].first);
  });
}

template <class IO, class S = State<IO>>
void backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, const Recurrence& r, int threads) {
  const Layers<IO> of{p, s, r, a.more, static_cast<const S*>(a.v), threads};
  const auto x = of.x_of(a.x);
  const auto spikes = of.of(static_cast<const IO*>(r.spikes)), grad_s = of.of(static_cast<const IO*>(a.grad_spikes));
  const auto grad_x = of.of(static_cast<IO*>(a.grad_x));
  const auto* weight = static_cast<const S*>(r.weight);
  const int64_t size = of.size;
  void* const sums[] = {a.more.grad_leak, a.more.grad_threshold, a.more.grad_bias};

  const auto begin = [&](const Layer<S>& layer) {
    of.fill_parameters(layer);
    for (int64_t j = 0; j < size && of.any; ++j) {
      layer[kInputGain][j] = a.more.leak.data ? gain_of_input(of.n.form, layer[kLeak][j]) : of.n.input_gain;
      layer[kStateGain][j] = a.more.leak.data ? gain_of_state(of.n.form, layer[kLeak][j]) : of.n.state_gain;
    }
    for (int i = 0; i < of.n.states(); ++i) {
      if (a.grad_v_last)
        std::copy_n(static_cast<const S*>(a.grad_v_last) + i * of.neurons + layer.first, size, layer[kGradState + i]);
      else
        std::fill_n(layer[kGradState + i], size, S(0));
    }
    std::fill_n(layer[kUpstream], size, S(0));
    std::fill_n(layer.totals, 3 * layer.pitch, 0.0);
  };
  const auto recompute = [&](Layer<S>& layer, int64_t t, int steps) {
    of.start(layer, t, static_cast<const S*>(a.saved));
    for (int k = 0; k < steps; ++k) {
      if (t + k == 0)
        of.listen_before(layer);
      else
        of.listen(layer, spikes.at(layer.first, t + k - 1), of.multiplied);
      of.received(layer, t + k, x.at(layer.first, t + k));
      of.stepped(layer, nullptr, k, a.more.grad_leak);
      const int64_t next = t + steps - 1 - k;  // of the walk back
      if (grad_s.data) ask_for<0>(grad_s.at(layer.first, next), size);
      ask_for<1>(grad_x.at(layer.first, next), size);
    }
  };
  const auto step_back = [&](const Layer<S>& layer, int64_t t, int k) {
    if (grad_s.data)
      over_row<S>(size, [&, to = layer[kUpstream], from = grad_s.at(layer.first, t)](int64_t j, auto vector) {
        using W = decltype(vector);
        store(to + j, load<W>(to + j) + load<W>(from + j), false);
      });
    if (const int64_t next = t - k - 1 - k; next >= 0) {  // of the chunk before
      ask_for<0>(x.at(layer.first, next), size);
      ask_for<0>(spikes.at(layer.first, next), size);
    }
    with_surrogate(p.surrogate, [&](auto curve) {
      if (of.any)
        back_any<decltype(curve)>(of.n, layer, size, k, sums[0], sums[1], sums[2]);
      else if constexpr (!std::is_same_v<decltype(curve), Integer>)
        back<decltype(curve)>(of.n, layer, size, k, sums[2]);
    });
    over_row<S>(size, [&, from = layer[kGrad], to = grad_x.at(layer.first, t)](int64_t j, auto vector) {
      store(to + j, load<decltype(vector)>(from + j), false);
    });
  };

  of.share(kBackwardRows, [&](Layer<S>* layers, int here) {
    for (int b = 0; b < here; ++b) begin(layers[b]);
    for (int64_t t = (s.steps - 1) / kChunk * kChunk; t >= 0 && s.steps > 0; t -= kChunk) {
      const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
      for (int b = 0; b < here; ++b) {
        recompute(layers[b], t, steps);
        std::fill_n(layers[b][kSums], 3 * layers[b].pitch, S(0));
      }
      for (int k = steps - 1; k >= 0; --k) {
        if (t + k + 1 < s.steps) send_back(weight, size, layers, here);
        for (int b = 0; b < here; ++b) step_back(layers[b], t + k, k);
      }
      for (int b = 0; b < here; ++b)
        for (int i = 0; i < 3; ++i)
          for (int64_t j = 0; j < size && sums[i]; ++j)
            layers[b].totals[i * layers[b].pitch + j] += layers[b][kSums + i][j];
    }
    if (r.grad_s && s.steps > 0) send_back(weight, size, layers, here);
    for (int b = 0; b < here; ++b) {
      const Layer<S>& layer = layers[b];
      if (r.grad_s) std::copy_n(layer[kUpstream], size, static_cast<S*>(r.grad_s) + layer.first);
      for (int i = 0; i < of.n.states() && a.grad_v; ++i)
        std::copy_n(layer[kGradState + i], size, static_cast<S*>(a.grad_v) + i * of.neurons + layer.first);
      for (int i = 0; i < 3; ++i)
        if (sums[i]) std::copy_n(layer.totals + i * layer.pitch, size, static_cast<S*>(sums[i]) + layer.first);
    }
  });
}

inline bool is_spike(float x) { return x != 0; }
inline bool is_spike(double x) { return x != 0; }
template <class Short>
inline bool is_spike(Short x) {
  return (x.bits & 0x7fff) != 0;
}

// Sets a bit for every spike of a row.
template <class IO>
void mark(const IO* row, int64_t size, uint64_t bit, uint64_t* marks) {
  for (int64_t j = 0; j < size; ++j) marks[j] |= is_spike(row[j]) ? bit : 0;
}

// The gradient of the weight, transposed: row j is the sum of the rows of grad_x over the steps before which j fired.
// A few rows are taken into the first cache at a time, where for each j bits say which of them to add. They are summed
// in parts, which depend on nothing but the shape.
template <class IO, class S = State<IO>>
void weigh(const LIFShape& s, const Recurrence& r, const IO* grad_x, S* grad, bool multiplied, int threads) {
  using V = typename VectorOf<S>::type;
  constexpr int lanes = kBlock * sizeof(V) / sizeof(S), at_once = 64;
  const int64_t size = r.size, pitch = (size + 15) / 16 * 16, layers = size > 0 ? s.inner / size : 0;
  const int64_t rows = s.outer * s.steps * layers, parts = std::clamp<int64_t>(rows / kPart, 1, kMostParts);
  const auto *spikes = static_cast<const IO*>(r.spikes), *before = static_cast<const IO*>(r.s);
  const std::unique_ptr<S[]> sums(new S[parts * size * pitch]());
  const std::unique_ptr<uint64_t[]> masks(new uint64_t[std::min<int64_t>(threads, parts) * size]);

  parallel_for(parts, threads, [&](int64_t part, int thread) {
    alignas(64) S block[at_once * lanes] = {};
    const IO* seen[at_once];
    S* sum = sums.get() + part * size * pitch;
    uint64_t* fired = masks.get() + thread * size;
    for (int64_t first = rows * part / parts, end = rows * (part + 1) / parts; first < end; first += at_once) {
      const int count = int(std::min<int64_t>(at_once, end - first));
      bool factors = multiplied;
      std::fill_n(fired, size, 0);
      for (int i = 0; i < count; ++i) {
        const int64_t row = first + i, t = row / layers % s.steps,
                      of_s = row / layers / s.steps * layers + row % layers;
        seen[i] = t > 0 ? spikes + (row - layers) * size : before ? before + of_s * size : nullptr;
        factors |= t == 0;
        if (seen[i]) mark(seen[i], size, uint64_t(1) << i, fired);
      }
      for (int64_t k = 0; k < size; k += lanes) {
        const int64_t here = std::min<int64_t>(lanes, size - k);
        for (int i = 0; i < count; ++i)
          over_row<S>(here, [&, from = grad_x + (first + i) * size + k, to = block + i * lanes](
                                int64_t l, auto vector) { store(to + l, load<decltype(vector)>(from + l), false); });
        over_blocks<S, kBlock, false>(
            (here + 15) / 16 * 16, [&](int64_t l, auto vector, auto n) __attribute__((always_inline)) {
              using W = decltype(vector);
              constexpr int width = sizeof(W) / sizeof(S), vectors = n();
              for (int64_t j = 0; j < size; ++j) {
                if (!fired[j]) continue;
                S* to = sum + j * pitch + k + l;
                W total[vectors];
                for (int v = 0; v < vectors; ++v) total[v] = load<W>(to + v * width);
                for (uint64_t left = fired[j]; left; left &= left - 1) {
                  const int i = __builtin_ctzll(left);
                  const S* from = block + i * lanes + l;
                  const S factor = factors ? load<S>(seen[i] + j) : S(1);
                  for (int v = 0; v < vectors; ++v)
                    total[v] = total[v] + (factors ? factor * load<W>(from + v * width) : load<W>(from + v * width));
                }
                for (int v = 0; v < vectors; ++v) store(to + v * width, total[v], false);
              }
            });
      }
    }
  });
  parallel_for(size, threads, [&](int64_t j) {
    std::copy_n(sums.get() + j * pitch, size, grad + j * size);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t k = 0; k < size; ++k) grad[j * size + k] += sums[(part * size + j) * pitch + k];
  });
}

// As many threads as the work is worth.
int threads_for(const LIFShape& s, int threads) {
  return int(std::clamp<int64_t>(s.outer * s.steps * s.inner / kWorth, 1, threads));
}

}  // namespace

void recurrent_forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, const Recurrence& r, int threads) {
  with_dtype(s.dtype, [&](auto io) { forward<decltype(io)>(p, s, a, r, threads_for(s, threads)); });
}
void recurrent_weight(const LIFSpec& p, const LIFShape& s, const Recurrence& r, const void* grad_x, void* grad,
                      int threads) {
  const bool multiplied = p.ternary || p.surrogate == Surrogate::Integer;
  with_dtype(s.dtype, [&](auto io) {
    using IO = decltype(io);
    weigh(s, r, static_cast<const IO*>(grad_x), static_cast<State<IO>*>(grad), multiplied, threads_for(s, threads));
  });
}
void recurrent_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, const Recurrence& r, int threads) {
  with_dtype(s.dtype, [&](auto io) { backward<decltype(io)>(p, s, a, r, threads_for(s, threads)); });
}

}  // namespace snnkern::SNN_ISA
