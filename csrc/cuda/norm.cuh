// Batch norm before the neurons, on CUDA devices: sums over the elements of each channel, part by part (channels.cuh),
// and what is made of them, a warp per channel. See ../norm.h; the sums of gradients are in bn_lif.cuh, which has the
// neurons.
//
// Every element is converted to double: the devices that this is for (compute capability 8.0, 9.0) convert and add
// doubles fast enough to wait for memory still. Others, which have few units for doubles, wait for these.
#pragma once
#include "../norm.h"
#include "channels.cuh"
#include "memory.cuh"

namespace snnkern {

struct MomentsVariant {  // these as in snnkern/backend/cuda/bn_lif.py
  DType dtype;
  int width, lanes;  // neurons a thread; channels that it has to know, 1 or as many
  int steps;         // where they are few, else 0
  bool rows;         // outer > 1
};
struct NormVariant {
  bool training;  // the statistics are those of the batch
};
constexpr int kMomentThreads = 256;
constexpr int kChannelThreads = 128;  // of four channels

struct MomentsTensors {
  const void* x;
  double* moments;
};
struct PrepareTensors {
  const double* moments;  // read in training
  const float *weight, *bias;
  float *running_mean, *running_var, *table;
};
struct GradientsTensors {
  const float* table;
  const double *sums, *all_sums;
  float *affine, *pull_push;
};

// An item is a pack of neurons in a chunk of kChunk steps of a run: the rows of all runs, chunk after chunk.
template <MomentsVariant kV>
__global__ void __launch_bounds__(kMomentThreads, kV.lanes > 4   ? 2
                                                  : kV.lanes > 1 ? 3
                                                                 : 4)
    moments(LIFShape s, Bands b, MomentsTensors tensors) {
  using Numbers = Pack<kV.dtype, kV.width>;
  using OfSum = Sum<kV.width, kV.lanes>;
  constexpr int kSteps = kV.steps > 0 ? kV.steps : kV.width > 1 ? 4 : 8;  // loaded together
  __shared__ double memory[OfSum::kDoublesAThread * kMomentThreads];
  const int64_t neurons = s.outer * s.inner, runs = quotient(neurons, b.channels * b.period);
  __shared__ Share<kV.width> share;
  if (threadIdx.x == 0) share = {b, blockIdx.x, runs * ((s.steps + kChunk - 1) / kChunk), kMomentThreads};
  __syncthreads();
  const auto x = static_cast<const char*>(tensors.x);
  const int64_t step = s.x_step_stride * size_of(kV.dtype);
  const auto place = [&](int64_t neuron) { return x + Place(s, neuron, kV.rows).x * size_of(kV.dtype); };
  const auto shift_of = [&](int64_t channel) {  // its first element
    return Pack<kV.dtype, 1>::load(place(channel * b.period)).get(0);
  };

  double total[2][kV.lanes] = {};
  Item<kV.width> item(share, b);
  if (item.left) {
    const Channels<kV.lanes> channels(b.channels, b.period, item.neuron);
    double shift[kV.lanes];
    if (kV.lanes > 1 && channels.in_a_row) {
      const Numbers first = Numbers::load(place(channels.first));
#pragma unroll
      for (int l = 0; l < kV.lanes; ++l) shift[l] = first.get(l);
    } else {
      channels.each([&](int l, int64_t c) { shift[l] = shift_of(c); });
    }
    const auto add = [&](const Numbers& numbers) {
#pragma unroll
      for (int e = 0; e < kV.width; ++e) {
        const int l = kV.lanes > 1 ? e : 0;
        const double d = double(numbers.get(e)) - shift[l];
        total[0][l] += d;
        total[1][l] = fma(d, d, total[1][l]);
      }
    };
    for (; item.left; item.next(share)) {
      const int64_t chunk = !kV.steps && s.steps > kChunk ? quotient(item.neuron, neurons) : 0, t = chunk * kChunk;
      const char* from = place(item.neuron - chunk * neurons) + t * step;
      int left = kV.steps > 0 ? kV.steps : s.steps - t < kChunk ? int(s.steps - t) : kChunk;
      Numbers now[kSteps];
      for (; left >= kSteps; left -= kSteps) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k, from += step) now[k] = Numbers::load(from);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) add(now[k]);
      }
#pragma unroll
      for (int k = 0; k < kSteps - 1; ++k, from += step)
        if (k < left) now[k] = Numbers::load(from);
#pragma unroll
      for (int k = 0; k < kSteps - 1; ++k)
        if (k < left) add(now[k]);
    }
  }
  OfSum{share, memory}.all(total, b, tensors.moments);
  if (share.part > 0) return;
  for (int64_t c = share.first + threadIdx.x; c < share.first + share.channels; c += kMomentThreads)
    tensors.moments[2 * b.parts * b.channels + c] = shift_of(c);
}

namespace {

// The channel of this thread's warp, whose lanes add up every 32nd part and then each other.
__device__ __forceinline__ int64_t this_channel() { return this_thread() / 32; }
__device__ __forceinline__ int this_lane() { return threadIdx.x % 32; }

__device__ Totals add_up_parts(int64_t c, const NormPlan& p, const double* parts) {
  Totals of = add_up(c, p, parts, this_lane(), 32);
  add_up_warp(of.one, of.two);
  return of;
}

}  // namespace

template <NormVariant kV>
__global__ void __launch_bounds__(kChannelThreads) prepare(NormPlan p, PrepareTensors tensors) {
  const int64_t c = this_channel();
  if (c >= p.channels) return;
  const auto& [given, weight, bias, running_mean, running_var, table] = tensors;
  const double* moments = kV.training ? given : nullptr;
  Totals sums{};
  if (kV.training) sums = add_up_parts(c, p, moments);
  if (this_lane() == 0) prepare_channel(c, p, moments, sums, weight, bias, running_mean, running_var, table);
}

template <NormVariant kV>
__global__ void __launch_bounds__(kChannelThreads) gradients(NormPlan p, GradientsTensors tensors) {
  const int64_t c = this_channel();
  if (c >= p.channels) return;
  const auto& [table, parts, all_sums, affine, pull_push] = tensors;
  const Totals sums = add_up_parts(c, p, parts);
  if (this_lane() == 0) gradients_channel(c, p, table, sums, all_sums, affine, kV.training ? pull_push : nullptr);
}

}  // namespace snnkern
