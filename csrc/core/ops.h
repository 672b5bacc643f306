// The operators that library.cpp registers. Their schemas, with every shape and dtype, are in fastseq/ops/schemas.py.
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
                 const std::optional<torch::stable::Tensor>& c0, const std::optional<torch::stable::Tensor>& reset_h,
                 const std::optional<torch::stable::Tensor>& reset_c,
                 const std::optional<torch::stable::Tensor>& lengths, const std::optional<torch::stable::Tensor>& reset,
                 const std::optional<torch::stable::Tensor>& state_mask,
                 const std::optional<torch::stable::Tensor>& zoneout_h,
                 const std::optional<torch::stable::Tensor>& zoneout_c, int64_t cell, bool reverse, bool save,
                 bool states);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
scan_backward_cpu(const std::optional<torch::stable::Tensor>& dy, const std::optional<torch::stable::Tensor>& dh_n,
                  const std::optional<torch::stable::Tensor>& dc_n,
                  const std::optional<torch::stable::Tensor>& dstates, const torch::stable::Tensor& y,
                  const std::optional<torch::stable::Tensor>& states,
                  const std::optional<torch::stable::Tensor>& tape, const torch::stable::Tensor& w_hh, const std::optional<torch::stable::Tensor>& w_hr,
                  const std::optional<torch::stable::Tensor>& h0, const std::optional<torch::stable::Tensor>& c0,
                  const std::optional<torch::stable::Tensor>& reset_h,
                  const std::optional<torch::stable::Tensor>& reset_c,
                  const std::optional<torch::stable::Tensor>& lengths,
                  const std::optional<torch::stable::Tensor>& reset,
                  const std::optional<torch::stable::Tensor>& state_mask,
                  const std::optional<torch::stable::Tensor>& zoneout_h,
                  const std::optional<torch::stable::Tensor>& zoneout_c, int64_t cell, bool reverse);

torch::stable::Tensor pack_weights_cpu(const torch::stable::Tensor& w, int64_t gates, int64_t apart);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, std::vector<torch::stable::Tensor>,
           std::vector<torch::stable::Tensor>, std::vector<torch::stable::Tensor>>
layers_forward_cpu(const torch::stable::Tensor& x, const std::vector<torch::stable::Tensor>& weights,
                   const std::optional<torch::stable::Tensor>& h0, const std::optional<torch::stable::Tensor>& c0,
                   const std::optional<torch::stable::Tensor>& reset_h,
                   const std::optional<torch::stable::Tensor>& reset_c,
                   const std::optional<torch::stable::Tensor>& lengths,
                   const std::optional<torch::stable::Tensor>& reset,
                   const std::optional<torch::stable::Tensor>& state_mask,
                   const std::optional<torch::stable::Tensor>& zoneout_h,
                   const std::optional<torch::stable::Tensor>& zoneout_c, int64_t cell, int64_t num_layers,
                   bool bidirectional, bool reverse, bool save, bool states);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, std::vector<torch::stable::Tensor>>
layers_backward_cpu(const std::optional<torch::stable::Tensor>& dy, const std::optional<torch::stable::Tensor>& dh_n,
                    const std::optional<torch::stable::Tensor>& dc_n, const std::vector<torch::stable::Tensor>& dstates,
                    const torch::stable::Tensor& x, const std::vector<torch::stable::Tensor>& weights,
                    const std::optional<torch::stable::Tensor>& h0, const std::optional<torch::stable::Tensor>& c0,
                    const std::optional<torch::stable::Tensor>& reset_h,
                    const std::optional<torch::stable::Tensor>& reset_c,
                    const std::optional<torch::stable::Tensor>& lengths,
                    const std::optional<torch::stable::Tensor>& reset,
                    const std::optional<torch::stable::Tensor>& state_mask,
                    const std::optional<torch::stable::Tensor>& zoneout_h,
                    const std::optional<torch::stable::Tensor>& zoneout_c,
                    const std::optional<torch::stable::Tensor>& starts, const std::vector<torch::stable::Tensor>& ys,
                    const std::vector<torch::stable::Tensor>& states, const std::vector<torch::stable::Tensor>& tapes,
                    int64_t cell, int64_t num_layers, bool bidirectional, bool reverse, bool with_dx,
                    bool with_weights);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
normed_forward_cpu(const torch::stable::Tensor& gates_x, const torch::stable::Tensor& w_hh,
                   const torch::stable::Tensor& gain, const std::optional<torch::stable::Tensor>& shift,
                   const std::optional<torch::stable::Tensor>& gain_c,
                   const std::optional<torch::stable::Tensor>& shift_c, const std::optional<torch::stable::Tensor>& h0,
                   const std::optional<torch::stable::Tensor>& c0, const std::optional<torch::stable::Tensor>& lengths,
                   const std::optional<torch::stable::Tensor>& reset,
                   const std::optional<torch::stable::Tensor>& state_mask, int64_t cell, bool joint, bool reverse,
                   bool save, bool states);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
normed_backward_cpu(
    const std::optional<torch::stable::Tensor>& dy, const std::optional<torch::stable::Tensor>& dh_n,
    const std::optional<torch::stable::Tensor>& dc_n, const std::optional<torch::stable::Tensor>& dstates,
    const torch::stable::Tensor& y, const std::optional<torch::stable::Tensor>& states,
    const torch::stable::Tensor& tape, const torch::stable::Tensor& stats, const torch::stable::Tensor& w_hh,
    const torch::stable::Tensor& gain, const std::optional<torch::stable::Tensor>& shift,
    const std::optional<torch::stable::Tensor>& gain_c, const std::optional<torch::stable::Tensor>& shift_c,
    const std::optional<torch::stable::Tensor>& h0, const std::optional<torch::stable::Tensor>& c0,
    const std::optional<torch::stable::Tensor>& lengths, const std::optional<torch::stable::Tensor>& reset,
    const std::optional<torch::stable::Tensor>& state_mask, int64_t cell, bool joint, bool reverse);

torch::stable::Tensor feed_forward_cpu(
    const torch::stable::Tensor& x, const torch::stable::Tensor& w1, const std::optional<torch::stable::Tensor>& b1,
    const std::optional<torch::stable::Tensor>& w2, const std::optional<torch::stable::Tensor>& b2,
    const std::optional<torch::stable::Tensor>& residual, const std::optional<torch::stable::Tensor>& before_weight,
    const std::optional<torch::stable::Tensor>& before_bias, const std::optional<torch::stable::Tensor>& after_weight,
    const std::optional<torch::stable::Tensor>& after_bias, double eps, int64_t activation);

}  // namespace fastseq
