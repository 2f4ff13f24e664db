// Batch norm and the neurons behind it with one visit to memory, in training, where a channel fits into the shared
// memory of a cluster of multiprocessors (compute capability 9.0 and up): what the first pass reads stays there.
//   forward    moments, then the table, then the neurons: x is read once
//   backward   the way back of every neuron with the sums of its gradients, then the gradient of x: x and the gradient
//              of spikes are read once
// A cluster owns a channel, its blocks as many neurons each. Between the passes the blocks exchange their sums through
// memory, and each adds them up in the same order, that of the blocks.
#pragma once
#include "bn_lif.cuh"

namespace snnkern {

constexpr int kCluster = 8, kOnceThreads = 384;

struct Channel {         // as in snnkern/backend/cuda/bn_once.py
  int64_t packs, items;  // packs of neurons in a period, and in a channel
  int64_t share;         // items of a block, but for the last ones
};

struct OnceForward {
  NormParameters of;
  double* moments;  // [channels, 2 * kCluster + 1]
  LIFForward lif;
};
struct OnceBackward {
  float* affine;  // [2, channels]
  double* sums;   // [channels, 2 * kCluster]
  LIFBackward lif;
};

namespace {

// Those items of the block that a thread has, each a pack of neurons for all of time.
template <int kWidth>
struct Items {
  const Channel& all;
  const Norm& norm;
  const int64_t channel = blockIdx.x / kCluster;
  const int rank = blockIdx.x % kCluster;

  template <class Use>
  __device__ __forceinline__ void each(const LIFShape& s, bool rows, const Use& use) const {
    const int64_t end = (rank + 1) * all.share < all.items ? (rank + 1) * all.share : all.items;
    for (int64_t item = rank * all.share + threadIdx.x; item < end; item += kOnceThreads) {
      const int64_t run = quotient(item, all.packs), pack = item - run * all.packs;
      use(Place(s, (run * norm.channels + channel) * norm.period + pack * kWidth, rows));
    }
  }
};

// A number for every thread, step and item of it, in shared memory, so that no banks conflict.
template <DType kType, int kWidth>
struct Slots {
  struct alignas(Pack<kType, kWidth>::kBytes) Slot {
    Pack<kType, kWidth> pack;
  };
  Slot* at;

  __device__ __forceinline__ explicit Slots(void* memory) : at(static_cast<Slot*>(memory) + threadIdx.x) {}
  __device__ __forceinline__ void push(const Pack<kType, kWidth>& pack) {
    at->pack = pack;
    at += kOnceThreads;
  }
  __device__ __forceinline__ Pack<kType, kWidth> next() {
    const Slot slot = *at;
    at += kOnceThreads;
    return slot.pack;
  }
  __device__ __forceinline__ Pack<kType, kWidth> pop() {
    at -= kOnceThreads;
    const Slot slot = *at;
    return slot.pack;
  }
  __device__ __forceinline__ void skip(int steps) { at += steps * kOnceThreads; }
};

// What neurons receive, of x as it was kept.
template <LIFVariant kV>
struct Again : Input<kV, true> {
  using typename Input<kV, true>::Step;
  Slots<kV.dtype, kV.width>& kept;

  __device__ __forceinline__ Step next() {
    Step step;
    step.x = kept.next();
    if constexpr (kV.residual) step.residual = this->residual.next();
    return step;
  }
};

// Adds up two numbers of all threads of the block, for its first thread.
__device__ __forceinline__ void add_up_block(double& one, double& two) {
  constexpr int kWarps = kOnceThreads / 32;
  __shared__ double of_warp[2][kWarps];
  add_up_warp(one, two);
  if (threadIdx.x % 32 == 0) {
    of_warp[0][threadIdx.x / 32] = one;
    of_warp[1][threadIdx.x / 32] = two;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  one = threadIdx.x < kWarps ? of_warp[0][threadIdx.x] : 0.0;
  two = threadIdx.x < kWarps ? of_warp[1][threadIdx.x] : 0.0;
  add_up_warp(one, two);
}

// Every thread of the cluster waits for all others, and sees what they wrote to memory.
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class T>
__device__ __forceinline__ T* of_channel(const void* numbers, int64_t channel) {  // null stays null
  return numbers ? static_cast<T*>(const_cast<void*>(numbers)) + channel : nullptr;
}

}  // namespace

// `plan` is of one channel and kCluster parts.
template <LIFVariant kV>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kOnceThreads, 1)
    bn_lif_forward_once(Neuron<float> neuron, LIFShape s, NormPlan plan, Channel all, OnceForward a) {
  using Numbers = Pack<kV.dtype, kV.width>;
  const Norm& norm = a.lif.norm;
  const Items<kV.width> items{all, norm};
  const Neurons<kV> n(neuron, a.lif.more, 0);
  const int64_t channel = items.channel;
  const float shift =  // the channel's first element
      Pack<kV.dtype, 1>::load(static_cast<const char*>(a.lif.x) +
                              Place(s, channel * norm.period, kV.rows).x * size_of(kV.dtype))
          .get(0);

  double total = 0, square = 0;
  Slots<kV.dtype, kV.width> kept(shared_memory);
  items.each(s, kV.rows, [&](const Place& place) {
    Ahead<Input<kV, false>, kLoaded<kV>> x{Input<kV, false>(s, place, a.lif)};
    x.fill(steps_of<kV>(s));
    x.template chunk<false>(steps_of<kV>(s), [&](const Numbers& step) {
      kept.push(step);
#pragma unroll
      for (int e = 0; e < kV.width; ++e) {
        const double d = double(step.get(e)) - shift;
        total += d;
        square = fma(d, d, square);
      }
    });
  });
  add_up_block(total, square);

  __shared__ float table[kNormRows];
  double* moments = a.moments + channel * (2 * kCluster + 1);
  if (threadIdx.x == 0) {
    moments[2 * items.rank] = total;
    moments[2 * items.rank + 1] = square;
    if (items.rank == 0) moments[2 * kCluster] = shift;
  }
  wait_for_cluster();
  if (threadIdx.x == 0) {
    const bool first = items.rank == 0;
    prepare_channel(0, plan, moments, add_up(0, plan, moments), of_channel<float>(a.of.weight, channel),
                    of_channel<float>(a.of.bias, channel),
                    first ? of_channel<float>(a.of.running_mean, channel) : nullptr,
                    first ? of_channel<float>(a.of.running_var, channel) : nullptr, table);
    if (first)
#pragma unroll
      for (int row = 0; row < kNormRows; ++row)
        of_channel<float>(norm.table, channel)[row * norm.channels] = table[row];
  }
  __syncthreads();

  const Affine<1> affine({1, 1, table, nullptr}, {1, 1, 0});
  kept = Slots<kV.dtype, kV.width>(shared_memory);
  items.each(s, kV.rows, [&](const Place& place) {
    const Again<kV> again{{s, place, a.lif, affine}, kept};
    Output<kV> output(s, place, a.lif);
    State<kV> state;
    state.load_or(a.lif.v, place, neuron.v_start);
    forward<kV>(n, state, again, output, 0, steps_of<kV>(s), [](const auto&) { return false; });
    if (a.lif.v_last) state.store(static_cast<float*>(a.lif.v_last) + place.state, place);
  });
}

// `plan` as above. In shared memory: x, then the gradients of what the neurons receive, which take the place of their
// potentials.
template <LIFVariant kV>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kOnceThreads, 1)
    bn_lif_backward_once(Neuron<float> neuron, LIFShape s, NormPlan plan, Channel all, OnceBackward a) {
  using Numbers = Pack<kV.dtype, kV.width>;
  using Gradients = Column<kV.width, kOnceThreads>;
  const LIFBackward& b = a.lif;
  const Norm& norm = b.norm;
  const Items<kV.width> items{all, norm};
  const Neurons<kV> n(neuron, b.more, 0);
  const int64_t channel = items.channel, stride = s.inner * size_of(kV.dtype);
  const int steps = steps_of<kV>(s);
  const int64_t rounds = (all.share + kOnceThreads - 1) / kOnceThreads;
  char* const gradients = shared_memory + rounds * steps * kOnceThreads * Numbers::kBytes;

  __shared__ float table[kNormRows], pull_push[2], affine[2];
  if (threadIdx.x < kNormRows) table[threadIdx.x] = of_channel<float>(norm.table, channel)[threadIdx.x * norm.channels];
  __syncthreads();
  const Affine<1> of({1, 1, table, nullptr}, {1, 1, 0});

  double total = 0, moment = 0;
  Slots<kV.dtype, kV.width> kept(shared_memory);
  Gradients column(gradients);
  items.each(s, kV.rows, [&](const Place& place) {
    const Input<kV> input(s, place, b, of);
    char* of_residual = static_cast<char*>(b.grad_residual) + place.sequence * size_of(kV.dtype) + (steps - 1) * stride;
    State<kV> grad_state;
    float sum = 0, sum_centred = 0;
    Sums<kV> none;
    grad_state.load_or(b.grad_v_last, place, 0.0f);
    back<kV>(
        n, s, place, b, grad_state, none, input, column, 0, steps,
        [&](const typename Input<kV>::Step& step) { kept.push(step.x); },
        [&](const float (&g)[kV.width], const float (&)[kV.width]) {
          const Numbers x = kept.pop();
          float grad[kV.width];
#pragma unroll
          for (int e = 0; e < kV.width; ++e) {
            grad[e] = of_input<kV>(neuron, g[e]);
            sum += grad[e];
            sum_centred = __fmaf_rn(grad[e], input.centred(x, e), sum_centred);
          }
          column.put(grad);
          if (!b.grad_residual) return;
          Numbers::rounded(grad).store(of_residual);
          of_residual -= stride;
        });
    if (b.grad_v) grad_state.store(static_cast<float*>(b.grad_v) + place.state, place);
    total += sum;
    moment += sum_centred;
    kept.skip(steps);
    column.skip(steps);
  });
  add_up_block(total, moment);

  double* sums = a.sums + channel * (2 * kCluster);
  if (threadIdx.x == 0) {
    sums[2 * items.rank] = total;
    sums[2 * items.rank + 1] = moment;
  }
  wait_for_cluster();
  if (threadIdx.x == 0) {
    gradients_channel(0, plan, table, add_up(0, plan, sums), nullptr, affine, pull_push);
    if (items.rank == 0) {
      a.affine[channel] = affine[0];
      a.affine[norm.channels + channel] = affine[1];
    }
  }
  __syncthreads();

  const float scale = of.scale[0], pull = pull_push[0], push = pull_push[1];
  kept = Slots<kV.dtype, kV.width>(shared_memory);
  column = Gradients(gradients);
  items.each(s, kV.rows, [&](const Place& place) {
    const Input<kV> input(s, place, b, of);
    char* to = static_cast<char*>(b.grad_x) + place.sequence * size_of(kV.dtype);
    for (int t = 0; t < steps; ++t) {
      const Numbers x = kept.next();
      float grad[kV.width];
      column.get(grad);
      column.skip(1);
#pragma unroll
      for (int e = 0; e < kV.width; ++e)
        grad[e] = __fmaf_rn(scale, grad[e], -__fmaf_rn(input.centred(x, e), push, pull));
      Numbers::rounded(grad).store(to);
      to += stride;
    }
  });
}

}  // namespace snnkern
