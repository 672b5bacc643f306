#include "recurrent_marshal.h"

#include <cstdlib>
#include <cstring>

#include "kept_memory.h"

namespace fastseq {
namespace {

using torch::headeronly::ScalarType;

int32_t code_of(Dtype dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_int8()};
  return codes[int(dtype)];
}

thread_local Workspace workspace;

}  // namespace

Cell cell_of(const char* name) {
  if (!std::strcmp(name, "lstm")) return Cell::lstm;
  if (!std::strcmp(name, "gru")) return Cell::gru;
  if (!std::strcmp(name, "gru_reset_before")) return Cell::gru_reset_before;
  if (!std::strcmp(name, "rnn_tanh")) return Cell::rnn_tanh;
  STD_TORCH_CHECK(!std::strcmp(name, "rnn_relu"),
                  "scan: cell must be rnn_tanh, rnn_relu, lstm, gru or gru_reset_before, not ", name);
  return Cell::rnn_relu;
}
int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::rnn_tanh || cell == Cell::rnn_relu ? 1 : 3; }

Dtype dtype_of(AtenTensorHandle x) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &code));
  for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    if (code == code_of(dtype)) return dtype;
  STD_TORCH_CHECK(false, "scan: the native kernels take float64, float32, bfloat16 and float16 tensors");
}
Dtype weights_of(AtenTensorHandle w, Dtype beside) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(w, &code));
  if (code == code_of(beside)) return beside;
  STD_TORCH_CHECK(beside == Dtype::f32 && (code == code_of(Dtype::bf16) || code == code_of(Dtype::i8)),
                  "scan: weights must be of x's dtype, or packed bfloat16 or int8 beside a float32 x");
  return code == code_of(Dtype::i8) ? Dtype::i8 : Dtype::bf16;
}
size_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2; }
Dtype accumulator_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Strides of a contiguous tensor of up to four dimensions, as torch has them; returns its elements.
static int64_t contiguous_strides(const int64_t* sizes, int64_t rank, int64_t* strides) {
  int64_t count = 1, step = 1;
  for (int64_t i = rank; i-- > 0; count *= sizes[i], step *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = step;
  return count;
}

torch::stable::Tensor empty(const int64_t* sizes, int64_t rank, Dtype dtype) {
  int64_t strides[4];
  contiguous_strides(sizes, rank, strides);
  return empty(sizes, strides, rank, dtype);
}
torch::stable::Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t rank, Dtype dtype) {
  size_t bytes = bytes_of(dtype);
  for (int64_t i = 0; i < rank; ++i) bytes *= size_t(sizes[i]);
  AtenTensorHandle handle = kept_tensor(sizes, strides, rank, code_of(dtype), bytes);
  if (handle) return torch::stable::Tensor(handle);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, code_of(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor tensor(handle);
  ask_for_huge_pages(tensor.data_ptr(), bytes);
  return tensor;
}
torch::stable::Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype) {
  return empty(sizes.begin(), int64_t(sizes.size()), dtype);
}

int64_t rank_of(AtenTensorHandle x) {
  int64_t rank;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(x, &rank));
  return rank;
}
const int64_t* sizes_of(AtenTensorHandle x) {
  int64_t* sizes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &sizes));
  return sizes;
}
bool is_contiguous(AtenTensorHandle x) {
  bool result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(x, &result));
  return result;
}

ScanView view(const char* name, AtenTensorHandle x, Dtype dtype, std::initializer_list<int64_t> expected) {
  if (!x) return {};
  const int64_t rank = int64_t(expected.size());
  const int64_t *sizes = sizes_of(x), *want = expected.begin();
  int64_t* strides;
  int32_t code, device;
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &code));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x, &device));
  bool fits = rank_of(x) == rank && device == aoti_torch_device_type_cpu() && code == code_of(dtype);
  for (int64_t i = 0; fits && i < rank; ++i) fits = sizes[i] == want[i];
  if (!fits) {
    std::string shape;
    for (int64_t size : expected) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "scan: ", name, " must be a CPU tensor of shape [", shape, "] and of x's dtype",
                    " (states, their gradient and scales: of the dtype computed in)");
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x, &data));
  ScanView out;
  out.data = data;
  out.e = want[rank - 1] == 1 ? 1 : strides[rank - 1];
  if (rank > 1) out.b = strides[rank - 2];
  if (rank > 2) out.t = strides[0];
  return out;
}

ScanView offset(ScanView v, int64_t elements, Dtype dtype) {
  v.data = static_cast<char*>(v.data) + elements * int64_t(bytes_of(dtype));
  return v;
}

ScanView packed_view(const char* name, AtenTensorHandle x, Dtype dtype, int64_t gates, int64_t H, int64_t K) {
  const ScanPacked layout{FASTSEQ_DISPATCH(scan_lanes), int64_t(4 / bytes_of(dtype))};
  const int64_t rows = layout.vectors(H) * layout.words(K) * gates;
  int32_t code, device;
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &code));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x, &data));
  const int64_t* sizes = sizes_of(x);
  const bool fits = rank_of(x) == 3 && device == aoti_torch_device_type_cpu() && code == code_of(dtype) &&
                    sizes[0] == rows && sizes[1] == layout.lanes && sizes[2] == layout.word && is_contiguous(x);
  STD_TORCH_CHECK(fits, "scan: ", name, " must come from pack_weights under this instruction set: ", gates,
                  " gates of ", H, " rows of ", K, " make [", rows, ", ", layout.lanes, ", ", layout.word, "]");
  return {data, 0, 0, 1};
}

Workspace::~Workspace() { std::free(data_); }

void* Workspace::of(size_t bytes) {
  if (bytes > size_ || size_ > kKept) {
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(4096, size_ ? size_ : 4096);
    if (!data_) size_ = 0;
    STD_TORCH_CHECK(data_, "scan: cannot allocate ", bytes, " bytes of scratch");
    ask_for_huge_pages(data_, size_);
  }
  return data_;
}

torch::stable::Tensor Workspace::tensor(std::initializer_list<int64_t> sizes, Dtype dtype) {
  const int64_t rank = int64_t(sizes.size());
  int64_t strides[4];
  void* data = of(size_t(contiguous_strides(sizes.begin(), rank, strides)) * bytes_of(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, rank, sizes.begin(), strides, 0, code_of(dtype),
                                                            aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

Workspace& scratch() { return workspace; }

void run_forward(ScanForward& p) {
  p.workspace = workspace.of(FASTSEQ_DISPATCH(scan_forward_workspace, p));
  FASTSEQ_DISPATCH(scan_forward, p);
}

}  // namespace fastseq
