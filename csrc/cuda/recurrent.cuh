// Layers of neurons that receive their own spikes a step later, on CUDA devices. Layers do not know of each other: a
// block has one of them, or a few, for all of time, and no block waits for another.
//
//   forward    A warp has kV.planes * 32 neighbouring neurons, a thread those of its lane; up to 128 neurons are one
//              warp, which then needs no barrier. Of every step it writes into shared memory which of its neurons
//              fired, in ascending order, for all warps of the layer to add up their rows of `outgoing`: one barrier a
//              step. The rows lie in shared memory if they fit (kV.shared), else they are read through L1, which is
//              slower, above all where L1 cannot hold them.
//   backward   A block has one layer, a thread one neuron j. A chunk of kChunk steps is run again from its saved
//              states and forward's spikes; what the way back needs is kept in `scratch`, of each thread for itself.
//              Then step by step, with one barrier, dL/ds[j] is the sum of weight[k][j] * g[k] over all neurons k, g
//              being what the inputs of the next step want. The first kV.rows rows k of a thread's column of `weight`
//              are in its registers, the next `kept` in shared memory, the rest, slowly, in L1 and L2.
//
// The order of all sums of forward is that of the reference, so that spikes are; the adjoint is bound to none.
#pragma once
#include "../neuron.h"
#include "memory.cuh"

namespace snnkern {

struct RecurrentVariant {  // what a kernel is compiled for; as in snnkern/backend/cuda/recurrent.py
  DType dtype;
  int warps;   // of a layer
  int planes;  // of forward: neurons a thread
  bool shared;
  int rows;     // of backward
  bool valued;  // spikes are not all 1
  Leak form;    // as Neuron has it
  bool hard, ternary, integer, bounded, detached, synaptic, adaptive, at_threshold;
  Surrogate surrogate;  // of backward
  bool grad_leak;
};

constexpr Kind kind_of(const RecurrentVariant& v) {
  return {v.hard, v.ternary, v.integer, v.bounded, v.detached, v.synaptic, v.adaptive, v.at_threshold};
}

struct RecurrentForward {
  LIFForward a;
  Recurrence r;
};
struct RecurrentBackward {
  LIFBackward a;  // scratch: [kChunk, planes, outer, inner], planes as Scratch has them
  Recurrence r;
  int64_t kept;  // a multiple of 4, unless none are left
};

constexpr int kRecurrentThreads = 512;  // at most of a block of forward
// Steps of which backward lists who fired at a time: of what has values too, in layers of many neurons, half a chunk.
constexpr int listed_together(const RecurrentVariant& v) { return v.valued && v.warps > 16 ? kChunk / 2 : kChunk; }

namespace {

// Rows that are loaded before the first of them is added: fewer where a thread has few registers.
constexpr int loaded_together(const RecurrentVariant& v) { return v.warps > 16 ? 4 : 8; }

extern __shared__ __align__(16) char shared_memory[];

__device__ __forceinline__ float load_constant(const float* from) {  // and keep it in L1
  float number;
  asm("ld.global.nc.f32 %0, [%1];" : "=f"(number) : "l"(from));
  return number;
}
__device__ __forceinline__ void to_l2(const void* from, int64_t offset) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + offset));
}

// Offsets are in bytes.
template <DType kType>
__device__ __forceinline__ float load_number(const void* from, int64_t offset) {
  return Pack<kType, 1>::load(static_cast<const char*>(from) + offset).get(0);
}
template <DType kType>
__device__ __forceinline__ void store_number(void* to, int64_t offset, float number) {
  Pack<kType, 1>::rounded({number}).store(static_cast<char*>(to) + offset);
}

// A neuron's own numbers, and its states.
struct Own {
  float leak, input_gain, state_gain, threshold, fire_above, bias;

  Own() = default;
  __device__ __forceinline__ Own(Leak form, const Neuron<float>& n, const More& more, int64_t neuron)
      : leak(read(more.leak, more.leak.data, neuron, n.leak)),
        input_gain(more.leak.data ? gain_of_input(form, leak) : n.input_gain),
        state_gain(more.leak.data ? gain_of_state(form, leak) : n.state_gain),
        threshold(read(more.threshold, more.threshold.data, neuron, n.threshold)),
        fire_above(read(more.threshold, more.fire_above, neuron, n.fire_above)),
        bias(read(more.bias, more.bias.data, neuron, 0.0f)) {}

 private:
  static __device__ __forceinline__ float read(const Parameter& p, const void* data, int64_t neuron, float constant) {
    if (!data) return constant;
    const int64_t all = quotient(neuron, p.period);
    return load_constant(static_cast<const float*>(data) + all - quotient(all, p.channels) * p.channels);
  }
};

template <RecurrentVariant kV>
struct States {
  float v, i, a;

  // `from` points to the neuron's first state, the next are `neurons` apart; null: where neurons start.
  __device__ __forceinline__ void load(const float* from, int64_t neurons, float v_start) {
    v = v_start, i = a = 0.0f;
    if (!from) return;
    v = *from;
    if constexpr (kV.synaptic) i = from[neurons];
    if constexpr (kV.adaptive) a = from[(1 + kV.synaptic) * neurons];
  }
  __device__ __forceinline__ void store(float* to, int64_t neurons) const {
    *to = v;
    if constexpr (kV.synaptic) to[neurons] = i;
    if constexpr (kV.adaptive) to[(1 + kV.synaptic) * neurons] = a;
  }
};
__device__ __forceinline__ const float* neuron_at(const void* states, int64_t neuron) {
  return states ? static_cast<const float*>(states) + neuron : nullptr;
}

// One step of a neuron that receives x, and r from its layer.
struct Stepped {
  float h, threshold, drive, s;
};
template <RecurrentVariant kV>
__device__ __forceinline__ Stepped step(const Neuron<float>& n, const Own& own, States<kV>& at, float x, float r) {
  constexpr Kind kind = kind_of(kV);
  Stepped to;
  float z = (x + own.bias) + r;
  if constexpr (kV.synaptic) z = at.i = current(n, at.i, z);
  to.threshold = kV.adaptive ? raised(n, own.threshold, at.a) : own.threshold;
  to.drive = drive(kV.form, n, at.v, z);
  to.h = charge(kV.form, n, own.leak, at.v, z);
  if constexpr (kV.bounded) to.h = bound(n, to.h);
  to.s = spike(kind, n, to.threshold, own.fire_above, to.h);
  at.v = reset(kind, n, to.threshold, to.h, to.s);
  if constexpr (kV.adaptive) at.a = adapted(n, at.a, to.s);
  return to;
}

// Adds to r what `count` neurons that fired send, one after the other: load(rows + from, p) of every `from` of a list
// in shared memory. Lists are read to the end of a group of kTogether, so that all of their memory must have been
// written.
template <bool kValued, bool kAll, int kTogether, int kPlanes, class Load>
__device__ __forceinline__ void receive(float (&r)[kPlanes], const int* list, const float* values, int count,
                                        const float* rows, const Load& load) {
#pragma unroll 1
  for (int at = 0; at < count; at += kTogether) {
    const int left = count - at;
    int from[kTogether];
    float sent[kTogether][kPlanes], value[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(list + at + i);
      from[i] = four.x, from[i + 1] = four.y, from[i + 2] = four.z, from[i + 3] = four.w;
      if constexpr (kValued) {
        const float4 of = *reinterpret_cast<const float4*>(values + at + i);
        value[i] = of.x, value[i + 1] = of.y, value[i + 2] = of.z, value[i + 3] = of.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float* row = rows + from[i];
      if constexpr (!kAll) asm("" : "+l"(row));  // else it is worked out for every p
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) sent[i][p] = kAll || i < left ? load(row, p) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const float more = kValued ? value[i] * sent[i][p] : sent[i][p];
        r[p] = i < left ? r[p] + more : r[p];
      }
  }
}

}  // namespace

// --- forward ---

namespace {

// A thread of a layer, which has the neurons first, first + 32, ... of it, and what it shares with others. In memory,
// `places` of a layer being 32 * planes * warps: lists [2, layers of the block, places], counts [2, layers, warps], and
// if they are there the rows of `outgoing`, one after the other and with zeros behind the last for those who have no
// neuron, then the values of the spikes in the lists.
template <RecurrentVariant kV>
struct Member {
  static constexpr int kPlanes = kV.planes, kOfWarp = 32 * kPlanes, kPlaces = kOfWarp * kV.warps;
  int size, layers, layer, warp, lane, first;
  int *lists, *counts;
  float* values;
  const float* rows;
  bool mine[kPlanes];

  // Where there are such threads; all of the block come here.
  __device__ __forceinline__ Member(const Recurrence& r, void* memory)
      : size(int(r.size)),
        layers(blockDim.x / (32 * kV.warps)),
        layer(threadIdx.x / (32 * kV.warps)),
        warp(threadIdx.x / 32 % kV.warps),
        lane(threadIdx.x % 32),
        first(warp * kOfWarp + lane) {
    lists = static_cast<int*>(memory);
    counts = lists + 2 * layers * kPlaces;
    float* copy = reinterpret_cast<float*>(counts + (2 * layers * kV.warps + 3) / 4 * 4);
    values = copy + (kV.shared ? (size * size + kPlaces - size + 3) / 4 * 4 : 0);
    rows = static_cast<const float*>(r.outgoing);
    for (int i = threadIdx.x; i < 2 * layers * kPlaces; i += blockDim.x) {
      lists[i] = 0;
      if (kV.valued || r.s) values[i] = 0.0f;
    }
    if constexpr (kV.shared) {
#pragma unroll 8
      for (int i = threadIdx.x; i < size * size; i += blockDim.x) copy[i] = load_constant(rows + i);
      for (int i = size * size + threadIdx.x; i < size * size + kPlaces - size; i += blockDim.x) copy[i] = 0.0f;
      rows = copy;
    }
    rows += first;
    __syncthreads();
  }

  // Tells the layer which of a warp's neurons fired, and receives what all of them send. `half`: of the lists, another
  // one each time.
  template <bool kValued>
  __device__ __forceinline__ void exchange(const float (&spikes)[kPlanes], int half, float (&r)[kPlanes]) const {
    const int own = (half * layers + layer) * kPlaces, of_layer = (half * layers + layer) * kV.warps;
    int n = 0;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const uint32_t fired = __ballot_sync(~0u, mine[p] && spikes[p] != 0.0f);
      if (fired >> lane & 1) {
        const int at = own + warp * kOfWarp + n + __popc(fired & ((1u << lane) - 1));
        lists[at] = (first + 32 * p) * size;
        if constexpr (kValued) values[at] = spikes[p];
      }
      n += __popc(fired);
    }
    if constexpr (kV.warps > 1) {
      if (lane == 0) counts[of_layer + warp] = n;
      __syncthreads();
    } else {
      __syncwarp();
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) r[p] = 0.0f;
#pragma unroll 1
    for (int w = 0; w < kV.warps; ++w) {
      const int count = kV.warps > 1 ? counts[of_layer + w] : n, at = own + w * kOfWarp;
      receive<kValued, kV.shared, loaded_together(kV)>(r, lists + at, values + at, count, rows,
                                                       [&](const float* row, int p) {
                                                         if constexpr (kV.shared) return row[32 * p];
                                                         return mine[p] ? load_constant(row + 32 * p) : 0.0f;
                                                       });
    }
  }
};

}  // namespace

template <RecurrentVariant kV>
__global__ void __launch_bounds__(kRecurrentThreads)
    recurrent_forward(Neuron<float> neuron, LIFShape s, RecurrentForward a) {
  using Number = Pack<kV.dtype, 1>;
  constexpr int kPlanes = kV.planes;
  constexpr int kAhead = kPlanes <= 2 ? 8 : 4;  // steps
  static_assert(kChunk % kAhead == 0 && kAhead % 2 == 0);
  const int steps = int(s.steps);
  Member<kV> member(a.r, shared_memory);
  const int first = member.first;
  const Place place(s, (int64_t(blockIdx.x) * member.layers + member.layer) * member.size, true);
  bool mine[kPlanes];
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) mine[p] = member.mine[p] = place.inside && first + 32 * p < member.size;

  const int64_t x_stride = s.x_step_stride * size_of(kV.dtype), stride = s.inner * size_of(kV.dtype);
  const char* x = static_cast<const char*>(a.a.x) + (place.x + first) * size_of(kV.dtype);
  char* spikes = static_cast<char*>(a.a.spikes) + (place.sequence + first) * size_of(kV.dtype);
  const int64_t at = place.state + first;
  float* saved = static_cast<float*>(a.a.saved);
  Number next[kAhead][kPlanes];
  const auto load = [&](int left) {
#pragma unroll
    for (int g = 0; g < kAhead; ++g) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p)
        if (g < left && mine[p]) next[g][p] = Number::load(x + 32 * p * size_of(kV.dtype));
      x += x_stride;
    }
  };
  load(steps);

  const auto each = [&](const auto& use) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) use(p, at + 32 * p);
  };
  Own own[kPlanes] = {};
  States<kV> states[kPlanes];
  float r[kPlanes] = {};
  each([&](int p, int64_t n) {
    if (!mine[p]) return;
    own[p] = Own(kV.form, neuron, a.a.more, n);
    states[p].load(neuron_at(a.a.v, n), place.neurons, neuron.v_start);
  });
  if (a.r.s) {
    float before[kPlanes] = {};
    each([&](int p, int64_t n) {
      if (mine[p]) before[p] = load_number<kV.dtype>(a.r.s, n * size_of(kV.dtype));
    });
    member.template exchange<true>(before, 1, r);
  }

  for (int t = 0; t < steps; t += kAhead) {
    if (saved && t > 0 && t % kChunk == 0) {
      each([&](int p, int64_t n) {
        if (mine[p]) states[p].store(saved + n, place.neurons);
      });
      saved += (1 + kV.synaptic + kV.adaptive) * place.neurons;
    }
    Number now[kAhead][kPlanes];
#pragma unroll
    for (int g = 0; g < kAhead; ++g)
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) now[g][p] = next[g][p];
    load(steps - t - kAhead);
#pragma unroll
    for (int g = 0; g < kAhead; ++g) {
      if (t + g >= steps) break;
      float fired[kPlanes];
      each([&](int p, int64_t) {
        fired[p] = step<kV>(neuron, own[p], states[p], now[g][p].get(0), r[p]).s;
        if (mine[p]) store_number<kV.dtype>(spikes, 32 * p * size_of(kV.dtype), fired[p]);
      });
      spikes += stride;
      if (t + g + 1 < steps) member.template exchange<kV.valued>(fired, g % 2, r);
    }
  }
  if (a.a.v_last)
    each([&](int p, int64_t n) {
      if (mine[p]) states[p].store(static_cast<float*>(a.a.v_last) + n, place.neurons);
    });
}

// --- backward ---

namespace {

// What the way back needs of a step, and when a thread left it in `scratch`: dL/dspikes lies where it is.
template <RecurrentVariant kV>
struct Scratch {
  static constexpr int kPlanes = 1 + kV.adaptive + kV.grad_leak;  // h, the threshold, what the leak is a factor of
  float* at;
  int64_t neurons;

  __device__ __forceinline__ void skip(int steps) { at += steps * kPlanes * neurons; }
  __device__ __forceinline__ void store(const Stepped& from) {
    *at = from.h;
    if constexpr (kV.adaptive) at[neurons] = from.threshold;
    if constexpr (kV.grad_leak) at[(1 + kV.adaptive) * neurons] = from.drive;
  }
  __device__ __forceinline__ Stepped load(float threshold) const {
    Stepped to;
    to.h = *at, to.threshold = threshold;
    if constexpr (kV.adaptive) to.threshold = at[neurons];
    if constexpr (kV.grad_leak) to.drive = at[(1 + kV.adaptive) * neurons];
    return to;
  }
};

// Sums over time, chunk by chunk.
struct Sums {
  float leak = 0.0f, threshold = 0.0f, bias = 0.0f;

  __device__ __forceinline__ void add(const Sums& more) {
    leak += more.leak, threshold += more.threshold, bias += more.bias;
  }
};

}  // namespace

// Shared memory, with `places` = 32 * warps: g [2, places], masks of the neurons that fired [kListed, warps], lists
// of them [kListed, places] and how long these are [kListed], if kV.valued the values of the spikes in them, and `kept`
// rows of `weight` [kept, places]. Threads without a neuron read what the last one does.
template <RecurrentVariant kV>
__global__ void __launch_bounds__(32 * kV.warps)
    recurrent_backward(Neuron<float> neuron, LIFShape s, RecurrentBackward a) {
  constexpr int kPlaces = 32 * kV.warps, kListed = listed_together(kV);
  constexpr Kind kind = kind_of(kV);
  const int size = int(a.r.size), steps = int(s.steps), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool mine = threadIdx.x < size;
  const int j = mine ? threadIdx.x : size - 1;
  const Place place(s, int64_t(blockIdx.x) * size + j, true);
  const int64_t at = place.state, neurons = place.neurons;

  float* g = reinterpret_cast<float*>(shared_memory);
  auto* masks = reinterpret_cast<uint32_t*>(g + 2 * kPlaces);
  int *lists = reinterpret_cast<int*>(masks + kListed * kV.warps), *counts = lists + kListed * kPlaces;
  float *values = reinterpret_cast<float*>(counts + kListed), *rows = values + (kV.valued ? kListed * kPlaces : 0);
  const int kept = int(a.kept), in_registers = kV.rows < size ? kV.rows : size, on_chip = in_registers + kept;
  const float *outgoing = static_cast<const float*>(a.r.outgoing) + j,
              *weight = static_cast<const float*>(a.r.weight) + j;
  float column[kV.rows > 0 ? kV.rows : 1];
#pragma unroll
  for (int k = 0; k < kV.rows; ++k) column[k] = k < size ? load_constant(weight + k * size) : 0.0f;
#pragma unroll 8
  for (int k = in_registers; k < on_chip; ++k)
    rows[(k - in_registers) * kPlaces + threadIdx.x] = load_constant(weight + k * size);
  for (int i = threadIdx.x; i < kListed * kPlaces; i += kPlaces) {
    lists[i] = 0;
    if constexpr (kV.valued) values[i] = 0.0f;
  }
  g[threadIdx.x] = g[kPlaces + threadIdx.x] = 0.0f;
  __syncthreads();

  // The sum of weight[k][j] * g[k].
  const auto pulled_back = [&](const float* g) {
    float sum[4] = {};
#pragma unroll
    for (int k = 0; k < kV.rows; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(g + k);
      sum[0] = __fmaf_rn(column[k], four.x, sum[0]);
      sum[1] = __fmaf_rn(column[k + 1], four.y, sum[1]);
      sum[2] = __fmaf_rn(column[k + 2], four.z, sum[2]);
      sum[3] = __fmaf_rn(column[k + 3], four.w, sum[3]);
    }
    const auto rest = [&](int k, int end, const auto& row) {
#pragma unroll 2
      for (; k + 4 <= end; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(g + k);
        sum[0] = __fmaf_rn(row(k, 0), four.x, sum[0]);
        sum[1] = __fmaf_rn(row(k, 1), four.y, sum[1]);
        sum[2] = __fmaf_rn(row(k, 2), four.z, sum[2]);
        sum[3] = __fmaf_rn(row(k, 3), four.w, sum[3]);
      }
#pragma unroll 1
      for (; k < end; ++k) sum[0] = __fmaf_rn(row(k, 0), g[k], sum[0]);
    };
    if (kV.rows < kPlaces) {
      const float* own = rows + threadIdx.x;
      rest(in_registers, on_chip, [&](int k, int i) { return own[(k - kV.rows) * kPlaces + i * kPlaces]; });
      rest(on_chip, size, [&](int k, int i) { return load_constant(weight + (k + i) * size); });
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  };

  neuron.k.table = static_cast<const float*>(a.a.more.table);
  const Own own(kV.form, neuron, a.a.more, at);
  Scratch<kV> scratch{static_cast<float*>(a.a.scratch) + at, neurons};
  States<kV> grad;  // of the states behind a step
  grad.load(neuron_at(a.a.grad_v_last, at), neurons, 0.0f);
  // In bytes, where a step lies in x; and in spikes and their gradients and in grad_x, the last step first.
  const int64_t x_stride = s.x_step_stride * size_of(kV.dtype), stride = s.inner * size_of(kV.dtype);
  int64_t x_offset = place.x * size_of(kV.dtype) + (steps - 1) * x_stride,
          offset = place.sequence * size_of(kV.dtype) + (steps - 1) * stride;
  Sums sums;

  for (int begin = (steps - 1) / kChunk * kChunk; begin >= 0; begin -= kChunk) {
    const int length = steps - begin < kChunk ? steps - begin : kChunk;
    const int64_t x_begin = x_offset - (length - 1) * x_stride, chunk_begin = offset - (length - 1) * stride;
    // Who fired before a step of the chunk.
    const auto before = [&](int i) {
      if (begin + i > 0) return load_number<kV.dtype>(a.r.spikes, chunk_begin + (i - 1) * stride);
      return a.r.s ? load_number<kV.dtype>(a.r.s, at * size_of(kV.dtype)) : 0.0f;
    };
    States<kV> states;
    const int64_t chunk = begin / kChunk - 1;
    if (begin > 0)
      states.load(neuron_at(a.a.saved, chunk * (1 + kV.synaptic + kV.adaptive) * neurons + at), neurons, 0.0f);
    else
      states.load(neuron_at(a.a.v, at), neurons, neuron.v_start);
    int64_t x_at = x_begin;
    float x_now = length > 0 ? load_number<kV.dtype>(a.a.x, x_at) : 0.0f;
    float* const scratch_begin = scratch.at;
#pragma unroll 1
    for (int first = 0; first < length; first += kListed) {
      const int listed = length - first < kListed ? length - first : kListed;
#pragma unroll
      for (int i = 0; i < kListed; ++i) {
        const uint32_t fired = __ballot_sync(~0u, i < listed && mine && before(first + i) != 0.0f);
        if (lane == 0) masks[i * kV.warps + warp] = fired;
      }
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < listed; ++i) {
        int to = i * kPlaces, all = 0;
#pragma unroll
        for (int w = 0; w < kV.warps; ++w) {
          const int n = __popc(masks[i * kV.warps + w]);
          all += n;
          if (w < warp) to += n;
        }
        const uint32_t fired = masks[i * kV.warps + warp];
        if (fired >> lane & 1) {
          to += __popc(fired & ((1u << lane) - 1));
          lists[to] = j * size;
          if constexpr (kV.valued) values[to] = before(first + i);
        }
        if (threadIdx.x == 0) counts[i] = all;
      }
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < listed; ++i) {
        float x_next = 0.0f, r[1] = {};
        x_at += x_stride;
        if (first + i + 1 < length) x_next = load_number<kV.dtype>(a.a.x, x_at);
        receive<kV.valued, false, loaded_together(kV)>(r, lists + i * kPlaces, values + i * kPlaces, counts[i],
                                                       outgoing,
                                                       [](const float* row, int) { return load_constant(row); });
        const Stepped made = step<kV>(neuron, own, states, x_now, r[0]);
        if (mine) scratch.store(made);
        scratch.skip(1);
        x_now = x_next;
      }
      if constexpr (kListed < kChunk) __syncthreads();
    }

    const auto load = [&](int64_t offset, Stepped& made, float& grad_s) {
      scratch.skip(-1);
      if (mine) made = scratch.load(own.threshold);
      if (a.a.grad_spikes) grad_s = load_number<kV.dtype>(a.a.grad_spikes, offset);
    };
    Stepped made = {};
    float grad_s = 0.0f;
    Sums of_chunk;
    if (length > 0) load(offset, made, grad_s);
#pragma unroll 1
    for (int i = length - 1; i >= 0; --i) {
      const int t = begin + i;
      Stepped next = made;
      float next_grad_s = 0.0f;
      if (i > 0) load(offset - stride, next, next_grad_s);
      if (t >= kChunk) {  // what the next chunk will read
        to_l2(a.a.x, x_offset - kChunk * x_stride);
        to_l2(a.r.spikes, offset - kChunk * stride);
        if (a.a.grad_spikes) to_l2(a.a.grad_spikes, offset - kChunk * stride);
      }
      if (t + 1 < steps) grad_s += pulled_back(g + (t + 1) % 2 * kPlaces);
      if constexpr (kV.adaptive) grad_s += grad.a;
      Pulled<float> to;
      with_surrogate(kV.surrogate, [&](auto curve) {
        to = pulled<decltype(curve)>(kind, neuron, made.threshold, own.fire_above, made.h, grad_s, grad.v);
      });
      float grad_z = of_input(kV.form) ? to.h * own.input_gain : to.h;
      if constexpr (kV.synaptic) {
        grad_z += grad.i;
        grad.i = neuron.synapse_decay * grad_z;
      }
      if constexpr (kV.adaptive) grad.a = __fmaf_rn(neuron.jump, to.threshold, neuron.threshold_decay * grad.a);
      grad.v = to.h * own.state_gain;
      if constexpr (kV.grad_leak) of_chunk.leak = __fmaf_rn(to.h, to.h != 0.0f ? made.drive : 0.0f, of_chunk.leak);
      of_chunk.threshold += to.threshold;
      of_chunk.bias += grad_z;
      if (mine) {
        store_number<kV.dtype>(a.a.grad_x, offset, grad_z);
        g[t % 2 * kPlaces + threadIdx.x] = grad_z;
      }
      __syncthreads();
      made = next, grad_s = next_grad_s;
      x_offset -= x_stride, offset -= stride;
    }
    sums.add(of_chunk);
    scratch.at = scratch_begin;
  }

  if (!mine) return;
  const auto put = [&](void* to, float number) {
    if (to) static_cast<float*>(to)[at] = number;
  };
  if (a.a.grad_v) grad.store(static_cast<float*>(a.a.grad_v) + at, neurons);
  if (a.r.grad_s) put(a.r.grad_s, pulled_back(g));
  if constexpr (kV.grad_leak) put(a.a.more.grad_leak, sums.leak);
  put(a.a.more.grad_threshold, sums.threshold);
  put(a.a.more.grad_bias, sums.bias);
}

}  // namespace snnkern
