// How a scan is divided among threads, and over which rows a step runs.
#pragma once
#include <new>

#include "core/parallel.h"
#include "recurrent/cpu/pack.h"

namespace fastseq {
namespace FASTSEQ_ISA {


// Below this many multiplications a second thread costs more than it brings: a call, and a step with its barrier.
constexpr long kParallelCall = 300000;
constexpr long kParallelStep = 12000;
// What of a core's own cache the weights of every step may fill before they are divided among cores instead.
constexpr long kCacheBytes = 640 << 10;

// How many threads share the units of the same rows of the batch; the rows are divided among such groups. Rows alone
// need no barrier, but each thread then walks through all weights at every step, for few rows.
inline int unit_ways(const ScanSizes& s, int threads, long element, long cache = kCacheBytes) {
  if (threads == 1) return 1;
  const long macs = s.P * s.H * gates_of(s.cell), step_macs = s.B * macs, vectors = vectors_of<float>(s.H);
  auto share = [](long total, int size) { return share_of(total, 0, size).end; };  // the largest
  int ways = 1;
  for (int w = 2; w <= threads; ++w) {
    if (threads % w) continue;
    const int groups = threads / w, finer = threads / ways;
    const long rows = share(s.B, finer);  // of a thread without this
    const bool spills = macs * element > cache && rows <= 12;
    // Three rows of two threads: one would have twice as many as the other.
    const bool evener = rows <= 2 && 6 * share(s.B, groups) * share(vectors, w) <= 5 * rows * share(vectors, ways);
    const bool worth = step_macs / (long(groups) * w) >= kParallelStep;
    if ((rows <= 1 || spills || evener) && worth) ways = w;
  }
  return ways;
}

// The threads that have something to do at every step, or one for a call that is too small. Each thread that is asked
// is waited for, which on a busy machine takes milliseconds.
inline int threads_for(const ScanSizes& s, long element, long cache = kCacheBytes) {
  const long weights = (s.I + s.P) * s.H * gates_of(s.cell);
  const long work = (s.T * s.B + 1) * weights;  // to read them costs about as much as a row does
  if (s.threads <= 1 || work < kParallelCall) return 1;
  const long useful = (s.B < 1 ? 1 : s.B) * unit_ways(s, s.threads, element, cache);
  return useful < s.threads ? int(useful) : s.threads;
}

// Whether it pays to pack matrices of so many columns, which costs a few walks through them. Unpacked, each row of each step
// has to add lanes of its sums, which counts for the more the fewer columns there are; a single step has that once for both
// matrices.
inline bool pays_to_pack(const ScanSizes& s, long columns) {
  const long rows = s.T * s.B;
  return s.T == 1 ? rows > columns + 64 : 4 * rows > 3 * columns && rows > 5;
}

// One thread's part: rows [row0, row1) of the batch, and a share of any number of unit vectors.
struct Part {
  Team team;
  int ways, group, member;
  Barrier* barrier;  // of the group
  long row0, row1;

  Part(const Team& t, const ScanSizes& s, int unit_ways, Barrier* barriers)
      : team(t), ways(unit_ways), group(t.rank / ways), member(t.rank % ways) {
    barrier = barriers + group;
    Share rows = share_of(s.B, group, t.size / ways);
    row0 = rows.begin;
    row1 = rows.end;
  }
  Share share(long total) const { return share_of(total, member, ways); }
  void sync() const { barrier->wait(ways); }
};

// Worker(job, team).walk() in each thread of a team.
template <class Worker, class Job>
void on_threads(int threads, const Job& job) {
  parallel(threads, [&](const Team& team) {
    [[maybe_unused]] MatrixScope scope;
    Worker(job, team).walk();
  });
}

// The step whose state step t started from, or -1: the initial state.
inline long step_before(const ScanSizes& s, long t, long b) {
  if (!s.reverse) return t - 1;
  long end = s.lengths && s.lengths[b] < s.T ? s.lengths[b] : s.T;
  return t + 1 < end ? t + 1 : -1;
}
inline bool live(const ScanSizes& s, long t, long b) { return !s.lengths || t < s.lengths[b]; }
// n units of row b's state from e on, or their gradient, times the mask.
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> masked(const ScanSizes& s, long b, long e, Vec<Accumulator<S>> h, int n) {
  return h * load_strided(at<S>(s.mask, 0, b) + e * s.mask.e, s.mask.e, n);
}
// Of n units from e on, the share of the state before that the state after step t keeps.
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> share_kept(const ScanView& keep, long t, long b, long e, int n) {
  const S* const share = at<S>(keep, t, b);
  return keep.e ? load_strided(share + e * keep.e, keep.e, n) : splat(Accumulator<S>(widen(*share)));
}
inline bool cleared(const ScanSizes& s, long t, long b) { return s.reset && s.reset[t * s.reset_t + b * s.reset_b]; }

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
