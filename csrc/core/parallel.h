// One parallel region a call, and a barrier inside it.
//
// Threads come from OpenMP, which resolves to the runtime that torch has already loaded: one shared pool, no second
// set of spinning workers. Nested inside somebody else's region OpenMP gives a team of one, which every kernel must
// accept: always divide work by team.size as found inside, never by what was asked for.
#pragma once
#include <atomic>
#if defined(FASTSEQ_STD_THREADS)  // the sanitizer build: ThreadSanitizer cannot see inside OpenMP's runtime
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
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

// A centralised sense-counting barrier. A waiter spins for some microseconds, then yields its core each round, so that
// a team with more threads than free cores still moves on.
struct Barrier {
  alignas(64) std::atomic<int> waiting{0};
  alignas(64) std::atomic<unsigned> round{0};

  void wait(int size) {
    if (size == 1) return;
    unsigned mine = round.load(std::memory_order_relaxed);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      waiting.store(0, std::memory_order_relaxed);
      round.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == mine; ++spins) {
      if (spins < 2000) {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      } else {
#if defined(__linux__) || defined(__APPLE__)
        sched_yield();
#endif
      }
    }
  }
};

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
