// A whole MultiheadAttention, called straight from Python: see direct.cpp. x [rows, E] in whichever layout it came, each
// projection one matrix of rows:
//
//   [q k v] = x Wᵀ + b  (one product where query, key and value are one tensor, two where key and value are)
//   o = softmax(q kᵀ / sqrt(D)) v, a head's D columns at a time, read and written where they lie;  y = o W_oᵀ + b_o
//
// The products are torch's own, by the functions that its compiler's code calls, looked up by name: where torch has them
// no more, the layer is declined.
#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "direct_attention.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;
using AddmmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle b, AtenTensorHandle x, AtenTensorHandle w,
                                    double beta, double alpha);
using MmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle w);

// Set once by bind_multihead(). in_proj_weight, in_proj_bias; weight, bias.
PyObject* names[4];
AddmmOut addmm_out;
MmOut mm_out;

constexpr int64_t kMostWeightedKeys = 256;  // about where the weights take as long as everything else

thread_local Workspace unit_vectors;

Tensor viewed(AtenTensorHandle x, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
              int64_t offset) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x, int64_t(sizes.size()), sizes.begin(), strides.begin(), offset, &made));
  return Tensor(made);
}

// A linear layer: rows [from, from + n) of its weights [.., K] and of its bias, if it has one. All contiguous.
struct Linear {
  Strided weight, bias;

  bool take(PyObject* parameters, PyObject* weight_name, PyObject* bias_name) {
    return weight.take(PyDict_GetItem(parameters, weight_name)) && weight.given() &&
           bias.take(PyDict_GetItem(parameters, bias_name));
  }
  bool fits(int64_t rows, int64_t K, int32_t code) {
    return weight.is({rows, K}) && weight.code == code && is_contiguous(weight.handle()) &&
           (!bias.given() || (bias.is({rows}) && bias.code == code && is_contiguous(bias.handle())));
  }
  void run(AtenTensorHandle x, AtenTensorHandle to, int64_t K, int64_t from, int64_t n) {
    const Tensor w = viewed(weight.handle(), {K, n}, {1, K}, from * K);
    if (bias.given()) {
      const Tensor b = viewed(bias.handle(), {n}, {1}, from);
      TORCH_ERROR_CODE_CHECK(addmm_out(to, b.get(), x, w.get(), 1, 1));
    } else {
      TORCH_ERROR_CODE_CHECK(mm_out(to, x, w.get()));
    }
  }
};

// The matrix of weights [B, heads, Tq, Tk] of a call: its output for values that are the unit vectors. Sums of one p and
// of zeros, they are exact; the product takes Tk / D times what it takes with v.
template <class A>
bool weigh_into(AttentionForward call, A* weights) {
  const long keys = call.length_k;
  A* const unit = static_cast<A*>(unit_vectors.of(size_t(keys * keys) * sizeof(A)));
  std::fill(unit, unit + keys * keys, A(0));
  for (long j = 0; j < keys; ++j) unit[j * keys + j] = 1;
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

class Multihead {
 public:
  // False: something speaks against the short way. Arguments as `multihead` below.
  bool take(PyObject* const* args) {
    if (!in_.take(args[0], names[0], names[1]) || !out_.take(args[1], names[2], names[3])) return false;
    if (!query_.take(args[2]) || !key_.take(args[3]) || !value_.take(args[4]) || !bias_.take(args[5]) ||
        !mask_.take(args[6]))
      return false;
    products_ = args[3] != args[4] ? 3 : args[2] != args[3] ? 2 : 1;
    bool batch_first;
    if (!read(args[7], heads_) || !read(args[8], batch_first) || !read(args[9], call_.causal) ||
        !read(args[10], need_weights_) || !read(args[11], average_))
      return false;
    E_ = in_.weight.rank == 2 ? in_.weight.sizes[1] : 0;
    rank_ = query_.rank;
    if (E_ == 0 || heads_ < 1 || E_ % heads_ != 0 || (rank_ != 2 && rank_ != 3)) return false;
    if (!in_.fits(3 * E_, E_, query_.code) || !out_.fits(E_, E_, query_.code)) return false;
    for (Strided* x : {&query_, &key_, &value_})
      if (x->rank != rank_ || x->code != query_.code || x->sizes[rank_ - 1] != E_ || !is_contiguous(x->handle()))
        return false;
    for (int64_t i = 0; i < rank_; ++i)
      if (value_.sizes[i] != key_.sizes[i]) return false;
    by_sequence_ = rank_ == 2 || batch_first;
    const int time = rank_ == 3 && batch_first ? 1 : 0;
    call_.batch = rank_ == 2 ? 1 : query_.sizes[1 - time];
    call_.length_q = query_.sizes[time], call_.length_k = key_.sizes[time];
    if (std::min({call_.batch, call_.length_q, call_.length_k}) == 0) return false;
    if (rank_ == 3 && key_.sizes[1 - time] != call_.batch) return false;
    dtype_ = dtype_of(query_.handle());
    if (need_weights_ && (call_.length_k > kMostWeightedKeys || (dtype_ != Dtype::f32 && dtype_ != Dtype::f64)))
      return false;
    call_.dtype = attention_dtype(dtype_);
    call_.heads_q = call_.heads_k = heads_;
    call_.dim = call_.dim_v = E_ / heads_;
    call_.scale = scale_of(call_.dim), call_.bottom_right = false;
    call_.threads = int(torch::stable::get_num_threads());
    return take_pairs(call_, bias_, mask_, query_.code);
  }

  // (output, weights or None); null where there was no memory.
  PyObject* run() {
    const long N = call_.batch, L = call_.length_q, S = call_.length_k;
    const Tensor y = empty(query_.sizes, rank_, dtype_);
    std::optional<Tensor> heads_weights, weights;
    const int64_t shape[4] = {N, heads_, L, S}, mean[3] = {N, L, S}, alone = rank_ == 2;
    if (need_weights_) {
      heads_weights = empty(shape + (average_ ? 0 : alone), average_ ? 4 : 4 - alone, dtype_);
      weights = average_ ? empty(mean + alone, 3 - alone, dtype_) : *heads_weights;
    }
    bool enough = false;
    compute(2 * E_ * (E_ * (N * L + N * S) + N * L * S), [&] {
      enough = attend(y);
      if (enough && need_weights_)
        enough = dtype_ == Dtype::f64 ? weigh<double>(*heads_weights, *weights) : weigh<float>(*heads_weights, *weights);
    });
    if (!enough) return nullptr;
    Object output(wrapped(y)), matrix(weights ? wrapped(*weights) : nullptr);
    if (!output.get() || (weights && !matrix.get())) return nullptr;
    return PyTuple_Pack(2, output.get(), weights ? matrix.get() : Py_None);
  }

 private:
  bool attend(const Tensor& y) {
    const long N = call_.batch, L = call_.length_q, S = call_.length_k;
    const int64_t widths[] = {3 * E_, 2 * E_, E_}, width = widths[products_ - 1];  // of the matrix that holds k
    // Kept until the weights are made: they need q and k once more.
    q_ = project(query_, N * L, 0, products_ == 1 ? 3 : 1);
    k_ = products_ == 1 ? *q_ : project(key_, N * S, 1, products_ == 2 ? 2 : 1);
    v_ = products_ == 3 ? project(value_, N * S, 2, 1) : *k_;
    call_.q = heads_of(*q_, products_ == 1 ? 3 * E_ : E_, 0, L);
    call_.k = heads_of(*k_, width, products_ == 1 ? E_ : 0, S);
    call_.v = heads_of(*v_, width, width - E_, S);
    const Tensor o = empty({N * L, E_}, dtype_);
    call_.o = heads_of(o, E_, 0, L);
    if (!attend_into(call_)) return false;
    out_.run(o.get(), viewed(y.get(), {N * L, E_}, {E_, 1}, 0).get(), E_, 0, E_);
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
  // The heads in `x`, whose rows are of `width` elements, from `column` on.
  AttentionCall::View heads_of(const Tensor& x, int64_t width, int64_t column, int64_t length) const {
    char* const data = static_cast<char*>(x.data_ptr()) + column * int64_t(bytes_of(dtype_));
    if (by_sequence_) return {data, length * width, call_.dim, width};
    return {data, width, call_.dim, call_.batch * width};
  }

  Linear in_, out_;
  Strided query_, key_, value_, bias_, mask_;
  AttentionForward call_;
  long heads_;
  int products_;                               // for q, k and v together
  bool by_sequence_, need_weights_, average_;  // by_sequence: a sequence's rows are neighbours, not a position's
  int64_t E_, rank_;
  Dtype dtype_;
  std::optional<Tensor> q_, k_, v_;
};

}  // namespace

// multihead(parameters: dict, out_proj's: dict, query, key, value, bias, mask, heads, batch_first, causal, need_weights,
// average) -> (output, weights or None), or None.
PyObject* multihead(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 12 || !addmm_out || !mm_out || !PyDict_Check(args[0]) || !PyDict_Check(args[1])) return decline();
  Multihead layer;
  if (!nothing_speaks_against_it() || !layer.take(args)) return decline();
  PyObject* made = layer.run();
  return made ? made : decline();
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
