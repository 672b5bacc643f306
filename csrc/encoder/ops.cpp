// torch.ops.fastseq.feed_forward on the CPU. The schema, with every shape, is in fastseq/ops/schemas.py.
#include <algorithm>

#include "core/ops.h"
#include "encoder/cpu/feed_forward.h"
#include "recurrent/marshal.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;
using Optional = OptionalTensor;

// The elements of a contiguous float32 tensor of this shape; null for none.
const float* elements(const char* name, const Optional& x, std::initializer_list<int64_t> shape) {
  if (!x) return nullptr;
  check_readable(name, x->get());
  const int64_t* const sizes = sizes_of(x->get());
  FASTSEQ_CHECK(rank_of(x->get()) == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), sizes),
                  "feed_forward: ", name, " does not have the shape that x and the matrices before it ask for");
  FASTSEQ_CHECK(dtype_of(x->get()) == Dtype::f32 && is_contiguous(x->get()), "feed_forward: ", name,
                  " must be contiguous and of float32");
  return static_cast<const float*>(x->data_ptr());
}

Product product(const char* name, const Optional& w, const Optional& bias, int64_t in) {
  if (!w) return {};
  FASTSEQ_CHECK(w->dim() == 2 && w->size(0) % kProductColumns == 0, "feed_forward: ", name,
                  " must be a matrix whose rows are a multiple of ", kProductColumns);
  const int64_t out = w->size(0);
  return {elements(name, w, {out, in}), elements("bias", bias, {out}), in, out};
}

LayerNorm norm(const Optional& weight, const Optional& bias, double eps, int64_t features) {
  return {elements("a norm's weight", weight, {features}), elements("a norm's bias", bias, {features}), eps};
}

}  // namespace

Tensor feed_forward_cpu(const Tensor& x, const Tensor& w1, const Optional& b1, const Optional& w2, const Optional& b2,
                        const Optional& residual, const Optional& before_weight, const Optional& before_bias,
                        const Optional& after_weight, const Optional& after_bias, double eps, int64_t activation) {
  FASTSEQ_CHECK(x.dim() == 2, "feed_forward: x must be [rows, features]");
  FASTSEQ_CHECK(activation >= 0 && activation <= 2, "feed_forward: activation must be 0, 1 or 2, got ", activation);
  FeedForward p{};
  p.rows = x.size(0);
  p.threads = int(torch::stable::get_num_threads());
  p.activation = Activation(activation);
  p.first = product("w1", w1, b1, x.size(1));
  p.second = product("w2", w2, b2, p.first.out);
  const int64_t out = w2 ? p.second.out : p.first.out;
  p.x = elements("x", x, {p.rows, x.size(1)});
  p.residual = elements("residual", residual, {p.rows, out});
  p.before = norm(before_weight, before_bias, eps, x.size(1));
  p.after = norm(after_weight, after_bias, eps, out);
  Tensor y = empty({p.rows, out}, Dtype::f32);
  if (p.rows == 0 || out == 0) return y;
  p.y = static_cast<float*>(y.data_ptr());
  p.workspace = scratch().of(FASTSEQ_DISPATCH(feed_forward_workspace, p));
  FASTSEQ_DISPATCH(feed_forward, p);
  return y;
}

}  // namespace fastseq
