// The LIF after a batch norm, on CUDA devices: lif.cuh's walks with another input. The parameters of a thread's channel
// (or of each of its neurons) are in registers, and what the neurons receive never leaves them.
//   forward    lif_forward
//   sums       the way back of every neuron of a channel, part by part (channels.cuh), of which only two sums are kept:
//              in float over the steps of a chunk, then in double
//   backward   as lif_backward, with x in the column too, to write the gradient of x
#pragma once
#include "../norm.h"
#include "channels.cuh"
#include "lif.cuh"

namespace snnkern {
namespace {

template <int kLanes>
struct Affine {
  float mean[kLanes], scale[kLanes], offset[kLanes];

  __device__ __forceinline__ Affine(const Norm& m, const Channels<kLanes>& channels) {
    const auto* table = static_cast<const float*>(m.table);
    channels.read(mean, table + kMean * m.channels);
    channels.read(scale, table + kScale * m.channels);
    channels.read(offset, table + kOffset * m.channels);
  }
};

// What neurons receive: (x - mean) * scale + offset, and the residual if there is one.
template <LIFVariant kV>
struct Input<kV, true> {
  using Numbers = Pack<kV.dtype, kV.width>;
  struct Step {
    Numbers x, residual;
  };
  Input<kV, false> x, residual;
  Affine<kV.lanes> affine;

  template <class Tensors>
  __device__ __forceinline__ Input(const LIFShape& s, const Place& place, const Tensors& a,
                                   const Affine<kV.lanes>& affine)
      : x(s, place, a), residual(x), affine(affine) {
    residual.at = static_cast<const char*>(a.norm.residual) + place.sequence * size_of(kV.dtype);
    residual.stride = s.inner * size_of(kV.dtype);
  }
  template <class Tensors>
  __device__ __forceinline__ Input(const LIFShape& s, const Place& place, const Tensors& a)
      : Input(s, place, a, {a.norm, {a.norm.channels, a.norm.period, place.state}}) {}

  __device__ __forceinline__ void skip(int64_t steps) {
    x.skip(steps);
    residual.skip(steps);
  }
  __device__ __forceinline__ Step next() {
    Step step;
    step.x = x.next();
    if constexpr (kV.residual) step.residual = residual.next();
    return step;
  }
  static __device__ __forceinline__ int lane(int e) { return kV.lanes > 1 ? e : 0; }
  __device__ __forceinline__ float centred(const Numbers& x, int e) const { return x.get(e) - affine.mean[lane(e)]; }
  __device__ __forceinline__ float operator()(const Step& step, int e) const {
    const float normed = centred(step.x, e) * affine.scale[lane(e)] + affine.offset[lane(e)];
    if constexpr (kV.residual) return normed + step.residual.get(e);
    return normed;
  }
};

// x of a chunk's steps, beside the column of potentials.
template <LIFVariant kV>
struct Came {
  using Numbers = Pack<kV.dtype, kV.width>;
  static constexpr int kThreads = backward_threads(kV.width);
  Column<Numbers::kWords, kThreads> column;

  __device__ __forceinline__ explicit Came(const LIFShape& s)
      : column(shared_memory + (s.steps < kChunk ? steps_of<kV>(s) : kChunk) * kThreads * kV.width * sizeof(float)) {}
  __device__ __forceinline__ void push(const Numbers& x) {
    float words[Numbers::kWords];
#pragma unroll
    for (int w = 0; w < Numbers::kWords; ++w) words[w] = __uint_as_float(x.word[w]);
    column.push(words);
  }
  __device__ __forceinline__ Numbers pop() {
    float words[Numbers::kWords];
    column.pop(words);
    Numbers x;
#pragma unroll
    for (int w = 0; w < Numbers::kWords; ++w) x.word[w] = __float_as_uint(words[w]);
    return x;
  }
};

}  // namespace

struct SumsTensors {
  double* sums;
  LIFBackward a;
};

// Blocks that a multiprocessor's registers hold, few rather than spills; snnkern/backend/cuda/bn_lif.py launches so
// many.
constexpr int sums_blocks(const LIFVariant& v) {
  const int of_64 = v.lanes > 1 || divides(v) ? 4 : v.residual || v.grouped ? 6 : 8;
  return (v.steps > 0 && !divides(v) ? of_64 * 3 / 2 : of_64) * 64 / backward_threads(v.width);
}

template <LIFVariant kV>
__global__ void __launch_bounds__(backward_threads(kV.width), sums_blocks(kV))
    bn_lif_sums(Neuron<float> neuron, LIFShape s, Bands b, SumsTensors tensors) {
  const LIFBackward& a = tensors.a;
  const Neurons<kV> n(neuron, a.more, 0);
  __shared__ Share<kV.width> share;
  if (threadIdx.x == 0) share = {b, blockIdx.x, quotient(s.outer * s.inner, b.channels * b.period), int(blockDim.x)};
  __syncthreads();
  double total[2][kV.lanes] = {};
  Item<kV.width> item(share, b);
  if (item.left) {
    const Affine<kV.lanes> affine(a.norm, {b.channels, b.period, item.neuron});
    for (; item.left; item.next(share)) {
      const Place place(s, item.neuron, kV.rows);
      const Input<kV> input(s, place, a, affine);
      Came<kV> came(s);
      State<kV> grad;
      float sum[kV.lanes] = {}, moment[kV.lanes] = {};
      Sums<kV> none;
      grad.load_or(a.grad_v_last, place, 0.0f);
      int steps = 0;  // of the chunk, on the way back
      Column<kV.width, backward_threads(kV.width)> column(shared_memory);
      back<kV>(
          n, s, place, a, grad, none, input, column, 0, steps_of<kV>(s),
          [&](const typename Input<kV>::Step& step) {
            came.push(step.x);
            ++steps;
          },
          [&](const float (&g)[kV.width], const float (&)[kV.width]) {
            const auto x = came.pop();
#pragma unroll
            for (int e = 0; e < kV.width; ++e) {
              const int l = input.lane(e);
              sum[l] += g[e];
              moment[l] = __fmaf_rn(g[e], input.centred(x, e), moment[l]);
            }
            if (--steps) return;
#pragma unroll
            for (int l = 0; l < kV.lanes; ++l) {
              total[0][l] += of_input<kV>(neuron, sum[l]);
              total[1][l] += of_input<kV>(neuron, moment[l]);
              sum[l] = moment[l] = 0.0f;
            }
          });
    }
  }
  Sum<kV.width, kV.lanes>{share, reinterpret_cast<double*>(shared_memory)}.all(total, b, tensors.sums);
}

template <LIFVariant kV>
__global__ void __launch_bounds__(backward_threads(kV.width), divides(kV) || kV.lanes > 1 ? sums_blocks(kV) : 0)
    bn_lif_backward(Neuron<float> neuron, LIFShape s, LIFBackward a) {
  using Numbers = Pack<kV.dtype, kV.width>;
  const Place place(s, this_thread() * kV.width, kV.rows);
  if (!place.inside) return;
  const Neurons<kV> n(neuron, a.more, place.state);
  const Input<kV> input(s, place, a);
  float pull[kV.lanes], push[kV.lanes];
  const auto* table = static_cast<const float*>(a.pull_push);
  if (table) {
    const Channels<kV.lanes> channels(a.norm.channels, a.norm.period, place.state);
    channels.read(pull, table);
    channels.read(push, table + a.norm.channels);
  }
  const int64_t stride = s.inner * size_of(kV.dtype);
  const int64_t last = place.sequence * size_of(kV.dtype) + (steps_of<kV>(s) - 1) * stride;
  char *to = static_cast<char*>(a.grad_x) + last, *of_residual = static_cast<char*>(a.grad_residual) + last;
  Came<kV> came(s);
  State<kV> grad_state;
  Sums<kV> none;
  grad_state.load_or(a.grad_v_last, place, 0.0f);
  Column<kV.width, backward_threads(kV.width)> column(shared_memory);
  back<kV>(
      n, s, place, a, grad_state, none, input, column, 0, steps_of<kV>(s),
      [&](const typename Input<kV>::Step& step) { came.push(step.x); },
      [&](const float (&g)[kV.width], const float (&)[kV.width]) {
        const Numbers x = came.pop();
        float grad[kV.width];
#pragma unroll
        for (int e = 0; e < kV.width; ++e) grad[e] = of_input<kV>(neuron, g[e]);
        if (a.grad_residual) {
          Numbers::rounded(grad).store(of_residual);
          of_residual -= stride;
        }
#pragma unroll
        for (int e = 0; e < kV.width; ++e) {
          const int l = input.lane(e);
          const float less = __fmaf_rn(input.centred(x, e), push[l], pull[l]);
          grad[e] = table ? __fmaf_rn(input.affine.scale[l], grad[e], -less) : input.affine.scale[l] * grad[e];
        }
        Numbers::rounded(grad).store(to);
        to -= stride;
      });
  if (a.grad_v) grad_state.store(static_cast<float*>(a.grad_v) + place.state, place);
}

}  // namespace snnkern
