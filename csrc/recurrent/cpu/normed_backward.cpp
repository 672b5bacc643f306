// The recurrence of normalised layers backward: the walk back in time.
//
// With u = gain * x + shift, x = LN(p) and d = gain * du, the gradient of p is (d - mean(d) - x mean(d x)) / std. A step has up to
// four parts: an LSTM's gradient of LN(c); the cell's, and the sums of a row that its normalisation asks for; the
// gradient of the product; and times W_hh, what the step before receives. Between them the threads that share a row's
// units meet. Each adds a row's sums over all units by itself, so that the team's size has no influence on a bit.
#include "recurrent/cpu/norm_row.h"
#include "recurrent/gates.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

constexpr long kRecentRows = 64;  // rows whose gradients of gains are summed before they are added to all others

template <class S>
struct NormedBack {
  using A = Accumulator<S>;
  using E = Operand<S>;
  static constexpr int L = kLanes<A>;

  const NormedBackward& p;
  int G;
  long Hp, Hv, K;       // padded units, their vectors; columns of a row of operands
  long width;           // of a thread group's sums: [gain, shift][G][Hp], [gain_c, shift_c][Hp]
  bool packed;
  Barrier* barriers;
  E* w_hh;              // packed: [vector of H][G*H][lane]
  A *gain, *gain_c, *shift_c;  // [G][Hp], [Hp], [Hp]
  A* shift;             // [G][Hp]: of a GRU, whose candidate is multiplied by r
  A *dh, *dc;           // [B][Hp]: carried to the step before
  A *d_out, *d_normed;  // [B][Hp]: gradients of o and of LN(c), the latter times gain_c
  A* sums_c[2];         // [B][Hp]: of d_normed, and of that times LN(c)
  A* d;                 // [B][G][Hp]: gradient of u times gain
  A* sums[2];           // [B][Hp]: of d over gates, and of that times x
  E* operands;          // [B][K]: gradient of the product
  A* product;           // [B][Hp]: that times W_hh, before the mask
  A *recent, *total;    // [groups][width]
  const E** from;       // [threads][B]
  A** to;               // [threads][B]
  long* live_rows;      // [threads][B]
  size_t bytes;

  NormedBack(const NormedBackward& args, void* workspace) : p(args) {
    G = gates_of(p.cell);
    Hv = vectors_of<A>(p.H), Hp = Hv * L;
    K = padded<A>(G * p.H);
    packed = p.deterministic || p.T * p.B > kColumnRows || p.w_hh.e != 1 || p.mask.data;
    const int threads = threads_for(p, sizeof(E));
    const bool lstm = has_c(p.cell);
    width = 2 * (G + lstm) * Hp;
    Arena arena{static_cast<char*>(workspace)};
    barriers = arena.take<Barrier>(threads);
    w_hh = arena.take<E>(packed ? Hv * whole_terms<E>(G * p.H) * L : 0);
    gain = arena.take<A>(G * Hp);
    shift = arena.take<A>(G * Hp);
    gain_c = arena.take<A>(lstm ? Hp : 0);
    shift_c = arena.take<A>(lstm ? Hp : 0);
    dh = arena.take<A>(p.B * Hp);
    dc = arena.take<A>(lstm ? p.B * Hp : 0);
    d_out = arena.take<A>(lstm ? p.B * Hp : 0);
    d_normed = arena.take<A>(lstm ? p.B * Hp : 0);
    for (A*& sum : sums_c) sum = arena.take<A>(lstm ? p.B * Hp : 0);
    d = arena.take<A>(p.B * G * Hp);
    for (A*& sum : sums) sum = arena.take<A>(p.B * Hp);
    operands = arena.take<E>(p.B * K);
    product = arena.take<A>(p.mask.data ? p.B * Hp : 0);
    recent = arena.take<A>(threads * width);
    total = arena.take<A>(threads * width);
    from = arena.take<const E*>(threads * p.B);
    to = arena.take<A*>(threads * p.B);
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
    static constexpr bool kHasC = has_c(kCell), kGru = kCell == Cell::gru;
    const NormedBack& f;
    const NormedBackward& p;
    Part part;
    Share units;
    const E** from;
    A** to;
    long* rows;  // live rows of the step
    long count = 0, summed = 0;
    A *recent, *total;  // of the group; each member has its own units
    Weights<S> hidden;

    Thread(const NormedBack& back, const Team& team)
        : f(back), p(f.p), part(team, f.p, unit_ways(f.p, team.size, sizeof(E)), f.barriers), units(part.share(f.Hv)) {
      from = f.from + team.rank * p.B;
      to = f.to + team.rank * p.B;
      rows = f.live_rows + team.rank * p.B;
      recent = f.recent + part.group * f.width;
      total = f.total + part.group * f.width;
      hidden = Weights<S>{f.w_hh, whole_terms<E>(G * p.H) * L, nullptr, 0, p.H, G * p.H};
      hidden.one_chain = p.deterministic;
    }

    long time_of(long s) const { return p.reverse ? p.T - 1 - s : s; }
    int lanes(long v) const { return int(p.H - v * L < L ? p.H - v * L : L); }
    template <class N>
    Vec<A> get(const ScanView& view, long t, long b, long block, long v) const {
      return load_strided(at<N>(view, t, b) + (block * p.H + v * L) * view.e, view.e, lanes(v));
    }
    template <class N>
    Vec<A> get_or_zero(const ScanView& view, long t, long b, long v) const {
      return view.data ? get<N>(view, t, b, 0, v) : Vec<A>{};
    }
    void put(const ScanView& view, long t, long b, long block, long v, Vec<A> value) const {
      store_n(at<S>(view, t, b) + block * p.H + v * L, value, lanes(v));
    }
    // Gates that the tape has, and what the normalisation of the product gave.
    Vec<A> gate(long t, long b, int g, long v) const { return get<S>(p.tape, t, b, g, v); }
    Vec<A> normed(long t, long b, int g, long v) const { return get<S>(p.tape, t, b, normed_gates_of(kCell) + g, v); }
    Vec<A> normed_c(long t, long b, long v) const {
      const A* stats = at<A>(p.stats, t, b);
      return (get<A>(p.states, t, b, 0, v) - stats[1]) * stats[2];
    }
    static void add(A* sum, Vec<A> value) { store(sum, load(sum) + value); }

    void walk() {
      prepare();
      for (long s = p.T - 1; s >= 0; --s) {
        const long t = time_of(s);
        count = 0;
        for (long b = part.row0; b < part.row1; ++b)
          if (live(p, t, b))
            rows[count++] = b;
          else
            stand(t, b);
        if constexpr (kHasC) {
          for (long row = 0; row < count; ++row)
            for (long v = units.begin; v < units.end; ++v) normed_c_back(t, rows[row], v);
          part.sync();
        }
        for (long row = 0; row < count; ++row) cell_back(t, rows[row]);
        part.sync();
        long n = 0;
        for (long row = 0; row < count; ++row) {
          const long b = rows[row];
          product_back(t, b);
          if (cleared(p, t, b)) {  // nothing flows to the state before
            for (long v = units.begin; v < units.end; ++v) store(f.dh + b * f.Hp + v * L, Vec<A>{});
            continue;
          }
          from[n] = f.operands + b * f.K;
          to[n++] = f.dh + b * f.Hp;
        }
        summed += count;
        if (summed >= kRecentRows || s == 0) add_recent();
        part.sync();
        if (s > 0 || p.dh0.data) multiply_back(n);
      }
      for (long b = part.row0; b < part.row1; ++b)
        for (long v = units.begin; v < units.end; ++v) {
          if (p.dh0.data) put(p.dh0, 0, b, 0, v, load(f.dh + b * f.Hp + v * L));
          if (p.dc0.data) put(p.dc0, 0, b, 0, v, load(f.dc + b * f.Hp + v * L));
        }
      part.team.sync();
      sum_groups();
    }

    void prepare() {
      const Team& team = part.team;
      const Share all = share_of(f.Hv, team.rank, team.size);
      for (long v = all.begin; f.packed && (p.T > 1 || p.dh0.data) && v < all.end; ++v)
        pack_columns<S>(f.w_hh + v * hidden.stride, p.w_hh, G * p.H, p.H, v);
      if (team.rank == 0) {
        lay_blocks<S>(f.gain, p.gain, G, p.H, f.Hp);
        lay_blocks<S>(f.shift, p.shift, G, p.H, f.Hp);
        if (kHasC) lay_blocks<S>(f.gain_c, p.gain_c, 1, p.H, f.Hp);
        if (kHasC) lay_blocks<S>(f.shift_c, p.shift_c, 1, p.H, f.Hp);
      }
      if (part.member == 0)
        for (long i = 0; i < f.width; i += L) store(recent + i, Vec<A>{}), store(total + i, Vec<A>{});
      for (long b = part.row0; b < part.row1; ++b) {
        for (long v = units.begin; v < units.end; ++v) {
          store(f.dh + b * f.Hp + v * L, get_or_zero<S>(p.dh_n, 0, b, v));
          if (kHasC) store(f.dc + b * f.Hp + v * L, get_or_zero<S>(p.dc_n, 0, b, v));
        }
        if (G * p.H % kTerm<E> && part.member == 0) f.operands[b * f.K + G * p.H] = E{};
      }
      team.sync();
    }

    // A row past its length: gradients pass through the standing state.
    void stand(long t, long b) const {
      for (long v = units.begin; v < units.end; ++v) {
        for (int g = 0; g < G; ++g) {
          put(p.dproduct, t, b, g, v, Vec<A>{});
          if (!kJoint) put(p.dgx, t, b, g, v, Vec<A>{});
        }
        if (kHasC && p.dstates.data) add(f.dc + b * f.Hp + v * L, get<A>(p.dstates, t, b, 0, v));
      }
    }

    // What a step later is read. A step's rows are too short, and the walk goes too much from one tensor to the next, for
    // the processor to foresee it.
    FASTSEQ_INLINE void ask_for_next(long t, long b, long v) const {
      auto ask = [&](const ScanView& view, long block, long size) {
        if (view.data)
          prefetch<2>(view.data, ((p.reverse ? t + 1 : t - 1) * view.t + b * view.b + (block * p.H + v * L) * view.e) * size);
      };
      ask(p.dy, 0, sizeof(S));
      if constexpr (kHasC)
        ask(p.states, 0, sizeof(A));
      else
        ask(p.y, 0, sizeof(S));
      for (int g = 0; g < normed_tape_of(kCell); ++g) ask(p.tape, g, sizeof(S));
    }

    Vec<A> dh_at(long t, long b, long v) const { return load(f.dh + b * f.Hp + v * L) + get_or_zero<S>(p.dy, t, b, v); }

    // h = o * tanh(gain_c * LN(c) + shift_c): gradients of o and LN(c).
    FASTSEQ_INLINE void normed_c_back(long t, long b, long v) const {
      ask_for_next(t, b, v);
      const long at_v = b * f.Hp + v * L;
      const Vec<A> x = normed_c(t, b, v), gain = load(f.gain_c + v * L), dh = dh_at(t, b, v), o = gate(t, b, G - 1, v);
      const Vec<A> squashed = tanh(x * gain + load(f.shift_c + v * L)), du = dh * o * (A(1) - squashed * squashed);
      const Vec<A> d = du * gain;
      store(f.d_out + at_v, dh * squashed * o * (A(1) - o));
      store(f.d_normed + at_v, d);
      store(f.sums_c[0] + at_v, d);
      store(f.sums_c[1] + at_v, d * x);
      A* own = recent + 2 * G * f.Hp + v * L;
      add(own, du * x), add(own + f.Hp, du);
    }

    // From the gradients of h (and c) to those of the gates, for a row's own units. A GRU leaves in dh what reaches h_prev
    // beside the product.
    FASTSEQ_INLINE void cell_back(long t, long b) {
      const bool reset = cleared(p, t, b);
      const long before = step_before(p, t, b);
      [[maybe_unused]] A mean_c[2], scale_c;
      if constexpr (kHasC) {
        for (int i = 0; i < 2; ++i)
          mean_c[i] = sum_vectors<A>(f.Hv, [&](long v) { return load(f.sums_c[i] + b * f.Hp + v * L); }) / A(p.H);
        scale_c = at<A>(p.stats, t, b)[2];
      }
      for (long v = units.begin; v < units.end; ++v) {
        if constexpr (!kHasC) ask_for_next(t, b, v);
        const long at_v = b * f.Hp + v * L;
        Vec<A> of_input[G], of_norm[G], x[G];  // gradients of gx and of gain * x + shift, and x
        FASTSEQ_UNROLL for (int g = 0; g < G; ++g) x[g] = normed(t, b, g, v);
        if constexpr (kHasC) {
          LstmGates<kCell, Vec<A>> s;
          FASTSEQ_UNROLL for (int g = 0; g < G; ++g) s.of[g] = gate(t, b, g, v);
          Vec<A> c_prev{};
          if (!reset) c_prev = before < 0 ? get_or_zero<S>(p.c0, 0, b, v) : get<A>(p.states, before, b, 0, v);
          Vec<A> dc = load(f.dc + at_v) + get_or_zero<A>(p.dstates, t, b, v);
          dc += (load(f.d_normed + at_v) - mean_c[0] - normed_c(t, b, v) * mean_c[1]) * scale_c;
          dc = first_lanes<A>(dc, lanes(v));  // those past H would add up over the steps
          const LstmGates<kCell, Vec<A>> d = lstm_backward_gates(s, c_prev, load(f.d_out + at_v), dc);
          store(f.dc + at_v, reset ? Vec<A>{} : dc);
          FASTSEQ_UNROLL for (int g = 0; g < G; ++g) of_input[g] = of_norm[g] = d.of[g];
        } else if constexpr (kGru) {
          const Vec<A> r = gate(t, b, 0, v), z = gate(t, b, 1, v), n = gate(t, b, 2, v), dh = dh_at(t, b, v);
          const Vec<A> q = x[2] * load(f.gain + 2 * f.Hp + v * L) + load(f.shift + 2 * f.Hp + v * L);
          Vec<A> h_prev{}, dz, dn;
          if (!reset) h_prev = before < 0 ? get_or_zero<S>(p.h0, 0, b, v) : get<S>(p.y, before, b, 0, v);
          gru_backward_blend(z, n, h_prev, dh, dz, dn);
          store(f.dh + at_v, dh * z);
          of_input[0] = of_norm[0] = gru_backward_reset(r, q, dn);
          of_input[1] = of_norm[1] = dz;
          of_input[2] = dn, of_norm[2] = dn * r;
        } else {
          of_input[0] = of_norm[0] = rnn_backward<kCell == Cell::rnn_relu>(get<S>(p.y, t, b, 0, v), dh_at(t, b, v));
        }
        Vec<A> sum{}, with_x{};
        FASTSEQ_UNROLL for (int g = 0; g < G; ++g) {
          if (!kJoint) put(p.dgx, t, b, g, v, of_input[g]);
          add(recent + g * f.Hp + v * L, of_norm[g] * x[g]);
          add(recent + (G + g) * f.Hp + v * L, of_norm[g]);
          const Vec<A> d = of_norm[g] * load(f.gain + g * f.Hp + v * L);
          store(f.d + (b * G + g) * f.Hp + v * L, d);
          sum += d, with_x += d * x[g];
        }
        store(f.sums[0] + at_v, sum);
        store(f.sums[1] + at_v, with_x);
      }
    }

    // The gradient of what was normalised, for a row's own units.
    FASTSEQ_INLINE void product_back(long t, long b) const {
      A mean[2];
      for (int i = 0; i < 2; ++i)
        mean[i] = sum_vectors<A>(f.Hv, [&](long v) { return load(f.sums[i] + b * f.Hp + v * L); }) / A(G * p.H);
      const A scale = *at<A>(p.stats, t, b);
      for (long v = units.begin; v < units.end; ++v)
        FASTSEQ_UNROLL for (int g = 0; g < G; ++g) {
          const Vec<A> d = (load(f.d + (b * G + g) * f.Hp + v * L) - mean[0] - normed(t, b, g, v) * mean[1]) * scale;
          store_n(f.operands + b * f.K + g * p.H + v * L, d, lanes(v));
          put(p.dproduct, t, b, g, v, d);
        }
    }

    // What reaches the state before through the product, which read it times the mask.
    void multiply_back(long n) {
      if (!f.packed) {
        auto target = [&](long row, long v) { return to[row] + v * L; };
        return multiply_columns<S>(p.w_hh, from, n, G * p.H, p.H, units.begin, units.end, kGru, target);
      }
      auto target = [&](long row, long v) { return (p.mask.data ? f.product + (to[row] - f.dh) : to[row]) + v * L; };
      multiply<1>(hidden, from, n, units.begin, units.end, nullptr, 0, kGru && !p.mask.data, target,
                  [&](long row0, int some, long v0, int width) {
                    for (long row = row0; p.mask.data && row < row0 + some; ++row)
                      for (long v = v0; v < v0 + width; ++v) {
                        const long at_row = to[row] - f.dh;
                        A* carry = to[row] + v * L;
                        const Vec<A> d = masked<S>(p, at_row / f.Hp, v * L, load(f.product + at_row + v * L), lanes(v));
                        store(carry, kGru ? load(carry) + d : d);
                      }
                  });
    }

    // Of this thread's units, what its rows have brought to the gradients of gains and shifts.
    void add_recent() {
      for (long block = 0; block < f.width; block += f.Hp)
        for (long v = units.begin; v < units.end; ++v) {
          add(total + block + v * L, load(recent + block + v * L));
          store(recent + block + v * L, Vec<A>{});
        }
      summed = 0;
    }
    // Of all groups of threads, in their order.
    void sum_groups() const {
      const Share all = share_of(f.Hv, part.team.rank, part.team.size);
      const int groups = part.team.size / part.ways;
      for (long v = all.begin; v < all.end; ++v) {
        auto emit = [&](const ScanView& to, int block, int g) {
          if (!to.data) return;
          Vec<A> sum{};
          for (int group = 0; group < groups; ++group) sum += load(f.total + group * f.width + block * f.Hp + v * L);
          put(to, 0, 0, g, v, sum);
        };
        for (int g = 0; g < G; ++g) emit(p.dgain, g, g), emit(p.dshift, G + g, g);
        if (kHasC) emit(p.dgain_c, 2 * G, 0), emit(p.dshift_c, 2 * G + 1, 0);
      }
    }
  };
};

}  // namespace

size_t normed_backward_workspace(const NormedBackward& p) {
  return for_dtype(p.dtype, [&](auto s) { return NormedBack<decltype(s)>(p, nullptr).bytes; });
}

void normed_backward(const NormedBackward& p) {
  for_dtype(p.dtype, [&](auto s) { NormedBack<decltype(s)>(p, p.workspace).run(); });
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
