// The LIF on CUDA devices. A thread owns kVec neighbouring neurons, 16 bytes of x where alignment allows, for all T
// steps:
//   forward    v in registers; loads run kGroup steps ahead of their use
//   backward   per chunk of kChunk steps, last to first: recompute h into the thread's own column of shared memory,
//   then
//              walk back over it; the other pass's first loads are in flight while one pass runs
// Form, reset and surrogate are run-time switches, the same for every thread: memory traffic hides them, and a dozen
// kernels compile where templates would make hundreds.
//
// Where neurons are few, a thread owns one and loads further ahead, and time may be split into segments, blockIdx.y:
//   forward    a segment warms up on the steps before it, without output, and notes the state from which it then starts
//              and with which it ends; a second kernel, a thread per neuron, compares these bit for bit and runs again
//              what differs. Spikes are those of the serial loop.
//   backward   given h, a segment maps the gradient of its last state to that of its first by gain * g + carry; a first
//              kernel finds gain and carry of every segment, then each segment composes those after it. Compared with
//              the serial loop only the order of rounding changes.
#include "../neuron.h"
#include "memory.cuh"

namespace snnkern {
namespace {

template <int kVec>
constexpr int kGroup = kVec == 1 ? 16 : 4;  // steps loaded together; divides kChunk
static_assert(kChunk % kGroup<1> == 0);

template <class IO, int kVec>
using Group = Pack<IO, kVec>[kGroup<kVec>];

// The steps t, t + 1, ... (or t, t - 1, ... with by = -1) of one thread's column, as far as they are in [0, steps).
template <class IO, int kVec>
SNN_HD void fetch(Group<IO, kVec>& group, const IO* __restrict__ column, int64_t stride, int64_t t, int by,
                  int64_t steps) {
#pragma unroll
  for (int k = 0; k < kGroup<kVec>; ++k) {
    const int64_t u = t + k * by;
    if (u >= 0 && u < steps) group[k] = read<IO, kVec>(column + u * stride);
  }
}

struct Place {  // of a thread's neurons in x, in the contiguous [outer, steps, inner] tensors and in the state
  int64_t x, sequence, state, neurons;
  bool inside;

  SNN_HD Place(const LIFShape& s, int64_t thread, int vec) {
    const int64_t per_row = s.inner / vec, outer = thread / per_row, inner = thread % per_row * vec;
    x = outer * s.x_outer_stride + inner;
    sequence = outer * s.steps * s.inner + inner;
    state = outer * s.inner + inner;
    neurons = s.outer * s.inner;
    inside = outer < s.outer;
  }
};

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

// Steps a thread's neurons from t, a multiple of kChunk, to `end`. x, spikes (null: no output) and saved (null: nothing
// is kept) are the thread's columns. With `until_met`, returns true as soon as the potential is the one saved before.
template <class IO, int kVec>
SNN_HD bool march(Pack<float, kVec>& v, const Neuron<float>& n, const LIFShape& s, const IO* __restrict__ x,
                  IO* __restrict__ spikes, float* __restrict__ saved, int64_t t, int64_t end, bool until_met) {
  Group<IO, kVec> now, next;
  fetch<IO, kVec>(next, x, s.x_step_stride, t, 1, end);
  for (; t < end; t += kGroup<kVec>) {
    if (saved && t > 0 && t % kChunk == 0) {
      float* keep = saved + (t / kChunk - 1) * s.outer * s.inner;
      if (until_met && same_bits(v, read<float, kVec>(keep))) return true;
      write(keep, v);
    }
#pragma unroll
    for (int k = 0; k < kGroup<kVec>; ++k) now[k] = next[k];
    fetch<IO, kVec>(next, x, s.x_step_stride, t + kGroup<kVec>, 1, end);
#pragma unroll
    for (int k = 0; k < kGroup<kVec>; ++k) {
      if (t + k >= end) break;
      Pack<IO, kVec> out;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float h = charge(n.form, n, v.lane[e], to_state(now[k].lane[e]));
        out.lane[e] = from_state<IO>(h > n.fire_above ? 1.0f : 0.0f);
        v.lane[e] = reset(n.hard, n, h);
      }
      if (spikes) write(spikes + (t + k) * s.inner, out);
    }
  }
  return false;
}

// What one thread does. The kernels below only add its number, so that a host can run every thread in turn.
template <class IO, int kVec>
SNN_HD void forward_thread(int64_t thread, int64_t segment, const Neuron<float>& n, const LIFShape& s,
                           const IO* __restrict__ x, const float* __restrict__ v0, IO* __restrict__ spikes,
                           float* __restrict__ v_last, float* __restrict__ saved, float* __restrict__ scratch) {
  const Place at(s, thread, kVec);
  if (!at.inside) return;
  const Segment now(s, segment, kVec);
  const int64_t from = now.begin > s.warmup ? now.begin - s.warmup : 0;
  Pack<float, kVec> v = read_or<float, kVec>(from > 0 ? nullptr : v0, at.state, n.v_start);
  float* starts = scratch + segment * at.neurons + at.state;
  if (kVec == 1 && s.segments > 1) {
    march<IO, kVec>(v, n, s, x + at.x, nullptr, nullptr, from, now.begin, false);
    write(starts, v);
  }
  march<IO, kVec>(v, n, s, x + at.x, spikes + at.sequence, saved ? saved + at.state : nullptr, now.begin, now.end,
                  false);
  if (kVec == 1 && s.segments > 1) write(starts + s.segments * at.neurons, v);
  if (now.end == s.steps) write(v_last + at.state, v);
}

template <class IO>
SNN_HD void repair_thread(int64_t thread, const Neuron<float>& n, const LIFShape& s, const IO* __restrict__ x,
                          IO* __restrict__ spikes, float* __restrict__ v_last, float* __restrict__ saved,
                          float* __restrict__ scratch) {
  const Place at(s, thread, 1);
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
    if (march<IO, 1>(v, n, s, x + at.x, spikes + at.sequence, saved ? saved + at.state : nullptr, now.begin, now.end,
                     true))
      continue;
    write(ends + segment * at.neurons, v);
    if (now.end == s.steps) write(v_last + at.state, v);
  }
}

// `column` is the thread's own: kChunk potentials, `pitch` apart. kMap: only find the segment's gain and carry.
template <class IO, int kVec, bool kMap>
SNN_HD void backward_thread(int64_t thread, int64_t segment, Pack<float, kVec>* column, int pitch,
                            const Neuron<float>& n, const LIFShape& s, const IO* __restrict__ x,
                            const float* __restrict__ v0, const float* __restrict__ saved,
                            const IO* __restrict__ grad_spikes, const float* __restrict__ grad_v_last,
                            IO* __restrict__ grad_x, float* __restrict__ grad_v0, float* __restrict__ scratch) {
  const Place at(s, thread, kVec);
  if (!at.inside) return;
  const Segment part(s, segment, kVec);
  float *gains = scratch + at.state, *carries = gains + s.segments * at.neurons;
  x += at.x;
  grad_x += at.sequence;
  const IO* gs = grad_spikes ? grad_spikes + at.sequence : nullptr;
  const int64_t gs_steps = gs ? part.end : 0;

  Pack<float, kVec> grad_v = read_or<float, kVec>(kMap ? nullptr : grad_v_last, at.state, 0.0f);
  float gain = 1.0f;
  if (kVec == 1 && !kMap)
#pragma unroll 8
    for (int64_t later = s.segments - 1; later > segment; --later) {
      const float carry = carries[later * at.neurons], grad = grad_v.lane[0];
      grad_v.lane[0] = grad != 0.0f ? gains[later * at.neurons] * grad + carry : carry;
    }
  Group<IO, kVec> now, next_x, next_gs;
  int64_t t = (part.end - 1) / kChunk * kChunk;
  fetch<IO, kVec>(next_x, x, s.x_step_stride, t, 1, part.end);
  for (; t >= part.begin && part.end > part.begin; t -= kChunk) {
    const int64_t end = t + kChunk < part.end ? t + kChunk : part.end;
    fetch<IO, kVec>(next_gs, gs, s.inner, end - 1, -1, gs_steps);

    Pack<float, kVec> v = t > 0 ? read<float, kVec>(saved + (t / kChunk - 1) * s.outer * s.inner + at.state)
                                : read_or<float, kVec>(v0, at.state, n.v_start);
    for (int64_t u = t; u < end; u += kGroup<kVec>) {
#pragma unroll
      for (int k = 0; k < kGroup<kVec>; ++k) now[k] = next_x[k];
      const bool last = u + kGroup<kVec> >= end;  // then the next chunk's first steps
      fetch<IO, kVec>(next_x, x, s.x_step_stride, last ? t - kChunk : u + kGroup<kVec>, 1, part.end);
#pragma unroll
      for (int k = 0; k < kGroup<kVec>; ++k) {
        if (u + k >= end) break;
        Pack<float, kVec> h;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          h.lane[e] = charge(n.form, n, v.lane[e], to_state(now[k].lane[e]));
          v.lane[e] = reset(n.hard, n, h.lane[e]);
        }
        column[(u + k - t) * pitch] = h;
      }
    }

    for (int64_t u = end - 1; u >= t; u -= kGroup<kVec>) {
#pragma unroll
      for (int k = 0; k < kGroup<kVec>; ++k) now[k] = next_gs[k];
      fetch<IO, kVec>(next_gs, gs, s.inner, u - kGroup<kVec>, -1, u - kGroup<kVec> >= t ? gs_steps : 0);
#pragma unroll
      for (int k = 0; k < kGroup<kVec>; ++k) {
        if (u - k < t) break;
        const Pack<float, kVec> h = column[(u - k - t) * pitch];
        Pack<float, kVec> gh;
        float factor = 1.0f;
        with_surrogate(n.surrogate, [&](auto curve) {
#pragma unroll
          for (int e = 0; e < kVec; ++e)
            gh.lane[e] = adjoint<decltype(curve)>(n, h.lane[e], gs ? to_state(now[k].lane[e]) : 0.0f, grad_v.lane[e]);
          if (kMap) factor = adjoint<decltype(curve)>(n, h.lane[0], 0.0f, 1.0f);
        });
        gain *= factor * n.state_gain;
        Pack<IO, kVec> out;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          out.lane[e] = from_state<IO>(gh.lane[e] * n.input_gain);
          grad_v.lane[e] = gh.lane[e] * n.state_gain;
        }
        if (!kMap) write(grad_x + (u - k) * s.inner, out);
      }
    }
  }
  if (kMap) {
    gains[segment * at.neurons] = gain;
    carries[segment * at.neurons] = grad_v.lane[0];
  } else if (grad_v0 && segment == 0) {
    write(grad_v0 + at.state, grad_v);
  }
}

constexpr int kForwardThreads = 128;
template <int kVec>
constexpr int kBackwardThreads = kVec <= 4 ? 128 : 64;  // 32 KiB of shared memory at full width

__device__ int64_t this_thread() { return blockIdx.x * int64_t(blockDim.x) + threadIdx.x; }

template <class IO, int kVec>
__global__ void __launch_bounds__(kForwardThreads, 4)
    lif_forward_kernel(Neuron<float> n, LIFShape s, const IO* __restrict__ x, const float* __restrict__ v0,
                       IO* __restrict__ spikes, float* __restrict__ v_last, float* __restrict__ saved,
                       float* __restrict__ scratch) {
  forward_thread<IO, kVec>(this_thread(), blockIdx.y, n, s, x, v0, spikes, v_last, saved, scratch);
}

template <class IO>
__global__ void __launch_bounds__(kForwardThreads, 4)
    lif_repair_kernel(Neuron<float> n, LIFShape s, const IO* __restrict__ x, IO* __restrict__ spikes,
                      float* __restrict__ v_last, float* __restrict__ saved, float* __restrict__ scratch) {
  repair_thread<IO>(this_thread(), n, s, x, spikes, v_last, saved, scratch);
}

template <class IO, int kVec, bool kMap>
__global__ void __launch_bounds__(kBackwardThreads<kVec>, 2)
    lif_backward_kernel(Neuron<float> n, LIFShape s, const IO* __restrict__ x, const float* __restrict__ v0,
                        const float* __restrict__ saved, const IO* __restrict__ grad_spikes,
                        const float* __restrict__ grad_v_last, IO* __restrict__ grad_x, float* __restrict__ grad_v0,
                        float* __restrict__ scratch) {
  __shared__ Pack<float, kVec> columns[kChunk][kBackwardThreads<kVec>];  // no barrier: a thread reads what it wrote
  backward_thread<IO, kVec, kMap>(this_thread(), blockIdx.y + int(kMap), &columns[0][threadIdx.x],
                                  kBackwardThreads<kVec>, n, s, x, v0, saved, grad_spikes, grad_v_last, grad_x, grad_v0,
                                  scratch);
}

// 16 bytes per thread if every row starts aligned and enough threads remain to fill the device; else one neuron each.
template <class IO>
bool wide(const LIFShape& s, std::initializer_list<const void*> pointers) {
  constexpr int vec = 16 / sizeof(IO);
  bool ok = s.segments == 1 && s.inner % vec == 0 && s.x_outer_stride % vec == 0 && s.x_step_stride % vec == 0;
  for (const void* p : pointers) ok = ok && aligned(p, 16);
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return ok && s.outer * s.inner / vec >= int64_t(processors) * 512;
}

dim3 grid(const LIFShape& s, int vec, int threads, int64_t segments) {
  return {unsigned((s.outer * (s.inner / vec) + threads - 1) / threads), unsigned(segments), 1};
}

template <class IO, int kVec>
int launch_forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, cudaStream_t stream) {
  const auto* x = static_cast<const IO*>(a.x);
  auto* spikes = static_cast<IO*>(a.spikes);
  auto *v_last = static_cast<float*>(a.v_last), *saved = static_cast<float*>(a.saved);
  auto* scratch = static_cast<float*>(a.scratch);
  lif_forward_kernel<IO, kVec><<<grid(s, kVec, kForwardThreads, s.segments), kForwardThreads, 0, stream>>>(
      Neuron<float>(p), s, x, static_cast<const float*>(a.v), spikes, v_last, saved, scratch);
  if (s.segments > 1)
    lif_repair_kernel<IO><<<grid(s, 1, kForwardThreads, 1), kForwardThreads, 0, stream>>>(
        Neuron<float>(p), s, x, spikes, v_last, saved, scratch);
  return cudaGetLastError();
}

template <class IO, int kVec, bool kMap = false>
int launch_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, cudaStream_t stream) {
  constexpr int threads = kBackwardThreads<kVec>;
  if constexpr (kVec == 1 && !kMap)
    if (s.segments > 1) launch_backward<IO, 1, true>(p, s, a, stream);
  lif_backward_kernel<IO, kVec, kMap><<<grid(s, kVec, threads, s.segments - int(kMap)), threads, 0, stream>>>(
      Neuron<float>(p), s, static_cast<const IO*>(a.x), static_cast<const float*>(a.v),
      static_cast<const float*>(a.saved), static_cast<const IO*>(a.grad_spikes),
      static_cast<const float*>(a.grad_v_last), static_cast<IO*>(a.grad_x), static_cast<float*>(a.grad_v),
      static_cast<float*>(a.scratch));
  return cudaGetLastError();
}

}  // namespace

int lif_forward_cuda(const LIFSpec& p, const LIFShape& s, const LIFForward& a, void* stream) {
  if (s.outer * s.inner == 0) return cudaSuccess;
  return with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const auto to = static_cast<cudaStream_t>(stream);
    return wide<IO>(s, {a.x, a.v, a.spikes, a.v_last, a.saved}) ? launch_forward<IO, 16 / sizeof(IO)>(p, s, a, to)
                                                                : launch_forward<IO, 1>(p, s, a, to);
  });
}

int lif_backward_cuda(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, void* stream) {
  if (s.outer * s.inner == 0) return cudaSuccess;
  return with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    const auto to = static_cast<cudaStream_t>(stream);
    return wide<IO>(s, {a.x, a.v, a.saved, a.grad_spikes, a.grad_v_last, a.grad_x, a.grad_v})
               ? launch_backward<IO, 16 / sizeof(IO)>(p, s, a, to)
               : launch_backward<IO, 1>(p, s, a, to);
  });
}

const char* cuda_error_string(int status) { return cudaGetErrorString(cudaError_t(status)); }

}  // namespace snnkern
