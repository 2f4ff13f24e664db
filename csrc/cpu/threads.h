// The threads that the CPU kernels share their work among.
#pragma once
#include <cstdint>
#include <type_traits>

namespace snnkern {

using Chunk = void (*)(const void* work, int64_t i, int thread);

// Calls chunk(work, i, thread) for every i below `count`, once, on at most `threads` threads, this one among them, each
// with its own number below that; returns when all are done. Never waits for a thread that has not begun a chunk.
void share(int64_t count, int threads, Chunk chunk, const void* work);

// How many to plan for: 1 while others are of no use, else `threads`.
int useful_threads(int threads);

namespace {

// f(i) or f(i, thread), which must not throw.
template <class F>
void parallel_for(int64_t count, int threads, const F& f) {
  const Chunk chunk = [](const void* work, int64_t i, [[maybe_unused]] int thread) {
    const F& f = *static_cast<const F*>(work);
    if constexpr (std::is_invocable_v<F, int64_t, int>)
      f(i, thread);
    else
      f(i);
  };
  share(count, threads, chunk, &f);
}

}  // namespace
}  // namespace snnkern
