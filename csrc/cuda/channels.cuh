// How the threads of a grid share out the neurons of all channels, and how what they found is added up per channel, in
// an order that depends on the shape alone.
//
// Neurons are [runs, channels, period]. A block owns a band of neighbouring channels, one or, where the period is
// short, so many that one run of them is about kBand neurons; and of the items of that band one of `parts` parts. An
// item is a pack of kVec neurons in a row: rows are runs, or whatever the kernel puts in their place. A thread takes
// every `active`-th item, which is always in the same channels: kLanes = 1, one for all of its lanes, or kLanes = kVec.
#pragma once
#include "../lif.h"
#include "memory.cuh"

namespace snnkern {
namespace {

constexpr int kBand = 64;

SNN_HOST_DEVICE int64_t channels_a_band(const Norm& m) { return m.period < kBand ? kBand / m.period : 1; }
SNN_HOST_DEVICE int64_t bands(const Norm& m) { return (m.channels + channels_a_band(m) - 1) / channels_a_band(m); }

SNN_HOST_DEVICE int64_t runs_of(const LIFShape& s, const Norm& m) {
  return s.outer * s.inner / (m.channels * m.period);
}

template <int kLanes>
struct Channels {  // of neuron n and the next ones
  int64_t of[kLanes];

  SNN_HD Channels(const Norm& m, int64_t n) {
    const int64_t run = n / m.period;
    int64_t c = run % m.channels, i = n - run * m.period;
#pragma unroll
    for (int e = 0; e < kLanes; ++e) {
      of[e] = c;
      if (++i < m.period) continue;
      i = 0;
      if (++c == m.channels) c = 0;
    }
  }
};

template <int kVec>
struct Share {
  int64_t part, first, channels;  // the band: channels from `first` on
  int64_t packs;                  // of the band in a row
  int64_t begin, end;             // items
  int across, active;             // threads side by side that have different channels, and all that have work

  SNN_HD Share(const Norm& m, int64_t block, int64_t parts, int64_t rows, int threads) {
    const int64_t width = channels_a_band(m), n = bands(m);
    part = block / n;
    first = (block - part * n) * width;
    channels = first + width < m.channels ? width : m.channels - first;
    packs = channels * m.period / kVec;
    across = channels == 1 ? 1 : int(packs);
    active = threads / across * across;
    const int64_t items = rows * packs, rounds = ((items + active - 1) / active + parts - 1) / parts;
    begin = part * rounds * active;
    end = begin + rounds * active < items ? begin + rounds * active : items;
  }
};

template <int kVec>
struct Item {
  int64_t at, row, pack;
  int64_t rows_on, packs_on;

  SNN_HD Item(const Share<kVec>& s, int thread) : at(s.begin + thread) {
    row = at / s.packs;
    pack = at - row * s.packs;
    rows_on = s.active / s.packs;
    packs_on = s.active - rows_on * s.packs;
  }
  SNN_HD void next(const Share<kVec>& s) {
    at += s.active;
    row += rows_on;
    pack += packs_on;
    if (pack < s.packs) return;
    pack -= s.packs;
    ++row;
  }
  SNN_HD int64_t neuron(const Share<kVec>& s, const Norm& m, int64_t run) const {
    return (run * m.channels + s.first) * m.period + pack * kVec;
  }
};

// Adds up two numbers of every thread and lane: [2, active / across rows, across * kLanes columns], halving the rows
// until one is left, then the columns of each channel one after the other. Between any two of these steps lies a
// barrier.
template <int kVec, int kLanes>
struct Sum {
  const Share<kVec>& share;
  double* memory;

  static constexpr int kDoublesAThread = 2 * kLanes;
  SNN_HD int size() const { return share.active * kLanes; }
  SNN_HD int rows() const { return share.active / share.across; }

  SNN_HD void put(int thread, const double (&found)[2][kLanes]) const {
    if (thread >= share.active) return;
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int e = 0; e < kLanes; ++e) memory[k * size() + thread * kLanes + e] = found[k][e];
  }
  SNN_HD void halve(int thread, int threads, int rows) const {
    const int columns = share.across * kLanes, stay = (rows + 1) / 2 * columns;
    for (int i = thread; i < rows * columns - stay; i += threads) {
      memory[i] += memory[stay + i];
      memory[size() + i] += memory[size() + stay + i];
    }
  }
  // to: [parts, 2, channels]
  SNN_HD void finish(int thread, int threads, const Norm& m, double* to) const {
    const int columns = share.across * kLanes / int(share.channels);
    for (int c = thread; c < share.channels; c += threads)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        double total = 0;
        for (int i = 0; i < columns; ++i) total += memory[k * size() + c * columns + i];
        to[(2 * share.part + k) * m.channels + share.first + c] = total;
      }
  }

  __device__ void all(const double (&found)[2][kLanes], const Norm& m, double* to) const {
    __syncthreads();  // the memory had another use
    put(threadIdx.x, found);
    for (int left = rows(); left > 1; left = (left + 1) / 2) {
      __syncthreads();
      halve(threadIdx.x, blockDim.x, left);
    }
    __syncthreads();
    finish(threadIdx.x, blockDim.x, m, to);
  }
};

// Packs of vec neurons never leave a band or a run.
bool bands_fit(const Norm& m, int vec) {
  return channels_a_band(m) * m.period % vec == 0 && m.channels * m.period % vec == 0;
}

}  // namespace
}  // namespace snnkern
