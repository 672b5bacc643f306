// Products of the scan: a few rows of activations times all gates of a few vectors of units, held in registers.
//
// Packed weights lie as [unit vector][term of k][gate][lane], so a tile streams them once for all of its rows. Unpacked
// ones are read as they lie, as dot products along k: no preparation, for calls too short to pay for one.
//
// Weights that were packed beforehand, of a type smaller than the activations', lie likewise with words of several k in
// the place of terms (recurrent_operand.h).
#pragma once
#include "recurrent_operand.h"

namespace fastseq {
namespace FASTSEQ_ISA {

#if defined(__clang__)
#define FASTSEQ_UNROLL _Pragma("unroll")
#else
#define FASTSEQ_UNROLL _Pragma("GCC unroll 16")  // early, so that arrays of vectors become registers
#endif

constexpr int kMaxRows = 16;    // rows whose results are handed on together
constexpr int kMaxVectors = 4;  // gates * unit vectors of a tile

constexpr int rows_of_tile(int vectors) {
  return kVectorRegisters >= 32 ? (vectors >= 4 ? 6 : 8) : (vectors >= 4 ? 3 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8);
}
// How many unit vectors go into one tile beside each other.
constexpr int tile_width(int gates) { return kMaxVectors / gates; }

template <class E, class W = E>
struct Tile {
  using A = Accumulator<E>;
  const E* const* rows;  // [R] pointers to K activations
  const W* w;            // packed weights of the first unit vector
  long w_stride;         // to the next unit vector
  long K;                // terms; of words, elements
  const A* init;         // null (zero), or [gate][..] biases for all rows, a gate `stride` apart
  A* const* out;         // [R] pointers to [gate][..] results, a gate `stride` apart
  long stride;
  bool add;              // to what is in out; then there is no init
  const A* scale = nullptr;  // null, or [gate][..] factors of all sums, a gate `scale_stride` apart
  long scale_stride = 0;
};

// How many sums a result is kept in: a single chain of additions leaves the units idle where there are few results.
constexpr int chains(int results) { return results >= 12 ? 1 : results >= 6 ? 2 : 4; }

// out[r][g][lanes of nb] = scale * sum + init, or + out.
template <class E, class W, int R, int G, int NB>
FASTSEQ_INLINE void finish_tile(const Tile<E, W>& t, Vec<Accumulator<E>> (&sums)[R][G * NB]) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>;
  const bool more = t.init || t.add;
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
    A* out = t.out[r];
    FASTSEQ_UNROLL for (int n = 0; n < G * NB; ++n) {
      if constexpr (!__is_same(E, W))
        if (t.scale) sums[r][n] *= load(t.scale + (n / NB) * t.scale_stride + (n % NB) * L);
      const long at = (n / NB) * t.stride + (n % NB) * L;
      if (more) sums[r][n] += load((t.add ? out : t.init) + at);
      store(out + at, sums[r][n]);
    }
  }
}

// All elements of the words at w[n] + n * apart, or the first `some`, into the sums: chain `u` takes what is its own.
template <class E, class W, int R, int NB, int N, int U, int kAt = 0>
FASTSEQ_INLINE void add_words(Vec<Accumulator<E>> (&acc)[U][R][N], const W* const (&w)[NB], long at, long apart,
                              const E* const* rows, long k, int u, int some) {
  if constexpr (kAt < kWord<Accumulator<E>, W>) {
    if (kAt >= some) return;
    Vec<Accumulator<E>> wv[N];
    FASTSEQ_UNROLL for (int n = 0; n < N; ++n) {
      const W* p = w[n % NB] + at + n / NB * apart;
      // Where sums fill the registers, words are read again from L1 for each of their elements: GCC would keep them.
      if constexpr (R * N > 20) asm("" : "+r"(p));
      wv[n] = widen_word<W, kAt>(load_words(p));
    }
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
      Vec<Accumulator<E>> a = splat(rows[r][k + kAt]);
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[(u + kAt) % U][r][n] += a * wv[n];
    }
    add_words<E, W, R, NB, N, U, kAt + 1>(acc, w, at, apart, rows, k, u, some);
  }
}

// The same of words: out[r][g][lanes of nb] = scale * sum_k rows[r][k] * w[nb][k][g] + ...
template <class E, class W, int R, int G, int NB>
void run_words(const Tile<E, W>& t) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>, N = G * NB, D = kWord<A, W>, U = chains(R * N);
  Vec<A> acc[U][R][N];
  const E* rows[R];
  const W* w[NB];
  FASTSEQ_UNROLL for (int nb = 0; nb < NB; ++nb) w[nb] = t.w + nb * t.w_stride;
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r) rows[r] = t.rows[r];
  FASTSEQ_UNROLL for (int u = 0; u < U; ++u)
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[u][r][n] = Vec<A>{};
  constexpr int M = U > D ? U / D : 1;  // words at once, so that each chain has its element
  long k = 0;
  for (; k + M * D <= t.K; k += M * D)
    FASTSEQ_UNROLL for (int m = 0; m < M; ++m) add_words(acc, w, (k + m * D) * G * L, D * L, rows, k + m * D, m * D, D);
  for (; k < t.K; k += D) add_words(acc, w, k * G * L, D * L, rows, k, 0, int(t.K - k));
  FASTSEQ_UNROLL for (int u = 1; u < U; ++u)
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[0][r][n] += acc[u][r][n];
  finish_tile<E, W, R, G, NB>(t, acc[0]);
}

// out[r][g][lanes of nb] = init[g][nb] + sum_k rows[r][k] * w[nb][k][g]
template <class E, int R, int G, int NB>
void run_tile(const Tile<E>& t) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>, D = kTerm<E>;
  constexpr int N = G * NB, U = chains(R * N);
  Vec<A> acc[U][R][N];
  const E* rows[R];
  const E* w[NB];
  FASTSEQ_UNROLL for (int nb = 0; nb < NB; ++nb) w[nb] = t.w + nb * t.w_stride;
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r) rows[r] = t.rows[r];
  FASTSEQ_UNROLL for (int u = 0; u < U; ++u)
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[u][r][n] = Vec<A>{};
  long k = 0;
  for (; k + U <= t.K; k += U)
    FASTSEQ_UNROLL for (int u = 0; u < U; ++u) {
      Vec<A> wv[N];
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) wv[n] = load_terms(w[n % NB] + ((k + u) * G + n / NB) * L * D);
      FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
        Vec<A> a = splat_term(rows[r] + (k + u) * D);
        FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[u][r][n] = add_product<E>(acc[u][r][n], a, wv[n]);
      }
    }
  if constexpr (U > 1)
    for (; k < t.K; ++k) {
      Vec<A> wv[N];
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) wv[n] = load_terms(w[n % NB] + (k * G + n / NB) * L * D);
      FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
        Vec<A> a = splat_term(rows[r] + k * D);
        FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[0][r][n] = add_product<E>(acc[0][r][n], a, wv[n]);
      }
    }
  FASTSEQ_UNROLL for (int u = 1; u < U; ++u)
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[0][r][n] += acc[u][r][n];
  finish_tile<E, E, R, G, NB>(t, acc[0]);
}

template <class E, class W = E>
using TileFunction = void (*)(const Tile<E, W>&);

template <class E, class W, int G, int NB, int R = 1>
TileFunction<E, W> tile_function(int rows) {
  if constexpr (R > rows_of_tile(G * NB))
    return nullptr;
  else if (rows != R)
    return tile_function<E, W, G, NB, R + 1>(rows);
  else if constexpr (__is_same(E, W))
    return &run_tile<E, R, G, NB>;
  else
    return &run_words<E, W, R, G, NB>;
}
template <class E, class W, int G>
TileFunction<E, W> tile_function(int rows, int width) {
  if constexpr (G == 1) {
    if (width == 4) return tile_function<E, W, 1, 4>(rows);
    if (width == 3) return tile_function<E, W, 1, 3>(rows);
  }
  if constexpr (G <= 2)
    if (width == 2) return tile_function<E, W, G, 2>(rows);
  return tile_function<E, W, G, 1>(rows);
}

// Lane-wise choice between two vectors: lane l is mask(l) >= 0 ? a[mask(l)] : b[...], as __builtin_shufflevector.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using type = Lanes<I...>;
};
// With b's elements counted from L on. keep: a where bit D of the lane is clear, else b. cross: the partner lanes.
template <int D, class V, int... I>
FASTSEQ_INLINE V keep_lanes(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? int(sizeof...(I)) + I : I)...);
}
template <int D, class V, int... I>
FASTSEQ_INLINE V cross_lanes(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? int(sizeof...(I)) + I - D : I + D)...);
}
template <int D, class V, int... I>
FASTSEQ_INLINE V low_lanes(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? int(sizeof...(I)) + I - D : I)...);
}
template <int D, class V, int... I>
FASTSEQ_INLINE V high_lanes(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? int(sizeof...(I)) + I : I + D)...);
}

// Lane l of the result is the sum of all lanes of v[l].
template <class A, int D = 1>
FASTSEQ_INLINE Vec<A> sums_of(Vec<A>* v) {
  constexpr int L = kLanes<A>;
  typename LanesUpTo<L>::type lanes;
  if constexpr (D == L) {
    return v[0];
  } else {
    for (int i = 0; i < L; i += 2 * D)
      v[i] = keep_lanes<D>(v[i], v[i + D], lanes) + cross_lanes<D>(v[i], v[i + D], lanes);
    return sums_of<A, 2 * D>(v);
  }
}

// The L x L matrix of v's lanes, transposed in place.
template <class A, int D = 1>
FASTSEQ_INLINE void transpose(Vec<A>* v) {
  constexpr int L = kLanes<A>;
  typename LanesUpTo<L>::type lanes;
  if constexpr (D < L) {
    for (int i = 0; i < L; ++i)
      if (!(i & D)) {
        Vec<A> low = low_lanes<D>(v[i], v[i + D], lanes);
        v[i + D] = high_lanes<D>(v[i], v[i + D], lanes);
        v[i] = low;
      }
    transpose<A, 2 * D>(v);
  }
}

// One row of activations and the rows of unpacked weights that it meets.
template <class S>
struct Dots {
  const Operand<S>* row;  // [K]
  const S* w;             // of the first lane
  long w_row, K;
};

// Asks for memory that will be read soon. Any address will do, also one past the end.
FASTSEQ_INLINE void prefetch(const void* base, long bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(bytes)));
}

// Lane l = sum_k row[k] * w[l * w_row + k] for the first n lanes, over all `parts`. Rows of w are read in order, a few
// beside each other, and each of them is asked for as many rows before: the prefetchers of the processor lose more at
// the start of a row than they bring, short as rows are.
template <class S>
Vec<Accumulator<S>> dot_rows(const Dots<S>* of, int parts, int n) {
  using A = Accumulator<S>;
  using E = Operand<S>;
  constexpr int L = kLanes<A>, step = L * kTerm<E>;
  constexpr int C = L < 4 ? L : 4;
  Vec<A> sums[L];
  for (int l = 0; l < L; l += C) {
    Vec<A> acc[C];
    for (int c = 0; c < C; ++c) acc[c] = Vec<A>{};
    for (int part = 0; part < parts; ++part) {
      const E* row = of[part].row;
      const long K = of[part].K, ahead = C * of[part].w_row * long(sizeof(S));
      const S* at[C];
      for (int c = 0; c < C; ++c) at[c] = of[part].w + (l + c < n ? l + c : n - 1) * of[part].w_row;
      long k = 0;
      for (; k + step <= K; k += step) {
        Vec<A> a = load_terms(row + k);
        for (int c = 0; c < C; ++c) {
          prefetch(at[c] + k, ahead);
          acc[c] = add_product<E>(acc[c], a, load_terms_as<E>(at[c] + k));
        }
      }
      if (k < K) {
        Vec<A> a = load_terms_n(row + k, int(K - k));
        for (int c = 0; c < C; ++c) acc[c] = add_product<E>(acc[c], a, load_terms_as_n<E>(at[c] + k, int(K - k)));
      }
    }
    for (int c = 0; c < C; ++c) sums[l + c] = acc[c];
  }
  return sums_of<A>(sums);
}
template <class S>
Vec<Accumulator<S>> dot_rows(const Operand<S>* row, const S* w, long w_row, long K, int n) {
  const Dots<S> one{row, w, w_row, K};
  return dot_rows(&one, 1, n);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
