// What both backward passes share: P and the gradient of the scores, one tile of keys x 64 queries at a time.
//
//   p = share exp(s - lse);  dp[i,j] = do[i]·v[j];  delta[i] = do[i]·o[i];  ds = p (dp - delta - rest)
//
// With dropout p reaches o as m p / (1 - rate), so dp is masked and scaled alike, and delta needs no change. Everything
// is transposed, lanes being queries, as in the forward.
//
// Without rounding, share is 1 and rest is -dlse. But lse is one number, and the larger it is, the less of the logarithm of
// the sum it holds; and o is rounded, so that with delta alone a row of ds does not sum to what it must, and what keys
// have in common multiplies the difference. Sums over the row's keys make up for both:
//
//   share[i] = 1 / sum_j exp(s[i,j] - lse[i]);  rest[i] = sum_j p (dp - delta) - dlse[i]
#pragma once
#include "attention/cpu/attention.h"
#include "attention/cpu/scores.h"
#include "attention/cpu/tile.h"

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
    A* offset;                   // [64]: -lse log2 e; -inf where nothing is seen
    A* base;                     // [64]: lse where it is far (then offset is 0), else 0
    A *sum, *dot;                // [64]: of the keys met so far, of p before its share, and of that by dp - delta
    A *share, *delta, *rest;     // [64]; 0 where nothing is seen
    A* carry;                    // [64]: what the rounding of ds has left so far,
    int32_t* carrier;            // and the key that it belongs to
    double dsink = 0;            // the block's part of the sink's gradient

    Queries(const Gradient& g, Arena& arena) {
      q = arena.take<Element>(g.pairs * kQueries), d_o = arena.take<Element>(g.pairs_v * kQueries);
      q_copy = arena.take<Element>(g.copy_q ? kQueries / Op::depth * g.width : 0);
      d_o_copy = arena.take<Element>(g.copy_d_o ? kQueries / Op::depth * g.width_v : 0);
      offset = arena.take<A>(kQueries), base = arena.take<A>(kQueries);
      sum = arena.take<A>(kQueries), dot = arena.take<A>(kQueries);
      share = arena.take<A>(kQueries), delta = arena.take<A>(kQueries), rest = arena.take<A>(kQueries);
      carry = arena.take<A>(kDot ? kQueries : 0), carrier = arena.take<int32_t>(kDot ? kQueries : 0);
    }
  };
  // Keys from some row on, by rows (strides in bytes).
  struct Keys {
    const char *k, *v;
    long k_row, v_row;
  };
  // A tile, or with room for more keys one beside the other: `at` is the one that begins at a key.
  struct Tile {
    A *scores, *dp, *slope;    // [keys, 64]; scores become P, dp the scores' gradient
    uint64_t *words, *kept;    // [keys]
    A* bias;                   // of one tile, [keys, 64], as all that follows
    S *p, *ds;                 // P and the scores' gradient rounded
    uint32_t* ds_pairs;        // the latter for dq: [keys / 2, 64]

    Tile(const Gradient& g, Arena& arena, long room) {
      const long keys = most(2, least(kGradientKeys, round_up(g.call.length_k, 2)));
      room = most(keys, room);
      scores = arena.take<A>(room * kQueries), dp = arena.take<A>(room * kQueries);
      slope = arena.take<A>(g.call.softcap != 0 ? room * kQueries : 0);
      words = arena.take<uint64_t>(room), kept = arena.take<uint64_t>(g.dropout.active ? room : 0);
      bias = arena.take<A>(g.scoring.scratch(keys));
      p = arena.take<S>(kDot ? keys * kQueries : 0), ds = arena.take<S>(kDot ? keys * kQueries : 0);
      ds_pairs = arena.take<uint32_t>(kDot ? keys / 2 * kQueries : 0);
    }
    Tile at(long key) const {
      Tile out = *this;
      out.scores += key * kQueries, out.dp += key * kQueries, out.slope += key * kQueries;
      out.words += key, out.kept += key;
      return out;
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
    for (int i = 0; i < kQueries; ++i) {
      x.offset[i] = A(-kInfinity), x.base[i] = x.sum[i] = x.dot[i] = x.delta[i] = 0;
      if (kDot) x.carry[i] = 0, x.carrier[i] = 0;
      if (i >= x.count || lse[i] == A(-kInfinity)) continue;
      x.offset[i] = -lse[i] * A(kLog2e);
      if (__builtin_fabs(double(x.offset[i])) > double(kFar<A>)) x.offset[i] = 0, x.base[i] = lse[i];
      const S *one = d_o + i * call.d_o.row, *two = at<S>(call.o, b, h, s.q_row + i0 + i);
      Vec<A> sum{};
      for (long d = 0; d < call.dim_v; d += L) {
        const int n = int(least(L, call.dim_v - d));
        sum += load_n(one + d, n) * load_n(two + d, n);
      }
      x.delta[i] = sum_lanes<A>(sum);
    }
  }

  // The rows' share and rest, once sum and dot are of all keys.
  void settle(const Sequence& s, long b, Queries& x) const {
    const A* lse = at<A>(call.lse, b, x.h, s.q_row + x.i0);
    const A* dlse = call.dlse.data ? at<A>(call.dlse, b, x.h, s.q_row + x.i0) : nullptr;
    const bool has_sink = call.sinks != nullptr;
    const A sink = has_sink ? read_number<S>(call.sinks, call.sinks_dtype == Dtype::f32, x.h) : A(0);
    for (int i = 0; i < kQueries; ++i) {
      x.share[i] = x.rest[i] = 0;
      if (i >= x.count || lse[i] == A(-kInfinity)) continue;
      const double of_sink =
          has_sink ? __builtin_exp2((double(sink) - double(x.base[i])) * kLog2e + double(x.offset[i])) : 0.0;
      const A sum = x.sum[i] + A(of_sink);
      x.share[i] = sum == 0 ? A(0) : 1 / sum;
      x.rest[i] = (x.dot[i] - A(of_sink) * x.delta[i]) * x.share[i] - (dlse ? dlse[i] : A(0));
      x.dsink -= of_sink * double(x.share[i]) * double(x.delta[i] + x.rest[i]);
    }
  }

  // Leaves the rows' share and rest in call.rows, or takes them from there.
  void remember(long b, const Queries& x) const {
    for (int i = 0; i < x.count; ++i) row(b, x, i)[0] = x.share[i], row(b, x, i)[1] = x.rest[i];
  }
  void recall(long b, Queries& x) const {
    for (int i = 0; i < kQueries; ++i) {
      x.share[i] = i < x.count ? row(b, x, i)[0] : A(0);
      x.rest[i] = i < x.count ? row(b, x, i)[1] : A(0);
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

  // Fills x.scores with P before its share and x.dp with do·v, as dropout leaves it, for keys [j0, j1), which
  // visibility() has left; `keys` begins at key `base`. Adds to the rows' sum and dot.
  void weigh(const Sequence& s, long b, const Queries& q, const Keys& keys, long base, long j0, long j1, Seen seen,
             const Tile& x) const {
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
      for_seen_rows(words, n, kRowsAtOnce<Op>, [&](long row, long rows, int begin, int end) {
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
    if (dropout.active) dropout.keep(b, q.h, q.i0, j0, j1, x.kept);
    exponentiate(q, words, n, x);
  }

  // Fills x.scores with P and x.dp with the gradient of q·k (of the scores as they enter the softmax: kBias), from what
  // weigh() left and the rows' share and rest.
  template <bool kBias>
  void differentiate(const Queries& q, const uint64_t* words, long j0, long n, const Tile& x) const {
    if (dropout.active)
      elements<true, kBias>(q, words, j0, n, x);
    else
      elements<false, kBias>(q, words, j0, n, x);
  }

 private:
  A* row(long b, const Queries& x, int i) const {
    return static_cast<A*>(call.rows) + ((b * call.heads_q + x.h) * call.length_q + x.i0 + i) * 2;
  }
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

  void exponentiate(const Queries& q, const uint64_t* words, long n, const Tile& x) const {
    const Vec<A> factor = splat(scoring.factor), unit = splat(scoring.unit), zero{};
    const A kept_scale = A(dropout.scale);
    const bool careful = words || !scoring.plain;  // a score may be hidden, with anything at all in its dp
    for (int v = 0; v < q.vectors; ++v) {
      const Vec<A> offset = load(q.offset + v * L), base = load(q.base + v * L), delta = load(q.delta + v * L);
      Vec<A> sum{}, dot{};
      const auto all = [&](auto is_far) {
        for (long j = 0; j < n; ++j) {
          const long place = j * kQueries + v * L;
          const uint64_t bits = words ? words[j] >> (v * L) & kLaneBits<A> : kLaneBits<A>;
          if (bits == 0) continue;
          Vec<A> exponent = load(x.scores + place) * factor + offset;
          if constexpr (is_far()) exponent = (load(x.scores + place) * unit - base) * A(kLog2e) + offset;
          Vec<A> p = exp2<A, kDegree>(exponent), dp = load(x.dp + place);
          if (words) p = select<A>(bits, p, zero);
          if (dropout.active) {
            dp = select<A>(x.kept[j] >> (v * L), dp * kept_scale, zero);
            store(x.dp + place, dp);
          }
          sum += p;
          dot += careful ? (p == A(0) ? zero : p * (dp - delta)) : p * (dp - delta);
          store(x.scores + place, p);
        }
      };
      any<A>(base != A(0)) ? all(std::true_type()) : all(std::false_type());
      store(q.sum + v * L, load(q.sum + v * L) + sum), store(q.dot + v * L, load(q.dot + v * L) + dot);
    }
  }

#if defined(__AVX512BF16__)
  // x of key j and the carry rounded to bfloat16, as floats' bits, and what that leaves in the carry; a hidden x stays 0.
  static FASTSEQ_INLINE __m512i carried(Vec<float> x, long j, Vec<float>& carry, IntVec<float>& carrier) {
    const Vec<float> whole = x == 0.0f ? x : x + carry;
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)whole)), 16);
    carry = x == 0.0f ? carry : whole - (Vec<float>)bits;
    carrier = x == 0.0f ? carrier : splat(int32_t(j));
    return bits;
  }
#endif

  template <bool kDropout, bool kBias>
  void elements(const Queries& q, const uint64_t* words, long j0, long n, const Tile& x) const {
    const Vec<A> zero{};
    const A scale = A(call.scale), kept_scale = A(dropout.scale);
    const bool careful = words || !scoring.plain;
    const bool slope = call.softcap != 0;
    for (int v = 0; v < q.vectors; ++v) {
      const Vec<A> share = load(q.share + v * L), delta = load(q.delta + v * L), rest = load(q.rest + v * L);
      struct Pair {
        Vec<A> p, ds;
      };
      const auto one = [&](long j) -> Pair {
        const uint64_t bits = words ? words[j] >> (v * L) & kLaneBits<A> : kLaneBits<A>;
        if (bits == 0) return {zero, zero};
        const long place = j * kQueries + v * L;
        const Vec<A> p = load(x.scores + place) * share;
        Vec<A> ds = p * ((load(x.dp + place) - delta) - rest);
        if (careful) ds = p == A(0) ? zero : ds;
        if constexpr (!kBias) {
          if (slope) ds = p == A(0) ? zero : ds * load(x.slope + place);
          ds *= scale;
        }
        if constexpr (kDropout) return {select<A>(x.kept[j] >> (v * L), p * kept_scale, zero), ds};
        return {p, ds};
      };
      if constexpr (kDot && !kBias) {
#if defined(__AVX512BF16__)
        // dq is a sum over keys, and what they have in common falls out of it only as far as the row of ds sums to 0:
        // there a key takes over what the rounding of the one before has left, and dq what is left in the end.
        Vec<A> carry = load(q.carry + v * L);
        IntVec<A> carrier = load(q.carrier + v * L);
        for (long j = 0; j < n; j += 2) {
          const Pair low = one(j), high = j + 1 < n ? one(j + 1) : Pair{zero, zero};
          const __m512i ds = narrow_pairs(low.ds, high.ds);
          const long place = j * kQueries + v * L;
          store(x.p + place, low.p), store(x.p + place + kQueries, high.p);
          _mm256_store_si256((__m256i*)(x.ds + place), _mm512_cvtepi32_epi16(ds));
          _mm256_store_si256((__m256i*)(x.ds + place + kQueries), _mm512_cvtepi32_epi16(_mm512_srli_epi32(ds, 16)));
          const __m512i even = carried(low.ds, j0 + j, carry, carrier);
          const __m512i odd = carried(high.ds, j0 + j + 1, carry, carrier);
          _mm512_store_si512(x.ds_pairs + j / 2 * kQueries + v * L, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
        }
        store(q.carry + v * L, carry), store(q.carrier + v * L, carrier);
#endif
      } else {
        for (long j = 0; j < n; ++j) {
          const Pair both = one(j);
          if constexpr (!kBias) store(x.scores + j * kQueries + v * L, both.p);
          store(x.dp + j * kQueries + v * L, both.ds);
        }
      }
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
