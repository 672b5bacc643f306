// The large products of the scan's backward pass, each one product over all steps and rows.
//
// dx is made as the scan makes its input's share: rows of dgates times packed columns of W_ih. The weights' gradients
// are sums over rows of outer products: chunks of rows of x and h_prev are laid out in panels, blocks of columns of
// dgates beside them, and a register tile of a gradient takes in a whole chunk before it is written back.
// Each of their numbers is one thread's sum in one order, however many threads there are.
#include "recurrent/cpu/plan.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

constexpr long kChunk = 256;      // rows that a tile of a weight's gradient takes in at once
constexpr long kBlock = 48;       // columns of dgates laid out beside each other: a multiple of lanes and of tile rows
constexpr long kInputRows = 96;   // rows of dx made at once
constexpr long kInputDepth = 512; // and the columns of dgates taken in at once for them
constexpr long kAhead = 16;       // rows that are asked for before they are laid out: the walk left them in the last cache

// out[r][..] (+)= sum_k d[k][r] x[k][..] over K terms: d's are kBlock of them apart, x's a panel of kMaxVectors vectors.
template <class E, int R, int kAll>
void run_outer(const E* d, const E* x, long K, Accumulator<E>* out, long out_row, bool add) {
  using A = Accumulator<E>;
  constexpr int L = kLanes<A>, D = kTerm<E>, NB = vectors_at_once(R, kAll);
  if constexpr (NB < kAll) run_outer<E, R, kAll - NB>(d, x + NB * L * D, K, out + NB * L, out_row, add);
  Vec<A> acc[R][NB];
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
    FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) acc[r][n] = Vec<A>{};
  for (long k = 0; k < K; ++k, d += kBlock * D, x += kMaxVectors * L * D) {
    Vec<A> xv[NB];
    FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) xv[n] = load_terms(x + n * L * D);
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
      Vec<A> dv = splat_term(d + r * D);
      FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) acc[r][n] = add_product<E>(acc[r][n], dv, xv[n]);
    }
  }
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
    FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) {
      A* to = out + r * out_row + n * L;
      store(to, add ? load(to) + acc[r][n] : acc[r][n]);
    }
}
template <class E>
using OuterFunction = void (*)(const E*, const E*, long, Accumulator<E>*, long, bool);
template <class E, int NB, int R = 1>
OuterFunction<E> outer_function(int rows) {
  if constexpr (R > rows_of_tile(kMaxVectors))
    return nullptr;
  else
    return rows == R ? &run_outer<E, R, NB> : outer_function<E, NB, R + 1>(rows);
}
template <class E>
OuterFunction<E> outer_function(int rows, int width) {
  return width == 4   ? outer_function<E, 4>(rows)
         : width == 3 ? outer_function<E, 3>(rows)
         : width == 2 ? outer_function<E, 2>(rows)
                      : outer_function<E, 1>(rows);
}

template <class S>
struct Products {
  using A = Accumulator<S>;
  using E = Operand<S>;
  static constexpr int L = kLanes<A>, D = kTerm<E>;
  static constexpr long kPanel = kMaxVectors * L;
  enum Source { from_x, from_h, from_q, kSources };

  // Columns [column, column + count) of dgates (or dhidden) against rows of sources: which weights they make.
  struct Job {
    bool beside;  // columns of dhidden
    long column, count, unit;  // unit: the row of the weights that the first column belongs to
    bool with[kSources];
  };

  const ScanProducts& p;
  long columns, depth, chunk, width[kSources];  // depth: columns in whole terms
  int G, threads, jobs;
  Job job[3];
  E *w_ih, *rows_in;             // packed; [threads][kInputRows][depth], where rows of dgates cannot be used in place
  A* rows_out;                   // [threads][kInputRows][Ip]
  E *panel[kSources], *block;    // [panel][term of chunk][kPanel]; [threads][term of chunk][kBlock]
  A *dw[2], *db[2];              // gradients of w_ih and w_hh: [columns][dw_row]; of the biases
  long dw_row[2];
  bool direct[2];                // dw is the result itself
  bool packed;                   // w_ih, for dx
  bool single;                   // one chunk of rows: a tile of a weight's gradient is whole once it is made
  struct Row {
    long t, b;
  };
  Row* index;                    // [T * B] live rows
  size_t bytes;

  Products(const ScanProducts& args, void* workspace) : p(args) {
    G = gates_of(p.cell);
    columns = G * p.H;
    depth = whole_terms<E>(columns);
    threads = p.T * p.B * columns * (p.I + p.P) < kParallelCall ? 1 : p.threads;
    const bool before = p.cell == Cell::gru_reset_before, weights = p.db_ih.data;  // dw_ih has no elements where I is 0
    width[from_x] = p.I, width[from_h] = p.P, width[from_q] = before ? p.H : 0;
    jobs = 0;
    if (p.cell == Cell::gru) {
      job[jobs++] = {false, 0, 2 * p.H, 0, {true, true, false}};
      job[jobs++] = {false, 2 * p.H, p.H, 2 * p.H, {true, false, false}};
      job[jobs++] = {true, 0, p.H, 2 * p.H, {false, true, false}};
    } else if (before) {
      job[jobs++] = {false, 0, 2 * p.H, 0, {true, true, false}};
      job[jobs++] = {false, 2 * p.H, p.H, 2 * p.H, {true, false, true}};
    } else {
      job[jobs++] = {false, 0, columns, 0, {true, true, false}};
    }
    Arena arena{static_cast<char*>(workspace)};
    const long most = p.T * p.B;
    chunk = whole_terms<E>(most < kChunk ? most : kChunk);
    const bool inputs = p.dx.data;
    packed = p.deterministic || most > kColumnRows || p.w_ih.e != 1;
    single = most <= kChunk;
    w_ih = arena.take<E>(inputs && packed ? vectors_of<A>(p.I) * depth * L : 0);
    rows_in = arena.take<E>(inputs && !as_they_lie() ? threads * kInputRows * depth : 0);
    rows_out = arena.take<A>(inputs ? threads * kInputRows * padded<A>(p.I) : 0);
    for (int s = 0; s < kSources; ++s) {
      panel[s] = arena.take<E>(weights ? (width[s] + kPanel - 1) / kPanel * chunk * kPanel : 0);
    }
    block = arena.take<E>(weights ? threads * chunk * kBlock : 0);
    for (int i = 0; i < 2; ++i) {
      const ScanView& to = i ? p.dw_hh : p.dw_ih;
      dw_row[i] = padded<A>(i ? p.P : p.I);
      direct[i] = sizeof(S) == sizeof(A) && dw_row[i] == (i ? p.P : p.I);
      dw[i] = arena.take<A>(weights && !direct[i] && !single ? columns * dw_row[i] : 0);
      if (direct[i]) dw[i] = static_cast<A*>(to.data);
      db[i] = arena.take<A>(weights ? padded<A>(columns) + L : 0);
    }
    index = arena.take<Row>(weights ? most : 0);
    bytes = arena.used;
  }

  void run() {
    parallel(threads, [this](const Team& team) {
      [[maybe_unused]] MatrixScope scope;
      if (p.dx.data) input_gradient(team);
      if (p.db_ih.data) weight_gradients(team);
    });
  }

  bool as_they_lie() const { return sizeof(S) == sizeof(E) && depth == columns; }
  static int lanes(long at, long n) { return int(n - at < L ? n - at : L); }

  // dx = dgates W_ih
  void input_gradient(const Team& team) {
    if (!packed) return input_gradient_of_few(team);
    const long vectors = vectors_of<A>(p.I), Ip = padded<A>(p.I);
    Share mine = share_of(vectors, team.rank, team.size);
    for (long v = mine.begin; v < mine.end; ++v) pack_columns<S>(w_ih + v * depth * L, p.w_ih, columns, p.I, v);
    team.sync();
    E* in = rows_in + team.rank * kInputRows * depth;
    A* out = rows_out + team.rank * kInputRows * Ip;
    const E *whole[kInputRows], *rows[kInputRows];
    mine = share_of(p.T * p.B, team.rank, team.size);
    for (long r0 = mine.begin; r0 < mine.end; r0 += kInputRows) {
      const long n = mine.end - r0 < kInputRows ? mine.end - r0 : kInputRows;
      for (long i = 0; i < n; ++i) {
        const S* row = at<S>(p.dgates, (r0 + i) / p.B, (r0 + i) % p.B);
        if (as_they_lie()) {
          whole[i] = reinterpret_cast<const E*>(row);
        } else {
          copy_row<S>(in + i * depth, row, 1, columns);
          whole[i] = in + i * depth;
        }
      }
      for (long k = 0; k < columns; k += kInputDepth) {
        const long some = columns - k < kInputDepth ? columns - k : kInputDepth;
        for (long i = 0; i < n; ++i) rows[i] = whole[i] + k;
        Weights<S> w{w_ih + k * L, depth * L, nullptr, 0, p.I, some};
        w.one_chain = p.deterministic;
        multiply<1>(w, rows, n, 0, vectors, nullptr, 0, k > 0, [&](long row, long v) { return out + row * Ip + v * L; },
                    [](long, int, long, int) {});
      }
      for (long i = 0; i < n; ++i) {
        S* row = at<S>(p.dx, (r0 + i) / p.B, (r0 + i) % p.B);
        for (long e = 0; e < p.I; e += L) store_n(row + e, load(out + i * Ip + e), lanes(e, p.I));
      }
    }
  }

  // The same for few rows: every thread makes its columns of all of them.
  void input_gradient_of_few(const Team& team) {
    const long Ip = padded<A>(p.I), n = p.T * p.B;
    const E* rows[kColumnRows];
    E* in = rows_in + team.rank * kInputRows * depth;
    for (long r = 0; r < n; ++r) {
      const S* row = at<S>(p.dgates, r / p.B, r % p.B);
      rows[r] = as_they_lie() ? reinterpret_cast<const E*>(row) : in + r * depth;
      if (!as_they_lie()) copy_row<S>(in + r * depth, row, 1, columns);
    }
    const Share mine = share_of(vectors_of<A>(p.I), team.rank, team.size);
    multiply_columns<S>(p.w_ih, rows, n, columns, p.I, mine.begin, mine.end, false,
                        [&](long row, long v) { return rows_out + row * Ip + v * L; });
    for (long r = 0; r < n; ++r)
      for (long v = mine.begin; v < mine.end; ++v)
        store_n(at<S>(p.dx, r / p.B, r % p.B) + v * L, load(rows_out + r * Ip + v * L), lanes(v * L, p.I));
  }

  void weight_gradients(const Team& team) {
    long rows = 0;  // every thread counts for itself; one writes the list down
    for (long t = 0; t < p.T; ++t)
      for (long b = 0; b < p.B; ++b)
        if (live(p, t, b)) {
          if (team.rank == 0) index[rows] = {t, b};
          ++rows;
        }
    for (long k0 = 0; k0 == 0 || k0 < rows; k0 += kChunk) {
      const long n = rows - k0 < kChunk ? rows - k0 : kChunk;
      team.sync();  // the list is there, and nobody reads the panels of the last chunk
      const Share packed = share_of(terms_of<E>(n), team.rank, team.size);
      for (int s = 0; s < kSources; ++s)
        if (width[s]) pack_panels(Source(s), k0, n, packed);
      team.sync();
      for_blocks(team, [&](const Job& j, long first, long count) {
        E* d = block + team.rank * chunk * kBlock;
        pack_block(j, first, count, k0, n, d);
        for (int s = 0; s < kSources; ++s)
          if (j.with[s]) outer(Source(s), d, j.unit + first, count, terms_of<E>(n), k0 > 0);
      });
    }
    for_blocks(team, [&](const Job& j, long first, long count) {
      for (int s = 0; s < kSources; ++s) {
        if (!j.with[s] || direct[s != from_x] || single) continue;
        const ScanView& to = s == from_x ? p.dw_ih : p.dw_hh;
        const long n = width[s];
        for (long r = j.unit + first; r < j.unit + first + count; ++r)
          for (long e = 0; e < n; e += L)
            store_n(at<S>(to, 0, r) + e, load(dw[s != from_x] + r * dw_row[s != from_x] + e), lanes(e, n));
      }
      for (int i = 0; i < 2; ++i) {
        if (!j.with[from_x] && i == 0) continue;
        if (!j.with[from_h] && !j.with[from_q] && i == 1) continue;
        for (long r = j.unit + first; r < j.unit + first + count; ++r)
          at<S>(i ? p.db_hh : p.db_ih, 0, 0)[r] = narrow<S>(db[i][r]);
      }
    });
  }

  // What a column of a job costs: products with its sources, and being laid out beside them.
  long cost_of(const Job& j) const {
    long cost = 8;  // of the same unit, roughly: read, summed and stored once a row
    for (int s = 0; s < kSources; ++s)
      if (j.with[s]) cost += width[s];
    return cost;
  }
  // The first column of a job that is not left to the threads before this one. All have as much to do, not as many
  // columns, which are divided at whole vectors.
  long first_column(int j, const Team& team) const {
    if (team.rank == team.size) return job[j].count;
    long total = 0, before = 0;
    for (int i = 0; i < jobs; ++i) total += job[i].count * cost_of(job[i]);
    for (int i = 0; i < j; ++i) before += job[i].count * cost_of(job[i]);
    const long mine = total * team.rank / team.size - before, each = cost_of(job[j]) * L;
    const long column = mine <= 0 ? 0 : (mine + each / 2) / each * L;
    return column < job[j].count ? column : job[j].count;
  }
  // body(job, first column, columns) for the blocks of this thread's columns.
  template <class Body>
  void for_blocks(const Team& team, const Body& body) const {
    for (int j = 0; j < jobs; ++j) {
      const long end = first_column(j, {team.rank + 1, team.size, team.barrier});
      for (long first = first_column(j, team); first < end; first += kBlock)
        body(job[j], first, end - first < kBlock ? end - first : kBlock);
    }
  }

  // What row (t, b) brings: x, the state before, or q. Null for zeros.
  const S* row_of(Source s, Row of, long& stride) const {
    const auto [t, b] = of;
    if (s == from_x) return stride = p.x.e, at<S>(p.x, t, b);
    if (s == from_q) return stride = p.tape.e, at<S>(p.tape, t, b) + 3 * p.H * p.tape.e;
    const long before = step_before(p, t, b);
    if (cleared(p, t, b)) return stride = p.reset_h.e, p.reset_h.data ? at<S>(p.reset_h, 0, b) : nullptr;
    if (before < 0 && !p.h0.data) return nullptr;
    stride = before < 0 ? p.h0.e : p.y.e;
    return before < 0 ? at<S>(p.h0, 0, b) : at<S>(p.y, before, b);
  }

  static void ask_for(const S* row, long n) {
    constexpr long kLine = 64 / long(sizeof(S));
    for (long e = 0; row && e < n; e += kLine) prefetch(row + e, 0);
  }

  void pack_panels(Source s, long k0, long count, Share packed) {
    const long n = width[s];
    for (long term = packed.begin; term < packed.end; ++term) {
      const S* row[D];
      long stride[D] = {};
      FASTSEQ_UNROLL for (int d = 0; d < D; ++d) {
        const long k = term * D + d;
        row[d] = k < count ? row_of(s, index[k0 + k], stride[d]) : nullptr;
        long any;
        if (k + kAhead < count) ask_for(row_of(s, index[k0 + k + kAhead], any), n);
      }
      E* to = panel[s] + term * kPanel * D;
      for (long e = 0; e < n; e += L) {
        Vec<A> some[D];
        FASTSEQ_UNROLL for (int d = 0; d < D; ++d)
          some[d] = row[d] ? load_strided(row[d] + e * stride[d], stride[d], lanes(e, n)) : Vec<A>{};
        for (int d = 0; s == from_h && p.mask.data && d < D; ++d)
          if (row[d]) some[d] = masked<S>(p, index[k0 + term * D + d].b, e, some[d], lanes(e, n));
        store_terms(to + e / kPanel * chunk * kPanel + e % kPanel * D, terms_from<E>(some));
      }
    }
  }

  // [term of rows][kBlock] of a block's columns, and their sums into the biases' gradients.
  void pack_block(const Job& j, long first, long count, long k0, long n, E* block) {
    const ScanView& from = j.beside ? p.dhidden : p.dgates;
    Vec<A> sums[kBlock / L];
    const long vectors = vectors_of<A>(count);
    for (long v = 0; v < vectors; ++v) sums[v] = Vec<A>{};
    auto row_at = [&](long k) { return at<S>(from, index[k0 + k].t, index[k0 + k].b) + (j.column + first) * from.e; };
    for (long k = 0; k < n; k += D) {
      const S* row[D];
      FASTSEQ_UNROLL for (int d = 0; d < D; ++d) {
        row[d] = k + d < n ? row_at(k + d) : nullptr;
        if (k + d + kAhead < n) ask_for(row_at(k + d + kAhead), count);
      }
      for (long v = 0; v < vectors; ++v) {
        Vec<A> some[D];
        FASTSEQ_UNROLL for (int d = 0; d < D; ++d) {
          some[d] = row[d] ? load_strided(row[d] + v * L * from.e, from.e, lanes(v * L, count)) : Vec<A>{};
          sums[v] += some[d];
        }
        store_terms(block + k * kBlock + v * L * D, terms_from<E>(some));
      }
    }
    const bool hidden_side = j.with[from_h] || j.with[from_q];
    for (long v = 0; v < vectors; ++v) {
      const int some = lanes(v * L, count);
      for (int i = 0; i < 2; ++i) {
        if (i ? !hidden_side : !j.with[from_x]) continue;
        A* to = db[i] + j.unit + first + v * L;
        store_n(to, k0 ? load_n(to, some) + sums[v] : sums[v], some);
      }
    }
  }

  void outer(Source s, const E* d, long unit, long count, long n, bool add) {
    const ScanView& result = s == from_x ? p.dw_ih : p.dw_hh;
    alignas(64) A tile[rows_of_tile(kMaxVectors) * kPanel];
    const long vectors = vectors_of<A>(width[s]), row = dw_row[s != from_x];
    constexpr int most = rows_of_tile(kMaxVectors);
    for (long v = 0; v < vectors; v += kMaxVectors) {
      const int wide = int(vectors - v < kMaxVectors ? vectors - v : kMaxVectors);
      const E* x = panel[s] + v / kMaxVectors * chunk * kPanel;
      for (long r = 0; r < count; r += most) {
        const int tall = int(count - r < most ? count - r : most);
        const auto make = outer_function<E>(tall, wide);
        if (direct[s != from_x] || !single) {
          make(d + r * D, x, n, dw[s != from_x] + (unit + r) * row + v * L, row, add);
          continue;
        }
        make(d + r * D, x, n, tile, kPanel, false);
        for (int i = 0; i < tall; ++i)
          for (int e = 0; e < wide * L; e += L)
            store_n(at<S>(result, 0, unit + r + i) + v * L + e, load(tile + i * kPanel + e), lanes(v * L + e, width[s]));
      }
    }
  }
};

}  // namespace

size_t scan_products_workspace(const ScanProducts& p) {
  return for_dtype(p.dtype, [&](auto s) { return Products<decltype(s)>(p, nullptr).bytes; });
}

void scan_products(const ScanProducts& p) {
  for_dtype(p.dtype, [&](auto s) { Products<decltype(s)>(p, p.workspace).run(); });
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
