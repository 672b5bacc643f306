// dq, dk, dv and the sinks' gradient, by recomputation from lse (gradient.h has the formulas):
//
//   dv += P^T dO;  dk += dS^T Q;  dq += dS K
//
// One thread has a head of K and V, with all the query heads that share it, and walks its query blocks in order, so dk
// and dv are sums in a fixed order in memory that is its own. Where there are fewer heads than threads want, the key
// blocks of a head are dealt out in turn, and the parts of dq are added up at the end, again in order. A lone query has a
// kernel of its own, below.
//
// A block of queries meets its keys twice, for the sums that make its rows' share and rest and for the gradients: its tiles
// stay in memory in between, or, where the keys are dealt out, are computed again.
#include <atomic>

#include "attention/cpu/gradient.h"
#include "core/parallel.h"

namespace fastseq::FASTSEQ_ISA {
namespace attention {
namespace {

template <class S>
class Backward : Gradient<S> {
  using G = Gradient<S>;
  using typename G::A;
  using typename G::Copy;
  using typename G::Element;
  using typename G::Keys;
  using typename G::Op;
  using typename G::Queries;
  using typename G::Tile;
  using G::call, G::group, G::kDot, G::kWiden, G::L, G::pairs, G::width, G::width_v;
  static constexpr bool kNarrow = sizeof(S) != sizeof(A);
  static constexpr bool kColumns = kMatrix<Op>;  // dq and the keys that it is made of lie by columns

 public:
  explicit Backward(const AttentionBackward& call)
      : G(call), direct_k_(!kNarrow && call.dim % L == 0), direct_v_(!kNarrow && call.dim_v % L == 0) {}

  bool run() {
    const long heads = call.batch * call.heads_k;
    const long blocks = (call.length_k + kGradientKeys - 1) / kGradientKeys;
    if (!call.deterministic && heads % call.threads != 0 && heads < 4 * call.threads)
      splits_ = most(1, least(blocks, (2 * call.threads + heads - 1) / most(1, heads)));
    rows_ = call.cu_q ? call.cu_q[call.batch] : call.batch * call.length_q;
    const int threads = int(most(1, least(call.threads, heads * splits_)));
    Arena counting;
    Scratch(*this, counting);
    const long parts = splits_ > 1 ? splits_ * call.heads_q * rows_ * width : 0;
    const long row_parts = splits_ > 1 ? splits_ * call.heads_q * rows_ * 2 : 0;
    const long sinks = call.dsinks ? call.batch * call.heads_q : 0;
    Memory memory(counting.used() * threads + ((parts + row_parts) * long(sizeof(A)) + sinks * 8 + 192));
    if (!memory.data) return false;
    Arena shared(memory.data + counting.used() * threads);
    dq_parts_ = shared.take<A>(parts), row_parts_ = shared.take<A>(row_parts), dsink_parts_ = shared.take<double>(sinks);
    std::atomic<long> next{0}, next_weighed{0};
    parallel(threads, [&](const Team& team) {
      [[maybe_unused]] TileScope tiles;
      Arena arena(memory.data + counting.used() * team.rank);
      Scratch scratch(*this, arena);
      const auto each_item = [&](std::atomic<long>& counter, auto work) {
        for (long item; (item = counter.fetch_add(1, std::memory_order_relaxed)) < heads * splits_;)
          work(item / splits_ / call.heads_k, item / splits_ % call.heads_k, item % splits_);
      };
      if (splits_ > 1) {
        each_item(next_weighed, [&](long b, long hk, long split) { weigh_rows(b, hk, split, scratch); });
        team.sync();
      }
      each_item(next, [&](long b, long hk, long split) { compute(b, hk, split, scratch); });
      if (splits_ == 1 && !call.dsinks) return;
      team.sync();
      if (splits_ > 1) add_parts(team);
      if (call.dsinks && team.rank == 0) add_sinks();
    });
    return true;
  }

 private:
  // A tile that a block of queries has met, as visibility() left it.
  struct Met {
    long j, j0, j1;
    Seen seen;
  };
  struct Scratch {
    Queries queries;
    Tile tile;   // with room for all keys where they are not dealt out
    Met* met;
    A *dq, *dk = nullptr, *dv = nullptr;  // [64, width], [Tk, width], [Tk, width_v]
    Copy *k = nullptr, *v = nullptr;      // [Tk, copied row]
    A* dq_rows = nullptr;                 // of dq by columns
    uint32_t* k_pairs = nullptr;          // [Tk / 2, width]; or by columns, and room to make these
    uint32_t* few_pairs = nullptr;

    Scratch(const Backward& g, Arena& arena)
        : queries(g, arena), tile(g, arena, g.splits_ > 1 ? 0 : round_up(g.call.length_k, 2)) {
      const long keys = round_up(g.call.length_k, 2);
      met = arena.take<Met>(g.splits_ > 1 ? 1 : (keys + kGradientKeys / 2 - 1) / (kGradientKeys / 2) + 1);
      dq = arena.take<A>(kQueries * g.width);
      if (!g.direct_k_) dk = arena.take<A>(keys * g.width);
      if (!g.direct_v_) dv = arena.take<A>(keys * g.width_v);
      if (g.copy_k) k = arena.take<Copy>(keys * g.k_copy_row());
      if (g.copy_v) v = arena.take<Copy>(keys * g.v_copy_row());
      if (kDot) k_pairs = arena.take<uint32_t>((kColumns ? g.k_column() : keys) / 2 * g.width);
      if (kColumns) few_pairs = arena.take<uint32_t>(16 * g.width), dq_rows = arena.take<A>(kQueries * g.width);
    }
  };

  // Elements of a column of keys: not a power of two, which would have them share cache sets.
  long k_column() const { return round_up(call.length_k, 64) + 32; }

  // Keys and values of a split's tiles, where the products find them.
  Keys prepare(const Sequence& s, long b, long hk, long split, long step, Scratch& x) const {
    for (long j = split * step; j < s.tk; j += splits_ * step)
      this->keys(s, b, hk, j, least(j + step, s.tk), x.k ? x.k + j * this->k_copy_row() : nullptr,
                 x.v ? x.v + j * this->v_copy_row() : nullptr);
    return whole(s, b, hk, x);
  }

  // each(j, j0, j1, seen, tile) for the tiles of a split's keys that a block of queries sees: j is where the tile begins,
  // `tile` its place, all in one or (`apart`) each its own.
  template <class Each>
  void each_tile(const Sequence& s, long b, long split, bool apart, Scratch& x, const Each& each) const {
    const Queries& q = x.queries;
    const long step = gradient_keys(s.tk);
    const Sequence::Range seen = s.seen_by(q.i0, q.count);
    const long last = q.count ? seen.end : 0;
    for (long j = (seen.begin / step / splits_ * splits_ + split) * step; j < last; j += splits_ * step) {
      long j0 = j, j1 = least(j + step, s.tk);
      const Tile tile = x.tile.at(apart ? j : 0);
      const Seen seen = visibility(call, s, b, q.h, q.i0, q.count, Op::depth, j0, j1, tile.words);
      if (seen != Seen::none) each(j, j0, j1, seen, tile);
    }
  }

  // What a split's keys add to the sums of all rows.
  void weigh_rows(long b, long hk, long split, Scratch& x) const {
    const Sequence s(call, b);
    const Keys keys = prepare(s, b, hk, split, gradient_keys(s.tk), x);
    for (long h = hk * group; h < (hk + 1) * group; ++h)
      for (long i0 = 0; i0 < s.rows; i0 += kQueries) {
        this->load_queries(s, b, h, i0, false, x.queries);
        each_tile(s, b, split, false, x, [&](long, long j0, long j1, Seen seen, const Tile& tile) {
          this->weigh(s, b, x.queries, keys, 0, j0, j1, seen, tile);
        });
        for (long i = 0; i < x.queries.count; ++i) {
          A* const out = row_part(split, h, (call.cu_q ? s.q_row : b * call.length_q) + i0 + i);
          out[0] = x.queries.sum[i], out[1] = x.queries.dot[i];
        }
      }
  }

  void compute(long b, long hk, long split, Scratch& x) const {
    const Sequence s(call, b);
    const long step = gradient_keys(s.tk);
    A* const dk = direct_k_ ? at<A>(call.dk, b, hk, s.k_row) : x.dk;
    A* const dv = direct_v_ ? at<A>(call.dv, b, hk, s.k_row) : x.dv;
    const long dk_row = direct_k_ ? call.dk.row : width, dv_row = direct_v_ ? call.dv.row : width_v;
    for (long j = split * step; j < s.tk; j += splits_ * step) {
      const long end = least(j + step, s.tk);
      for (long i = j; i < end; ++i) {
        for (long d = 0; d < width; d += L) store(dk + i * dk_row + d, Vec<A>{});
        for (long d = 0; d < width_v; d += L) store(dv + i * dv_row + d, Vec<A>{});
      }
      const S* k = at<S>(call.k, b, hk, s.k_row + j);
      if constexpr (kColumns)
        transpose_rows(k, call.k.row, end - j, call.dim, width, x.few_pairs, reinterpret_cast<bf16*>(x.k_pairs) + j,
                       k_column());
      else if constexpr (kDot)
        interleave_rows(k, call.k.row, end - j, (end - j + 1) / 2, call.dim, width, x.k_pairs + j / 2 * width);
    }
    const Keys keys = prepare(s, b, hk, split, step, x);
    Queries& q = x.queries;
    for (long h = hk * group; h < (hk + 1) * group; ++h) {
      double dsink = 0;
      for (long i0 = 0; i0 < s.rows; i0 += kQueries) {
        this->load_queries(s, b, h, i0, true, q);
        bool begun = false;
        const auto differentiate = [&](long j0, long j1, Seen seen, const Tile& tile) {
          const uint64_t* words = seen == Seen::all ? nullptr : tile.words;
          this->template differentiate<false>(q, words, j0, j1 - j0, tile);
          accumulate(s, x, tile, keys, j0, j1, words, dk + j0 * dk_row, dk_row, dv + j0 * dv_row, dv_row, begun);
          begun = true;
        };
        if (splits_ == 1) {
          long count = 0;
          each_tile(s, b, split, true, x, [&](long j, long j0, long j1, Seen seen, const Tile& tile) {
            this->weigh(s, b, q, keys, 0, j0, j1, seen, tile);
            x.met[count++] = {j, j0, j1, seen};
          });
          this->settle(s, b, q);
          for (long n = 0; n < count; ++n)
            differentiate(x.met[n].j0, x.met[n].j1, x.met[n].seen, x.tile.at(x.met[n].j));
        } else {
          for (long i = 0; i < q.count; ++i)
            for (long n = 0; n < splits_; ++n) {
              const A* in = row_part(n, h, (call.cu_q ? s.q_row : b * call.length_q) + i0 + i);
              q.sum[i] += in[0], q.dot[i] += in[1];
            }
          this->settle(s, b, q);
          each_tile(s, b, split, false, x, [&](long, long j0, long j1, Seen seen, const Tile& tile) {
            this->weigh(s, b, q, keys, 0, j0, j1, seen, tile);
            differentiate(j0, j1, seen, tile);
          });
        }
        A* const dq = !begun ? nullptr : kColumns ? x.dq_rows : x.dq;
        if (kColumns && begun) turn_back<A>(x.dq, q.vectors, width, dq);
        if (kDot && begun) add_carry(at<S>(call.k, b, hk, s.k_row), q, dq);
        dsink += q.dsink;
        if (call.rows && split == 0) this->remember(b, q);
        write_dq(s, b, h, i0, split, dq);
      }
      if (call.dsinks && split == 0) dsink_parts_[b * call.heads_q + h] = dsink;
    }
    if (!direct_k_) write_keys(call.dk, s, b, hk, split, step, call.dim, x.dk, width);
    if (!direct_v_) write_keys(call.dv, s, b, hk, split, step, call.dim_v, x.dv, width_v);
    const long keys_here = call.cu_k ? call.cu_k[b + 1] - call.cu_k[b] : call.length_k;
    if (split == 0) {
      clear(call.dk, s, b, hk, keys_here, call.dim);
      clear(call.dv, s, b, hk, keys_here, call.dim_v);
    }
  }

  Keys whole(const Sequence& s, long b, long hk, const Scratch& x) const {
    Keys out{at<char>(bytes(call.k), b, hk, s.k_row), at<char>(bytes(call.v), b, hk, s.k_row),
             call.k.row * long(sizeof(S)), call.v.row * long(sizeof(S))};
    if (this->copy_k)
      out.k = reinterpret_cast<const char*>(x.k), out.k_row = this->k_copy_row() * long(sizeof(Copy));
    if (this->copy_v)
      out.v = reinterpret_cast<const char*>(x.v), out.v_row = this->v_copy_row() * long(sizeof(Copy));
    return out;
  }
  static View bytes(View view) {
    constexpr long size = sizeof(S);
    view.batch *= size, view.head *= size, view.row *= size;
    return view;
  }

  // The three products of one tile; dk and dv point at key j0.
  void accumulate(const Sequence& s, Scratch& x, const Tile& tile, const Keys& keys, long j0, long j1, const uint64_t* words, A* dk,
                  long dk_row, A* dv, long dv_row, bool begun) const {
    const Queries& q = x.queries;
    const long n = j1 - j0;
    constexpr long size = kDot ? sizeof(S) : sizeof(A);
    const char* p = kDot ? reinterpret_cast<const char*>(tile.p) : reinterpret_cast<const char*>(tile.scores);
    const char* ds = kDot ? reinterpret_cast<const char*>(tile.ds) : reinterpret_cast<const char*>(tile.dp);
    const Operands<Op> to_dv{p, kQueries * size, long(sizeof(Element)), q.d_o_rows, q.d_o_row, dv, dv_row};
    const Operands<Op> to_dk{ds, kQueries * size, long(sizeof(Element)), q.q_rows, q.q_row, dk, dk_row};
    const auto by_keys = [&](long row, long rows, int begin, int end) {
      const long first = begin / Op::depth, depth = (end + Op::depth - 1) / Op::depth - first;
      Operands<Op> y = to_dv, z = to_dk;
      y.a += row * y.a_row + first * y.a_step, y.b += first * y.b_row, y.c += row * y.c_row;
      z.a += row * z.a_row + first * z.a_step, z.b += first * z.b_row, z.c += row * z.c_row;
      product<Op, Into::add>(y, rows, int(width_v / L), depth);
      product<Op, Into::add>(z, rows, int(width / L), depth);
    };
    if (words)
      for_seen_rows(words, n, kRowsAtOnce<Op>, by_keys);
    else
      by_keys(0, n, 0, q.count);

    if constexpr (kColumns)
      add_columns(s, x, tile, j0, j1, words, begun);
    else
      add_rows(s, x, tile, keys, j0, j1, words, begun);
  }

  // dq += ds k
  void add_rows(const Sequence& s, Scratch& x, const Tile& tile, const Keys& keys, long j0, long j1, const uint64_t* words,
                bool begun) const {
    const Queries& q = x.queries;
    const Element* k_rows;
    long k_row;
    if constexpr (kDot) {
      k_rows = x.k_pairs + j0 / 2 * width, k_row = width;
    } else {
      k_row = keys.k_row / long(sizeof(A)), k_rows = reinterpret_cast<const Element*>(keys.k) + j0 * k_row;
    }
    const Operands<Op> to_dq{kDot ? reinterpret_cast<const char*>(tile.ds_pairs) : reinterpret_cast<const char*>(tile.dp),
                             long(sizeof(Element)), kQueries * long(sizeof(Element)), k_rows, k_row, x.dq, width};
    const auto by_queries = [&](int row, int rows, long first, long end) {
      const long k0 = first / Op::depth, depth = most(0, (end + Op::depth - 1) / Op::depth - k0);
      Operands<Op> y = to_dq;
      y.a += row * y.a_row + k0 * y.a_step, y.b += k0 * y.b_row, y.c += row * y.c_row;
      add_or_store(y, rows, int(width / L), depth, begun);
    };
    if (!words) return by_queries(0, q.count, 0, j1 - j0);
    for (int row = 0; row < q.count; row += kTileRows) {
      const int rows = int(least(kTileRows, q.count - row));
      const Sequence::Range seen = s.seen_of(j0, j1, q.i0 + row, rows);
      by_queries(row, rows, seen.begin - j0, seen.end - j0);
    }
  }
  // The same by columns: dq^T += k^T ds^T.
  void add_columns(const Sequence& s, Scratch& x, const Tile& tile, long j0, long j1, const uint64_t* words,
                   bool begun) const {
    const Queries& q = x.queries;
    const Operands<Op> to_dq{reinterpret_cast<const char*>(x.k_pairs + j0 / 2), k_column() * long(sizeof(S)),
                             long(sizeof(Element)), tile.ds_pairs, kQueries, x.dq, kQueries};
    if (!words) return add_or_store(to_dq, width, q.vectors, (j1 - j0 + 1) / 2, begun);
    for (int v = 0; v < q.vectors; ++v) {
      const Sequence::Range seen = s.seen_of(j0, j1, q.i0 + v * L, least(L, q.count - v * L));
      const long k0 = (seen.begin - j0) / 2;
      Operands<Op> y = to_dq;
      y.a += k0 * y.a_step, y.b += k0 * y.b_row + v * L, y.c += v * L;
      add_or_store(y, width, 1, most(0, (seen.end - j0 + 1) / 2 - k0), begun);
    }
  }
  static void add_or_store(const Operands<Op>& x, long rows, int vectors, long depth, bool begun) {
    if (begun)
      product<Op, Into::add>(x, rows, vectors, depth);
    else
      product<Op, Into::store>(x, rows, vectors, depth);
  }

  void add_carry(const S* k, const Queries& q, A* dq) const {
    for (int i = 0; i < q.count; ++i) {
      const S* row = k + q.carrier[i] * call.k.row;
      for (long d = 0; d < width; d += L)
        store(dq + i * width + d,
              load(dq + i * width + d) + load_n(row + d, int(least(L, call.dim - d))) * q.carry[i]);
    }
  }

  // dq is what there is of the block's gradient; null: nothing, which is 0.
  void write_dq(const Sequence& s, long b, long h, long i0, long split, const A* dq) const {
    const long rows = least(kQueries, s.rows - i0), counted = dq ? most(0, least(rows, s.tq - i0)) : 0;
    for (long i = 0; i < rows; ++i) {
      if (splits_ > 1) {
        A* out = part(split, h, (call.cu_q ? s.q_row : b * call.length_q) + i0 + i);
        for (long d = 0; d < width; d += L) store(out + d, i < counted ? load(dq + i * width + d) : Vec<A>{});
      } else {
        write_row(at<S>(call.dq, b, h, s.q_row + i0 + i), i < counted ? dq + i * width : nullptr, call.dim);
      }
    }
  }
  static void write_row(S* out, const A* in, long dim) {
    for (long d = 0; d < dim; d += L) store_n(out + d, in ? load(in + d) : Vec<A>{}, int(least(L, dim - d)));
  }
  A* row_part(long split, long h, long row) const {
    return row_parts_ + ((split * call.heads_q + h) * rows_ + row) * 2;
  }
  A* part(long split, long h, long row) const {
    return dq_parts_ + ((split * call.heads_q + h) * rows_ + row) * width;
  }
  void write_keys(const View& out, const Sequence& s, long b, long hk, long split, long step, long dim,
                  const A* in, long row) const {
    for (long j = split * step; j < s.tk; j += splits_ * step)
      for (long i = j; i < least(j + step, s.tk); ++i) write_row(at<S>(out, b, hk, s.k_row + i), in + i * row, dim);
  }
  void clear(const View& out, const Sequence& s, long b, long hk, long keys, long dim) const {
    for (long i = s.tk; i < keys; ++i) write_row(at<S>(out, b, hk, s.k_row + i), nullptr, dim);
  }

  void add_parts(const Team& team) const {
    for (long b = 0; b < call.batch; ++b) {
      const Sequence s(call, b);
      const Share share = share_of(call.heads_q * s.rows, team.rank, team.size);
      for (long i = share.begin; i < share.end; ++i) {
        const long h = i / s.rows, row = i % s.rows;
        A* const sum = part(0, h, (call.cu_q ? s.q_row : b * call.length_q) + row);
        for (long split = 1; split < splits_; ++split) {
          const A* more = sum + split * call.heads_q * rows_ * width;
          for (long d = 0; d < width; d += L) store(sum + d, load(sum + d) + load(more + d));
        }
        write_row(at<S>(call.dq, b, h, s.q_row + row), sum, call.dim);
      }
    }
  }
  void add_sinks() const {
    for (long h = 0; h < call.heads_q; ++h) {
      double sum = 0;
      for (long b = 0; b < call.batch; ++b) sum += dsink_parts_[b * call.heads_q + h];
      write_number<S>(call.dsinks, call.sinks_dtype == Dtype::f32, h, A(sum));
    }
  }

  const bool direct_k_, direct_v_;
  long splits_ = 1, rows_ = 0;
  A* dq_parts_ = nullptr;         // [splits, Hq, rows, width]
  A* row_parts_ = nullptr;        // [splits, Hq, rows, 2]
  double* dsink_parts_ = nullptr;  // [B, Hq]
};

// One query a head and nothing but limits: a tile of queries would be all padding. Lanes along the features, a key at a
// time; what a key adds to dk and dv is all there is of them. The softmax is made anew, as a row's scores are few.
template <class S>
class LoneQuery {
  using A = Accumulator<S>;
  static constexpr int L = kLanes<A>, kVectors = 16;
  using Row = Vec<A>[kVectors];

 public:
  explicit LoneQuery(const AttentionBackward& call) : call_(call), factor_(A(call.scale * kLog2e)) {}

  bool fits() const {
    const AttentionBackward& c = call_;
    return c.length_q == 1 && c.heads_q == c.heads_k && !c.cu_q && !c.lengths_q && !c.lengths_k && !c.bias.data &&
           !c.mask.data && !c.sinks && !c.alibi && c.softcap == 0 && c.dropout_p == 0 && c.scale > 0 &&
           c.dim <= kVectors * L && c.dim_v <= kVectors * L;
  }
  bool run() const {
    const long heads = call_.batch * call_.heads_q, row = round_up(call_.length_k, 64);
    const int threads = int(most(1, least(call_.threads, heads)));
    Memory memory(threads * 2 * row * long(sizeof(A)));
    if (!memory.data) return false;
    parallel(threads, [&](const Team& team) {
      const Share share = share_of(heads, team.rank, team.size);
      A* const p = reinterpret_cast<A*>(memory.data) + team.rank * 2 * row;
      for (long head = share.begin; head < share.end; ++head)
        compute(head / call_.heads_q, head % call_.heads_q, p, p + row);
    });
    return true;
  }

 private:
  // p and dp: room for a number of each key; dp is less delta.
  void compute(long b, long h, A* p, A* dp) const {
    const Sequence s(call_, b);
    const long dim = call_.dim, dim_v = call_.dim_v;
    const A scale = A(call_.scale), hidden = A(-kInfinity);
    Row q, d_o, o, dq;
    read(at<S>(call_.q, b, h, 0), dim, q), read(at<S>(call_.d_o, b, h, 0), dim_v, d_o);
    read(at<S>(call_.o, b, h, 0), dim_v, o);
    const A delta = dot(d_o, o, dim_v);
    for (long n = 0; n * L < dim; ++n) dq[n] = Vec<A>{};
    A top = hidden;
    for (long j = 0; j < round_up(call_.length_k, L); ++j) {
      p[j] = hidden, dp[j] = 0;
      if (j >= s.tk || !s.who_sees(j, 0, 1)) continue;
      Row k, v;
      read(at<S>(call_.k, b, h, j), dim, k), read(at<S>(call_.v, b, h, j), dim_v, v);
      p[j] = dot(q, k, dim), dp[j] = dot(d_o, v, dim_v) - delta;
      top = p[j] > top ? p[j] : top;
    }
    const Vec<A> base = splat(top == hidden ? A(0) : top), zero{};
    Vec<A> sums = zero, dots = zero;
    for (long j = 0; j < call_.length_k; j += L) {
      const Vec<A> weight = exp2<A, kFullDegree<A>>((load(p + j) - base) * factor_);
      sums += weight, dots += weight == A(0) ? zero : weight * load(dp + j);
      store(p + j, weight);
    }
    const A sum = sum_lanes<A>(sums), share = sum == 0 ? A(0) : 1 / sum;
    const A rest = sum_lanes<A>(dots) * share - (call_.dlse.data ? *at<A>(call_.dlse, b, h, 0) : A(0));
    for (long j = 0; j < call_.length_k; ++j) {
      const A weight = p[j] * share, ds = weight == 0 ? A(0) : weight * (dp[j] - rest) * scale;
      if (weight != 0) {
        Row k;
        read(at<S>(call_.k, b, h, j), dim, k);
        for (long n = 0; n * L < dim; ++n) dq[n] += k[n] * ds;
      }
      write(at<S>(call_.dk, b, h, j), dim, q, ds), write(at<S>(call_.dv, b, h, j), dim_v, d_o, weight);
    }
    write(at<S>(call_.dq, b, h, 0), dim, dq, 1);
  }
  static void read(const S* from, long dim, Row& to) {
    for (long n = 0; n * L < dim; ++n) to[n] = load_n(from + n * L, int(least(L, dim - n * L)));
  }
  static A dot(const Row& x, const Row& y, long dim) {
    Vec<A> sum{};
    for (long n = 0; n * L < dim; ++n) sum += x[n] * y[n];
    return sum_lanes<A>(sum);
  }
  static void write(S* to, long dim, const Row& x, A factor) {
    for (long n = 0; n * L < dim; ++n)
      store_n(to + n * L, factor == 0 ? Vec<A>{} : x[n] * factor, int(least(L, dim - n * L)));
  }

  const AttentionBackward& call_;
  const A factor_;
};

template <class S>
bool run(const AttentionBackward& call) {
  const LoneQuery<S> lone(call);
  return lone.fits() ? lone.run() : Backward<S>(call).run();
}

}  // namespace
}  // namespace attention

bool attention_backward(const AttentionBackward& call) {
  return for_dtype(call.dtype, [&](auto s) { return attention::run<decltype(s)>(call); });
}

}  // namespace fastseq::FASTSEQ_ISA
