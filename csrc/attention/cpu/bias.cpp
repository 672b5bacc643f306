// The gradient of the bias: that of the scores, summed over every dimension in which the bias was broadcast.
//
// One thread has one block of the bias and visits, in order, all the batches, heads, queries and keys that read it; so
// the sum has a fixed order, and nothing of the size of the scores is stored.
#include <atomic>

#include "attention/cpu/gradient.h"
#include "core/parallel.h"

namespace fastseq::FASTSEQ_ISA {
namespace attention {
namespace {

template <class S>
class BiasGradient : Gradient<S> {
  using G = Gradient<S>;
  using typename G::A;
  using typename G::Copy;
  using typename G::Keys;
  using typename G::Op;
  using typename G::Queries;
  using typename G::Tile;
  using G::call, G::group, G::L;

 public:
  explicit BiasGradient(const AttentionBackward& call)
      : G(call), step_(gradient_keys(call.length_k)), by_query_(call.bias_size[2] > 1),
        by_key_(call.bias_size[3] > 1) {}

  bool run() {
    const long query_blocks = by_query_ ? (call.length_q + kQueries - 1) / kQueries : 1;
    const long key_blocks = by_key_ ? (call.length_k + step_ - 1) / step_ : 1;
    const long items = call.bias_size[0] * call.bias_size[1] * query_blocks * key_blocks;
    const int threads = int(most(1, least(call.threads, items)));
    Arena counting;
    Scratch(*this, counting);
    Memory memory(counting.used() * threads);
    if (!memory.data) return false;
    std::atomic<long> next{0};
    parallel(threads, [&](const Team& team) {
      [[maybe_unused]] TileScope tiles;
      Arena arena(memory.data + counting.used() * team.rank);
      Scratch scratch(*this, arena);
      for (long item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
        const long head = item / key_blocks / query_blocks;
        const Range b = range(head / call.bias_size[1], call.bias_size[0], call.batch);
        const Range h = range(head % call.bias_size[1], call.bias_size[1], call.heads_q);
        const long i = item / key_blocks % query_blocks * kQueries, j = item % key_blocks * step_;
        compute(b, h, {i, by_query_ ? least(i + kQueries, call.length_q) : call.length_q},
                {j, by_key_ ? least(j + step_, call.length_k) : call.length_k}, scratch);
      }
    });
    return true;
  }

 private:
  struct Range {
    long begin, end;
  };
  // The indices that read index i of a dimension of `size`.
  static Range range(long i, long size, long all) { return size > 1 ? Range{i, least(i + 1, all)} : Range{0, all}; }

  struct Scratch {
    Queries queries;
    Tile tile;
    A* sum;  // [keys or 1, 64]
    Copy *k = nullptr, *v = nullptr;

    Scratch(const BiasGradient& g, Arena& arena) : queries(g, arena), tile(g, arena, 0) {
      sum = arena.take<A>((g.by_key_ ? g.step_ : 1) * kQueries);
      if (g.copy_k) k = arena.take<Copy>(g.step_ * g.k_copy_row());
      if (g.copy_v) v = arena.take<Copy>(g.step_ * g.v_copy_row());
    }
  };

  void compute(Range batches, Range heads, Range rows, Range columns, Scratch& x) const {
    const long sums = by_key_ ? columns.end - columns.begin : 1;
    for (long i = 0; i < sums * kQueries; ++i) x.sum[i] = 0;
    for (long b = batches.begin; b < batches.end; ++b) {
      const Sequence s(call, b);
      for (long h = heads.begin; h < heads.end; ++h) {
        for (long i0 = rows.begin; i0 < least(rows.end, s.tq); i0 += kQueries) {
          this->load_queries(s, b, h, i0, false, x.queries);
          this->recall(b, x.queries);
          for (long j = columns.begin; j < least(columns.end, s.tk); j += step_) add(s, b, h, j, x);
        }
      }
    }
    const long* size = call.bias_size;
    const long start = (size[0] > 1 ? batches.begin * size[1] : 0) + (size[1] > 1 ? heads.begin : 0);
    const long queries = by_query_ ? rows.end - rows.begin : 1;
    for (long i = 0; i < queries; ++i)
      for (long j = 0; j < sums; ++j) {
        A value = 0;
        if (by_query_)
          value = x.sum[j * kQueries + i];
        else
          for (int l = 0; l < kQueries; ++l) value += x.sum[j * kQueries + l];
        const long row = start * size[2] + (by_query_ ? rows.begin + i : 0);
        write_number<S>(call.dbias, call.bias_dtype == Dtype::f32,
                        row * size[3] + (by_key_ ? columns.begin + j : 0), value);
      }
  }

  void add(const Sequence& s, long b, long h, long j, Scratch& x) const {
    long j0 = j, j1 = least(j + step_, s.tk);
    const Seen seen =
        visibility(call, s, b, h, x.queries.i0, x.queries.count, Op::depth, j0, j1, x.tile.words);
    if (seen == Seen::none) return;
    const Keys keys = this->keys(s, b, h / group, j, least(j + step_, s.tk), x.k, x.v);
    this->weigh(s, b, x.queries, keys, j, j0, j1, seen, x.tile);
    this->template differentiate<true>(x.queries, seen == Seen::all ? nullptr : x.tile.words, j0, j1 - j0, x.tile);
    for (long i = 0; i < j1 - j0; ++i) {
      A* const sum = x.sum + (by_key_ ? (j0 - j + i) * kQueries : 0);
      for (int l = 0; l < x.queries.vectors * L; l += L)
        store(sum + l, load(sum + l) + load(x.tile.dp + i * kQueries + l));
    }
  }

  const long step_;
  const bool by_query_, by_key_;
};

}  // namespace
}  // namespace attention

bool attention_bias_gradient(const AttentionBackward& call) {
  return for_dtype(call.dtype, [&](auto s) { return attention::BiasGradient<decltype(s)>(call).run(); });
}

}  // namespace fastseq::FASTSEQ_ISA
