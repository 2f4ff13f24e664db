// The LIF on CUDA devices. A thread owns kVec neighbouring neurons, 16 bytes of x where alignment allows, for all T
// steps:
//   forward    v in registers; loads run kGroup steps ahead of their use
//   backward   per chunk of kChunk steps, last to first: recompute h into the thread's own column of shared memory,
//              then walk back over it; the other pass's first loads are in flight while one pass runs
// Form, reset and surrogate are run-time switches, the same for every thread: memory traffic hides them, and a dozen
// kernels compile where templates would make hundreds.
//
// Where neurons are few, a thread owns one and loads further ahead, and time may be split into segments, blockIdx.y:
//   forward    a segment warms up on the steps before it, without output, and notes the state from which it then starts
//              and with which it ends; a second kernel, a thread per neuron, compares these bit for bit and runs again
//              what differs. Spikes are those of the serial loop.
//   backward   given h, a segment maps the gradient of its last state to that of its first by gain * g + carry; a first
//              kernel finds gain and carry of every segment, then each segment composes those after it. Compared with
//              the serial loop only the order of rounding changes.
//
// With a norm, or where spikes are summed over groups of steps, time is not split, and the kernels are others, so that
// the plain ones keep their registers:
//   forward    parameters of the thread's channel (or of each lane's) in registers; what the neurons receive never
//              leaves them
//   sums       the backward of every neuron of a channel, part by part (channels.cuh), of which only two sums are kept
//   backward   as above, with x in the column too, to write the gradient of x
#include "lif.cuh"

namespace snnkern {
namespace {

constexpr int kForwardThreads = 128;
template <int kVec, int kLanes>
constexpr int kBackwardThreads = kVec == 1 || (kVec == 4 && kLanes == 0) ? 128 : 64;  // up to 32 KiB of shared memory
// The backward of a norm holds too much for 8 neurons a thread: it takes 8 bytes of 16-bit numbers.
constexpr int kNormBackwardVec = 4;

__device__ int64_t this_thread() { return blockIdx.x * int64_t(blockDim.x) + threadIdx.x; }

template <class IO, int kVec, int kLanes>
__global__ void __launch_bounds__(kForwardThreads, kLanes == 8 ? 3 : 4)
    lif_forward_kernel(Neuron<float> n, LIFShape s, Norm m, const IO* __restrict__ x, const IO* __restrict__ residual,
                       const float* __restrict__ v0, IO* __restrict__ spikes, float* __restrict__ v_last,
                       float* __restrict__ saved, float* __restrict__ scratch) {
  forward_thread<IO, kVec, kLanes>(this_thread(), blockIdx.y, n, s, m, x, residual, v0, spikes, v_last, saved, scratch);
}

template <class IO>
__global__ void __launch_bounds__(kForwardThreads, 4)
    lif_repair_kernel(Neuron<float> n, LIFShape s, const IO* __restrict__ x, IO* __restrict__ spikes,
                      float* __restrict__ v_last, float* __restrict__ saved, float* __restrict__ scratch) {
  repair_thread<IO>(this_thread(), n, s, x, spikes, v_last, saved, scratch);
}

// Columns of a block: no barrier, a thread reads what it wrote. Short sequences take no more than they need.
template <class IO, int kVec, int kLanes>
constexpr size_t column_bytes(int64_t steps) {
  const size_t step = sizeof(Pack<float, kVec>) + (kLanes > 0 ? sizeof(Pack<IO, kVec>) : 0);
  return (steps < kChunk ? steps : kChunk) * kBackwardThreads<kVec, kLanes> * step;
}

extern __shared__ __align__(16) char shared_memory[];

template <class IO, int kVec, int kLanes>
__device__ Column<IO, kVec> this_column(const LIFShape& s) {
  constexpr int threads = kBackwardThreads<kVec, kLanes>;
  auto* h = reinterpret_cast<Pack<float, kVec>*>(shared_memory);
  auto* x = reinterpret_cast<Pack<IO, kVec>*>(h + (s.steps < kChunk ? int(s.steps) : kChunk) * threads);
  return {h + threadIdx.x, x + threadIdx.x, threads};
}

template <class IO, int kVec, int kLanes, bool kMap>
__global__ void __launch_bounds__(kBackwardThreads<kVec, kLanes>, 2)
    lif_backward_kernel(Neuron<float> n, LIFShape s, Norm m, const IO* __restrict__ x, const IO* __restrict__ residual,
                        const float* __restrict__ v0, const float* __restrict__ saved,
                        const IO* __restrict__ grad_spikes, const float* __restrict__ grad_v_last,
                        const float* __restrict__ pull_push, IO* __restrict__ grad_x, IO* __restrict__ grad_residual,
                        float* __restrict__ grad_v0, float* __restrict__ scratch) {
  backward_thread<IO, kVec, kLanes, kMap>(this_thread(), blockIdx.y + int(kMap), this_column<IO, kVec, kLanes>(s), n, s,
                                          m, x, residual, v0, saved, grad_spikes, grad_v_last, pull_push, grad_x,
                                          grad_residual, grad_v0, scratch);
}

template <class IO, int kVec, int kLanes>
__global__ void __launch_bounds__(kBackwardThreads<kVec, kLanes>, 2)
    lif_sums_kernel(Neuron<float> n, LIFShape s, Norm m, const IO* __restrict__ x, const IO* __restrict__ residual,
                    const float* __restrict__ v0, const float* __restrict__ saved, const IO* __restrict__ grad_spikes,
                    const float* __restrict__ grad_v_last, double* __restrict__ sums, int64_t parts, int64_t runs) {
  const Share<kVec> share(m, blockIdx.x, parts, runs, blockDim.x);
  double total[2][kLanes] = {};
  sums_thread<IO, kVec, kLanes>(threadIdx.x, share, this_column<IO, kVec, kLanes>(s), n, s, m, x, residual, v0, saved,
                                grad_spikes, grad_v_last, total);
  Sum<kVec, kLanes>{share, reinterpret_cast<double*>(shared_memory)}.all(total, m, sums);
}

// Whether rows start aligned, so that a thread can own `vec` neurons.
bool fits(const LIFShape& s, int vec, std::initializer_list<const void*> pointers) {
  bool ok = s.segments == 1 && s.inner % vec == 0 && s.x_outer_stride % vec == 0 && s.x_step_stride % vec == 0;
  for (const void* p : pointers) ok = ok && aligned(p, 16);
  return ok;
}
// And whether enough such threads remain to fill the device; else one neuron each.
bool wide(const LIFShape& s, int vec, std::initializer_list<const void*> pointers) {
  if (!fits(s, vec, pointers)) return false;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return s.outer * s.inner / vec >= int64_t(processors) * 512;
}

template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;

// Both call f with kVec and kLanes; wide(kVec) says whether kVec may be more than 1.
template <int kVec, class Wide, class F>
int with_norm(const Norm& m, Wide&& wide, F&& f) {
  if (!wide(kVec)) return f(Constant<1>{}, Constant<1>{});
  return !m.table || m.period % kVec == 0 ? f(Constant<kVec>{}, Constant<1>{}) : f(Constant<kVec>{}, Constant<kVec>{});
}
template <int kVec, int kNormVec, class Wide, class F>
int with_widths(const LIFShape& s, const Norm& m, Wide&& wide, F&& f) {
  if (m.table || s.grouped()) return with_norm<kNormVec>(m, wide, f);
  return wide(kVec) ? f(Constant<kVec>{}, Constant<0>{}) : f(Constant<1>{}, Constant<0>{});
}

dim3 grid(const LIFShape& s, int vec, int threads, int64_t segments) {
  return {unsigned((s.outer * s.inner / vec + threads - 1) / threads), unsigned(segments), 1};
}

template <class IO, int kVec, int kLanes>
int launch_forward(const LIFSpec& p, const LIFShape& s, const LIFForward& a, cudaStream_t stream) {
  const auto* x = static_cast<const IO*>(a.x);
  auto* spikes = static_cast<IO*>(a.spikes);
  auto *v_last = static_cast<float*>(a.v_last), *saved = static_cast<float*>(a.saved);
  auto* scratch = static_cast<float*>(a.scratch);
  lif_forward_kernel<IO, kVec, kLanes><<<grid(s, kVec, kForwardThreads, s.segments), kForwardThreads, 0, stream>>>(
      Neuron<float>(p), s, a.norm, x, static_cast<const IO*>(a.norm.residual), static_cast<const float*>(a.v), spikes,
      v_last, saved, scratch);
  if (s.segments > 1)
    lif_repair_kernel<IO><<<grid(s, 1, kForwardThreads, 1), kForwardThreads, 0, stream>>>(
        Neuron<float>(p), s, x, spikes, v_last, saved, scratch);
  return cudaGetLastError();
}

template <class IO, int kVec, int kLanes, bool kMap = false>
int launch_backward(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, cudaStream_t stream) {
  constexpr int threads = kBackwardThreads<kVec, kLanes>;
  if constexpr (kVec == 1 && kLanes == 0 && !kMap)
    if (s.segments > 1) launch_backward<IO, 1, 0, true>(p, s, a, stream);
  lif_backward_kernel<IO, kVec, kLanes, kMap>
      <<<grid(s, kVec, threads, s.segments - int(kMap)), threads, column_bytes<IO, kVec, kLanes>(s.steps), stream>>>(
          Neuron<float>(p), s, a.norm, static_cast<const IO*>(a.x), static_cast<const IO*>(a.norm.residual),
          static_cast<const float*>(a.v), static_cast<const float*>(a.saved), static_cast<const IO*>(a.grad_spikes),
          static_cast<const float*>(a.grad_v_last), static_cast<const float*>(a.pull_push), static_cast<IO*>(a.grad_x),
          static_cast<IO*>(a.grad_residual), static_cast<float*>(a.grad_v), static_cast<float*>(a.scratch));
  return cudaGetLastError();
}

template <class IO, int kVec, int kLanes>
int launch_sums(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* sums, cudaStream_t stream) {
  constexpr int threads = kBackwardThreads<kVec, kLanes>;
  const int64_t parts = norm_parts_cuda(s, a.norm);
  const size_t bytes =
      std::max(column_bytes<IO, kVec, kLanes>(s.steps), Sum<kVec, kLanes>::kDoublesAThread * threads * sizeof(double));
  lif_sums_kernel<IO, kVec, kLanes><<<unsigned(parts * bands(a.norm)), threads, bytes, stream>>>(
      Neuron<float>(p), s, a.norm, static_cast<const IO*>(a.x), static_cast<const IO*>(a.norm.residual),
      static_cast<const float*>(a.v), static_cast<const float*>(a.saved), static_cast<const IO*>(a.grad_spikes),
      static_cast<const float*>(a.grad_v_last), sums, parts, runs_of(s, a.norm));
  return cudaGetLastError();
}

}  // namespace

int lif_forward_cuda(const LIFSpec& p, const LIFShape& s, const LIFForward& a, void* stream) {
  if (s.outer * s.inner == 0) return cudaSuccess;
  const auto fast = [&](int vec) { return wide(s, vec, {a.x, a.v, a.spikes, a.v_last, a.saved, a.norm.residual}); };
  return with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    constexpr int vec = 16 / sizeof(IO);
    return with_widths<vec, vec>(s, a.norm, fast, [&](auto width, auto lanes) {
      return launch_forward<IO, width(), lanes()>(p, s, a, cudaStream_t(stream));
    });
  });
}

int lif_backward_cuda(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, void* stream) {
  if (s.outer * s.inner == 0) return cudaSuccess;
  const auto fast = [&](int vec) {
    return wide(
        s, vec,
        {a.x, a.v, a.saved, a.grad_spikes, a.grad_v_last, a.grad_x, a.grad_v, a.norm.residual, a.grad_residual});
  };
  return with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    return with_widths<16 / sizeof(IO), kNormBackwardVec>(s, a.norm, fast, [&](auto width, auto lanes) {
      return launch_backward<IO, width(), lanes()>(p, s, a, cudaStream_t(stream));
    });
  });
}

int sums_cuda(const LIFSpec& p, const LIFShape& s, const LIFBackward& a, double* sums, void* stream) {
  const auto to = cudaStream_t(stream);
  if (s.outer * s.inner == 0)
    return cudaMemsetAsync(sums, 0, 2 * norm_parts_cuda(s, a.norm) * a.norm.channels * sizeof(double), to);
  const auto fast = [&](int vec) {
    return bands_fit(a.norm, vec) && wide(s, vec, {a.x, a.v, a.saved, a.grad_spikes, a.grad_v_last, a.norm.residual});
  };
  return with_io(s.dtype, [&](auto io) {
    using IO = decltype(io);
    return with_norm<kNormBackwardVec>(
        a.norm, fast, [&](auto width, auto lanes) { return launch_sums<IO, width(), lanes()>(p, s, a, sums, to); });
  });
}

const char* cuda_error_string(int status) { return cudaGetErrorString(cudaError_t(status)); }

}  // namespace snnkern
