// What one thread of the LIF kernels does; lif.cu says how threads are arranged. The kernels only add its number, so
// that a host can run every thread in turn.
//
// kLanes says what comes before the neurons: 0, nothing; 1 or kVec, a norm with one channel for all lanes of a thread
// or one for each, and perhaps a residual, with spikes summed over groups of steps if there are groups.
#pragma once
#include "../neuron.h"
#include "../norm.h"
#include "channels.cuh"
#include "memory.cuh"

namespace snnkern {
namespace {

template <int kVec, int kLanes>
constexpr int kGroup = kVec > 1     ? 4
                       : kLanes > 0 ? 8
                                    : 16;  // steps loaded together; divides kChunk
static_assert(kChunk % kGroup<1, 0> == 0);

template <class IO, int kVec, int kSteps>
using Group = Pack<IO, kVec>[kSteps];

// The steps t, t + 1, ... (or t, t - 1, ... with by = -1) of one thread's column, as far as they are in [0, steps).
template <class IO, int kVec, int kSteps>
SNN_HD void fetch(Group<IO, kVec, kSteps>& group, const IO* __restrict__ column, int64_t stride, int64_t t, int by,
                  int64_t steps) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int64_t u = t + k * by;
    if (u >= 0 && u < steps) group[k] = read<IO, kVec>(column + u * stride);
  }
}

struct Segment {  // its steps; wide threads never split time
  int64_t begin, end;

  SNN_HD Segment(const LIFShape& s, int64_t segment, int vec)
      : begin(vec == 1 ? segment * s.segment_steps : 0), end(vec == 1 ? begin + s.segment_steps : s.steps) {
    if (end > s.steps) end = s.steps;
  }
};

template <class T, int kVec>
SNN_HD Pack<T, kVec> read_or(const T* from, int64_t at, float constant) {
  Pack<T, kVec> pack;
#pragma unroll
  for (int e = 0; e < kVec; ++e) pack.lane[e] = constant;
  return from ? read<T, kVec>(from + at) : pack;
}

template <int kVec>
SNN_HD bool same_bits(const Pack<float, kVec>& a, const Pack<float, kVec>& b) {
  bool same = true;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    uint32_t bits_a, bits_b;
    memcpy(&bits_a, &a.lane[e], 4);
    memcpy(&bits_b, &b.lane[e], 4);
    same = same && bits_a == bits_b;
  }
  return same;
}

// The norm of a thread's neurons, the same channels for as long as the thread lives. Without a table it changes no bit
// (only -0 leaves even a -0 as it is).
template <int kLanes>
struct Affine {
  float mean[kLanes], scale[kLanes], offset[kLanes];

  SNN_HD Affine(const Norm& m, const Channels<kLanes>& channels) {
    const auto* table = static_cast<const float*>(m.table);
#pragma unroll
    for (int e = 0; e < kLanes; ++e) {
      const int64_t c = channels.of[e];
      mean[e] = table ? table[kMean * m.channels + c] : 0.0f;
      scale[e] = table ? table[kScale * m.channels + c] : 1.0f;
      offset[e] = table ? table[kOffset * m.channels + c] : -0.0f;
    }
  }
  static SNN_HD int lane(int e) { return kLanes > 1 ? e : 0; }
  SNN_HD float centred(int e, float x) const { return x - mean[lane(e)]; }
  SNN_HD float operator()(int e, float x) const { return centred(e, x) * scale[lane(e)] + offset[lane(e)]; }
};
template <>
struct Affine<0> {
  SNN_HD float operator()(int, float x) const { return x; }
};

// What the neurons receive for x; `residual` is the thread's column of it, null if there is none.
template <class IO, int kVec, int kLanes>
struct Input {
  Affine<kLanes> affine;
  const IO* residual;

  template <int kSteps>
  SNN_HD void fetch_residual(Group<IO, kVec, kSteps>& group, int64_t stride, int64_t t, int64_t end) const {
    if (kLanes > 0 && residual) fetch(group, residual, stride, t, 1, end);
  }
  SNN_HD float operator()(int e, IO x, IO more) const {
    const float normed = affine(e, to_state(x));
    return kLanes > 0 && residual ? normed + to_state(more) : normed;
  }
};

// Steps a thread's neurons from t, a multiple of kChunk, to `end`. x, spikes (null: no output) and saved (null: nothing
// is kept) are the thread's columns. With `until_met`, returns true as soon as the potential is the one saved before.
template <class IO, int kVec, int kLanes = 0>
SNN_HD bool march(Pack<float, kVec>& v, const Neuron<float>& n, const LIFShape& s, const Input<IO, kVec, kLanes>& input,
                  const IO* __restrict__ x, IO* __restrict__ spikes, float* __restrict__ saved, int64_t t, int64_t end,
                  bool until_met) {
  constexpr int kSteps = kGroup<kVec, kLanes>;
  Group<IO, kVec, kSteps> now, next, more;
  Pack<float, kVec> total{};
  int64_t group = 0, group_end = kLanes > 0 && s.grouped() ? group_start(1, s.steps, s.steps_out) : 1;
  fetch(next, x, s.x_step_stride, t, 1, end);
  for (; t < end; t += kSteps) {
    if (saved && t > 0 && t % kChunk == 0) {
      float* keep = saved + (t / kChunk - 1) * s.outer * s.inner;
      if (until_met && same_bits(v, read<float, kVec>(keep))) return true;
      write(keep, v);
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) now[k] = next[k];
    input.fetch_residual(more, s.inner, t, end);
    fetch(next, x, s.x_step_stride, t + kSteps, 1, end);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (t + k >= end) break;
      Pack<IO, kVec> out;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float h = charge(n.form, n, v.lane[e], input(e, now[k].lane[e], more[k].lane[e]));
        const float fired = h > n.fire_above ? 1.0f : 0.0f;
        if (kLanes > 0) total.lane[e] += fired;
        out.lane[e] = from_state<IO>(kLanes > 0 ? total.lane[e] : fired);
        v.lane[e] = reset(n.hard, n, h);
      }
      if (kLanes == 0) {
        if (spikes) write(spikes + (t + k) * s.inner, out);
      } else if (t + k + 1 == group_end) {
        write(spikes + group * s.inner, out);
        total = {};
        ++group;
        group_end = s.grouped() ? group_start(group + 1, s.steps, s.steps_out) : group + 1;
      }
    }
  }
  return false;
}

template <class IO, int kVec, int kLanes>
SNN_HD Input<IO, kVec, kLanes> input_of(const Norm& m, const IO* residual, const Place& at) {
  if constexpr (kLanes == 0)
    return {};
  else
    return {Affine<kLanes>(m, Channels<kLanes>(m, at.state)), residual ? residual + at.sequence : nullptr};
}

template <class IO, int kVec, int kLanes>
SNN_HD void forward_thread(int64_t thread, int64_t segment, const Neuron<float>& n, const LIFShape& s, const Norm& m,
                           const IO* __restrict__ x, const IO* __restrict__ residual, const float* __restrict__ v0,
                           IO* __restrict__ spikes, float* __restrict__ v_last, float* __restrict__ saved,
                           float* __restrict__ scratch) {
  const Place at(s, thread * kVec);
  if (!at.inside) return;
  const auto input = input_of<IO, kVec, kLanes>(m, residual, at);
  const Segment now(s, segment, kVec);
  const int64_t from = now.begin > s.warmup ? now.begin - s.warmup : 0;
  Pack<float, kVec> v = read_or<float, kVec>(from > 0 ? nullptr : v0, at.state, n.v_start);
  float* starts = scratch + segment * at.neurons + at.state;
  const bool split = kVec == 1 && kLanes == 0 && s.segments > 1;
  if (split) {
    march(v, n, s, input, x + at.x, static_cast<IO*>(nullptr), nullptr, from, now.begin, false);
    write(starts, v);
  }
  march(v, n, s, input, x + at.x, spikes + (kLanes > 0 ? at.spikes : at.sequence), saved ? saved + at.state : nullptr,
        now.begin, now.end, false);
  if (split) write(starts + s.segments * at.neurons, v);
  if (now.end == s.steps) write(v_last + at.state, v);
}

template <class IO>
SNN_HD void repair_thread(int64_t thread, const Neuron<float>& n, const LIFShape& s, const IO* __restrict__ x,
                          IO* __restrict__ spikes, float* __restrict__ v_last, float* __restrict__ saved,
                          float* __restrict__ scratch) {
  const Place at(s, thread);
  if (!at.inside) return;
  const float* starts = scratch + at.state;
  float* ends = scratch + s.segments * at.neurons + at.state;
  const auto met = [&](int64_t segment) {
    return same_bits(read<float, 1>(ends + (segment - 1) * at.neurons), read<float, 1>(starts + segment * at.neurons));
  };
  bool all = true;
#pragma unroll 8
  for (int64_t segment = 1; segment < s.segments; ++segment) all = all & met(segment);  // loads in flight together
  for (int64_t segment = 1; segment < s.segments && !all; ++segment) {
    if (met(segment)) continue;
    Pack<float, 1> v = read<float, 1>(ends + (segment - 1) * at.neurons);
    const Segment now(s, segment, 1);
    if (march(v, n, s, Input<IO, 1, 0>{}, x + at.x, spikes + at.sequence, saved ? saved + at.state : nullptr, now.begin,
              now.end, true))
      continue;
    write(ends + segment * at.neurons, v);
    if (now.end == s.steps) write(v_last + at.state, v);
  }
}

// A thread's own part of shared memory: of up to kChunk steps, `pitch` apart, the potential and, with a norm, x.
template <class IO, int kVec>
struct Column {
  Pack<float, kVec>* h;
  Pack<IO, kVec>* x;
  int pitch;
};

// The gradient of spikes at t, t - 1, ..., as far as these are in [0, steps): rows of the groups they are in. A thread
// goes back step by step from where the walk began, and divides only where a group ends.
struct GroupWalk {
  int64_t row, start;

  SNN_HD GroupWalk(const LIFShape& s, int64_t t) : row(t), start(t) {
    if (!s.grouped()) return;
    row = group_of(t, s.steps, s.steps_out);
    start = group_start(row, s.steps, s.steps_out);
  }
  template <class IO, int kVec, int kSteps>
  SNN_HD void fetch(Group<IO, kVec, kSteps>& group, const IO* __restrict__ column, const LIFShape& s, int64_t t,
                    int64_t steps) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int64_t u = t - k;
      if (u < 0 || u >= steps) continue;
      if (u < start) {
        --row;
        start = s.grouped() ? group_start(row, s.steps, s.steps_out) : u;
      }
      group[k] = read<IO, kVec>(column + row * s.inner);
    }
  }
};

// Walks back over the steps of `part`, from the gradient of its last potential to that of the one before its first.
// Calls found(step, step within its chunk, gradient of what the neurons receive). Returns the gain of the way with
// kMap.
template <class IO, int kVec, int kLanes, bool kMap, class Found>
SNN_HD float walk_back(Pack<float, kVec>& grad_v, const Place& at, const Segment& part, const Column<IO, kVec>& column,
                       const Neuron<float>& n, const LIFShape& s, const Input<IO, kVec, kLanes>& input,
                       const IO* __restrict__ x, const float* __restrict__ v0, const float* __restrict__ saved,
                       const IO* __restrict__ grad_spikes, const Found& found) {
  x += at.x;
  const IO* gs = grad_spikes ? grad_spikes + (kLanes > 0 ? at.spikes : at.sequence) : nullptr;
  const int64_t gs_steps = gs ? part.end : 0;
  float gain = 1.0f;
  constexpr int kSteps = kGroup<kVec, kLanes>;
  Group<IO, kVec, kSteps> now, next_x, next_gs, more;
  int64_t t = (part.end - 1) / kChunk * kChunk;
  fetch(next_x, x, s.x_step_stride, t, 1, part.end);
  for (; t >= part.begin && part.end > part.begin; t -= kChunk) {
    const int64_t end = t + kChunk < part.end ? t + kChunk : part.end;
    GroupWalk groups(s, kLanes > 0 ? end - 1 : 0);
    const auto fetch_gs = [&](int64_t from, int64_t steps) {
      if (kLanes > 0)
        groups.fetch(next_gs, gs, s, from, steps);
      else
        fetch(next_gs, gs, s.inner, from, -1, steps);
    };
    fetch_gs(end - 1, gs_steps);

    Pack<float, kVec> v = t > 0 ? read<float, kVec>(saved + (t / kChunk - 1) * s.outer * s.inner + at.state)
                                : read_or<float, kVec>(v0, at.state, n.v_start);
    for (int64_t u = t; u < end; u += kSteps) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) now[k] = next_x[k];
      input.fetch_residual(more, s.inner, u, end);
      const bool last = u + kSteps >= end;  // then the next chunk's first steps
      fetch(next_x, x, s.x_step_stride, last ? t - kChunk : u + kSteps, 1, part.end);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (u + k >= end) break;
        Pack<float, kVec> h;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          h.lane[e] = charge(n.form, n, v.lane[e], input(e, now[k].lane[e], more[k].lane[e]));
          v.lane[e] = reset(n.hard, n, h.lane[e]);
        }
        column.h[(u + k - t) * column.pitch] = h;
        if (kLanes > 0) column.x[(u + k - t) * column.pitch] = now[k];
      }
    }

    for (int64_t u = end - 1; u >= t; u -= kSteps) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) now[k] = next_gs[k];
      fetch_gs(u - kSteps, u - kSteps >= t ? gs_steps : 0);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (u - k < t) break;
        const Pack<float, kVec> h = column.h[(u - k - t) * column.pitch];
        Pack<float, kVec> g;
        float factor = 1.0f;
        with_surrogate(n.surrogate, [&](auto curve) {
#pragma unroll
          for (int e = 0; e < kVec; ++e)
            g.lane[e] = adjoint<decltype(curve)>(n, h.lane[e], gs ? to_state(now[k].lane[e]) : 0.0f, grad_v.lane[e]);
          if (kMap) factor = adjoint<decltype(curve)>(n, h.lane[0], 0.0f, 1.0f);
        });
        gain *= factor * n.state_gain;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          grad_v.lane[e] = g.lane[e] * n.state_gain;
          g.lane[e] = g.lane[e] * n.input_gain;
        }
        found(u - k, int(u - k - t), g);
      }
    }
  }
  return gain;
}

// kMap: only find the segment's gain and carry.
template <class IO, int kVec, int kLanes, bool kMap>
SNN_HD void backward_thread(int64_t thread, int64_t segment, const Column<IO, kVec>& column, const Neuron<float>& n,
                            const LIFShape& s, const Norm& m, const IO* __restrict__ x, const IO* __restrict__ residual,
                            const float* __restrict__ v0, const float* __restrict__ saved,
                            const IO* __restrict__ grad_spikes, const float* __restrict__ grad_v_last,
                            const float* __restrict__ pull_push, IO* __restrict__ grad_x,
                            IO* __restrict__ grad_residual, float* __restrict__ grad_v0, float* __restrict__ scratch) {
  const Place at(s, thread * kVec);
  if (!at.inside) return;
  const auto input = input_of<IO, kVec, kLanes>(m, residual, at);
  const Segment part(s, segment, kVec);
  float *gains = scratch + at.state, *carries = gains + s.segments * at.neurons;
  grad_x += at.sequence;

  Pack<float, kVec> grad_v = read_or<float, kVec>(kMap ? nullptr : grad_v_last, at.state, 0.0f);
  if (kVec == 1 && kLanes == 0 && !kMap)
#pragma unroll 8
    for (int64_t later = s.segments - 1; later > segment; --later) {
      const float carry = carries[later * at.neurons], grad = grad_v.lane[0];
      grad_v.lane[0] = grad != 0.0f ? gains[later * at.neurons] * grad + carry : carry;
    }

  float gain;
  if constexpr (kLanes == 0) {
    gain = walk_back<IO, kVec, 0, kMap>(grad_v, at, part, column, n, s, input, x, v0, saved, grad_spikes,
                                        [&](int64_t t, int, const Pack<float, kVec>& g) {
                                          if (!kMap) write(grad_x + t * s.inner, rounded<IO>(g));
                                        });
  } else {
    const auto& affine = input.affine;
    float pull[kLanes], push[kLanes];
    const Channels<kLanes> channels(m, at.state);
#pragma unroll
    for (int e = 0; e < kLanes; ++e) {
      pull[e] = pull_push ? pull_push[channels.of[e]] : 0.0f;
      push[e] = pull_push ? pull_push[m.channels + channels.of[e]] : 0.0f;
    }
    if (grad_residual) grad_residual += at.sequence;
    gain = walk_back<IO, kVec, kLanes, kMap>(grad_v, at, part, column, n, s, input, x, v0, saved, grad_spikes,
                                             [&](int64_t t, int row, const Pack<float, kVec>& g) {
                                               if (grad_residual) write(grad_residual + t * s.inner, rounded<IO>(g));
                                               const Pack<IO, kVec> came = column.x[row * column.pitch];
                                               Pack<float, kVec> grad;
#pragma unroll
                                               for (int e = 0; e < kVec; ++e) {
                                                 const int c = affine.lane(e);
                                                 const float scaled = affine.scale[c] * g.lane[e];
                                                 const float less =
                                                     pull[c] + affine.centred(e, to_state(came.lane[e])) * push[c];
                                                 grad.lane[e] = pull_push ? scaled - less : scaled;
                                               }
                                               write(grad_x + t * s.inner, rounded<IO>(grad));
                                             });
  }
  if (kMap) {
    gains[segment * at.neurons] = gain;
    carries[segment * at.neurons] = grad_v.lane[0];
  } else if (grad_v0 && segment == 0) {
    write(grad_v0 + at.state, grad_v);
  }
}

// A thread's share of the sums of g and of g * (x - mean), g being the gradient of what the neurons receive: in float
// over the steps of a chunk, then in double.
template <class IO, int kVec, int kLanes>
SNN_HD void sums_thread(int thread, const Share<kVec>& share, const Column<IO, kVec>& column, const Neuron<float>& n,
                        const LIFShape& s, const Norm& m, const IO* __restrict__ x, const IO* __restrict__ residual,
                        const float* __restrict__ v0, const float* __restrict__ saved,
                        const IO* __restrict__ grad_spikes, const float* __restrict__ grad_v_last,
                        double (&total)[2][kLanes]) {
  if (thread >= share.active) return;
  Item<kVec> item(share, thread);
  const Affine<kLanes> affine(m, Channels<kLanes>(m, item.neuron(share, m, item.row)));
  for (; item.at < share.end; item.next(share)) {
    const Place at(s, item.neuron(share, m, item.row));
    Pack<float, kVec> grad_v = read_or<float, kVec>(grad_v_last, at.state, 0.0f);
    float sum[kLanes] = {}, moment[kLanes] = {};
    walk_back<IO, kVec, kLanes, false>(grad_v, at, Segment(s, 0, kVec), column, n, s,
                                       Input<IO, kVec, kLanes>{affine, residual ? residual + at.sequence : nullptr}, x,
                                       v0, saved, grad_spikes, [&](int64_t, int row, const Pack<float, kVec>& g) {
                                         const Pack<IO, kVec> came = column.x[row * column.pitch];
#pragma unroll
                                         for (int e = 0; e < kVec; ++e) {
                                           sum[affine.lane(e)] += g.lane[e];
                                           moment[affine.lane(e)] +=
                                               g.lane[e] * affine.centred(e, to_state(came.lane[e]));
                                         }
                                         if (row > 0) return;
#pragma unroll
                                         for (int e = 0; e < kLanes; ++e) {
                                           total[0][e] += sum[e];
                                           total[1][e] += moment[e];
                                           sum[e] = moment[e] = 0;
                                         }
                                       });
  }
}

}  // namespace
}  // namespace snnkern
