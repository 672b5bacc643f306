// Lanes of vectors brought together: sums of lanes, the greatest, and the transposition of a square.
#pragma once
#include <utility>

#include "core/simd.h"

namespace fastseq::FASTSEQ_ISA {

// With b's elements counted from L on. keep: a where bit D of the lane is clear, else b. cross: the partner lanes.
template <size_t D, class V, size_t... I>
FASTSEQ_INLINE V keep_lanes(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int((I & D) ? sizeof...(I) + I : I)...);
}
template <size_t D, class V, size_t... I>
FASTSEQ_INLINE V cross_lanes(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int((I & D) ? sizeof...(I) + I - D : I + D)...);
}
template <size_t D, class V, size_t... I>
FASTSEQ_INLINE V low_lanes(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int((I & D) ? sizeof...(I) + I - D : I)...);
}
template <size_t D, class V, size_t... I>
FASTSEQ_INLINE V high_lanes(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int((I & D) ? sizeof...(I) + I : I + D)...);
}

// N vectors made into one, a power of two, by adding lanes D apart and wider until lane l has what was in vector l of N;
// from D = 1 with as many vectors as lanes, lane l is the sum of all lanes of v[l].
template <class A, int N, int D = 1>
FASTSEQ_INLINE Vec<A> sums_of(const Vec<A>* v) {
  constexpr std::make_index_sequence<kLanes<A>> lanes;
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<A> half[N / 2];
    FASTSEQ_UNROLL for (int i = 0; i < N / 2; ++i)
      half[i] = keep_lanes<D>(v[2 * i], v[2 * i + 1], lanes) + cross_lanes<D>(v[2 * i], v[2 * i + 1], lanes);
    return sums_of<A, N / 2, 2 * D>(half);
  }
}

template <class V, size_t... I>
FASTSEQ_INLINE auto add_halves(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int(I)...) + __builtin_shufflevector(v, v, int(I + sizeof...(I))...);
}
// Lane l of N: the sum of lanes l, l + N, l + 2 N, ... of v.
template <int N, class V>
FASTSEQ_INLINE auto fold_lanes(V v) {
  constexpr int lanes = int(sizeof(V) / sizeof(v[0]));
  if constexpr (lanes == N)
    return v;
  else
    return fold_lanes<N>(add_halves(v, std::make_index_sequence<lanes / 2>{}));
}
template <class A>
FASTSEQ_INLINE A sum_lanes(Vec<A> v) {
  constexpr int n = 16 / int(sizeof(A));  // of the narrowest vectors that all processors have
  const auto sums = fold_lanes<n>(v);
  if constexpr (n == 4)
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  else
    return sums[0] + sums[1];
}

template <class V, size_t... I>
FASTSEQ_INLINE auto greater_half(V v, std::index_sequence<I...>) {
  const auto low = __builtin_shufflevector(v, v, int(I)...), high = __builtin_shufflevector(v, v, int(I + sizeof...(I))...);
  return low > high ? low : high;
}
// The greatest lane of v, none of them a NaN.
template <class A, class V = Vec<A>>
FASTSEQ_INLINE A greatest_lane(V v) {
  constexpr size_t lanes = sizeof(V) / sizeof(A);
  if constexpr (lanes == 2)
    return v[0] > v[1] ? v[0] : v[1];
  else
    return greatest_lane<A>(greater_half(v, std::make_index_sequence<lanes / 2>{}));
}

// The L x L matrix of v's lanes, transposed in place.
template <class A, int D = 1>
FASTSEQ_INLINE void transpose(Vec<A>* v) {
  constexpr int L = kLanes<A>;
  constexpr std::make_index_sequence<L> lanes;
  if constexpr (D < L) {
    FASTSEQ_UNROLL for (int i = 0; i < L; ++i)
      if (!(i & D)) {
        Vec<A> low = low_lanes<D>(v[i], v[i + D], lanes);
        v[i + D] = high_lanes<D>(v[i], v[i + D], lanes);
        v[i] = low;
      }
    transpose<A, 2 * D>(v);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
