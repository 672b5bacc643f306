// Weights made ready for tile.h, strided views, and the workspace they live in.
#pragma once
#include "recurrent/cpu/recurrent.h"
#include "recurrent/cpu/tile.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class A>
constexpr long vectors_of(long n) {
  return (n + kLanes<A> - 1) / kLanes<A>;
}
template <class A>
constexpr long padded(long n) {
  return vectors_of<A>(n) * kLanes<A>;
}

template <class S>
FASTSEQ_INLINE S* at(const ScanView& v, long t, long b) {
  return static_cast<S*>(v.data) + t * v.t + b * v.b;
}
// n elements `stride` apart, in the accumulator's type.
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> load_strided(const S* p, long stride, int n) {
  using A = Accumulator<S>;
  if (stride == 1) return load_n(p, n);
  A buffer[kLanes<A>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = widen(p[i * stride]);
  return load(buffer);
}
// n terms' elements `stride` apart, or what of S widens to them.
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> load_terms_strided(const S* p, long stride, int n) {
  if constexpr (kTerm<Operand<S>> == 1) {
    return load_strided(p, stride, n);
  } else {
    if (stride == 1) return load_terms_n(p, n);
    alignas(64) S buffer[kLanes<Accumulator<S>> * kTerm<S>] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i * stride];
    return load_terms(buffer);
  }
}
// dst[0..n) = n elements `stride` apart; p null: zeros. Of pairs, an odd one is followed by a zero.
template <class S, class D>
void copy_row(D* dst, const S* p, long stride, long n) {
  using A = Accumulator<S>;
  for (long i = 0; i < n; i += kLanes<A>) {
    int some = int(n - i < kLanes<A> ? n - i : kLanes<A>);
    store_n(dst + i, p ? load_strided(p + i * stride, stride, some) : Vec<A>{}, some);
  }
  if constexpr (kTerm<D> > 1)
    if (n % kTerm<D>) dst[n] = D{};
}

// Hands out pieces of the workspace, each aligned to 64 bytes; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(long n) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (size_t(n) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// Rows gate*H + unit of w [G*H, K] -> a unit vector `v` as run_tile reads it; lanes past H are 0.
template <class S>
void pack_units(Operand<S>* out, const ScanView& w, long row0, int gates, long H, long K, long v) {
  using A = Accumulator<S>;
  using E = Operand<S>;
  constexpr int L = kLanes<A>, D = kTerm<E>;
  const int beside = gates_beside<E>(gates);
  long unit = v * L;
  int n = int(H - unit < L ? H - unit : L);
  for (int g = 0; g < gates; ++g) {
    const long row = row0 + g * H + unit;
    const S* rows = at<S>(w, 0, row);
    E* to = out + (g / beside * whole_terms<E>(K) * beside + g % beside * D) * L;
    for (long k = 0; k < K; k += L * D) {
      int some = int(K - k < L * D ? K - k : L * D);
      Vec<A> block[L];
      FASTSEQ_UNROLL for (int l = 0; l < L; ++l) {
        if (l >= n)
          block[l] = Vec<A>{};
        else
          block[l] = load_terms_strided(rows + l * w.b + k * w.e, w.e, some);
      }
      transpose<A>(block);
      for (int l = 0; l * D < some; ++l) store_terms(to + (k + l * D) * beside * L, block[l]);
    }
  }
}

// Columns of w [K, N] -> column vector `v` of [v][term of k][lane]; lanes past N are 0.
template <class S>
void pack_columns(Operand<S>* out, const ScanView& w, long K, long N, long v) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>, D = kTerm<Operand<S>>;
  int n = int(N - v * L < L ? N - v * L : L);
  const S* column = at<S>(w, 0, 0) + v * L * w.e;
  for (long k = 0; k < K; k += D) {
    Vec<A> elements[D];
    FASTSEQ_UNROLL for (int d = 0; d < D; ++d)
      elements[d] = k + d < K ? load_strided(column + (k + d) * w.b, w.e, n) : Vec<A>{};
    store_terms(out + k * L, terms_from<Operand<S>>(elements));
  }
}

// Rows that are too few to pay for packed columns.
constexpr long kColumnRows = 6;

// out[row][n] (+)= sum_k rows[row][k] w[k][n] for column vectors [first, last) of w [K, N], read along its rows as they
// lie: some of them side by side, so that a sum is loaded and stored once for as many terms. w.e must be 1.
template <class S, class Out>
void multiply_columns(const ScanView& w, const Operand<S>* const* rows, long count, long K, long N, long first,
                      long last, bool add, const Out& out) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>, C = 8;
  for (long k = 0; k < K || k == 0; k += C) {
    const int some = int(K - k < C ? K - k : C);
    A terms[kColumnRows][C] = {};
    const S* at_k[C];
    for (int c = 0; c < C; ++c) {
      at_k[c] = at<S>(w, 0, c < some ? k + c : 0);
      for (long r = 0; r < count && c < some; ++r) terms[r][c] = widen(rows[r][k + c]);
    }
    for (long v = first; v < last; ++v) {
      const int lanes = int(N - v * L < L ? N - v * L : L);
      Vec<A> wv[C];
      FASTSEQ_UNROLL for (int c = 0; c < C; ++c) wv[c] = c < some ? load_n(at_k[c] + v * L, lanes) : Vec<A>{};
      for (long r = 0; r < count; ++r) {
        A* to = out(r, v);
        Vec<A> sum = splat(terms[r][0]) * wv[0];  // apart from the rest: a shorter chain of roundings
        FASTSEQ_UNROLL for (int c = 1; c < C; ++c) sum += splat(terms[r][c]) * wv[c];
        store(to, k > 0 || add ? load(to) + sum : sum);
      }
    }
  }
}

// Elements of a row of K packed weights of Q beside activations of E, brought to whole terms, or where Q is not E words.
template <class E, class Q>
constexpr long packed_row(long K) {
  constexpr int k = __is_same(E, Q) ? kTerm<E> : kWord<Accumulator<E>, Q>;
  return (K + k - 1) / k * k;
}

// One weight matrix as the products want it: packed, of elements Q, or (packed null) unpacked, of S. E: what is multiplied.
template <class S, class E = Operand<S>, class Q = E>
struct Weights {
  using A = Accumulator<S>;
  const Q* packed = nullptr;
  long stride = 0;      // of a packed unit vector, of whole terms or words
  const S* raw = nullptr;
  long raw_row = 0;     // between rows of w
  long H = 0, K = 0;    // units a gate, and what is summed over
  const A* scale = nullptr;  // null, or [G][scale_stride] factors of packed rows
  long scale_stride = 0;
  const int32_t* start = nullptr;  // of bytes: likewise, what their sums start from
  const A* row_scale = nullptr;    // of bytes: [count] factors of the rows
  bool one_chain = false;    // sums do not depend on how many rows there are (packed ones alone)
};

// A tile's rows and unit vectors, each by itself.
template <int G, class E, class W>
void multiply_one_by_one(const Tile<E, W>& all, int width) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>;
  for (int r = 0; r < all.count; ++r)
    for (int nb = 0; nb < width; ++nb) {
      A* out = all.out[r] + nb * L;
      Tile<E, W> one = all;
      one.rows += r, one.w += nb * all.w_stride, one.out = &out, one.count = 1;
      if (one.init) one.init += nb * L;
      if (one.scale) one.scale += nb * L;
      one_chain_function<E, W, G>()(one);
    }
}

// Rows divided as evenly as possible into tiles, times unit vectors [first, last): for each tile, the product with
// all G gates of `width` vectors, then done(first row, rows, first vector, width).
template <int G, class S, class E, class Q, class Out, class Done>
FASTSEQ_INLINE void multiply(const Weights<S, E, Q>& w, const E* const* rows, long count, long first, long last,
                             const Accumulator<S>* init, long stride, bool add, const Out& out, const Done& done) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>;
  if (count == 0) return;
  for (long v = first; v < last; v += tile_width(G)) {
    int width = int(last - v < tile_width(G) ? last - v : tile_width(G));
    int most = rows_of_product<E>(G * width);
    long tiles = (count + most - 1) / most, each = count / tiles, larger = count % tiles;
    long row = 0;
    for (long i = 0; i < tiles; ++i) {
      int n = int(each + (i < larger));
      A* outs[kMaxRows];
      for (int r = 0; r < n; ++r) outs[r] = out(row + r, v);
      if (w.packed) {
        const Tile<E, Q> tile{rows + row * kParts<E>, w.packed + v * w.stride, w.stride, __is_same(E, Q) ? terms_of<E>(w.K) : w.K,
                              init ? init + v * L : nullptr, outs, stride, add,
                              w.scale ? w.scale + v * L : nullptr, w.scale_stride, n * kParts<E>,
                              w.start ? w.start + v * L : nullptr, w.row_scale ? w.row_scale + row : nullptr};
        if (w.one_chain && !kMatrix<E> && kTerm<E> < 4 && chains(n * G * width) > 1)
          multiply_one_by_one<G>(tile, width);
        else
          tile_function<E, Q, G>(n * kParts<E>, width)(tile);
      } else if constexpr (__is_same(E, Operand<S>)) {
        for (int g = 0; g < G; ++g)
          for (int nb = 0; nb < width; ++nb) {
            const long unit = (v + nb) * L, at = g * stride + nb * L;
            const int some = int(w.H - unit < L ? w.H - unit : L);
            for (int r = 0; r < n; r += kDotRows) {
              const Dots<S> one{rows + row + r, w.raw + (g * w.H + unit) * w.raw_row, w.raw_row, w.K};
              dot_rows(&one, 1, some, n - r < kDotRows ? n - r : kDotRows, [&](int i, Vec<A> sum) {
                if (init) sum += load(init + v * L + at);
                if (add) sum += load(outs[r + i] + at);
                store(outs[r + i] + at, sum);
              });
            }
          }
      }
      done(row, n, v, width);
      row += n;
    }
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
