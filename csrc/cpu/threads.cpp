// A pool of threads whose caller waits for nobody who is late.
//
// A job is a row of chunks, cut into a range per thread. A thread takes the chunks of its own range one by one, then
// those that others have not begun. So the caller, which works like the others, has nothing left to do only when every
// chunk has been begun, and waits for those that still run. A thread that the system wakes too late finds nothing.
//
// A thread that the system puts aside in the middle of a chunk does hold the caller up, and one that it runs in the
// caller's place helps nobody. So a job that took longer than the caller alone would have needed makes the caller work
// alone for a multiple of what was lost: such losses stay a small part of the time, whatever else the machine does.
//
// tests/threads.cpp runs it under ThreadSanitizer.
#include "threads.h"

#include <pthread.h>
#ifdef __APPLE__
#include <dispatch/dispatch.h>
#else
#include <semaphore.h>
#endif

#include <algorithm>
#include <atomic>
#include <csignal>
#include <ctime>

namespace snnkern {
namespace {

constexpr int kMost = 256;          // threads
constexpr size_t kStack = 1 << 20;  // bytes; a chunk needs a quarter of them
constexpr int64_t kSpin = 100'000;  // nanoseconds that a thread looks for what it waits for before it sleeps
constexpr int64_t kPenalty = 16;    // times what a job has lost: how long the caller then works alone, but at most
constexpr int64_t kMostAlone = 1'000'000'000;  // nanoseconds

int64_t now(clockid_t clock = CLOCK_MONOTONIC) {  // in nanoseconds
  timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * int64_t(1'000'000'000) + t.tv_nsec;
}

// Whether `done` within kSpin.
template <class F>
bool soon(F&& done) {
  if (done()) return true;
  for (const int64_t until = now() + kSpin; now() < until;)
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  return done();
}

// Where one thread sleeps. No lock, which its owner could be holding as the system puts it aside.
class Bed {
 public:
#ifdef __APPLE__
  Bed() : semaphore_(dispatch_semaphore_create(0)) {}
  void wake() {
    if (asleep_.exchange(false)) dispatch_semaphore_signal(semaphore_);
  }
  void wait() { dispatch_semaphore_wait(semaphore_, DISPATCH_TIME_FOREVER); }
#else
  Bed() { sem_init(&semaphore_, 0, 0); }
  void wake() {
    if (asleep_.exchange(false)) sem_post(&semaphore_);
  }
  void wait() {
    while (sem_wait(&semaphore_) != 0) {
    }
  }
#endif
  // Until woken, or not at all if `done`; may wake for nothing.
  template <class F>
  void sleep(F&& done) {
    asleep_ = true;
    if (!done()) wait();
    asleep_ = false;
  }

 private:
  std::atomic<bool> asleep_{false};
#ifdef __APPLE__
  dispatch_semaphore_t semaphore_;
#else
  sem_t semaphore_;
#endif
};

class Pool {
 public:
  bool helps() const { return !busy_ && now() >= alone_until_; }

  // Does the first chunks alone while help is of no use, and the others with it. Returns how many it did: all or, where
  // another caller is at it, none.
  int64_t share(int64_t count, int threads, Chunk chunk, const void* work) {
    if (busy_.exchange(true)) return 0;
    int64_t begun = now(), first = 0;
    for (; first < count && begun < alone_until_; begun = now()) chunk(work, first++, 0);
    if (first < count) run(first, count - first, threads, chunk, work, begun);
    busy_ = false;
    return count;
  }

 private:
  struct alignas(64) Seat {
    std::atomic<uint64_t> left{0};  // the job's number, and chunks of this range that nobody has begun
    Bed bed;
  };

  void run(int64_t first, int64_t count, int threads, Chunk chunk, const void* work, int64_t begun) {
    threads = int(std::min<int64_t>({threads, kMost, count}));
    while (started_ < threads - 1 && start(started_ + 1)) ++started_;
    first_ = first;
    count_ = count;
    chunk_ = chunk;
    work_ = work;
    running_ = count;
    threads_ = threads;
    const uint64_t job = uint64_t(job_ + 1) << 32;
    for (int r = 0; r < threads; ++r) seats_[r].left = job | (end_of(r, threads) - end_of(r - 1, threads));
    job_ = uint32_t(job >> 32);
    for (int r = 1; r < threads; ++r) seats_[r].bed.wake();

    const int64_t before = now(CLOCK_THREAD_CPUTIME_ID), mine = take(0);
    const int64_t one = (now(CLOCK_THREAD_CPUTIME_ID) - before) / std::max<int64_t>(mine, 1);
    const auto done = [&] { return running_ == 0; };
    if (!soon(done))
      while (!done()) seats_[0].bed.sleep(done);
    const int64_t end = now(), lost = end - begun - count * one;
    if (lost > 0) alone_until_ = end + std::min(kPenalty * lost, kMostAlone);
  }

  int64_t end_of(int range, int threads) const { return first_ + count_ * (range + 1) / threads; }

  // Does chunks until all have been begun; returns how many.
  int64_t take(int me) {
    int64_t taken = 0;
    for (int k = 0, threads = threads_; k < threads; ++k) {
      const int range = (me + k) % threads;
      std::atomic<uint64_t>& left = seats_[range].left;
      // What has been read of a job before its chunk is claimed holds if the claim succeeds: then it is still the job,
      // and it cannot end without this chunk.
      for (uint64_t seen = left; uint32_t(seen) > 0 && me < threads_;) {
        if (!left.compare_exchange_weak(seen, seen - 1)) continue;
        chunk_(work_, end_of(range, threads_) - uint32_t(seen), me);
        ++taken;
        if (running_.fetch_sub(1) == 1 && me > 0) seats_[0].bed.wake();
        seen = left;
      }
    }
    return taken;
  }

  bool start(int seat) {
    struct Self {
      Pool* pool;
      int seat;
    };
    auto* self = new Self{this, seat};
    const auto main = [](void* argument) -> void* {
      const Self self = *static_cast<Self*>(argument);
      delete static_cast<Self*>(argument);
      self.pool->serve(self.seat);
      return nullptr;
    };
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, kStack);
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool started = pthread_create(&thread, &attributes, main, self) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (!started) delete self;
    return started;
  }

  void serve(int me) {
    for (;;) {
      const uint32_t seen = job_;
      take(me);
      const auto more = [&] { return job_ != seen; };
      if (!soon(more)) seats_[me].bed.sleep(more);
    }
  }

  std::atomic<bool> busy_{false};  // whoever sets it owns what follows
  std::atomic<int64_t> alone_until_{0};
  int started_ = 0;
  int64_t first_, count_;  // of a job; stay as they are while any of its chunks runs
  Chunk chunk_;
  const void* work_;
  std::atomic<int> threads_{0};
  std::atomic<int64_t> running_{0};  // chunks that are not done
  alignas(64) std::atomic<uint32_t> job_{0};
  Seat seats_[kMost];
};

// Never destroyed: its threads outlive main. A fork has none of them, and makes itself a new one.
std::atomic<Pool*> pool{nullptr};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });

Pool& the_pool() {
  Pool* found = pool;
  if (found) return *found;
  Pool* made = new Pool;
  if (pool.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

int useful_threads(int threads) { return threads > 1 && the_pool().helps() ? threads : 1; }

void share(int64_t count, int threads, Chunk chunk, const void* work) {
  const int64_t done = threads > 1 && count > 1 ? the_pool().share(count, threads, chunk, work) : 0;
  for (int64_t i = done; i < count; ++i) chunk(work, i, 0);
}

}  // namespace snnkern
