// Batch norm before the neurons, on CUDA devices: sums over the elements of each channel, part by part (channels.cuh),
// and what is made of them, a thread per channel. See ../norm.h; the sums of gradients are in lif.cu, which has the
// neurons.
//
// Every element is converted to double: the devices that this is for (compute capability 8.0, 9.0) convert and add
// doubles fast enough to wait for memory still. Others, which have few units for doubles, wait for these.
#include "../norm.h"
#include "channels.cuh"
#include "memory.cuh"

namespace snnkern {
namespace {

constexpr int kMomentThreads = 256;
constexpr int kChannelThreads = 32;  // per channel: few channels still reach several multiprocessors
// Blocks, at most, and parts of a channel: enough to fill a device, and little to add up.
constexpr int64_t kBlocks = 1024, kMostParts = 64;

// An item is a pack of neurons in a chunk of kChunk steps of a run: the rows of all runs, chunk after chunk.
int64_t moment_rows(const LIFShape& s, const Norm& m) { return runs_of(s, m) * ((s.steps + kChunk - 1) / kChunk); }

// The channel's first element.
template <class IO>
SNN_HD float shift_of(const LIFShape& s, const Norm& m, int64_t channel, const IO* __restrict__ x) {
  return to_state(x[Place(s, channel * m.period).x]);
}

template <class IO, int kVec, int kLanes>
SNN_HD void moments_thread(int thread, const Share<kVec>& share, const LIFShape& s, const Norm& m, int64_t runs,
                           const IO* __restrict__ x, double (&total)[2][kLanes]) {
  if (thread >= share.active) return;
  Item<kVec> item(share, thread);
  const Channels<kLanes> channels(m, item.neuron(share, m, 0));
  double shift[kLanes];
#pragma unroll
  for (int e = 0; e < kLanes; ++e) shift[e] = shift_of(s, m, channels.of[e], x);
  for (; item.at < share.end; item.next(share)) {
    const int64_t chunk = item.row < runs ? 0 : item.row / runs, t = chunk * kChunk;
    const IO* from = x + Place(s, item.neuron(share, m, item.row - chunk * runs)).x + t * s.x_step_stride;
    const int steps = s.steps - t < kChunk ? int(s.steps - t) : kChunk;
#pragma unroll 4
    for (int k = 0; k < steps; ++k) {
      const Pack<IO, kVec> pack = read<IO, kVec>(from + k * s.x_step_stride);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const int l = kLanes > 1 ? e : 0;
        const double d = double(to_state(pack.lane[e])) - shift[l];
        total[0][l] += d;
        total[1][l] = fma(d, d, total[1][l]);
      }
    }
  }
}

template <class IO, int kVec, int kLanes>
__global__ void __launch_bounds__(kMomentThreads, 2)
    moments_kernel(LIFShape s, Norm m, const IO* __restrict__ x, double* __restrict__ moments, int64_t parts,
                   int64_t rows, int64_t runs) {
  __shared__ double memory[Sum<kVec, kLanes>::kDoublesAThread * kMomentThreads];
  const Share<kVec> share(m, blockIdx.x, parts, rows, kMomentThreads);
  double total[2][kLanes] = {};
  moments_thread<IO, kVec, kLanes>(threadIdx.x, share, s, m, runs, x, total);
  Sum<kVec, kLanes>{share, memory}.all(total, m, moments);
  if (share.part > 0) return;
  for (int c = threadIdx.x; c < share.channels; c += kMomentThreads)
    moments[2 * parts * m.channels + share.first + c] = shift_of(s, m, share.first + c, x);
}

__global__ void __launch_bounds__(kChannelThreads)
    prepare_kernel(NormPlan p, const double* __restrict__ moments, const float* __restrict__ weight,
                   const float* __restrict__ bias, float* __restrict__ running_mean, float* __restrict__ running_var,
                   float* __restrict__ table) {
  const int64_t c = blockIdx.x * kChannelThreads + threadIdx.x;
  if (c < p.channels) prepare_channel(c, p, moments, weight, bias, running_mean, running_var, table);
}

__global__ void __launch_bounds__(kChannelThreads)
    gradients_kernel(NormPlan p, const float* __restrict__ table, const double* __restrict__ sums,
                     const double* __restrict__ all_sums, float* __restrict__ affine, float* __restrict__ pull_push) {
  const int64_t c = blockIdx.x * kChannelThreads + threadIdx.x;
  if (c < p.channels) gradients_channel(c, p, table, sums, all_sums, affine, pull_push);
}

template <class IO>
bool wide(const LIFShape& s, const Norm& m, const void* x) {
  constexpr int vec = 16 / sizeof(IO);
  return s.inner % vec == 0 && s.x_outer_stride % vec == 0 && s.x_step_stride % vec == 0 && aligned(x, 16) &&
         bands_fit(m, vec);
}

template <class IO, int kVec, int kLanes>
int launch(const LIFShape& s, const Norm& m, const IO* x, double* moments, cudaStream_t stream) {
  const int64_t parts = norm_parts_cuda(s, m);
  moments_kernel<IO, kVec, kLanes><<<unsigned(parts * bands(m)), kMomentThreads, 0, stream>>>(
      s, m, x, moments, parts, moment_rows(s, m), runs_of(s, m));
  return cudaGetLastError();
}

unsigned blocks(const NormPlan& p) { return unsigned((p.channels + kChannelThreads - 1) / kChannelThreads); }

}  // namespace

int64_t norm_parts_cuda(const LIFShape& s, const Norm& m) {
  if (s.outer * s.inner * s.steps == 0) return 1;
  const int64_t items = s.outer * s.inner * ((s.steps + kChunk - 1) / kChunk), most = items / kMomentThreads;
  const int64_t parts = ((most < kBlocks ? most : kBlocks) + bands(m) - 1) / bands(m);
  return parts < 1 ? 1 : parts < kMostParts ? parts : kMostParts;
}

int moments_cuda(const LIFShape& s, const Norm& m, const void* x, double* moments, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  if (s.outer * s.inner * s.steps == 0)
    return cudaMemsetAsync(moments, 0, (2 * norm_parts_cuda(s, m) + 1) * m.channels * sizeof(double), to);
  return with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    constexpr int vec = 16 / sizeof(IO);
    const auto* from = static_cast<const IO*>(x);
    if (!wide<IO>(s, m, x)) return launch<IO, 1, 1>(s, m, from, moments, to);
    return m.period % vec == 0 ? launch<IO, vec, 1>(s, m, from, moments, to)
                               : launch<IO, vec, vec>(s, m, from, moments, to);
  });
}

int prepare_cuda(const NormPlan& p, const double* moments, const NormParameters& a, void* table, void* stream) {
  if (p.dtype == DType::f64) return cudaErrorInvalidValue;
  if (p.channels == 0) return cudaSuccess;
  prepare_kernel<<<blocks(p), kChannelThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      p, moments, static_cast<const float*>(a.weight), static_cast<const float*>(a.bias),
      static_cast<float*>(a.running_mean), static_cast<float*>(a.running_var), static_cast<float*>(table));
  return cudaGetLastError();
}

int gradients_cuda(const NormPlan& p, const void* table, const double* sums, const double* all_sums, void* affine,
                   void* pull_push, void* stream) {
  if (p.dtype == DType::f64) return cudaErrorInvalidValue;
  if (p.channels == 0) return cudaSuccess;
  gradients_kernel<<<blocks(p), kChannelThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      p, static_cast<const float*>(table), sums, all_sums, static_cast<float*>(affine), static_cast<float*>(pull_push));
  return cudaGetLastError();
}

}  // namespace snnkern
