// Weights made ready for recurrent_tile.h, strided views, and the workspace they live in.
#pragma once
#include "recurrent.h"
#include "recurrent_tile.h"

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
// dst[0..n) = n elements `stride` apart; p null: zeros.
template <class S>
void copy_row(Accumulator<S>* dst, const S* p, long stride, long n) {
  using A = Accumulator<S>;
  for (long i = 0; i < n; i += kLanes<A>) {
    int some = int(n - i < kLanes<A> ? n - i : kLanes<A>);
    store_n(dst + i, p ? load_strided(p + i * stride, stride, some) : Vec<A>{}, some);
  }
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

// Rows gate*H + unit of w [G*H, K] -> unit vector `v` of [v][k][gate][lane]; lanes past H are 0.
template <class S>
void pack_units(Accumulator<S>* out, const ScanView& w, long row0, int gates, long H, long K, long v) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>;
  long unit = v * L;
  int n = int(H - unit < L ? H - unit : L);
  for (int g = 0; g < gates; ++g) {
    const S* rows = at<S>(w, 0, row0 + g * H + unit);
    A* to = out + g * L;
    for (long k = 0; k < K; k += L) {
      int some = int(K - k < L ? K - k : L);
      Vec<A> block[L];
      for (int l = 0; l < L; ++l)
        block[l] = l < n ? load_strided(rows + l * w.b + k * w.e, w.e, some) : Vec<A>{};
      transpose<A>(block);
      for (int l = 0; l < some; ++l) store(to + (k + l) * gates * L, block[l]);
    }
  }
}

// Columns of w [K, N] -> column vector `v` of [v][k][lane]; lanes past N are 0.
template <class S>
void pack_columns(Accumulator<S>* out, const ScanView& w, long K, long N, long v) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>;
  int n = int(N - v * L < L ? N - v * L : L);
  const S* column = at<S>(w, 0, 0) + v * L * w.e;
  for (long k = 0; k < K; ++k) store(out + k * L, load_strided(column + k * w.b, w.e, n));
}

// One weight matrix as the products want it: packed, or (packed null) as it lies.
template <class S>
struct Weights {
  using A = Accumulator<S>;
  A* packed = nullptr;
  long stride = 0;      // of a packed unit vector
  const S* raw = nullptr;
  long raw_row = 0;     // between rows of w
  long H = 0, K = 0;    // units a gate, and what is summed over
};

// Rows divided as evenly as possible into tiles, times unit vectors [first, last): for each tile, the product with
// all G gates of `width` vectors, then done(first row, rows, first vector, width).
template <int G, class S, class Out, class Done>
FASTSEQ_INLINE void multiply(const Weights<S>& w, const Accumulator<S>* const* rows, long count, long first, long last,
                             const Accumulator<S>* init, long stride, bool add, const Out& out, const Done& done) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>;
  if (count == 0) return;
  for (long v = first; v < last; v += tile_width(G)) {
    int width = int(last - v < tile_width(G) ? last - v : tile_width(G));
    int most = rows_of_tile(G * width);
    long tiles = (count + most - 1) / most, each = count / tiles, larger = count % tiles;
    long row = 0;
    for (long i = 0; i < tiles; ++i) {
      int n = int(each + (i < larger));
      A* outs[kMaxRows];
      for (int r = 0; r < n; ++r) outs[r] = out(row + r, v);
      if (w.packed) {
        Tile<A> tile{rows + row, w.packed + v * w.stride, w.stride, w.K, init ? init + v * L : nullptr, outs, stride,
                     add};
        tile_function<A, G>(n, width)(tile);
      } else {
        for (int r = 0; r < n; ++r)
          for (int g = 0; g < G; ++g)
            for (int nb = 0; nb < width; ++nb) {
              long unit = (v + nb) * L, at = g * stride + nb * L;
              int some = int(w.H - unit < L ? w.H - unit : L);
              Vec<A> sum = dot_rows(rows[row + r], w.raw + (g * w.H + unit) * w.raw_row, w.raw_row, w.K, some);
              if (init) sum += load(init + v * L + at);
              if (add) sum += load(outs[r] + at);
              store(outs[r] + at, sum);
            }
      }
      done(row, n, v, width);
      row += n;
    }
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
