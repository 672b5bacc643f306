// torch's operators that the stable ABI has no function for.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace fastseq {

template <size_t N>
torch::stable::Tensor call_torch(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}
template <class T>
StableIValue value(const T& v) {
  return torch::stable::detail::from(v);
}

}  // namespace fastseq
