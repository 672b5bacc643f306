// The attention operators on the CPU and on a GPU, which core/library.cpp and core/cuda/library.cpp register. Their
// schemas are in fastseq/ops/schemas.py.
#pragma once
#include "attention/marshal.h"

namespace fastseq {

using TwoTensors = std::tuple<torch::stable::Tensor, torch::stable::Tensor>;
using FiveTensors = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                               torch::stable::Tensor>;

TwoTensors attention_forward_cpu(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                 const torch::stable::Tensor& v, FASTSEQ_ATTENTION_OPTIONS);
FiveTensors attention_backward_cpu(const torch::stable::Tensor& d_o, const MaybeTensor& dlse,
                                   const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                   const torch::stable::Tensor& v, const torch::stable::Tensor& o,
                                   const torch::stable::Tensor& lse, FASTSEQ_ATTENTION_OPTIONS, bool bias_grad);

// What a kernel on the CPU returns: whether there was memory for its scratch.
void check_memory(bool enough);

namespace cuda {

TwoTensors attention_forward_cuda(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                  const torch::stable::Tensor& v, FASTSEQ_ATTENTION_OPTIONS);
FiveTensors attention_backward_cuda(const torch::stable::Tensor& d_o, const MaybeTensor& dlse,
                                    const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                    const torch::stable::Tensor& v, const torch::stable::Tensor& o,
                                    const torch::stable::Tensor& lse, FASTSEQ_ATTENTION_OPTIONS, bool bias_grad);

}  // namespace cuda
}  // namespace fastseq
