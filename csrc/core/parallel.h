// One parallel region a call, and a barrier inside it.
//
// Threads come from OpenMP, which resolves to the runtime that torch has already loaded: one shared pool, no second
// set of spinning workers. Nested inside somebody else's region OpenMP gives a team of one, which every kernel must
// accept: always divide work by team.size as found inside, never by what was asked for.
#pragma once
#include <atomic>
#include <chrono>
#if defined(FASTSEQ_STD_THREADS)  // the sanitizer build: ThreadSanitizer cannot see inside OpenMP's runtime
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#elif defined(__APPLE__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTSEQ_ISA
#define FASTSEQ_ISA baseline
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

// A centralised barrier. A waiter spins for a while and then sleeps. On a machine with other work to do, a member of the
// team may not be scheduled for milliseconds, and a waiter that spins or yields can keep it from a core for many times
// as long. A member that arrives asks the system for nothing unless somebody sleeps.
struct Barrier {
  alignas(64) std::atomic<int> waiting{0};
  alignas(64) std::atomic<unsigned> round{0};  // counts by two; odd while somebody sleeps
  std::atomic<bool> slept{false};

  void wait(int size) {
    if (size == 1) return;
    const unsigned mine = round.load(std::memory_order_relaxed) & ~1u;
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      waiting.store(0, std::memory_order_relaxed);
      if (round.exchange(mine + 2, std::memory_order_acq_rel) & 1) wake_all();
      return;
    }
    if (spin(mine)) return;
    slept.store(true, std::memory_order_relaxed);
    unsigned expected = mine;
    round.compare_exchange_strong(expected, mine + 1, std::memory_order_relaxed);
    while (!passed(mine)) sleep_while(mine + 1);
  }

 private:
  bool passed(unsigned mine) const { return (round.load(std::memory_order_acquire) & ~1u) != mine; }

  // False where the time is over. It is long enough for members with unequal work on a quiet machine. After that somebody
  // slept it is short: two members that share a core spend it at every wait.
  bool spin(unsigned mine) const {
    using Clock = std::chrono::steady_clock;
    Clock::time_point now{}, end{};
    do {
      for (int spins = 0; spins < 64; ++spins) {
        if (passed(mine)) return true;
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      }
      now = Clock::now();
      if (end == Clock::time_point{})
        end = now + std::chrono::microseconds(slept.load(std::memory_order_relaxed) ? 5 : 100);
    } while (now < end);
    return false;
  }

  // May return early.
  void sleep_while([[maybe_unused]] unsigned value) {
#if defined(__linux__)
    syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#elif defined(__APPLE__)
    sched_yield();
#endif
  }
  void wake_all() {
#if defined(__linux__)
    syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
  }
};
static_assert(sizeof(std::atomic<unsigned>) == 4, "a futex is a word of 32 bits");

struct Team {
  int rank;
  int size;
  Barrier* barrier;
  void sync() const { barrier->wait(size); }
};

// Runs body(Team) on up to `threads` threads at once and returns when all are done. body must not throw.
template <class Body>
void parallel(int threads, const Body& body) {
  Barrier barrier;
  if (threads <= 1) {
    body(Team{0, 1, &barrier});
    return;
  }
#if defined(FASTSEQ_STD_THREADS)
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back([&, rank] { body(Team{rank, threads, &barrier}); });
  body(Team{0, threads, &barrier});
  for (auto& t : others) t.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
#else
  body(Team{0, 1, &barrier});
#endif
}

// The half-open share [begin, end) of `rank` when `total` items are divided as evenly as possible.
struct Share {
  long begin, end;
};
inline Share share_of(long total, int rank, int size) {
  long each = total / size, rest = total % size;
  long begin = rank * each + (rank < rest ? rank : rest);
  return {begin, begin + each + (rank < rest ? 1 : 0)};
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
