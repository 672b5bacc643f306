// y = W x + ... for many rows x: two ways to multiply, Floats for every instruction set and Tiles for AMX.
//
// Either packs a matrix W [out, in] once for all rows (pack, a panel of kColumns rows of W at a time), lays rows of
// activations down as it reads them (put), and hands the sums over a part of `in` to done(row, column, vector).
#pragma once
#include "core/parallel.h"
#include "encoder/cpu/feed_forward.h"
#include "recurrent/cpu/pack.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// Columns [first, last) of the product and `depth` terms of its sums, from term k on.
template <class Weight>
struct Part {
  const Weight* packed;
  long in, k, depth, first, last;
};

struct Floats {
  using Weight = float;
  using Activation = float;
  static constexpr int L = kLanes<float>;
  static constexpr long kColumns = 2 * L;
  static constexpr int kTileRows = kVectorRegisters >= 32 ? 14 : 6;
  static constexpr long kUnit = 1, kBlockRows = (kVectorRegisters >= 32 ? 12 : 24) * kTileRows;
  static constexpr long kAhead = 24;  // terms of the weights that are asked for before their turn
  static_assert(kProductColumns % kColumns == 0, "panels are whole");

  static long weights(long in, long out) { return in * out; }
  static void pack(Weight* to, const float* w, long in, long panel) {
    const ScanView rows{const_cast<float*>(w), 0, in, 1};
    pack_units<float>(to + panel * kColumns * in, rows, panel * kColumns, 2, L, in, 0);
  }

  // A block of rows of activations. One vector more than needed: rows that are powers of two apart would share few
  // places in the cache.
  static long row(long in) { return in + L; }
  static long activations(long in) { return kBlockRows * row(in); }
  static long padded(long in) { return in; }  // terms of a row that must be there
  static void put(Activation* block, long in, long r, long e, Vec<float> v, int some) {
    store_n(block + r * row(in) + e, v, some);
  }

  template <int R, class Done>
  static void tile(const float* x, long x_row, const float* w, long depth, const Done& done) {
    Vec<float> acc[R][2];
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec<float>{};
    for (long k = 0; k < depth; ++k, w += kColumns) {
      const Vec<float> w0 = load(w), w1 = load(w + L);
      for (int v = 0; v < 2; ++v) prefetch(w + kAhead * kColumns + v * L, 0);
      FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
        const Vec<float> a = splat(x[r * x_row + k]);
        acc[r][0] += a * w0;
        acc[r][1] += a * w1;
      }
    }
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
      FASTSEQ_UNROLL for (int v = 0; v < 2; ++v) done(r, v * L, acc[r][v]);
  }
  template <int R = 1, class Done>
  static void tile_of(int rows, const float* x, long x_row, const float* w, long depth, const Done& done) {
    if constexpr (R < kTileRows)
      if (rows != R) return tile_of<R + 1>(rows, x, x_row, w, depth, done);
    tile<R>(x, x_row, w, depth, done);
  }

  // x: a block of rows of x_in, of which the part starts at x_k.
  template <class Done>
  static void multiply(const Part<Weight>& p, const Activation* x, long x_in, long x_k, long n, const Done& done) {
    const long tiles = (n + kTileRows - 1) / kTileRows;
    for (long column = p.first; column < p.last; column += kColumns)
      for (long t = 0; t < tiles; ++t) {
        const Share some = share_of(n, int(t), int(tiles));
        tile_of(int(some.end - some.begin), x + some.begin * row(x_in) + x_k, row(x_in),
                p.packed + column * p.in + p.k * kColumns, p.depth,
                [&](int r, int e, Vec<float> sum) { done(some.begin + r, column + e, sum); });
      }
  }
};

#if defined(FASTSEQ_TILES)
// A float is the sum of three numbers of bfloat16, each 8 of its bits, high to low: h + m + l. A product of two floats is
// hh + hm + mh + mm + hl + lh but for 2^-24 of it, the rounding of float; the sums are float's. That takes a third of the
// time of float's own instructions. Denormal parts count as zeros: at most 2^-126 a term. An infinity gives NaN.
struct Tiles {
  using Weight = bf16;
  using Activation = bf16;
  static constexpr int L = kLanes<float>;
  static constexpr long kColumns = 32, kUnit = 32, kBlockRows = 128;
  static constexpr long kSide = 16, kDepth = 32, kParts = 3, kTile = kSide * kDepth;  // rows, terms, elements of a tile
  static_assert(kProductColumns % kColumns == 0, "panels are whole");

  // Element x's parts, from `to` on, `apart` elements apart.
  static void split(Vec<float> x, bf16* to, long apart, int some = L) {
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
    for (int part = 0; part < kParts; ++part) {
      const Vec<float> high = same_bits<Vec<float>>(same_bits<Words>(x) & 0xffff0000u);
      store_n(to + part * apart, high, some);
      x -= high;
    }
  }

  // [panel][step of terms][part][half of the columns][pair of terms][column][element of the pair]
  static long weights(long in, long out) { return steps(in) * kDepth * out * kParts; }
  static long steps(long in) { return (in + kDepth - 1) / kDepth; }
  static void pack(Weight* to, const float* w, long in, long panel) {
    to += panel * kColumns * steps(in) * kDepth * kParts;
    alignas(64) bf16 rows[kParts][kSide][kDepth];
    for (long k = 0; k < in; k += kDepth)
      for (int half = 0; half < 2; ++half) {
        const float* from = w + (panel * kColumns + half * kSide) * in + k;
        for (long r = 0; r < kSide; ++r, from += in) split_row(from, in - k < kDepth ? in - k : kDepth, rows[0][r]);
        for (int part = 0; part < kParts; ++part)
          turn(rows[part], to + ((k / kDepth * kParts + part) * 2 + half) * kTile);
      }
  }
  // The parts of n floats, a tile apart, in stores as wide as what reads them next.
  static void split_row(const float* from, long n, bf16* to) {
#if defined(__AVX512F__)
    static_assert(L == kSide, "a vector is a row of words");
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    Vec<float> x[2] = {load_n(from, int(n < L ? n : L)), n > L ? load_n(from + L, int(n - L)) : Vec<float>{}};
    for (int part = 0; part < kParts; ++part) {
      Half halves[2];
      for (int i = 0; i < 2; ++i) {
        const Words high = same_bits<Words>(x[i]) & 0xffff0000u;
        halves[i] = __builtin_convertvector(high >> 16, Half);
        x[i] -= same_bits<Vec<float>>(high);
      }
      const auto row = __builtin_shufflevector(halves[0], halves[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
      std::memcpy(to + part * kTile, &row, sizeof row);
    }
#else
    for (long e = 0; e < kDepth; e += L)
      split(n > e ? load_n(from + e, int(n - e < L ? n - e : L)) : Vec<float>{}, to + e, kTile);
#endif
  }
  // Pairs, which are words, of rows into rows of pairs.
  static void turn(const bf16 (&rows)[kSide][kDepth], bf16* to) {
    if constexpr (L == kSide) {
      Vec<float> words[kSide];
      std::memcpy(words, rows, sizeof words);
      transpose<float>(words);
      std::memcpy(to, words, sizeof words);
    } else {
      for (int pair = 0; pair < kSide; ++pair)
        for (int r = 0; r < kSide; ++r) std::memcpy(to + pair * kDepth + 2 * r, &rows[r][2 * pair], 4);
    }
  }

  // [tile of rows][step of terms][part][row][term]
  static long activations(long in) { return kBlockRows * padded(in) * kParts; }
  static long padded(long in) { return steps(in) * kDepth; }  // terms of a row, zeros past the last
  static bf16* at(bf16* block, long in, long r, long e) {
    return block + ((r / kSide * steps(in) + e / kDepth) * kParts * kSide + r % kSide) * kDepth + e % kDepth;
  }
  static void put(Activation* block, long in, long r, long e, Vec<float> v, int some) {
    split(v, at(block, in, r, e), kTile, some);
  }

  template <int kAt>
  static void load_pair(const bf16* first, const bf16* second) {
    tile_load<kAt>(first, 2 * kDepth);
    tile_load<kAt + 1>(second, 2 * kDepth);
  }
  static void multiply_pairs() {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }

  template <class Done>
  static void multiply(const Part<Weight>& p, const Activation* x, long x_in, long x_k, long n, const Done& done) {
    const long panel = steps(p.in) * kParts * 2 * kTile, rows = steps(x_in) * kParts * kTile;
    alignas(64) float sums[kUnit * kColumns];
    for (long column = p.first; column < p.last; column += kColumns)
      for (long r = 0; r < n; r += kUnit) {
        const bf16* w = p.packed + column / kColumns * panel + p.k / kDepth * kParts * 2 * kTile;
        const bf16* a = x + r / kSide * rows + x_k / kDepth * kParts * kTile;
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (long step = 0; step < steps(p.depth); ++step, w += kParts * 2 * kTile, a += kParts * kTile) {
          auto rows_of = [&](int part) { load_pair<4>(a + part * kTile, a + rows + part * kTile); };
          auto columns_of = [&](int part) { load_pair<6>(w + part * 2 * kTile, w + (part * 2 + 1) * kTile); };
          rows_of(0), columns_of(2), multiply_pairs();
          columns_of(1), multiply_pairs();
          rows_of(1), multiply_pairs();
          columns_of(0), multiply_pairs();
          rows_of(2), multiply_pairs();
          rows_of(0), multiply_pairs();
        }
        tile_store<0>(sums, 4 * kColumns), tile_store<1>(sums + kSide, 4 * kColumns);
        tile_store<2>(sums + kSide * kColumns, 4 * kColumns);
        tile_store<3>(sums + kSide * kColumns + kSide, 4 * kColumns);
        for (long i = 0; i < kUnit && r + i < n; ++i)
          for (long e = 0; e < kColumns; e += L) done(r + i, column + e, load(sums + i * kColumns + e));
      }
  }
};

// The tiles' shapes are loaded for a thread while it multiplies.
struct TilesInUse {
  TilesInUse() {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.shape(tile, int(Tiles::kSide), 2 * int(Tiles::kDepth));
    tile_configure(shapes);
  }
  ~TilesInUse() { tile_release(); }
};
using Products = Tiles;
#else
struct TilesInUse {
  TilesInUse() {}
};
using Products = Floats;
#endif

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
