// MultiheadAttention forward: see direct_multihead.h.
#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "direct_multihead.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMostWeightedKeys = 256;  // about where the weights take as long as everything else

thread_local Workspace unit_vectors;

// The matrix of weights [B, heads, Tq, Tk] of a call: its output for values that are the unit vectors. Sums of one p and
// of zeros, they are exact; the product takes Tk / D times what it takes with v.
template <class A>
bool weigh_into(AttentionForward call, A* weights) {
  const long keys = call.length_k;
  A* const unit = static_cast<A*>(unit_vectors.of(size_t(keys * keys) * sizeof(A)));
  std::fill(unit, unit + keys * keys, A(0));
  for (long j = 0; j < keys; ++j) unit[j * keys + j] = 1;
  call.lse.data = nullptr;  // whoever wanted it has it
  call.v = {unit, 0, 0, keys};
  call.dim_v = keys;
  call.o = {weights, call.heads_q * call.length_q * keys, call.length_q * keys, keys};
  return attend_into(call);
}
// Their mean over the heads.
template <class A>
void average(const AttentionCall& call, const A* weights, A* mean) {
  const long pairs = call.length_q * call.length_k;
  for (long b = 0; b < call.batch; ++b, mean += pairs) {
    std::fill(mean, mean + pairs, A(0));
    for (long h = 0; h < call.heads_q; ++h, weights += pairs)
      for (long i = 0; i < pairs; ++i) mean[i] += weights[i];
    for (long i = 0; i < pairs; ++i) mean[i] /= A(call.heads_q);
  }
}

class Multihead : Layer {
 public:
  // False: something speaks against the short way. Arguments as `multihead` below.
  bool take(PyObject* const* args) {
    if (!in_.take(args[0], names[0], names[1]) || !out_.take(args[1], names[2], names[3])) return false;
    if (!query_.take(args[2]) || !key_.take(args[3]) || !value_.take(args[4]) || !bias_.take(args[5]) ||
        !mask_.take(args[6]))
      return false;
    count(args[2], args[3], args[4]);
    bool batch_first;
    if (!read(args[7], heads_) || !read(args[8], batch_first) || !read(args[9], call_.causal) ||
        !read(args[10], need_weights_) || !read(args[11], average_) || !fit(call_, batch_first))
      return false;
    if (need_weights_ && (call_.length_k > kMostWeightedKeys || (dtype_ != Dtype::f32 && dtype_ != Dtype::f64)))
      return false;
    return in_.fits(3 * E_, E_, query_.code) && out_.fits(E_, E_, query_.code);
  }

  // (output, weights or None), and with `records` (.., q, k or None, v or None, o, lse) for the gradient; null where
  // there was no memory.
  PyObject* run(bool records) {
    const long N = call_.batch, L = call_.length_q, S = call_.length_k;
    const Tensor y = empty(query_.sizes, rank_, dtype_);
    const Tensor o = empty({N * L, E_}, dtype_);
    std::optional<Tensor> heads_weights, weights, lse;
    const int64_t shape[4] = {N, heads_, L, S}, mean[3] = {N, L, S}, alone = rank_ == 2;
    if (need_weights_) {
      heads_weights = empty(shape + (average_ ? 0 : alone), average_ ? 4 : 4 - alone, dtype_);
      weights = average_ ? empty(mean + alone, 3 - alone, dtype_) : *heads_weights;
    }
    if (records) {
      lse = empty(shape, 3, accumulator_of(dtype_));
      call_.lse.data = lse->data_ptr();
    }
    bool enough = false;
    compute(products(call_), [&] {
      const Unrecorded guard;
      enough = attend(y, o);
      if (enough && need_weights_)
        enough = dtype_ == Dtype::f64 ? weigh<double>(*heads_weights, *weights) : weigh<float>(*heads_weights, *weights);
    });
    if (!enough) return nullptr;
    Object output(wrapped(y)), matrix(weights ? wrapped(*weights) : nullptr);
    if (!output.get() || (weights && !matrix.get())) return nullptr;
    PyObject* const second = weights ? matrix.get() : Py_None;
    if (!records) return PyTuple_Pack(2, output.get(), second);
    Object q(wrapped(*q_)), k(matrices_ > 1 ? wrapped(*k_) : nullptr), v(matrices_ > 2 ? wrapped(*v_) : nullptr);
    Object attended(wrapped(o)), denominators(wrapped(*lse));
    if (!q.get() || (matrices_ > 1 && !k.get()) || (matrices_ > 2 && !v.get()) || !attended.get() ||
        !denominators.get())
      return nullptr;
    return PyTuple_Pack(7, output.get(), second, q.get(), k.get() ? k.get() : Py_None, v.get() ? v.get() : Py_None,
                        attended.get(), denominators.get());
  }

 private:
  bool attend(const Tensor& y, const Tensor& o) {
    // Kept until the weights are made: they need q and k once more.
    q_ = project(query_, rows_q_, 0, matrices_ == 1 ? 3 : 1);
    k_ = matrices_ == 1 ? *q_ : project(key_, rows_k_, 1, matrices_ == 2 ? 2 : 1);
    v_ = matrices_ == 3 ? project(value_, rows_k_, 2, 1) : *k_;
    place(call_, call_.q, call_.k, call_.v, q_->data_ptr(), k_->data_ptr(), v_->data_ptr());
    call_.o = heads_of(o.data_ptr(), E_, 0, call_.length_q, call_);
    if (!attend_into(call_)) return false;
    out_.run(o.get(), viewed(y.get(), {rows_q_, E_}, {E_, 1}, 0).get(), E_, 0, E_);
    return true;
  }
  template <class A>
  bool weigh(const Tensor& heads_weights, const Tensor& weights) {
    A* const all = static_cast<A*>(heads_weights.data_ptr());
    if (!weigh_into(call_, all)) return false;
    if (average_) average(call_, all, static_cast<A*>(weights.data_ptr()));
    return true;
  }
  // x W^T + b with `matrices` of W_q, W_k, W_v from the `first` on: [rows, matrices * E].
  Tensor project(Strided& x, int64_t rows, int64_t first, int64_t matrices) {
    const Tensor to = empty({rows, matrices * E_}, dtype_);
    in_.run(viewed(x.handle(), {rows, E_}, {E_, 1}, 0).get(), to.get(), E_, first * E_, matrices * E_);
    return to;
  }

  AttentionForward call_;
  bool need_weights_, average_;
  std::optional<Tensor> q_, k_, v_;
};

PyObject* run(PyObject* const* args, Py_ssize_t count, bool records) {
  if (count != 12 || !addmm_out || !mm_out || !PyDict_Check(args[0]) || !PyDict_Check(args[1])) return decline();
  Multihead layer;
  if (!nothing_speaks_against_it(records) || !layer.take(args)) return decline();
  PyObject* made = layer.run(records);
  return made ? made : decline();
}

}  // namespace

// multihead(parameters: dict, out_proj's: dict, query, key, value, bias, mask, heads, batch_first, causal, need_weights,
// average) -> (output, weights or None), or None.
PyObject* multihead(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  return run(args, count, false);
} catch (const std::exception&) {
  return decline();
}

// multihead_forward(...) -> (output, weights or None, q, k or None, v or None, o, lse), or None: as `multihead`, and
// gradients may be on. q, k and v lie side by side in q, or k and v in k, where they were projected together.
PyObject* multihead_forward(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  return run(args, count, true);
} catch (const std::exception&) {
  return decline();
}

void bind_multihead() {
  const char* text[] = {"in_proj_weight", "in_proj_bias", "weight", "bias"};
  for (int i = 0; i < 4; ++i)
    if (!names[i]) names[i] = PyUnicode_InternFromString(text[i]);
#if defined(__linux__)
  if (void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    addmm_out = reinterpret_cast<AddmmOut>(dlsym(library, "aoti_torch_cpu_addmm_out"));
    mm_out = reinterpret_cast<MmOut>(dlsym(library, "aoti_torch_cpu_mm_out"));
  }
#endif
}

}  // namespace fastseq
