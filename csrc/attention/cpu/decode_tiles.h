// The products of decode by AMX's tiles: keys are met 16 at a time, where they lie, by all queries that share their head.
//
// Of bfloat16, q and the weights of the values are multiplied as bfloat16. Of int8 they are whole numbers of 24 bits,
// fractions of the largest in a row of q and in a row's block of weights, in three digits of base 256: products and sums
// are exact.
#pragma once
#include "attention/cpu/tile.h"

namespace fastseq::FASTSEQ_ISA::attention {

// The keys and values of the next block, for which memory is asked a few at a time, between products: a processor waits
// that has asked for too many.
template <class K>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const K* const* k, const K* const* v, long n, long dim, long dim_v)
      : k_(k), v_(v), n_(n), left_(n), bytes_(dim * long(sizeof(K))), bytes_v_(dim_v * long(sizeof(K))) {}

  // What each of `steps` has to ask for, so that together they ask for one of `parts`.
  long share(long parts, long steps) const { return n_ * kOne / (parts * most(1, steps)) + 1; }
  FASTSEQ_INLINE void ask(long share) {
    if (left_ == 0) return;
    for (due_ += share; due_ >= kOne && left_ > 0; due_ -= kOne, --left_) ask(*k_++, bytes_), ask(*v_++, bytes_v_);
  }

 private:
  static constexpr long kOne = 1024;
  static FASTSEQ_INLINE void ask(const K* row, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + i, 0, 2);
  }
  const K *const *k_ = nullptr, *const *v_ = nullptr;
  long n_ = 0, left_ = 0, due_ = 0, bytes_ = 0, bytes_v_ = 0;
};

#if defined(FASTSEQ_TILES) && defined(__AVX512BF16__)
template <class K>
class DecodeTiles {
  static constexpr bool kWhole = __is_same(K, q8);
  static constexpr long kSide = 16, kBytes = 64;       // rows of a tile, and bytes of one
  static constexpr long kGroup = 4 / long(sizeof(K));  // elements that are multiplied into one number
  static constexpr int kParts = kWhole ? 3 : 1;        // rows that make one of q or of weights

 public:
  static constexpr long kTerms = kSide * kGroup;  // elements of a tile's row: what a product sums at once
  static constexpr int kRows = kSide / kParts;    // at once
  using Query = std::conditional_t<kWhole, float, bf16>;

  // keys: a block's, a multiple of kTerms.
  // step: elements from a key to the next, where they lie evenly.
  DecodeTiles(long dim, long dim_v, long rows, long keys, long step, Arena& arena)
      : dim_(dim), dim_v_(dim_v), keys_(keys), step_(step), width_(round_up(dim, kTerms)),
        vectors_(round_up(dim_v, kTerms) / kSide) {
    queries_ = arena.take<float>(round_up(rows, kRows) / kRows * width_ / kGroup * kSide);
    values_ = arena.take<float>(keys / kGroup * vectors_ * kSide);
    copies_ = arena.take<K>(kBlocks * kSide * width_);
    parts_ = arena.take<K>(kSide * most(keys, width_));
    sums_ = arena.take<float>(most(keys, kBlocks * kSide) * kSide);
    most_ = arena.take<float>(rows);
  }

  // q: [rows, dim up to a multiple of kTerms], zeros from dim on.
  void take_queries(const Query* q, long rows) {
    std::memset(parts_, 0, size_t(kSide * width_) * sizeof(K));
    float* out = queries_;
    for (long first = 0; first < rows; first += kRows) {
      for (long r = first; r < least(rows, first + kRows); ++r) most_[r] = split(q + r * width_, width_, r - first, width_);
      for (long d = 0; d < width_ / kGroup; d += kSide, out += kSide * kSide) {
        Vec<float> square[kSide];  // only moved, never computed with
        for (int i = 0; i < kSide; ++i) square[i] = load(reinterpret_cast<const float*>(parts_ + i * width_) + d);
        transpose<float>(square);
        for (int i = 0; i < kSide; ++i) store(out + i * kSide, square[i]);
      }
    }
    if (dim_ != width_) std::memset(copies_, 0, size_t(kBlocks * kSide * width_) * sizeof(K));
  }

  // Whether a row of q is numbers, which alone have digits.
  bool is_finite(long r) const { return most_[r] == most_[r]; }

  // scores [count, keys]: rows `first`, a multiple of kRows, and on, with n keys.
  void multiply_keys(const K* const* k, long n, long first, int count, float* scores, Ahead<K>& ahead) {
    const long share = ahead.share(4, (n + kSide - 1) / kSide);
    for (long j = 0; j < n; j += kBlocks * kSide) {
      const int blocks = int(least(kBlocks, (n - j + kSide - 1) / kSide));
      const K* block[kBlocks];
      long stride[kBlocks];
      for (int i = 0; i < blocks; ++i) block[i] = block_of(k + j + i * kSide, least(kSide, n - j - i * kSide), i, stride[i]);
      each_tile<kBlocks>([](auto i) { tile_zero<i()>(); });
      const float* query = queries_ + first / kRows * width_ / kGroup * kSide;
      for (long d = 0; d < width_; d += kTerms, query += kSide * kSide) {
        tile_load<7>(query, kBytes);
        each_tile<kBlocks>([&](auto i) {
          if (i() >= blocks) return;
          tile_load<5 + i() % 2>(block[i()] + d, stride[i()] * long(sizeof(K)));
          multiply<i(), 5 + i() % 2, 7>();
        });
      }
      each_tile<kBlocks>([&](auto i) { tile_store<i()>(sums_ + (j / kSide + i()) * kSide * kSide, kBytes); });
    }
    for (long j = 0; j < n; j += kSide) ahead.ask(share), turn(sums_ + j * kSide, first, count, scores + j);
  }

  // Lays n rows of v as add_values reads them.
  void take_values(const K* const* v, long n, Ahead<K>& ahead) {
    const long share = ahead.share(4, n / kGroup);
    for (long j = 0; j < round_up(n, kTerms); j += kGroup) {
      float* const out = values_ + (j / kTerms * vectors_ * kSide + j % kTerms / kGroup) * kSide;
      ahead.ask(share);
      if (j + kGroup <= n && dim_v_ % kTerms == 0) {
        const K* row[kGroup];
        FASTSEQ_UNROLL for (int i = 0; i < kGroup; ++i) row[i] = v[j + i];
        for (long d = 0, end = dim_v_; d < end; d += kTerms)
          interleave([&](int i) { return _mm512_loadu_si512(row[i] + d); }, out + d * kSide);
      } else
        for (long d = 0; d < dim_v_; d += kTerms) {
          const long wide = least(kTerms, dim_v_ - d) * long(sizeof(K));
          const __mmask64 there = ~__mmask64(0) >> (64 - wide);
          const auto row = [&](int i) {
            return j + i < n ? _mm512_maskz_loadu_epi8(there, v[j + i] + d) : _mm512_setzero_si512();
          };
          interleave(row, out + d * kSide);
        }
    }
  }
  // weights: [n], of row r of those at once; room for a multiple of kTerms.
  void take_weights(int r, float* weights, long n) {
    for (long j = n; j % kTerms != 0; ++j) weights[j] = 0;
    weight_most_[r] = split(weights, round_up(n, kTerms), r, keys_);
  }
  // o [count, vectors_ * 16] = o * rescale + weights v; a row's features lie as `order` finds them.
  void add_values(long n, int count, const float* rescale, float* o, Ahead<K>& ahead) {
    const long share = ahead.share(4, vectors_ * ((n + kTerms - 1) / kTerms));
    for (long c = 0; c < vectors_; c += kBlocks) {
      const int tiles = int(least(kBlocks, vectors_ - c));
      each_tile<kBlocks>([](auto i) { tile_zero<i()>(); });
      for (long j = 0; j < n; j += kTerms) {
        tile_load<7>(parts_ + j, keys_ * long(sizeof(K)));
        each_tile<kBlocks>([&](auto i) {
          if (i() >= tiles) return;
          tile_load<5 + i() % 2>(values_ + (j / kTerms * vectors_ + c + i()) * kSide * kSide, kBytes);
          multiply<i(), 7, 5 + i() % 2>();
          ahead.ask(share);
        });
      }
      each_tile<kBlocks>([&](auto i) { tile_store<i()>(sums_ + i() * kSide * kSide, kBytes); });
      for (int i = 0; i < tiles; ++i)
        for (int r = 0; r < count; ++r) {
          float* const out = o + (r * vectors_ + c + i) * kSide;
          store(out, load(out) * rescale[r] + sum_of(sums_ + (i * kSide + r) * kSide, weight_most_[r]));
        }
    }
  }
  // Brings the features of a row of o into their order: unpacking keeps 16 bytes of each vector together.
  void order(float* o) const {
    for (long c = 0; c < vectors_; c += kGroup, o += kTerms) {
      float out[kTerms];
      for (int i = 0; i < kGroup; ++i)
        for (int l = 0; l < 4; ++l) std::memcpy(out + (l * kGroup + i) * 4, o + i * kSide + l * 4, 16);
      std::memcpy(o, out, sizeof out);
    }
  }

 private:
  static constexpr int kBlocks = 4;  // tiles of C at once

  template <int kC, int kA, int kB>
  static FASTSEQ_INLINE void multiply() {
    if constexpr (kWhole)
      tile_multiply_signed_bytes<kC, kA, kB>();
    else
      tile_multiply<kC, kA, kB>();
  }

  // The elements of kGroup rows beside each other, in tiles of 16 features.
  template <class Row>
  static FASTSEQ_INLINE void interleave(const Row& row, float* out) {
    __m512i x[kGroup];
    FASTSEQ_UNROLL for (int i = 0; i < kGroup; ++i) x[i] = row(i);
    if constexpr (kWhole) {
      const __m512i y[4] = {_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[0], x[1]),
                            _mm512_unpacklo_epi8(x[2], x[3]), _mm512_unpackhi_epi8(x[2], x[3])};
      FASTSEQ_UNROLL for (int i = 0; i < 2; ++i)
        x[2 * i] = _mm512_unpacklo_epi16(y[i], y[i + 2]), x[2 * i + 1] = _mm512_unpackhi_epi16(y[i], y[i + 2]);
    } else {
      const __m512i low = _mm512_unpacklo_epi16(x[0], x[1]);
      x[1] = _mm512_unpackhi_epi16(x[0], x[1]), x[0] = low;
    }
    FASTSEQ_UNROLL for (int i = 0; i < kGroup; ++i) _mm512_store_si512(out + i * kSide * kSide, x[i]);
  }

  // Rows as tiles can read them: where they are if they lie evenly, else in a copy.
  const K* block_of(const K* const* rows, long n, int i, long& stride) {
    stride = step_;
    if (n == kSide && dim_ == width_) {
      const __m512i step = _mm512_set1_epi64(step_ * long(sizeof(K))), start = _mm512_set1_epi64(long(rows[0]));
      const __m512i low = start + step * _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), high = low + step * 8;
      if (_mm512_cmpeq_epi64_mask(low, _mm512_loadu_si512(rows)) == 0xff &&
          _mm512_cmpeq_epi64_mask(high, _mm512_loadu_si512(rows + 8)) == 0xff)
        return rows[0];
    }
    K* const copy = copies_ + i * kSide * width_;
    for (int r = 0; r < kSide; ++r) std::memcpy(copy + r * width_, rows[least(r, n - 1)], size_t(dim_) * sizeof(K));
    stride = width_;
    return copy;
  }

  static constexpr float kMost = 8355000;  // a little less than three times the digit 127

  // Row r of parts_, rows of `width` elements: x[n], as it is, or in digits of which kMost is the number returned.
  float split(const bf16* x, long n, long r, long width) {
    std::memcpy(parts_ + r * width, x, size_t(n) * sizeof *x);
    return 1;
  }
  float split(const float* x, long n, long r, long width) {
    K* const out = parts_ + r * width;
    if constexpr (!kWhole) {
      for (long j = 0; j < n; j += 32)
        _mm512_storeu_si512(out + j, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + j + 16), _mm512_loadu_ps(x + j)));
      return 1;
    } else {
      __m512i bits = _mm512_setzero_si512();  // by bits, so that a NaN is more than any number
      for (long j = 0; j < n; j += 16)
        bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_loadu_si512(x + j), _mm512_set1_epi32(0x7fffffff)));
      const uint32_t most_bits = _mm512_reduce_max_epu32(bits);
      float most;
      std::memcpy(&most, &most_bits, sizeof most);
      const float larger = most < 0x1p-60f ? 0x1p60f : 1;  // so that the inverse is finite
      const float inverse = most == 0 ? 0 : kMost / (most * larger);
      const __m512i half = _mm512_set1_epi32(0x808080);  // what makes digits of -128 .. 127 from bytes
      for (long j = 0; j < n; j += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + j), _mm512_set1_ps(larger));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(scaled, _mm512_set1_ps(inverse)));
        const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(whole, half), half);
        _mm_storeu_si128((__m128i*)(out + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 16)));
        _mm_storeu_si128((__m128i*)(out + kRows * width + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 8)));
        _mm_storeu_si128((__m128i*)(out + 2 * kRows * width + j), _mm512_cvtepi32_epi8(digits));
      }
      return most + (most - most);  // NaN of an infinity too
    }
  }
  // 16 sums, whose parts lie kRows rows of a tile apart, of digits of which kMost is `most`.
  static FASTSEQ_INLINE Vec<float> sum_of(const float* part, float most) {
    if constexpr (!kWhole) return load(part);
    const auto number = [&](int p) { return (Vec<float>)_mm512_cvtepi32_ps(_mm512_loadu_si512(part + p * kRows * kSide)); };
    return (number(0) * 65536.0f + number(1) * 256.0f + number(2)) * (1 / kMost) * most;
  }

  // sums [16 keys, 16 rows] as rows of scores.
  void turn(float* sums, long first, int count, float* scores) const {
    Vec<float> square[kSide];
    for (int i = 0; i < kSide; ++i) square[i] = load(sums + i * kSide);
    transpose<float>(square);
    for (int i = 0; i < kSide; ++i) store(sums + i * kSide, square[i]);
    for (int r = 0; r < count; ++r) store(scores + r * keys_, sum_of(sums + r * kSide, most_[first + r]));
  }

  const long dim_, dim_v_, keys_, step_, width_, vectors_;
  float* queries_;  // tiles [steps of rows][width / kGroup][16], their 32 bits not a number
  float* values_;   // tiles [keys / kTerms][vectors][16][16], likewise
  K* copies_;       // [kBlocks, 16, width]
  K* parts_;        // [16, keys or width]: parts of row r are r, r + kRows, ...
  float* sums_;     // [kBlocks, 16, 16], of int8 32-bit integers
  float* most_;     // [rows]: the largest magnitude of a row of q
  float weight_most_[kRows] = {};
};

#else
template <class K>
class DecodeTiles;
#endif

}  // namespace fastseq::FASTSEQ_ISA::attention
