// What the forward and the backward walk of normalised layers share: parameters in whole vectors, and sums over a row.
#pragma once
#include "recurrent/cpu/normed.h"
#include "recurrent/cpu/plan.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

// The first n lanes; the others 0.
template <class A>
FASTSEQ_INLINE Vec<A> first_lanes(Vec<A> v, int n) {
  if (n >= kLanes<A>) return v;
  A buffer[kLanes<A>];
  store(buffer, v);
  return load_n(buffer, n);
}

// The sum of `vectors` vectors, term(v) the v-th, in an order that depends on their number alone.
template <class A, class Term>
FASTSEQ_INLINE A sum_vectors(long vectors, const Term& term) {
  Vec<A> sums[4] = {};
  long v = 0;
  for (; v + 4 <= vectors; v += 4)
    FASTSEQ_UNROLL for (int i = 0; i < 4; ++i) sums[i] += term(v + i);
  for (; v < vectors; ++v) sums[0] += term(v);
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class A>
A inverse_std(A squares, A count) {
  return A(1) / A(__builtin_sqrt(double(squares / count + A(kNormEps))));
}

// G blocks of H elements as [G][Hp], lanes past H 0. A null vector is all zeros.
template <class S>
void lay_blocks(Accumulator<S>* to, const ScanView& from, int G, long H, long Hp) {
  using A = Accumulator<S>;
  for (int g = 0; g < G; ++g) {
    for (long e = H; e < Hp; ++e) to[g * Hp + e] = A(0);
    copy_row<S>(to + g * Hp, from.data ? at<S>(from, 0, 0) + g * H * from.e : nullptr, from.e, H);
  }
}

}  // namespace
}  // namespace FASTSEQ_ISA
}  // namespace fastseq
