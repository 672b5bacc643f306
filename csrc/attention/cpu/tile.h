// The products of the attention kernels, all of one form: C[rows, lanes] from A[rows, depth] B[depth, lanes].
//
// B and C are rows of whole vectors. A is broadcast element by element, so it may lie in either order and at any row
// stride: Q, K, V, dO are used where they are. A tile of C stays in registers over the whole depth. On chips with AMX pairs
// of bfloat16 that lie side by side in A are multiplied by its tiles.
#pragma once
#include "attention/cpu/math.h"
#include "core/tiles.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;

// What one step of depth is: an element of the accumulator's type ...
template <class Acc>
struct Fma {
  using A = Acc;
  using Element = Acc;
  static constexpr int depth = 1;
  static FASTSEQ_INLINE Vec<A> load_b(const Element* p) { return load(p); }
  static FASTSEQ_INLINE Vec<A> broadcast_a(const char* p) {
    A v;
    std::memcpy(&v, p, sizeof v);
    return splat<A>(v);
  }
  static FASTSEQ_INLINE Vec<A> multiply_add(Vec<A> c, Vec<A> a, Vec<A> b) { return c + a * b; }
};
// ... or a pair of bfloat16, products summed in float.
struct Dot {
  using A = float;
  using Element = uint32_t;
  static constexpr int depth = 2;
#if defined(__AVX512BF16__)
  static FASTSEQ_INLINE __m512i load_b(const Element* p) { return _mm512_loadu_si512(p); }
  static FASTSEQ_INLINE __m512i broadcast_a(const char* p) {
    int v;
    std::memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
  }
  static FASTSEQ_INLINE Vec<A> multiply_add(Vec<A> c, __m512i a, __m512i b) {
    return (Vec<A>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
#endif
};

// What becomes of C: overwritten; overwritten, with the maximum over its rows kept; added to; scaled by row, added to.
enum class Into { store, store_max, add, scale_add };

template <class Op>
struct Operands {
  using A = typename Op::A;
  const char* a;
  long a_row, a_step;  // bytes
  const typename Op::Element* b;
  long b_row;  // elements
  A* c;
  long c_row;
  const A* scale = nullptr;  // [rows]
  A* max = nullptr;          // [lanes]
};

template <class Op, Into kInto, int R, int N>
void tile(const Operands<Op>& x, long depth) {
  using A = typename Op::A;
  constexpr int L = kLanes<A>;
  Vec<A> acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = Vec<A>{};
  }
  const char* a = x.a;
  const typename Op::Element* b = x.b;
  const long a_row = x.a_row, a_step = x.a_step, b_row = x.b_row;
  const long a_row3 = 3 * a_row, a_row5 = 5 * a_row;
  for (long k = 0; k < depth; ++k, a += a_step, b += b_row) {
    decltype(Op::load_b(b)) bv[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) bv[n] = Op::load_b(b + n * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      auto av = Op::broadcast_a(a + (r == 3 ? a_row3 : r == 5 ? a_row5 : r * a_row));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = Op::multiply_add(acc[r][n], av, bv[n]);
    }
  }
  if constexpr (kInto == Into::store_max) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Vec<A> m = load(x.max + n * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) m = maximum<A>(acc[r][n], m);
      store(x.max + n * L, m);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    A* c = x.c + r * x.c_row;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      if constexpr (kInto == Into::add) acc[r][n] += load(c + n * L);
      if constexpr (kInto == Into::scale_add) acc[r][n] += load(c + n * L) * x.scale[r];
      store(c + n * L, acc[r][n]);
    }
  }
}

#if defined(FASTSEQ_TILES) && defined(__AVX512BF16__)
constexpr bool kHasTiles = true;

// A thread that multiplies has AMX's tiles while it lives: 0 to 3 hold C, 4 and 5 A, 6 and 7 B, each 16 rows of 64 bytes.
struct TileScope {
  TileScope() {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) shapes.shape(i, 16, 64);
    tile_configure(shapes);
  }
  ~TileScope() { tile_release(); }
};

// body(integral constant) for 0 .. N-1: a tile's number is part of the instruction.
template <int N, int kAt = 0, class Body>
FASTSEQ_INLINE void each_tile(const Body& body) {
  if constexpr (kAt < N) {
    body(std::integral_constant<int, kAt>{});
    each_tile<N, kAt + 1>(body);
  }
}

// R x N tiles of C, of which `rows` rows are there. rest: the last terms of B, N * 16 lanes a row, where whole tiles leave
// some; zeros follow them.
template <int R, int N>
void matrix_tile(const Operands<Dot>& x, long rows, long depth, const uint32_t* rest, bool add) {
  constexpr long kSide = 16, kBytes = 64;
  const bool whole = rows == R * kSide;
  alignas(64) char staged[R * kSide * kBytes];
  const auto stage = [&](long k, long terms) {
    const __mmask16 there = __mmask16((1u << terms) - 1);
    for (long r = 0; r < R * kSide; ++r)
      _mm512_store_si512(staged + r * kBytes,
                         _mm512_maskz_loadu_epi32(r < rows ? there : 0, x.a + (r < rows ? r : 0) * x.a_row + k * 4));
  };
  const auto multiply = [](const char* a, long a_row, const uint32_t* b, long b_row) {
    each_tile<R>([&](auto r) { tile_load<4 + r()>(a + r() * kSide * a_row, a_row); });
    each_tile<N>([&](auto n) { tile_load<6 + n()>(b + n() * kSide, b_row * 4); });
    each_tile<R * N>([](auto i) { tile_multiply<i(), 4 + i() / N, 6 + i() % N>(); });
  };
  const auto c = [&](int i) { return x.c + i / N * kSide * x.c_row + i % N * kSide; };
  each_tile<R * N>([&](auto i) {
    if (add && whole)
      tile_load<i()>(c(i()), x.c_row * 4);
    else
      tile_zero<i()>();
  });
  long k = 0;
  for (; k + kSide <= depth; k += kSide) {
    if (!whole) stage(k, kSide);
    multiply(whole ? x.a + k * 4 : staged, whole ? x.a_row : kBytes, x.b + k * x.b_row, x.b_row);
  }
  if (rest) stage(k, depth - k), multiply(staged, kBytes, rest, N * kSide);
  if (whole) return each_tile<R * N>([&](auto i) { tile_store<i()>(c(i()), x.c_row * 4); });
  alignas(64) float sums[R * kSide * N * kSide];
  each_tile<R * N>([&](auto i) {
    tile_store<i()>(sums + i() / N * kSide * N * kSide + i() % N * kSide, N * kBytes);
  });
  for (long r = 0; r < rows; ++r)
    for (int n = 0; n < N; ++n) {
      float* const to = x.c + r * x.c_row + n * kSide;
      const Vec<float> sum = load(sums + (r * N + n) * kSide);
      store(to, add ? sum + load(to) : sum);
    }
}

template <Into kInto>
void matrix_product(Operands<Dot> x, long rows, int vectors, long depth) {
  static_assert(kInto != Into::scale_add);
  constexpr long kSide = 16;
  const long left = depth % kSide;
  for (int v = 0; v < vectors; v += 2, x.b += 2 * kSide, x.c += 2 * kSide) {
    const bool two = vectors - v > 1;
    const long lanes = two ? 2 * kSide : kSide;
    alignas(64) uint32_t rest[kSide * 2 * kSide];
    if (left) {
      std::memset(rest, 0, sizeof rest);
      for (long k = 0; k < left; ++k)
        std::memcpy(rest + k * lanes, x.b + (depth - left + k) * x.b_row, size_t(lanes) * 4);
    }
    Operands<Dot> y = x;
    for (long row = 0; row < rows; row += 2 * kSide, y.a += 2 * kSide * x.a_row, y.c += 2 * kSide * x.c_row) {
      const long count = least(2 * kSide, rows - row);
      const auto run = count > kSide ? (two ? matrix_tile<2, 2> : matrix_tile<2, 1>)
                                     : (two ? matrix_tile<1, 2> : matrix_tile<1, 1>);
      run(y, count, depth, left ? rest : nullptr, kInto == Into::add);
      if constexpr (kInto == Into::store_max)
        for (long n = 0; n < lanes; n += kSide) {
          Vec<float> top = load(x.max + v * kSide + n);
          for (long r = 0; r < count; ++r) top = maximum<float>(load(y.c + r * y.c_row + n), top);
          store(x.max + v * kSide + n, top);
        }
    }
  }
}
#else
constexpr bool kHasTiles = false;
struct TileScope {};
#endif

// Rows of C that are worth a product of their own where not all are wanted; a product by AMX's tiles, whose A has rows.
template <class Op>
constexpr bool kMatrix = kHasTiles && std::is_same_v<Op, Dot>;
template <class Op>
constexpr int kRowsAtOnce = kMatrix<Op> ? 32 : kTileRows;

// rows x (vectors * lanes) of C, in tiles of nearly equal size.
template <class Op, Into kInto>
void product(Operands<Op> x, long rows, int vectors, long depth) {
#if defined(FASTSEQ_TILES) && defined(__AVX512BF16__)
  if constexpr (kMatrix<Op> && kInto != Into::scale_add)
    if (x.a_step == long(sizeof(uint32_t))) return matrix_product<kInto>(x, rows, vectors, depth);
#endif
  using A = typename Op::A;
  using Tile = void (*)(const Operands<Op>&, long);
#define FASTSEQ_ROW(n)                                                                                         \
  {                                                                                                            \
    tile<Op, kInto, 1, n>, tile<Op, kInto, 2, n>, tile<Op, kInto, 3, n>, tile<Op, kInto, 4, n>,                \
        tile<Op, kInto, 5, n>, tile<Op, kInto, 6, n>                                                           \
  }
  static constexpr Tile tiles[kTileVectors][kTileRows] = {
      FASTSEQ_ROW(1),
      FASTSEQ_ROW(2),
#if defined(__AVX512F__) || defined(__aarch64__)
      FASTSEQ_ROW(3),
      FASTSEQ_ROW(4),
#endif
  };
#undef FASTSEQ_ROW
  if (rows <= 0) return;
  const long row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int column_tiles = (vectors + kTileVectors - 1) / kTileVectors;
  for (int j = 0, v = 0; j < column_tiles; ++j) {
    const int n = (vectors - v) / (column_tiles - j);
    Operands<Op> y = x;
    y.b += v * kLanes<A>;
    y.c += v * kLanes<A>;
    if (kInto == Into::store_max) y.max += v * kLanes<A>;
    for (long i = 0, row = 0; i < row_tiles; ++i) {
      const long r = (rows - row) / (row_tiles - i);
      tiles[n - 1][r - 1](y, depth);
      y.a += r * x.a_row;
      y.c += r * x.c_row;
      if (kInto == Into::scale_add) y.scale += r;
      row += r;
    }
    v += n;
  }
}

// Depth summed at one go: longer sums are made of parts, whose rounding errors add up more slowly.
constexpr long kDepth = 128;

template <class Op>
void deep_product(Operands<Op> x, long rows, int vectors, long depth) {
  product<Op, Into::store>(x, rows, vectors, least(kDepth, depth));
  for (long k = kDepth; k < depth; k += kDepth) {
    x.a += kDepth * x.a_step, x.b += kDepth * x.b_row;
    product<Op, Into::add>(x, rows, vectors, least(kDepth, depth - k));
  }
}

// out[d][lane] = rows[lane][d] in the accumulator's type, 64 lanes a row; those from `count` on are 0 to the end of the
// vector, and what follows is left as it was.
template <class S>
void pack_transposed(const S* rows, long stride, int count, long dim, Accumulator<S>* out) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>;
  if (count == 1) {  // nothing to transpose
    for (long d = 0; d < dim; ++d) store(out + d * 64, load_n(rows + d, 1));
    return;
  }
  for (int lane = 0; lane < count; lane += L) {
    for (long d = 0; d < dim; d += L) {
      Vec<A> square[L];
      const int wide = int(least(L, dim - d));
      if (wide == L && lane + L <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) square[i] = load(rows + (lane + i) * stride + d);
      } else {
        for (int i = 0; i < L; ++i)
          square[i] = lane + i < count ? load_n(rows + (lane + i) * stride + d, wide) : Vec<A>{};
      }
      transpose<A>(square);
      if (wide == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(out + (d + i) * 64 + lane, square[i]);
      } else {
        for (int i = 0; i < wide; ++i) store(out + (d + i) * 64 + lane, square[i]);
      }
    }
  }
}
// The same by pairs of features: out[d / 2][lane] = (rows[lane][d], rows[lane][d + 1]), an odd last one beside a 0.
inline void pack_transposed_pairs(const bf16* rows, long stride, int count, long dim, uint32_t* out) {
  constexpr int L = kLanes<float>;
  const long pairs = (dim + 1) / 2;
  for (int lane = 0; lane < count; lane += L) {
    for (long d = 0; d < pairs; d += L) {
      Vec<float> square[L];  // only moved, never computed with
      const long wide = least(2 * L, dim - 2 * d);
      for (int i = 0; i < L; ++i) {
        square[i] = Vec<float>{};
        if (lane + i >= count) continue;
        const bf16* row = rows + (lane + i) * stride + 2 * d;
        if (wide == 2 * L)
          std::memcpy(&square[i], row, sizeof square[i]);
        else
          std::memcpy(&square[i], row, size_t(wide) * sizeof(bf16));
      }
      transpose<float>(square);
      for (int i = 0; i < L && d + i < pairs; ++i) std::memcpy(out + (d + i) * 64 + lane, &square[i], sizeof square[i]);
    }
  }
}

// A copy in the accumulator's type, rows padded with zeros to `width` (whole vectors), rows from `count` on zero.
template <class S>
void widen_rows(const S* rows, long stride, long count, long total, long dim, long width, Accumulator<S>* out) {
  using A = Accumulator<S>;
  constexpr int L = kLanes<A>;
  for (long i = 0; i < total; ++i)
    for (long d = 0; d < width; d += L) {
      const int n = int(least(L, dim - d));
      store(out + i * width + d, i < count && n > 0 ? load_n(rows + i * stride + d, n) : Vec<A>{});
    }
}
// Rows in pairs, as the product by bfloat16 pairs wants B: out[i / 2][d] = (rows[i][d], rows[i + 1][d]).
inline void interleave_rows(const bf16* rows, long stride, long count, long pairs, long dim, long width,
                            uint32_t* out) {
  for (long i = 0; i < pairs; ++i, out += width) {
    const bf16 *low = rows + 2 * i * stride, *high = low + stride;
    if (2 * i + 1 < count) {
      interleave(low, high, int(dim), out);
      for (long d = dim; d < width; ++d) out[d] = 0;
    } else {
      for (long d = 0; d < width; ++d) out[d] = 2 * i < count && d < dim ? low[d].bits : 0u;
    }
  }
}
#if defined(__AVX512BF16__)
// Rows as columns: out[d][i] = rows[i][d] for i up to `count`, an odd last one beside a 0, and d up to `width` (whole
// vectors), zeros from dim on. pairs: room for 16 * width.
inline void transpose_rows(const bf16* rows, long stride, long count, long dim, long width, uint32_t* pairs, bf16* out,
                           long out_row) {
  constexpr int L = kLanes<float>;
  for (long i = 0; i < count; i += 2 * L) {
    const long here = least(2 * L, count - i), terms = (here + 1) / 2;
    interleave_rows(rows + i * stride, stride, here, terms, dim, width, pairs);
    for (long d = 0; d < width; d += L) {
      Vec<float> square[L];  // only moved, never computed with
      for (int k = 0; k < L; ++k) square[k] = k < terms ? load(reinterpret_cast<float*>(pairs) + k * width + d) : Vec<float>{};
      transpose<float>(square);
      for (int r = 0; r < L; ++r) std::memcpy(out + (d + r) * out_row + i, &square[r], size_t(terms) * 4);
    }
  }
}
#endif
// [width, 64] to [64, width], for whole vectors of lanes.
template <class A>
void turn_back(const A* columns, int vectors, long width, A* rows) {
  constexpr int L = kLanes<A>;
  for (int v = 0; v < vectors; ++v)
    for (long d = 0; d < width; d += L) {
      Vec<A> square[L];
      for (int k = 0; k < L; ++k) square[k] = load(columns + (d + k) * 64 + v * L);
      transpose<A>(square);
      for (int r = 0; r < L; ++r) store(rows + (v * L + r) * width + d, square[r]);
    }
}
// A plain copy with zeros after each row: `width` elements a row.
template <class S>
void pad_rows(const S* rows, long stride, long count, long dim, long width, S* out) {
  for (long i = 0; i < count; ++i) {
    std::memcpy(out + i * width, rows + i * stride, size_t(dim) * sizeof(S));
    for (long d = dim; d < width; ++d) out[i * width + d] = S{};
  }
}

}  // namespace fastseq::FASTSEQ_ISA::attention
