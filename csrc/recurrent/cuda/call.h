// What the recurrent operators share on their way from tensors to the structs of recurrent.h: checks, torch's products,
// and the loop of the role `step`.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <deque>

#include "core/arguments.h"
#include "core/dispatch.h"
#include "core/cuda/current.h"
#include "recurrent/cuda/device.h"
#include "recurrent/cuda/ops.h"
#include "core/settings.h"

namespace fastseq::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = OptionalTensor;

// ---- torch's operators that the stable ABI has no function for.

inline Tensor linear(const Tensor& x, const Tensor& w, const Optional& b) {
  return call_torch("aten::linear", "", std::array{value(x), value(w), value(b)});
}
inline void linear_out(const Tensor& x, const Tensor& w, const Optional& b, const Tensor& out) {
  call_torch("aten::linear", "out", std::array{value(x), value(w), value(b), value(out)});
}
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  call_torch("aten::mm", "out", std::array{value(a), value(b), value(out)});
}
inline Tensor times(const Tensor& a, const Tensor& b) {
  return call_torch("aten::mul", "Tensor", std::array{value(a), value(b)});
}
inline Tensor logical_not(const Tensor& a) { return call_torch("aten::logical_not", "", std::array{value(a)}); }
// a[at[0, b, 0], b] of a [T,B,N], as [1,B,N].
inline Tensor take_steps(const Tensor& a, const Tensor& at) {
  return call_torch("aten::take_along_dim", "", std::array{value(a), value(at), value(std::optional<int64_t>(0))});
}
inline ScanNumber number_of(ScalarType type) {
  if (type == ScalarType::BFloat16) return {Dtype::bf16};
  if (type == ScalarType::Half) return {Dtype::f16};
  STD_TORCH_CHECK(type == ScalarType::Float,
                  "scan: the native CUDA kernels take float32, bfloat16 and float16 tensors");
  return {Dtype::f32, one_tf32_product()};
}
// a b as float [M,N], into `out`.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.scalar_type() == ScalarType::Float) {
    mm_out(a, b, out);
  } else if (kEmulated) {  // torch has this product on GPUs alone
    mm_out(torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float), out);
  } else {
    call_torch("aten::mm", "dtype_out", std::array{value(a), value(b), value(ScalarType::Float), value(out)});
  }
}

// ---- What both directions share: checked tensors, kept alive while their pointers are in use.

class Call {
 public:
  Call(const Tensor& like, int64_t cell_number)
      : cell(cell_of(cell_number)), number(number_of(like.scalar_type())), like_(like), current_(like) {}

  ScanCell cell;
  ScanNumber number;
  void* stream() const { return current_.stream; }
  int device() const { return current_.device; }

  // The tensor, dense; it must be there, of that shape and dtype (x's unless said otherwise) and on x's device.
  const Tensor& dense(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                      std::optional<ScalarType> type = std::nullopt) {
    check_tensor(name, t, shape, type);
    kept_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return kept_.back();
  }
  void check_tensor(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                    std::optional<ScalarType> type = std::nullopt) {
    bool fits = t.dim() == int64_t(shape.size()) && t.scalar_type() == type.value_or(like_.scalar_type()) &&
                t.get_device_index() == like_.get_device_index() && t.is_cpu() == like_.is_cpu();
    std::string wanted;
    int64_t axis = 0;
    for (int64_t size : shape) {
      fits = fits && t.size(axis++) == size;
      wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
    }
    STD_TORCH_CHECK(fits, "scan: ", name, " must be of shape [", wanted,
                    "], on x's device and of x's dtype (states and their gradient float32, lengths int64, reset bool)");
  }
  const void* pointer(const char* name, const Optional& t, std::initializer_list<int64_t> shape,
                      std::optional<ScalarType> type = std::nullopt) {
    return t ? dense(name, *t, shape, type).data_ptr() : nullptr;
  }
  // A [T,B,N] tensor whose rows are dense, in time or in batch order; its strides in rows.
  const void* rows(const Tensor& t, int& time, int& batch) {
    const int64_t T = t.size(0), B = t.size(1), N = t.size(2);
    if (!t.is_contiguous() && t.stride(2) == 1 && t.stride(0) == N && t.stride(1) == T * N) {
      time = 1, batch = int(T);
      kept_.push_back(t);
    } else {
      time = int(B), batch = 1;
      kept_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    }
    return kept_.back().data_ptr();
  }
  // One layer and direction of zoneout's shares [T,B,H] or, of a stack, [rows,T,B,H], as they lie in memory: in evaluation
  // they are one number.
  ScanShare share(const char* name, const Optional& t, std::initializer_list<int64_t> shape, int64_t row = 0) {
    if (!t) return {};
    check_tensor(name, *t, shape);
    kept_.push_back(*t);
    const int64_t n = t->dim(), size = int64_t(bytes_of(number.dtype));
    const char* data = static_cast<const char*>(t->data_ptr()) + (n == 4 ? row * t->stride(0) * size : 0);
    return {data, t->stride(n - 3), t->stride(n - 2), t->stride(n - 1)};
  }
  void walk(ScanWalk& a, int64_t T, int64_t B, int64_t H, bool reverse, const Optional& lengths,
            const Optional& reset) {
    STD_TORCH_CHECK(T * B < (int64_t(1) << 30), "scan: T * B must be below 2^30");  // two directions' rows have 31 bits
    a.T = a.total = int(T), a.first = 0, a.B = int(B), a.H = int(H);
    a.reverse = reverse, a.relu = cell == ScanCell::rnn_relu;
    a.lengths = static_cast<const int64_t*>(pointer("lengths", lengths, {B}, ScalarType::Long));
    a.reset = static_cast<const bool*>(pointer("reset", reset, {T, B}, ScalarType::Bool));
    a.reset_t = B, a.reset_b = 1;
  }
  ScanPlan plan(bool backward, const ScanWalk& a, int beside = 1) const {
    return device_plan(current_.device, ScanProblem{cell, number, backward, a.H, a.B, beside, a.options.any()});
  }

  Tensor empty(std::initializer_list<int64_t> shape, std::optional<ScalarType> type = std::nullopt) const {
    return torch::stable::new_empty(like_, shape, type.value_or(like_.scalar_type()));
  }
  Tensor zero_floats(std::initializer_list<int64_t> shape) const {
    return torch::stable::new_zeros(like_, shape, ScalarType::Float);
  }
  Tensor zeroes(size_t bytes) const {
    return torch::stable::new_zeros(like_, {int64_t(bytes)}, ScalarType::Byte);
  }
  static void check(const char* error) { STD_TORCH_CHECK(!error, "scan: a CUDA kernel could not start: ", error); }

 private:
  const Tensor like_;
  Current current_;
  std::deque<Tensor> kept_;  // references to its elements stay good
};

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
inline Tensor rows_of(Tensor t, int64_t from, int64_t count) { return torch::stable::narrow(t, 0, from, count); }

// Refuses what these kernels do not have (w_hr), and states of cells that have none (`cs`).
void check_cell(ScanCell cell, const Optional& w_hr, std::initializer_list<Optional> cs);
// The gradient of a state that resets put in. Walks add to a float32 sum; give() returns it in the state's dtype.
class ResetGradient {
 public:
  ResetGradient(const Call& call, bool wanted, std::initializer_list<int64_t> shape)
      : sum_(wanted ? call.zero_floats(shape) : call.empty({0})),
        out_(wanted && call.number.dtype != Dtype::f32 ? call.empty(shape) : sum_) {}

  float* from(int64_t element) const { return sum_.numel() ? floats(sum_) + element : nullptr; }
  Tensor give(const Call& call) const {
    if (out_.numel() && call.number.dtype != Dtype::f32)
      Call::check(scan_add(floats(sum_), nullptr, out_.data_ptr(), out_.numel(), call.number.dtype, call.stream()));
    return out_;
  }

 private:
  Tensor sum_, out_;
};
// The role `step`: launches and products in turn, on the current stream.
void step_forward_all(Call& call, const ScanForward& a, const Tensor& w_hh);
void step_backward_all(Call& call, const ScanBackward& a, const Tensor& w_hh);

}  // namespace fastseq::cuda
