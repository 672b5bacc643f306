// The operators' tensors and options into the structs of call.h: what the CPU and a GPU share, and AttentionRules, which
// says where they differ.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "attention/call.h"
#include "core/arguments.h"

namespace fastseq {

using MaybeTensor = std::optional<torch::stable::Tensor>;
using Sizes = std::vector<int64_t>;

// The options of an operator: as a struct, as parameters of the operators' implementations, and as what these were given.
#define FASTSEQ_TENSOR_PARAMETER(name) const MaybeTensor& name
#define FASTSEQ_SETTING_PARAMETER(type, name) type name
#define FASTSEQ_TENSOR_NAME(name) name
#define FASTSEQ_SETTING_NAME(type, name) name
#define FASTSEQ_COMMA ,
struct AttentionOptions {
  FASTSEQ_ATTENTION_FIELDS(FASTSEQ_TENSOR_PARAMETER, FASTSEQ_SETTING_PARAMETER, ;);
};
#define FASTSEQ_ATTENTION_OPTIONS \
  FASTSEQ_ATTENTION_FIELDS(FASTSEQ_TENSOR_PARAMETER, FASTSEQ_SETTING_PARAMETER, FASTSEQ_COMMA)
#define FASTSEQ_GIVEN_OPTIONS \
  { FASTSEQ_ATTENTION_FIELDS(FASTSEQ_TENSOR_NAME, FASTSEQ_SETTING_NAME, FASTSEQ_COMMA) }

// Where the CPU and a GPU differ.
struct AttentionRules {
  bool looks_at_values;  // of lengths and offsets, to check them and to find the longest sequence
  bool reads_caches;     // pages of a block_table, and int8 with scales
  const char* (*refusal)(Dtype dtype, int64_t dim, int64_t dim_v);  // why the kernels take no such call; null: they do
  int64_t most_rows;  // of q, of k, and heads in all
  void (*check)(const char* name, const torch::stable::Tensor& x, const torch::stable::Tensor& q);  // readable beside q
  torch::stable::Tensor (*contiguous)(const torch::stable::Tensor& x);
  // On x's device, not initialised.
  torch::stable::Tensor (*empty)(const torch::stable::Tensor& x, const Sizes& sizes, const int64_t* strides, Dtype dtype);
};

// The tensors of a call: checked, and kept alive while a struct points into them.
class AttentionTensors {
 public:
  using Tensor = torch::stable::Tensor;

  // Fills in the call.
  template <class Size>
  AttentionTensors(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options,
                   const AttentionRules& rules, AttentionArguments<Size>& call);

  // o and lse of a forward pass, whose views are put into the call.
  template <class Forward>
  std::tuple<Tensor, Tensor> results(Forward& call) const {
    const Tensor o = empty_as(q_, o_sizes()), lse = empty(row_sizes(), accumulator_of(dtype_));
    call.o = view(o), call.lse = row_view(lse);
    return {o, lse};
  }
  // What a backward pass is given beside the call, and dq, dk, dv, dbias and dsinks: their views are put into the call;
  // dbias and dsinks where there are any.
  template <class Backward>
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gradients(Backward& call, const Tensor& d_o, const MaybeTensor& dlse,
                                                               const Tensor& o, const Tensor& lse, bool bias_grad) {
    call.o = given(o, "o"), call.d_o = given(d_o, "the gradient of o");
    call.lse = given_rows(lse, "lse");
    if (dlse) call.dlse = given_rows(*dlse, "the gradient of lse");
    const Tensor dq = empty_as(q_, sizes_of(q_)), dk = empty_as(k_, sizes_of(k_)), dv = empty_as(v_, sizes_of(v_));
    call.dq = view(dq), call.dk = view(dk), call.dv = view(dv);
    const bool with_bias = options_.bias && bias_grad;
    const Tensor dbias = with_bias ? empty(sizes_of(*options_.bias), bias_dtype_) : empty({0}, dtype_);
    const Tensor dsinks = options_.sinks ? empty(sizes_of(*options_.sinks), sinks_dtype_) : empty({0}, dtype_);
    if (with_bias) call.dbias = dbias.data_ptr();
    for (int i = 0; with_bias && i < 4; ++i) call.bias_size[i] = dbias.size(i);
    if (options_.sinks) call.dsinks = dsinks.data_ptr();
    return {dq, dk, dv, dbias, dsinks};
  }

  // Scratch, or a result.
  Tensor empty(const Sizes& sizes, Dtype dtype) const;
  const Tensor& keep(const Tensor& x);
  bool packed() const { return packed_; }
  // Rows of q, and of k: some may belong to no packed sequence.
  int64_t total_q() const { return q_.size(packed_ ? 0 : 2); }
  int64_t total_k() const { return k_.size(packed_ ? 0 : 2); }  // not of pages

 private:
  static Sizes sizes_of(const Tensor& x);
  View view(const Tensor& x) const;      // [B,H,T,D], packed [total,H,D]
  View keys_view(const Tensor& x) const;  // the same of k and v, in pages [P,page,H,D]
  View scale_view(const MaybeTensor& x, const char* name, const Tensor& rows) const;  // of k or v: [...,1]
  View row_view(const Tensor& x) const;  // [B,H,T], packed [H,total]
  Sizes o_sizes() const, row_sizes() const;
  Tensor empty_as(const Tensor& x, const Sizes& sizes) const;  // in the order of x's dimensions
  // Rows must be contiguous: any other layout is rare and copied.
  Tensor with_unit_rows(const char* name, const Tensor& x, const Tensor& q) const;
  // A tensor that must be as the forward pass gave it.
  View given(const Tensor& x, const char* name);
  View given_rows(const Tensor& x, const char* name);
  void check_given(const Tensor& x, const char* name, const Sizes& sizes, Dtype dtype) const;
  Pairs pairs(const MaybeTensor& x, const char* name, const int64_t (&wanted)[4]) const;
  template <class T>
  const T* vector(const MaybeTensor& x, const char* name, torch::headeronly::ScalarType type, int64_t size);
  Dtype dtype_beside_q(const MaybeTensor& x, const char* name) const;

  const AttentionOptions options_;
  const AttentionRules& rules_;
  std::vector<Tensor> kept_;
  const bool packed_, paged_;
  const Tensor q_, k_, v_;
  Dtype dtype_, bias_dtype_ = Dtype::f32, sinks_dtype_ = Dtype::f32;
};

}  // namespace fastseq
