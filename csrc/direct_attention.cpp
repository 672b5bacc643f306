// Attention of dense tensors, and a whole MultiheadAttention, called straight from Python: see direct.cpp.
//
// MultiheadAttention, x [rows, E] in whichever layout it came, each projection one matrix of rows:
//
//   [q k v] = x Wᵀ + b  (one product where query, key and value are one tensor, two where key and value are)
//   o = softmax(q kᵀ / sqrt(D)) v, a head's D columns at a time, read and written where they lie;  y = o W_oᵀ + b_o
//
// The products are torch's own, by the functions that its compiler's code calls, looked up by name: where torch has them
// no more, the layer is declined.
#include <algorithm>
#include <cmath>
#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "cpu/attention.h"
#include "direct_objects.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;
using AddmmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle b, AtenTensorHandle x, AtenTensorHandle w,
                                    double beta, double alpha);
using MmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle w);

// Set once by bind_attention(). in_proj_weight, in_proj_bias; weight, bias.
PyObject* names[4];
AddmmOut addmm_out;
MmOut mm_out;

constexpr int64_t kMostWeightedKeys = 256;  // about where the weights take as long as everything else

thread_local Workspace denominators;  // lse, which the kernel writes and nobody here asked for
thread_local Workspace unit_vectors;

AttentionCall::Dtype attention_dtype(Dtype dtype) {
  return dtype == Dtype::f64    ? AttentionCall::Dtype::f64
         : dtype == Dtype::f32  ? AttentionCall::Dtype::f32
         : dtype == Dtype::bf16 ? AttentionCall::Dtype::bf16
                                : AttentionCall::Dtype::f16;
}

// An ordinary tensor on the CPU, looked through once and kept alive: other threads may run meanwhile.
class Strided {
 public:
  // False: no ordinary tensor. None is no tensor, and fine.
  bool take(PyObject* object) {
    if (!object) return false;
    Py_INCREF(object);
    kept_.reset(object);
    if (!borrowed_.take(object)) return false;
    if (!given()) return true;
    int64_t *its_sizes, *its_strides;
    int32_t device;
    rank = rank_of(handle());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle(), &its_sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle(), &its_strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle(), &code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle(), &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle(), &device));
    sizes = its_sizes, strides = its_strides;
    return device == aoti_torch_device_type_cpu();
  }
  bool given() const { return borrowed_.impl; }
  AtenTensorHandle handle() { return borrowed_.handle(); }
  bool is(std::initializer_list<int64_t> shape) const {
    bool same = rank == int64_t(shape.size());
    for (int64_t i = 0; same && i < rank; ++i) same = sizes[i] == shape.begin()[i];
    return same;
  }
  bool has_unit_rows() const { return strides[rank - 1] == 1 || sizes[rank - 1] == 1; }

  int64_t rank = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
  int32_t code = -1;
  void* data = nullptr;

 private:
  Borrowed borrowed_;
  Object kept_{nullptr};
};

// Exact types only: whatever else converts to them is for the careful way to judge.
bool read(PyObject* object, bool& to) {
  to = object == Py_True;
  return to || object == Py_False;
}
bool read(PyObject* object, double& to) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
  to = PyFloat_AsDouble(object);
  return !PyErr_Occurred() && std::isfinite(to);
}
bool read(PyObject* object, long& to) {
  if (!PyLong_CheckExact(object)) return false;
  to = PyLong_AsLong(object);
  return !PyErr_Occurred() && to >= -1;
}

double scale_of(int64_t dim) { return std::pow(double(dim), -0.5); }

// A limit for both sides, or None.
bool read_window(PyObject* object, AttentionCall& call) {
  if (object == Py_None) return true;
  return PyTuple_CheckExact(object) && PyTuple_Size(object) == 2 &&
         read(PyTuple_GetItem(object, 0), call.window_left) && read(PyTuple_GetItem(object, 1), call.window_right);
}

// Bias or mask, broadcast where it has a size of 1 or no such dimension.
bool take_scores(const AttentionCall& call, const Strided& x, AttentionCall::Scores& to) {
  if (!x.given()) return true;
  const int64_t wanted[4] = {call.batch, call.heads_q, call.length_q, call.length_k}, missing = 4 - x.rank;
  if (missing < 0) return false;
  to.data = x.data;
  for (int64_t i = 0; i < x.rank; ++i) {
    if (x.sizes[i] != 1 && x.sizes[i] != wanted[missing + i]) return false;
    to.stride[missing + i] = x.sizes[i] == 1 ? 0 : x.strides[i];
  }
  return true;
}
bool take_pairs(AttentionCall& call, Strided& bias, const Strided& mask, int32_t code) {
  if (!take_scores(call, bias, call.bias) || !take_scores(call, mask, call.mask)) return false;
  if (bias.given() && bias.code != code && bias.code != aoti_torch_dtype_float32()) return false;
  if (bias.given()) call.bias_dtype = attention_dtype(dtype_of(bias.handle()));
  return !mask.given() || mask.code == aoti_torch_dtype_bool();
}

// The call, into o; false where there was no memory.
bool attend_into(AttentionForward& call) {
  const size_t number = call.dtype == AttentionCall::Dtype::f64 ? 8 : 4;
  call.lse = {denominators.of(size_t(call.batch * call.heads_q * call.length_q) * number),
              call.heads_q * call.length_q, call.length_q, 1};
  call.threads = int(torch::stable::get_num_threads());
  return run_attention(call);
}

}  // namespace

// attend(q, k, v, bias, mask, scale, causal, bottom_right, window, softcap, grouped) -> o or None: q, k and v of four
// dimensions; scale None: 1 / sqrt(D); grouped: k and v may have fewer heads.
PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  Strided q, k, v, bias, mask;
  if (count != 11 || !nothing_speaks_against_it()) return decline();
  if (!q.take(args[0]) || !k.take(args[1]) || !v.take(args[2]) || !bias.take(args[3]) || !mask.take(args[4]))
    return decline();
  if (q.rank != 4 || k.rank != 4 || v.rank != 4 || k.code != q.code || v.code != q.code) return decline();
  AttentionForward call;
  call.batch = q.sizes[0], call.heads_q = q.sizes[1], call.length_q = q.sizes[2], call.dim = q.sizes[3];
  call.heads_k = k.sizes[1], call.length_k = k.sizes[2], call.dim_v = v.sizes[3];
  bool grouped;
  if (!read(args[6], call.causal) || !read(args[7], call.bottom_right) || !read_window(args[8], call) ||
      !read(args[9], call.softcap) || !read(args[10], grouped) || call.softcap < 0)
    return decline();
  call.scale = scale_of(call.dim);
  if (args[5] != Py_None && !read(args[5], call.scale)) return decline();
  if (std::min({call.batch, call.heads_q, call.length_q, call.heads_k, call.length_k, call.dim, call.dim_v}) == 0 ||
      !k.is({call.batch, call.heads_k, call.length_k, call.dim}) ||
      !v.is({call.batch, call.heads_k, call.length_k, call.dim_v}) || call.heads_q % call.heads_k != 0 ||
      (!grouped && call.heads_q != call.heads_k) || !q.has_unit_rows() || !k.has_unit_rows() || !v.has_unit_rows() ||
      !take_pairs(call, bias, mask, q.code))
    return decline();
  const Dtype dtype = dtype_of(q.handle());
  call.dtype = attention_dtype(dtype);
  for (auto [view, x] : {std::pair(&call.q, &q), std::pair(&call.k, &k), std::pair(&call.v, &v)})
    *view = {x->data, x->strides[0], x->strides[1], x->strides[2]};
  const int64_t sizes[4] = {call.batch, call.heads_q, call.length_q, call.dim_v};
  Object o(make(sizes, 4, dtype, call.o.data));
  if (!o.get()) return decline();
  call.o.row = call.dim_v, call.o.head = call.length_q * call.o.row, call.o.batch = call.heads_q * call.o.head;
  bool enough = false;
  compute(call.batch * call.heads_q * call.length_q * call.length_k * (call.dim + call.dim_v),
          [&] { enough = attend_into(call); });
  return enough ? o.release() : decline();
} catch (const std::exception&) {
  return decline();
}

namespace {

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

void bind_attention() {
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
