// torch's settings for which its stable ABI has no function.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <array>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace fastseq {

// Operators written in Python (fastseq/ops/__init__.py) tell them; where there is no Python, a setting is off.
inline bool setting(const char* name) {
  std::array<StableIValue, 1> stack{};
  if (torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return false;
  return torch::stable::detail::to<bool>(stack[0]);
}
// Whether float32 may be multiplied as TF32; the rule is that of the Triton kernels.
inline bool one_tf32_product() { return setting("fastseq::one_tf32_product"); }

// torch.are_deterministic_algorithms_enabled(). Asked at every call, so of torch itself where it has the function as we
// know it: an operator takes microseconds.
inline bool is_deterministic() {
#if !defined(_WIN32)
  struct Torch {
    void* context = nullptr;
    bool (*asked)(const void*) = nullptr;
    Torch() {
      void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
      if (!library) return;
      const auto global = reinterpret_cast<void* (*)()>(dlsym(library, "_ZN2at13globalContextEv"));
      asked = reinterpret_cast<decltype(asked)>(dlsym(library, "_ZNK2at7Context23deterministicAlgorithmsEv"));
      if (global && asked) context = global();
    }
  };
  static const Torch torch;
  if (torch.context) return torch.asked(torch.context);
#endif
  return setting("fastseq::is_deterministic");
}

}  // namespace fastseq
