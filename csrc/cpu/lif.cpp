// The LIF on the CPU. Compiled once per instruction set, in the namespace SNN_ISA; dispatch.cpp picks one at run time.
//
// Neurons are cut into tiles whose state stays in the cache for all T steps:
//   forward    read a row of x (one step of one tile), step the neurons, write a row of spikes
//   backward   in chunks of kChunk steps, last to first: per block of a few vectors, recompute h from the v kept at the
//              chunk's start, then walk back over it, the state in registers
// The rows of a tile lie far apart in memory, which hardware prefetchers do not follow, so every access asks for one
// that comes later. 16-bit numbers become float in registers. Inner dimensions too narrow for vectors are gathered into
// rows of a stage, a chunk at a time. Batch norm before the neurons, and sums over groups of steps after them, are
// passes of their own over a row (in backward, over a block) that is in the cache. So are the conversions of neurons
// that are not plain, `any` below, whose loops ask at run time what they are: the plain ones' pay nothing for them.
//
// Segments of time are tiles like any other. Each warms up on the steps before it (in backward: after it), without
// output, and notes the state from which it then starts, and with which it ends; these are compared bit for bit, and
// what differs runs again. So all outputs, gradients too, are those of the serial loop, whatever the number of threads.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "rows.h"
#include "threads.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kAhead = 2;          // rows between a prefetch and its use
constexpr int64_t kWorth = 32768;  // elements that another thread is worth

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
  // Calls run(tile, from) for all lanes that do not start where the segment `by` before them ended, and then for those
  // that this one changes.
  template <class Run>
  void repair(const Tiling& tiles, int threads, int by, Run&& run) const {
    if (segments == 1 || all_meet(by)) return;
    parallel_for(tiles.per_segment, threads, [&](int64_t i) {
      for (int64_t k = 1; k < segments; ++k) {
        const int64_t q = by > 0 ? k : segments - 1 - k;
        const Tile tile = differing(tiles[q * tiles.per_segment + i], q - by);
        if (tile.lanes > 0) run(tile, ends + (q - by) * neurons + tile.first);
      }
    });
  }
};

// The states of a tile's lanes from those of all neurons, [states, neurons]; null: a constant potential, the rest 0.
template <class S>
void start(S* v, const S* from, S constant, Tile tile, int states = 1, int64_t neurons = 0) {
  for (int k = 0; k < states; ++k) {
    if (from)
      std::copy_n(from + k * neurons + tile.first, tile.lanes, v + k * kLanes);
    else
      std::fill_n(v + k * kLanes, tile.lanes, k == 0 ? constant : S(0));
  }
}
// And to them.
template <class S>
void keep(const S* v, S* to, Tile tile, int states, int64_t neurons) {
  for (int k = 0; k < states; ++k) std::copy_n(v + k * kLanes, tile.lanes, to + k * neurons + tile.first);
}

template <class IO, class S = State<IO>>
struct Forward {
  enum class Way { warm_up, first, again };  // without output; with it; over what the first run has left

  const LIFSpec& p;
  const LIFShape& s;
  const LIFForward& a;
  bool narrow, streaming;
  Neuron<S> n{p};
  bool any = !n.kind().plain() || a.more.leak.data || a.more.threshold.data;
  int states = n.states();
  int64_t neurons = s.outer * s.inner;
  Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, s.inner};
  Sequence<const IO> residual{static_cast<const IO*>(a.norm.residual), s.steps * s.inner, s.inner, s.inner};
  Sequence<IO> spikes{static_cast<IO*>(a.spikes), s.steps_out * s.inner, s.inner, s.inner};
  Sequence<S> v_seq{static_cast<S*>(a.more.v_seq), s.steps * s.inner, s.inner, s.inner};

  // Where a tile starts from: `from`, or v_start.
  void begin(const Tile& tile, Local<S>& at, const S* from) const {
    if (a.norm.table) at.lanes.fill(a.norm, tile);
    if (any) at.own.fill(n, a.more, tile);
    at.own.fill_bias(a.more, tile);
    start(at.v, from, n.v_start, tile, states, neurons);
  }

  // From `begin` to `end`; `next` is what is read after that. False if the second run met the first: from there on that
  // one is right.
  bool walk(const Tile& tile, Local<S>& at, int64_t begin, int64_t end, const IO* next, Way way) const {
    for (int64_t t = begin; t < end; t += kChunk) {
      if (way != Way::warm_up && a.saved && t > 0) {
        S* saved = static_cast<S*>(a.saved) + (t / kChunk - 1) * states * neurons;
        if (way == Way::again && std::memcmp(at.v, saved + tile.first, tile.lanes * sizeof(S)) == 0) return false;
        keep(at.v, saved, tile, states, neurons);
      }
      const auto over_steps = [&](auto&& step) {
        const bool output = way != Way::warm_up;
        if (narrow)
          staged(step, tile, at, t, int(std::min<int64_t>(kChunk, end - t)), output);
        else
          rows(step, tile, at, t, std::min(t + kChunk, end), end, next, output);
      };
      if (any)
        over_steps([&](const auto* in, const auto* ahead, auto* out, bool past_cache) {
          step(n, at.own, in, ahead, at.v, out, tile.lanes, past_cache);
        });
      else
        with_form(n, [&](auto form, auto hard) {
          over_steps([&](const auto* in, const auto* ahead, auto* out, bool past_cache) {
            step<form(), hard()>(n, in, at.own.bias, ahead, at.v, out, tile.lanes, past_cache);
          });
        });
    }
    return true;
  }

  // The steps from t up to `until`, each row where it lies in memory.
  template <class Step>
  void rows(Step&& step, const Tile& tile, Local<S>& at, int64_t t, int64_t until, int64_t end, const IO* next,
            bool output) const {
    alignas(64) S received[kLanes], fired[kLanes];
    for (; t < until; ++t) {
      const bool within = t + kAhead < end;
      const IO *row = x.at(tile.first, t),
               *ahead = within ? x.at(tile.first, t + kAhead) : next + (t + kAhead - end) * s.x_step_stride;
      const auto spike = [&](const auto* in, const auto* in_ahead) {
        if (s.grouped()) {
          step(in, in_ahead, fired, false);
          add_to_group(tile, at, t, fired, [&](int64_t g) { return spikes.at(tile.first, g); });
        } else {
          IO* out = output ? spikes.at(tile.first, t) : reinterpret_cast<IO*>(fired);
          step(in, in_ahead, out, streaming && output);
        }
      };
      if (a.norm.table) {
        const IO* shortcut = residual.data ? residual.at(tile.first, t) : nullptr;
        normalise(at.lanes, 0, row, ahead, shortcut, within ? kAhead * s.inner : 0, received, tile.lanes);
        spike(received, received);
      } else {
        spike(row, ahead);
      }
      if (v_seq.data) copy<S>(at.v, at.v, v_seq.at(tile.first, t), tile.lanes, streaming);
    }
  }

  // As many steps from t on, gathered.
  template <class Step>
  void staged(Step&& step, const Tile& tile, Local<S>& at, int64_t t, int steps, bool output) const {
    alignas(64) S stage[kChunk * kPitch], residual_stage[kChunk * kPitch], v_stage[kChunk * kPitch];
    const int64_t first = s.grouped() ? group_of(t, s.steps, s.steps_out) : t;
    int64_t finished = t + steps;
    gather(x, tile, t, steps, stage);
    if (residual.data) gather(residual, tile, t, steps, residual_stage);
    for (int k = 0; k < steps; ++k) {
      S* row = stage + k * kPitch;
      if (a.norm.table)
        normalise<S>(at.lanes, 0, row, row, residual.data ? residual_stage + k * kPitch : nullptr, 0, row, tile.lanes);
      step(row, row, row, false);
      if (v_seq.data) std::copy_n(at.v, tile.lanes, v_stage + k * kPitch);
      if (s.grouped())
        finished = add_to_group(tile, at, t + k, row, [&](int64_t g) { return stage + (g - first) * kPitch; });
    }
    if (output && finished > first) scatter(spikes, tile, first, int(finished - first), stage);
    if (v_seq.data) scatter(v_seq, tile, t, steps, v_stage);
  }

  // A row of spikes to the sums of its group g, which go to to(g) with its last step. Returns how many are finished.
  template <class To>
  int64_t add_to_group(const Tile& tile, Local<S>& at, int64_t t, const S* row, To&& to) const {
    const int64_t g = group_of(t, s.steps, s.steps_out);
    const bool last = t + 1 == group_start(g + 1, s.steps, s.steps_out);
    add(row, t == group_start(g, s.steps, s.steps_out), at.totals, last ? to(g) : nullptr, tile.lanes, streaming);
    return g + last;
  }
};

template <class IO, class S = State<IO>>
void forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  using Way = typename Forward<IO>::Way;
  const Tiling tiles(s, useful_threads(threads));
  const Forward<IO> pass{p, s, a, tiles.narrow, streaming};
  const Seams<S> seams(a.scratch, s);
  const auto finish = [&](const Tile& tile, const S* v) {
    seams.note(seams.ends, tile, v);
    if (a.v_last && tile.end == s.steps) keep(v, static_cast<S*>(a.v_last), tile, pass.states, pass.neurons);
  };

  parallel_for(tiles.count, threads, [&](int64_t i) {
    const Tile tile = tiles[i], next = tiles[std::min(i + 1, tiles.count - 1)];
    Local<S> at;
    const int64_t from = std::max<int64_t>(0, tile.begin - s.warmup);
    pass.begin(tile, at, from > 0 ? nullptr : static_cast<const S*>(a.v));
    pass.walk(tile, at, from, tile.begin, pass.x.at(tile.first, tile.begin), Way::warm_up);
    seams.note(seams.starts, tile, at.v);
    pass.walk(tile, at, tile.begin, tile.end, pass.x.at(next.first, next.begin), Way::first);
    finish(tile, at.v);
    if (streaming) stream_fence();
  });
  seams.repair(tiles, threads, 1, [&](const Tile& tile, const S* from) {
    Local<S> at;
    pass.begin(tile, at, from - tile.first);
    if (pass.walk(tile, at, tile.begin, tile.end, pass.x.at(tile.first, tile.begin), Way::again)) finish(tile, at.v);
    if (streaming) stream_fence();
  });
}

template <class IO, class S = State<IO>>
struct Backward {
  const LIFSpec& p;
  const LIFShape& s;
  const LIFBackward& a;
  bool narrow, streaming;
  Neuron<S> n{p, a.more.table};
  bool any = !n.kind().plain() || a.more.leak.data || a.more.threshold.data || a.more.grad_v_seq;
  int states = n.states();
  int64_t neurons = s.outer * s.inner;
  Sequence<const IO> x{static_cast<const IO*>(a.x), s.x_outer_stride, s.x_step_stride, s.inner};

  template <class T>
  Sequence<T> of(T* data, int64_t steps) const {
    return {data, steps * s.inner, s.inner, s.inner};
  }

  // What the second pass takes of batch norm, in `lanes`.
  Normed<IO, S> normed(const Tile& tile, Lanes<S>& lanes) const {
    if (a.norm.table) lanes.fill(a.norm, tile, a.pull_push);
    return {a.norm.table ? &lanes : nullptr, {}, {}, nullptr, nullptr, {}};
  }

  // The gradient of a tile's last states (0 if they are not the last), to start from.
  void start_from(S* grad_v, const Tile& tile, int64_t from) const {
    start(grad_v, from < s.steps ? nullptr : static_cast<const S*>(a.grad_v_last), S(0), tile, states, neurons);
  }

  // Back over the chunks that begin at or after `begin` and before `end`.
  void walk(const Tile& tile, const Normed<IO, S>& norm, S* grad_v, int64_t begin, int64_t end, bool output) const {
    static constexpr S zeros[kLanes] = {};
    alignas(64) S v[kMostStates * kLanes], x_stage[kChunk * kPitch], grad_stage[kChunk * kPitch];
    alignas(64) S residual_stage[kChunk * kPitch], shortcut_stage[kChunk * kPitch], v_stage[kChunk * kPitch];
    Own<S> own;
    if (any) own.fill_back(n, a.more, tile);
    own.fill_bias(a.more, tile);
    double* by_bias = a.more.grad_bias ? own.by_bias : nullptr;
    const auto residual = of(static_cast<const IO*>(a.norm.residual), s.steps);
    const auto grad_s = of(static_cast<const IO*>(a.grad_spikes), s.steps_out);
    const auto grad_x = of(static_cast<IO*>(a.grad_x), s.steps);
    const auto grad_residual = of(static_cast<IO*>(a.grad_residual), s.steps);
    const auto grad_v_seq = of(static_cast<const S*>(a.more.grad_v_seq), s.steps);
    const auto *v0 = static_cast<const S*>(a.v), *saved = static_cast<const S*>(a.saved);

    for (int64_t t = (end - 1) / kChunk * kChunk; t >= begin && end > begin; t -= kChunk) {
      const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
      start(v, t > 0 ? saved + (t / kChunk - 1) * states * neurons : v0, n.v_start, tile, states, neurons);
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
                                  norm.moments,
                                  {}};
        const Rows<const S> in{x_stage, kPitch}, of_v{grad_v_seq.data ? v_stage : nullptr, kPitch};
        const Rows<S> out{grad_stage, kPitch};
        if (grad_v_seq.data) gather(grad_v_seq, tile, t, steps, v_stage);
        if (any)
          chunk_back(p, n, a.more, own, staged, in, upstream, of_v, out, v, grad_v, tile.lanes, steps, false);
        else
          chunk_back(p, n, staged, in, own.bias, by_bias, upstream, out, v, grad_v, tile.lanes, steps, false);
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
        const Rows<S> kept{norm.kept.data ? norm.kept[int(t)] : nullptr, norm.kept.stride};
        const Normed<IO, S> here{norm.lanes,  rows(residual, t), rows(grad_residual, t),
                                 norm.totals, norm.moments,      kept};
        const bool past_cache = streaming && output;
        if (any)
          chunk_back(p, n, a.more, own, here, rows(x, t), upstream, rows(grad_v_seq, t), out, v, grad_v, tile.lanes,
                     steps, past_cache);
        else
          chunk_back(p, n, here, rows(x, t), own.bias, by_bias, upstream, out, v, grad_v, tile.lanes, steps,
                     past_cache);
      }
    }
    if (output) own.write(a.more, tile, neurons);
  }

  // The first pass of batch norm over a tile: its sums of g and of g * (x - mean), added to its channels' in `sums`,
  // [2, channels]; g to `kept`, if that is not null.
  void add_sums(const Tile& tile, Rows<S> kept, S* grad_v, double* sums) const {
    alignas(64) double totals[kLanes] = {}, moments[kLanes] = {};
    Lanes<S> lanes;
    lanes.fill(a.norm, tile);
    start_from(grad_v, tile, s.steps);
    walk(tile, {&lanes, {}, {}, totals, moments, kept}, grad_v, 0, s.steps, false);
    fold(a.norm, tile, totals, sums);
    fold(a.norm, tile, moments, sums + a.norm.channels);
  }
};

template <class IO, class S = State<IO>>
void backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  const Tiling tiles(s, useful_threads(threads));
  const Backward<IO> pass{p, s, a, tiles.narrow, streaming};
  const Seams<S> seams(a.scratch, s);
  const auto run = [&](const Tile& tile, const Normed<IO, S>& norm, S* grad_v) {
    pass.walk(tile, norm, grad_v, tile.begin, tile.end, true);
    seams.note(seams.ends, tile, grad_v);
    if (a.grad_v && tile.segment == 0) keep(grad_v, static_cast<S*>(a.grad_v), tile, pass.states, pass.neurons);
    if (streaming) stream_fence();
  };

  parallel_for(tiles.count, threads, [&](int64_t i) {
    const Tile tile = tiles[i];
    alignas(64) S grad_v[kMostStates * kLanes];
    Lanes<S> lanes;
    const Normed<IO, S> norm = pass.normed(tile, lanes);
    const int64_t from = std::min(tile.end + s.warmup, s.steps);
    pass.start_from(grad_v, tile, from);
    pass.walk(tile, norm, grad_v, tile.end, from, false);
    seams.note(seams.starts, tile, grad_v);
    run(tile, norm, grad_v);
  });
  seams.repair(tiles, threads, -1, [&](const Tile& tile, const S* from) {
    alignas(64) S grad_v[kLanes];
    Lanes<S> lanes;
    std::copy_n(from, tile.lanes, grad_v);
    run(tile, pass.normed(tile, lanes), grad_v);
  });
}

// The sums of backward's first pass, [parts, 2, channels]. Tiles and parts do not depend on the number of threads.
template <class IO, class S = State<IO>>
void sums_of(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* sums, int threads) {
  const Tiling tiles(s, kMostParts);
  const Backward<IO> pass{p, s, a, tiles.narrow, false};
  const int64_t parts = parts_of(s), channels = a.norm.channels;
  parallel_for(parts, threads, [&](int64_t part) {
    double* to = std::fill_n(sums + part * 2 * channels, 2 * channels, 0.0) - 2 * channels;
    for (int64_t i = tiles.count * part / parts; i < tiles.count * (part + 1) / parts; ++i) {
      alignas(64) S grad_v[kLanes];
      pass.add_sums(tiles[i], {}, grad_v, to);
    }
  });
}

// Where the elements of a few channels, and g beside them, fit into the cache, backward makes both of its passes over
// them before it turns to the next: everything is read from memory once, and g computed once.
struct Groups {
  static constexpr int64_t kMostBytes = 4 << 20;  // of g
  int64_t period, channels, samples, in_group, count;
  int64_t pitch, kept;  // of g: elements from step to step, and in all

  // None where samples do not have their channels one after the other, or too few to share among threads. The sums of
  // a channel do not depend on the others in its group, nor on `threads`.
  Groups(const LIFShape& s, const Norm& n, int threads) : period(n.period), channels(n.channels), count(0), kept(0) {
    if (period == 1 || channels < 16 || s.inner % (period * channels) != 0 || Tiling(s, threads).narrow) return;
    samples = s.outer * s.inner / (period * channels);
    in_group = std::max<int64_t>(1, std::min(kLanes / period, channels / (4 * threads)));
    pitch = (in_group * period + 31) / 16 * 16;  // not a power of two, which would put all steps into a few sets
    kept = samples * s.steps * pitch;
    if (kept * (s.dtype == DType::f64 ? 8 : 4) > kMostBytes)
      kept = 0;
    else
      count = (channels + in_group - 1) / in_group;
  }
};

template <class IO, class S = State<IO>>
void norm_backward_of(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, const NormPlan& plan, double* sums,
                      void* affine, int threads, bool streaming) {
  const Groups groups(s, a.norm, threads);
  const Backward<IO> pass{p, s, a, false, streaming};
  const auto grad_x = pass.of(static_cast<IO*>(a.grad_x), s.steps);
  const auto grad_residual = pass.of(static_cast<IO*>(a.grad_residual), s.steps);
  std::fill_n(sums, 2 * groups.channels, 0.0);

  const auto group = [&](int64_t first, S* kept) {
    const int64_t last = std::min(first + groups.in_group, groups.channels), lanes = (last - first) * groups.period;
    const auto over_tiles = [&](auto&& f) {
      for (int64_t n = 0; n < groups.samples; ++n)
        for (int64_t j = 0; j < lanes; j += kLanes)
          f(Tile{(n * groups.channels + first) * groups.period + j, int(std::min<int64_t>(kLanes, lanes - j)), 0, 0,
                 s.steps},
            Rows<S>{kept + n * s.steps * groups.pitch + j, groups.pitch});
    };
    over_tiles([&](const Tile& tile, Rows<S> g) {
      alignas(64) S grad_v[kLanes];
      pass.add_sums(tile, g, grad_v, sums);
      if (a.grad_v) std::copy_n(grad_v, tile.lanes, static_cast<S*>(a.grad_v) + tile.first);
    });
    for (int64_t c = first; c < last; ++c)
      gradients_channel(c, plan, static_cast<const S*>(a.norm.table), add_up(c, plan, sums), nullptr,
                        static_cast<S*>(affine), static_cast<S*>(a.pull_push));
    over_tiles([&](const Tile& tile, Rows<S> g) {
      Lanes<S> of;
      of.fill(a.norm, tile, a.pull_push);
      const Rows<IO> shortcut{grad_residual.data ? grad_residual.at(tile.first, 0) : nullptr, s.inner};
      finish<IO, S>({&of, {}, shortcut, nullptr, nullptr, {}}, 0, g, {pass.x.at(tile.first, 0), s.x_step_stride},
                    {grad_x.at(tile.first, 0), s.inner}, int(s.steps), tile.lanes, streaming);
    });
  };
  parallel_for(groups.count, threads, [&](int64_t i, int thread) {
    group(i * groups.in_group, static_cast<S*>(a.scratch) + thread * groups.kept);
    if (streaming) stream_fence();
  });
}

// As many threads as the work is worth.
int threads_for(const LIFShape& s, int threads) {
  return int(std::clamp<int64_t>(s.outer * s.steps * s.inner / kWorth, 1, threads));
}

}  // namespace

void lif_forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { forward<decltype(io)>(p, s, a, threads_for(s, threads), streaming); });
}
void lif_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, int threads, bool streaming) {
  with_dtype(s.dtype, [&](auto io) { backward<decltype(io)>(p, s, a, threads_for(s, threads), streaming); });
}
void sums(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* to, int threads) {
  with_dtype(s.dtype, [&](auto io) { sums_of<decltype(io)>(p, s, a, to, threads_for(s, threads)); });
}
int64_t norm_kept(const LIFShape& s, const Norm& n, int threads) {
  threads = threads_for(s, threads);
  return Groups(s, n, threads).kept * threads;
}
void norm_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, const NormPlan& plan, double* sums,
                   void* affine, int threads, bool streaming) {
  threads = threads_for(s, threads);
  with_dtype(s.dtype,
             [&](auto io) { norm_backward_of<decltype(io)>(p, s, a, plan, sums, affine, threads, streaming); });
}

}  // namespace snnkern::SNN_ISA
