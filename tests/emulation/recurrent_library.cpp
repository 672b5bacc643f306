// The CUDA operators of the scan, with kernels on the emulated machine, as overloads of their own on the CPU.
#include <torch/csrc/stable/library.h>

#include "recurrent/cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("scan_forward.emulated", TORCH_BOX(&fastseq::cuda::scan_forward_cuda));
  m.impl("scan_backward.emulated", TORCH_BOX(&fastseq::cuda::scan_backward_cuda));
  m.impl("layers_forward.emulated", TORCH_BOX(&fastseq::cuda::layers_forward_cuda));
  m.impl("layers_backward.emulated", TORCH_BOX(&fastseq::cuda::layers_backward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {
  m.impl("native_scan_plan.emulated", TORCH_BOX(&fastseq::cuda::native_scan_plan));
  m.impl("native_scan_role.emulated", TORCH_BOX(&fastseq::cuda::native_scan_role));
  m.impl("native_scan_schedule.emulated", TORCH_BOX(&fastseq::cuda::native_scan_schedule));
  m.impl("native_scan_windows.emulated", TORCH_BOX(&fastseq::cuda::native_scan_windows));
}
