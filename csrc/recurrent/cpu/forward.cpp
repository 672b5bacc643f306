// The scan forward: gates = x W_ih^T + h W_hh^T + b, and the cell on top, step after step.
//
// A chunk of steps is projected (x W_ih^T) into a scratch that stays in the cache, then scanned at once. A step is a
// product tile for some rows and a vector of units with all its gates, and the cell's arithmetic on that tile.
#include "recurrent/cpu/forward.h"
#include "recurrent/gates.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

template <class S, class W, class E>
template <Cell kCell>
struct Forward<S, W, E>::Thread {
  static constexpr int G = gates_of(kCell);
  static constexpr bool kHasC = has_c(kCell), kBefore = kCell == Cell::gru_reset_before;
  static constexpr int kFused = kBefore ? 2 : G;  // gates of the first product of a step
  const Forward& f;
  const ScanForward& p;
  Part part;
  Share units, outputs;  // vectors of H and of P
  const A **h_in, **c_in;
  const E** from;  // rows of a product
  long* rows;      // live rows of the step
  long count = 0;
  A* row_scales;   // of bytes: of `from`
  Matrix input, hidden, candidate, projection;

  Thread(const Forward& forward, const Team& team)
      : f(forward), p(f.p), part(team, f.p, unit_ways(f.p, team.size, sizeof(Q), kCache), f.barriers),
        units(part.share(f.Hv)), outputs(part.share(f.Pv)) {
    h_in = f.pointers + team.rank * f.list_length * 2;
    c_in = h_in + f.list_length;
    from = f.operands + team.rank * f.list_length * kParts<E>;
    rows = f.live_rows + team.rank * p.B;
    auto raw = [](const ScanView& w) { return kPrepared ? nullptr : static_cast<const S*>(w.data); };
    const bool scaled = p.s_ih.data;
    const A *s_ih = scaled ? f.scale_x : nullptr, *s_hh = scaled ? f.scale_h : nullptr;
    const long I = packed_row<E, Q>(p.I), P = packed_row<E, Q>(p.P), H = packed_row<E, Q>(p.H);
    input = {f.packed_x ? f.w_ih : nullptr, I * G * L, raw(p.w_ih), p.w_ih.b, p.H, p.I, s_ih, f.Hp};
    hidden = {f.packed_h ? f.w_hh : nullptr, P * G * L, raw(p.w_hh), p.w_hh.b, p.H, p.P, s_hh, f.Hp};
    if (kBefore) {
      // Its own block behind that of r and z: [v][k][2][lane], then [v][k][lane].
      hidden.stride = P * 2 * L;
      candidate = {f.packed_h ? f.w_hh + f.Hv * P * 2 * L : nullptr, P * L, raw(p.w_hh), p.w_hh.b, p.H, p.P,
                   s_hh ? s_hh + 2 * f.Hp : nullptr, f.Hp};
      if (!kPrepared) candidate.raw += 2 * p.H * p.w_hh.b;
    }
    if (p.w_hr.data)
      projection = {f.packed_h ? f.w_hr : nullptr, H * L, raw(p.w_hr), p.w_hr.b, p.P, p.H,
                    scaled ? f.scale_r : nullptr, f.Pp};
    row_scales = f.row_scales + team.rank * f.list_length;
    if constexpr (kBytes) {
      for (Matrix* matrix : {&input, &hidden, &candidate, &projection}) matrix->row_scale = row_scales;
      input.start = f.start_x, hidden.start = f.start_h, candidate.start = f.start_h + 2 * f.Hp;
      projection.start = f.start_r;
    }
    input.one_chain = hidden.one_chain = candidate.one_chain = projection.one_chain = p.deterministic;
  }

  void walk() {
    if constexpr (!kPrepared)
      if (f.once) return step_once();
    prepare();
    for (long s0 = 0; s0 < p.T; s0 += f.chunk) {
      long s1 = s0 + f.chunk < p.T ? s0 + f.chunk : p.T;
      project(s0, s1);
      for (long s = s0; s < s1; ++s) {
        step(s, (s - s0) * p.B);
        part.sync();
      }
    }
    const A* last = f.h[p.T & 1].h;
    for (long b = part.row0; b < part.row1; ++b) {
      for (long v = outputs.begin; v < outputs.end; ++v)
        put_last(p.h_n, p.h_kept, b, v, p.P, load(last + b * f.Pp + v * L));
      if (kHasC)
        for (long v = units.begin; v < units.end; ++v)
          put_last(p.c_n, p.c_kept, b, v, p.H, load(f.c + b * f.Hp + v * L));
    }
  }

  long time_of(long s) const { return p.reverse ? p.T - 1 - s : s; }
  static int lanes(long v, long n) { return int(n - v * L < L ? n - v * L : L); }
  static void put(const ScanView& to, long t, long b, long v, long n, Vec<A> value) {
    store_n(at<S>(to, t, b) + v * L, value, lanes(v, n));
  }
  void put_last(const ScanView& to, const ScanView& kept, long b, long v, long n, Vec<A> value) const {
    put(to, 0, b, v, n, value);
    if (p.write) put(kept, 0, p.write[b], v, n, value);
  }
  // The state that row b starts from; null: zeros.
  const S* start_of(const ScanView& from, long b) const {
    return from.data ? at<S>(from, 0, p.read ? p.read[b] : b) : nullptr;
  }
  Vec<A> bias(const ScanView& from, long row, long v) const {
    return from.data ? load_strided(at<S>(from, 0, 0) + (row + v * L) * from.e, from.e, lanes(v, p.H)) : Vec<A>{};
  }

  static constexpr bool apart(int g) { return kCell == Cell::gru && g == 2; }  // r stands between the two products
  void lay_biases(long v) {
    for (int g = 0; g < G; ++g) {
      Vec<A> b_ih = bias(p.b_ih, g * p.H, v), b_hh = bias(p.b_hh, g * p.H, v);
      store(f.bias_x + g * f.Hp + v * L, apart(g) ? b_ih : b_ih + b_hh);
      if (apart(g)) store(f.bias_h + v * L, b_hh);
      if (p.s_ih.data) {
        lay_scale(f.scale_x + g * f.Hp, f.start_x + g * f.Hp, p.s_ih, g * p.H, v, p.H);
        lay_scale(f.scale_h + g * f.Hp, f.start_h + g * f.Hp, p.s_hh, g * p.H, v, p.H);
      }
    }
  }
  static void lay_scale(A* to, int32_t* start, const ScanView& from, long row, long v, long n) {
    const A* at = static_cast<const A*>(from.data) + row + v * L;
    store(to + v * L, load_n(at, lanes(v, n)));
    if constexpr (kBytes) store(start + v * L, __builtin_convertvector(load_n(at + from.b, lanes(v, n)), Vec<int32_t>));
  }

  // A call of one step and few rows: each gate's rows of W_ih and W_hh are read once, in the order in which they lie,
  // and meet in one sum. Where x and h need no copy, no thread needs anything from another.
  void step_once() {
    const bool copy_h = sizeof(S) != sizeof(E) || !p.h0.data || p.h0.e != 1;
    A* h = f.h[0].h;
    for (long b = part.row0 + part.member; b < part.row1; b += part.ways) {
      if (f.convert) copy_row<S>(f.inputs + b * f.I, at<S>(p.x, 0, b), p.x.e, p.I);
      if (!copy_h) continue;
      const S* h0 = start_of(p.h0, b);
      copy_row<S>(h + b * f.Pp, h0, p.h0.e, p.P);
      if (kPairs) copy_row<S>(f.h[0].rows + b * f.Pp, h0, p.h0.e, p.P);
    }
    if (f.convert || copy_h) part.sync();
    for (long v = units.begin; v < units.end; ++v) lay_biases(v);
    const S *w_ih = input.raw, *w_hh = hidden.raw;
    const long tiles = (part.row1 - part.row0 + kDotRows - 1) / kDotRows;
    auto multiply = [&](int g, int first, int parts, A* out, long row, const A* biases) {
      for (long v = units.begin; v < units.end; ++v)
        for (long i = 0; i < tiles; ++i) {
          const Share tile = share_of(part.row1 - part.row0, int(i), int(tiles));
          const long b0 = part.row0 + tile.begin;
          const int n = int(tile.end - tile.begin);
          const E *x[kDotRows], *h_prev[kDotRows];
          for (int r = 0; r < n; ++r) {
            x[r] = f.convert ? f.inputs + (b0 + r) * f.I : reinterpret_cast<const E*>(at<S>(p.x, 0, b0 + r));
            h_prev[r] = copy_h ? f.h[0].rows + (b0 + r) * f.Pp : reinterpret_cast<const E*>(start_of(p.h0, b0 + r));
          }
          const long unit = g * p.H + v * L;
          const Dots<S> both[] = {{x, w_ih + unit * p.w_ih.b, p.w_ih.b, p.I},
                                  {h_prev, w_hh + unit * p.w_hh.b, p.w_hh.b, p.P}};
          dot_rows(both + first, parts, lanes(v, p.H), n, [&](int r, Vec<A> sum) {
            store(out + (b0 + r) * row + v * L, biases ? sum + load(biases + v * L) : sum);
          });
        }
    };
    for (int g = 0; g < G; ++g) {
      multiply(g, 0, apart(g) ? 1 : 2, f.gates + g * f.Hp, G * f.Hp, f.bias_x + g * f.Hp);
      if (apart(g)) multiply(g, 1, 1, f.update, f.Hp, nullptr);
    }
    for (long b = part.row0; b < part.row1; ++b) {
      rows[0] = b, h_in[0] = h + b * f.Pp, c_in[0] = f.c + b * f.Hp;
      for (long v = units.begin; v < units.end; ++v) {
        const int n = lanes(v, p.H);
        const A* x = f.gates + b * G * f.Hp;
        if (!copy_h) store(h + b * f.Pp + v * L, load_n(start_of(p.h0, b) + v * L, n));
        const S* c0 = start_of(p.c0, b);
        if (kHasC) store(f.c + b * f.Hp + v * L, c0 ? load_strided(c0 + v * L * p.c0.e, p.c0.e, n) : Vec<A>{});
        A sums[kMaxVectors * L] = {};
        if (apart(G - 1)) store(sums + (G - 1) * tile_stride(kFused), load(f.update + b * f.Hp + v * L));
        activate(0, 0, v, x, sums);
        finish(0, 0, v, x, sums, f.h[1]);
        put_last(p.h_n, p.h_kept, b, v, p.H, load(f.h[1].h + b * f.Pp + v * L));
        if (kHasC) put_last(p.c_n, p.c_kept, b, v, p.H, load(f.c + b * f.Hp + v * L));
      }
    }
  }

  // Packs the weights, all threads together, and lays out biases and the first state.
  void prepare() {
    const Team& team = part.team;
    Share all = share_of(f.Hv, team.rank, team.size);
    for (long v = all.begin; v < all.end; ++v) {
      lay_biases(v);
      if (f.packed_x) pack(input, v, p.w_ih, 0, G, p.H, p.I);
      if (f.packed_h) {
        pack(hidden, v, p.w_hh, 0, kFused, p.H, p.P);
        if (kBefore) pack(candidate, v, p.w_hh, 2 * p.H, 1, p.H, p.P);
      }
    }
    if (f.packed_h && p.w_hr.data) {
      all = share_of(f.Pv, team.rank, team.size);
      for (long v = all.begin; v < all.end; ++v) {
        pack(projection, v, p.w_hr, 0, 1, p.P, p.H);
        if (p.s_hr.data) lay_scale(f.scale_r, f.start_r, p.s_hr, 0, v, p.P);
      }
    }
    if (team.rank == 0) copy_row<S>(f.zeros, nullptr, 1, f.Hp > f.Pp ? f.Hp : f.Pp);
    for (long b = part.row0 + part.member; b < part.row1; b += part.ways) {
      lay_state(f.h[0], b, start_of(p.h0, b), p.h0.e);
      if (kHasC) copy_row<S>(f.c + b * f.Hp, start_of(p.c0, b), p.c0.e, p.H);
      if (p.reset_h.data) lay_state(f.after_reset, b, at<S>(p.reset_h, 0, b), p.reset_h.e);
      if (kHasC && p.reset_c.data) copy_row<S>(f.c_after_reset + b * f.Hp, at<S>(p.reset_c, 0, b), p.reset_c.e, p.H);
    }
    team.sync();
  }

  void lay_state(State to, long b, const S* from, long stride) {
    copy_row<S>(to.h + b * f.Pp, from, stride, p.P);
    if (kPairs) copy_row<S>(to.rows + b * f.Pp, from, stride, p.P);
    for (long v = 0; p.mask.data && v < f.Pv; ++v) lay_rows(to, b, v, load(to.h + b * f.Pp + v * L));
  }

  // Unit vector v of a panel in the workspace; one that was packed beforehand is ready.
  static void pack(const Matrix& to, long v, const ScanView& w, long row0, int gates, long H, long K) {
    if constexpr (!kPrepared) pack_units<S>(const_cast<E*>(to.packed) + v * to.stride, w, row0, gates, H, K, v);
  }

  // gates[row] = x W_ih^T + bias for the live rows of steps [s0, s1); row = (s - s0) * B + b.
  void project(long s0, long s1) {
    long n = 0;
    A** to = const_cast<A**>(c_in);
    for (long s = s0; s < s1; ++s)
      for (long b = part.row0; b < part.row1; ++b) {
        long t = time_of(s), row = (s - s0) * p.B + b;
        if (!live(p, t, b)) continue;
        if (f.convert) {
          for (int i = 0; i < kParts<E>; ++i) from[n * kParts<E> + i] = f.inputs + (row * kParts<E> + i) * f.I;
          if (n % part.ways == part.member) read_input(row, at<S>(p.x, t, b));
        } else {
          from[n] = reinterpret_cast<const E*>(at<S>(p.x, t, b));
        }
        to[n++] = f.gates + row * G * f.Hp;
      }
    if (f.convert) part.sync();
    for (long i = 0; kBytes && i < n; ++i) row_scales[i] = f.input_scales[(from[2 * i] - f.inputs) / (2 * f.I)];
    multiply<G>(input, from, n, units.begin, units.end, f.bias_x, f.Hp, false,
                [&](long row, long v) { return to[row] + v * L; }, [](long, int, long, int) {});
  }

  void step(long s, long gates_row) {
    long t = time_of(s);
    const State h = f.h[s & 1], next = f.h[~s & 1];
    count = 0;
    for (long b = part.row0; b < part.row1; ++b) {
      if (!live(p, t, b)) {
        stand(t, b, h.h, next);
        continue;
      }
      const bool reset = cleared(p, t, b), to_zero = reset && !p.reset_h.data;
      const State& start = reset ? f.after_reset : h;
      h_in[count] = to_zero ? f.zeros : start.h + b * f.Pp;
      if (!kBytes) from[count] = to_zero ? reinterpret_cast<const E*>(f.zeros) : start.rows + b * f.Pp;
      if (kHasC) c_in[count] = !reset ? f.c + b * f.Hp : p.reset_c.data ? f.c_after_reset + b * f.Hp : f.zeros;
      rows[count++] = b;
    }
    if constexpr (kBytes) read_bytes(h_in, p.P);
    const A* gates = f.gates + gates_row * G * f.Hp;
    alignas(64) A sums[kMaxRows * kMaxVectors * L];
    multiply<kFused>(
        hidden, from, count, units.begin, units.end, nullptr, kFused == 1 ? 0 : tile_stride(kFused), false,
        [&](long row, long) { return sums + (row % kMaxRows) * kMaxVectors * L; },
        [&](long row0, int n, long v0, int width) {
          auto sums_of_row = [&](long row) { return sums + (row % kMaxRows) * kMaxVectors * L; };
          for (long row = row0; row < row0 + n; ++row)
            for (int nb = 0; nb < width; ++nb)
              activate(t, row, v0 + nb, gates + rows[row] * G * f.Hp, sums_of_row(row) + nb * L);
          if (kBefore) return;
          for (long row = row0; row < row0 + n; ++row)
            for (int nb = 0; nb < width; ++nb)
              finish(t, row, v0 + nb, gates + rows[row] * G * f.Hp, sums_of_row(row) + nb * L, next);
        });
    if constexpr (kBefore) {
      part.sync();
      read_middle();
      multiply<1>(
          candidate, from, count, units.begin, units.end, nullptr, 0, false,
          [&](long row, long) { return sums + (row % kMaxRows) * kMaxVectors * L; },
          [&](long row0, int n, long v0, int width) {
            for (long row = row0; row < row0 + n; ++row)
              for (int nb = 0; nb < width; ++nb)
                blend(t, row, v0 + nb, gates + rows[row] * G * f.Hp,
                      load(sums + (row % kMaxRows) * kMaxVectors * L + nb * L), next);
          });
    }
    if (kHasC && p.w_hr.data) {
      part.sync();
      read_middle();
      multiply<1>(
          projection, from, count, outputs.begin, outputs.end, nullptr, 0, false,
          [&](long row, long v) { return next.h + rows[row] * f.Pp + v * L; },
          [&](long row0, int n, long v0, int width) {
            for (long row = row0; row < row0 + n; ++row)
              for (long v = v0; v < v0 + width; ++v) {
                Vec<A> h_new = load(next.h + rows[row] * f.Pp + v * L);
                if (p.keep_h.data) store(next.h + rows[row] * f.Pp + v * L, h_new = kept(t, row, v, h_new));
                if (kPairs || p.mask.data) lay_rows(next, rows[row], v, h_new);
                put(p.y, t, rows[row], v, p.P, h_new);
              }
          });
    }
  }

  // A row of x, as products read it.
  void read_input(long row, const S* x) {
    if constexpr (kBytes)
      f.input_scales[row] = lay_bytes(f.inputs + 2 * row * f.I, f.I, x, p.x.e, p.I);
    else
      copy_row<S>(f.inputs + row * f.I, x, p.x.e, p.I);
  }
  // The step's rows of n, as bytes of this thread's own.
  void read_bytes(const A* const* given, long n) {
    const long width = f.Hp > f.Pp ? f.Hp : f.Pp;
    for (long row = 0; row < count; ++row) {
      E* to = f.bytes_read + (part.team.rank * f.rows + row) * 2 * width;
      row_scales[row] = lay_bytes(to, width, given[row], 1, n);
      from[2 * row] = to, from[2 * row + 1] = to + width;
    }
  }
  void read_middle() {
    if constexpr (kBytes) {
      for (long row = 0; row < count; ++row) c_in[row] = f.middle + rows[row] * f.Hp;  // done with what it had
      read_bytes(c_in, p.H);
    } else {
      for (long row = 0; row < count; ++row) from[row] = f.middle + rows[row] * f.Hp;
    }
  }

  // Gates lie side by side in `sums` as the tile has vectors: its width times L apart.
  static constexpr long tile_stride(int gates) { return tile_width(gates) * L; }

  // A row past its length: the state stands still.
  void stand(long t, long b, const A* h, State next) {
    for (long v = outputs.begin; v < outputs.end; ++v) {
      hand_on(next, b, v, load(h + b * f.Pp + v * L));
      put(p.y, t, b, v, p.P, Vec<A>{});
    }
    for (long v = units.begin; v < units.end; ++v) {
      if (kHasC && p.states.data) keep_state(t, b, v, load(f.c + b * f.Hp + v * L));
      if (p.tape.data)
        for (int g = 0; g < tape_of(kCell); ++g) keep(t, b, g, v, Vec<A>{});
    }
  }
  // A vector of row b's state, as products read it.
  FASTSEQ_INLINE void lay_rows(State next, long b, long v, Vec<A> h) const {
    const int n = lanes(v, p.P);
    if constexpr (!kBytes) store_activations(next.rows + b * f.Pp + v * L, p.mask.data ? masked<S>(p, b, v * L, h, n) : h, n);
  }
  FASTSEQ_INLINE void hand_on(State next, long b, long v, Vec<A> h) const {
    store(next.h + b * f.Pp + v * L, h);
    if (kPairs || p.mask.data) lay_rows(next, b, v, h);
  }
  void keep_state(long t, long b, long v, Vec<A> c) { store_n(at<A>(p.states, t, b) + v * L, c, lanes(v, p.H)); }
  void keep(long t, long b, int g, long v, Vec<A> value) {
    store_n(at<S>(p.tape, t, b) + g * p.H + v * L, value, lanes(v, p.H));
  }

  // The cell's arithmetic for L units of one row: x [G][Hp] the input's share, sums [kFused][..] the state's. What the
  // second half needs is left in sums.
  FASTSEQ_INLINE void activate(long t, long row, long v, const A* x, A* sums) {
    constexpr long step = tile_stride(kFused);
    long b = rows[row], at_v = v * L;
    auto pre = [&](int g) { return load(x + g * f.Hp + at_v) + load(sums + g * step); };
    if constexpr (kHasC) {
      LstmGates<kCell, Vec<A>> made;
      FASTSEQ_UNROLL for (int g = 0; g < G; ++g) made.of[g] = pre(g);
      Vec<A> c_new;
      const LstmGates<kCell, Vec<A>> s = lstm_forward(made, load(c_in[row] + at_v), c_new);
      store(sums, s.o());
      if (p.keep_c.data) {  // h is of the c that would have been without
        store(sums, lstm_hidden(s.o(), c_new));
        const Vec<A> share = share_kept<S>(p.keep_c, t, b, at_v, lanes(v, p.H));
        c_new = gru_blend(share, c_new, load(c_in[row] + at_v));
      }
      store(f.c + b * f.Hp + at_v, c_new);
      if (p.states.data) keep_state(t, b, v, c_new);
      if (p.tape.data) {
        FASTSEQ_UNROLL for (int g = 0; g < G; ++g) keep(t, b, g, v, s.of[g]);
      }
    } else if constexpr (kCell == Cell::gru) {
      Vec<A> q = load(sums + 2 * step) + load(f.bias_h + at_v);
      GruGates<Vec<A>> s = gru_forward(pre(0), pre(1), load(x + 2 * f.Hp + at_v), q);
      store(sums, s.z);
      store(sums + step, s.x_n);
      if (p.tape.data) keep(t, b, 0, v, s.r), keep(t, b, 1, v, s.z), keep(t, b, 3, v, q);
    } else if constexpr (kBefore) {
      Vec<A> r = sigmoid(pre(0)), z = sigmoid(pre(1)), q = r * load(h_in[row] + at_v);
      if (p.mask.data) q = masked<S>(p, b, at_v, q, lanes(v, p.H));
      store_activations(f.middle + b * f.Hp + at_v, q, lanes(v, p.H));
      store(f.update + b * f.Hp + at_v, z);
      if (p.tape.data) keep(t, b, 0, v, r), keep(t, b, 1, v, z), keep(t, b, 3, v, q);
    }
  }
  FASTSEQ_INLINE void finish(long t, long row, long v, const A* x, const A* sums, State next) {
    constexpr long step = tile_stride(kFused);
    long b = rows[row], at_v = v * L;
    Vec<A> h_new;
    if constexpr (kHasC) {
      h_new = p.keep_c.data ? load(sums) : lstm_hidden(load(sums), load(f.c + b * f.Hp + at_v));
      if (p.w_hr.data) return store_activations(f.middle + b * f.Hp + at_v, h_new, lanes(v, p.H));
    } else if constexpr (kCell == Cell::gru) {
      Vec<A> n = tanh(load(sums + step));
      h_new = gru_blend(load(sums), n, load(h_in[row] + at_v));
      if (p.tape.data) keep(t, b, 2, v, n);
    } else {
      h_new = rnn_forward<kCell == Cell::rnn_relu>(load(x + at_v) + load(sums));
    }
    if (p.keep_h.data) h_new = kept(t, row, v, h_new);
    hand_on(next, b, v, h_new);
    put(p.y, t, b, v, p.H, h_new);
  }

  // The second half of a GRU whose reset comes before the product.
  FASTSEQ_INLINE void blend(long t, long row, long v, const A* x, Vec<A> sum, State next) {
    long b = rows[row], at_v = v * L;
    Vec<A> n = tanh(load(x + 2 * f.Hp + at_v) + sum);
    Vec<A> h_new = gru_blend(load(f.update + b * f.Hp + at_v), n, load(h_in[row] + at_v));
    if (p.tape.data) keep(t, b, 2, v, n);
    if (p.keep_h.data) h_new = kept(t, row, v, h_new);
    hand_on(next, b, v, h_new);
    put(p.y, t, b, v, p.H, h_new);
  }
  // The new state of a row, of which a share is the one before.
  Vec<A> kept(long t, long row, long v, Vec<A> h_new) const {
    const Vec<A> share = share_kept<S>(p.keep_h, t, rows[row], v * L, lanes(v, p.P));
    return gru_blend(share, h_new, load(h_in[row] + v * L));
  }
};

// body(a null pointer to Forward) of the types of a call.
template <class Body>
void for_types(const ScanForward& p, const Body& body) {
  if (p.weights == p.dtype)
    return for_dtype(p.dtype, [&](auto s) { body((Forward<decltype(s), decltype(s), Operand<decltype(s)>>*)nullptr); });
#if defined(FASTSEQ_BYTES)
  const bool fits = p.I <= kLongestBytes && p.P <= kLongestBytes && p.H <= kLongestBytes;
  if (p.weights == Dtype::i8 && p.narrow && fits && !p.mask.data) return body((Forward<float, q8, q8>*)nullptr);
#endif
  if (p.weights == Dtype::i8) return body((Forward<float, q8, float>*)nullptr);
  if (p.narrow) return body((Forward<float, bf16, Operand<bf16>>*)nullptr);
  body((Forward<float, bf16, float>*)nullptr);
}

}  // namespace

int scan_lanes() { return kLanes<float>; }

size_t scan_forward_workspace(const ScanForward& p) {
  size_t bytes;
  for_types(p, [&](auto* of) { bytes = std::remove_pointer_t<decltype(of)>(p, nullptr).bytes; });
  return bytes;
}

void scan_forward(const ScanForward& p) {
  for_types(p, [&](auto* of) { std::remove_pointer_t<decltype(of)>(p, p.workspace).run(); });
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
