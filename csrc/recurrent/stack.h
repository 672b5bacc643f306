// A stack of layers, one layer and direction of it, or one step of a cell, forward and back, in one call: tensors into the
// structs of cpu/recurrent.h. The operators call this (ops.cpp), and the fast path from Python objects (direct.cpp).
#pragma once
#include <vector>

#include "recurrent/marshal.h"

namespace fastseq {

// How the caller lays out x and y [T,B,n] and states [B,n] of a layer and direction. scan: so. layer: x as well, or [T,n]
// of one sequence; states [rows,B,n] or [rows,n]. batch_first: but x [B,T,n]. cell: x [B,n] or [n], states alike.
enum class Layout { scan, layer, batch_first, cell };
Layout layout_of(const char* name);

using Handles = std::vector<AtenTensorHandle>;

// States of many sequences, [rows,R,P] and [rows,R,H] contiguous, of which a call reads and writes some: int64 [B] on the
// CPU. With `read` they are where h0 and c0 lie; with `write` the last states go there too.
struct StackBlock {
  AtenTensorHandle h = nullptr, c = nullptr, read = nullptr, write = nullptr;
};

// Tensors are borrowed: they must outlive the call.
//   x, h0, c0 laid out as `layout` says, the states of all layers and directions in rows; null for zeros; weights flat, in
//   torch's order (biases and projections are told by their number). Beside a float32 x the matrices may be packed
//   (pack_weights) bfloat16, or int8 with a float32 scale a row: then scales holds [G*H], [G*H] (and [P]) of w_ih, w_hh
//   (and w_hr) in that order; with `narrow` [2, G*H] and so on, the second row as ScanForward::narrow says.
struct StackCall {
  AtenTensorHandle x, h0, c0;
  const AtenTensorHandle* weights;  // flat, in torch's order
  int64_t weight_count;
  Cell cell;
  Layout layout;
  int64_t num_layers;
  bool bidirectional;
  bool reverse = false;  // a lone direction walks from the last step to the first
  OptionalTensor lengths{}, reset{};
  AtenTensorHandle state_mask = nullptr;  // laid out as h0, or null
  AtenTensorHandle reset_h = nullptr, reset_c = nullptr;  // as h0 and c0, or null: what resets put in the states' places
  AtenTensorHandle keep_h = nullptr, keep_c = nullptr;    // [T,B,P] and [T,B,H] of a scan, else [rows,T,B,..]; or null
  const AtenTensorHandle* scales = nullptr;  // of int8 matrices, in their order; else none
  int64_t scale_count = 0;
  int64_t hidden = 0, outputs = 0;  // H and P where the matrices are packed, which do not tell them
  bool narrow = false;              // packed matrices: ScanForward::narrow
  StackBlock block{};
};

// y, h_n, and c_n of an LSTM, as torch.nn lays them out; of a cell y is no tensor. With `save`, for the backward pass: ys,
// the outputs of the layers below the last, and a layer and direction at a time an LSTM's states and the tape of a cell that
// has one. Without, `states` asks for those of the last layer.
struct StackResult {
  OptionalTensor y, h_n, c_n;
  std::vector<torch::stable::Tensor> ys, states, tapes;
};

// The gradients of results, null for zeros, and what the forward pass left.
struct StackGradient {
  AtenTensorHandle dy, dh_n, dc_n;
  Handles dstates;  // of the last layer's directions, or none
  AtenTensorHandle y;
  Handles ys, states, tapes;
  bool with_dx, with_starts, with_weights;  // whose gradients are wanted: of x, of h0 and c0, of the weights
};

struct StackInputGradients {
  OptionalTensor dx, dh0, dc0, dreset_h, dreset_c;
  std::vector<torch::stable::Tensor> weights;
};

class Stack {
 public:
  explicit Stack(const StackCall& call);  // checks the call and knows its sizes
  StackResult run(bool save, bool states);
  StackInputGradients run_back(const StackGradient& given);

  Dtype dtype() const { return p_.dtype; }
  int64_t products() const { return p_.T * p_.B * (p_.I + p_.P) * p_.H * gates_ * rows_; }  // multiplications, about
  int64_t steps() const { return p_.T; }
  int64_t batch() const { return p_.B; }

 private:
  bool lstm() const { return has_c(p_.cell); }
  bool is_cell() const { return call_.layout == Layout::cell; }
  int64_t inputs(int64_t layer) const { return layer ? directions_ * p_.P : p_.I; }
  const AtenTensorHandle* weights(int64_t row) const { return call_.weights + row * width_; }

  // A tensor [T,B,n] in the caller's layout, as a view; a new one, its steps first in memory; a contiguous [T,B,n] as the
  // caller lays it out.
  ScanView steps_of(const char* name, AtenTensorHandle x, int64_t n) const;
  torch::stable::Tensor new_steps(int64_t n) const;
  torch::stable::Tensor laid_out(const torch::stable::Tensor& steps, int64_t n) const;
  int64_t sizes_for(int64_t n, int64_t* sizes, int64_t* strides) const;
  // States [rows,B,n] in the caller's layout: one row as a view, and new ones.
  ScanView state_of(const char* name, AtenTensorHandle state, int64_t n, int64_t row) const;
  torch::stable::Tensor new_states(int64_t n) const;
  ScanView row_of(const OptionalTensor& states, int64_t n, int64_t row) const;
  ScanView keep_of(const char* name, AtenTensorHandle keep, int64_t n, int64_t row) const;
  void set_options(ScanSizes& p, int64_t row) const;  // what is there of each layer and direction beside its weights
  // Likewise of a block; and the numbers of rows in it, checked.
  ScanView block_of(const char* name, AtenTensorHandle block, int64_t n, int64_t row) const;
  const int64_t* places(const char* name, AtenTensorHandle rows) const;

  ScanView matrix(const char* name, AtenTensorHandle w, int64_t gates, int64_t rows, int64_t K) const;
  void set_weights(ScanForward& p, int64_t row) const;

  const StackCall& call_;
  ScanForward p_{};
  OptionalTensor lengths_;  // kept, where they had to be copied
  bool batched_, swapped_, biases_, projected_, scaled_;
  int64_t rank_, gates_, tape_, directions_, rows_, width_;
};

// lengths and reset, checked, into a struct's sizes. Keeps alive what it had to copy.
OptionalTensor set_lengths(ScanSizes& s, const OptionalTensor& lengths, const OptionalTensor& reset);

}  // namespace fastseq
