// torch's settings for which its stable ABI has no function: operators written in Python (fastseq/ops/__init__.py) tell them.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <array>

namespace fastseq::cuda {

inline bool setting(const char* name) {
  std::array<StableIValue, 1> stack{};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}
// Whether float32 may be multiplied as TF32; the rule is that of the Triton kernels.
inline bool one_tf32_product() { return setting("fastseq::one_tf32_product"); }
// torch.are_deterministic_algorithms_enabled().
inline bool is_deterministic() { return setting("fastseq::is_deterministic"); }

}  // namespace fastseq::cuda
