// Attention of a few queries over many keys: the work is to read K and V once, so it is divided over the keys.
//
// A task is a head of K and V and a chunk of its keys, whose size follows from the sequence's own length; all queries that
// share the head are its rows. Within a chunk, blocks of keys stay in the first cache while four rows at a time meet them:
// scores by dot products, lanes along the features; then the online softmax, lanes along the keys; then O. On chips with
// AMX its tiles make both products of bfloat16 and int8. Chunks are merged by their maxima and sums, in order.
#include <atomic>

#include "attention/cpu/attention.h"
#include "attention/cpu/decode_tiles.h"
#include "attention/cpu/scores.h"
#include "core/parallel.h"

namespace fastseq::FASTSEQ_ISA {
namespace attention {
namespace {

constexpr long kMost = 2048;   // keys a task, at most
constexpr long kLeast = 512;   // and at least
constexpr long kEven = 128;    // a multiple of this
constexpr long kTasks = 4;     // chunks of a sequence between these
constexpr int kRows = 4;       // rows at once, by vectors
constexpr int kAtOnce = 16;    // and by tiles, at most
constexpr long kNear = 1 << 20;  // bytes a thread that are likely in its second cache

// The sums of the lanes of four vectors.
template <class A>
FASTSEQ_INLINE void sum_four(const Vec<A> (&x)[4], A* out) {
  constexpr int n = kLanes<A> < 4 ? kLanes<A> : 4;
  FASTSEQ_UNROLL for (int i = 0; i < 4; i += n) {
    const auto sums = fold_lanes<n>(sums_of<A, n>(x + i));
    std::memcpy(out + i, &sums, sizeof sums);
  }
}

// K: what k and v are stored as, S or q8, whose rows have scales.
template <class S, class K>
class Decode {
 public:
  using A = Accumulator<S>;
  static constexpr int L = kLanes<A>;
  static constexpr bool kScaled = __is_same(K, q8);
  static constexpr bool kDot = kHasDot && __is_same(K, bf16);
  static constexpr bool kTiles = kHasTiles && (kDot || kScaled);
  static constexpr long kStep = kTiles && kDot ? 64 : 128;  // keys a block: they, and what tiles lay down, fit the first cache
  static constexpr long kAhead = kTiles ? kStep : 32;       // keys for which memory is asked before they are met
  using Query = std::conditional_t<kDot, S, A>;  // what q is kept as
  static constexpr long kQueryLanes = kTiles ? 64 / long(sizeof(K)) : kVectorBytes / long(sizeof(Query));

  explicit Decode(const AttentionForward& call)
      : call_(call), scoring_(call), dropout_(call), group_(call.heads_q / call.heads_k),
        rows_(group_ * least(call.length_q, kDecodeQueries)), width_(round_up(call.dim, kQueryLanes)),
        width_v_(round_up(call.dim_v, kTiles ? kQueryLanes : L)) {}

  bool run() {
    const long heads = call_.batch * call_.heads_k;
    long keys = 0;
    for (long b = 0; b < call_.batch; ++b) {
      const Sequence s(call_, b);
      if (s.is_decoded()) keys += s.tk, chunks_ = most(chunks_, (s.tk + chunk_of(s) - 1) / chunk_of(s));
    }
    const long tasks = heads * chunks_;
    const int threads = int(most(1, least(call_.threads, tasks)));
    asks_ = keys * call_.heads_k * (call_.dim + call_.dim_v) * long(sizeof(K)) > threads * kNear;
    Arena counting;
    Scratch(*this, counting);
    Memory memory(counting.used() * threads + tasks * rows_ * (width_v_ + 2) * long(sizeof(A)) + 256);
    if (!memory.data) return false;
    Arena shared(memory.data + counting.used() * threads);
    o_ = shared.take<A>(tasks * rows_ * width_v_);
    max_ = shared.take<A>(tasks * rows_), sum_ = shared.take<A>(tasks * rows_);
    // Merging is little work where heads are few: not worth another meeting of the team.
    const bool merge_alone = tasks * rows_ * width_v_ < 65536;
    std::atomic<long> next{0};
    parallel(threads, [&](const Team& team) {
      [[maybe_unused]] const std::conditional_t<kTiles, TileScope, int> tiles{};
      Arena arena(memory.data + counting.used() * team.rank);
      Scratch scratch(*this, arena);
      for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) compute(task, scratch);
      if (merge_alone) return;
      team.sync();
      const Share share = share_of(call_.batch * call_.heads_q, team.rank, team.size);
      for (long i = share.begin; i < share.end; ++i) merge(i / call_.heads_q, i % call_.heads_q);
    });
    for (long i = 0; merge_alone && i < call_.batch * call_.heads_q; ++i) merge(i / call_.heads_q, i % call_.heads_q);
    return true;
  }

 private:
  struct Scratch {
    Query* q;                   // [rows, width]
    A *scores, *bias, *rescale;  // [kAtOnce, kStep], [kStep], [kAtOnce]
    const K **k, **v;            // [kStep + kAhead], rows
    long known;                  // rows in k and v
    float *k_scale, *v_scale;    // [kStep], of int8
    std::conditional_t<kTiles, DecodeTiles<K>, int> tiles;
    Scratch(const Decode& d, Arena& arena) : tiles(d.tiles(arena)) {
      q = arena.take<Query>(d.rows_ * d.width_);
      scores = arena.take<A>(kAtOnce * kStep), bias = arena.take<A>(kStep), rescale = arena.take<A>(kAtOnce);
      k = arena.take<const K*>(kStep + kAhead), v = arena.take<const K*>(kStep + kAhead);
      k_scale = arena.take<float>(kScaled ? kStep : 0), v_scale = arena.take<float>(kScaled ? kStep : 0);
    }
  };

  auto tiles(Arena& arena) const {
    if constexpr (kTiles)
      return DecodeTiles<K>(call_.dim, call_.dim_v, rows_, kStep, call_.k.row, arena);
    else
      return 0;
  }

  // Keys a task of a sequence: enough tasks for many threads, though heads are few.
  static long chunk_of(const Sequence& s) { return least(kMost, most(kLeast, round_up(s.tk / kTasks, kEven))); }

  void compute(long task, Scratch& x) {
    const long b = task / chunks_ / call_.heads_k, hk = task / chunks_ % call_.heads_k;
    const Sequence s(call_, b);
    if (!s.is_decoded()) return;
    A *const o = o_ + task * rows_ * width_v_, *const max = max_ + task * rows_, *const sum = sum_ + task * rows_;
    for (long r = 0; r < rows_; ++r) max[r] = A(-kInfinity), sum[r] = 0;
    const long rows = group_ * s.tq;
    if (rows == 0) return;
    const long chunk = chunk_of(s), first = task % chunks_ * chunk;
    const auto [begin, end] = s.seen_of(first, first + chunk, 0, s.tq);
    if (begin >= end) return;
    for (long r = 0; r < rows; ++r) {  // row r: head r / tq of the group, query r % tq
      const S* q = at<S>(call_.q, b, hk * group_ + r / s.tq, s.q_row + r % s.tq);
      if constexpr (kDot)
        pad_rows(q, 0, 1, call_.dim, width_, x.q + r * width_);
      else
        widen_rows(q, 0, 1, 1, call_.dim, width_, x.q + r * width_);
      for (long d = 0; d < width_v_; d += L) store(o + r * width_v_ + d, Vec<A>{});
    }
    if constexpr (kTiles) x.tiles.take_queries(x.q, rows);
    for (long j = begin; j < end; j += kStep) {
      const long n = least(kStep, end - j);
      x.known = least(asks_ ? kStep + kAhead : kStep, end - j);
      rows_of(call_, call_.k, s, b, hk, j, x.known, x.k), rows_of(call_, call_.v, s, b, hk, j, x.known, x.v);
      for (long i = x.known; i % 4 != 0; ++i) x.k[i] = x.k[i - 1];  // keys are met four at a time
      if constexpr (kScaled)
        scales_of(call_, call_.k_scale, s, b, hk, j, n, x.k_scale), scales_of(call_, call_.v_scale, s, b, hk, j, n, x.v_scale);
      if constexpr (kTiles) {
        meet_tiles(s, b, hk, rows, j, n, o, max, sum, x);
        continue;
      }
      for (long r = 0; r < rows; r += kRows) {
        switch (least(kRows, rows - r)) {
          case 1:
            meet<1>(s, b, hk, r, j, n, o, max, sum, x);
            break;
          case 2:
            meet<2>(s, b, hk, r, j, n, o, max, sum, x);
            break;
          case 3:
            meet<3>(s, b, hk, r, j, n, o, max, sum, x);
            break;
          default:
            meet<4>(s, b, hk, r, j, n, o, max, sum, x);
        }
      }
    }
    if constexpr (kTiles)
      for (long r = 0; r < rows; ++r) x.tiles.order(o + r * width_v_);
  }

  // Rows r.. meet keys [j0, j0 + n).
  template <int R>
  void meet(const Sequence& s, long b, long hk, long r, long j0, long n, A* o, A* max, A* sum, Scratch& x) const {
    multiply_keys<R>(x, n, x.q + r * width_, asks_ && r == 0);
    for (int i = 0; i < R; ++i) weigh(s, b, hk, r, i, j0, n, max, sum, x);
    const int vectors = int(width_v_ / L);
    for (int c = 0; c < vectors; c += 4) {
      const long wide = call_.dim_v - long(c) * L;
      A* const out = o + r * width_v_ + c * L;
      if (wide >= 4 * L)
        multiply_values<R, 4, true>(c * L, n, x, out, wide, asks_ && r == 0);
      else
        for (int one = c; one < vectors; ++one)
          multiply_values<R, 1, false>(one * L, n, x, o + r * width_v_ + one * L, call_.dim_v - long(one) * L, false);
    }
  }

  // The same of all rows, by tiles.
  void meet_tiles(const Sequence& s, long b, long hk, long rows, long j0, long n, A* o, A* max, A* sum, Scratch& x) const {
    if constexpr (kTiles) {
      auto& tiles = x.tiles;
      Ahead<K> ahead;
      if (asks_) ahead = Ahead<K>(x.k + n, x.v + n, x.known - n, call_.dim, call_.dim_v);
      tiles.take_values(x.v, n, ahead);
      for (long r = 0; r < rows; r += tiles.kRows) {
        const int count = int(least(tiles.kRows, rows - r));
        tiles.multiply_keys(x.k, n, r, count, x.scores, ahead);
        const long share = ahead.share(4, rows);
        for (int i = 0; i < count; ++i) {
          if (!tiles.is_finite(r + i)) multiply_one_by_one(x.q + (r + i) * width_, x.k, n, x.scores + i * kStep);
          weigh(s, b, hk, r, i, j0, n, max, sum, x);
          ahead.ask(share);
          tiles.take_weights(i, x.scores + i * kStep, n);
        }
        tiles.add_values(n, count, x.rescale, o + r * width_v_, ahead);
      }
    }
  }

  void multiply_one_by_one(const Query* q, const K* const* k, long n, A* scores) const {
    for (long j = 0; j < n; ++j) {
      scores[j] = 0;
      for (long d = 0; d < call_.dim; ++d) scores[j] += widen(q[d]) * widen(k[j][d]);
    }
  }

  // Products of row r + i, the i-th of those at once, to weights of v.
  void weigh(const Sequence& s, long b, long hk, long r, int i, long j0, long n, A* max, A* sum, Scratch& x) const {
    const long h = hk * group_ + (r + i) / s.tq, row = (r + i) % s.tq;
    A* const scores = x.scores + i * kStep;
    if constexpr (kScaled) multiply(scores, x.k_scale, n);
    score(s, b, h, row, j0, n, scores, x.bias);
    exponentiate(scores, n, max[r + i], sum[r + i], x.rescale[i]);
    if (dropout_.active) drop(b, h, row, j0, n, scores);
    if constexpr (kScaled) multiply(scores, x.v_scale, n);
  }

  static void multiply(A* x, const float* by, long n) {
    for (long j = 0; j < n; j += L) store(x + j, load(x + j) * load(by + j));
  }

  // Asks for `count` elements of a row that will be read soon, into the second cache: rows that lie a power of two apart would
  // drive each other out of the first. The processor's own prefetchers stop at each page of memory, which has only a few rows.
  static FASTSEQ_INLINE void ask(const K* row, int count) {
    FASTSEQ_UNROLL for (int i = 0; i < count; i += 64 / int(sizeof(K))) __builtin_prefetch(row + i, 0, 2);
  }

  template <int R>
  __attribute__((noinline)) void multiply_keys(const Scratch& x, long n, const Query* q, bool asks) const {
    for (long j = 0; j < n; j += 4) {
      const K* const* const ahead = asks ? x.k + (j + kAhead < x.known ? j + kAhead : j) : nullptr;
      Vec<A> acc[R][4] = {};
      long d = 0;
      for (; d + kQueryLanes <= call_.dim; d += kQueryLanes) {
        if (ahead && (kQueryLanes * sizeof(K) >= 64 || d * sizeof(K) % 64 == 0))
          FASTSEQ_UNROLL for (int i = 0; i < 4; ++i) ask(ahead[i] + d, 1);
        add_products<R, true>(x.k + j, d, q, acc);
      }
      if (d < call_.dim) add_products<R, false>(x.k + j, d, q, acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum_four<A>(acc[r], x.scores + r * kStep + j);
    }
  }
  template <int R, bool kWhole>
  FASTSEQ_INLINE void add_products(const K* const* rows, long d, const Query* q, Vec<A> (&acc)[R][4]) const {
#if defined(__AVX512BF16__)
    if constexpr (kDot) {
      const __mmask32 some = __mmask32((uint64_t(1) << (kWhole ? 32 : call_.dim - d)) - 1);
      __m512bh kv[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        kv[i] = (__m512bh)(kWhole ? _mm512_loadu_si512(rows[i] + d) : _mm512_maskz_loadu_epi16(some, rows[i] + d));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512bh qv = (__m512bh)_mm512_loadu_si512(q + r * width_ + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = (Vec<A>)_mm512_dpbf16_ps((__m512)acc[r][i], qv, kv[i]);
      }
      return;
    }
#endif
    if constexpr (!kDot) {
      Vec<A> kv[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) kv[i] = kWhole ? load(rows[i] + d) : load_n(rows[i] + d, int(call_.dim - d));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> qv = load(q + r * width_ + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] += qv * kv[i];
      }
    }
  }

  template <int R, int N, bool kWhole>
  void multiply_values(long d, long n, const Scratch& x, A* o, long wide, bool asks) const {
    Vec<A> acc[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) acc[r][c] = load(o + r * width_v_ + c * L) * x.rescale[r];
    for (long j = 0; j < n; ++j) {
      if (asks) ask(x.v[j + kAhead < x.known ? j + kAhead : j] + d, N * L);
      const K* const v = x.v[j] + d;
      Vec<A> vv[N];
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) vv[c] = kWhole ? load(v + c * L) : load_n(v, int(least(L, wide)));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const A p = x.scores[r * kStep + j];
#pragma GCC unroll 4
        for (int c = 0; c < N; ++c) acc[r][c] += vv[c] * p;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) store(o + r * width_v_ + c * L, acc[r][c]);
  }

  // Products to scores for one row, -inf where the key is not seen and up to a whole vector.
  void score(const Sequence& s, long b, long h, long i, long j0, long n, A* scores, A* bias) const {
    const A hidden = A(-kInfinity);
    if (!scoring_.plain) {
      const A cap = A(call_.softcap), alibi = slope_of<S>(call_, h);
      const bool is_float = call_.bias_dtype == Dtype::f32;
      const Pairs& p = call_.bias;
      const long start = b * p.batch + h * p.head + i * p.row + j0 * p.step;
      for (long j = 0; j < n; ++j) bias[j] = p.data ? read_number<S>(p.data, is_float, start + j * p.step) : A(0);
      for (long j = n; j < round_up(n, L); ++j) bias[j] = scores[j] = 0;
      for (long j = 0; j < n; j += L) {
        Vec<A> x = load(scores + j) * A(call_.scale);
        if (cap != 0) x = tanh<A>(x / cap) * cap;
        const Vec<A> add = load(bias + j);
        x = add == hidden ? splat(hidden) : x + add;
        if (alibi != 0) x -= magnitude<A>(A(i + s.shift - j0 - j) - lane_numbers<A>()) * alibi;
        store(scores + j, x);
      }
    }
    s.hide(j0, j0 + n, i, scores, hidden);
    for (long j = n; j < round_up(n, L); ++j) scores[j] = hidden;
    if (call_.mask.data) {
      const uint8_t* mask = at<uint8_t>(call_.mask, b, h, i, j0);
      const long step = call_.mask.step;
      for (long j = 0; j < n; ++j) scores[j] = mask[j * step] ? scores[j] : hidden;
    }
  }

  void exponentiate(A* scores, long n, A& max, A& sum, A& rescale) const {
    Vec<A> tops = splat(A(-kInfinity));
    for (long j = 0; j < n; j += L) tops = maximum<A>(load(scores + j), tops);
    const A top = most_of(max, greatest_lane<A>(tops));
    const A safe = top == A(-kInfinity) ? A(0) : top;
    const Vec<A> factor = splat(scoring_.factor), base = splat(safe);
    rescale = exp2<A>((max - base) * factor)[0];
    Vec<A> sums{};
    for (long j = 0; j < n; j += L) {
      const Vec<A> p = exp2<A>((load(scores + j) - base) * factor);
      sums += p;
      store(scores + j, p);
    }
    sum = sum * rescale + sum_lanes<A>(sums);
    max = top;
  }

  void drop(long b, long h, long i, long j0, long n, A* p) const {
    for (long j = j0 / 4 * 4; j < j0 + n; j += 4) {
      uint32_t random[4][1];
      philox(dropout_.seed, uint32_t(j / 4), uint32_t(i), uint32_t(h), uint32_t(b), random);
      for (int w = 0; w < 4; ++w)
        if (j + w >= j0 && j + w < j0 + n && random[w][0] < dropout_.threshold) p[j + w - j0] = 0;
    }
  }

  // The chunks of every query of one head.
  void merge(long b, long h) const {
    const Sequence s(call_, b);
    if (!s.is_decoded()) return;
    const bool has_sink = call_.sinks != nullptr;
    const A sink = has_sink ? read_number<S>(call_.sinks, call_.sinks_dtype == Dtype::f32, h) : A(0);
    const A unit = scoring_.unit;
    const long first = (b * call_.heads_k + h / group_) * chunks_;
    const long own = (s.tk + chunk_of(s) - 1) / chunk_of(s);
    for (long i = 0; i < s.rows; ++i) {
      const long r = h % group_ * s.tq + i;
      S* const out = at<S>(call_.o, b, h, s.q_row + i);
      const auto place = [&](long c) { return (first + c) * rows_ + r; };
      const long chunks = i < s.tq ? own : 0;
      A top = A(-kInfinity), sum = 0;
      for (long c = 0; c < chunks; ++c) top = most_of(max_[place(c)], top);
      if (has_sink && i < s.tq) top = most_of(sink / unit, top);
      for (long c = 0; c < chunks; ++c) {
        A& weight = max_[place(c)];  // in place of the maximum; -1 where no key was seen, so that o is not there either
        if (weight > A(-kInfinity) || sum_[place(c)] != 0)
          weight = A(__builtin_exp((weight - top) * unit)), sum += sum_[place(c)] * weight;
        else
          weight = -1;
      }
      if (has_sink && i < s.tq && sink > A(-kInfinity)) sum += A(__builtin_exp(sink - top * unit));
      at<A>(call_.lse, b, h, s.q_row)[i] = top * unit + A(__builtin_log(sum));
      const A share = sum == 0 ? A(0) : A(dropout_.active ? dropout_.scale : 1.0) / sum;
      for (long d = 0; d < call_.dim_v; d += L) {
        Vec<A> o{};
        for (long c = 0; c < chunks; ++c)
          if (const A weight = max_[place(c)]; weight >= 0 || weight != weight) o += load(o_ + place(c) * width_v_ + d) * weight;
        store_n(out + d, o * share, int(least(L, call_.dim_v - d)));
      }
    }
  }
  static A most_of(A a, A b) { return a > b ? a : b; }

  const AttentionForward& call_;
  const Scoring<S> scoring_;
  const Dropout dropout_;
  const long group_, rows_, width_, width_v_;
  long chunks_ = 1;    // of the longest sequence
  bool asks_ = false;  // for memory before it is read
  A *o_ = nullptr, *max_ = nullptr, *sum_ = nullptr;  // [B, Hk, chunks, rows] (o: times width_v)
};

}  // namespace
}  // namespace attention

bool attention_decode(const AttentionForward& call) {
  return for_dtype(call.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (!__is_same(S, double)) {
      if (call.k_scale.data) return attention::Decode<S, q8>(call).run();
    }
    return attention::Decode<S, S>(call).run();
  });
}

}  // namespace fastseq::FASTSEQ_ISA
