// The large products of the scan's backward pass, each one product over all steps and rows.
//
// dx is made as the scan makes its input's share: rows of dgates times packed columns of W_ih. The weights' gradients
// are sums over rows of outer products: chunks of rows of x and h_prev are laid out in panels, blocks of columns of
// dgates beside them, and a register tile of a gradient takes in a whole chunk before it is written back.
// Each of their numbers is one thread's sum in one order, however many threads there are.
#include <cstring>

#include "recurrent_plan.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

constexpr long kChunk = 256;      // rows that a tile of a weight's gradient takes in at once
constexpr long kFewRows = 6;      // fewer rows in all don't pay for laying out W_ih
constexpr long kBlock = 48;       // columns of dgates laid out beside each other: a multiple of lanes and of tile rows
constexpr long kInputRows = 96;   // rows of dx made at once
constexpr long kInputDepth = 512; // and the columns of dgates taken in at once for them

// out[r][..] (+)= sum_k d[k][r] x[k][..]: d rows kBlock apart, x rows a panel of kMaxVectors vectors apart.
template <class A, int R, int NB>
void run_outer(const A* d, const A* x, long K, A* out, long out_row, bool add) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[R][NB];
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
    FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) acc[r][n] = Vec<A>{};
  for (long k = 0; k < K; ++k, d += kBlock, x += kMaxVectors * L) {
    Vec<A> xv[NB];
    FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) xv[n] = load(x + n * L);
    FASTSEQ_UNROLL for (int r = 0; r < R; ++r) {
      Vec<A> dv = splat(d[r]);
      FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) acc[r][n] += dv * xv[n];
    }
  }
  FASTSEQ_UNROLL for (int r = 0; r < R; ++r)
    FASTSEQ_UNROLL for (int n = 0; n < NB; ++n) {
      A* to = out + r * out_row + n * L;
      store(to, add ? load(to) + acc[r][n] : acc[r][n]);
    }
}
template <class A>
using OuterFunction = void (*)(const A*, const A*, long, A*, long, bool);
template <class A, int NB, int R = 1>
OuterFunction<A> outer_function(int rows) {
  if constexpr (R > rows_of_tile(kMaxVectors))
    return nullptr;
  else
    return rows == R ? &run_outer<A, R, NB> : outer_function<A, NB, R + 1>(rows);
}
template <class A>
OuterFunction<A> outer_function(int rows, int width) {
  return width == 4   ? outer_function<A, 4>(rows)
         : width == 3 ? outer_function<A, 3>(rows)
         : width == 2 ? outer_function<A, 2>(rows)
                      : outer_function<A, 1>(rows);
}

// out[r][..] += sum_k d[r][k] w[k][..] for n columns of w as it lies, a few rows of w at a time, in order, and as many
// ahead asked for. More columns than n are neither read nor written.
template <class A, int C = 4>
void add_rows(const A* const* d, long rows, const A* w, long w_row, long K, A* const* out, long n) {
  constexpr int L = kLanes<A>;
  const long whole = n / L * L;
  long k = 0;
  for (; k + C <= K; k += C) {
    const A* from[C];
    FASTSEQ_UNROLL for (int i = 0; i < C; ++i) from[i] = w + (k + i) * w_row;
    for (long r = 0; r < rows; ++r) {
      A* to = out[r];
      Vec<A> dv[C];
      FASTSEQ_UNROLL for (int i = 0; i < C; ++i) dv[i] = splat(d[r][k + i]);
      for (long e = 0; e < whole; e += L) {
        Vec<A> sum = load(to + e);
        FASTSEQ_UNROLL for (int i = 0; i < C; ++i) {
          if (r == 0) prefetch(from[i] + e, C * w_row * long(sizeof(A)));
          sum += dv[i] * load(from[i] + e);
        }
        store(to + e, sum);
      }
      if (whole < n) {
        Vec<A> sum = load_n(to + whole, int(n - whole));
        FASTSEQ_UNROLL for (int i = 0; i < C; ++i) sum += dv[i] * load_n(from[i] + whole, int(n - whole));
        store_n(to + whole, sum, int(n - whole));
      }
    }
  }
  if constexpr (C > 1)
    if (k < K) {
      const A* rest[kFewRows];
      for (long r = 0; r < rows; ++r) rest[r] = d[r] + k;
      add_rows<A, 1>(rest, rows, w + k * w_row, w_row, K - k, out, n);
    }
}

template <class S>
struct Products {
  using A = Accumulator<S>;
  static constexpr int L = kLanes<A>;
  static constexpr long kPanel = kMaxVectors * L;
  enum Source { from_x, from_h, from_q, kSources };

  // Columns [column, column + count) of dgates (or dhidden) against rows of sources: which weights they make.
  struct Job {
    bool beside;  // columns of dhidden
    long column, count, unit;  // unit: the row of the weights that the first column belongs to
    bool with[kSources];
  };

  const ScanProducts& p;
  long columns, chunk, width[kSources];
  int G, threads, jobs;
  Job job[3];
  A *w_ih, *rows_in, *rows_out;  // packed; [threads][kInputRows][columns or Ip]
  A *panel[kSources], *block;    // [panel][chunk row][kPanel]; [threads][chunk row][kBlock]
  A *dw[2], *db[2];              // gradients of w_ih and w_hh: [columns][dw_row]; of the biases
  long dw_row[2];
  bool direct[2];                // dw is the result itself
  bool few;                      // rows: W_ih is read as it lies
  long* index;                   // [T * B] live rows, as t * B + b
  size_t bytes;

  Products(const ScanProducts& args, void* workspace) : p(args) {
    G = gates_of(p.cell);
    columns = G * p.H;
    threads = p.T * p.B * columns * (p.I + p.P) < kParallelCall ? 1 : p.threads;
    const bool before = p.cell == Cell::gru_reset_before, weights = p.dw_ih.data;
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
    chunk = most < kChunk ? most : kChunk;
    few = most < kFewRows;
    const bool inputs = p.dx.data && !input_as_it_lies();
    w_ih = arena.take<A>(inputs ? vectors_of<A>(p.I) * columns * L : 0);
    rows_in = arena.take<A>(inputs && sizeof(S) != sizeof(A) ? threads * kInputRows * columns : 0);
    rows_out = arena.take<A>(inputs ? threads * kInputRows * padded<A>(p.I) : 0);
    for (int s = 0; s < kSources; ++s) {
      panel[s] = arena.take<A>(weights ? (width[s] + kPanel - 1) / kPanel * chunk * kPanel : 0);
    }
    block = arena.take<A>(weights ? threads * chunk * kBlock : 0);
    for (int i = 0; i < 2; ++i) {
      const ScanView& to = i ? p.dw_hh : p.dw_ih;
      dw_row[i] = padded<A>(i ? p.P : p.I);
      direct[i] = sizeof(S) == sizeof(A) && dw_row[i] == (i ? p.P : p.I);
      dw[i] = arena.take<A>(weights && !direct[i] ? columns * dw_row[i] : 0);
      if (direct[i]) dw[i] = static_cast<A*>(to.data);
      db[i] = arena.take<A>(weights ? padded<A>(columns) + L : 0);
    }
    index = arena.take<long>(weights ? most : 0);
    bytes = arena.used;
  }

  void run() {
    parallel(threads, [this](const Team& team) {
      if (p.dx.data && input_as_it_lies()) few_inputs(team);
      if (p.dx.data && !input_as_it_lies()) input_gradient(team);
      if (p.dw_ih.data) weight_gradients(team);
    });
  }

  static int lanes(long at, long n) { return int(n - at < L ? n - at : L); }

  bool input_as_it_lies() const { return few && sizeof(S) == sizeof(A) && p.w_ih.e == 1; }

  // dx = dgates W_ih for few rows: W_ih is read once, a share of its columns a thread.
  void few_inputs(const Team& team) {
    if constexpr (sizeof(S) == sizeof(A)) {
      const Share vectors = share_of(vectors_of<A>(p.I), team.rank, team.size);
      const long first = vectors.begin * L, last = vectors.end * L < p.I ? vectors.end * L : p.I;
      if (first >= last) return;
      const A* from[kFewRows];
      A* to[kFewRows];
      const long rows = p.T * p.B;
      for (long i = 0; i < rows; ++i) {
        from[i] = at<S>(p.dgates, i / p.B, i % p.B);
        to[i] = at<S>(p.dx, i / p.B, i % p.B) + first;
        std::memset(to[i], 0, size_t(last - first) * sizeof(A));
      }
      add_rows(from, rows, at<S>(p.w_ih, 0, 0) + first, p.w_ih.b, columns, to, last - first);
    }
  }

  // dx = dgates W_ih
  void input_gradient(const Team& team) {
    const long vectors = vectors_of<A>(p.I), Ip = padded<A>(p.I);
    Share mine = share_of(vectors, team.rank, team.size);
    for (long v = mine.begin; v < mine.end; ++v) pack_columns<S>(w_ih + v * columns * L, p.w_ih, columns, p.I, v);
    team.sync();
    A* in = rows_in + team.rank * kInputRows * columns;
    A* out = rows_out + team.rank * kInputRows * Ip;
    const A *whole[kInputRows], *rows[kInputRows];
    mine = share_of(p.T * p.B, team.rank, team.size);
    for (long r0 = mine.begin; r0 < mine.end; r0 += kInputRows) {
      const long n = mine.end - r0 < kInputRows ? mine.end - r0 : kInputRows;
      for (long i = 0; i < n; ++i) {
        const S* row = at<S>(p.dgates, (r0 + i) / p.B, (r0 + i) % p.B);
        if constexpr (sizeof(S) == sizeof(A)) {
          whole[i] = row;
        } else {
          copy_row<S>(in + i * columns, row, 1, columns);
          whole[i] = in + i * columns;
        }
      }
      for (long k = 0; k < columns; k += kInputDepth) {
        const long depth = columns - k < kInputDepth ? columns - k : kInputDepth;
        for (long i = 0; i < n; ++i) rows[i] = whole[i] + k;
        Weights<S> w{w_ih + k * L, columns * L, nullptr, 0, p.I, depth};
        multiply<1>(w, rows, n, 0, vectors, nullptr, 0, k > 0, [&](long row, long v) { return out + row * Ip + v * L; },
                    [](long, int, long, int) {});
      }
      for (long i = 0; i < n; ++i) {
        S* row = at<S>(p.dx, (r0 + i) / p.B, (r0 + i) % p.B);
        for (long e = 0; e < p.I; e += L) store_n(row + e, load(out + i * Ip + e), lanes(e, p.I));
      }
    }
  }

  void weight_gradients(const Team& team) {
    long rows = 0;  // every thread counts for itself; one writes the list down
    for (long t = 0; t < p.T; ++t)
      for (long b = 0; b < p.B; ++b)
        if (live(p, t, b)) {
          if (team.rank == 0) index[rows] = t * p.B + b;
          ++rows;
        }
    long blocks = 0;
    for (int j = 0; j < jobs; ++j) blocks += (job[j].count + kBlock - 1) / kBlock;
    const Share mine = share_of(blocks, team.rank, team.size);
    for (long k0 = 0; k0 == 0 || k0 < rows; k0 += kChunk) {
      const long n = rows - k0 < kChunk ? rows - k0 : kChunk;
      team.sync();  // the list is there, and nobody reads the panels of the last chunk
      const Share packed = share_of(n, team.rank, team.size);
      for (int s = 0; s < kSources; ++s)
        if (width[s]) pack_panels(Source(s), k0, packed);
      team.sync();
      for_blocks(mine, [&](const Job& j, long first, long count) {
        A* d = block + team.rank * chunk * kBlock;
        pack_block(j, first, count, k0, n, d);
        for (int s = 0; s < kSources; ++s)
          if (j.with[s]) outer(Source(s), d, j.unit + first, count, n, k0 > 0);
      });
    }
    for_blocks(mine, [&](const Job& j, long first, long count) {
      for (int s = 0; s < kSources; ++s) {
        if (!j.with[s] || direct[s != from_x]) continue;
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

  // body(job, first column, columns) for blocks [begin, end) of all jobs' columns.
  template <class Body>
  void for_blocks(Share share, const Body& body) const {
    long at = 0;
    for (int j = 0; j < jobs; ++j)
      for (long first = 0; first < job[j].count; first += kBlock, ++at)
        if (at >= share.begin && at < share.end)
          body(job[j], first, job[j].count - first < kBlock ? job[j].count - first : kBlock);
  }

  // What row (t, b) brings: x, the state before, or q. Null for zeros.
  const S* row_of(Source s, long t, long b, long& stride) const {
    if (s == from_x) return stride = p.x.e, at<S>(p.x, t, b);
    if (s == from_q) return stride = p.tape.e, at<S>(p.tape, t, b) + 3 * p.H * p.tape.e;
    const long before = step_before(p, t, b);
    if (cleared(p, t, b) || (before < 0 && !p.h0.data)) return nullptr;
    stride = before < 0 ? p.h0.e : p.y.e;
    return before < 0 ? at<S>(p.h0, 0, b) : at<S>(p.y, before, b);
  }

  void pack_panels(Source s, long k0, Share packed) {
    const long n = width[s];
    for (long k = packed.begin; k < packed.end; ++k) {
      const long t = index[k0 + k] / p.B, b = index[k0 + k] % p.B;
      long stride = 1;
      const S* row = row_of(s, t, b, stride);
      A* to = panel[s] + k * kPanel;
      for (long e = 0; e < n; e += L) {
        Vec<A> some = row ? load_strided(row + e * stride, stride, lanes(e, n)) : Vec<A>{};
        store(to + e / kPanel * chunk * kPanel + e % kPanel, some);
      }
    }
  }

  // [row][kBlock] of a block's columns, and their sums into the biases' gradients.
  void pack_block(const Job& j, long first, long count, long k0, long n, A* d) {
    const ScanView& from = j.beside ? p.dhidden : p.dgates;
    Vec<A> sums[kBlock / L];
    const long vectors = vectors_of<A>(count);
    for (long v = 0; v < vectors; ++v) sums[v] = Vec<A>{};
    for (long k = 0; k < n; ++k) {
      const S* row = at<S>(from, index[k0 + k] / p.B, index[k0 + k] % p.B) + (j.column + first) * from.e;
      for (long v = 0; v < vectors; ++v) {
        Vec<A> some = load_strided(row + v * L * from.e, from.e, lanes(v * L, count));
        sums[v] += some;
        store(d + k * kBlock + v * L, some);
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

  void outer(Source s, const A* d, long unit, long count, long n, bool add) {
    const long vectors = vectors_of<A>(width[s]), row = dw_row[s != from_x];
    constexpr int most = rows_of_tile(kMaxVectors);
    for (long v = 0; v < vectors; v += kMaxVectors) {
      const int wide = int(vectors - v < kMaxVectors ? vectors - v : kMaxVectors);
      const A* x = panel[s] + v / kMaxVectors * chunk * kPanel;
      for (long r = 0; r < count; r += most) {
        const int tall = int(count - r < most ? count - r : most);
        outer_function<A>(tall, wide)(d + r, x, n, dw[s != from_x] + (unit + r) * row + v * L, row, add);
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
