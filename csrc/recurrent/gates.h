// What each cell does with its gates at one step, forward and backward, for one unit or a vector of units.
//
// V is float, double or a vector of either. `x_*` are a gate's pre-activation; a `d` before a name is the gradient of
// the loss with respect to it, of a gate's letter with respect to its pre-activation. The products with W stay outside.
#pragma once
#include "core/math.h"
#include "recurrent/cells.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// RNN: h = phi(x)
template <bool kRelu, class V>
FASTSEQ_HD V rnn_forward(V x) {
  if constexpr (kRelu)
    return relu(x);
  else
    return tanh(x);
}
template <bool kRelu, class V>
FASTSEQ_HD V rnn_backward(V h, V dh) {
  if constexpr (kRelu)
    return h <= Scalar<V>(0) ? V{} : dh;  // NaN propagates
  else
    return dh * (Scalar<V>(1) - h * h);
}

// A forward step comes in two halves where a second function waits for a first one's value: a caller with several
// vectors takes all of them through the first half, then all through the second, and nothing waits.

// LSTM: c = f c_prev + i g, h = o tanh(c), with i, f, o = sigmoid(x_*) and g = tanh(x_g); coupled, i, g, o: f = 1 - i
// The gates of a cell that has a c (or their pre-activations, or gradients), as W has them and as the tape keeps them.
template <Cell kCell, class V>
struct LstmGates {
  static constexpr int kCount = gates_of(kCell);
  static_assert(has_c(kCell) && tape_of(kCell) == kCount, "");
  V of[kCount];
  FASTSEQ_HD V o() const { return of[kCount - 1]; }
};
template <Cell kCell, class V>
FASTSEQ_HD V lstm_state(const LstmGates<kCell, V>& s, V c_prev) {
  if constexpr (kCell == Cell::lstm_coupled)
    return (Scalar<V>(1) - s.of[0]) * c_prev + s.of[0] * s.of[1];
  else
    return s.of[1] * c_prev + s.of[0] * s.of[2];
}
template <Cell kCell, class V>
FASTSEQ_HD LstmGates<kCell, V> lstm_forward(const LstmGates<kCell, V>& x, V c_prev, V& c) {
  LstmGates<kCell, V> s;
  if constexpr (kCell == Cell::lstm_coupled)
    s = {{sigmoid(x.of[0]), tanh(x.of[1]), sigmoid(x.of[2])}};
  else
    s = {{sigmoid(x.of[0]), sigmoid(x.of[1]), tanh(x.of[2]), sigmoid(x.of[3])}};
  c = lstm_state(s, c_prev);
  return s;
}
template <class V>
FASTSEQ_HD V lstm_hidden(V o, V c) {
  return o * tanh(c);
}
// dc comes in as the gradient of c_t and goes out as that of c_prev; d_o is that of o, which is passed on.
template <Cell kCell, class V>
FASTSEQ_HD LstmGates<kCell, V> lstm_backward_gates(const LstmGates<kCell, V>& s, V c_prev, V d_o, V& dc) {
  using S = Scalar<V>;
  const V i = s.of[0];
  if constexpr (kCell == Cell::lstm_coupled) {
    const V g = s.of[1];
    const LstmGates<kCell, V> d{{dc * (g - c_prev) * i * (S(1) - i), dc * i * (S(1) - g * g), d_o}};
    dc = dc * (S(1) - i);
    return d;
  } else {
    const V f = s.of[1], g = s.of[2];
    const LstmGates<kCell, V> d{
        {dc * g * i * (S(1) - i), dc * c_prev * f * (S(1) - f), dc * i * (S(1) - g * g), d_o}};
    dc = dc * f;
    return d;
  }
}
// dc comes in as the gradient of c_t from later steps and goes out as that of c_prev.
template <Cell kCell, class V>
FASTSEQ_HD LstmGates<kCell, V> lstm_backward(const LstmGates<kCell, V>& s, V c_prev, V c, V dh, V& dc) {
  using S = Scalar<V>;
  const V o = s.o(), squashed = tanh(c);
  dc = dc + dh * o * (S(1) - squashed * squashed);
  return lstm_backward_gates(s, c_prev, dh * squashed * o * (S(1) - o), dc);
}

// GRU: h = z h_prev + (1 - z) n (and zoneout's blend, its share in z's place), with r, z = sigmoid(x_*), and
// n = tanh(x_n + r q), q = W_hn h_prev + b_hn (reset after the product) or n = tanh(x_n + W_hn q + b_hn), q = r h_prev
// (reset before it: x_n holds the product too).
template <class V>
FASTSEQ_HD V gru_blend(V z, V n, V h_prev) {
  return z * h_prev + (Scalar<V>(1) - z) * n;
}
template <class V>
struct GruGates {
  V r, z, x_n;  // x_n: all of n's pre-activation
};
template <class V>
FASTSEQ_HD GruGates<V> gru_forward(V x_r, V x_z, V x_n, V q) {
  V r = sigmoid(x_r);
  return {r, sigmoid(x_z), x_n + r * q};
}
// What does not depend on where the reset stands: gradients of z and n (its pre-activation).
template <class V>
FASTSEQ_HD void gru_backward_blend(V z, V n, V h_prev, V dh, V& dz, V& dn) {
  using S = Scalar<V>;
  dz = dh * (h_prev - n) * z * (S(1) - z);
  dn = dh * (S(1) - z) * (S(1) - n * n);
}
// dr from the gradient of what r multiplies: `other` is q (after) or h_prev (before).
template <class V>
FASTSEQ_HD V gru_backward_reset(V r, V other, V dproduct) {
  return dproduct * other * r * (Scalar<V>(1) - r);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
