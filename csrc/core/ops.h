// The operators that library.cpp registers. Their schemas, with every shape and dtype, are in fastseq/ops/__init__.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastseq {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
scan_forward_cpu(const torch::stable::Tensor& x, const torch::stable::Tensor& w_ih, const torch::stable::Tensor& w_hh,
                 const std::optional<torch::stable::Tensor>& b_ih, const std::optional<torch::stable::Tensor>& b_hh,
                 const std::optional<torch::stable::Tensor>& w_hr, const std::optional<torch::stable::Tensor>& h0,
                 const std::optional<torch::stable::Tensor>& c0, const std::optional<torch::stable::Tensor>& lengths,
                 const std::optional<torch::stable::Tensor>& reset, int64_t cell, bool reverse, bool save,
                 bool states);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
scan_backward_cpu(const std::optional<torch::stable::Tensor>& dy, const std::optional<torch::stable::Tensor>& dh_n,
                  const std::optional<torch::stable::Tensor>& dc_n,
                  const std::optional<torch::stable::Tensor>& dstates, const torch::stable::Tensor& y,
                  const std::optional<torch::stable::Tensor>& states,
                  const std::optional<torch::stable::Tensor>& tape, const torch::stable::Tensor& w_hh, const std::optional<torch::stable::Tensor>& w_hr,
                  const std::optional<torch::stable::Tensor>& h0, const std::optional<torch::stable::Tensor>& c0,
                  const std::optional<torch::stable::Tensor>& lengths,
                  const std::optional<torch::stable::Tensor>& reset, int64_t cell, bool reverse);

torch::stable::Tensor pack_weights_cpu(const torch::stable::Tensor& w, int64_t gates, int64_t apart);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
scan_gradient_cpu(const std::optional<torch::stable::Tensor>& dy, const std::optional<torch::stable::Tensor>& dh_n,
                  const std::optional<torch::stable::Tensor>& dc_n,
                  const std::optional<torch::stable::Tensor>& dstates, const torch::stable::Tensor& x,
                  const torch::stable::Tensor& w_ih, const torch::stable::Tensor& w_hh,
                  const std::optional<torch::stable::Tensor>& w_hr, const std::optional<torch::stable::Tensor>& h0,
                  const std::optional<torch::stable::Tensor>& c0, const std::optional<torch::stable::Tensor>& lengths,
                  const std::optional<torch::stable::Tensor>& reset, const torch::stable::Tensor& y,
                  const std::optional<torch::stable::Tensor>& states,
                  const std::optional<torch::stable::Tensor>& tape, int64_t cell,
                  bool reverse, bool with_dx, bool with_weights);

// The same; with_starts: dh0 and dc0 are asked for.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
scan_gradient(const std::optional<torch::stable::Tensor>& dy, const std::optional<torch::stable::Tensor>& dh_n,
              const std::optional<torch::stable::Tensor>& dc_n, const std::optional<torch::stable::Tensor>& dstates,
              const torch::stable::Tensor& x, const torch::stable::Tensor& w_ih, const torch::stable::Tensor& w_hh,
              const std::optional<torch::stable::Tensor>& w_hr, const std::optional<torch::stable::Tensor>& h0,
              const std::optional<torch::stable::Tensor>& c0, const std::optional<torch::stable::Tensor>& lengths,
              const std::optional<torch::stable::Tensor>& reset, const torch::stable::Tensor& y,
              const std::optional<torch::stable::Tensor>& states, const std::optional<torch::stable::Tensor>& tape,
              int64_t cell, bool reverse, bool with_dx, bool with_weights, bool with_starts);

}  // namespace fastseq
