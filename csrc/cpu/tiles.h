// Neurons in tiles: how the CPU kernels walk over an [outer, steps, inner] tensor, and over the channels of its
// neurons.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "../lif.h"
#include "vector.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int kLanes = 1024;     // neurons in a tile
constexpr int kStaged = 256;     // neurons in a tile that is gathered
constexpr int kPitch = 272;      // from row to row of the stage: a power of two would put them all into a few sets
constexpr int64_t kNarrow = 32;  // inner dimensions below this are gathered into tiles

struct Tile {
  int64_t first;  // index of its first neuron in [outer * inner]
  int lanes;
  int64_t segment, begin, end;  // its steps
};

struct Tiling {
  int64_t row, per_row, per_segment, count, steps, segment_steps;
  int lanes;
  bool narrow;

  Tiling(const LIFShape& s, int threads)
      : steps(s.steps), segment_steps(s.segment_steps), narrow(s.outer > 1 && s.inner < kNarrow) {
    row = narrow ? s.outer * s.inner : s.inner;  // neurons that tiles may span
    const int64_t rows = narrow ? 1 : s.outer;
    const int64_t share = (row * rows * s.segments + threads - 1) / threads;  // every thread gets a tile
    lanes = int(std::clamp<int64_t>((share + 31) / 32 * 32, 32, narrow ? kStaged : kLanes));
    per_row = (row + lanes - 1) / lanes;
    per_segment = rows * per_row;
    count = s.segments * per_segment;
  }
  Tile operator[](int64_t i) const {
    const int64_t segment = i / per_segment, begin = segment * segment_steps;
    const int64_t at = i % per_row * lanes, in_segment = i % per_segment;
    return {in_segment / per_row * row + at, int(std::min<int64_t>(lanes, row - at)), segment, begin,
            std::min(begin + segment_steps, steps)};
  }
};

template <class IO>
struct Sequence {  // an [outer, steps, inner] tensor
  IO* data;
  int64_t outer_stride, step_stride, inner;

  IO* at(int64_t neuron, int64_t t) const {
    return data + neuron / inner * outer_stride + t * step_stride + neuron % inner;
  }
};

// Lane l of rows a and b, one below the other, after their blocks of d x d off the diagonal have changed places.
template <int d, bool second, class V, int... l>
inline V exchanged(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int width = sizeof...(l);
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (second ? (l & d ? width + l : l + d) : (l & d ? width + l - d : l))...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, LongV, IntV>;
  return __builtin_shuffle(a, b, Index{(second ? (l & d ? width + l : l + d) : (l & d ? width + l - d : l))...});
#endif
}

// Rows and columns change places.
template <int d = 1, class V, size_t width>
inline void transpose(V (&rows)[width]) {
  constexpr std::make_integer_sequence<int, width> lanes{};
#pragma GCC unroll 16
  for (size_t i = 0; i < width; ++i) {
    if (i & d) continue;
    const V a = rows[i], b = rows[i + d];
    rows[i] = exchanged<d, false>(a, b, lanes);
    rows[i + d] = exchanged<d, true>(a, b, lanes);
  }
  if constexpr (2 * d < width) transpose<2 * d>(rows);
}

// Calls `block` for a square of the tile and the stage that can be transposed in registers, `run` for a stretch of
// lanes that lie side by side: what gathering and scattering have in common. Neither is inlined, which would be once
// for every form of the neuron.
template <class V, class IO, class Block, class Run>
inline void by_neuron(const Sequence<IO>& in, Tile tile, int64_t t, int steps, Block&& block, Run&& run) {
  constexpr int width = sizeof(V) / sizeof(State<std::remove_const_t<IO>>);
  const bool time_last = in.inner == 1 && in.step_stride == 1 && steps == kChunk;
  for (int j = 0; j < tile.lanes;) {
    IO* at = in.at(tile.first + j, t);
    if (time_last && j + width <= tile.lanes) {
      for (int k = 0; k < kChunk; k += width) block(at + k, k, j);
      j += width;
    } else {
      const int length = int(std::min(in.inner - (tile.first + j) % in.inner, int64_t(tile.lanes - j)));
      run(at, j, length);
      j += length;
    }
  }
}
template <class IO, class S>
[[gnu::noinline]] void gather(const Sequence<const IO>& from, Tile tile, int64_t t, int steps, S* stage) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  by_neuron<V>(
      from, tile, t, steps,
      [&](const IO* x, int k, int j) {
        V rows[width];
        for (int l = 0; l < width; ++l) {
          rows[l] = load<V>(x + l * from.outer_stride);
          __builtin_prefetch(x + l * from.outer_stride + kChunk);
        }
        transpose(rows);
        for (int l = 0; l < width; ++l) store(stage + (k + l) * kPitch + j, rows[l], false);
      },
      [&](const IO* x, int j, int length) {
        for (int k = 0; k < steps; ++k) {
          const IO* row = x + k * from.step_stride;
          __builtin_prefetch(row + kChunk * from.step_stride);
          int l = 0;
          for (; l + width <= length; l += width) store(stage + k * kPitch + j + l, load<V>(row + l), false);
          for (; l < length; ++l) stage[k * kPitch + j + l] = load<S>(row + l);
        }
      });
}
template <class IO, class S>
[[gnu::noinline]] void scatter(const Sequence<IO>& to, Tile tile, int64_t t, int steps, const S* stage) {
  using V = typename VectorOf<S>::type;
  constexpr int width = sizeof(V) / sizeof(S);
  by_neuron<V>(
      to, tile, t, steps,
      [&](IO* y, int k, int j) {
        V rows[width];
        for (int l = 0; l < width; ++l) rows[l] = load<V>(stage + (k + l) * kPitch + j);
        transpose(rows);
        for (int l = 0; l < width; ++l) store(y + l * to.outer_stride, rows[l], false);
      },
      [&](IO* y, int j, int length) {
        for (int k = 0; k < steps; ++k) {
          IO* row = y + k * to.step_stride;
          int l = 0;
          for (; l + width <= length; l += width) store(row + l, load<V>(stage + k * kPitch + j + l), false);
          for (; l < length; ++l) store(row + l, stage[k * kPitch + j + l], false);
        }
      });
}

// Sums over channels are made in parts, ranges of tiles, which depend on nothing but the shape.
constexpr int kMostParts = 16;
inline int64_t parts_of(const LIFShape& s) { return std::min<int64_t>(kMostParts, Tiling(s, kMostParts).count); }

// Calls run(channel, lane, count) for stretches of a tile's lanes: of one channel each, or, where neighbours have
// different ones (period 1), of neighbouring channels.
template <class Of, class F>
inline void by_channel(const Of& n, const Tile& tile, F&& run) {
  const int64_t stretch = n.period == 1 ? n.channels : n.period;
  int64_t channel = tile.first / n.period % n.channels;
  int64_t left = stretch - (n.period == 1 ? channel : tile.first % n.period);  // of the first stretch
  for (int j = 0; j < tile.lanes; left = stretch) {
    const int count = int(std::min<int64_t>(left, tile.lanes - j));
    run(channel, j, count);
    j += count;
    if (n.period == 1 || ++channel == n.channels) channel = 0;
  }
}

// A row of numbers per channel, [channels], as one per lane; of a Norm's channels or a Parameter's.
template <class Of, class S>
void spread(const Of& n, const Tile& tile, const S* channels, S* lanes) {
  by_channel(n, tile, [&](int64_t c, int j, int count) {
    if (n.period == 1)
      std::copy_n(channels + c, count, lanes + j);
    else
      std::fill_n(lanes + j, count, channels[c]);
  });
}

// And back: adds the lanes' sums to those of their channels.
inline void fold(const Norm& n, const Tile& tile, const double* lanes, double* channels) {
  constexpr int width = sizeof(DoubleV) / sizeof(double);
  by_channel(n, tile, [&](int64_t c, int j, int count) {
    int l = 0;
    if (n.period == 1) {
      for (; l < count; ++l) channels[c + l] += lanes[j + l];
      return;
    }
    DoubleV totals{};
    for (; l + width <= count; l += width) totals += load<DoubleV>(lanes + j + l);
    double total = 0;
    for (int k = 0; k < width; ++k) total += totals[k];
    for (; l < count; ++l) total += lanes[j + l];
    channels[c] += total;
  });
}

}  // namespace
}  // namespace snnkern::SNN_ISA
