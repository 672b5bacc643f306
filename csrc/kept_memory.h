// Memory for tensors that comes back: what a training step makes, its next step makes again, of the same sizes. Fresh from
// the system it would fault at every page each time, which for the gradients of a weight takes longer than computing them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

namespace fastseq {

// A new tensor in kept memory, not initialised; a null handle where torch, or the size, is not fit for it.
AtenTensorHandle kept_tensor(const int64_t* sizes, const int64_t* strides, int64_t rank, int32_t dtype, size_t bytes);

// A fresh buffer faults at every page it touches for the first time: asks for large pages.
void ask_for_huge_pages(void* data, size_t bytes);

}  // namespace fastseq
