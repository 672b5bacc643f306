// What both backward passes share: P and the gradient of the scores, one tile of keys x 64 queries at a time.
//
//   p = exp(s - lse);  dp[i,j] = do[i]·v[j];  delta[i] = do[i]·o[i] - dlse[i];  ds = p (dp - delta)
//
// With dropout p reaches o as m p / (1 - rate), so dp is masked and scaled alike, and delta needs no change. Everything
// is transposed, lanes being queries, as in the forward; P is made anew from lse and never leaves the cache.
#pragma once
#include "attention.h"
#include "attention_scores.h"
#include "attention_tile.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr long kGradientKeys = 128;  // keys a tile, at most

// Keys a tile of a sequence: equal tiles, even, for products by pairs.
inline long gradient_keys(long keys) {
  const long blocks = most(1, (keys + kGradientKeys - 1) / kGradientKeys);
  return most(2, round_up((keys + blocks - 1) / blocks, 2));
}

template <class S>
class Gradient {
 public:
  using A = Accumulator<S>;
  static constexpr int L = kLanes<A>;
  static constexpr bool kDot = kHasDot && __is_same(S, bf16);
  static constexpr bool kWiden = sizeof(S) != sizeof(A) && !kDot;
  using Op = std::conditional_t<kDot, Dot, Fma<A>>;
  using Element = typename Op::Element;
  using Copy = std::conditional_t<kDot, S, A>;  // a copied row of K or V
  static constexpr int kDegree = kDot ? 4 : kFullDegree<A>;

  explicit Gradient(const AttentionBackward& call)
      : call(call), scoring(call), dropout(call), group(call.heads_q / call.heads_k), width(round_up(call.dim, L)),
        width_v(round_up(call.dim_v, L)), pairs((call.dim + Op::depth - 1) / Op::depth),
        pairs_v((call.dim_v + Op::depth - 1) / Op::depth),
        copy_k(kDot ? call.dim % 2 != 0 : kWiden || call.dim % L != 0), copy_v(kDot ? call.dim_v % 2 != 0 : kWiden),
        copy_q(kDot || kWiden || call.dim % L != 0), copy_d_o(kDot || kWiden || call.dim_v % L != 0) {}

  const AttentionBackward& call;
  const Scoring<S> scoring;
  const Dropout dropout;
  const long group, width, width_v, pairs, pairs_v;
  const bool copy_k, copy_v, copy_q, copy_d_o;

  // Length of a copied row of K or V, in Copy.
  long k_copy_row() const { return kDot ? 2 * pairs : width; }
  long v_copy_row() const { return kDot ? 2 * pairs_v : width_v; }

  // One block of queries, in the forms that the products want.
  struct Queries {
    long h = 0, i0 = 0;
    int count = 0, vectors = 0;
    Element *q, *d_o;            // Q^T [D, 64], dO^T [Dv, 64] (by pairs of features)
    const Element *q_rows = nullptr, *d_o_rows = nullptr;  // Q [64, D], dO [64, Dv] (by pairs of rows)
    long q_row = 0, d_o_row = 0;                           // elements
    Element *q_copy, *d_o_copy;
    A *offset, *delta;           // [64]: -lse log2 e, delta; -inf and 0 where nothing is seen
    A* base;                     // [64]: lse as a score where it is far (then offset is 0), else 0
    double dsink = 0;            // the block's part of the sink's gradient

    Queries(const Gradient& g, Arena& arena) {
      q = arena.take<Element>(g.pairs * kQueries), d_o = arena.take<Element>(g.pairs_v * kQueries);
      q_copy = arena.take<Element>(g.copy_q ? kQueries / Op::depth * g.width : 0);
      d_o_copy = arena.take<Element>(g.copy_d_o ? kQueries / Op::depth * g.width_v : 0);
      offset = arena.take<A>(kQueries), delta = arena.take<A>(kQueries), base = arena.take<A>(kQueries);
    }
  };
  // Keys from some row on, by rows (strides in bytes).
  struct Keys {
    const char *k, *v;
    long k_row, v_row;
  };
  struct Tile {
    A *scores, *dp, *slope, *bias;  // [keys, 64]; scores become P, dp the scores' gradient
    S *p, *ds;                      // the same rounded: [keys, 64]
    uint32_t* ds_pairs;             // [keys / 2, 64]
    uint64_t *words, *kept;

    Tile(const Gradient& g, Arena& arena) {
      const long keys = most(2, least(kGradientKeys, round_up(g.call.length_k, 2)));
      scores = arena.take<A>(keys * kQueries), dp = arena.take<A>(keys * kQueries);
      slope = arena.take<A>(g.call.softcap != 0 ? keys * kQueries : 0);
      bias = arena.take<A>(g.scoring.scratch(keys));
      p = arena.take<S>(kDot ? keys * kQueries : 0), ds = arena.take<S>(kDot ? keys * kQueries : 0);
      ds_pairs = arena.take<uint32_t>(kDot ? keys / 2 * kQueries : 0);
      words = arena.take<uint64_t>(keys), kept = arena.take<uint64_t>(g.dropout.active ? keys : 0);
    }
  };

  void load_queries(const Sequence& s, long b, long h, long i0, bool rows, Queries& x) const {
    x.h = h, x.i0 = i0;
    x.count = int(most(0, least(kQueries, s.tq - i0)));
    x.vectors = (x.count + L - 1) / L;
    x.dsink = 0;
    if (x.count == 0) return;
    const S* q = at<S>(call.q, b, h, s.q_row + i0);
    const S* d_o = at<S>(call.d_o, b, h, s.q_row + i0);
    pack(q, call.q.row, x.count, call.dim, x.q);
    pack(d_o, call.d_o.row, x.count, call.dim_v, x.d_o);
    if (rows) {
      lay_rows(q, call.q.row, x.count, call.dim, width, copy_q, x.q_copy, x.q_rows, x.q_row);
      lay_rows(d_o, call.d_o.row, x.count, call.dim_v, width_v, copy_d_o, x.d_o_copy, x.d_o_rows, x.d_o_row);
    }
    const A* lse = at<A>(call.lse, b, h, s.q_row + i0);
    const A* dlse = call.dlse.data ? at<A>(call.dlse, b, h, s.q_row + i0) : nullptr;
    const bool has_sink = call.dsinks != nullptr;
    const A sink = has_sink ? read_number<S>(call.sinks, call.sinks_dtype == AttentionCall::Dtype::f32, h) : A(0);
    for (int i = 0; i < kQueries; ++i) {
      x.offset[i] = A(-kInfinity), x.delta[i] = x.base[i] = 0;
      if (i >= x.count || lse[i] == A(-kInfinity)) continue;
      x.offset[i] = -lse[i] * A(kLog2e);
      if (__builtin_fabs(double(x.offset[i])) > double(kFar<A>)) x.offset[i] = 0, x.base[i] = lse[i] / scoring.unit;
      const S *one = d_o + i * call.d_o.row, *two = at<S>(call.o, b, h, s.q_row + i0 + i);
      Vec<A> sum{};
      for (long d = 0; d < call.dim_v; d += L) {
        const int n = int(least(L, call.dim_v - d));
        sum += load_n(one + d, n) * load_n(two + d, n);
      }
      x.delta[i] = sum_lanes<A>(sum) - (dlse ? dlse[i] : A(0));
      if (has_sink) x.dsink -= __builtin_exp(double(sink) - double(lse[i])) * double(x.delta[i]);
    }
  }

  // Copies of the keys [j0, j1), where the products need one; `k` and `v` are room for it.
  Keys keys(const Sequence& s, long b, long hk, long j0, long j1, Copy* k, Copy* v) const {
    const S* from_k = at<S>(call.k, b, hk, s.k_row + j0);
    const S* from_v = at<S>(call.v, b, hk, s.k_row + j0);
    Keys out{reinterpret_cast<const char*>(from_k), reinterpret_cast<const char*>(from_v),
             call.k.row * long(sizeof(S)), call.v.row * long(sizeof(S))};
    if (copy_k) {
      copy_rows(from_k, call.k.row, j1 - j0, call.dim, k_copy_row(), k);
      out.k = reinterpret_cast<const char*>(k), out.k_row = k_copy_row() * long(sizeof(Copy));
    }
    if (copy_v) {
      copy_rows(from_v, call.v.row, j1 - j0, call.dim_v, v_copy_row(), v);
      out.v = reinterpret_cast<const char*>(v), out.v_row = v_copy_row() * long(sizeof(Copy));
    }
    return out;
  }

  // Fills x.scores with P and x.dp with the gradient of q·k (of the scores as they enter the softmax: kBias) for keys
  // [j0, j1), which visibility() has left; `keys` begins at key `base`.
  template <bool kBias>
  void differentiate(const Sequence& s, long b, const Queries& q, const Keys& keys, long base, long j0, long j1,
                     Seen seen, Tile& x) const {
    const long n = j1 - j0;
    const uint64_t* words = seen == Seen::all ? nullptr : x.words;
    const Operands<Op> to_s{keys.k + (j0 - base) * keys.k_row, keys.k_row, long(sizeof(Element)), q.q, kQueries,
                            x.scores, kQueries};
    const Operands<Op> to_dp{keys.v + (j0 - base) * keys.v_row, keys.v_row, long(sizeof(Element)), q.d_o, kQueries,
                             x.dp, kQueries};
    if (!words) {
      deep_product(to_s, n, q.vectors, pairs);
      deep_product(to_dp, n, q.vectors, pairs_v);
    } else {
      for_seen_rows(words, n, kTileRows, [&](long row, long rows, int begin, int end) {
        const int v0 = begin / L, v1 = (end + L - 1) / L;
        for (Operands<Op> y : {to_s, to_dp}) {
          const long depth = y.c == x.scores ? pairs : pairs_v;
          y.a += row * y.a_row, y.b += v0 * L, y.c += row * kQueries + v0 * L;
          deep_product(y, rows, v1 - v0, depth);
        }
      });
    }
    if (!scoring.plain) {
      A* slope = call.softcap != 0 ? x.slope : nullptr;
      scoring.finish({x.scores, words, n, q.vectors}, s, b, q.h, q.i0, q.count, j0, x.bias, nullptr, slope);
    }
    if (dropout.active) {
      dropout.keep(b, q.h, q.i0, j0, j1, x.kept);
      elements<true, kBias>(q, words, n, x);
    } else {
      elements<false, kBias>(q, words, n, x);
    }
  }

 private:
  static void pack(const S* rows, long stride, int count, long dim, Element* out) {
    if constexpr (kDot)
      pack_transposed_pairs(rows, stride, count, dim, out);
    else
      pack_transposed(rows, stride, count, dim, out);
  }
  static void lay_rows(const S* rows, long stride, int count, long dim, long wide, bool copy, Element* room,
                       const Element*& out, long& out_row) {
    out = room, out_row = wide;
    if constexpr (kDot)
      interleave_rows(rows, stride, count, (count + 1) / 2, dim, wide, room);
    else if (copy)
      widen_rows(rows, stride, count, count, dim, wide, room);
    else
      out = reinterpret_cast<const Element*>(rows), out_row = stride;
  }
  static void copy_rows(const S* rows, long stride, long count, long dim, long wide, Copy* out) {
    if constexpr (kDot)
      pad_rows(rows, stride, count, dim, wide, out);
    else
      widen_rows(rows, stride, count, count, dim, wide, out);
  }

  template <bool kDropout, bool kBias>
  void elements(const Queries& q, const uint64_t* words, long n, Tile& x) const {
    const Vec<A> factor = splat(scoring.factor), zero{};
    const A scale = A(call.scale), kept_scale = A(dropout.scale);
    const bool careful = words || !scoring.plain;  // a score may be hidden, with anything at all in its dp
    const bool slope = call.softcap != 0;
    for (int v = 0; v < q.vectors; ++v) {
      const Vec<A> offset = load(q.offset + v * L), delta = load(q.delta + v * L), base = load(q.base + v * L);
      struct Pair {
        Vec<A> p, ds;
      };
      const auto one = [&](long j, auto is_far) -> Pair {
        const uint64_t bits = words ? words[j] >> (v * L) & kLaneBits<A> : kLaneBits<A>;
        if (bits == 0) return {zero, zero};
        const long place = j * kQueries + v * L;
        Vec<A> exponent = load(x.scores + place) * factor + offset;
        if constexpr (is_far()) {  // lse has lost the logarithm of a sum that is at least 1
          exponent = (load(x.scores + place) - base) * factor + offset;
          exponent = exponent > A(0) ? zero : exponent;
        }
        Vec<A> p = exp2<A, kDegree>(exponent);
        Vec<A> dp = load(x.dp + place), dropped = p;
        if (words) p = dropped = select<A>(bits, p, zero);
        if constexpr (kDropout) {
          dp = select<A>(x.kept[j] >> (v * L), dp * kept_scale, zero);
          dropped = select<A>(x.kept[j] >> (v * L), p * kept_scale, zero);
        }
        Vec<A> ds = p * (dp - delta);
        if (careful) ds = p == A(0) ? zero : ds;
        if constexpr (!kBias) {
          if (slope) ds = p == A(0) ? zero : ds * load(x.slope + place);
          ds *= scale;
        }
        return {dropped, ds};
      };
      const auto all = [&](auto is_far) {
        if constexpr (kDot && !kBias) {
#if defined(__AVX512BF16__)
          for (long j = 0; j < n; j += 2) {
            const Pair low = one(j, is_far), high = j + 1 < n ? one(j + 1, is_far) : Pair{zero, zero};
            const __m512i ds = narrow_pairs(low.ds, high.ds);
            const long place = j * kQueries + v * L;
            store(x.p + place, low.p), store(x.p + place + kQueries, high.p);
            _mm512_store_si512(x.ds_pairs + j / 2 * kQueries + v * L, ds);
            _mm256_store_si256((__m256i*)(x.ds + place), _mm512_cvtepi32_epi16(ds));
            _mm256_store_si256((__m256i*)(x.ds + place + kQueries), _mm512_cvtepi32_epi16(_mm512_srli_epi32(ds, 16)));
          }
#endif
        } else {
          for (long j = 0; j < n; ++j) {
            const Pair both = one(j, is_far);
            if constexpr (!kBias) store(x.scores + j * kQueries + v * L, both.p);
            store(x.dp + j * kQueries + v * L, both.ds);
          }
        }
      };
      any<A>(base != A(0)) ? all(std::true_type()) : all(std::false_type());
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
