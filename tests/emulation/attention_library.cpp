// The CUDA operators of attention, with kernels on the emulated machine, as overloads of their own on the CPU.
#include <torch/csrc/stable/library.h>

#include "attention/ops.h"

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_forward.emulated_tensors", TORCH_BOX(&fastseq::cuda::attention_forward_cuda));
  m.impl("attention_backward.emulated_tensors", TORCH_BOX(&fastseq::cuda::attention_backward_cuda));
}
