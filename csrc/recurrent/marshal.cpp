#include "recurrent/marshal.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

Dtype dtype_of(AtenTensorHandle x) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &code));
  for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    if (code == code_of(dtype)) return dtype;
  FASTSEQ_CHECK(false, "scan: the native kernels take float64, float32, bfloat16 and float16 tensors");
}
Dtype weights_of(AtenTensorHandle w, Dtype beside) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(w, &code));
  if (code == code_of(beside)) return beside;
  FASTSEQ_CHECK(beside == Dtype::f32 && (code == code_of(Dtype::bf16) || code == code_of(Dtype::i8)),
                  "scan: weights must be of x's dtype, or packed bfloat16 or int8 beside a float32 x");
  return code == code_of(Dtype::i8) ? Dtype::i8 : Dtype::bf16;
}

static void no_memory(double bytes) {
  STD_TORCH_CHECK(false, "cannot allocate ", int64_t(bytes), " bytes of memory");
}

// A fresh buffer faults at every page it touches for the first time: asks for large pages.
static void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t(2) << 20;
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (uintptr_t(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (uintptr_t(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Throws where there is no memory for a large tensor. torch's function for that prints a C++ trace when it fails, and its
// error does not say how much was wanted. Asking first costs about a microsecond: no page is touched.
static void ask_for_memory(double bytes) {
  constexpr double kLarge = 1 << 20, kMost = 1e18;
  if (bytes < kLarge) return;
  if (bytes >= kMost) no_memory(bytes);
#if defined(__linux__)
  // Past the C library, whose heap would be trimmed: the tensor would find pages that fault.
  void* const pages = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages != MAP_FAILED) {
    munmap(pages, size_t(bytes));
    return;
  }
#endif
  void* const data = std::malloc(size_t(bytes) + 64);
  if (!data) no_memory(bytes);
  std::free(data);
}

// Bytes of a tensor of these sizes, which there is memory for.
static size_t bytes_for(const int64_t* sizes, int64_t rank, Dtype dtype) {
  double bytes = double(bytes_of(dtype));
  for (int64_t i = 0; i < rank; ++i) bytes *= double(sizes[i]);
  ask_for_memory(bytes);
  return size_t(bytes);
}

// Strides of a contiguous tensor of up to four dimensions, as torch has them.
static void contiguous_strides(const int64_t* sizes, int64_t rank, int64_t* strides) {
  int64_t step = 1;
  for (int64_t i = rank; i-- > 0; step *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = step;
}

torch::stable::Tensor empty(const int64_t* sizes, int64_t rank, Dtype dtype) {
  int64_t strides[4];
  contiguous_strides(sizes, rank, strides);
  return empty(sizes, strides, rank, dtype);
}
torch::stable::Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t rank, Dtype dtype) {
  const size_t bytes = bytes_for(sizes, rank, dtype);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, code_of(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor tensor(handle);
  ask_for_huge_pages(tensor.data_ptr(), bytes);
  return tensor;
}
torch::stable::Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype) {
  return empty(sizes.begin(), int64_t(sizes.size()), dtype);
}

bool has_memory(AtenTensorHandle x) {
  int64_t bytes, offset, *sizes, *strides;
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x, &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(x, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &code));
  int64_t end = offset + 1;
  for (int64_t i = 0, rank = rank_of(x); i < rank; ++i) {
    if (sizes[i] == 0) return true;
    end += (sizes[i] - 1) * strides[i];
  }
  return end * int64_t(aoti_torch_dtype_element_size(code)) <= bytes;
}
void check_readable(const char* name, AtenTensorHandle x) {
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x, &device));
  FASTSEQ_CHECK(device == aoti_torch_device_type_cpu(), name, " must be on the CPU, as the other arguments are");
  FASTSEQ_CHECK(has_memory(x), name, " has no memory for its elements: its storage was freed or made smaller "
                "(untyped_storage().resize_); give it its memory back before the call");
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
torch::stable::Tensor dense(const torch::stable::Tensor& x) {
  if (x.is_contiguous()) return x;
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  ask_for_memory(double(x.numel()) * double(aoti_torch_dtype_element_size(code)));
  return torch::stable::contiguous(x);
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
    FASTSEQ_CHECK(false, "scan: ", name, " must be a CPU tensor of shape [", shape, "] and of x's dtype",
                    " (states, their gradient and scales: of the dtype computed in)");
  }
  check_readable(name, x);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x, &data));
  ScanView out;
  out.data = data;
  out.e = want[rank - 1] == 1 ? 1 : strides[rank - 1];
  if (rank > 1) out.b = strides[rank - 2];
  if (rank > 2) out.t = strides[rank - 3];
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
  FASTSEQ_CHECK(fits, "scan: ", name, " must come from pack_weights under this instruction set: ", gates,
                  " gates of ", H, " rows of ", K, " make [", rows, ", ", layout.lanes, ", ", layout.word, "]");
  check_readable(name, x);
  return {data, 0, 0, 1};
}

Workspace::~Workspace() { std::free(data_); }

void* Workspace::of(size_t bytes) {
  if (bytes > size_ || size_ > kKept) {
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(4096, size_ ? size_ : 4096);
    if (!data_) size_ = 0;
    if (!data_) no_memory(double(bytes));
    ask_for_huge_pages(data_, size_);
  }
  return data_;
}

torch::stable::Tensor Workspace::tensor(std::initializer_list<int64_t> sizes, Dtype dtype) {
  const int64_t rank = int64_t(sizes.size());
  int64_t strides[4];
  contiguous_strides(sizes.begin(), rank, strides);
  size_t bytes = bytes_of(dtype);
  for (int64_t size : sizes) bytes *= size_t(size);
  void* data = of(bytes);
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
