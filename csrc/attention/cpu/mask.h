// Who may look at whom: limits of each sequence, visibility as 64-bit words, and dropout's generator.
//
// Scores are held transposed, a row for each key with 64 queries as its lanes, so that one word a key says which
// queries of the block see it. Limits (causal, window, lengths) and the mask all end up in that word.
#pragma once
#include "attention/cpu/attention.h"
#include "attention/cpu/math.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr int kQueries = 64;  // lanes of a query block
constexpr long kUnlimited = long(1) << 40;

inline uint64_t bits_between(long begin, long end) {  // [begin, end) of 64
  begin = most(begin, 0), end = least(end, 64);
  if (begin >= end) return 0;
  return (~uint64_t(0) << begin) & (~uint64_t(0) >> (64 - end));
}

// One sequence of the batch, and what its limits (causal, window, lengths) say. Rows from tq on and keys from tk on are padding.
struct Sequence {
  long q_row, k_row;  // where it begins in q and in k
  long rows, tq, tk;  // rows present in the output; queries and keys that count
  long shift, left, right;
  long prefix;  // keys that every query sees

  Sequence(const AttentionCall& call, long b) {
    q_row = call.cu_q ? call.cu_q[b] : 0;
    k_row = call.cu_k ? call.cu_k[b] : 0;
    rows = call.cu_q ? call.cu_q[b + 1] - q_row : call.length_q;
    tq = queries_of(call, b);
    const long keys = call.cu_k ? call.cu_k[b + 1] - k_row : call.length_k;
    tk = call.lengths_k ? least(keys, long(call.lengths_k[b])) : keys;
    prefix = call.prefix ? least(tk, long(call.prefix[b])) : 0;
    shift = call.bottom_right ? tk - tq : 0;
    left = call.window_left >= 0 ? least(call.window_left, kUnlimited) : kUnlimited;  // sums with positions must not
    right = call.window_right >= 0 ? least(call.window_right, kUnlimited) : kUnlimited;  // overflow
    if (call.causal) right = least(right, 0);
  }
  bool is_decoded() const { return tq <= kDecodeQueries; }
  // Of keys [from, to), those from the first to the last that any of queries [i, i + count) sees, mask aside: none where
  // the range is empty or turned around.
  struct Range {
    long begin, end;
  };
  Range seen_of(long from, long to, long i, long count) const {
    const long end = least(to, most(prefix, end_key(i + count - 1)));
    return {from < prefix ? from : most(from, first_key(i)), end};
  }
  Range seen_by(long i, long count = 1) const { return seen_of(0, tk, i, count); }
  // Whether each of queries [i, i + count) sees each of keys [from, to).
  bool all_see(long from, long to, long i, long count) const {
    return prefix >= to || (first_key(i + count - 1) <= most(from, prefix) && end_key(i) >= to);
  }
  // Which of queries [i, i + count), up to 64, see key j, one that counts.
  uint64_t who_sees(long j, long i, long count) const {
    if (j < prefix) return bits_between(0, count);
    const long centre = j - shift - i;
    return bits_between(centre - right, least(centre + left + 1, count));
  }
  // Writes `hidden` over those of [from, to) that query i does not see; x begins at key `from`.
  template <class A>
  void hide(long from, long to, long i, A* x, A hidden) const {
    const long after = most(from, prefix);
    const Range seen = seen_of(after, to, i, 1);
    for (long j = after; j < least(to, seen.begin); ++j) x[j - from] = hidden;
    for (long j = most(after, seen.end); j < to; ++j) x[j - from] = hidden;
  }

 private:
  // Query i looks at keys [first_key(i), end_key(i)), which both grow with i, and at those of the prefix.
  long first_key(long i) const { return most(0, i + shift - left); }
  long end_key(long i) const { return least(tk, i + shift + right + 1); }
};

template <class T>
T* at(const View& view, long b, long h, long row) {
  return static_cast<T*>(view.data) + b * view.batch + h * view.head + row * view.row;
}
// Where keys [j, j + n) of sequence b and head h lie, of k or of v: each(row, place of the first, count) for those that are
// view.row apart.
template <class T, class Each>
FASTSEQ_INLINE void for_runs(const AttentionCall& call, const View& view, const Sequence& s, long b, long h, long j, long n,
                             const Each& each) {
  if (!call.pages) return each(at<const T>(view, b, h, s.k_row + j), 0, n);
  for (long done = 0, count; done < n; done += count) {
    const long first = (j + done) % call.page;
    count = least(n - done, call.page - first);
    each(at<const T>(view, call.pages[b * call.table_row + (j + done) / call.page], h, first), done, count);
  }
}
// One at a time.
template <class T>
void rows_of(const AttentionCall& call, const View& view, const Sequence& s, long b, long h, long j, long n, const T** rows) {
  constexpr long L = kLanes<int64_t>;
  const long step = view.row * long(sizeof(T));
  Vec<int64_t> steps;
  FASTSEQ_UNROLL for (int l = 0; l < L; ++l) steps[l] = l * step;
  for_runs<T>(call, view, s, b, h, j, n, [&](const T* row, long place, long count) {
    const T** const out = rows + place;
    Vec<int64_t> at = steps + int64_t(row);
    long i = 0;
    for (; i + L <= count; i += L, at += L * step) std::memcpy(out + i, &at, sizeof at);
    for (; i < count; ++i) out[i] = row + i * view.row;
  });
}
// The scales of int8 rows.
inline void scales_of(const AttentionCall& call, const View& view, const Sequence& s, long b, long h, long j, long n,
                      float* scales) {
  for_runs<float>(call, view, s, b, h, j, n, [&](const float* row, long place, long count) {
    for (long i = 0; i < count; ++i) scales[place + i] = row[i * view.row];
  });
}

template <class T>
const T* at(const Pairs& x, long b, long h, long i, long j) {
  return static_cast<const T*>(x.data) + b * x.batch + h * x.head + i * x.row + j * x.step;
}

inline int first_bit(uint64_t word) { return __builtin_ctzll(word); }
inline int end_bit(uint64_t word) { return 64 - __builtin_clzll(word); }

inline void transpose_bits(uint64_t (&rows)[64]) {
  uint64_t low = 0x00000000ffffffff;
  for (int width = 32; width != 0; width >>= 1, low ^= low << width)
    for (int k = 0; k < 64; k = ((k | width) + 1) & ~width) {
      uint64_t swap = ((rows[k] >> width) ^ rows[k | width]) & low;
      rows[k] ^= swap << width;
      rows[k | width] ^= swap;
    }
}

// words[j] &= mask's bits of `count` queries, mask pointing at the first query and key; strides in bytes.
inline void and_mask(const uint8_t* mask, long step_q, long step_k, int count, long keys, uint64_t* words) {
  if (step_q == 0) {
    for (long j = 0; j < keys; ++j) words[j] &= mask[j * step_k] ? ~uint64_t(0) : 0;
  } else if (step_k == 0) {
    uint64_t word = 0;
    for (int i = 0; i < count; ++i) word |= uint64_t(mask[i * step_q] != 0) << i;
    for (long j = 0; j < keys; ++j) words[j] &= word;
  } else {
    for (long j0 = 0; j0 < keys; j0 += 64) {
      const long n = least(64, keys - j0);
      uint64_t rows[64] = {};
      for (int i = 0; i < count; ++i) {
        const uint8_t* row = mask + i * step_q + j0 * step_k;
        uint64_t word = 0;
        long j = 0;
        if (step_k == 1) {
          for (; j + 8 <= n; j += 8) {  // eight bytes of 0 or 1 to eight bits
            uint64_t bytes;
            std::memcpy(&bytes, row + j, 8);
            word |= ((bytes * 0x0102040810204080) >> 56) << j;
          }
        }
        for (; j < n; ++j) word |= uint64_t(row[j * step_k] != 0) << j;
        rows[i] = word;
      }
      transpose_bits(rows);
      for (long j = 0; j < n; ++j) words[j0 + j] &= rows[j];
    }
  }
}

enum class Seen { none, some, all };

// What queries [i0, i0 + count) see of keys [j0, j1), which shrink to those that somebody sees (j0 stays a multiple of
// `align` from where it was). `words` is filled for them unless everything is seen.
inline Seen visibility(const AttentionCall& call, const Sequence& s, long b, long h, long i0, int count, int align,
                       long& j0, long& j1, uint64_t* words) {
  const Sequence::Range seen = s.seen_of(j0, j1, i0, count);
  j0 += (seen.begin - j0) / align * align;
  j1 = seen.end;
  if (j0 >= j1) return Seen::none;
  const bool inside = s.all_see(j0, j1, i0, count);
  if (inside && !call.mask.data) return Seen::all;
  const uint64_t full = bits_between(0, count);
  const long keys = j1 - j0;
  if (inside) {
    for (long j = 0; j < keys; ++j) words[j] = full;
  } else {
    for (long j = 0; j < keys; ++j) words[j] = s.who_sees(j0 + j, i0, count);
  }
  if (!call.mask.data) return Seen::some;
  and_mask(at<uint8_t>(call.mask, b, h, i0, j0), call.mask.row, call.mask.step, count, keys, words);
  long skip = 0;
  while (skip < keys && words[skip] == 0) ++skip;
  if (skip == keys) return Seen::none;
  while (words[j1 - j0 - 1] == 0) --j1;
  skip = skip / align * align;
  bool all = true;
  for (long j = skip; j < j1 - j0; ++j) {
    all &= words[j] == full;
    words[j - skip] = words[j];
  }
  j0 += skip;
  return all ? Seen::all : Seen::some;
}

// Calls each(row, rows, first query, end query) for the keys in sixes, with the queries that see any of them; a six
// that is fully masked is skipped.
template <class Each>
FASTSEQ_INLINE void for_seen_rows(const uint64_t* words, long keys, int rows_at_once, const Each& each) {
  for (long row = 0; row < keys; row += rows_at_once) {
    const long rows = least(rows_at_once, keys - row);
    uint64_t any = 0;
    for (long j = row; j < row + rows; ++j) any |= words[j];
    if (any) each(row, rows, first_bit(any), end_bit(any));
  }
}

// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), for `kWide`
// counters (j / 4, i + lane, h, b) at once; word w of lane l is out[w][l].
template <int kWide>
inline void philox(uint64_t seed, uint32_t c0, uint32_t i, uint32_t h, uint32_t b, uint32_t (&out)[4][kWide]) {
  uint32_t c[4][kWide];
  for (int l = 0; l < kWide; ++l) c[0][l] = c0, c[1][l] = i + uint32_t(l), c[2][l] = h, c[3][l] = b;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int l = 0; l < kWide; ++l) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c[0][l], p1 = uint64_t(0xCD9E8D57u) * c[2][l];
      const uint32_t n0 = uint32_t(p1 >> 32) ^ c[1][l] ^ k0, n2 = uint32_t(p0 >> 32) ^ c[3][l] ^ k1;
      c[0][l] = n0, c[1][l] = uint32_t(p1), c[2][l] = n2, c[3][l] = uint32_t(p0);
    }
  }
  std::memcpy(out, c, sizeof c);
}

struct Dropout {
  uint64_t seed;
  uint64_t threshold;
  double scale;  // of what is kept
  bool active;

  explicit Dropout(const AttentionCall& call)
      : seed(call.seed ? uint64_t(*call.seed) : 0), threshold(uint64_t(call.dropout_p * 4294967296.0)),
        scale(call.dropout_p < 1 ? 1 / (1 - call.dropout_p) : 0), active(call.dropout_p > 0) {}

  // words[j - j0]: which of 64 queries from i0 on keep key j. `words` has room for j1 - j0 keys.
  void keep(long b, long h, long i0, long j0, long j1, uint64_t* words) const {
    for (long j = j0 / 4; j * 4 < j1; ++j) {
      uint64_t kept[4] = {};
      for (int lane = 0; lane < kQueries; lane += 16) {
        uint32_t random[4][16];
        philox(seed, uint32_t(j), uint32_t(i0 + lane), uint32_t(h), uint32_t(b), random);
        for (int w = 0; w < 4; ++w)
          for (int l = 0; l < 16; ++l) kept[w] |= uint64_t(random[w][l] >= threshold) << (lane + l);
      }
      for (int w = 0; w < 4; ++w)
        if (4 * j + w >= j0 && 4 * j + w < j1) words[4 * j + w - j0] = kept[w];
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
