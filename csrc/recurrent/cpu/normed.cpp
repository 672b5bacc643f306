// The recurrence of normalised layers forward.
//
// A step is the product W_hh h_prev for all live rows, then each row's mean and variance, then the cell's arithmetic.
// Each lane's mean and squares over the G gates of its unit are taken while the product's tile is in the cache. Equal
// counts make the row's variance of them without another walk through the product: the sum over lanes of the squares
// plus G times the squares of the lanes' means. Threads that share a row's units meet at a barrier before, and each sums
// all lanes by itself, so that the team's size has no influence on a bit.
#include "recurrent/cpu/norm_row.h"
#include "recurrent/gates.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

template <class S>
struct Normed {
  using A = Accumulator<S>;
  using E = Operand<S>;
  static constexpr int L = kLanes<A>;
  static constexpr bool kPairs = kTerm<E> == 2;  // then the state is kept twice: as it is, and as products read it

  struct State {
    A* h;
    E* rows;  // h as products read it: rounded, or times the mask; or the same memory
  };

  const NormedForward& p;
  int G;
  long Hp, Hv;          // padded units, their vectors
  bool packed;
  Barrier* barriers;
  E* w_hh;              // packed: [vector of H][H][G][lane]
  A *gain, *shift;      // [G][Hp]
  A *gain_c, *shift_c;  // [Hp]
  A* product;           // [B][G][Hp]
  A *means, *squares;   // [B][Hp]: of a lane's G gates
  State h[2];           // [B][Hp]
  A *c, *out;           // [B][Hp]: c_t, and the activated output gate
  A* zeros;             // [Hp]
  const A** h_in;       // [threads][B]
  const E** operands;   // [threads][B]
  long* live_rows;      // [threads][B]
  size_t bytes;

  Normed(const NormedForward& args, void* workspace) : p(args) {
    G = gates_of(p.cell);
    Hv = vectors_of<A>(p.H), Hp = Hv * L;
    packed = p.deterministic || p.w_hh.e != 1 || pays_to_pack(p, p.H);
    const int threads = threads_for(p, sizeof(E));
    const bool lstm = has_c(p.cell);
    Arena arena{static_cast<char*>(workspace)};
    barriers = arena.take<Barrier>(threads);
    w_hh = arena.take<E>(packed ? Hv * whole_terms<E>(p.H) * G * L : 0);
    gain = arena.take<A>(G * Hp);
    shift = arena.take<A>(G * Hp);
    gain_c = arena.take<A>(lstm ? Hp : 0);
    shift_c = arena.take<A>(lstm ? Hp : 0);
    product = arena.take<A>(p.B * G * Hp);
    means = arena.take<A>(p.B * Hp);
    squares = arena.take<A>(p.B * Hp);
    for (State& state : h) {
      state.h = arena.take<A>(p.B * Hp);
      if constexpr (kPairs)
        state.rows = arena.take<E>(p.B * Hp);
      else
        state.rows = p.mask.data ? arena.take<A>(p.B * Hp) : state.h;
    }
    c = arena.take<A>(lstm ? p.B * Hp : 0);
    out = arena.take<A>(lstm ? p.B * Hp : 0);
    zeros = arena.take<A>(Hp);
    h_in = arena.take<const A*>(threads * p.B);
    operands = arena.take<const E*>(threads * p.B);
    live_rows = arena.take<long>(threads * p.B);
    bytes = arena.used;
  }

  void run() {
    const int threads = threads_for(p, sizeof(E));
    for (int i = 0; i < threads; ++i) new (barriers + i) Barrier;
    for_cell(p.cell, [&](auto cell) {
      if constexpr (cell.value == Cell::gru)
        p.joint ? on_threads<Thread<cell.value, true>>(threads, *this) : on_threads<Thread<cell.value, false>>(threads, *this);
      else if constexpr (cell.value != Cell::gru_reset_before)
        on_threads<Thread<cell.value, false>>(threads, *this);
    });
  }

  template <Cell kCell, bool kJoint>
  struct Thread {
    static constexpr int G = gates_of(kCell);
    static constexpr bool kHasC = has_c(kCell);
    const Normed& f;
    const NormedForward& p;
    Part part;
    Share units;
    const A** h_in;
    const E** from;
    long* rows;  // live rows of the step
    long count = 0;
    Weights<S> hidden;

    Thread(const Normed& normed, const Team& team)
        : f(normed), p(f.p), part(team, f.p, unit_ways(f.p, team.size, sizeof(E)), f.barriers), units(part.share(f.Hv)) {
      h_in = f.h_in + team.rank * p.B;
      from = f.operands + team.rank * p.B;
      rows = f.live_rows + team.rank * p.B;
      hidden = Weights<S>{f.packed ? f.w_hh : nullptr, whole_terms<E>(p.H) * G * L, static_cast<const S*>(p.w_hh.data),
                          p.w_hh.b, p.H, p.H};
      hidden.one_chain = p.deterministic;
    }

    long time_of(long s) const { return p.reverse ? p.T - 1 - s : s; }
    int lanes(long v) const { return int(p.H - v * L < L ? p.H - v * L : L); }
    void put(const ScanView& to, long t, long b, long v, Vec<A> value) const {
      store_n(at<S>(to, t, b) + v * L, value, lanes(v));
    }
    void keep(long t, long b, int block, long v, Vec<A> value) const {
      store_n(at<S>(p.tape, t, b) + block * p.H + v * L, value, lanes(v));
    }

    void walk() {
      prepare();
      for (long s = 0; s < p.T; ++s) {
        step(s);
        part.sync();
      }
      const A* last = f.h[p.T & 1].h;
      for (long b = part.row0; b < part.row1; ++b)
        for (long v = units.begin; v < units.end; ++v) {
          put(p.h_n, 0, b, v, load(last + b * f.Hp + v * L));
          if (kHasC) put(p.c_n, 0, b, v, load(f.c + b * f.Hp + v * L));
        }
    }

    void prepare() {
      const Team& team = part.team;
      const Share all = share_of(f.Hv, team.rank, team.size);
      for (long v = all.begin; f.packed && v < all.end; ++v) pack_units<S>(f.w_hh + v * hidden.stride, p.w_hh, 0, G, p.H, p.H, v);
      if (team.rank == 0) {
        lay_blocks<S>(f.gain, p.gain, G, p.H, f.Hp);
        lay_blocks<S>(f.shift, p.shift, G, p.H, f.Hp);
        if (kHasC) lay_blocks<S>(f.gain_c, p.gain_c, 1, p.H, f.Hp);
        if (kHasC) lay_blocks<S>(f.shift_c, p.shift_c, 1, p.H, f.Hp);
        copy_row<S>(f.zeros, nullptr, 1, f.Hp);
      }
      for (long b = part.row0 + part.member; b < part.row1; b += part.ways) {
        lay_blocks<S>(f.h[0].h + b * f.Hp, row_of(p.h0, b), 1, p.H, f.Hp);
        for (long v = 0; (kPairs || p.mask.data) && v < f.Hv; ++v) lay_rows(f.h[0], b, v, load(f.h[0].h + b * f.Hp + v * L));
        if (kHasC) lay_blocks<S>(f.c + b * f.Hp, row_of(p.c0, b), 1, p.H, f.Hp);
      }
      team.sync();
    }
    static ScanView row_of(const ScanView& state, long b) {
      ScanView row = state;
      if (row.data) row.data = at<S>(state, 0, b);
      return row;
    }

    void step(long s) {
      const long t = time_of(s);
      const State h = f.h[s & 1], next = f.h[~s & 1];
      count = 0;
      for (long b = part.row0; b < part.row1; ++b) {
        if (!live(p, t, b)) {
          stand(t, b, h.h, next);
          continue;
        }
        const bool reset = cleared(p, t, b);
        h_in[count] = reset ? f.zeros : h.h + b * f.Hp;
        from[count] = reset ? reinterpret_cast<const E*>(f.zeros) : h.rows + b * f.Hp;
        rows[count++] = b;
      }
      multiply<G>(
          hidden, from, count, units.begin, units.end, nullptr, f.Hp, false,
          [&](long row, long v) { return f.product + rows[row] * G * f.Hp + v * L; },
          [&](long row0, int n, long v0, int width) {
            for (long row = row0; row < row0 + n; ++row)
              for (long v = v0; v < v0 + width; ++v) measure(t, rows[row], v);
          });
      part.sync();
      for (long row = 0; row < count; ++row) {
        const long b = rows[row], last = f.Hv - 1;
        const A *means = f.means + b * f.Hp, *squares = f.squares + b * f.Hp;
        const A mean = sum_vectors<A>(f.Hv, [&](long v) { return load(means + v * L); }) / A(p.H);
        const A all = sum_vectors<A>(f.Hv, [&](long v) {
          const Vec<A> apart = load(means + v * L) - mean, more = load(squares + v * L) + A(G) * apart * apart;
          return v == last ? first_lanes<A>(more, lanes(v)) : more;
        });
        const A scale = inverse_std(all, A(G * p.H));
        const bool reset = h_in[row] == f.zeros;
        for (long v = units.begin; v < units.end; ++v) activate(t, b, v, mean, scale, h_in[row], reset, next);
        if (p.stats.data && part.member == 0) *at<A>(p.stats, t, b) = scale;
      }
      if constexpr (kHasC) {
        part.sync();
        for (long row = 0; row < count; ++row) finish(t, rows[row], next);
      }
    }

    // Mean and squares of each unit's gates; in the joint form with the input's share.
    FASTSEQ_INLINE void measure(long t, long b, long v) const {
      A* u = f.product + b * G * f.Hp + v * L;
      Vec<A> of[G], mean{}, squares{};
      FASTSEQ_UNROLL for (int g = 0; g < G; ++g) {
        of[g] = load(u + g * f.Hp);
        if constexpr (kJoint) {
          of[g] += gate_of_input(t, b, g, v);
          store(u + g * f.Hp, of[g]);
        }
        mean += of[g];
      }
      if (G > 1) mean = mean * (A(1) / A(G));
      FASTSEQ_UNROLL for (int g = 0; g < G; ++g) squares += (of[g] - mean) * (of[g] - mean);
      store(f.means + b * f.Hp + v * L, first_lanes<A>(mean, lanes(v)));
      store(f.squares + b * f.Hp + v * L, squares);
    }
    FASTSEQ_INLINE Vec<A> gate_of_input(long t, long b, int g, long v) const {
      return load_strided(at<S>(p.gx, t, b) + (g * p.H + v * L) * p.gx.e, p.gx.e, lanes(v));
    }

    // The cell's arithmetic for L units of one row. An LSTM's h waits for the mean of its c.
    FASTSEQ_INLINE void activate(long t, long b, long v, A mean, A scale, const A* h_prev, bool reset, State next) const {
      const long at_v = v * L;
      Vec<A> u[G];
      FASTSEQ_UNROLL for (int g = 0; g < G; ++g) {
        const Vec<A> normed = (load(f.product + (b * G + g) * f.Hp + at_v) - mean) * scale;
        if (p.tape.data) keep(t, b, normed_gates_of(kCell) + g, v, normed);
        u[g] = normed * load(f.gain + g * f.Hp + at_v) + load(f.shift + g * f.Hp + at_v);
      }
      auto pre = [&](int g) { return kJoint ? u[g] : gate_of_input(t, b, g, v) + u[g]; };
      if constexpr (kHasC) {
        LstmGates<kCell, Vec<A>> made;
        FASTSEQ_UNROLL for (int g = 0; g < G; ++g) made.of[g] = pre(g);
        A* c = f.c + b * f.Hp + at_v;
        Vec<A> c_new;
        const LstmGates<kCell, Vec<A>> s = lstm_forward(made, reset ? Vec<A>{} : load(c), c_new);
        c_new = first_lanes<A>(c_new, lanes(v));
        store(c, c_new);
        store(f.out + b * f.Hp + at_v, s.o());
        if (p.states.data) store_n(at<A>(p.states, t, b) + at_v, c_new, lanes(v));
        if (p.tape.data) {
          FASTSEQ_UNROLL for (int g = 0; g < G; ++g) keep(t, b, g, v, s.of[g]);
        }
      } else if constexpr (kCell == Cell::gru) {
        const GruGates<Vec<A>> s = gru_forward(pre(0), pre(1), kJoint ? Vec<A>{} : gate_of_input(t, b, 2, v), u[2]);
        const Vec<A> n = tanh(s.x_n);
        hand_on(t, b, v, gru_blend(s.z, n, load(h_prev + at_v)), next);
        if (p.tape.data) keep(t, b, 0, v, s.r), keep(t, b, 1, v, s.z), keep(t, b, 2, v, n);
      } else {
        hand_on(t, b, v, rnn_forward<kCell == Cell::rnn_relu>(pre(0)), next);
      }
    }

    // h = o * tanh(gain * LN(c) + shift) of a row's own units.
    void finish(long t, long b, State next) const {
      const A* c = f.c + b * f.Hp;
      const long last = f.Hv - 1;
      const A mean = sum_vectors<A>(f.Hv, [&](long v) { return load(c + v * L); }) / A(p.H);
      const A all = sum_vectors<A>(f.Hv, [&](long v) {
        const Vec<A> apart = load(c + v * L) - mean, square = apart * apart;
        return v == last ? first_lanes<A>(square, lanes(v)) : square;
      });
      const A scale = inverse_std(all, A(p.H));
      for (long v = units.begin; v < units.end; ++v) {
        const Vec<A> normed = (load(c + v * L) - mean) * scale;
        const Vec<A> squashed = normed * load(f.gain_c + v * L) + load(f.shift_c + v * L);
        hand_on(t, b, v, lstm_hidden(load(f.out + b * f.Hp + v * L), squashed), next);
      }
      if (p.stats.data && part.member == 0) at<A>(p.stats, t, b)[1] = mean, at<A>(p.stats, t, b)[2] = scale;
    }

    // A row past its length: the state stands still.
    void stand(long t, long b, const A* h, State next) const {
      for (long v = units.begin; v < units.end; ++v) {
        const Vec<A> now = load(h + b * f.Hp + v * L);
        store(next.h + b * f.Hp + v * L, now);
        if (kPairs || p.mask.data) lay_rows(next, b, v, now);
        put(p.y, t, b, v, Vec<A>{});
        if (kHasC && p.states.data) store_n(at<A>(p.states, t, b) + v * L, load(f.c + b * f.Hp + v * L), lanes(v));
        for (int g = 0; p.tape.data && g < normed_tape_of(kCell); ++g) keep(t, b, g, v, Vec<A>{});
      }
      for (int i = 0; p.stats.data && part.member == 0 && i < normed_stats_of(kCell); ++i) at<A>(p.stats, t, b)[i] = A(0);
    }
    FASTSEQ_INLINE void hand_on(long t, long b, long v, Vec<A> h, State next) const {
      store(next.h + b * f.Hp + v * L, h);
      if (kPairs || p.mask.data) lay_rows(next, b, v, h);
      put(p.y, t, b, v, h);
    }
    // A vector of row b's state, as products read it.
    FASTSEQ_INLINE void lay_rows(State next, long b, long v, Vec<A> h) const {
      const int n = lanes(v);
      store_activations(next.rows + b * f.Hp + v * L, p.mask.data ? masked<S>(p, b, v * L, h, n) : h, n);
    }
  };
};

}  // namespace

size_t normed_forward_workspace(const NormedForward& p) {
  return for_dtype(p.dtype, [&](auto s) { return Normed<decltype(s)>(p, nullptr).bytes; });
}

void normed_forward(const NormedForward& p) {
  for_dtype(p.dtype, [&](auto s) { Normed<decltype(s)>(p, p.workspace).run(); });
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
