// The scan backward: the walk back in time, with dh_prev = dgates W_hh fused in.
//
// At each step dh is what y's gradient and the later steps bring; the cell turns it into the gradients of its gates
// (dgates, kept for the caller's large products), and their product with W_hh is what the step before receives.
#include "recurrent/gates.h"
#include "recurrent/cpu/plan.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

template <class S>
struct Backward {
  using A = Accumulator<S>;
  using E = Operand<S>;
  static constexpr int L = kLanes<A>;

  const ScanBackward& p;
  int G;
  long Hp, Pp, Hv, Pv, K;      // padded units, their vectors; columns of a row of dgates
  bool packed;
  Barrier* barriers;
  E *w_hh, *w_hr;              // packed: [vector of P][G*H][lane], [vector of H][P][lane]
  A *dh, *dc;                  // [B][Pp], [B][Hp]: carried to the step before
  E* dgates[2];                // [B][K]: of the hidden side
  E* dh_all;                   // [B][Pp]: whole gradient of a projected h_t
  A* middle;                   // [B][Hp]: that of o tanh(c), or of r h_prev
  A* product;                  // [B][Pp]: dgates W_hh, before the mask
  A *dreset_h, *dreset_c;      // [B][Pp], [B][Hp]: what has reached states that resets put in
  const E** pointers;          // [threads][2 B]
  A** targets;                 // [threads][B]
  size_t bytes;

  Backward(const ScanBackward& args, void* workspace) : p(args) {
    G = gates_of(p.cell);
    Hv = vectors_of<A>(p.H), Pv = vectors_of<A>(p.P);
    Hp = Hv * L, Pp = Pv * L;
    K = padded<A>(G * p.H);
    packed = p.deterministic || p.T * p.B > kColumnRows || p.w_hh.e != 1 || p.w_hr.data || p.mask.data ||
             p.cell == Cell::gru_reset_before;
    int threads = threads_for(p, sizeof(E));
    bool lstm = has_c(p.cell), proj = p.w_hr.data;
    Arena arena{static_cast<char*>(workspace)};
    barriers = arena.take<Barrier>(threads);
    w_hh = arena.take<E>(packed ? Pv * whole_terms<E>(G * p.H) * L : 0);
    w_hr = arena.take<E>(proj ? Hv * whole_terms<E>(p.P) * L : 0);
    dh = arena.take<A>(p.B * Pp);
    dc = arena.take<A>(lstm ? p.B * Hp : 0);
    dgates[0] = arena.take<E>(p.B * K);
    dgates[1] = arena.take<E>(p.B * K);
    dh_all = arena.take<E>(proj ? p.B * Pp : 0);
    middle = arena.take<A>(proj || p.cell == Cell::gru_reset_before ? p.B * Hp : 0);
    product = arena.take<A>(p.mask.data ? p.B * Pp : 0);
    dreset_h = arena.take<A>(p.dreset_h.data ? p.B * Pp : 0);
    dreset_c = arena.take<A>(p.dreset_c.data ? p.B * Hp : 0);
    pointers = arena.take<const E*>(threads * p.B * 2);
    targets = arena.take<A*>(threads * p.B);
    bytes = arena.used;
  }

  void run() {
    int threads = threads_for(p, sizeof(E));
    for (int i = 0; i < threads; ++i) new (barriers + i) Barrier;
    for_cell(p.cell, [&](auto cell) { on_threads<Thread<cell.value>>(threads, *this); });
  }

  template <Cell kCell>
  struct Thread {
    static constexpr int G = gates_of(kCell);
    static constexpr bool kHasC = has_c(kCell), kGru = kCell == Cell::gru;
    static constexpr bool kBefore = kCell == Cell::gru_reset_before;
    const Backward& f;
    const ScanBackward& p;
    Part part;
    Share units, outputs;  // vectors of H and of P
    const E **from, **from_n;
    A** to;
    const bool adds;  // what reaches the state before through products comes beside something else
    Weights<S> hidden, candidate, projection;

    Thread(const Backward& backward, const Team& team)
        : f(backward), p(f.p), part(team, f.p, unit_ways(f.p, team.size, sizeof(E)), f.barriers), units(part.share(f.Hv)),
          outputs(part.share(f.Pv)), adds(kGru || kBefore || backward.p.keep_h.data) {
      from = f.pointers + team.rank * p.B * 2;
      from_n = from + p.B;
      to = f.targets + team.rank * p.B;
      long stride = whole_terms<E>(G * p.H) * L;
      hidden = Weights<S>{f.w_hh, stride, nullptr, 0, p.P, kBefore ? 2 * p.H : G * p.H};
      if (kBefore) candidate = Weights<S>{f.w_hh + 2 * p.H * L, stride, nullptr, 0, p.P, p.H};
      if (p.w_hr.data) projection = Weights<S>{f.w_hr, whole_terms<E>(p.P) * L, nullptr, 0, p.H, p.P};
      hidden.one_chain = candidate.one_chain = projection.one_chain = p.deterministic;
    }

    long time_of(long s) const { return p.reverse ? p.T - 1 - s : s; }
    static int lanes(long v, long n) { return int(n - v * L < L ? n - v * L : L); }
    template <class E>
    static Vec<A> get(const ScanView& view, long t, long b, long offset, int n) {
      return load_strided(at<E>(view, t, b) + offset * view.e, view.e, n);
    }
    template <class E>
    static Vec<A> get_or_zero(const ScanView& view, long t, long b, long offset, int n) {
      return view.data ? get<E>(view, t, b, offset, n) : Vec<A>{};
    }
    static void put(const ScanView& view, long t, long b, long offset, Vec<A> value, int n) {
      store_n(at<S>(view, t, b) + offset, value, n);
    }

    void walk() {
      prepare();
      for (long s = p.T - 1; s >= 0; --s) {
        long t = time_of(s);
        E* dgates = f.dgates[s & 1];
        if (kHasC && p.w_hr.data) project_back(t);
        long n = 0;
        for (long b = part.row0; b < part.row1; ++b) {
          if (!live(p, t, b)) {
            stand(t, b);
            continue;
          }
          bool reset = cleared(p, t, b);
          for (long v = units.begin; v < units.end; ++v) cell(s, t, b, v, reset, dgates + b * f.K);
          if (reset && !p.reset_h.data) {  // nothing flows to the state before
            for (long v = outputs.begin; v < outputs.end; ++v) store(f.dh + b * f.Pp + v * L, Vec<A>{});
            continue;
          }
          from[n] = dgates + b * f.K;
          to[n++] = f.dh + b * f.Pp;
        }
        part.sync();
        if (kBefore) reset_back(s, t, n, dgates);
        if (s == 0 && !p.dh0.data && !p.dreset_h.data) break;  // nobody asks what reaches the state before
        auto target = [&](long row, long v) { return to[row] + v * L; };
        if (p.mask.data)
          multiply_masked(n);
        else if (f.packed)
          multiply<1>(hidden, from, n, outputs.begin, outputs.end, nullptr, 0, adds, target,
                      [](long, int, long, int) {});
        else
          multiply_columns<S>(p.w_hh, from, n, G * p.H, p.P, outputs.begin, outputs.end, adds, target);
        if (p.reset_h.data) give_to_reset(t);
      }
      for (long b = part.row0; b < part.row1; ++b) {
        if (p.dh0.data)
          for (long v = outputs.begin; v < outputs.end; ++v)
            put(p.dh0, 0, b, v * L, load(f.dh + b * f.Pp + v * L), lanes(v, p.P));
        if (p.dc0.data)
          for (long v = units.begin; v < units.end; ++v)
            put(p.dc0, 0, b, v * L, load(f.dc + b * f.Hp + v * L), lanes(v, p.H));
        for (long v = outputs.begin; p.dreset_h.data && v < outputs.end; ++v)
          put(p.dreset_h, 0, b, v * L, load(f.dreset_h + b * f.Pp + v * L), lanes(v, p.P));
        for (long v = units.begin; p.dreset_c.data && v < units.end; ++v)
          put(p.dreset_c, 0, b, v * L, load(f.dreset_c + b * f.Hp + v * L), lanes(v, p.H));
      }
    }

    void prepare() {
      const Team& team = part.team;
      Share all = share_of(f.Pv, team.rank, team.size);
      const bool multiplied = f.packed && (p.T > 1 || p.dh0.data || p.dreset_h.data || kBefore);
      for (long v = all.begin; multiplied && v < all.end; ++v)
        pack_columns<S>(f.w_hh + v * hidden.stride, p.w_hh, G * p.H, p.P, v);
      if (p.w_hr.data) {
        all = share_of(f.Hv, team.rank, team.size);
        for (long v = all.begin; v < all.end; ++v)
          pack_columns<S>(f.w_hr + v * projection.stride, p.w_hr, p.P, p.H, v);
      }
      for (long b = part.row0; b < part.row1; ++b) {
        for (long v = outputs.begin; v < outputs.end; ++v)
          store(f.dh + b * f.Pp + v * L, get_or_zero<S>(p.dh_n, 0, b, v * L, lanes(v, p.P)));
        if (G * p.H % kTerm<E> && part.member == 0)
          for (E* dgates : f.dgates) dgates[b * f.K + G * p.H] = E{};
        if (kHasC)
          for (long v = units.begin; v < units.end; ++v)
            store(f.dc + b * f.Hp + v * L, get_or_zero<S>(p.dc_n, 0, b, v * L, lanes(v, p.H)));
        for (long v = outputs.begin; p.dreset_h.data && v < outputs.end; ++v) store(f.dreset_h + b * f.Pp + v * L, Vec<A>{});
        for (long v = units.begin; p.dreset_c.data && v < units.end; ++v) store(f.dreset_c + b * f.Hp + v * L, Vec<A>{});
      }
      team.sync();
    }

    // A row past its length: gradients pass through the standing state.
    void stand(long t, long b) {
      for (long v = units.begin; v < units.end; ++v) {
        int n = lanes(v, p.H);
        for (int g = 0; g < G; ++g) put(p.dgates, t, b, g * p.H + v * L, Vec<A>{}, n);
        if (kGru) put(p.dhidden, t, b, v * L, Vec<A>{}, n);
        if (kHasC && p.dstates.data) {
          A* dc = f.dc + b * f.Hp + v * L;
          store(dc, load(dc) + get<A>(p.dstates, t, b, v * L, n));
        }
      }
      if (kHasC && p.w_hr.data)
        for (long v = outputs.begin; v < outputs.end; ++v) put(p.dhidden, t, b, v * L, Vec<A>{}, lanes(v, p.P));
    }

    // What the cell will read a step later. A step's rows are too short, and the walk goes too much from one tensor to the
    // next, for the processor to foresee it.
    FASTSEQ_INLINE void ask_for_next(long t, long b, long unit) const {
      auto ask = [&](const ScanView& view, long at, long size) {
        if (view.data) prefetch<2>(view.data, ((p.reverse ? t + 1 : t - 1) * view.t + b * view.b + at * view.e) * size);
      };
      ask(p.dy, unit, sizeof(S));
      if constexpr (!kHasC) ask(p.y, unit, sizeof(S));
      if constexpr (kHasC) ask(p.states, unit, sizeof(A));
      if constexpr (tape_of(kCell) > 0)
        for (int g = 0; g < tape_of(kCell); ++g) ask(p.tape, g * p.H + unit, sizeof(S));
    }

    // What has reached the states that this step's resets put in; nothing flows to those before.
    void give_to_reset(long t) {
      for (long b = part.row0; b < part.row1; ++b) {
        if (!live(p, t, b) || !cleared(p, t, b)) continue;
        for (long v = outputs.begin; v < outputs.end; ++v) {
          A *dh = f.dh + b * f.Pp + v * L, *to_reset = f.dreset_h + b * f.Pp + v * L;
          if (p.dreset_h.data) store(to_reset, load(to_reset) + load(dh));
          store(dh, Vec<A>{});
        }
      }
    }

    Vec<A> h_before(long t, long b, long v, int n) const {
      if (cleared(p, t, b)) return get_or_zero<S>(p.reset_h, 0, b, v * L, n);
      long before = step_before(p, t, b);
      return before < 0 ? get_or_zero<S>(p.h0, 0, b, v * L, n) : get<S>(p.y, before, b, v * L, n);
    }

    // From dh and the tape to the gradients of the gates, for L units of one row. A GRU leaves in dh what reaches
    // h_prev beside the product.
    FASTSEQ_INLINE void cell(long, long t, long b, long v, bool reset, E* dgates) {
      const int n = lanes(v, p.H);
      const long unit = v * L;
      ask_for_next(t, b, unit);
      A* carry = f.dh + b * f.Pp + unit;
      auto emit = [&](int g, Vec<A> hidden_side, Vec<A> input_side) {
        store_n(dgates + g * p.H + unit, hidden_side, n);
        put(p.dgates, t, b, g * p.H + unit, input_side, n);
      };
      Vec<A> dh;
      if (kHasC && p.w_hr.data)
        dh = load(f.middle + b * f.Hp + unit);
      else
        dh = load(carry) + get_or_zero<S>(p.dy, t, b, unit, n);
      if (p.keep_h.data && !(kHasC && p.w_hr.data)) dh = pass_kept(t, b, v, carry, dh);
      if constexpr (kHasC) {
        LstmGates<kCell, Vec<A>> s;
        FASTSEQ_UNROLL for (int g = 0; g < G; ++g) s.of[g] = get<S>(p.tape, t, b, g * p.H + unit, n);
        long before = step_before(p, t, b);
        Vec<A> c_prev = reset        ? get_or_zero<S>(p.reset_c, 0, b, unit, n)
                        : before < 0 ? get_or_zero<S>(p.c0, 0, b, unit, n)
                                     : get<A>(p.states, before, b, unit, n);
        A* dc_at = f.dc + b * f.Hp + unit;
        Vec<A> dc = load(dc_at) + get_or_zero<A>(p.dstates, t, b, unit, n), c = get<A>(p.states, t, b, unit, n), passed{};
        if (p.keep_c.data) {
          passed = dc * share_kept<S>(p.keep_c, t, b, unit, n);
          dc -= passed, c = lstm_state(s, c_prev);
        }
        const LstmGates<kCell, Vec<A>> d = lstm_backward(s, c_prev, c, dh, dc);
        if (p.keep_c.data) dc += passed;
        store(dc_at, reset ? Vec<A>{} : dc);
        A* const to_reset = f.dreset_c + b * f.Hp + unit;
        if (reset && p.dreset_c.data) store(to_reset, load(to_reset) + dc);
        FASTSEQ_UNROLL for (int g = 0; g < G; ++g) emit(g, d.of[g], d.of[g]);
      } else if constexpr (kGru || kBefore) {
        auto gate = [&](int g) { return get<S>(p.tape, t, b, (g * p.H + unit), n); };
        Vec<A> r = gate(0), z = gate(1), candidate = gate(2), q = gate(3), dz, dn;
        Vec<A> h_prev = h_before(t, b, v, n);
        gru_backward_blend(z, candidate, h_prev, dh, dz, dn);
        store(carry, p.keep_h.data ? load(carry) + dh * z : dh * z);
        emit(1, dz, dz);
        if constexpr (kGru) {
          Vec<A> dq = dn * r, dr = gru_backward_reset(r, q, dn);
          emit(0, dr, dr), emit(2, dq, dn);
          put(p.dhidden, t, b, unit, dq, n);
        } else {
          emit(2, dn, dn);
          if (reset && !p.reset_h.data) put(p.dgates, t, b, unit, Vec<A>{}, n);  // r had only zeros to act on
        }
      } else {
        Vec<A> d = rnn_backward<kCell == Cell::rnn_relu>(get<S>(p.y, t, b, unit, n), dh);
        emit(0, d, d);
      }
    }

    // Of a state's gradient what reaches the one before as the share that was kept, which goes into carry; returns the rest.
    FASTSEQ_INLINE Vec<A> pass_kept(long t, long b, long v, A* carry, Vec<A> dh) const {
      const Vec<A> passed = dh * share_kept<S>(p.keep_h, t, b, v * L, lanes(v, p.P));
      store(carry, passed);
      return dh - passed;
    }

    // What reaches the state before through its products, which read it times the mask.
    void multiply_masked(long n) {
      multiply<1>(hidden, from, n, outputs.begin, outputs.end, nullptr, 0, false,
                  [&](long row, long v) { return f.product + (to[row] - f.dh) + v * L; },
                  [&](long row0, int count, long v0, int width) {
                    for (long row = row0; row < row0 + count; ++row)
                      for (long v = v0; v < v0 + width; ++v) {
                        A* carry = to[row] + v * L;
                        const long at_row = to[row] - f.dh;
                        const Vec<A> d = masked<S>(p, at_row / f.Pp, v * L, load(f.product + at_row + v * L), lanes(v, p.P));
                        store(carry, adds ? load(carry) + d : d);
                      }
                  });
    }

    // Reset before the product: d(r h_prev) = dn W_hn, then r's gradient and r's share of h_prev's.
    void reset_back(long, long t, long n, E* dgates) {
      A** into = to;
      for (long row = 0; row < n; ++row) {
        from_n[row] = from[row] + 2 * p.H;
        into[row] = f.middle + (to[row] - f.dh) / f.Pp * f.Hp;
      }
      multiply<1>(candidate, from_n, n, outputs.begin, outputs.end, nullptr, 0, false,
                  [&](long row, long v) { return into[row] + v * L; }, [](long, int, long, int) {});
      for (long row = 0; row < n; ++row) {
        long b = (into[row] - f.middle) / f.Hp;
        into[row] = f.dh + b * f.Pp;
        for (long v = units.begin; v < units.end; ++v) {
          int some = lanes(v, p.H);
          Vec<A> r = get<S>(p.tape, t, b, v * L, some), dproduct = load(f.middle + b * f.Hp + v * L);
          if (p.mask.data) dproduct = masked<S>(p, b, v * L, dproduct, some);
          Vec<A> dr = gru_backward_reset(r, h_before(t, b, v, some), dproduct);
          A* carry = f.dh + b * f.Pp + v * L;
          store(carry, load(carry) + dproduct * r);
          store_n(dgates + b * f.K + v * L, dr, some);
          put(p.dgates, t, b, v * L, dr, some);
        }
      }
      part.sync();
    }

    // With a projection: the whole gradient of h_t, kept for W_hr's, and through W_hr that of o tanh(c).
    void project_back(long t) {
      long n = 0;
      for (long b = part.row0; b < part.row1; ++b) {
        if (!live(p, t, b)) continue;
        for (long v = outputs.begin; v < outputs.end; ++v) {
          int some = lanes(v, p.P);
          A* carry = f.dh + b * f.Pp + v * L;
          Vec<A> dh = load(carry) + get_or_zero<S>(p.dy, t, b, v * L, some);
          if (p.keep_h.data) dh = pass_kept(t, b, v, carry, dh);
          store_activations(f.dh_all + b * f.Pp + v * L, dh, some);
          put(p.dhidden, t, b, v * L, dh, some);
        }
        from[n] = f.dh_all + b * f.Pp;
        to[n++] = f.middle + b * f.Hp;
      }
      part.sync();
      multiply<1>(projection, from, n, units.begin, units.end, nullptr, 0, false,
                  [&](long row, long v) { return to[row] + v * L; }, [](long, int, long, int) {});
    }
  };
};

}  // namespace

size_t scan_backward_workspace(const ScanBackward& p) {
  return for_dtype(p.dtype, [&](auto s) { return Backward<decltype(s)>(p, nullptr).bytes; });
}

void scan_backward(const ScanBackward& p) {
  for_dtype(p.dtype, [&](auto s) { Backward<decltype(s)>(p, p.workspace).run(); });
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
