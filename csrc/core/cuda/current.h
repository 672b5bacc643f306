// Where an operator's kernels run: only for the files that know torch.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

namespace fastseq::cuda {

// Makes a tensor's device the current one, and tells its stream.
struct Current {
  int device = 0;
  void* stream = nullptr;
#if !defined(FASTSEQ_EMULATION)
  explicit Current(const torch::stable::Tensor& like) : device(like.get_device_index()), guard(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
#else
  explicit Current(const torch::stable::Tensor&) {}
#endif
};

}  // namespace fastseq::cuda
