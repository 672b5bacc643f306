// What the recurrent operators share: names and dtypes into enums, tensors into the views of recurrent.h, scratch.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "core/arguments.h"
#include "recurrent/cpu/recurrent.h"

namespace fastseq {

using OptionalTensor = std::optional<torch::stable::Tensor>;

Dtype dtype_of(AtenTensorHandle x);                 // throws on one that the kernels do not take
Dtype weights_of(AtenTensorHandle w, Dtype beside);  // of weights beside an x of that dtype; throws likewise

inline AtenTensorHandle handle_of(const torch::stable::Tensor& x) { return x.get(); }
inline AtenTensorHandle handle_of(const OptionalTensor& x) { return x ? x->get() : nullptr; }

// A new contiguous CPU tensor of up to four dimensions, not initialised. Throws where there is no memory.
torch::stable::Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype);
torch::stable::Tensor empty(const int64_t* sizes, int64_t rank, Dtype dtype);
// The same with strides of its own, which must be dense.
torch::stable::Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t rank, Dtype dtype);
// A CPU tensor, or a contiguous copy of it where it is not contiguous. Throws likewise.
torch::stable::Tensor dense(const torch::stable::Tensor& x);

// Checks a tensor and gives its view: of shape [t, b, e], [b, e] or [e], or the first of several. No tensor: an empty view.
ScanView view(const char* name, AtenTensorHandle x, Dtype dtype, std::initializer_list<int64_t> sizes);
template <class T>
ScanView view(const char* name, const T& x, Dtype dtype, std::initializer_list<int64_t> sizes) {
  return view(name, handle_of(x), dtype, sizes);
}
ScanView offset(ScanView v, int64_t elements, Dtype dtype);

// Checks a matrix that pack_weights packed for the instruction set in force: of `gates` blocks of H rows of K.
ScanView packed_view(const char* name, AtenTensorHandle x, Dtype dtype, int64_t gates, int64_t H, int64_t K);

// Whether a CPU tensor's storage holds all elements that its sizes and strides lead to. A freed one does not
// (untyped_storage().resize_(0), as torch's FSDP does).
bool has_memory(AtenTensorHandle x);
void check_readable(const char* name, AtenTensorHandle x);  // throws unless it is on the CPU and has its memory

int64_t rank_of(AtenTensorHandle x);
const int64_t* sizes_of(AtenTensorHandle x);
bool is_contiguous(AtenTensorHandle x);

// Scratch that a thread keeps from call to call.
class Workspace {
 public:
  static constexpr size_t kKept = size_t(64) << 20;  // one larger than this is not kept for a smaller call

  ~Workspace();
  void* of(size_t bytes);
  // The same as a contiguous tensor, good until the next call of either.
  torch::stable::Tensor tensor(std::initializer_list<int64_t> sizes, Dtype dtype);

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

void run_forward(ScanForward& p);  // in the calling thread's workspace
Workspace& scratch();

}  // namespace fastseq
