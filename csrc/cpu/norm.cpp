// Batch norm's statistics on the CPU, compiled once per instruction set like lif.cpp. A part of the elements is a range
// of tiles; within a tile every lane has its own sums, in double, which are then folded into those of the channels.
#include "../norm.h"

#include "kernels.h"
#include "threads.h"
#include "tiles.h"

namespace snnkern::SNN_ISA {
namespace {

constexpr int64_t kSerial = 32768;  // elements below which a second thread costs more than it brings

template <class S>
inline DoubleV widened(const S* from) {
  typedef S Narrow __attribute__((vector_size(kVectorBytes / sizeof(double) * sizeof(S))));
  Narrow v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, DoubleV);
}

// Sums over steps, in registers, of x - shift and of its square, added to those of each lane.
template <class S>
void accumulate(const S* rows, int64_t stride, int steps, const double* shift, double* totals, double* squares,
                int lanes) {
  constexpr int width = sizeof(DoubleV) / sizeof(double), many = 4;
  const auto block = [&](int j, auto vector, auto count, auto&& at) __attribute__((always_inline)) {
    using W = decltype(vector);
    constexpr int one = sizeof(W) / sizeof(double);
    W total[count()], square[count()];
    for (int i = 0; i < count(); ++i) {
      total[i] = load<W>(totals + j + i * one);
      square[i] = load<W>(squares + j + i * one);
    }
    for (int k = 0; k < steps; ++k) {
      for (int i = 0; i < count(); ++i) {
        const W d = at(rows + k * stride + j + i * one) - load<W>(shift + j + i * one);
        total[i] += d;
        square[i] += d * d;
      }
    }
    for (int i = 0; i < count(); ++i) {
      store(totals + j + i * one, total[i], false);
      store(squares + j + i * one, square[i], false);
    }
  };
  int j = 0;
  for (; j + many * width <= lanes; j += many * width)
    block(j, DoubleV{}, std::integral_constant<int, many>{}, [](const S* from) { return widened(from); });
  for (; j < lanes; ++j)
    block(j, double{}, std::integral_constant<int, 1>{}, [](const S* from) { return double(*from); });
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

  parallel_for(parts, threads, [&](int64_t part) {
    double* to = moments + part * 2 * n.channels;
    std::fill_n(to, 2 * n.channels, 0.0);
    for (int64_t i = tiles.count * part / parts; i < tiles.count * (part + 1) / parts; ++i) {
      const Tile tile = tiles[i];
      alignas(64) double shift[kLanes], totals[kLanes] = {}, squares[kLanes] = {};
      alignas(64) S stage[kChunk * kPitch];
      spread(n, tile, shifts, shift);
      for (int64_t t = 0; t < s.steps; t += kChunk) {
        const int steps = int(std::min<int64_t>(kChunk, s.steps - t));
        if (tiles.narrow) {
          gather(x, tile, t, steps, stage);
          accumulate(stage, kPitch, steps, shift, totals, squares, tile.lanes);
        } else if constexpr (std::is_same_v<IO, S>) {
          accumulate(x.at(tile.first, t), s.x_step_stride, steps, shift, totals, squares, tile.lanes);
        } else {
          for (int from = 0; from < tile.lanes; from += kStaged) {
            const int lanes = std::min(kStaged, tile.lanes - from);
            for (int k = 0; k < steps; ++k) {
              const IO* row = x.at(tile.first + from, t + k);
              int j = 0;
              for (; j + width <= lanes; j += width) store(stage + k * kPitch + j, load<V>(row + j), false);
              for (; j < lanes; ++j) stage[k * kPitch + j] = load<S>(row + j);
            }
            accumulate(stage, kPitch, steps, shift + from, totals + from, squares + from, lanes);
          }
        }
      }
      fold(n, tile, totals, to);
      fold(n, tile, squares, to + n.channels);
    }
  });
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
      prepare_channel(c, p, moments, add_up(c, p, moments), static_cast<const S*>(of.weight),
                      static_cast<const S*>(of.bias), static_cast<S*>(of.running_mean), static_cast<S*>(of.running_var),
                      static_cast<S*>(table));
  });
}

void gradients(const NormPlan& p, const void* table, const double* sums, const double* all_sums, void* affine,
               void* pull_push) {
  with_state(p.dtype, [&](auto state) {
    using S = decltype(state);
    for (int64_t c = 0; c < p.channels; ++c)
      gradients_channel(c, p, static_cast<const S*>(table), add_up(c, p, sums), all_sums, static_cast<S*>(affine),
                        static_cast<S*>(pull_push));
  });
}

}  // namespace snnkern::SNN_ISA
