// The Python module fastseq._native_cuda: importing it registers the CUDA implementations with torch.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "attention/ops.h"
#include "recurrent/cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(fastseq, CUDA, m) {
  m.impl("scan_forward.native", TORCH_BOX(&fastseq::cuda::scan_forward_cuda));
  m.impl("scan_backward.native", TORCH_BOX(&fastseq::cuda::scan_backward_cuda));
  m.impl("layers_forward.native", TORCH_BOX(&fastseq::cuda::layers_forward_cuda));
  m.impl("layers_backward.native", TORCH_BOX(&fastseq::cuda::layers_backward_cuda));
  m.impl("attention_forward.native", TORCH_BOX(&fastseq::cuda::attention_forward_cuda));
  m.impl("attention_backward.native", TORCH_BOX(&fastseq::cuda::attention_backward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {  // no tensor among their arguments
  m.impl("native_scan_plan", TORCH_BOX(&fastseq::cuda::native_scan_plan));
  m.impl("native_scan_role", TORCH_BOX(&fastseq::cuda::native_scan_role));
  m.impl("native_scan_schedule", TORCH_BOX(&fastseq::cuda::native_scan_schedule));
  m.impl("native_scan_windows", TORCH_BOX(&fastseq::cuda::native_scan_windows));
}

extern "C" PyMODINIT_FUNC PyInit__native_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native_cuda", "Registers fastseq's CUDA kernels.", -1,
                                   nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
