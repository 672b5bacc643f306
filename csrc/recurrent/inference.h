// Inference of a whole stack of layers, or of one step of a cell, in one call. csrc/recurrent/direct.cpp makes the call from Python
// objects.
#pragma once
#include "recurrent/marshal.h"

namespace fastseq {

// Tensors are borrowed: they must outlive the call.
//   x [T,B,I], batch_first [B,T,I], unbatched [T,I]; h0, c0 as torch.nn's hx, null for zeros; weights flat, in torch's
//   order (biases and projections are told by their number). Beside a float32 x the matrices may be packed
//   (pack_weights) bfloat16, or int8 with a float32 scale a row: then scales holds [G*H], [G*H] (and [P]) of w_ih, w_hh
//   (and w_hr) in that order.
// -> y, h_n, and c_n of an LSTM, as torch.nn lays them out
struct StackCall {
  AtenTensorHandle x, h0, c0;
  const AtenTensorHandle* weights;  // flat, in torch's order
  int64_t weight_count;
  const AtenTensorHandle* scales;  // of int8 matrices, in their order; else none
  int64_t scale_count;
  Cell cell;
  int64_t num_layers;
  bool bidirectional, batch_first;
  int64_t hidden, outputs;  // H and P where the matrices are packed, which do not tell them; else 0
};

// Checks the call and knows the shapes of its results; run() computes them into contiguous memory.
class Stack {
 public:
  explicit Stack(const StackCall& call);
  void run(void* y, void* h_n, void* c_n);

  Dtype dtype() const { return p_.dtype; }
  bool lstm() const { return p_.cell == Cell::lstm; }
  int64_t rank() const { return batched_ ? 3 : 2; }  // of all results
  int64_t y_sizes[3], h_sizes[3], c_sizes[3];
  int64_t products() const;  // multiplications in all, about
  int64_t rows() const { return p_.T * p_.B; }

 private:
  const StackCall& call_;
  ScanForward p_{};
  bool batched_, swapped_, biases_, projected_, scaled_;
  int64_t gates_, directions_, rows_, width_;
};

struct CellCall {
  AtenTensorHandle x, h, c, w_ih, w_hh, b_ih, b_hh, s_ih, s_hh;
  Cell cell;
  int64_t hidden;  // H where the matrices are packed; else 0
};

class CellStep {
 public:
  explicit CellStep(const CellCall& call);
  void run(void* h_n, void* c_n);

  Dtype dtype() const { return p_.dtype; }
  bool lstm() const { return p_.cell == Cell::lstm; }
  int64_t rank() const { return rank_; }
  int64_t sizes[2];  // of both results
  int64_t products() const { return p_.B * (p_.I + p_.H) * p_.H * gates_of(p_.cell); }

 private:
  ScanForward p_{};
  int64_t rank_;
};

}  // namespace fastseq
