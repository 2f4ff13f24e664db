// The fused LIF over time: what every backend's launcher takes. Plain pointers and sizes, no framework.
#pragma once
#include "standard.h"

namespace snnkern {

enum class DType : int { f32, f64, f16, bf16 };  // of x, spikes and their gradients; the state is f64 for f64, else f32
enum class Leak : int { decay, tau_input, tau, tau_input_inverse, tau_inverse };  // the last two: see neuron.h
enum class Surrogate : int;

// Forward keeps v at the start of every chunk but the first; backward recomputes each chunk from there.
constexpr int kChunk = 16;

struct LIFSpec {
  Leak form;
  double leak;  // decay or tau
  double threshold;
  bool fire_at_threshold;
  bool hard;
  double reset;    // read if hard
  double v_start;  // where the state starts when no v is given
  bool detach_reset;
  bool ternary;
  bool bounded;
  double v_min;  // read if bounded
  Surrogate surrogate;
  double constants[3];
  bool synaptic;
  double synapse_decay;  // read if synaptic
  bool adaptive;
  double threshold_decay, threshold_jump;  // read if adaptive

  int states() const { return 1 + synaptic + adaptive; }
};

// x is [outer, steps, inner] with the given strides and a contiguous inner dimension; every other tensor is contiguous:
// residual, grad_x, grad_residual [outer, steps, inner]; spikes, grad_spikes [outer, steps_out, inner]; v, v_last and
// their gradients [states, outer, inner]; saved [(steps - 1) / kChunk, states, outer, inner]. The states of a neuron
// are its potential, its synaptic current if it has one and its adaptation if it has one; time is then one segment.
//
// With steps_out < steps, spikes are summed over groups of neighbouring steps (ttm.h) as they are made.
//
// Time may be split into segments that run in parallel: segment p has the steps from p * segment_steps on, a multiple
// of kChunk. How a backend makes the parts equal the whole is said in its file; `scratch`, [2, segments, outer, inner]
// in the dtype of the state, is for that, and null if there is one segment.
struct LIFShape {
  DType dtype;
  int64_t outer, steps, inner;
  int64_t x_outer_stride, x_step_stride;
  int64_t steps_out;
  int64_t segments, segment_steps, warmup;  // warmup, a multiple of kChunk: see snnkern/spec/split.py

  SNN_HOST_DEVICE bool grouped() const { return steps_out < steps; }
};

// Group i of k over l steps starts at i*l/k, rounded, half down; and the group that step t is in.
SNN_HOST_DEVICE int64_t group_start(int64_t i, int64_t l, int64_t k) { return (2 * i * l + k - 1) / (2 * k); }
SNN_HOST_DEVICE int64_t group_of(int64_t t, int64_t l, int64_t k) { return (2 * t + 1) * k / (2 * l); }

// Batch norm before the neurons, which then receive (x - mean) * scale + offset, and the residual if there is one.
// Neuron n of [outer * inner] has channel n / period % channels. See norm.h.
struct Norm {
  int64_t channels, period;
  const void* table;     // [5, channels] in the dtype of the state; null: no norm
  const void* residual;  // null: none
};

// A leak or a threshold that is a tensor: neuron n of [outer * inner] has number n / period % channels.
struct Parameter {
  const void* data;  // [channels] in the dtype of the state; null: that of the spec
  int64_t channels, period;
};

// What only some neurons have. Null: there is none; of gradients, zero where it is read, not wanted where it is
// written.
struct More {
  Parameter leak, threshold, bias;   // the neurons receive x + bias
  const void* fire_above;            // as the threshold's data: a neuron fires where h > fire_above
  const void* table;                 // [cells, 2] in the dtype of the state: surrogate.h's Table
  void* v_seq;                       // [outer, steps, inner] in the dtype of the state: the potential after every step
  const void* grad_v_seq;            // its gradient
  void *grad_leak, *grad_threshold;  // [outer, inner] in the dtype of the state: see neuron.h
  void* grad_bias;                   // [segments, outer, inner]: the sum of grad_x over time, before it is rounded
};

// Spikes that come back: neurons are layers of `size` in a row, in each of which neuron k receives, besides its x +
// bias and after it, the sum of weight[k][j] * s[j] over the neurons j of its layer with a spike at the step before,
// one after the other in ascending j from 0. The number of layers is outer * inner / size, and inner a multiple of
// size.
struct Recurrence {
  int64_t size;
  const void* weight;    // [size, size] in the dtype of the state
  const void* outgoing;  // its transpose: row j is what neuron j sends
  const void* s;         // [outer, inner], as spikes: those before the first step; null: none
  const void* spikes;    // backward: forward's
  void* grad_s;          // backward: [outer, inner] in the dtype of the state; null: not wanted
};

struct LIFForward {
  const void* x;
  const void* v;  // null: start from v_start
  void* spikes;
  void* v_last;  // null: nobody looks
  void* saved;   // null: inference, nothing is kept
  void* scratch;
  Norm norm;
  More more;
};

struct LIFBackward {
  const void* x;
  const void* v;            // null: started from v_start
  const void* saved;        // null if steps <= kChunk
  const void* grad_spikes;  // null: zero
  const void* grad_v_last;  // null: zero
  void* grad_x;
  void* grad_v;  // null: not wanted
  void* scratch;
  Norm norm;
  // With a norm, and g the gradient of what the neurons receive: grad_x = scale * g - (pull + (x - mean) * push).
  void* pull_push;      // [2, channels] in the dtype of the state; null: zero. norm_backward fills it
  void* grad_residual;  // g; null: not wanted
  More more;
};

void lif_forward_cpu(const LIFSpec&, const LIFShape&, const LIFForward&, int threads);
void lif_backward_cpu(const LIFSpec&, const LIFShape&, const LIFBackward&, int threads);
void recurrent_forward_cpu(const LIFSpec&, const LIFShape&, const LIFForward&, const Recurrence&, int threads);
void recurrent_backward_cpu(const LIFSpec&, const LIFShape&, const LIFBackward&, const Recurrence&, int threads);
// grad: the gradient of the weight, transposed, in the dtype of the state, from grad_x of recurrent_backward.
void recurrent_weight_cpu(const LIFSpec&, const LIFShape&, const Recurrence&, const void* grad_x, void* grad,
                          int threads);
const char* cpu_isa();

}  // namespace snnkern
