// The fused LIF over time: what every backend's launcher takes. Plain pointers and sizes, no framework.
#pragma once
#include <cstdint>

namespace snnkern {

enum class DType : int { f32, f64, f16, bf16 };  // of x, spikes and their gradients; the state is f64 for f64, else f32
enum class Leak : int { decay, tau_input, tau };
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
  Surrogate surrogate;
  double constants[3];
};

// x is [outer, steps, inner] with the given strides and a contiguous inner dimension; every other tensor is contiguous:
// spikes, grad_spikes, grad_x [outer, steps, inner]; v, v_last and their gradients [outer, inner];
// saved [(steps - 1) / kChunk, outer, inner].
//
// Time may be split into segments that run in parallel: segment p has the steps from p * segment_steps on, a multiple
// of kChunk. How a backend makes the parts equal the whole is said in its file; `scratch`, [2, segments, outer, inner]
// in the dtype of the state, is for that, and null if there is one segment.
struct LIFShape {
  DType dtype;
  int64_t outer, steps, inner;
  int64_t x_outer_stride, x_step_stride;
  int64_t segments, segment_steps, warmup;  // warmup, a multiple of kChunk: see snnkern/ops/split.py
};

struct LIFForward {
  const void* x;
  const void* v;  // null: start from v_start
  void* spikes;
  void* v_last;
  void* saved;  // null: inference, nothing is kept
  void* scratch;
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
};

void lif_forward_cpu(const LIFSpec&, const LIFShape&, const LIFForward&, int threads);
void lif_backward_cpu(const LIFSpec&, const LIFShape&, const LIFBackward&, int threads);
const char* cpu_isa();

// Return a cudaError_t; launch on `stream` of the current device and do not wait.
int lif_forward_cuda(const LIFSpec&, const LIFShape&, const LIFForward&, void* stream);
int lif_backward_cuda(const LIFSpec&, const LIFShape&, const LIFBackward&, void* stream);
const char* cuda_error_string(int status);

}  // namespace snnkern
