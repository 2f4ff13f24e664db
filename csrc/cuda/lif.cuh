// The LIF on CUDA devices. A thread owns kV.width neighbouring neurons, 16 bytes of x or one neuron, and walks through
// time by pointers that advance:
//   forward    v in registers; a group of steps is loaded before the first of them is used
//   backward   per chunk of kChunk steps, last to first: recompute h into the thread's own column of shared memory,
//              then walk back over it; the other pass's first loads are in flight while one pass runs
// Charge, fire and reset have one order and rounding, so that spikes are those of every other backend. The adjoint is
// bound to none: it multiplies and adds in one and takes approximate reciprocals and exponentials.
//
// Where neurons are few, time may be split into segments, blockIdx.y:
//   forward    a segment warms up on the steps before it, without output, and notes the state from which it then starts
//              and with which it ends; lif_repair, a thread per neuron, compares these bit for bit and runs again what
//              differs. Spikes are those of the serial loop.
//   backward   given h, a segment maps the gradient of its last state to that of its first by gain * g + carry; lif_map
//              finds gain and carry of every segment but the first, then each segment composes those after it. Compared
//              with the serial loop only the order of rounding changes.
//
// forward() and back() are written for any input (here x, with a norm what becomes of it: bn_lif.cuh), for spikes that
// are written step by step or summed over groups of steps, for neurons of any states, and for a leak and a threshold
// that all neurons share or that are tensors, as a bias is: a thread reads its own of them once, and sums up their
// gradients over the chunk, then over time. Of a bias, each segment of time has its own sum.
#pragma once
#include "../neuron.h"
#include "channels.cuh"
#include "memory.cuh"

namespace snnkern {

struct LIFVariant {  // what a kernel is compiled for; as in snnkern/backend/cuda/lif.py
  DType dtype;
  int width;  // neurons a thread
  int steps;  // of time, where they are few: then no loop is left; else 0
  bool rows;  // outer > 1
  Leak form;  // as Neuron has it
  bool rest;  // it matters and is not 0
  bool hard, detached;
  Surrogate surrogate;  // of backward
  bool given;           // of backward: there is a gradient of spikes
  bool split;           // time is
  bool grouped;         // spikes are summed over groups of steps
  // With a norm (bn_lif.cuh): channels a thread has to know, 1 or as many as neurons; else 0.
  int lanes;
  bool residual;
  bool ternary, integer, bounded;
  bool unit;                  // of integer spikes: the threshold is 1, always
  int leak, threshold, bias;  // of tensors: numbers a thread has to know, 1 or as many as neurons; else 0
  bool sequence;              // v_seq is written; of backward: grad_v_seq is read
  bool grad_leak, grad_threshold, grad_bias;
  bool synaptic, adaptive;  // states besides the potential
  bool at_threshold;        // of an adaptive one: firing is
};

constexpr Kind kind_of(const LIFVariant& v) {
  return {v.hard, v.ternary, v.integer, v.bounded, v.detached, v.synaptic, v.adaptive, v.at_threshold};
}

// Steps loaded together.
constexpr int loaded_together(const LIFVariant& v) {
  return v.steps > 0 ? v.steps : v.width > 1 ? 4 : v.lanes > 0 ? 8 : kChunk;
}

constexpr int kForwardThreads = 128;
constexpr int backward_threads(int width) { return width == 8 ? 64 : 128; }  // up to 32 KiB of shared memory
// Where a step divides, the calls take registers.
constexpr bool divides(const LIFVariant& v) {
  return v.form == Leak::tau || v.form == Leak::tau_input || (v.integer && !v.unit);
}
// Blocks that a multiprocessor has registers for, 0: as many as the compiler likes, who spills for more where charge
// divides or a norm has a channel for every neuron of a thread. Three columns of shared memory leave room for 256
// threads.
constexpr int blocks_of(const LIFVariant& v, int threads) {
  return divides(v) || v.lanes > 1 ? (v.adaptive && v.grad_leak ? 256 : 384) / threads : 0;
}

namespace {

template <LIFVariant kV>
constexpr int kLoaded = loaded_together(kV);

// A thread's neurons: the numbers of all, and those of tensors that are their own.
template <LIFVariant kV>
struct Neurons {
  const Neuron<float>& all;
  const float* table;  // of the surrogate
  float leak[kV.leak > 0 ? kV.leak : 1], inverse[kV.leak > 0 ? kV.leak : 1];
  float threshold[kV.threshold > 0 ? kV.threshold : 1], fire_above[kV.threshold > 0 ? kV.threshold : 1];
  float bias[kV.bias > 0 ? kV.bias : 1];

  __device__ __forceinline__ Neurons(const Neuron<float>& all, const More& more, int64_t neuron)
      : all(all), table(static_cast<const float*>(more.table)) {
    if constexpr (kV.leak > 0) {
      const Parameter p = more.leak;
      Channels<kV.leak>(p.channels, p.period, neuron).read(leak, static_cast<const float*>(p.data));
#pragma unroll
      for (int l = 0; l < kV.leak; ++l) inverse[l] = ratio(1.0f, leak[l]);
    }
    if constexpr (kV.threshold > 0) {
      const Parameter p = more.threshold;
      const Channels<kV.threshold> channels(p.channels, p.period, neuron);
      channels.read(threshold, static_cast<const float*>(p.data));
      channels.read(fire_above, static_cast<const float*>(more.fire_above));
    }
    if constexpr (kV.bias > 0) {
      const Parameter p = more.bias;
      Channels<kV.bias>(p.channels, p.period, neuron).read(bias, static_cast<const float*>(p.data));
    }
  }
  __device__ __forceinline__ Neuron<float> operator[](int e) const {
    Neuron<float> n = all;
    if constexpr (!kV.rest) n.rest = 0.0f;  // v - 0 is no operation, in the longest chain of a thread
    if constexpr (kV.unit) n.threshold = 1.0f;
    if constexpr (kV.surrogate == Surrogate::Table) n.k.table = table;
    if constexpr (kV.leak > 0) {
      const int l = kV.leak > 1 ? e : 0;
      const bool divided = kV.form == Leak::tau || kV.form == Leak::tau_input;
      n.leak = leak[l];
      n.input_gain = divided ? inverse[l] : leak[l];  // read of_input alone
      n.state_gain = kV.form == Leak::decay ? leak[l] : 1.0f - n.input_gain;
    }
    if constexpr (kV.threshold > 0) {
      const int l = kV.threshold > 1 ? e : 0;
      n.threshold = threshold[l];
      n.fire_above = fire_above[l];
    }
    return n;
  }
};

template <int kWidth>
__device__ __forceinline__ void load_or(float (&v)[kWidth], const void* from, int64_t at, float constant) {
  if (from) {
    load_state(v, static_cast<const float*>(from) + at);
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = constant;
  }
}

// The states of a thread's neurons, or their gradients: in memory [states, outer, inner].
template <LIFVariant kV>
struct State {
  static constexpr int kStates = 1 + kV.synaptic + kV.adaptive;
  float v[kV.width], i[kV.width], a[kV.width];  // potential, synaptic current, adaptation

  // Calls use(number of the state, its numbers).
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) {
    use(0, v);
    if constexpr (kV.synaptic) use(1, i);
    if constexpr (kV.adaptive) use(1 + kV.synaptic, a);
  }
  // From memory, or where there is none v, and 0 for the others.
  __device__ __forceinline__ void load_or(const void* from, const Place& place, float v) {
    each([&](int k, float (&numbers)[kV.width]) {
      snnkern::load_or(numbers, from, place.state + k * place.neurons, k > 0 ? 0.0f : v);
    });
  }
  __device__ __forceinline__ void load(const float* from, const Place& place) {
    each([&](int k, float (&numbers)[kV.width]) { load_state(numbers, from + k * place.neurons); });
  }
  __device__ __forceinline__ void store(float* to, const Place& place) {
    each([&](int k, float (&numbers)[kV.width]) { store_state(to + k * place.neurons, numbers); });
  }
};

// --- what a thread reads and writes, a step after the other ---

// What neurons receive: x. With a norm: bn_lif.cuh.
template <LIFVariant kV, bool kNormed = (kV.lanes > 0)>
struct Input {
  using Step = Pack<kV.dtype, kV.width>;
  const char* at;
  int64_t stride;

  template <class Tensors>
  __device__ __forceinline__ Input(const LIFShape& s, const Place& place, const Tensors& a)
      : at(static_cast<const char*>(a.x) + place.x * size_of(kV.dtype)), stride(s.x_step_stride * size_of(kV.dtype)) {}
  __device__ __forceinline__ void skip(int64_t steps) { at += steps * stride; }
  __device__ __forceinline__ Step next() {
    const Step step = Step::load(at);
    at += stride;
    return step;
  }
  __device__ __forceinline__ float operator()(const Step& step, int e) const { return step.get(e); }
};

// The potential after every step, where somebody wants it.
template <LIFVariant kV>
struct Potentials {
  float* at;
  int64_t stride;

  __device__ __forceinline__ Potentials(const LIFShape& s, const Place& place, const More& more)
      : at(static_cast<float*>(more.v_seq) + place.sequence), stride(s.inner) {}
  __device__ __forceinline__ void operator()(const float (&v)[kV.width]) {
    if constexpr (!kV.sequence) return;
    store_state(at, v);
    at += stride;
  }
};

// Spikes, bool or float, of [outer, steps_out, inner]: as they are,
template <LIFVariant kV, bool kGrouped = kV.grouped>
struct Output {
  char* at;
  int64_t stride;
  Potentials<kV> potentials;

  __device__ __forceinline__ Output(const LIFShape& s, const Place& place, const LIFForward& a)
      : at(static_cast<char*>(a.spikes) + place.spikes * size_of(kV.dtype)),
        stride(s.inner * size_of(kV.dtype)),
        potentials(s, place, a.more) {}
  __device__ __forceinline__ void skip(int64_t steps) { at += steps * stride; }
  __device__ __forceinline__ void operator()(const bool (&fired)[kV.width]) {
    put(Pack<kV.dtype, kV.width>::spikes(fired));
  }
  __device__ __forceinline__ void operator()(const float (&spikes)[kV.width]) {
    put(Pack<kV.dtype, kV.width>::rounded(spikes));
  }

 private:
  __device__ __forceinline__ void put(const Pack<kV.dtype, kV.width>& pack) {
    pack.store(at);
    at += stride;
  }
};

// or summed over groups of steps.
template <LIFVariant kV>
struct Output<kV, true> {
  const LIFShape& s;
  Output<kV, false> sums;
  float total[kV.width] = {};
  int64_t group = 0;
  int left;  // steps of the group
  Potentials<kV> potentials;

  __device__ __forceinline__ Output(const LIFShape& s, const Place& place, const LIFForward& a)
      : s(s), sums(s, place, a), left(int(group_start(1, s.steps, s.steps_out))), potentials(s, place, a.more) {}
  template <class Spike>
  __device__ __forceinline__ void operator()(const Spike (&spikes)[kV.width]) {
#pragma unroll
    for (int e = 0; e < kV.width; ++e) total[e] += float(spikes[e]);
    if (--left) return;
    sums(total);
#pragma unroll
    for (int e = 0; e < kV.width; ++e) total[e] = 0.0f;
    ++group;
    left = int(group_start(group + 1, s.steps, s.steps_out) - group_start(group, s.steps, s.steps_out));
  }
};

struct NoOutput {
  template <class Spike, int kWidth>
  __device__ __forceinline__ void operator()(const Spike (&)[kWidth]) {}
  template <int kWidth>
  static __device__ __forceinline__ void potentials(const float (&)[kWidth]) {}
};

// The gradient of spikes, from step `end - 1` back: of every step,
template <LIFVariant kV, bool kGrouped = kV.grouped>
struct Upstream {
  using Step = Pack<kV.dtype, kV.width>;
  const char* at;
  int64_t stride;

  __device__ __forceinline__ Upstream(const LIFShape& s, const Place& place, const void* grad_spikes, int end)
      : stride(s.inner * size_of(kV.dtype)) {
    at = static_cast<const char*>(grad_spikes) + place.spikes * size_of(kV.dtype) + (end - 1) * stride;
  }
  __device__ __forceinline__ Step next() {
    Step step;
    if constexpr (kV.given) step = Step::load(at);
    at -= stride;
    return step;
  }
};

// or of the group that a step is in.
template <LIFVariant kV>
struct Upstream<kV, true> {
  using Step = Pack<kV.dtype, kV.width>;
  const LIFShape& s;
  const char* at;
  int64_t stride;
  int64_t group;
  int left;  // steps of the group

  __device__ __forceinline__ Upstream(const LIFShape& s, const Place& place, const void* grad_spikes, int end)
      : s(s), stride(s.inner * size_of(kV.dtype)), group(group_of(end - 1, s.steps, s.steps_out)) {
    at = static_cast<const char*>(grad_spikes) + place.spikes * size_of(kV.dtype) + group * stride;
    left = int(end - group_start(group, s.steps, s.steps_out));
  }
  __device__ __forceinline__ Step next() {
    if (left == 0) {
      at -= stride;
      left = int(group_start(group, s.steps, s.steps_out) - group_start(group - 1, s.steps, s.steps_out));
      --group;
    }
    --left;
    Step step;
    if constexpr (kV.given) step = Step::load(at);
    return step;
  }
};

// That, and the gradient of the potential after every step, where there is one.
template <LIFVariant kV>
struct Gradients {
  struct Step {
    typename Upstream<kV>::Step spikes;
    Pack<DType::f32, kV.width> v;
  };
  Upstream<kV> spikes;
  const float* at;
  int64_t stride;

  __device__ __forceinline__ Gradients(const LIFShape& s, const Place& place, const LIFBackward& a, int end)
      : spikes(s, place, a.grad_spikes, end), stride(s.inner) {
    at = static_cast<const float*>(a.more.grad_v_seq) + place.sequence + (end - 1) * stride;
  }
  __device__ __forceinline__ Step next() {
    Step step;
    step.spikes = spikes.next();
    if constexpr (kV.sequence) step.v = Pack<DType::f32, kV.width>::load(at);
    at -= stride;
    return step;
  }
};

// A stream, read kGroup steps before their use.
template <class Stream, int kGroup>
struct Ahead {
  using Step = typename Stream::Step;
  Stream stream;
  Step group[kGroup];

  // Loads the next steps, a group or what is left.
  __device__ __forceinline__ void fill(int left) {
    if (left >= kGroup) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) group[k] = stream.next();
    } else {
#pragma unroll
      for (int k = 0; k < kGroup - 1; ++k)
        if (k < left) group[k] = stream.next();
    }
  }

  template <class Use>
  static __device__ __forceinline__ void each(const Step (&group)[kGroup], int left, const Use& use) {
    if (left >= kGroup) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) use(group[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kGroup - 1; ++k)
        if (k < left) use(group[k]);
    }
  }

  // Calls use(step) for the steps from t to `end`, of which the first group is filled, and before(t) where a group
  // begins, until that returns true. With kBoth, a group is on its way while the one before it is used.
  template <bool kBoth, class Before, class Use>
  __device__ __forceinline__ bool walk(int t, int end, const Before& before, const Use& use) {
    for (; t < end; t += kGroup) {
      if (before(t)) return true;
      const int left = end - t;
      if constexpr (kBoth) {
        Step now[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) now[k] = group[k];
        if (left > kGroup) fill(left - kGroup);
        each(now, left, use);
      } else {
        each(group, left, use);
        if (left > kGroup) fill(left - kGroup);
      }
    }
    return false;
  }

  // The `length` steps of a chunk.
  template <bool kBoth, class Use>
  __device__ __forceinline__ void chunk(int length, const Use& use) {
    if constexpr (kGroup == kChunk)
      each(group, length, use);
    else
      walk<kBoth>(0, length, [](int) { return false; }, use);
  }
};

template <LIFVariant kV>
__device__ __forceinline__ int steps_of(const LIFShape& s) {
  return kV.steps > 0 ? kV.steps : int(s.steps);
}

struct Segment {  // its steps
  int begin, end;

  template <LIFVariant kV>
  static __device__ __forceinline__ Segment of(const LIFShape& s, int segment) {
    const int steps = steps_of<kV>(s);
    if constexpr (!kV.split) return {0, steps};
    const int length = int(s.segment_steps), begin = segment * length;
    return {begin, begin + length < steps ? begin + length : steps};
  }
};

template <LIFVariant kV>
__device__ __forceinline__ float charged(const Neuron<float>& n, float v, float x) {
  const float h = charge(kV.form, n, v, x);
  return kV.bounded ? bound(n, h) : h;
}

template <LIFVariant kV>
__device__ __forceinline__ bool above_threshold(const Neuron<float>& n, float h) {
  if constexpr (!kV.adaptive) return h > n.fire_above;
  return kV.at_threshold ? h >= n.threshold : h > n.threshold;
}

// Of h, the spike, and the potential in its place; of binary ones whether it is one.
template <LIFVariant kV>
__device__ __forceinline__ auto fire(const Neuron<float>& n, float& h) {
  if constexpr (kV.ternary || kV.integer) {
    const float s = spike(kind_of(kV), n, n.threshold, n.fire_above, h);
    if constexpr (kV.hard || kV.threshold > 0)
      h = reset(kind_of(kV), n, n.threshold, h, s);
    else
      h = h - n.threshold * s;  // which is finite
    return s;
  } else {
    const bool fired = above_threshold<kV>(n, h);
    if (fired) h = kV.hard ? n.reset : h - n.threshold;
    return fired;
  }
}

// What a leak is a factor of, or a divisor: see lif_backward of snnkern/ops/launch.py.
template <LIFVariant kV>
__device__ __forceinline__ float drive(const Neuron<float>& n, float v, float x) {
  if constexpr (kV.form == Leak::decay) return v;
  return of_input(kV.form) ? x - (v - n.rest) : n.rest - v;
}

template <class Spike>
struct Step {
  float h, threshold, drive;
  Spike spike;
};

// A step of neuron e of a thread, from `of` to `of`.
template <LIFVariant kV>
__device__ __forceinline__ auto step(const Neurons<kV>& n, State<kV>& of, int e, float x) {
  Neuron<float> own = n[e];
  if constexpr (kV.bias > 0) x = x + n.bias[kV.bias > 1 ? e : 0];
  if constexpr (kV.synaptic) x = of.i[e] = current(own, of.i[e], x);
  if constexpr (kV.adaptive) own.threshold = raised(own, own.threshold, of.a[e]);
  const float by_leak = drive<kV>(own, of.v[e], x), h = of.v[e] = charged<kV>(own, of.v[e], x);
  const auto s = fire<kV>(own, of.v[e]);
  if constexpr (kV.adaptive) of.a[e] = adapted(own, of.a[e], float(s));
  return Step{h, own.threshold, by_leak, s};
}

// --- forward ---

// Steps a thread's neurons from t to `end`; `input` is at t. Where chunks begin, but for the first of all, keep(v)
// keeps the state, and ends the walk by returning true.
template <LIFVariant kV, class In, class Out, class Keep>
__device__ __forceinline__ bool forward(const Neurons<kV>& n, State<kV>& state, const In& input, Out& output, int t,
                                        int end, const Keep& keep) {
  Ahead<In, kLoaded<kV>> x{input};
  x.fill(end - t);
  return x.template walk<kV.width == 1>(
      t, end, [&](int t) { return t > 0 && t % kChunk == 0 && keep(state); },
      [&](const typename In::Step& now) {
        decltype(step(n, state, 0, 0.0f).spike) spikes[kV.width];
#pragma unroll
        for (int e = 0; e < kV.width; ++e) spikes[e] = step(n, state, e, x.stream(now, e)).spike;
        output(spikes);
        output.potentials(state.v);
      });
}

// Where a thread keeps the state of chunk after chunk: the start of the first chunk after `begin`, or at it.
template <LIFVariant kV>
struct Saved {
  float* at;
  int64_t stride;

  __device__ __forceinline__ Saved(const void* saved, const Place& place, int begin)
      : stride(State<kV>::kStates * place.neurons) {
    at = saved ? static_cast<float*>(const_cast<void*>(saved)) + place.state +
                     (begin > 0 ? begin / kChunk - 1 : 0) * stride
               : nullptr;
  }
};

// --- backward ---

// A thread's own part of shared memory, up to kChunk steps of kWidth floats in planes of at most 16 bytes,
// [step][plane][thread]: neighbouring threads lie next to each other, so that no banks conflict. No barrier: a thread
// reads what it wrote.
template <int kWidth, int kThreads>
struct Column {
  static constexpr int kPlane = kWidth < 4 ? kWidth : 4, kPlanes = kWidth / kPlane;
  struct alignas(4 * kPlane) Plane {
    float number[kPlane];
  };
  Plane* at;

  __device__ __forceinline__ explicit Column(void* memory) : at(static_cast<Plane*>(memory) + threadIdx.x) {}
  __device__ __forceinline__ void skip(int steps) { at += steps * kPlanes * kThreads; }
  __device__ __forceinline__ void put(const float (&numbers)[kWidth]) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      Plane plane;
#pragma unroll
      for (int e = 0; e < kPlane; ++e) plane.number[e] = numbers[p * kPlane + e];
      at[p * kThreads] = plane;
    }
  }
  __device__ __forceinline__ void push(const float (&numbers)[kWidth]) {
    put(numbers);
    skip(1);
  }
  __device__ __forceinline__ void get(float (&numbers)[kWidth]) const {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const Plane plane = at[p * kThreads];
#pragma unroll
      for (int e = 0; e < kPlane; ++e) numbers[p * kPlane + e] = plane.number[e];
    }
  }
  __device__ __forceinline__ void pop(float (&numbers)[kWidth]) {
    skip(-1);
    get(numbers);
  }
};

// Of a step: dL/dh = dL/ds * curve + dL/dv * through, and dL/dthreshold = dL/ds * curve + dL/dv * through of its own.
struct Factors {
  float curve, through, of_threshold, through_threshold;
};

// neuron.h's pulled, but for the gradients. An infinite h, or threshold, which only a tensor has, has
// curve 0; the selects keep inf * 0 out.
template <LIFVariant kV>
__device__ __forceinline__ Factors factors(const Neuron<float>& n, float h) {
  const auto curve = [&](float x) {
    float found;
    with_surrogate(kV.surrogate, [&](auto surrogate) { found = decltype(surrogate)::grad(x, n.k); });
    return found;
  };
  Factors f;
  float event, by_threshold, event_by;  // of what resets by h, and, negative, of the spike and of that by the threshold
  if constexpr (kV.integer) {
    const float u = h / n.threshold;
    f.curve = event = curve(u) * ratio(1.0f, n.threshold);
    by_threshold = event_by = event != 0.0f ? event * u : 0.0f;
  } else if constexpr (kV.ternary) {
    const float rise = curve(h - n.threshold), fall = curve(-h - n.threshold);
    f.curve = event_by = rise + fall;
    by_threshold = event = rise - fall;
    if constexpr (!kV.hard) event = f.curve, event_by = by_threshold;
  } else {
    f.curve = event = by_threshold = event_by = curve(h - n.threshold);
  }
  f.of_threshold = -by_threshold;
  bool fired = above_threshold<kV>(n, kV.ternary ? magnitude(h) : h);
  if constexpr (kV.ternary && kV.adaptive) fired = above_threshold<kV>(n, h) != above_threshold<kV>(n, -h);
  f.through = kV.hard && fired ? 0.0f : 1.0f;
  f.through_threshold = kV.hard ? 0.0f : -spike(kind_of(kV), n, n.threshold, n.fire_above, h);
  if constexpr (!kV.detached) {
    const bool unlimited = kV.threshold > 0 && n.threshold - n.threshold != 0.0f;  // of all steps: asked once
    const float change = kV.hard ? n.reset - h : unlimited ? 0.0f : -n.threshold;  // of v, at an event
    const auto at = [&](float event) { return kV.hard && event == 0.0f ? 0.0f : change; };
    f.through = __fmaf_rn(at(event), event, f.through);
    f.through_threshold = __fmaf_rn(at(event_by), -event_by, f.through_threshold);
  }
  if (kV.bounded && h <= n.v_min) f.curve = f.through = 0.0f;
  return f;
}

// The gradient of what neurons receive, from what back() finds.
template <LIFVariant kV>
__device__ __forceinline__ float of_input(const Neuron<float>& n, float g) {
  return of_input(kV.form) && !kV.synaptic ? g * n.input_gain : g;
}

// The gradients of a thread's leaks, thresholds and biases: sums over time.
template <LIFVariant kV>
struct Sums {
  float leak[kV.width] = {}, threshold[kV.width] = {}, bias[kV.width] = {};

  __device__ __forceinline__ void add(const Sums& more) {
#pragma unroll
    for (int e = 0; e < kV.width; ++e) {
      if constexpr (kV.grad_leak) leak[e] += more.leak[e];
      if constexpr (kV.grad_threshold) threshold[e] += more.threshold[e];
      if constexpr (kV.grad_bias) bias[e] += more.bias[e];
    }
  }
};

// Walks back over the steps from `begin`, where a chunk begins, to `end`, from the gradient of the last state to that
// of the one before the first. `input` is at step 0. Calls came(step) for the steps of a chunk in their order, then
// found(g, through) in reverse: g is the gradient of h, with a synaptic current of that; and without those of spikes
// and of other states it is `through` times that of v. Adds to `sums`, chunk by chunk.
template <LIFVariant kV, int kThreads, class In, class Came, class Found>
__device__ __forceinline__ void back(const Neurons<kV>& n, const LIFShape& s, const Place& place, const LIFBackward& a,
                                     State<kV>& grad, Sums<kV>& sums, const In& input,
                                     Column<kV.width, kThreads>& column, int begin, int end, const Came& came,
                                     const Found& found) {
  if (begin >= end) return;
  int t = (end - 1) / kChunk * kChunk, length = end - t;
  Ahead<In, kLoaded<kV>> x{input};
  Ahead<Gradients<kV>, kLoaded<kV>> upstream{Gradients<kV>(s, place, a, end)};
  Saved<kV> saved(a.saved, place, t);
  State<kV> state;
  const auto start = [&] {  // of the chunk at t
    if (t > 0)
      state.load(saved.at, place);
    else
      state.load_or(a.v, place, n.all.v_start);
  };

  x.stream.skip(t);
  x.fill(length);
  start();
  while (true) {
    upstream.fill(length);
    x.template chunk<false>(length, [&](const typename In::Step& now) {
      float h[kV.width], drives[kV.width], thresholds[kV.width];
#pragma unroll
      for (int e = 0; e < kV.width; ++e) {
        const auto made = step(n, state, e, x.stream(now, e));
        h[e] = made.h;
        drives[e] = made.drive;
        thresholds[e] = made.threshold;
      }
      column.push(h);
      if constexpr (kV.grad_leak) column.push(drives);
      if constexpr (kV.adaptive) column.push(thresholds);
      came(now);
    });
    const int now = length;
    const bool more = t > begin;
    if (more) {  // in flight on the way back
      x.stream.skip(-(length + kChunk));
      x.fill(length = kChunk);
      t -= kChunk;
      saved.at -= saved.stride;
      start();
    }
    Sums<kV> of_chunk;
    upstream.template chunk<true>(now, [&](const typename Gradients<kV>::Step& step) {
      float g[kV.width], h[kV.width], through[kV.width], drives[kV.width], thresholds[kV.width];
      if constexpr (kV.adaptive) column.pop(thresholds);
      if constexpr (kV.grad_leak) column.pop(drives);
      column.pop(h);
#pragma unroll
      for (int e = 0; e < kV.width; ++e) {
        Neuron<float> own = n[e];
        if constexpr (kV.adaptive) own.threshold = thresholds[e];
        const Factors f = factors<kV>(own, h[e]);
        if constexpr (kV.sequence) grad.v[e] += step.v.get(e);
        float of_spike = 0.0f;
        if constexpr (kV.given) of_spike = step.spikes.get(e);
        if constexpr (kV.adaptive) of_spike += grad.a[e];
        constexpr bool spiked = kV.given || kV.adaptive;
        const auto add_of_threshold = [&](float sum) {
          sum = __fmaf_rn(grad.v[e], f.through_threshold, sum);
          if constexpr (spiked) sum = __fmaf_rn(of_spike, f.of_threshold, sum);
          return sum;
        };
        if constexpr (kV.grad_threshold) of_chunk.threshold[e] = add_of_threshold(of_chunk.threshold[e]);
        if constexpr (kV.adaptive)
          grad.a[e] = __fmaf_rn(own.threshold_decay, grad.a[e], own.jump * add_of_threshold(0.0f));
        through[e] = f.through;
        g[e] = grad.v[e] * through[e];
        if constexpr (spiked) g[e] = __fmaf_rn(of_spike, f.curve, g[e]);
        if (kV.bounded && h[e] <= own.v_min) g[e] = 0.0f;  // whatever came back
        if constexpr (kV.grad_leak) {
          const float driven = g[e] != 0.0f ? drives[e] : 0.0f;  // it may be infinite
          of_chunk.leak[e] = __fmaf_rn(g[e], driven, of_chunk.leak[e]);
        }
        grad.v[e] = g[e] * own.state_gain;
        if constexpr (kV.synaptic) {
          g[e] = of_input(kV.form) ? __fmaf_rn(g[e], own.input_gain, grad.i[e]) : g[e] + grad.i[e];
          grad.i[e] = own.synapse_decay * g[e];
        }
        if constexpr (kV.grad_bias) of_chunk.bias[e] += of_input<kV>(own, g[e]);
      }
      found(g, through);
    });
    sums.add(of_chunk);
    if (!more) return;
  }
}

extern __shared__ __align__(16) char shared_memory[];

}  // namespace

// --- kernels ---

template <LIFVariant kV>
__global__ void __launch_bounds__(kForwardThreads, blocks_of(kV, kForwardThreads))
    lif_forward(Neuron<float> neuron, LIFShape s, LIFForward a) {
  const Place place(s, this_thread() * kV.width, kV.rows);
  if (!place.inside) return;
  const Neurons<kV> n(neuron, a.more, place.state);
  const int segment = kV.split ? int(blockIdx.y) : 0;
  const auto [begin, end] = Segment::of<kV>(s, segment);
  Input<kV> input(s, place, a);
  Output<kV> output(s, place, a);
  State<kV> state;
  float* starts = static_cast<float*>(a.scratch) + segment * place.neurons + place.state;
  if constexpr (kV.split) {
    const int from = begin > s.warmup ? begin - int(s.warmup) : 0;
    state.load_or(from > 0 ? nullptr : a.v, place, neuron.v_start);
    input.skip(from);
    NoOutput none;
    forward<kV>(n, state, input, none, from, begin, [](const auto&) { return false; });
    store_state(starts, state.v);
    input.skip(begin - from);
    output.skip(begin);
  } else {
    state.load_or(a.v, place, neuron.v_start);
  }
  Saved<kV> saved(a.saved, place, begin);
  forward<kV>(n, state, input, output, begin, end, [&](State<kV>& state) {
    if (!saved.at) return false;
    state.store(saved.at, place);
    saved.at += saved.stride;
    return false;
  });
  if constexpr (kV.split) store_state(starts + s.segments * place.neurons, state.v);
  if (a.v_last && end == steps_of<kV>(s)) state.store(static_cast<float*>(a.v_last) + place.state, place);
}

template <LIFVariant kV>
__global__ void __launch_bounds__(kForwardThreads) lif_repair(Neuron<float> neuron, LIFShape s, LIFForward a) {
  const Place place(s, this_thread(), kV.rows);
  if (!place.inside) return;
  const Neurons<kV> n(neuron, a.more, place.state);
  const float* starts = static_cast<const float*>(a.scratch) + place.state;
  float* ends = static_cast<float*>(a.scratch) + s.segments * place.neurons + place.state;
  const auto same = [](float a, float b) { return __float_as_uint(a) == __float_as_uint(b); };
  const auto met = [&](int64_t segment) {
    return same(ends[(segment - 1) * place.neurons], starts[segment * place.neurons]);
  };
  bool all = true;
#pragma unroll 8
  for (int64_t segment = 1; segment < s.segments; ++segment) all = all & met(segment);  // loads in flight together
  if (all) return;
  for (int segment = 1; segment < s.segments; ++segment) {
    if (met(segment)) continue;
    const auto [begin, end] = Segment::of<kV>(s, segment);
    State<kV> state;
    state.v[0] = ends[(segment - 1) * place.neurons];
    Input<kV> input(s, place, a);
    Output<kV> output(s, place, a);
    Saved<kV> saved(a.saved, place, begin);
    input.skip(begin);
    output.skip(begin);
    const bool joined = forward<kV>(n, state, input, output, begin, end, [&](const State<kV>& state) {
      if (!saved.at) return false;
      if (same(state.v[0], *saved.at)) return true;  // from here on all is as it was
      *saved.at = state.v[0];
      saved.at += saved.stride;
      return false;
    });
    if (joined) continue;
    ends[segment * place.neurons] = state.v[0];
    if (a.v_last && end == steps_of<kV>(s)) static_cast<float*>(a.v_last)[place.state] = state.v[0];
  }
}

// Gain and carry of every segment but the first.
template <LIFVariant kV>
__global__ void __launch_bounds__(backward_threads(1)) lif_map(Neuron<float> neuron, LIFShape s, LIFBackward a) {
  const Place place(s, this_thread(), kV.rows);
  if (!place.inside) return;
  const Neurons<kV> n(neuron, a.more, place.state);
  const int segment = int(blockIdx.y) + 1;
  const auto [begin, end] = Segment::of<kV>(s, segment);
  State<kV> carry;
  carry.v[0] = 0.0f;
  float gain = 1.0f;
  Sums<kV> sums;  // those of lif_backward count
  Column<kV.width, backward_threads(kV.width)> column(shared_memory);
  back<kV>(
      n, s, place, a, carry, sums, Input<kV>(s, place, a), column, begin, end, [](const auto&) {},
      [&](const float (&)[1], const float (&through)[1]) {
        gain = kV.bounded && through[0] == 0.0f ? 0.0f : gain * (through[0] * neuron.state_gain);
      });
  float* gains = static_cast<float*>(a.scratch) + segment * place.neurons + place.state;
  *gains = gain;
  gains[s.segments * place.neurons] = carry.v[0];
}

template <LIFVariant kV>
__global__ void __launch_bounds__(backward_threads(kV.width), blocks_of(kV, backward_threads(kV.width)))
    lif_backward(Neuron<float> neuron, LIFShape s, LIFBackward a) {
  using Numbers = Pack<kV.dtype, kV.width>;
  const Place place(s, this_thread() * kV.width, kV.rows);
  if (!place.inside) return;
  const Neurons<kV> n(neuron, a.more, place.state);
  const int segment = kV.split ? int(blockIdx.y) : 0;
  const auto [begin, end] = Segment::of<kV>(s, segment);
  State<kV> grad;
  grad.load_or(a.grad_v_last, place, 0.0f);
  if constexpr (kV.split) {
    const float *gains = static_cast<const float*>(a.scratch) + place.state,
                *carries = gains + s.segments * place.neurons;
#pragma unroll 8
    for (int64_t later = s.segments - 1; later > segment; --later) {
      const float gain = gains[later * place.neurons], carry = carries[later * place.neurons];
      const bool some = grad.v[0] != 0.0f && !(kV.bounded && gain == 0.0f);
      grad.v[0] = some ? gain * grad.v[0] + carry : carry;
    }
  }
  const int64_t stride = s.inner * size_of(kV.dtype);
  char* to = static_cast<char*>(a.grad_x) + place.sequence * size_of(kV.dtype) + (end - 1) * stride;
  Column<kV.width, backward_threads(kV.width)> column(shared_memory);
  Sums<kV> sums;
  back<kV>(
      n, s, place, a, grad, sums, Input<kV>(s, place, a), column, begin, end, [](const auto&) {},
      [&](const float (&g)[kV.width], const float (&)[kV.width]) {
        float received[kV.width];
#pragma unroll
        for (int e = 0; e < kV.width; ++e) received[e] = of_input<kV>(n[e], g[e]);
        Numbers::rounded(received).store(to);
        to -= stride;
      });
  if (a.grad_v && begin == 0) grad.store(static_cast<float*>(a.grad_v) + place.state, place);
  if constexpr (kV.grad_leak) store_state(static_cast<float*>(a.more.grad_leak) + place.state, sums.leak);
  if constexpr (kV.grad_threshold)
    store_state(static_cast<float*>(a.more.grad_threshold) + place.state, sums.threshold);
  if constexpr (kV.grad_bias)
    store_state(static_cast<float*>(a.more.grad_bias) + segment * place.neurons + place.state, sums.bias);
}

}  // namespace snnkern
