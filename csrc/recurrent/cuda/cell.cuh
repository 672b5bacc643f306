// What one thread does at one step for one unit of one row: reads, gates (gates.h), writes. All roles share it.
#pragma once
#include "recurrent/gates.h"
#include "primitives/primitives.cuh"
#include "recurrent/cuda/recurrent.h"
#include "recurrent/cuda/number.cuh"

namespace fastseq::cuda {

template <ScanCell C>
constexpr int kGates = gates_of(C);
template <ScanCell C>
constexpr int kTapeBlocks = tape_of(C);
template <ScanCell C>
constexpr bool kHasC = has_c(C);
template <ScanCell C>
constexpr bool kTwice = C == ScanCell::gru_reset_before;  // two products a step: for r and z, then for the candidate
// Gates whose hidden side is the product with h itself.
template <ScanCell C>
constexpr int kDirect = kTwice<C> ? 2 : kGates<C>;
template <ScanCell C>
constexpr bool kIsGru = C == ScanCell::gru || kTwice<C>;

template <class T>
FASTSEQ_DEVICE float read(const void* p, int64_t at) {
  return to_float(static_cast<const T*>(p)[at]);
}
template <class T>
FASTSEQ_DEVICE float read_or_zero(const void* p, int64_t at) {
  return p ? read<T>(p, at) : 0.0f;
}
template <class T>
FASTSEQ_DEVICE void write(void* p, int64_t at, float v) {
  static_cast<T*>(p)[at] = from_float<T>(v);
}

FASTSEQ_DEVICE int length_of(const ScanWalk& a, int b) { return a.lengths ? static_cast<int>(a.lengths[b]) : a.total; }
// Whether the state of row b is cleared before step t.
FASTSEQ_DEVICE bool cleared(const ScanWalk& a, int t, int b) { return a.reset && a.reset[t * a.reset_t + b * a.reset_b]; }
// The time of the window's step s, and of the walk back's.
FASTSEQ_DEVICE int time_of(const ScanWalk& a, int s) { return a.first + (a.reverse ? a.T - 1 - s : s); }
FASTSEQ_DEVICE int time_back(const ScanWalk& a, int s) { return time_of(a, a.T - 1 - s); }

struct Place {
  int b, u;      // the row and the unit
  int length;    // of the row
};
// Rows are counted in 32 bits and elements in 64: a step's time is that of its instructions, of which a product of two
// 64-bit numbers takes several.
FASTSEQ_DEVICE int64_t element(int row, int width, int column) { return int64_t(row) * width + column; }
FASTSEQ_DEVICE int64_t element(const ScanWalk& a, const Place& at) { return element(at.b, a.H, at.u); }
FASTSEQ_DEVICE int row_of(const ScanWalk& a, int t, const Place& at) { return t * a.B + at.b; }

// ---- Forward

template <ScanCell C, class T>
FASTSEQ_DEVICE const T* gates_at(const ScanForward& a, int t, const Place& at) {
  return static_cast<const T*>(a.gates_x) + element((t - a.first) * a.x_t + at.b * a.x_b, kGates<C> * a.H, at.u);
}
// What a step reads of the call's options, ahead of it, as what it reads of gates; of a call without options nothing.
template <class T, bool kOptions>
struct Extras {};
template <class T>
struct Extras<T, true> {
  T zoneout_h, zoneout_c;
};
template <class T>
FASTSEQ_DEVICE T read_share(const ScanShare& share, int t, const Place& at) {
  return share.data ? static_cast<const T*>(share.data)[t * share.t + at.b * share.b + at.u * share.u] : T{};
}
template <ScanCell C, class T, bool kOptions>
FASTSEQ_DEVICE void read_extras(const ScanWalk& a, int t, const Place& at, Extras<T, kOptions>& x) {
  if constexpr (kOptions) {
    x.zoneout_h = read_share<T>(a.options.zoneout_h, t, at);
    if constexpr (kHasC<C>) x.zoneout_c = read_share<T>(a.options.zoneout_c, t, at);
  }
}
// A state before a step: what a reset puts in its place where it clears it.
template <class T, bool kOptions>
FASTSEQ_DEVICE float state_before(const ScanWalk& a, const void* put_in, const Place& at, bool clear, float state) {
  if constexpr (kOptions)
    if (clear && put_in) return read<T>(put_in, element(a, at));
  return clear ? 0.0f : state;
}
// Times the mask. It is read where it is used, from the first-level cache: there is no register to keep it in.
template <class T>
FASTSEQ_DEVICE float masked(const ScanWalk& a, const Place& at, float v) {
  return a.options.mask ? v * read<T>(a.options.mask, element(a, at)) : v;
}
// What products read of h before a step.
template <class T, bool kOptions>
FASTSEQ_DEVICE float operand_before(const ScanWalk& a, const Place& at, bool clear, float h) {
  const float h_prev = state_before<T, kOptions>(a, a.options.reset_h, at, clear, h);
  if constexpr (kOptions)
    return masked<T>(a, at, h_prev);
  else
    return h_prev;
}
// A state after zoneout.
template <class T>
FASTSEQ_DEVICE float kept_of(const ScanShare& from, T share, float old, float made) {
  return from.data ? baseline::gru_blend(to_float(share), made, old) : made;
}
// Takes from a state's gradient what its share of the state before passes on, and returns that.
template <class T>
FASTSEQ_DEVICE float pass_kept(const ScanShare& from, T share, float& d) {
  const float passed = from.data ? d * to_float(share) : 0.0f;
  d -= passed;
  return passed;
}

// As they lie in memory, as is all that is read ahead of its step: who converts a number waits for it.
template <ScanCell C, class T>
FASTSEQ_DEVICE void read_gates(const ScanForward& a, int t, const Place& at, T (&x)[kGates<C>]) {
  const T* from = gates_at<C, T>(a, t, at);
#pragma unroll
  for (int g = 0; g < kGates<C>; ++g) x[g] = from[g * a.H];
}
// Brings the same closer, for a step that is still some way off.
template <ScanCell C, class T>
FASTSEQ_DEVICE void prefetch_gates(const ScanForward& a, int t, const Place& at) {
  const T* from = gates_at<C, T>(a, t, at);
#pragma unroll
  for (int g = 0; g < kGates<C>; ++g) prefetch_l2(from + g * a.H);
}

// What a step leaves behind besides h and c: for the tape, an LSTM's gates, a GRU's r, z, n, q.
template <ScanCell C>
struct Left {
  static constexpr int kTape = kTwice<C> ? 0 : kTapeBlocks<C>;
  float tape[kTape ? kTape : 1];
};
// All of it 0 past the length, but c, which stays.
template <class T>
FASTSEQ_DEVICE void write_tape(const ScanForward& a, int t, const Place& at, int block, bool live, float v) {
  constexpr int kBlocks = kTapeBlocks<ScanCell::gru_reset_before>;
  if (a.tape) write<T>(a.tape, element(row_of(a, t, at), kBlocks * a.H, block * a.H + at.u), live ? v : 0.0f);
}
template <class T>
FASTSEQ_DEVICE void write_output(const ScanForward& a, int t, const Place& at, bool live, float y) {
  write<T>(a.y, element(t * a.y_t + at.b * a.y_b, a.H, at.u), live ? y : 0.0f);
}
template <ScanCell C, class T>
FASTSEQ_DEVICE void write_left(const ScanForward& a, int t, const Place& at, float h, float c, const Left<C>& left) {
  const bool live = t < at.length;
  write_output<T>(a, t, at, live, h);
  if constexpr (kHasC<C>)
    if (a.states) a.states[element(row_of(a, t, at), a.H, at.u)] = c;
  if constexpr (Left<C>::kTape > 0)
    if (a.tape) {
      T* to = static_cast<T*>(a.tape) + element(row_of(a, t, at), Left<C>::kTape * a.H, at.u);
#pragma unroll
      for (int k = 0; k < Left<C>::kTape; ++k) to[k * a.H] = from_float<T>(live ? left.tape[k] : 0.0f);
    }
}

// One step from the pre-activations' two sides, x and p = W_hh h_prev + b_hh, to h and an LSTM's c.
template <ScanCell C, class T, bool kOptions>
FASTSEQ_DEVICE void forward_element(const ScanForward& a, int t, const Place& at, bool clear,
                                    const T (&read)[kGates<C>], const Extras<T, kOptions>& extras,
                                    const float (&p)[kGates<C>], float& h, float& c, Left<C>& left) {
  float x[kGates<C>];
#pragma unroll
  for (int g = 0; g < kGates<C>; ++g) x[g] = to_float(read[g]);
  const bool live = t < at.length;
  const float h_prev = state_before<T, kOptions>(a, a.options.reset_h, at, clear, h);
  float y;
  if constexpr (kHasC<C>) {
    baseline::LstmGates<C, float> made;
#pragma unroll
    for (int g = 0; g < kGates<C>; ++g) made.of[g] = x[g] + p[g];
    float c_new;
    const float c_prev = state_before<T, kOptions>(a, a.options.reset_c, at, clear, c);
    const auto s = baseline::lstm_forward(made, c_prev, c_new);
    float c_now = c_new;
    if constexpr (kOptions) c_now = kept_of(a.options.zoneout_c, extras.zoneout_c, c_prev, c_new);
    c = live ? c_now : c;
#pragma unroll
    for (int g = 0; g < kGates<C>; ++g) left.tape[g] = s.of[g];
    y = baseline::lstm_hidden(s.o(), c_new);  // of the c that keeps nothing
  } else if constexpr (C == ScanCell::gru) {
    const auto s = baseline::gru_forward(x[0] + p[0], x[1] + p[1], x[2], p[2]);
    const float n = baseline::tanh(s.x_n);
    left.tape[0] = s.r, left.tape[1] = s.z, left.tape[2] = n, left.tape[3] = p[2];
    y = baseline::gru_blend(s.z, n, h_prev);
  } else {
    const float s = x[0] + p[0];
    y = a.relu ? baseline::rnn_forward<true>(s) : baseline::rnn_forward<false>(s);
  }
  if constexpr (kOptions) y = kept_of(a.options.zoneout_h, extras.zoneout_h, h_prev, y);
  h = live ? y : h;
}

// gru_reset_before in two halves: q = r * h_prev (times the mask), which W_hn multiplies, and z; then the candidate.
template <class T, bool kOptions>
FASTSEQ_DEVICE float forward_reset(const ScanForward& a, int t, const Place& at, bool clear, float x_r, float x_z,
                                   float h, float& z) {
  const bool live = t < at.length;
  const float r = baseline::sigmoid(x_r);
  float q = clear ? 0.0f : r * h;
  if constexpr (kOptions) q = r * operand_before<T, true>(a, at, clear, h);
  z = baseline::sigmoid(x_z);
  write_tape<T>(a, t, at, 0, live, r);
  write_tape<T>(a, t, at, 1, live, z);
  write_tape<T>(a, t, at, 3, live, q);
  return q;
}
template <class T, bool kOptions>
FASTSEQ_DEVICE void forward_candidate(const ScanForward& a, int t, const Place& at, bool clear,
                                      const Extras<T, kOptions>& extras, float x_n, float z, float& h) {
  const bool live = t < at.length;
  const float n = baseline::tanh(x_n), h_prev = state_before<T, kOptions>(a, a.options.reset_h, at, clear, h);
  float y = baseline::gru_blend(z, n, h_prev);
  if constexpr (kOptions) y = kept_of(a.options.zoneout_h, extras.zoneout_h, h_prev, y);
  write_tape<T>(a, t, at, 2, live, n);
  write_output<T>(a, t, at, live, y);
  h = live ? y : h;
}

// ---- Backward

// What a step's gradient is made of, read ahead of it.
template <ScanCell C, class T>
struct Saved {
  static constexpr int kTape = kTwice<C> ? 3 : kTapeBlocks<C>;
  T tape[kTape ? kTape : 1];
  T h;   // an RNN's h_t, a GRU's h_prev
  T dy;
  float c, c_prev;  // an LSTM's
};

template <ScanCell C, class T>
FASTSEQ_DEVICE const T* tape_at(const ScanBackward& a, int t, const Place& at) {
  return static_cast<const T*>(a.tape) + element(row_of(a, t, at), kTapeBlocks<C> * a.H, at.u);
}
template <class T>
FASTSEQ_DEVICE const T* dy_at(const ScanBackward& a, int t, const Place& at) {
  return static_cast<const T*>(a.dy) + element((t - a.first) * a.x_t + at.b * a.x_b, a.H, at.u);
}
template <class T>
FASTSEQ_DEVICE const T* y_at(const ScanBackward& a, int t, const Place& at) {
  return static_cast<const T*>(a.y) + element(t * a.y_t + at.b * a.y_b, a.H, at.u);
}
FASTSEQ_DEVICE const float* c_at(const ScanBackward& a, int t, const Place& at) {
  return a.states + element(row_of(a, t, at), a.H, at.u);
}
template <ScanCell C, class T, bool kOptions>
FASTSEQ_DEVICE void read_saved(const ScanBackward& a, int t, const Place& at, bool clear, Saved<C, T>& s) {
  const bool first = t == (a.reverse ? a.total - 1 : 0);  // of the walk forward
  const int before = a.reverse ? t + 1 : t - 1;
  if constexpr (Saved<C, T>::kTape > 0) {
    const T* tape = tape_at<C, T>(a, t, at);
#pragma unroll
    for (int k = 0; k < Saved<C, T>::kTape; ++k) s.tape[k] = tape[k * a.H];
  }
  s.dy = T{};
  if (a.dy && t < at.length) s.dy = *dy_at<T>(a, t, at);
  const auto start_of = [&](const void* p) { return p ? static_cast<const T*>(p)[element(a, at)] : T{}; };
  if constexpr (kHasC<C>) {
    s.c = *c_at(a, t, at);
    s.c_prev = 0.0f;
    if constexpr (kOptions)
      if (clear) s.c_prev = to_float(start_of(a.options.reset_c));
    if (!clear && first) s.c_prev = to_float(start_of(a.c0));
    if (!clear && !first) s.c_prev = *c_at(a, before, at);
  } else if constexpr (kIsGru<C>) {
    const bool start = first || (a.reverse && t == at.length - 1);  // the step with which the row began
    s.h = T{};
    if constexpr (kOptions)
      if (clear) s.h = start_of(a.options.reset_h);
    if (!clear && start) s.h = start_of(a.h0);
    if (!clear && !start) s.h = *y_at<T>(a, before, at);
  } else {
    s.h = *y_at<T>(a, t, at);
  }
}

// Brings the same closer, for a step that is still some way off.
template <ScanCell C, class T>
FASTSEQ_DEVICE void prefetch_saved(const ScanBackward& a, int t, const Place& at) {
  if constexpr (Saved<C, T>::kTape > 0) {
    const T* tape = tape_at<C, T>(a, t, at);
#pragma unroll
    for (int k = 0; k < Saved<C, T>::kTape; ++k) prefetch_l2(tape + k * a.H);
  }
  if (a.dy) prefetch_l2(dy_at<T>(a, t, at));
  if constexpr (kHasC<C>)
    prefetch_l2(c_at(a, t, at));
  else
    prefetch_l2(y_at<T>(a, t, at));
}

template <ScanCell C, class T>
FASTSEQ_DEVICE float write_gradient(const ScanBackward& a, int t, const Place& at, int gate, bool live, float d) {
  d = live ? d : 0.0f;
  write<T>(a.dgates, element(row_of(a, t, at), kGates<C> * a.H, gate * a.H + at.u), d);
  return d;
}

// dgates of one step. d: what W_hh multiplies; of a GRU the third is the gradient of W_hn h + b_hn, and n that of the
// candidate's pre-activation.
template <ScanCell C>
struct Gradients {
  float d[kGates<C>], n;
};
template <ScanCell C, class T>
FASTSEQ_DEVICE void write_gradients(const ScanBackward& a, int t, const Place& at, const Gradients<C>& g) {
  T* to = static_cast<T*>(a.dgates) + element(row_of(a, t, at), kGates<C> * a.H, at.u);
#pragma unroll
  for (int k = 0; k < kGates<C>; ++k) to[k * a.H] = from_float<T>(C == ScanCell::gru && k == 2 ? g.n : g.d[k]);
  if constexpr (C == ScanCell::gru) write<T>(a.dhidden, element(row_of(a, t, at), a.H, at.u), g.d[2]);
}

// Whether a step's gradient goes on to h before it, or to what a reset put in its place.
template <bool kOptions>
FASTSEQ_DEVICE bool goes_on(const ScanBackward& a, bool clear) {
  return !clear || (kOptions && a.options.reset_h);
}
// Adds the product with W_hh to what has reached h_prev beside it. Where the step put reset_h there, all of it is
// reset_h's. One thread alone adds to an element of dreset_h, so its bits are the same every time.
template <class T, bool kOptions>
FASTSEQ_DEVICE void add_product(const ScanBackward& a, const Place& at, bool clear, float product, float& dh) {
  if constexpr (kOptions) {
    dh += masked<T>(a, at, product);
    if (!clear) return;
    if (a.options.dreset_h) a.options.dreset_h[element(a, at)] += dh;
    dh = 0.0f;
  } else {
    dh += product;
  }
}

// One step back: dgates, 0 past the length, from dh, the gradient that reaches h_t from later steps. Returns what reaches
// h_prev beside the product with W_hh; an LSTM's dc becomes c_prev's.
template <ScanCell C, class T, bool kOptions>
FASTSEQ_DEVICE float backward_element(const ScanBackward& a, int t, const Place& at, bool clear, const Saved<C, T>& s,
                                      const Extras<T, kOptions>& extras, float dh, float& dc, Gradients<C>& g) {
  const bool live = t < at.length;
  const auto where = [&](float d) { return live ? d : 0.0f; };
  const auto kept = [&](int k) { return to_float(s.tape[k]); };
  float total = dh + to_float(s.dy), beside = 0.0f, passed = 0.0f;
  if constexpr (kOptions) passed = pass_kept(a.options.zoneout_h, extras.zoneout_h, total);
  if constexpr (kHasC<C>) {
    if (a.dstates) dc += a.dstates[element(row_of(a, t, at), a.H, at.u)];
    float dc_prev = dc;
    baseline::LstmGates<C, float> gates;
#pragma unroll
    for (int k = 0; k < kGates<C>; ++k) gates.of[k] = kept(k);
    float c = s.c, passed_c = 0.0f;
    if constexpr (kOptions) {
      passed_c = pass_kept(a.options.zoneout_c, extras.zoneout_c, dc_prev);
      if (a.options.zoneout_c.data) c = baseline::lstm_state(gates, s.c_prev);
    }
    const auto d = baseline::lstm_backward(gates, s.c_prev, c, total, dc_prev);
    if constexpr (kOptions) {
      dc_prev += passed_c;
      if (live && clear && a.options.dreset_c) a.options.dreset_c[element(a, at)] += dc_prev;
    }
#pragma unroll
    for (int k = 0; k < kGates<C>; ++k) g.d[k] = where(d.of[k]);
    dc = live ? (clear ? 0.0f : dc_prev) : dc;
  } else if constexpr (C == ScanCell::gru) {
    float dz, dn;
    baseline::gru_backward_blend(kept(1), kept(2), to_float(s.h), total, dz, dn);
    g.d[0] = where(baseline::gru_backward_reset(kept(0), kept(3), dn));
    g.d[1] = where(dz);
    g.d[2] = where(dn * kept(0));
    g.n = where(dn);
    beside = total * kept(1);
  } else {
    const float h = to_float(s.h);
    g.d[0] = where(a.relu ? baseline::rnn_backward<true>(h, total) : baseline::rnn_backward<false>(h, total));
  }
  if constexpr (kOptions) beside += passed;
  return live ? (goes_on<kOptions>(a, clear) ? beside : 0.0f) : dh;
}

// gru_reset_before in two halves: dn, which W_hn carries to q = r * h_prev, and dz; then dr from that dq.
template <class T, bool kOptions>
FASTSEQ_DEVICE float backward_candidate(const ScanBackward& a, int t, const Place& at,
                                        const Saved<ScanCell::gru_reset_before, T>& s,
                                        const Extras<T, kOptions>& extras, float dh, float& dz) {
  const bool live = t < at.length;
  float total = dh + to_float(s.dy), dn;
  if constexpr (kOptions) pass_kept(a.options.zoneout_h, extras.zoneout_h, total);
  baseline::gru_backward_blend(to_float(s.tape[1]), to_float(s.tape[2]), to_float(s.h), total, dz, dn);
  dz = write_gradient<ScanCell::gru_reset_before, T>(a, t, at, 1, live, dz);
  return write_gradient<ScanCell::gru_reset_before, T>(a, t, at, 2, live, dn);
}
template <class T, bool kOptions>
FASTSEQ_DEVICE float backward_reset(const ScanBackward& a, int t, const Place& at, bool clear,
                                    const Saved<ScanCell::gru_reset_before, T>& s, const Extras<T, kOptions>& extras,
                                    float dh, float dq, float& dr) {
  const bool live = t < at.length;
  if constexpr (kOptions) dq = masked<T>(a, at, dq);
  dr = write_gradient<ScanCell::gru_reset_before, T>(a, t, at, 0, live,
                                                     baseline::gru_backward_reset(to_float(s.tape[0]), to_float(s.h), dq));
  float total = dh + to_float(s.dy), passed = 0.0f;
  if constexpr (kOptions) passed = pass_kept(a.options.zoneout_h, extras.zoneout_h, total);
  float beside = total * to_float(s.tape[1]) + dq * to_float(s.tape[0]);
  if constexpr (kOptions) beside += passed;
  return live ? (goes_on<kOptions>(a, clear) ? beside : 0.0f) : dh;
}

}  // namespace fastseq::cuda
