// The matrix of attention's weights, which no kernel stores.
#pragma once
#include <algorithm>

#include "attention/cpu/attention.h"

namespace fastseq {

// weights [B, heads, Tq, Tk] of a call: what attend(call) makes of values that are the unit vectors, for which unit has room
// for Tk x Tk numbers. Sums of one p and of zeros, they are exact; the product takes Tk / D times what it takes with v. And
// their mean over the heads, if asked.
template <class A, class Attend>
void weigh_into(AttentionForward call, const Attend& attend, A* unit, A* weights, A* mean) {
  const int64_t keys = call.length_k, pairs = call.length_q * keys;
  std::fill(unit, unit + keys * keys, A(0));
  for (int64_t j = 0; j < keys; ++j) unit[j * keys + j] = 1;
  call.v = {unit, 0, 0, keys}, call.dim_v = keys;
  call.o = {weights, call.heads_q * pairs, pairs, keys};
  attend(call);
  for (int64_t b = 0; mean && b < call.batch; ++b, mean += pairs) {
    std::fill(mean, mean + pairs, A(0));
    for (int64_t h = 0; h < call.heads_q; ++h, weights += pairs)
      for (int64_t i = 0; i < pairs; ++i) mean[i] += weights[i];
    for (int64_t i = 0; i < pairs; ++i) mean[i] /= A(call.heads_q);
  }
}

}  // namespace fastseq
