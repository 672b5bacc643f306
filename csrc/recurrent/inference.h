// Inference of a whole stack of layers, or of one step of a cell, in one call. direct.cpp makes the call from Python
// objects.
#pragma once
#include "recurrent/marshal.h"

namespace fastseq {

// How the caller lays out x and y [T,B,n] and states [B,n] of a layer and direction. scan: so. layer: x as well, or [T,n]
// of one sequence; states [rows,B,n] or [rows,n]. batch_first: but x [B,T,n]. cell: x [B,n] or [n], states alike.
enum class Layout { scan, layer, batch_first, cell };
Layout layout_of(const char* name);

// Tensors are borrowed: they must outlive the call.
//   x, h0, c0 laid out as `layout` says, the states of all layers and directions in rows; null for zeros; weights flat, in
//   torch's order (biases and projections are told by their number). Beside a float32 x the matrices may be packed
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
  Layout layout;
  int64_t num_layers;
  bool bidirectional;
  int64_t hidden, outputs;  // H and P where the matrices are packed, which do not tell them; else 0
};

// Checks the call and knows the shapes of its results; run() computes them into contiguous memory.
class Stack {
 public:
  explicit Stack(const StackCall& call);
  void run(void* y, void* h_n, void* c_n);  // y is not used of a cell

  Dtype dtype() const { return p_.dtype; }
  bool lstm() const { return p_.cell == Cell::lstm; }
  bool is_cell() const { return call_.layout == Layout::cell; }
  int64_t rank() const { return rank_; }  // of all results
  int64_t y_sizes[3], y_strides[3], h_sizes[3], c_sizes[3];
  int64_t products() const;  // multiplications in all, about
  int64_t rows() const { return p_.T * p_.B; }

 private:
  const StackCall& call_;
  ScanForward p_{};
  bool batched_, swapped_, biases_, projected_, scaled_;
  int64_t rank_, gates_, directions_, rows_, width_;
};

}  // namespace fastseq
