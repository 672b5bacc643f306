// The scan forward: what a call's threads share, and where it lies in the workspace.
#pragma once
#include "recurrent/cpu/bytes.h"
#include "recurrent/cpu/plan.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

constexpr long kChunkRows = 128;         // rows that are projected at once: enough to reuse each weight in L1
constexpr long kChunkBytes = 384 << 10;  // but no more scratch than this

// S: the type of x and of the states; W: that of the weight matrices, S or a smaller one, then packed beforehand; E: what
// products multiply.
template <class S, class W, class E>
struct Forward {
  using A = Accumulator<S>;
  using Q = std::conditional_t<__is_same(S, W), E, W>;  // of packed weights
  using Matrix = Weights<S, E, Q>;
  static constexpr int L = kLanes<A>;
  static constexpr bool kPrepared = !__is_same(S, W);
  static constexpr bool kPairs = kTerm<E> == 2;  // then the state is kept twice: as it is, and as products read it
  static constexpr bool kBytes = kTerm<E> == 4;  // then each thread lays down the rows that its products read
  static constexpr long kCache = kBytes && kMatrix<E> ? 2 * kCacheBytes : kCacheBytes;  // chips with tiles have 2 MiB
  using Middle = std::conditional_t<kBytes, A, E>;

  struct State {
    A* h;
    E* rows = nullptr;  // the same memory, or h as products read it: rounded, or times the mask
  };

  const ScanForward& p;
  int G;
  long Hp, Pp, Hv, Pv;  // padded units and their vectors
  long chunk, rows;     // steps; rows of a thread, at most
  bool packed_x, packed_h;  // W_ih, and the matrices of each step; else they are read unpacked
  bool convert;
  bool once;                // a single step of few rows: one pass over the unpacked weights
  Barrier* barriers;
  long I;               // input features, in whole terms
  const Q *w_ih, *w_hh, *w_hr;  // packed
  A *scale_x, *scale_h, *scale_r;   // [G][Hp], [G][Hp], [Pp] of packed int8
  A *bias_x, *bias_h;               // [G][Hp]: added to the input's share; of q (GRU)
  A* gates;                         // [chunk*B][G][Hp]
  E* inputs;                        // [chunk*B][parts][I]
  State h[2];                       // [B][Pp]
  A *c, *update;                    // [B][Hp]; z, or the one step's q
  Middle* middle;                   // [B][Hp]: o tanh(c) or r h_prev
  A* zeros;                         // [max(Hp, Pp)]
  State after_reset;                // [B][Pp] of reset_h; c_after_reset [B][Hp]
  A* c_after_reset;
  const A** pointers;               // a thread's lists of rows: [threads][2][list_length]
  const E** operands;               // the same, of parts of rows: [threads][list_length * parts]
  long* live_rows;                  // [threads][B]
  // Of bytes: what sums of W_ih, W_hh and W_hr start from; the scales of `inputs` [chunk*B] and of a thread's list of rows;
  // its rows, [threads][rows][parts][..].
  int32_t *start_x, *start_h, *start_r;
  A *input_scales, *row_scales;
  E* bytes_read;
  long list_length;
  size_t bytes;

  Forward(const ScanForward& args, void* workspace) : p(args) {
    G = gates_of(p.cell);
    Hv = vectors_of<A>(p.H), Pv = vectors_of<A>(p.P);
    Hp = Hv * L, Pp = Pv * L;
    const bool must = kPrepared || p.deterministic;
    packed_x = must || p.w_ih.e != 1 || pays_to_pack(p, p.I);
    packed_h = must || p.w_hh.e != 1 || p.w_hr.e != 1 || pays_to_pack(p, p.P);
    convert = sizeof(S) != sizeof(E) || p.x.e != 1 || (packed_x && p.I % kTerm<E>);
    I = kBytes ? row_of_bytes(p.I) : whole_terms<E>(p.I);
    once = !kPrepared && p.T == 1 && !packed_x && !packed_h && !p.w_hr.data && p.cell != Cell::gru_reset_before &&
           !p.lengths && !p.reset && !p.mask.data && !p.keep_h.data && !p.keep_c.data;

    int threads = threads_for(p, sizeof(Q), kCache), ways = unit_ways(p, threads, sizeof(Q), kCache);
    rows = (p.B + threads / ways - 1) / (threads / ways);
    rows = rows < 1 ? 1 : rows;
    long row_bytes = long(sizeof(A)) * (G * Hp / ways) + long(sizeof(E)) * p.I;
    long most = kChunkBytes / row_bytes < kChunkRows ? kChunkBytes / row_bytes : kChunkRows;
    chunk = most / rows < 1 ? 1 : most / rows > p.T ? p.T : most / rows;
    list_length = chunk * p.B;

    Arena arena{static_cast<char*>(workspace)};
    barriers = arena.take<Barrier>(threads);
    bool proj = p.w_hr.data, blend = p.cell == Cell::gru_reset_before;
    if constexpr (kPrepared) {
      w_ih = at<W>(p.w_ih, 0, 0), w_hh = at<W>(p.w_hh, 0, 0), w_hr = at<W>(p.w_hr, 0, 0);
    } else {
      w_ih = arena.take<E>(packed_x ? Hv * I * G * L : 0);
      w_hh = arena.take<E>(packed_h ? Hv * whole_terms<E>(p.P) * G * L : 0);
      w_hr = arena.take<E>(packed_h && proj ? Pv * whole_terms<E>(p.H) * L : 0);
    }
    const bool scaled = p.s_ih.data;
    scale_x = arena.take<A>(scaled ? G * Hp : 0);
    scale_h = arena.take<A>(scaled ? G * Hp : 0);
    scale_r = arena.take<A>(scaled && proj ? Pp : 0);
    start_x = arena.take<int32_t>(kBytes ? G * Hp : 0);
    start_h = arena.take<int32_t>(kBytes ? G * Hp : 0);
    start_r = arena.take<int32_t>(kBytes && proj ? Pp : 0);
    input_scales = arena.take<A>(kBytes ? chunk * p.B : 0);
    row_scales = arena.take<A>(kBytes ? threads * list_length : 0);
    bytes_read = arena.take<E>(kBytes ? threads * rows * (Hp > Pp ? Hp : Pp) * kParts<E> : 0);
    bias_x = arena.take<A>(G * Hp);
    bias_h = arena.take<A>(Hp);
    gates = arena.take<A>(chunk * p.B * G * Hp);
    inputs = arena.take<E>(convert ? chunk * p.B * I * kParts<E> : 0);
    auto take_state = [&](State& state, long n) {
      state.h = arena.take<A>(n * Pp);
      if constexpr (kPairs)
        state.rows = arena.take<E>(n * Pp);
      else if constexpr (!kBytes)
        state.rows = p.mask.data ? arena.take<A>(n * Pp) : state.h;
    };
    for (State& state : h) take_state(state, p.B);
    take_state(after_reset, p.reset_h.data ? p.B : 0);
    c_after_reset = arena.take<A>(p.reset_c.data ? p.B * Hp : 0);
    c = arena.take<A>(has_c(p.cell) ? p.B * Hp : 0);
    middle = arena.take<Middle>(proj || blend ? p.B * Hp : 0);
    update = arena.take<A>(blend || (once && p.cell == Cell::gru) ? p.B * Hp : 0);
    zeros = arena.take<A>(Hp > Pp ? Hp : Pp);
    pointers = arena.take<const A*>(threads * list_length * 2);
    operands = arena.take<const E*>(threads * list_length * kParts<E>);
    live_rows = arena.take<long>(threads * p.B);
    bytes = arena.used;
  }

  void run() {
    int threads = threads_for(p, sizeof(Q), kCache);
    for (int i = 0; i < threads; ++i) new (barriers + i) Barrier;
    for_cell(p.cell, [&](auto cell) { on_threads<Thread<cell.value>>(threads, *this); });
  }

  template <Cell kCell>
  struct Thread;
};

}  // namespace
}  // namespace FASTSEQ_ISA
}  // namespace fastseq
