// Batch norm before the neurons: its statistics and its gradients, per channel, from sums over the channel's elements.
//
//   forward    moments -> prepare: the table, running statistics -> lif_forward
//   backward   sums of gradients -> gradients: those of weight and bias, pull and push -> lif_backward
//
// Sums are in double, each over a part of the elements that depends on nothing but the shape (and on the GPU), and the
// parts are added up in their order: the same bits from run to run and for any number of threads. Another backend, with
// other parts, comes within 1e-15 of the same sums, and the table, which is rounded to the state's dtype, is the same
// but for one channel in some ten million: so spikes are bit-identical here too, nearly always.
#pragma once
#include "lif.h"

namespace snnkern {

struct NormPlan {
  DType dtype;  // of x
  int64_t channels, parts;
  double count;     // elements in a channel, of all processes
  double unbiased;  // the variance times this is the unbiased one
  double momentum;  // weight of the new statistics in the running ones
  double eps;
  double gain;  // a constant beside weight
};

struct NormParameters {              // [channels] in the dtype of the state
  const void *weight, *bias;         // null: 1 and 0
  void *running_mean, *running_var;  // null: none are kept (in training)
};

// The rows of the table, [5, channels].
enum NormRow { kMean, kScale, kOffset, kInverseDeviation, kMeanRest, kNormRows };

struct Totals {
  double one, two;
};

// Both sums of channel c over parts, [parts, 2, channels], in their order: those from `first` on, every `by`-th.
SNN_HOST_DEVICE Totals add_up(int64_t c, const NormPlan& p, const double* parts, int first = 0, int by = 1) {
  Totals of{0, 0};
  for (int64_t i = first; i < p.parts; i += by) {
    of.one += parts[2 * i * p.channels + c];
    of.two += parts[(2 * i + 1) * p.channels + c];
  }
  return of;
}

// moments, [2 * parts + 1, channels]: per part the sums of x - shift and of its square; in the last row the shift, the
// channel's first element, which saves the digits of a small variance about a large mean; `sums` are those of all
// parts. Null: the table is made of the running statistics, and these stay as they are.
//
// The mean is rounded to the dtype of the state, so that x - mean is exact where it is small; offset gives back what
// that takes away.
template <class S>
SNN_HOST_DEVICE void prepare_channel(int64_t c, const NormPlan& p, const double* moments, Totals sums, const S* weight,
                                     const S* bias, S* running_mean, S* running_var, S* table) {
  double mean, var;
  if (moments) {
    const double from_shift = sums.one / p.count;
    mean = moments[2 * p.parts * p.channels + c] + from_shift;
    var = sums.two / p.count - from_shift * from_shift;
    var = var < 0 ? 0 : var;  // a NaN stays one
    if (running_mean) {
      running_mean[c] = S((1 - p.momentum) * running_mean[c] + p.momentum * mean);
      running_var[c] = S((1 - p.momentum) * running_var[c] + p.momentum * (var * p.unbiased));
    }
  } else {
    mean = running_mean[c];
    var = running_var[c];
  }
  const double inverse_deviation = 1 / sqrt(var + p.eps);
  const S scale = S((weight ? double(weight[c]) : 1.0) * p.gain * inverse_deviation);
  table[kMean * p.channels + c] = S(mean);
  table[kScale * p.channels + c] = scale;
  table[kOffset * p.channels + c] = S((bias ? double(bias[c]) : 0.0) + (double(S(mean)) - mean) * double(scale));
  table[kInverseDeviation * p.channels + c] = S(inverse_deviation);
  table[kMeanRest * p.channels + c] = S(mean - double(S(mean)));
}

// sums: those of g and of g * (x - mean). all_sums, [2, channels]: those of all
// processes; null: there is only this one. affine, [2, channels]: the gradients of weight and bias, from this process.
// pull_push, [2, channels], is null if the statistics were the running ones.
template <class S>
SNN_HOST_DEVICE void gradients_channel(int64_t c, const NormPlan& p, const S* table, Totals sums,
                                       const double* all_sums, S* affine, S* pull_push) {
  const double scale = table[kScale * p.channels + c], inverse_deviation = table[kInverseDeviation * p.channels + c];
  const double rest = table[kMeanRest * p.channels + c];
  double total = sums.one, moment = sums.two;
  affine[c] = S((moment - rest * total) * inverse_deviation * p.gain);
  affine[p.channels + c] = S(total);
  if (!pull_push) return;
  if (all_sums) {
    total = all_sums[c];
    moment = all_sums[p.channels + c];
  }
  const double push = scale * inverse_deviation * inverse_deviation * (moment - rest * total) / p.count;
  pull_push[c] = S(scale * total / p.count - rest * push);
  pull_push[p.channels + c] = S(push);
}

// On the CPU both sums have as many parts.
int64_t norm_parts_cpu(const LIFShape&);
void moments_cpu(const LIFShape&, const Norm&, const void* x, double* moments, int threads);
void prepare_cpu(const NormPlan&, const double* moments, const NormParameters&, void* table);
void sums_cpu(const LIFSpec&, const LIFShape&, const LIFBackward&, double* sums, int threads);
void gradients_cpu(const NormPlan&, const void* table, const double* sums, const double* all_sums, void* affine,
                   void* pull_push);
// All of backward in one, with a.scratch for norm_kept_cpu numbers in the dtype of the state; not where that is 0. The
// plan has one part; sums, [2, channels], and a.pull_push are filled.
int64_t norm_kept_cpu(const LIFShape&, const Norm&, int threads);
void norm_backward_cpu(const LIFSpec&, const LIFShape&, const LIFBackward& a, const NormPlan&, double* sums,
                       void* affine, int threads);

}  // namespace snnkern
