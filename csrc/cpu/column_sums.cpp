// Sums of columns, a few vectors of columns at a time: a thread has its own, so the order of a sum is fixed. Blocks of rows
// are summed first, then their sums: the error grows with the root of the rows.
#include "column_sums.h"

#include "attention_math.h"
#include "parallel.h"
#include "simd.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr long kAlone = 1 << 15;  // elements that one thread sums before another has begun
constexpr long kRows = 64;        // a block
constexpr int kVectors = 4;       // at a time

template <class S>
void run(const ColumnSums& call) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>;
  const long groups = (call.columns + kVectors * L - 1) / (kVectors * L);
  const S* const x = static_cast<const S*>(call.x);
  S* const out = static_cast<S*>(call.out);
  const long threads = call.rows * call.columns < kAlone ? 1 : attention::least(call.threads, groups);
  parallel(int(threads), [&](const Team& team) {
    const Share share = share_of(groups, team.rank, team.size);
    for (long c = share.begin * kVectors * L; c < share.end * kVectors * L; c += kVectors * L) {
      int width[kVectors];
      for (int v = 0; v < kVectors; ++v)
        width[v] = int(attention::most(0, attention::least(L, call.columns - c - v * L)));
      Vec<A> total[kVectors] = {};
      for (long r0 = 0; r0 < call.rows; r0 += kRows) {
        Vec<A> part[kVectors] = {};
        for (long r = r0; r < attention::least(r0 + kRows, call.rows); ++r)
          for (int v = 0; v < kVectors; ++v)
            if (width[v]) part[v] += load_n(x + r * call.columns + c + v * L, width[v]);
        for (int v = 0; v < kVectors; ++v) total[v] += part[v];
      }
      for (int v = 0; v < kVectors; ++v)
        if (width[v]) store_n(out + c + v * L, total[v], width[v]);
    }
  });
}

}  // namespace

void column_sums(const ColumnSums& call) {
  switch (call.dtype) {
    case AttentionCall::Dtype::f64:
      return run<double>(call);
    case AttentionCall::Dtype::f32:
      return run<float>(call);
    case AttentionCall::Dtype::bf16:
      return run<bf16>(call);
    case AttentionCall::Dtype::f16:
      return run<f16>(call);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
