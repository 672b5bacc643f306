#include "attention/marshal.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "attention/layout.h"

namespace fastseq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype number_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: refuse("attention: ", name, " must be float64, float32, bfloat16 or float16");
  }
}

// 0 where there is one index only, whatever the tensor says.
int64_t stride_of(const Tensor& x, int64_t i) { return x.size(i) == 1 ? 0 : x.stride(i); }

// Offsets of packed sequences, checked; the longest sequence.
int64_t longest(const int32_t* offsets, int64_t batch, int64_t total, const char* name) {
  int64_t result = 0;
  FASTSEQ_CHECK(offsets[0] == 0, "attention: ", name, " must begin with 0, got ", offsets[0]);
  for (int64_t b = 0; b < batch; ++b) {
    FASTSEQ_CHECK(offsets[b + 1] >= offsets[b], "attention: ", name, " must not decrease");
    result = std::max<int64_t>(result, offsets[b + 1] - offsets[b]);
  }
  FASTSEQ_CHECK(offsets[batch] <= total, "attention: ", name, " ends at ", offsets[batch], ", past the ", total,
                " rows that there are");
  return result;
}

void check_lengths(const int64_t* lengths, int64_t batch, int64_t most, const char* name) {
  for (int64_t b = 0; lengths && b < batch; ++b)
    FASTSEQ_CHECK(lengths[b] >= 0 && lengths[b] <= most, "attention: ", name, "[", b, "] is ", lengths[b],
                  ", outside 0..", most);
}

}  // namespace

template <class Size>
AttentionTensors::AttentionTensors(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& x,
                                   const AttentionRules& rules, AttentionArguments<Size>& call)
    : options_(x), rules_(rules), packed_(x.cu_seqlens_q.has_value()),
      paged_(x.block_table.has_value()), q_(with_unit_rows("q", q, q)),
      k_(with_unit_rows("k", k, q)), v_(with_unit_rows("v", v, q)), dtype_(number_of(q, "q")) {
  const int64_t rank = packed_ ? 3 : 4, rank_k = paged_ ? 4 : rank, heads = paged_ ? 2 : 1;
  const int64_t length = packed_ ? 0 : 2, length_k = paged_ ? 1 : length;  // which dimension
  FASTSEQ_CHECK(q.dim() == rank && k.dim() == rank_k && v.dim() == rank_k, "attention: q must have ", rank,
                " dimensions, k and v ", rank_k, ", got ", q.dim(), ", ", k.dim(), " and ", v.dim());
  FASTSEQ_CHECK(x.k_scale.has_value() == x.v_scale.has_value(), "attention: k_scale and v_scale come together");
  FASTSEQ_CHECK(!x.k_scale || (rules.reads_caches && dtype_ != Dtype::f64),
                "attention: these kernels read no int8 keys (k_scale); those that do take no float64");
  const ScalarType type_k = x.k_scale ? ScalarType::Char : q.scalar_type();
  FASTSEQ_CHECK(k.scalar_type() == type_k && v.scalar_type() == type_k,
                "attention: q, k and v must have one dtype, or with k_scale k and v int8");
  const int64_t dim = q.size(rank - 1), dim_v = v.size(rank_k - 1), heads_q = q.size(1), heads_k = k.size(heads);
  const char* refusal = rules.refusal(dtype_, dim, dim_v);
  FASTSEQ_CHECK(!refusal, "attention: ", refusal);
  FASTSEQ_CHECK(!paged_ || rules.reads_caches, "attention: these kernels read no pages (block_table)");
  FASTSEQ_CHECK((packed_ && !paged_) == x.cu_seqlens_k.has_value(),
                "attention: cu_seqlens_q and cu_seqlens_k come together, without block_table");
  FASTSEQ_CHECK(!packed_ || !(x.bias || x.mask || x.lengths_q || (x.lengths_k && !paged_)),
                "attention: bias, mask and lengths belong to the padded layout, not to cu_seqlens");
  FASTSEQ_CHECK(v.size(heads) == heads_k && v.size(length_k) == k.size(length_k),
                "attention: k and v differ in heads or length");
  FASTSEQ_CHECK(k.size(rank_k - 1) == dim, "attention: q has ", dim, " features, k has ", k.size(rank_k - 1));
  FASTSEQ_CHECK(heads_k > 0 ? heads_q > 0 && heads_q % heads_k == 0 : heads_q == 0, "attention: ", heads_q,
                " query heads cannot share ", heads_k, " key heads");
  const int64_t batch = packed_ ? x.cu_seqlens_q->numel() - 1 : q.size(0), total_q = q.size(length);
  FASTSEQ_CHECK(packed_ ? batch >= 0 : paged_ || (k.size(0) == batch && v.size(0) == batch),
                packed_ ? "attention: cu_seqlens_q is empty" : "attention: q, k and v differ in batch size");
  FASTSEQ_CHECK(!paged_ || (v.size(0) == k.size(0) && x.lengths_k && x.block_table->dim() == 2 &&
                            x.block_table->size(0) == batch && x.block_table->scalar_type() == ScalarType::Int),
                "attention: pages need as many of k as of v, lengths_k and an int32 block_table [B, pages]");
  const int64_t total_k = k.size(length_k) * (paged_ ? x.block_table->size(1) : 1);
  FASTSEQ_CHECK(std::max({total_q, total_k, batch * heads_q}) <= rules.most_rows,
                "attention: these kernels take up to ", rules.most_rows, " rows and as many heads in all");
  call.dtype = dtype_;
  call.batch = Size(batch), call.heads_q = Size(heads_q), call.heads_k = Size(heads_k);
  call.dim = Size(dim), call.dim_v = Size(dim_v), call.length_q = Size(total_q), call.length_k = Size(total_k);
  call.q = view(q_), call.k = keys_view(k_), call.v = keys_view(v_);
  call.k_scale = scale_view(x.k_scale, "k_scale", k_), call.v_scale = scale_view(x.v_scale, "v_scale", v_);
  call.cu_q = vector<int32_t>(x.cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, batch + 1);
  call.cu_k = vector<int32_t>(x.cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, batch + 1);
  call.lengths_q = vector<int64_t>(x.lengths_q, "lengths_q", ScalarType::Long, batch);
  call.lengths_k = vector<int64_t>(x.lengths_k, "lengths_k", ScalarType::Long, batch);
  call.prefix = vector<int64_t>(x.prefix_lengths, "prefix_lengths", ScalarType::Long, batch);
  if (rules.looks_at_values) {
    if (packed_) call.length_q = Size(longest(call.cu_q, batch, total_q, "cu_seqlens_q"));
    if (call.cu_k) call.length_k = Size(longest(call.cu_k, batch, total_k, "cu_seqlens_k"));
    check_lengths(call.lengths_q, batch, total_q, "lengths_q");
    check_lengths(call.lengths_k, batch, total_k, "lengths_k");
    check_lengths(call.prefix, batch, total_k, "prefix_lengths");
  }
  if (paged_) {
    rules.check("block_table", *x.block_table, q_);
    call.pages = static_cast<const int32_t*>(keep(rules.contiguous(*x.block_table)).data_ptr());
    call.page = Size(k.size(1)), call.table_row = Size(x.block_table->size(1));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i * k.size(1) < call.lengths_k[b]; ++i) {
        const int64_t page = call.pages[b * call.table_row + i];
        FASTSEQ_CHECK(page >= 0 && page < k.size(0), "attention: block_table[", b, ", ", i, "] is ", page, ", outside 0..",
                      k.size(0) - 1);
      }
  }
  const int64_t shape[4] = {batch, heads_q, total_q, total_k};
  call.bias = pairs(x.bias, "bias", shape), call.bias_dtype = bias_dtype_ = dtype_beside_q(x.bias, "bias");
  FASTSEQ_CHECK(!x.mask || x.mask->scalar_type() == ScalarType::Bool, "attention: mask must be bool");
  call.mask = pairs(x.mask, "mask", shape);
  call.sinks_dtype = sinks_dtype_ = dtype_beside_q(x.sinks, "sinks");
  if (x.sinks) call.sinks = vector<void>(x.sinks, "sinks", x.sinks->scalar_type(), heads_q);
  const bool wide = x.alibi_slopes && x.alibi_slopes->scalar_type() == ScalarType::Double && dtype_ == Dtype::f64;
  call.alibi = vector<void>(x.alibi_slopes, "alibi_slopes", wide ? ScalarType::Double : ScalarType::Float, heads_q);
  call.alibi_dtype = wide ? Dtype::f64 : Dtype::f32;
  if (x.dropout_p > 0) {
    FASTSEQ_CHECK(x.seed, "attention: dropout_p > 0 needs a seed, an int64 tensor of shape [1]");
    call.seed = vector<int64_t>(x.seed, "seed", ScalarType::Long, 1);
  }
  call.scale = x.scale, call.softcap = x.softcap, call.dropout_p = x.dropout_p;
  call.causal = x.causal, call.bottom_right = x.bottom_right;
  call.window_left = x.window_left, call.window_right = x.window_right;
}
template AttentionTensors::AttentionTensors(const Tensor&, const Tensor&, const Tensor&, const AttentionOptions&,
                                            const AttentionRules&, AttentionArguments<int64_t>&);
template AttentionTensors::AttentionTensors(const Tensor&, const Tensor&, const Tensor&, const AttentionOptions&,
                                            const AttentionRules&, AttentionArguments<int32_t>&);

Tensor AttentionTensors::with_unit_rows(const char* name, const Tensor& x, const Tensor& q) const {
  rules_.check(name, x, q);
  const int64_t last = x.dim() - 1;
  return last < 0 || x.stride(last) == 1 || x.size(last) <= 1 ? x : rules_.contiguous(x);
}

const Tensor& AttentionTensors::keep(const Tensor& x) {
  kept_.push_back(x);
  return kept_.back();
}

Sizes AttentionTensors::sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }
Sizes AttentionTensors::o_sizes() const {
  Sizes sizes = sizes_of(q_);
  sizes.back() = v_.size(v_.dim() - 1);
  return sizes;
}
Sizes AttentionTensors::row_sizes() const {
  return packed_ ? Sizes{q_.size(1), q_.size(0)} : Sizes{q_.size(0), q_.size(1), q_.size(2)};
}

Tensor AttentionTensors::empty(const Sizes& sizes, Dtype dtype) const {
  int64_t strides[kMostDimensions], step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  return rules_.empty(q_, sizes, strides, dtype);
}
Tensor AttentionTensors::empty_as(const Tensor& x, const Sizes& sizes) const {
  int64_t strides[kMostDimensions];
  strides_as(x.dim(), x.sizes().data(), x.strides().data(), sizes.data(), strides);
  return rules_.empty(x, sizes, strides, dtype_);
}

View AttentionTensors::view(const Tensor& x) const {
  return {x.data_ptr(), packed_ ? 0 : stride_of(x, 0), stride_of(x, 1), stride_of(x, packed_ ? 0 : 2)};
}
View AttentionTensors::keys_view(const Tensor& x) const {
  return paged_ ? View{x.data_ptr(), stride_of(x, 0), stride_of(x, 2), stride_of(x, 1)} : view(x);
}
View AttentionTensors::scale_view(const MaybeTensor& x, const char* name, const Tensor& rows) const {
  if (!x) return {};
  Sizes sizes = sizes_of(rows);
  sizes.back() = 1;
  FASTSEQ_CHECK(x->scalar_type() == ScalarType::Float && sizes_of(*x) == sizes, "attention: ", name,
                " must be float32, one number for each row of ", name[0]);
  rules_.check(name, *x, q_);
  return keys_view(*x);
}
View AttentionTensors::row_view(const Tensor& x) const {
  return {x.data_ptr(), packed_ ? 0 : stride_of(x, 0), stride_of(x, packed_ ? 0 : 1), 1};
}

View AttentionTensors::given(const Tensor& x, const char* name) {
  check_given(x, name, o_sizes(), dtype_);
  return view(keep(with_unit_rows(name, x, q_)));
}
View AttentionTensors::given_rows(const Tensor& x, const char* name) {
  check_given(x, name, row_sizes(), accumulator_of(dtype_));
  return row_view(keep(rules_.contiguous(x)));
}
void AttentionTensors::check_given(const Tensor& x, const char* name, const Sizes& sizes, Dtype dtype) const {
  rules_.check(name, x, q_);
  FASTSEQ_CHECK(number_of(x, name) == dtype, "attention: ", name, " has another dtype than the forward pass gave");
  FASTSEQ_CHECK(sizes_of(x) == sizes, "attention: ", name, " has another shape than the forward pass gave");
}

template <class T>
const T* AttentionTensors::vector(const MaybeTensor& x, const char* name, ScalarType type, int64_t size) {
  if (!x) return nullptr;
  FASTSEQ_CHECK(x->scalar_type() == type, "attention: ", name, " must be ",
                type == ScalarType::Int ? "int32" : type == ScalarType::Long ? "int64" : "float32, or float64 as q is");
  FASTSEQ_CHECK(x->dim() == 1 && x->size(0) == size, "attention: ", name, " must be of shape [", size, "]");
  rules_.check(name, *x, q_);
  return static_cast<const T*>(keep(rules_.contiguous(*x)).data_ptr());
}

Dtype AttentionTensors::dtype_beside_q(const MaybeTensor& x, const char* name) const {
  const Dtype dtype = x ? number_of(*x, name) : Dtype::f32;
  FASTSEQ_CHECK(dtype == dtype_ || dtype == Dtype::f32, "attention: ", name, " must have q's dtype or float32");
  return dtype;
}

Pairs AttentionTensors::pairs(const MaybeTensor& x, const char* name, const int64_t (&wanted)[4]) const {
  if (!x) return {};
  FASTSEQ_CHECK(x->dim() == 4, "attention: ", name, " must have 4 dimensions, got ", x->dim());
  rules_.check(name, *x, q_);
  for (int64_t i = 0; i < 4; ++i)
    FASTSEQ_CHECK(x->size(i) == 1 || x->size(i) == wanted[i], "attention: ", name, " has size ", x->size(i),
                  " in dimension ", i, ", neither 1 nor ", wanted[i]);
  return {x->data_ptr(), stride_of(*x, 0), stride_of(*x, 1), stride_of(*x, 2), stride_of(*x, 3)};
}

}  // namespace fastseq
