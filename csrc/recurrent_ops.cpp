// torch.ops.fastseq.scan_*.native, stack_forward and cell_forward: tensors into the structs of recurrent.h.
// The schemas, with every shape, are in fastseq/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <initializer_list>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/recurrent.h"
#include "ops.h"

namespace fastseq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Cell = ScanSizes::Cell;
using Dtype = ScanSizes::Dtype;

constexpr size_t kHugePage = size_t(2) << 20;

// A fresh buffer faults at every page it touches for the first time: ask for large pages.
void advise(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;
  uintptr_t begin = (uintptr_t(data) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t end = (uintptr_t(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Scratch that a thread keeps from call to call.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  void* of(size_t bytes) {
    if (bytes > size_ || size_ > kKept) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_ ? size_ : 4096);
      if (!data_) size_ = 0;
      STD_TORCH_CHECK(data_, "scan: cannot allocate ", bytes, " bytes of scratch");
      advise(data_, size_);
    }
    return data_;
  }

 private:
  static constexpr size_t kKept = size_t(64) << 20;  // one larger than this is not kept for a smaller call
  void* data_ = nullptr;
  size_t size_ = 0;
};
thread_local Workspace workspace;

Cell cell_of(const std::string& name) {
  if (name == "lstm") return Cell::lstm;
  if (name == "gru") return Cell::gru;
  if (name == "gru_reset_before") return Cell::gru_reset_before;
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  STD_TORCH_CHECK(name == "rnn_relu",
                  "scan: cell must be rnn_tanh, rnn_relu, lstm, gru or gru_reset_before, not ", name);
  return Cell::rnn_relu;
}
int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::rnn_tanh || cell == Cell::rnn_relu ? 1 : 3; }

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half,
                      "scan: the native kernels take float64, float32, bfloat16 and float16 tensors");
      return Dtype::f16;
  }
}
int32_t code_of(Dtype dtype) {
  return dtype == Dtype::f64    ? aoti_torch_dtype_float64()
         : dtype == Dtype::f32  ? aoti_torch_dtype_float32()
         : dtype == Dtype::bf16 ? aoti_torch_dtype_bfloat16()
                                : aoti_torch_dtype_float16();
}
size_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
Dtype accumulator_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
ScalarType scalar_of(Dtype dtype) {
  return dtype == Dtype::f64    ? ScalarType::Double
         : dtype == Dtype::f32  ? ScalarType::Float
         : dtype == Dtype::bf16 ? ScalarType::BFloat16
                                : ScalarType::Half;
}

Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype) {
  int64_t strides[3], count = 1, rank = int64_t(sizes.size());
  for (int64_t i = rank; i-- > 0; count *= sizes.begin()[i]) strides[i] = count > 0 ? count : 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes.begin(), strides, code_of(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  const size_t bytes = size_t(count) * bytes_of(dtype);
  if (bytes >= 2 * kHugePage) advise(tensor.data_ptr(), bytes);
  return tensor;
}

// Checks a tensor and gives its view: of shape [t, b, e], [b, e] or [e].
ScanView view(const char* name, const Tensor& x, Dtype dtype, std::initializer_list<int64_t> sizes) {
  int64_t rank = int64_t(sizes.size());
  bool fits = x.dim() == rank && x.is_cpu() && x.scalar_type() == scalar_of(dtype);
  for (int64_t i = 0; fits && i < rank; ++i) fits = x.size(i) == sizes.begin()[i];
  if (!fits) {
    std::string expected;
    for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "scan: ", name, " must be a CPU tensor of shape [", expected, "] and of x's dtype",
                    " (states and their gradient: of the dtype computed in)");
  }
  ScanView out;
  out.data = x.data_ptr();
  out.e = x.stride(rank - 1);
  if (sizes.begin()[rank - 1] == 1) out.e = 1;
  if (rank > 1) out.b = x.stride(rank - 2);
  if (rank > 2) out.t = x.stride(0);
  return out;
}
ScanView view(const char* name, const Optional& x, Dtype dtype, std::initializer_list<int64_t> sizes) {
  return x ? view(name, *x, dtype, sizes) : ScanView{};
}

// What both directions share. Keeps alive what it had to copy.
struct Common {
  Optional lengths;
  void fill(ScanSizes& s, const Optional& given_lengths, const Optional& reset) {
    s.threads = int(torch::stable::get_num_threads());
    s.lengths = nullptr;
    s.reset = nullptr;
    if (given_lengths) {
      lengths = *given_lengths;
      STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 &&
                          lengths->size(0) == s.B,
                      "scan: lengths must be an int64 CPU tensor of shape [", s.B, "]");
      if (s.B > 1 && lengths->stride(0) != 1) lengths = torch::stable::contiguous(*lengths);
      s.lengths = static_cast<const int64_t*>(lengths->data_ptr());
    }
    if (reset) {
      STD_TORCH_CHECK(reset->is_cpu() && reset->scalar_type() == ScalarType::Bool && reset->dim() == 2 &&
                          reset->size(0) == s.T && reset->size(1) == s.B,
                      "scan: reset must be a bool CPU tensor of shape [", s.T, ", ", s.B, "]");
      s.reset = static_cast<const bool*>(reset->data_ptr());
      s.reset_t = reset->stride(0);
      s.reset_b = reset->stride(1);
    }
  }
};

void run_forward(ScanForward& p) {
  p.workspace = workspace.of(FASTSEQ_DISPATCH(scan_forward_workspace, p));
  FASTSEQ_DISPATCH(scan_forward, p);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_forward_cpu(
    const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
    const Optional& w_hr, const Optional& h0, const Optional& c0, const Optional& lengths, const Optional& reset,
    const std::string& cell, bool reverse, bool save, bool states) {
  ScanForward p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(x);
  p.reverse = reverse;
  const int64_t G = gates_of(p.cell);
  const bool lstm = p.cell == Cell::lstm;
  STD_TORCH_CHECK(x.dim() == 3 && w_hh.dim() == 2, "scan: x must be [T, B, I] and w_hh [G*H, P]");
  p.T = x.size(0), p.B = x.size(1), p.I = x.size(2), p.H = w_hh.size(0) / G, p.P = w_hh.size(1);
  STD_TORCH_CHECK(w_hr || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");
  STD_TORCH_CHECK(lstm || (!w_hr && !c0), "scan: only an LSTM has w_hr and c0");
  Common common;
  common.fill(p, lengths, reset);
  const Dtype dtype = p.dtype;
  p.x = view("x", x, dtype, {p.T, p.B, p.I});
  p.w_ih = view("w_ih", w_ih, dtype, {G * p.H, p.I});
  p.w_hh = view("w_hh", w_hh, dtype, {G * p.H, p.P});
  p.b_ih = view("b_ih", b_ih, dtype, {G * p.H});
  p.b_hh = view("b_hh", b_hh, dtype, {G * p.H});
  p.w_hr = view("w_hr", w_hr, dtype, {p.P, p.H});
  p.h0 = view("h0", h0, dtype, {p.B, p.P});
  p.c0 = view("c0", c0, dtype, {p.B, p.H});

  const Dtype accumulator = accumulator_of(dtype);
  const bool with_states = lstm && (save || states), with_tape = save && G > 1;
  Tensor y = empty({p.T, p.B, p.P}, dtype), h_n = empty({p.B, p.P}, dtype);
  Tensor c_n = lstm ? empty({p.B, p.H}, dtype) : empty({0}, dtype);
  Tensor c_all = with_states ? empty({p.T, p.B, p.H}, accumulator) : empty({0}, dtype);
  Tensor tape = with_tape ? empty({p.T, p.B, 4 * p.H}, dtype) : empty({0}, dtype);
  if (p.B > 0 && p.P > 0) {
    auto whole = [&](const Tensor& out, int64_t n) { return ScanView{out.data_ptr(), p.B * n, n, 1}; };
    p.y = whole(y, p.P);
    p.h_n = whole(h_n, p.P);
    if (lstm) p.c_n = whole(c_n, p.H);
    if (with_states) p.states = whole(c_all, p.H);
    if (with_tape) p.tape = whole(tape, 4 * p.H);
    run_forward(p);
  }
  return {y, h_n, c_n, c_all, tape};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_backward_cpu(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& y,
    const Optional& states, const Optional& tape, const Tensor& w_hh, const Optional& w_hr, const Optional& h0,
    const Optional& c0, const Optional& lengths, const Optional& reset, const std::string& cell, bool reverse) {
  ScanBackward p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(y);
  p.reverse = reverse;
  const int64_t G = gates_of(p.cell);
  const bool lstm = p.cell == Cell::lstm;
  STD_TORCH_CHECK((tape || G == 1) && (states || !lstm), "scan: this cell's backward pass needs its tape, an LSTM's its states");
  STD_TORCH_CHECK(y.dim() == 3 && w_hh.dim() == 2, "scan: y must be [T, B, P] and w_hh [G*H, P]");
  p.T = y.size(0), p.B = y.size(1), p.P = y.size(2), p.H = w_hh.size(0) / G;
  STD_TORCH_CHECK(w_hr || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");
  STD_TORCH_CHECK(lstm || (!w_hr && !c0 && !dc_n && !dstates), "scan: only an LSTM has w_hr, c0, dc_n and dstates");
  Common common;
  common.fill(p, lengths, reset);
  const Dtype dtype = p.dtype, accumulator = accumulator_of(dtype);
  p.dy = view("dy", dy, dtype, {p.T, p.B, p.P});
  p.dh_n = view("dh_n", dh_n, dtype, {p.B, p.P});
  p.dc_n = view("dc_n", dc_n, dtype, {p.B, p.H});
  p.dstates = view("dstates", dstates, accumulator, {p.T, p.B, p.H});
  p.y = view("y", y, dtype, {p.T, p.B, p.P});
  if (lstm) p.states = view("states", states, accumulator, {p.T, p.B, p.H});
  if (G > 1) p.tape = view("tape", tape, dtype, {p.T, p.B, 4 * p.H});
  p.w_hh = view("w_hh", w_hh, dtype, {G * p.H, p.P});
  p.w_hr = view("w_hr", w_hr, dtype, {p.P, p.H});
  p.h0 = view("h0", h0, dtype, {p.B, p.P});
  p.c0 = view("c0", c0, dtype, {p.B, p.H});

  const int64_t beside = p.cell == Cell::gru ? p.H : w_hr ? p.P : 0;  // what dhidden holds a row
  Tensor dgates = empty({p.T, p.B, G * p.H}, dtype), dh0 = h0 ? empty({p.B, p.P}, dtype) : empty({0}, dtype);
  Tensor dhidden = beside ? empty({p.T, p.B, beside}, dtype) : empty({0}, dtype);
  Tensor dc0 = c0 ? empty({p.B, p.H}, dtype) : empty({0}, dtype);
  if (p.B > 0 && p.P > 0) {
    auto whole = [&](const Tensor& out, int64_t n) { return ScanView{out.data_ptr(), p.B * n, n, 1}; };
    p.dgates = whole(dgates, G * p.H);
    if (beside) p.dhidden = whole(dhidden, beside);
    if (h0) p.dh0 = whole(dh0, p.P);
    if (c0) p.dc0 = whole(dc0, p.H);
    p.workspace = workspace.of(FASTSEQ_DISPATCH(scan_backward_workspace, p));
    FASTSEQ_DISPATCH(scan_backward, p);
  }
  return {dgates, dhidden, dh0, dc0};
}

namespace {

ScanView offset(ScanView v, int64_t elements, Dtype dtype) {
  v.data = static_cast<char*>(v.data) + elements * int64_t(bytes_of(dtype));
  return v;
}

// Row `index` of an initial or last state [rows, B, N], or [rows, N] where B is not a dimension; all zeros if absent.
ScanView state_row(const char* name, const Optional& state, Dtype dtype, int64_t rows, int64_t B, int64_t N,
                   bool batched, int64_t index) {
  if (!state) return {};
  ScanView out = batched ? view(name, *state, dtype, {rows, B, N}) : view(name, *state, dtype, {rows, N});
  return offset(out, index * (batched ? out.t : out.b), dtype);
}

thread_local Workspace between[2];  // outputs of the layer before and of this one

}  // namespace

std::tuple<Tensor, Tensor, Tensor> stack_forward_cpu(const Tensor& x, const Optional& h0, const Optional& c0,
                                                     const std::vector<Tensor>& weights, const std::string& cell,
                                                     int64_t num_layers, bool bidirectional, bool batch_first) {
  ScanForward p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(x);
  p.threads = int(torch::stable::get_num_threads());
  const Dtype dtype = p.dtype;
  const bool lstm = p.cell == Cell::lstm, batched = x.dim() == 3, swapped = batched && batch_first;
  const int64_t G = gates_of(p.cell), directions = bidirectional ? 2 : 1, rows = num_layers * directions;
  STD_TORCH_CHECK(batched || x.dim() == 2, "scan: x must be [T, B, I] or [T, I]");
  const int64_t width = rows > 0 ? int64_t(weights.size()) / rows : 0;
  STD_TORCH_CHECK(width >= 2 && width <= 5 && width * rows == int64_t(weights.size()),
                  "scan: weights must be w_ih, w_hh, biases and projection of each layer and direction");
  const bool biases = width >= 4, projected = width % 2 == 1;
  STD_TORCH_CHECK(lstm || (!projected && !c0), "scan: only an LSTM has w_hr and c0");
  STD_TORCH_CHECK(weights[1].dim() == 2, "scan: w_hh must be [G*H, P]");
  p.T = x.size(swapped ? 1 : 0), p.B = batched ? x.size(swapped ? 0 : 1) : 1;
  p.H = weights[1].size(0) / G, p.P = weights[1].size(1);
  STD_TORCH_CHECK(p.T > 0, "scan: x has no time steps");
  STD_TORCH_CHECK(projected || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");

  const int64_t out = directions * p.P;
  Tensor y = !batched  ? empty({p.T, out}, dtype)
             : swapped ? empty({p.B, p.T, out}, dtype)
                       : empty({p.T, p.B, out}, dtype);
  Tensor h_n = batched ? empty({rows, p.B, p.P}, dtype) : empty({rows, p.P}, dtype);
  Tensor c_n = !lstm ? empty({0}, dtype) : batched ? empty({rows, p.B, p.H}, dtype) : empty({rows, p.H}, dtype);

  p.I = x.size(x.dim() - 1);
  const int64_t first = p.I;
  p.x = !batched  ? view("x", x, dtype, {p.T, first})
        : swapped ? view("x", x, dtype, {p.B, p.T, first})
                  : view("x", x, dtype, {p.T, p.B, first});
  if (!batched) p.x.t = p.x.b;
  if (swapped) std::swap(p.x.t, p.x.b);
  if (p.B == 0 || p.P == 0) return {y, h_n, c_n};

  const ScanView result{y.data_ptr(), swapped ? out : p.B * out, swapped ? p.T * out : out, 1};
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    ScanView target = result;
    if (layer + 1 < num_layers) {
      void* scratch = between[layer & 1].of(size_t(p.T * p.B * out) * bytes_of(dtype));
      target = {scratch, p.B * out, out, 1};
    }
    for (int64_t direction = 0; direction < directions; ++direction) {
      const int64_t index = layer * directions + direction;
      const Tensor* w = weights.data() + index * width;
      p.reverse = direction == 1;
      p.w_ih = view("w_ih", w[0], dtype, {G * p.H, p.I});
      p.w_hh = view("w_hh", w[1], dtype, {G * p.H, p.P});
      if (biases) {
        p.b_ih = view("b_ih", w[2], dtype, {G * p.H});
        p.b_hh = view("b_hh", w[3], dtype, {G * p.H});
      }
      if (projected) p.w_hr = view("w_hr", w[width - 1], dtype, {p.P, p.H});
      p.h0 = state_row("h0", h0, dtype, rows, p.B, p.P, batched, index);
      p.c0 = state_row("c0", c0, dtype, rows, p.B, p.H, batched, index);
      p.y = offset(target, direction * p.P, dtype);
      p.h_n = offset({h_n.data_ptr(), 0, p.P, 1}, index * p.B * p.P, dtype);
      if (lstm) p.c_n = offset({c_n.data_ptr(), 0, p.H, 1}, index * p.B * p.H, dtype);
      run_forward(p);
    }
    p.x = target;
    p.I = out;
  }
  return {y, h_n, c_n};
}

std::tuple<Tensor, Tensor> cell_forward_cpu(const Tensor& x, const Optional& h, const Optional& c, const Tensor& w_ih,
                                            const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                                            const std::string& cell) {
  ScanForward p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(x);
  p.threads = int(torch::stable::get_num_threads());
  const Dtype dtype = p.dtype;
  const bool lstm = p.cell == Cell::lstm, batched = x.dim() == 2;
  const int64_t G = gates_of(p.cell);
  STD_TORCH_CHECK((batched || x.dim() == 1) && w_hh.dim() == 2, "scan: x must be [B, I] or [I], and w_hh [G*H, H]");
  STD_TORCH_CHECK(lstm || !c, "scan: only an LSTM has c");
  p.T = 1, p.B = batched ? x.size(0) : 1, p.I = x.size(batched ? 1 : 0), p.P = p.H = w_hh.size(1);
  p.w_ih = view("w_ih", w_ih, dtype, {G * p.H, p.I});
  p.w_hh = view("w_hh", w_hh, dtype, {G * p.H, p.H});
  p.b_ih = view("b_ih", b_ih, dtype, {G * p.H});
  p.b_hh = view("b_hh", b_hh, dtype, {G * p.H});
  auto rows = [&](const char* name, const Optional& t, int64_t n) {
    return batched ? view(name, t, dtype, {p.B, n}) : view(name, t, dtype, {n});
  };
  p.x = rows("x", x, p.I);
  p.h0 = rows("h", h, p.H);
  p.c0 = rows("c", c, p.H);
  Tensor h_n = batched ? empty({p.B, p.H}, dtype) : empty({p.H}, dtype);
  Tensor c_n = !lstm ? empty({0}, dtype) : batched ? empty({p.B, p.H}, dtype) : empty({p.H}, dtype);
  if (p.B == 0) return {h_n, c_n};
  p.y = p.h_n = ScanView{h_n.data_ptr(), 0, p.H, 1};  // after one step they are the same
  if (lstm) p.c_n = ScanView{c_n.data_ptr(), 0, p.H, 1};
  run_forward(p);
  return {h_n, c_n};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_products_cpu(
    const Tensor& dgates, const Tensor& dhidden, const Tensor& x, const Tensor& w_ih, const Tensor& y,
    const Optional& tape, const Optional& h0, const Optional& lengths, const Optional& reset, const std::string& cell,
    bool reverse, bool with_dx, bool with_weights) {
  ScanProducts p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(dgates);
  p.reverse = reverse;
  const int64_t G = gates_of(p.cell);
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && dgates.dim() == 3,
                  "scan: x must be [T, B, I], y [T, B, P] and dgates [T, B, G*H]");
  p.T = x.size(0), p.B = x.size(1), p.I = x.size(2), p.P = y.size(2), p.H = dgates.size(2) / G;
  Common common;
  common.fill(p, lengths, reset);
  const Dtype dtype = p.dtype;
  p.dgates = view("dgates", dgates, dtype, {p.T, p.B, G * p.H});
  if (p.cell == Cell::gru) p.dhidden = view("dhidden", dhidden, dtype, {p.T, p.B, p.H});
  p.x = view("x", x, dtype, {p.T, p.B, p.I});
  p.w_ih = view("w_ih", w_ih, dtype, {G * p.H, p.I});
  p.y = view("y", y, dtype, {p.T, p.B, p.P});
  if (p.cell == Cell::gru_reset_before) p.tape = view("tape", tape, dtype, {p.T, p.B, 4 * p.H});
  p.h0 = view("h0", h0, dtype, {p.B, p.P});

  Tensor dx = with_dx ? empty({p.T, p.B, p.I}, dtype) : empty({0}, dtype);
  Tensor dw_ih = with_weights ? empty({G * p.H, p.I}, dtype) : empty({0}, dtype);
  Tensor dw_hh = with_weights ? empty({G * p.H, p.P}, dtype) : empty({0}, dtype);
  Tensor db_ih = with_weights ? empty({G * p.H}, dtype) : empty({0}, dtype);
  Tensor db_hh = with_weights ? empty({G * p.H}, dtype) : empty({0}, dtype);
  if (with_dx) p.dx = ScanView{dx.data_ptr(), p.B * p.I, p.I, 1};
  if (with_weights) {
    p.dw_ih = ScanView{dw_ih.data_ptr(), 0, p.I, 1};
    p.dw_hh = ScanView{dw_hh.data_ptr(), 0, p.P, 1};
    p.db_ih.data = db_ih.data_ptr();
    p.db_hh.data = db_hh.data_ptr();
  }
  p.workspace = workspace.of(FASTSEQ_DISPATCH(scan_products_workspace, p));
  FASTSEQ_DISPATCH(scan_products, p);
  return {dx, dw_ih, dw_hh, db_ih, db_hh};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_gradient_cpu(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& x,
    const Tensor& w_ih, const Tensor& w_hh, const Optional& w_hr, const Optional& h0, const Optional& c0,
    const Optional& lengths, const Optional& reset, const Tensor& y, const Optional& states, const Optional& tape,
    const std::string& cell, bool reverse, bool with_dx, bool with_weights) {
  auto [dgates, dhidden, dh0, dc0] = scan_backward_cpu(dy, dh_n, dc_n, dstates, y, states, tape, w_hh, w_hr, h0, c0,
                                                       lengths, reset, cell, reverse);
  if (!with_dx && !with_weights) {
    auto absent = [&] { return empty({0}, dtype_of(x)); };  // one each: results must not alias
    return {absent(), absent(), absent(), absent(), absent(), dh0, dc0, dhidden};
  }
  auto [dx, dw_ih, dw_hh, db_ih, db_hh] = scan_products_cpu(dgates, dhidden, x, w_ih, y, tape, h0, lengths, reset,
                                                            cell, reverse, with_dx, with_weights);
  return {dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, dhidden};
}

}  // namespace fastseq
