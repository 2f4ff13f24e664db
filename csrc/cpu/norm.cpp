// Batch norm's statistics on the CPU, compiled once per instruction set like lif.cpp. A part of the elements is a range
// of tiles; within a tile every lane has its own sums, in double, which are then folded into those of the channels.
#include "../norm.h"

#include "kernels.h"
#include "tiles.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int64_t kSerial = 32768;  // elements below which a second thread costs more than it brings

template <class S>
void accumulate(const S* __restrict__ row, const double* __restrict__ shift, double* __restrict__ totals,
                double* __restrict__ squares, int lanes) {
  for (int j = 0; j < lanes; ++j) {
    const double d = double(row[j]) - shift[j];
    totals[j] += d;
    squares[j] += d * d;
  }
}

template <class IO, class S = State<IO>>
void moments_of(const LIFShape& s, const Norm& n, const void* data, double* moments, int threads) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  const Tiling tiles(s, kMostParts);
  const int64_t parts = parts_of(s);
  const Sequence<const IO> x{static_cast<const IO*>(data), s.x_outer_stride, s.x_step_stride, s.inner};
  double* shifts = moments + 2 * parts * n.channels;
  for (int64_t c = 0; c < n.channels; ++c) shifts[c] = load<S>(x.at(c * n.period, 0));

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    double* to = moments + part * 2 * n.channels;
    std::fill_n(to, 2 * n.channels, 0.0);
    for (int64_t i = tiles.count * part / parts; i < tiles.count * (part + 1) / parts; ++i) {
      const Tile tile = tiles[i];
      alignas(64) double shift[kLanes], totals[kLanes] = {}, squares[kLanes] = {};
      alignas(64) S stage[kChunk * kPitch];
      spread(n, tile, shifts, shift);
      for (int64_t t = 0; t < s.steps; t += kChunk) {
        const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
        if (tiles.narrow) gather(x, tile, t, steps, stage);
        for (int k = 0; k < steps; ++k) {
          const S* row = stage;
          if (tiles.narrow) {
            row += k * kPitch;
          } else if constexpr (std::is_same_v<IO, S>) {
            row = x.at(tile.first, t + k);
          } else {
            const IO* from = x.at(tile.first, t + k);
            int j = 0;
            for (; j + width <= tile.lanes; j += width) store(stage + j, load<V>(from + j), false);
            for (; j < tile.lanes; ++j) stage[j] = load<S>(from + j);
          }
          accumulate(row, shift, totals, squares, tile.lanes);
        }
      }
      fold(n, tile, totals, to);
      fold(n, tile, squares, to + n.channels);
    }
  }
}

// Calls f with a number of the type of the state.
template <class F>
void with_state(DType dtype, F&& f) {
  dtype == DType::f64 ? f(double{}) : f(float{});
}

}  // namespace

int64_t norm_parts(const LIFShape& s) { return parts_of(s); }

void moments(const LIFShape& s, const Norm& n, const void* x, double* to, int threads) {
  if (s.outer * s.steps * s.inner < kSerial) threads = 1;
  with_dtype(s.dtype, [&](auto io) { moments_of<decltype(io)>(s, n, x, to, threads); });
}

void prepare(const NormPlan& p, const double* moments, const NormParameters& of, void* table) {
  with_state(p.dtype, [&](auto state) {
    using S = decltype(state);
    for (int64_t c = 0; c < p.channels; ++c)
      prepare_channel(c, p, moments, static_cast<const S*>(of.weight), static_cast<const S*>(of.bias),
                      static_cast<S*>(of.running_mean), static_cast<S*>(of.running_var), static_cast<S*>(table));
  });
}

void gradients(const NormPlan& p, const void* table, const double* sums, const double* all_sums, void* affine,
               void* pull_push) {
  with_state(p.dtype, [&](auto state) {
    using S = decltype(state);
    for (int64_t c = 0; c < p.channels; ++c)
      gradients_channel(c, p, static_cast<const S*>(table), sums, all_sums, static_cast<S*>(affine),
                        static_cast<S*>(pull_push));
  });
}

}  // namespace snnkern::SNN_ISA
