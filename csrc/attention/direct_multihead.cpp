// A whole MultiheadAttention in inference, called straight from Python: see recurrent/direct.cpp. x [rows, E] in
// whichever layout it came, each projection one matrix of rows:
//
//   [q k v] = x Wᵀ + b  (one product where query, key and value are one tensor, two where key and value are)
//   o = softmax(q kᵀ / sqrt(D)) v, a head's D columns at a time, read and written where they lie;  y = o W_oᵀ + b_o
//
// The products are torch's own, by the functions that its compiler's code calls, looked up by name: where torch has them
// no more, the layer is declined.
#include "attention/direct.h"
#include "attention/weights.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

// Set once by bind_multihead().
PyObject* names[4];  // in_proj_weight, in_proj_bias, weight, bias
AOTITorchError (*addmm_out)(AtenTensorHandle out, AtenTensorHandle b, AtenTensorHandle x, AtenTensorHandle w,
                            double beta, double alpha);
AOTITorchError (*mm_out)(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle w);

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
  // x [rows, K] to a new [rows, n].
  void run(AtenTensorHandle x, AtenTensorHandle to, int64_t K, int64_t from, int64_t n) {
    const Tensor w = viewed(weight.handle(), {K, n}, {1, K}, from * K);
    TORCH_ERROR_CODE_CHECK(bias.given()
                               ? addmm_out(to, viewed(bias.handle(), {n}, {1}, from).get(), x, w.get(), 1, 1)
                               : mm_out(to, x, w.get()));
  }
};

constexpr int64_t kMostWeightedKeys = 256;  // about where the weights take as long as everything else

thread_local Workspace unit_vectors;

class Multihead {
 public:
  // False: the fast path does not take the call. Arguments as `multihead` below.
  bool take(PyObject* const* args) {
    bool batch_first;
    if (!in_.take(args[0], names[0], names[1]) || !out_.take(args[1], names[2], names[3]) || !query_.take(args[2]) ||
        !key_.take(args[3]) || !value_.take(args[4]) || !bias_.take(args[5]) || !mask_.take(args[6]) ||
        !read(args[7], heads_) || !read(args[8], batch_first) || !read(args[9], call_.causal) ||
        !read(args[10], need_weights_) || !read(args[11], average_) || !fit(batch_first))
      return false;
    matrices_ = args[3] != args[4] ? 3 : args[2] != args[3] ? 2 : 1;  // of q, k and v: the same tensor is projected once
    return in_.fits(3 * E_, E_, query_.code) && out_.fits(E_, E_, query_.code) &&
           (!need_weights_ || (call_.length_k <= kMostWeightedKeys && accumulator_of(call_.dtype) == call_.dtype));
  }

  // (output, weights or None).
  PyObject* run() {
    const int64_t N = call_.batch, L = call_.length_q, S = call_.length_k;
    const Tensor y = empty(query_.sizes, rank_, call_.dtype), o = empty({N * L, E_}, call_.dtype);
    const int64_t shape[4] = {N, heads_, L, S}, mean[3] = {N, L, S}, alone = rank_ == 2;
    std::optional<Tensor> weights, averaged;
    if (need_weights_) weights = empty(shape + (average_ ? 0 : alone), average_ ? 4 : 4 - alone, call_.dtype);
    if (need_weights_ && average_) averaged = empty(mean + alone, 3 - alone, call_.dtype);
    compute(products(), [&] {
      attend(y, o);
      if (weights && call_.dtype == Dtype::f64) weigh<double>(*weights, averaged);
      if (weights && call_.dtype == Dtype::f32) weigh<float>(*weights, averaged);
    });
    Object output(wrapped(y)), matrix(weights ? wrapped(averaged ? *averaged : *weights) : nullptr);
    if (!output.get() || (weights && !matrix.get())) return nullptr;
    return PyTuple_Pack(2, output.get(), weights ? matrix.get() : Py_None);
  }

 private:
  void attend(const Tensor& y, const Tensor& o) {
    // Kept until the weights are made: they need q and k once more.
    q_ = project(query_, rows_q_, 0, matrices_ == 1 ? 3 : 1);
    k_ = matrices_ == 1 ? *q_ : project(key_, rows_k_, 1, matrices_ == 2 ? 2 : 1);
    v_ = matrices_ == 3 ? project(value_, rows_k_, 2, 1) : *k_;
    const int64_t width_q = matrices_ == 1 ? 3 * E_ : E_, width_k = (4 - matrices_) * E_;
    call_.q = heads_of(*q_, width_q, 0, call_.length_q);
    call_.k = heads_of(*k_, width_k, matrices_ == 1 ? E_ : 0, call_.length_k);
    call_.v = heads_of(*v_, width_k, width_k - E_, call_.length_k);
    call_.o = heads_of(o, E_, 0, call_.length_q);
    attend_into(call_);
    out_.run(o.get(), viewed(y.get(), {rows_q_, E_}, {E_, 1}, 0).get(), E_, 0, E_);
  }
  template <class A>
  void weigh(const Tensor& weights, const std::optional<Tensor>& mean) {
    A* const unit = static_cast<A*>(unit_vectors.of(size_t(call_.length_k * call_.length_k) * sizeof(A)));
    weigh_into(call_, attend_into, unit, static_cast<A*>(weights.data_ptr()), mean ? static_cast<A*>(mean->data_ptr()) : nullptr);
  }
  // x W^T + b with `matrices` of W_q, W_k, W_v from the `first` on: [rows, matrices * E].
  Tensor project(Strided& x, int64_t rows, int64_t first, int64_t matrices) {
    const Tensor to = empty({rows, matrices * E_}, call_.dtype);
    in_.run(viewed(x.handle(), {rows, E_}, {E_, 1}, 0).get(), to.get(), E_, first * E_, matrices * E_);
    return to;
  }

  // Shapes and masks, once the tensors are taken; false: the fast path does not take the call.
  bool fit(bool batch_first) {
    rank_ = query_.rank;
    E_ = rank_ > 0 ? query_.sizes[rank_ - 1] : 0;
    if (E_ == 0 || heads_ < 1 || E_ % heads_ != 0 || (rank_ != 2 && rank_ != 3)) return false;
    for (Strided* x : {&query_, &key_, &value_})
      if (x->rank != rank_ || x->code != query_.code || x->sizes[rank_ - 1] != E_ || !is_contiguous(x->handle()))
        return false;
    by_sequence_ = rank_ == 2 || batch_first;
    const int time = rank_ == 3 && batch_first ? 1 : 0;
    call_.batch = rank_ == 2 ? 1 : query_.sizes[1 - time];
    call_.length_q = query_.sizes[time], call_.length_k = key_.sizes[time];
    call_.heads_q = call_.heads_k = heads_, call_.dim = call_.dim_v = E_ / heads_, call_.bottom_right = false;
    rows_q_ = call_.batch * call_.length_q, rows_k_ = call_.batch * call_.length_k;
    return std::equal(key_.sizes, key_.sizes + rank_, value_.sizes) &&
           (rank_ == 2 || key_.sizes[1 - time] == call_.batch) && complete(call_, query_, bias_, mask_);
  }
  int64_t products() const { return 2 * E_ * (E_ * (rows_q_ + rows_k_) + rows_q_ * call_.length_k); }

  // The heads in rows of `width` elements, from `column` on.
  View heads_of(const Tensor& x, int64_t width, int64_t column, int64_t length) const {
    void* const data = static_cast<char*>(x.data_ptr()) + column * int64_t(bytes_of(call_.dtype));
    if (by_sequence_) return {data, length * width, call_.dim, width};
    return {data, width, call_.dim, call_.batch * width};
  }

  AttentionForward call_;
  Linear in_, out_;
  Strided query_, key_, value_, bias_, mask_;
  int64_t heads_, E_, rank_, rows_q_, rows_k_, matrices_;
  bool by_sequence_;  // a sequence's rows are neighbours, not a position's
  bool need_weights_, average_;
  std::optional<Tensor> q_, k_, v_;
};

}  // namespace

// multihead(parameters: dict, out_proj's: dict, query, key, value, bias, mask, heads, batch_first, causal, need_weights,
// average) -> (output, weights or None), or None.
PyObject* multihead(PyObject* const* args, Py_ssize_t count) {
  if (count != 12 || !addmm_out || !mm_out || !PyDict_Check(args[0]) || !PyDict_Check(args[1])) return decline();
  Multihead layer;
  return is_plain_call() && layer.take(args) ? layer.run() : decline();
}

void bind_multihead() {
  const char* text[] = {"in_proj_weight", "in_proj_bias", "weight", "bias"};
  for (int i = 0; i < 4; ++i)
    if (!names[i]) names[i] = PyUnicode_InternFromString(text[i]);
  if (void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    addmm_out = reinterpret_cast<decltype(addmm_out)>(dlsym(library, "aoti_torch_cpu_addmm_out"));
    mm_out = reinterpret_cast<decltype(mm_out)>(dlsym(library, "aoti_torch_cpu_mm_out"));
  }
}

}  // namespace fastseq
