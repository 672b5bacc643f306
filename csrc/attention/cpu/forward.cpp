// o = softmax(q kᵀ) v by tiles of 64 queries and a few hundred keys, with a running maximum and sum a query:
//
//   m' = max(m, max_j s[i,j]);  p = exp(s - m');  l' = l exp(m - m') + sum_j p;  o' = o exp(m - m') + p v
//
// Scores are made transposed, S^T [keys, 64] = K Q^T, lanes being queries: row operations need no shuffles, and only
// Q^T is ever copied. O [64, Dv] += P V takes P by columns and V unpacked; AMX, which wants rows of its first operand, makes
// O^T [Dv, 64] += V^T P^T. Where 16-bit inputs have no instructions of their own, blocks of K and V are widened once for
// several query blocks.
#include <atomic>

#include "attention/cpu/attention.h"
#include "attention/cpu/scores.h"
#include "attention/cpu/tile.h"
#include "core/parallel.h"

namespace fastseq::FASTSEQ_ISA {
namespace attention {
namespace {

constexpr long kKeys = 256;       // keys a block, at most

// Keys a block of a sequence: equal blocks, none much smaller than the others; even, for products by pairs.
long keys_per_block(long keys) {
  const long blocks = most(1, (keys + kKeys - 1) / kKeys);
  return most(2, round_up((keys + blocks - 1) / blocks, 2));
}

template <class S>
class Forward {
 public:
  using A = Accumulator<S>;
  static constexpr int L = kLanes<A>;
  static constexpr bool kDot = kHasDot && __is_same(S, bf16);
  static constexpr bool kWiden = sizeof(S) != sizeof(A) && !kDot;
  using Op = std::conditional_t<kDot, Dot, Fma<A>>;
  using Element = typename Op::Element;
  static constexpr int kDegree = kDot ? 4 : kFullDegree<A>;
  static constexpr bool kColumns = kMatrix<Op>;  // o and v lie by columns
  static constexpr int kBlocksAtOnce = kColumns ? 8 : 4;  // query blocks that share a block of keys
  static constexpr long kColumn = kKeys + 32;  // of v, in elements: columns apart by a power of two would share cache sets
  // How far above the one that o is relative to a maximum may be, as an exponent of 2, before o is scaled down: by columns
  // that is apart from the product.
  static constexpr A kLag = 8;

  explicit Forward(const AttentionForward& call)
      : call_(call), scoring_(call), dropout_(call), group_(call.heads_q / call.heads_k),
        query_blocks_((call.length_q + kQueries - 1) / kQueries), width_v_(round_up(call.dim_v, L)),
        pairs_((call.dim + Op::depth - 1) / Op::depth),
        k_copy_row_(kDot ? 2 * pairs_ : round_up(call.dim, L)), copy_k_(kWiden || (kDot && call.dim % 2 != 0)),
        copy_v_(kWiden || kDot || call.dim_v % L != 0), gathers_(call.pages || call.k_scale.data) {}

  bool run() {
    const long heads = call_.batch * call_.heads_k, blocks = query_blocks_ * group_;
    at_once_ = int(most(1, least(kBlocksAtOnce, blocks)));
    while (at_once_ > 1 && heads * ((blocks + at_once_ - 1) / at_once_) < 4 * call_.threads) at_once_ /= 2;
    bundles_ = (blocks + at_once_ - 1) / at_once_;
    const int threads = int(most(1, least(call_.threads, heads * bundles_)));
    Arena counting;
    Scratch(*this, counting);
    Memory memory(counting.used() * threads);
    if (!memory.data) return false;
    std::atomic<long> next{0};
    parallel(threads, [&](const Team& team) {
      [[maybe_unused]] TileScope tiles;
      Arena arena(memory.data + counting.used() * team.rank);
      Scratch scratch(*this, arena);
      for (long item; (item = next.fetch_add(1, std::memory_order_relaxed)) < heads * bundles_;) {
        // The last queries of a causal sequence have the most work: they go first.
        const long bundle = bundles_ - 1 - item / heads, head = item % heads;
        compute(head / call_.heads_k, head % call_.heads_k, bundle, scratch);
      }
    });
    return true;
  }

 private:
  // What one query block carries from one block of keys to the next.
  struct State {
    Element* q;          // Q^T [D, 64], or by pairs [D / 2, 64]
    A *o, *max, *sum;    // [64, width_v] or its columns, [64], [64]; max as an exponent of 2
    A* highest;          // [64], the same as a score
    long h, i0;
    int count, vectors;
    bool begun;          // o holds something
  };
  struct Scratch {
    Scratch(const Forward& f, Arena& arena) {
      const long keys = most(2, least(kKeys, round_up(f.call_.length_k, 2)));
      for (int i = 0; i < f.at_once_; ++i) {
        state[i].q = arena.take<Element>(f.pairs_ * kQueries);
        state[i].o = arena.take<A>(kQueries * f.width_v_);
        state[i].max = arena.take<A>(kQueries), state[i].highest = arena.take<A>(kQueries);
        state[i].sum = arena.take<A>(kQueries);
      }
      scores = arena.take<A>((kColumns ? most(keys, f.width_v_) : keys) * kQueries);
      p = kDot ? arena.take<Element>(keys / 2 * kQueries) : reinterpret_cast<Element*>(scores);
      bias = arena.take<A>(f.scoring_.scratch(keys));
      words = arena.take<uint64_t>(keys);
      kept = arena.take<uint64_t>(f.dropout_.active ? keys : 0);
      block_max = arena.take<A>(kQueries);
      rescale = arena.take<A>(kQueries);
      if (f.copy_k_) k = arena.take<KCopy>(keys * f.k_copy_row_);
      if (f.copy_v_) v = arena.take<Element>((kColumns ? kColumn : keys) / Op::depth * f.width_v_);
      if (kColumns) v_pairs = arena.take<Element>(16 * f.width_v_);
      if (f.gathers_) {
        scales = arena.take<float>(keys);
        gathered_k = arena.take<S>(keys * f.call_.dim), gathered_v = arena.take<S>(keys * f.call_.dim_v);
      }
    }
    using KCopy = std::conditional_t<kDot, S, A>;
    State state[kBlocksAtOnce];
    A *scores, *bias, *block_max, *rescale;
    Element *p, *v = nullptr, *v_pairs = nullptr;
    KCopy* k = nullptr;
    float* scales = nullptr;  // of int8
    S *gathered_k = nullptr, *gathered_v = nullptr;
    uint64_t *words, *kept;
  };
  // A block of keys, where the products find it: k by rows, v by rows (by pairs of rows; or by columns).
  struct Keys {
    const char* k;
    long k_row;  // bytes
    const Element* v;
    long v_row;  // elements; of columns not used
  };

  void compute(long b, long hk, long bundle, Scratch& x) const {
    const Sequence s(call_, b);
    if (s.is_decoded()) return;
    State* const states = x.state;
    int used = 0;
    long first = s.tk, end = 0;
    for (int i = 0; i < at_once_; ++i) {
      const long block = bundle * at_once_ + i;  // heads of a group side by side: they see the same keys
      const long i0 = block / group_ * kQueries, h = hk * group_ + block % group_;
      if (block >= query_blocks_ * group_ || i0 >= s.rows) break;
      State& state = states[used++];
      state.h = h, state.i0 = i0, state.begun = false;
      state.count = int(most(0, least(kQueries, s.tq - i0)));
      if (state.count == 0) continue;
      state.vectors = (state.count + L - 1) / L;
      const S* q = at<S>(call_.q, b, h, s.q_row + i0);
      if constexpr (kDot)
        pack_transposed_pairs(q, call_.q.row, state.count, call_.dim, state.q);
      else
        pack_transposed(q, call_.q.row, state.count, call_.dim, state.q);
      for (int l = 0; l < kQueries; ++l) state.max[l] = state.highest[l] = A(-kInfinity), state.sum[l] = 0;
      const Sequence::Range seen = s.seen_by(i0, state.count);
      first = least(first, seen.begin), end = most(end, seen.end);
    }
    const long step = keys_per_block(s.tk);
    for (long j = first / step * step; j < end; j += step) {
      const long j_end = least(j + step, s.tk);
      bool ready = false;
      Keys keys{};
      for (int i = 0; i < used; ++i) {
        if (states[i].count == 0) continue;
        long j0 = j, j1 = j_end;
        State& q = states[i];
        const Seen seen = visibility(call_, s, b, q.h, q.i0, q.count, Op::depth, j0, j1, x.words);
        if (seen == Seen::none) continue;
        if (!ready) keys = prepare(s, b, hk, j, j_end, x), ready = true;
        attend(s, b, q, keys, j, j0, j1, seen, x);
      }
    }
    for (int i = 0; i < used; ++i) {
      if (kColumns && states[i].begun) turn_back<A>(states[i].o, states[i].vectors, width_v_, x.scores);
      finish(s, b, states[i], kColumns ? x.scores : states[i].o);
    }
  }

  Keys prepare(const Sequence& s, long b, long hk, long j0, long j1, Scratch& x) const {
    const long n = j1 - j0;
    const S *k, *v;
    long k_row = call_.k.row, v_row = call_.v.row;
    if (gathers_) {
      k = gather(call_.k, call_.k_scale, call_.dim, s, b, hk, j0, n, x.scales, x.gathered_k), k_row = call_.dim;
      v = gather(call_.v, call_.v_scale, call_.dim_v, s, b, hk, j0, n, x.scales, x.gathered_v), v_row = call_.dim_v;
    } else {
      k = at<S>(call_.k, b, hk, s.k_row + j0), v = at<S>(call_.v, b, hk, s.k_row + j0);
    }
    Keys out{reinterpret_cast<const char*>(k), k_row * long(sizeof(S)), reinterpret_cast<const Element*>(v), v_row};
    if (copy_k_) {
      if constexpr (kDot) {
        pad_rows(k, k_row, n, call_.dim, k_copy_row_, x.k);
        out.k_row = k_copy_row_ * long(sizeof(S));
      } else {
        widen_rows(k, k_row, n, n, call_.dim, k_copy_row_, x.k);
        out.k_row = k_copy_row_ * long(sizeof(A));
      }
      out.k = reinterpret_cast<const char*>(x.k);
    }
    if (copy_v_) {
      if constexpr (kColumns)
        transpose_rows(v, v_row, n, call_.dim_v, width_v_, x.v_pairs, reinterpret_cast<bf16*>(x.v), kColumn);
      else if constexpr (kDot)
        interleave_rows(v, v_row, n, (n + 1) / 2, call_.dim_v, width_v_, x.v);
      else
        widen_rows(v, v_row, n, n, call_.dim_v, width_v_, x.v);
      out.v = x.v, out.v_row = width_v_;
    }
    return out;
  }

  // Keys [j0, j0 + n) of pages, side by side, and of q's type.
  const S* gather(const View& view, const View& scale, long width, const Sequence& s, long b, long hk, long j0, long n,
                  float* scales, S* to) const {
    if constexpr (!__is_same(S, double)) {
      if (scale.data) scales_of(call_, scale, s, b, hk, j0, n, scales);
      const auto widen_run = [&](const q8* row, long place, long count) {
        for (long j = place; j < place + count; ++j, row += view.row)
          for (long d = 0; d < width; d += L) {
            const int wide = int(least(L, width - d));
            store_n(to + j * width + d, load_n(row + d, wide) * scales[j], wide);
          }
      };
      if (scale.data) return for_runs<q8>(call_, view, s, b, hk, j0, n, widen_run), to;
    }
    for_runs<S>(call_, view, s, b, hk, j0, n, [&](const S* row, long place, long count) {
      for (long j = place; j < place + count; ++j, row += view.row)
        __builtin_memcpy(to + j * width, row, size_t(width) * sizeof(S));
    });
    return to;
  }

  // One query block meets keys [j0, j1) of the block that begins at key `base`.
  void attend(const Sequence& s, long b, State& q, const Keys& keys, long base, long j0, long j1, Seen seen,
              Scratch& x) const {
    const long n = j1 - j0;
    Operands<Op> to_scores{keys.k + (j0 - base) * keys.k_row, keys.k_row, long(sizeof(Element)), q.q, kQueries,
                           x.scores, kQueries};
    const bool all = seen == Seen::all;
    for (int l = 0; l < kQueries; ++l) x.block_max[l] = A(-kInfinity);
    const bool max_at_once = all && pairs_ <= kDepth;
    if (max_at_once) {
      to_scores.max = x.block_max;
      product<Op, Into::store_max>(to_scores, n, q.vectors, pairs_);
    } else if (all) {
      deep_product(to_scores, n, q.vectors, pairs_);
    } else {
      for_seen_rows(x.words, n, kRowsAtOnce<Op>, [&](long row, long rows, int begin, int end) {
        const int v0 = begin / L, v1 = (end + L - 1) / L;
        Operands<Op> y = to_scores;
        y.a += row * y.a_row, y.b += v0 * L, y.c += row * kQueries + v0 * L;
        deep_product(y, rows, v1 - v0, pairs_);
      });
    }
    if (!max_at_once || !scoring_.plain)
      scoring_.finish({x.scores, all ? nullptr : x.words, n, q.vectors}, s, b, q.h, q.i0, q.count, j0, x.bias,
                      x.block_max, nullptr);
    if (dropout_.active) dropout_.keep(b, q.h, q.i0, j0, j1, x.kept);
    const uint64_t* words = all ? nullptr : x.words;
    if (dropout_.active)
      exponentiate<true>(q, words, n, x);
    else
      exponentiate<false>(q, words, n, x);
    if constexpr (kColumns)
      add_columns(s, q, keys, base, j0, j1, all, x);
    else
      add_rows(s, q, keys, base, j0, j1, all, x);
    q.begun = true;
  }

  // o = o rescale + p v of keys [j0, j1).
  void add_rows(const Sequence& s, State& q, const Keys& keys, long base, long j0, long j1, bool all, Scratch& x) const {
    const long n = j1 - j0;
    Operands<Op> to_o{reinterpret_cast<const char*>(x.p), long(sizeof(Element)), kQueries * long(sizeof(Element)),
                      keys.v + (j0 - base) / Op::depth * keys.v_row, keys.v_row, q.o, width_v_, x.rescale};
    const int vectors = int(width_v_ / L);
    if (all) {
      multiply_values(to_o, q, q.count, vectors, (n + Op::depth - 1) / Op::depth);
    } else {
      for (int row = 0; row < q.count; row += kTileRows) {
        const int rows = int(least(kTileRows, q.count - row));
        const Sequence::Range seen = s.seen_of(j0, j1, q.i0 + row, rows);
        const long k0 = (seen.begin - j0) / Op::depth, k1 = (seen.end - j0 + Op::depth - 1) / Op::depth;
        if (k0 >= k1 && q.begun) continue;  // nothing seen: the maximum stood still
        Operands<Op> y = to_o;
        y.a += row * y.a_row + k0 * y.a_step, y.b += k0 * y.b_row, y.c += row * y.c_row, y.scale += row;
        multiply_values(y, q, rows, vectors, most(0, k1 - k0));
      }
    }
  }
  // The same by columns: o^T = o^T rescale + v^T p^T.
  void add_columns(const Sequence& s, State& q, const Keys& keys, long base, long j0, long j1, bool all, Scratch& x) const {
    for (int v = 0; v < q.vectors; ++v) {
      const Vec<A> rescale = load(x.rescale + v * L);
      if (q.begun && !any<A>(rescale != A(1))) continue;
      for (long d = 0; d < width_v_; ++d) {
        A* const o = q.o + d * kQueries + v * L;
        store(o, q.begun ? load(o) * rescale : Vec<A>{});
      }
    }
    const long first = (j0 - base) / Op::depth;
    const Operands<Op> to_o{reinterpret_cast<const char*>(keys.v + first), kColumn * long(sizeof(S)),
                            long(sizeof(Element)), x.p, kQueries, q.o, kQueries};
    if (all) return product<Op, Into::add>(to_o, width_v_, q.vectors, (j1 - j0 + 1) / Op::depth);
    for (int v = 0; v < q.vectors; ++v) {
      const Sequence::Range seen = s.seen_of(j0, j1, q.i0 + v * L, least(L, q.count - v * L));
      const long k0 = (seen.begin - j0) / Op::depth, k1 = (seen.end - j0 + Op::depth - 1) / Op::depth;
      if (k0 >= k1) continue;
      Operands<Op> y = to_o;
      y.a += k0 * y.a_step, y.b += k0 * y.b_row + v * L, y.c += v * L;
      product<Op, Into::add>(y, width_v_, 1, k1 - k0);
    }
  }

  void multiply_values(const Operands<Op>& x, const State& q, long rows, int vectors, long depth) const {
    if (q.begun)
      product<Op, Into::scale_add>(x, rows, vectors, depth);
    else
      product<Op, Into::store>(x, rows, vectors, depth);
  }

  // Scores [n, 64] to P, and the running maximum and sum with them; rescale is what the old sum and o shrink by.
  template <bool kDropout>
  void exponentiate(State& q, const uint64_t* words, long n, Scratch& x) const {
    const Vec<A> factor = splat(scoring_.factor), zero{};
    for (int v = 0; v < q.vectors; ++v) {
      const Vec<A> before = load(q.max + v * L), past = load(q.highest + v * L);
      const Vec<A> here = load(x.block_max + v * L);
      Vec<A> top = maximum<A>(here * factor, before), highest = maximum<A>(here, past);
      if (kColumns && !any<A>((here - past) * factor > kLag)) top = before, highest = past;
      const IntVec<A> far = (highest != A(-kInfinity)) & (magnitude<A>(highest * factor) > kFar<A>);
      const Vec<A> base = far ? highest : zero, offset = far | (top == A(-kInfinity)) ? zero : -top;
      const Vec<A> rescale = exp2<A>(far ? (past - base) * factor : before + offset);
      Vec<A> sum = load(q.sum + v * L) * rescale;
      const auto one = [&](long j, auto is_far) -> Vec<A> {
        const uint64_t bits = words ? words[j] >> (v * L) & kLaneBits<A> : kLaneBits<A>;
        if (bits == 0) return zero;
        Vec<A> score = load(x.scores + j * kQueries + v * L);
        if constexpr (is_far()) score -= base;
        Vec<A> p = exp2<A, kDegree>(score * factor + offset);
        sum += p;
        if constexpr (kDropout) p = select<A>(x.kept[j] >> (v * L), p, zero);
        return p;
      };
      const auto all = [&](auto is_far) {
        if constexpr (kDot) {
#if defined(__AVX512BF16__)
          for (long j = 0; j < n; j += 2) {
            const Vec<A> low = one(j, is_far), high = j + 1 < n ? one(j + 1, is_far) : zero;
            _mm512_store_si512(x.p + j / 2 * kQueries + v * L, narrow_pairs(low, high));
          }
#endif
        } else {
          for (long j = 0; j < n; ++j) store(x.scores + j * kQueries + v * L, one(j, is_far));
        }
      };
      any<A>(far) ? all(std::true_type()) : all(std::false_type());
      store(q.sum + v * L, sum);
      store(q.max + v * L, top), store(q.highest + v * L, highest);
      store(x.rescale + v * L, rescale);
    }
  }

  void finish(const Sequence& s, long b, const State& q, const A* o) const {
    A* const lse = at<A>(call_.lse, b, q.h, s.q_row + q.i0);
    const bool has_sink = call_.sinks != nullptr;
    const A sink = has_sink ? read_number<S>(call_.sinks, call_.sinks_dtype == Dtype::f32, q.h) : A(0);
    const int rows = int(least(kQueries, s.rows - q.i0));
    for (int i = 0; i < rows; ++i) {
      A top = A(-kInfinity), sum = 0;
      if (i < q.count) {
        const bool far = __builtin_fabs(double(q.highest[i] * scoring_.factor)) > double(kFar<A>);
        top = far ? q.highest[i] * scoring_.unit : q.max[i] * A(kLn2), sum = q.sum[i];
      }
      A share = sum > 0 || sum != sum ? 1 / sum : A(0);
      if (has_sink && i < q.count && sink > A(-kInfinity)) {
        const A higher = sink > top ? sink : top, own = sum == 0 ? A(0) : A(__builtin_exp(top - higher));
        sum = sum * own + A(__builtin_exp(sink - higher));
        top = higher, share = own / sum;
      }
      lse[i] = top + A(__builtin_log(sum));
      S* const out = at<S>(call_.o, b, q.h, s.q_row + q.i0 + i);
      const bool empty = i >= q.count || !q.begun || share == 0;
      const Vec<A> scale = splat<A>(share * A(dropout_.active ? dropout_.scale : 1.0));
      for (long d = 0; d < call_.dim_v; d += L)
        store_n(out + d, empty ? Vec<A>{} : load(o + i * width_v_ + d) * scale, int(least(L, call_.dim_v - d)));
    }
  }

  const AttentionForward& call_;
  const Scoring<S> scoring_;
  const Dropout dropout_;
  const long group_, query_blocks_, width_v_, pairs_, k_copy_row_;
  const bool copy_k_, copy_v_, gathers_;
  int at_once_ = 1;
  long bundles_ = 1;
};

}  // namespace
}  // namespace attention

bool attention_forward(const AttentionForward& call) {
  return for_dtype(call.dtype, [&](auto s) { return attention::Forward<decltype(s)>(call).run(); });
}

}  // namespace fastseq::FASTSEQ_ISA
