// The pool of csrc/cpu/threads.cpp under ThreadSanitizer (`make sanitize-cpu`): many callers at once, jobs of every
// size, threads that come late, and a kernel. Memory that chunks read and write is plain, so that a chunk that runs
// twice, after its job's end, or with another's number is a race or a wrong count.
#include "cpu/threads.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace snnkern;

namespace {

std::atomic<int64_t> jobs{0}, chunks{0}, helped{0};

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

void spin(int n) {
  for (volatile int i = 0; i < n; i = i + 1) {
  }
}

// Chunks cost the caller most, so that help always pays and the pool never makes a caller work alone.
void job(std::mt19937& random) {
  const int64_t count = random() % 8 ? 1 + random() % 40 : 1 + random() % 2000;
  const int threads = 1 + random() % 12, late = random() % 64;
  std::vector<int64_t> input(count), times(count, 0), of_thread(threads, 0);
  for (int64_t i = 0; i < count; ++i) input[i] = 3 * i + late;
  parallel_for(count, threads, [&](int64_t i, int thread) {
    check(thread >= 0 && thread < threads, "a thread's number");
    times[i] += input[i];
    ++of_thread[thread];
    if (thread == 0) spin(3000);
    if (thread == 1 && i % 64 == late) usleep(200);
  });
  int64_t done = 0;
  for (int64_t i = 0; i < count; ++i) check(times[i] == 3 * i + late, "a chunk ran once");
  for (const int64_t n : of_thread) done += n;
  check(done == count, "as many chunks as there are");
  jobs += 1, chunks += count, helped += count - of_thread[0];
}

void kernel(std::mt19937& random) {
  const int64_t steps = 1 + random() % 40, inner = 5000 + random() % 20000, steps_out = 1 + random() % steps;
  std::vector<float> x(steps * inner), few(steps_out * inner), many(few.size());
  for (float& number : x) number = float(random() % 2);
  const TTMShape shape{DType::f32, 1, steps, inner, 0, inner, steps_out};
  baseline::ttm(shape, x.data(), few.data(), 1, false);
  baseline::ttm(shape, x.data(), many.data(), 4, random() % 2);
  check(few == many, "any number of threads gives the same");
}

}  // namespace

int main(int arguments, char** argument) {
  const int repeats = arguments > 1 ? std::atoi(argument[1]) : 100;
  for (int round = 0; round < 4; ++round) {  // callers that end, and others after them
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c)
      callers.emplace_back([=] {
        std::mt19937 random(unsigned(round * 100 + c));
        for (int i = 0; i < repeats; ++i) i % 16 ? job(random) : kernel(random);
      });
    for (std::thread& caller : callers) caller.join();
    std::mt19937 random(unsigned(round * 100 + 99));  // one caller, which others do not keep out
    for (int i = 0; i < repeats; ++i) i % 16 ? job(random) : kernel(random);
  }
  check(helped > 0, "others helped");
  std::printf("%lld jobs, %lld chunks, %lld by threads of the pool\n", (long long)jobs, (long long)chunks,
              (long long)helped);
}
