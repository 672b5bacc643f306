// The attention operators on a GPU, which library.cpp registers. Their schemas are in fastseq/ops/__init__.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fastseq::cuda {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_forward_cuda(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& mask,
    const std::optional<torch::stable::Tensor>& sinks, const std::optional<torch::stable::Tensor>& alibi_slopes,
    const std::optional<torch::stable::Tensor>& lengths_q, const std::optional<torch::stable::Tensor>& lengths_k,
    const std::optional<torch::stable::Tensor>& cu_seqlens_q, const std::optional<torch::stable::Tensor>& cu_seqlens_k,
    const std::optional<torch::stable::Tensor>& seed, double scale, bool causal, bool bottom_right,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
attention_backward_cuda(
    const torch::stable::Tensor& d_o, const std::optional<torch::stable::Tensor>& dlse, const torch::stable::Tensor& q,
    const torch::stable::Tensor& k, const torch::stable::Tensor& v, const torch::stable::Tensor& o,
    const torch::stable::Tensor& lse, const std::optional<torch::stable::Tensor>& bias,
    const std::optional<torch::stable::Tensor>& mask, const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& alibi_slopes, const std::optional<torch::stable::Tensor>& lengths_q,
    const std::optional<torch::stable::Tensor>& lengths_k, const std::optional<torch::stable::Tensor>& cu_seqlens_q,
    const std::optional<torch::stable::Tensor>& cu_seqlens_k, const std::optional<torch::stable::Tensor>& seed,
    double scale, bool causal, bool bottom_right, int64_t window_left, int64_t window_right, double softcap,
    double dropout_p, bool bias_grad);

}  // namespace fastseq::cuda
