// Products of the scan: a few rows of activations times all gates of a few vectors of units, held in registers.
//
// Packed weights lie as gates_beside (operand.h) says, so a tile streams them once for all of its rows. Unpacked
// ones are read unpacked, as dot products along k: no preparation, for calls too short to pay for one.
//
// Weights that were packed beforehand, of a type smaller than the activations', lie likewise with words of several k in
// the place of terms (operand.h).
#pragma once
#include "core/lanes.h"
#include "recurrent/cpu/operand.h"

namespace fastseq {
namespace FASTSEQ_ISA {

constexpr int kMaxRows = 16;    // rows whose results are handed on together
constexpr int kMaxVectors = 4;  // gates * unit vectors of a tile

// A number in a type.
template <int kAt>
struct Number {
  static constexpr int at = kAt;
};

constexpr int kSums = kVectorRegisters >= 32 ? 24 : 12;  // vectors of sums that leave registers for the operands
constexpr int rows_of_tile(int vectors) {
  return kVectorRegisters >= 32 ? (vectors >= 4 ? 6 : 8) : (vectors >= 4 ? 6 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8);
}
// How many of its vectors a tile walks along k with. Where registers do not hold the sums of all, it walks again, with the
// others.
constexpr int vectors_at_once(int rows, int vectors) {
  return kVectorRegisters >= 32 || rows * vectors <= kSums ? vectors : 2;
}
// How many unit vectors go into one tile beside each other.
constexpr int tile_width(int gates) { return kMaxVectors / gates; }

template <class E, class W = E>
struct Tile {
  using A = Accumulator<E>;
  const E* const* rows;  // [R] pointers to K activations, the parts of a row side by side
  const W* w;            // packed weights of the first unit vector
  long w_stride;         // to the next unit vector
  long K;                // terms; of words, elements
  const A* init;         // null (zero), or [gate][..] biases for all rows, a gate `stride` apart
  A* const* out;         // [R / parts] pointers to [gate][..] results, a gate `stride` apart
  long stride;
  bool add;              // to what is in out; then there is no init
  const A* scale = nullptr;  // null, or [gate][..] factors of all sums, a gate `scale_stride` apart
  long scale_stride = 0;
  int count = 0;             // R, which only run_matrix does not know from its type
  const int32_t* start = nullptr;  // of bytes: [gate][..] what sums start from, a gate `scale_stride` apart
  const A* row_scale = nullptr;    // of bytes: [R / 2] factors of a row's sums
};

// How many sums a result is kept in: a single chain of additions leaves the units idle where there are few results.
// Sums that must not depend on the number of rows are all of one chain.
constexpr int chains(int results, bool one_chain = false) {
  if (kVectorRegisters >= 32) return one_chain || results >= 12 ? 1 : results >= 6 ? 2 : 4;
  return one_chain || 2 * results > kSums ? 1 : 4 * results > kSums ? 2 : 4;
}

// The sums that have this place in `scale`, before their first product.
template <class E, class W>
FASTSEQ_INLINE Vec<Sum<E>> first_sums(const Tile<E, W>& t, long at) {
  if constexpr (kTerm<E> == 4)
    return load(t.start + at);
  else
    return Vec<Sum<E>>{};
}
// Row r's sums, of its parts, times their factors.
template <class E, class W>
FASTSEQ_INLINE Vec<Accumulator<E>> scaled(const Tile<E, W>& t, const Vec<Sum<E>>* sums, long apart, int r, long at) {
  if constexpr (kTerm<E> == 4) {
    const Vec<float> high = __builtin_convertvector(sums[0], Vec<float>), low = __builtin_convertvector(sums[apart], Vec<float>);
    return (high * 256.0f + low) * (splat(t.row_scale[r]) * load(t.scale + at));
  } else if constexpr (!__is_same(E, W)) {
    return t.scale ? *sums * load(t.scale + at) : *sums;
  } else {
    return *sums;
  }
}

// out[r][g][lanes of nb] = scale * sum + init, or + out, for N of a row's G * NB vectors from kFirst on.
template <class E, class W, int NB, int kFirst, int R, int N>
FASTSEQ_INLINE void finish_tile(const Tile<E, W>& t, const Vec<Sum<E>> (&sums)[R][N]) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>;
  const bool more = t.init || t.add;
  FASTSEQ_UNROLL for (int r = 0; r < R / kParts<E>; ++r) {
    A* out = t.out[r];
    FASTSEQ_UNROLL for (int n = 0; n < N; ++n) {
      const int g = (kFirst + n) / NB, nb = (kFirst + n) % NB;
      Vec<A> sum = scaled(t, &sums[r * kParts<E>][n], N, r, g * t.scale_stride + nb * L);
      const long at = g * t.stride + nb * L;
      if (more) sum += load((t.add ? out : t.init) + at);
      store(out + at, sum);
    }
  }
}

// All elements of the words at w[n] + n * apart, or the first `some`, into the sums: chain `u` takes what is its own.
template <class E, class W, int R, int NB, int kFirst, int N, int U, int kAt = 0>
FASTSEQ_INLINE void add_words(Vec<Accumulator<E>> (&acc)[U][R][N], const W* const (&w)[NB], long at, long apart,
                              const E* const* rows, long k, int u, int some) {
  if constexpr (kAt < kWord<Accumulator<E>, W>) {
    if (kAt >= some) return;
    Vec<Accumulator<E>> wv[N];
    FASTSEQ_UNROLL for (int n = 0; n < N; ++n) {
      const W* p = w[(kFirst + n) % NB] + at + (kFirst + n) / NB * apart;
      // Where sums fill the registers, words are read again from L1 for each of their elements. GCC would keep them, as it
      // takes two equal statements for one: so each has its number.
      if constexpr (R * N + 4 > kSums) asm("# %1" : "+r"(p) : "i"(kAt));
      wv[n] = widen_word<W, kAt>(load_words(p));
    }
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
      Vec<Accumulator<E>> a = splat(rows[r][k + kAt]);
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[(u + kAt) % U][r][n] += a * wv[n];
    }
    add_words<E, W, R, NB, kFirst, N, U, kAt + 1>(acc, w, at, apart, rows, k, u, some);
  }
}

// The same of words: out[r][g][lanes of nb] = scale * sum_k rows[r][k] * w[nb][k][g] + ...
template <class E, class W, int R, int G, int NB, bool kOneChain, int kFirst = 0>
void run_words(const Tile<E, W>& t) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>, D = kWord<A, W>, N = vectors_at_once(R, G * NB), U = chains(R * N, kOneChain);
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
    FASTSEQ_UNROLL for (int m = 0; m < M; ++m)
      add_words<E, W, R, NB, kFirst>(acc, w, (k + m * D) * G * L, D * L, rows, k + m * D, m * D, D);
  for (; k < t.K; k += D) add_words<E, W, R, NB, kFirst>(acc, w, k * G * L, D * L, rows, k, 0, int(t.K - k));
  FASTSEQ_UNROLL for (int u = 1; u < U; ++u)
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[0][r][n] += acc[u][r][n];
  finish_tile<E, W, NB, kFirst>(t, acc[0]);
  if constexpr (kFirst + N < G * NB) run_words<E, W, R, G, NB, kOneChain, kFirst + N>(t);
}

// out[r][g][lanes of nb] = init[g][nb] + sum_k rows[r][k] * w[nb][k][g]
template <class E, int R, int G, int NB, bool kOneChain, int kFirst = 0>
void run_tile(const Tile<E>& t) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>, D = kTerm<E>;
  constexpr int N = vectors_at_once(R, G * NB), U = chains(R * N, kOneChain);
  auto place = [&](int n) __attribute__((always_inline)) { return (kFirst + n) / NB * t.scale_stride + (kFirst + n) % NB * L; };
  Vec<Sum<E>> acc[U][R][N];
  const E* rows[R];
  const E* w[NB];
  FASTSEQ_UNROLL for (int nb = 0; nb < NB; ++nb) w[nb] = t.w + nb * t.w_stride;
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r) rows[r] = t.rows[r];
  FASTSEQ_UNROLL for (int u = 0; u < U; ++u)
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n)
        acc[u][r][n] = u == 0 ? first_sums(t, place(n)) : Vec<Sum<E>>{};
  auto weights_at = [&](long k, int n) __attribute__((always_inline)) {
    constexpr int kBeside = gates_beside<E>(G);
    const int g = (kFirst + n) / NB;
    return load_terms(w[(kFirst + n) % NB] + ((g / kBeside * t.K + k) * kBeside + g % kBeside) * L * D);
  };
  long k = 0;
  for (; k + U <= t.K; k += U)
    FASTSEQ_UNROLL for (int u = 0; u < U; ++u) {
      Vec<A> wv[N];
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) wv[n] = weights_at(k + u, n);
      FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
        Vec<A> a = splat_term(rows[r] + (k + u) * D);
        FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[u][r][n] = add_product<E>(acc[u][r][n], a, wv[n]);
      }
    }
  if constexpr (U > 1)
    for (; k < t.K; ++k) {
      Vec<A> wv[N];
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) wv[n] = weights_at(k, n);
      FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
        Vec<A> a = splat_term(rows[r] + k * D);
        FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[0][r][n] = add_product<E>(acc[0][r][n], a, wv[n]);
      }
    }
  FASTSEQ_UNROLL for (int u = 1; u < U; ++u)
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int n = 0; n < N; ++n) acc[0][r][n] += acc[u][r][n];
  finish_tile<E, E, NB, kFirst>(t, acc[0]);
  if constexpr (kFirst + N < G * NB) run_tile<E, R, G, NB, kOneChain, kFirst + N>(t);
}

// Pairs of bfloat16, and bytes, go through the chip's matrix tiles where it has them: a tile function then takes up to 16 rows.
#if defined(FASTSEQ_TILES)
template <class E>
constexpr bool kMatrix = kTerm<E> > 1;

inline thread_local int matrix_shape = 0;  // of the configuration that this thread has loaded; 0: none

// A thread that multiplies gives the tiles back before it leaves: the system saves what is in them at every switch.
struct MatrixScope {
  ~MatrixScope() {
    if (matrix_shape) tile_release();
    matrix_shape = 0;
  }
};

// Tiles 0 to 3 hold the sums, of a gate and unit vector each; 4 and 5 rows and weights of 16 terms, 6 and 7 of the
// `rest` that K leaves.
inline void configure_matrix(int rows, int rest, int row_bytes) {
  const int shape = rows * 16 + rest;
  if (shape == matrix_shape) return;
  TileShapes shapes;
  for (int sum = 0; sum < kMaxVectors; ++sum) shapes.shape(sum, rows, row_bytes);
  shapes.shape(4, rows, 64);
  shapes.shape(5, 16, row_bytes);
  if (rest) {
    shapes.shape(6, rows, 4 * rest);
    shapes.shape(7, rest, row_bytes);
  }
  tile_configure(shapes);
  matrix_shape = shape;
}

// body(integral constant) for 0 .. N-1: a tile's number is part of the instruction.
template <int N, int kAt = 0, class Body>
FASTSEQ_INLINE void each_tile(const Body& body) {
  if constexpr (kAt < N) {
    body(Number<kAt>{});
    each_tile<N, kAt + 1>(body);
  }
}

template <class E, int G, int NB>
void run_matrix(const Tile<E>& t) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>, N = G * NB, kTerms = 16, D = kTerm<E>;
  const int R = t.count, rest = int(t.K % kTerms);
  configure_matrix(R, rest, L * int(sizeof(A)));
  // Rows that lie evenly are read from there; others (a row was reset, or has ended) are brought together first.
  const uintptr_t first = reinterpret_cast<uintptr_t>(t.rows[0]);
  const uintptr_t apart = R > 1 ? reinterpret_cast<uintptr_t>(t.rows[1]) - first : 0;
  bool even = true;
  for (int r = 2; r < R; ++r) even = even && reinterpret_cast<uintptr_t>(t.rows[r]) == first + uintptr_t(r) * apart;
  alignas(64) E gathered[kMaxRows * kTerms * D];
  auto rows_at = [&](long k, int terms) {
    if (even) return t.rows[0] + k * D;
    for (int r = 0; r < R; ++r) std::memcpy(gathered + r * kTerms * D, t.rows[r] + k * D, size_t(terms) * D * sizeof(E));
    return static_cast<const E*>(gathered);
  };
  const long stride = even ? long(apart) : long(kTerms * D * sizeof(E));
  auto weights_at = [&](long k, int n) { return t.w + n % NB * t.w_stride + (k * G + n / NB) * L * D; };
  constexpr long w_stride = G * L * D * long(sizeof(E));
  auto place = [&](int n) { return (n / NB) * t.scale_stride + (n % NB) * L; };
  auto multiply = [](auto n, auto rows, auto weights) {
    if constexpr (kTerm<E> == 4)
      tile_multiply_bytes<n.at, rows.at, weights.at>();
    else
      tile_multiply<n.at, rows.at, weights.at>();
  };
  each_tile<N>([&](auto n) {
    if constexpr (kTerm<E> == 4)
      tile_load<n.at>(t.start + place(n.at), 0);
    else
      tile_zero<n.at>();
  });
  long k = 0;
  for (; k + kTerms <= t.K; k += kTerms) {
    tile_load<4>(rows_at(k, kTerms), stride);
    each_tile<N>([&](auto n) {
      tile_load<5>(weights_at(k, n.at), w_stride);
      multiply(n, Number<4>{}, Number<5>{});
    });
  }
  if (rest) {
    tile_load<6>(rows_at(k, rest), stride);
    each_tile<N>([&](auto n) {
      tile_load<7>(weights_at(k, n.at), w_stride);
      multiply(n, Number<6>{}, Number<7>{});
    });
  }
  alignas(64) Sum<E> sums[N][kMaxRows * L];
  each_tile<N>([&](auto n) { tile_store<n.at>(sums[n.at], L * long(sizeof(A))); });
  for (int r = 0; r < R / kParts<E>; ++r)
    for (int n = 0; n < N; ++n) {
      const long at = (n / NB) * t.stride + (n % NB) * L;
      Vec<Sum<E>> parts[kParts<E>];
      for (int i = 0; i < kParts<E>; ++i) parts[i] = load(sums[n] + (r * kParts<E> + i) * L);
      Vec<A> sum = scaled(t, parts, 1, r, place(n));
      if (t.init || t.add) sum += load((t.add ? t.out[r] : t.init) + at);
      store(t.out[r] + at, sum);
    }
}
#else
template <class E>
constexpr bool kMatrix = false;
struct MatrixScope {};
template <class E, int G, int NB>
void run_matrix(const Tile<E>& t);  // never called
#endif

// How many rows of activations one call of a tile function takes.
template <class E>
constexpr int rows_of_product(int vectors) {
  return (kMatrix<E> ? kMaxRows : rows_of_tile(vectors)) / kParts<E>;
}

template <class E, class W = E>
using TileFunction = void (*)(const Tile<E, W>&);

template <class E, class W, int G, int NB, int R = kParts<E>>
TileFunction<E, W> tile_function(int rows) {
  if constexpr (kMatrix<E>)
    return &run_matrix<E, G, NB>;
  else if constexpr (R > rows_of_tile(G * NB))
    return nullptr;
  else if (rows != R)
    return tile_function<E, W, G, NB, R + kParts<E>>(rows);
  else if constexpr (__is_same(E, W))
    return &run_tile<E, R, G, NB, false>;
  else
    return &run_words<E, W, R, G, NB, false>;
}
// A row and unit vector in one chain.
template <class E, class W, int G>
constexpr TileFunction<E, W> one_chain_function() {
  if constexpr (__is_same(E, W))
    return &run_tile<E, kParts<E>, G, 1, true>;
  else
    return &run_words<E, W, 1, G, 1, true>;
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

// Rows of activations and the rows of unpacked weights that they meet.
template <class S>
struct Dots {
  const Operand<S>* const* rows;  // each [K]
  const S* w;                     // of the first lane
  long w_row, K;
};

// Asks for memory that will be read soon, into the first cache (3) or the second (2). Any address will do, also one that
// is nobody's.
template <int kCache = 3>
FASTSEQ_INLINE void prefetch(const void* base, long bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(bytes)), 0, kCache);
}

// Rows of activations that meet a row of unpacked weights while it is in registers.
constexpr int kDotRows = kVectorRegisters >= 32 ? 6 : 2;

template <class A, int R>
struct RowSums {
  Vec<A> of[R];  // a row's
};

// Lane l of a row's sum = sum_k row[k] * w[l * w_row + k] for the first n lanes, over all `parts`, one after the other. Rows
// of w are read in order, a few beside each other. The processor's own prefetchers keep up within a row and lose time at
// the start of the next, so that start is asked for, as many rows before; whole rows asked for so early would drive each
// other out of L1.
template <class S, int R>
RowSums<Accumulator<S>, R> dot_rows(const Dots<S>* of, int parts, int n) {
  using A = Accumulator<S>;
  using E = Operand<S>;
  constexpr int L = kLanes<A>, step = L * kTerm<E>;
  constexpr int C = L < 4 ? L : 4;
  constexpr long kLine = 64 / long(sizeof(S)), kStart = 4 * kLine;  // elements of a cache line, of a row's start
  // The sums of C rows of w from l on and one part.
  auto add = [&](const Dots<S>& of, int l, Vec<A> (&acc)[R][C]) __attribute__((always_inline)) {
    const E* row[R];
    const S* at[C];
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r) row[r] = of.rows[r];
    FASTSEQ_UNROLL for (int c = 0; c < C; ++c) at[c] = of.w + (l + c < n ? l + c : n - 1) * of.w_row;
    const long whole = of.K - of.K % step;
    FASTSEQ_UNROLL for (long k = 0; k < kStart; k += kLine)
      FASTSEQ_UNROLL for (int c = 0; k < whole && c < C; ++c) prefetch(at[c] + k, C * of.w_row * long(sizeof(S)));
    for (long k = 0; k < whole; k += step) {
      Vec<A> wv[C];
      FASTSEQ_UNROLL for (int c = 0; c < C; ++c) wv[c] = load_terms_as<E>(at[c] + k);
      FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
        Vec<A> a = load_terms(row[r] + k);
        FASTSEQ_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = add_product<E>(acc[r][c], a, wv[c]);
      }
    }
    if (whole == of.K) return;
    const int rest = int(of.K - whole);
    Vec<A> wv[C];
    FASTSEQ_UNROLL for (int c = 0; c < C; ++c) wv[c] = load_terms_as_n<E>(at[c] + whole, rest);
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
      Vec<A> a = load_terms_n(row[r] + whole, rest);
      FASTSEQ_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = add_product<E>(acc[r][c], a, wv[c]);
    }
  };
  Vec<A> sums[R][L / C];  // lanes of C rows of w, in part summed
  if constexpr (R == 1) {  // bound by reading w: one matrix after the other
    FASTSEQ_UNROLL for (int i = 0; i < L / C; ++i) sums[0][i] = Vec<A>{};
    for (int part = 0; part < parts; ++part)
      FASTSEQ_UNROLL for (int l = 0; l < L; l += C) {
        Vec<A> acc[R][C] = {};
        add(of[part], l, acc);
        sums[0][l / C] += sums_of<A, C>(acc[0]);
      }
  } else {  // by the sums and what it takes to bring their lanes together
    FASTSEQ_UNROLL for (int l = 0; l < L; l += C) {
      Vec<A> acc[R][C] = {};
      for (int part = 0; part < parts; ++part) add(of[part], l, acc);
      FASTSEQ_UNROLL for (int r = 0; r < R; ++r) sums[r][l / C] = sums_of<A, C>(acc[r]);
    }
  }
  RowSums<A, R> out;
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r) out.of[r] = sums_of<A, L / C, C>(sums[r]);
  return out;
}
// The same of 1 to kDotRows rows, each handed to done(row, sum).
template <class S, int R = 1, class Done>
FASTSEQ_INLINE void dot_rows(const Dots<S>* of, int parts, int n, int rows, const Done& done) {
  if constexpr (R < kDotRows)
    if (rows != R) return dot_rows<S, R + 1>(of, parts, n, rows, done);
  const RowSums<Accumulator<S>, R> sums = dot_rows<S, R>(of, parts, n);
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r) done(r, sums.of[r]);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
