// How the threads of a grid share out the neurons of all channels, and how what they found is added up per channel, in
// an order that depends on nothing but the shape and the device.
//
// Neurons are [runs, channels, period]. A block owns a band of neighbouring channels, one or, where the period is
// short, as many as make a run of them long enough; and of the items of that band one of `parts` parts. An item is a
// pack of kWidth neurons in a row: rows are runs, or whatever the kernel puts in their place. A thread takes every
// `active`-th item, which is always in the same channels: kLanes = 1, one for all of its lanes, or kLanes = kWidth.
#pragma once
#include "../lif.h"
#include "memory.cuh"

namespace snnkern {

struct Bands {               // as in snnkern/backend/cuda/bn_lif.py
  int64_t channels, period;  // neuron n has channel n / period % channels
  int64_t width, parts;      // channels in a band, but for the last one; parts of a band
};

namespace {

// The channels of neuron n and the next ones, and what tables of them say.
template <int kLanes>
struct Channels {
  int64_t channels, period, first, place;  // place: of n in the period
  bool in_a_row;                           // one channel after the other, in packs

  __device__ __forceinline__ Channels(int64_t channels, int64_t period, int64_t n)
      : channels(channels), period(period), in_a_row(period == 1 && channels % kLanes == 0) {
    const int64_t all = quotient(n, period);
    first = all - quotient(all, channels) * channels;
    place = n - all * period;
  }
  // Calls use(lane, channel).
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) const {
    int64_t c = first, i = place;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      use(l, c);
      if (++i < period) continue;
      i = 0;
      if (++c == channels) c = 0;
    }
  }
  __device__ __forceinline__ void read(float (&to)[kLanes], const float* row) const {
    if (kLanes > 1 && in_a_row)
      load_state(to, row + first);
    else
      each([&](int l, int64_t c) { to[l] = row[c]; });
  }
};

// What a block does, and the way from a thread's item to its next one; in shared memory, to leave registers alone.
template <int kWidth>
struct Share {
  int64_t part, first, channels;  // the band: channels from `first` on
  int64_t packs;                  // of the band in a row
  int64_t begin, end;             // items
  int64_t run;                    // neurons from a row to the next
  int64_t on, packs_on, over;     // neurons and packs to a thread's next item; neurons more where a row ends
  int across, active;             // threads side by side that have different channels, and all that have work

  Share() = default;
  __device__ Share(const Bands& b, int64_t block, int64_t rows, int threads) {
    const int64_t bands = quotient(b.channels + b.width - 1, b.width);
    part = quotient(block, bands);
    first = (block - part * bands) * b.width;
    channels = first + b.width < b.channels ? b.width : b.channels - first;
    packs = channels * b.period / kWidth;
    across = channels == 1 ? 1 : int(packs);
    active = threads / across * across;
    const int64_t items = rows * packs, rounds = quotient(quotient(items + active - 1, active) + b.parts - 1, b.parts);
    begin = part * rounds * active;
    end = begin + rounds * active < items ? begin + rounds * active : items;
    run = b.channels * b.period;
    const int64_t rows_on = quotient(active, packs);
    packs_on = active - rows_on * packs;
    on = rows_on * run + packs_on * kWidth;
    over = run - packs * kWidth;
  }
};

template <int kWidth>
struct Item {
  int64_t neuron, pack;  // neuron: (row * channels + channel) * period + place in it
  int left;              // items from this one on

  __device__ __forceinline__ Item(const Share<kWidth>& s, const Bands& b) {
    const int64_t at = s.begin + threadIdx.x, row = quotient(at, s.packs);
    left = threadIdx.x < s.active && at < s.end ? int(quotient(s.end - at - 1, s.active)) + 1 : 0;
    pack = at - row * s.packs;
    neuron = row * s.run + s.first * b.period + pack * kWidth;
  }
  __device__ __forceinline__ void next(const Share<kWidth>& s) {
    --left;
    neuron += s.on;
    pack += s.packs_on;
    if (pack < s.packs) return;
    pack -= s.packs;
    neuron += s.over;
  }
};

// Adds up two numbers of all threads of a warp, for its first.
__device__ __forceinline__ void add_up_warp(double& one, double& two) {
#pragma unroll
  for (int far = 16; far > 0; far /= 2) {
    one += __shfl_down_sync(~0u, one, far);
    two += __shfl_down_sync(~0u, two, far);
  }
}

// Adds up two numbers of every thread and lane. In memory they are [2, kLanes, active / across rows, across]; rows are
// folded until one is left, then the columns of each channel are added one after the other. Between any two of these
// steps lies a barrier.
template <int kWidth, int kLanes>
struct Sum {
  static constexpr int kDoublesAThread = 2 * kLanes, kFold = 8;
  const Share<kWidth>& share;
  double* memory;

  // to: [parts, 2, channels]
  __device__ void all(const double (&found)[2][kLanes], const Bands& b, double* to) const {
    __syncthreads();  // the memory had another use
    if (threadIdx.x < share.active)
#pragma unroll
      for (int p = 0; p < kDoublesAThread; ++p) plane(p)[threadIdx.x] = found[p / kLanes][p % kLanes];
    for (int rows = share.active / share.across; rows > 1; rows = (rows + kFold - 1) / kFold) {
      __syncthreads();
      fold(rows * share.across, (rows + kFold - 1) / kFold * share.across);
    }
    __syncthreads();
    const int columns = share.across * kLanes / int(share.channels);
    for (int i = threadIdx.x; i < 2 * share.channels; i += blockDim.x) {
      const int k = i >= share.channels, c = i - k * int(share.channels);
      double total = 0;
      for (int q = c * columns; q < (c + 1) * columns; ++q) total += plane(k * kLanes + q % kLanes)[q / kLanes];
      to[(2 * share.part + k) * b.channels + share.first + c] = total;
    }
  }

 private:
  __device__ __forceinline__ double* plane(int p) const { return memory + p * share.active; }
  __device__ __forceinline__ void fold(int size, int stay) const {
    for (int i = threadIdx.x; i < kDoublesAThread * stay; i += blockDim.x) {
      const int p = i / stay, from = i - p * stay;
      double total = plane(p)[from];
      for (int j = from + stay; j < size; j += stay) total += plane(p)[j];
      plane(p)[from] = total;
    }
  }
};

}  // namespace
}  // namespace snnkern
