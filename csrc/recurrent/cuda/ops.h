// The recurrent operators on a GPU, which library.cpp registers. Their schemas are in fastseq/ops/schemas.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastseq::cuda {

using OptionalTensor = std::optional<torch::stable::Tensor>;

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
scan_forward_cuda(const torch::stable::Tensor& x, const torch::stable::Tensor& w_ih, const torch::stable::Tensor& w_hh,
                  const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                  const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& reset_h,
                  const OptionalTensor& reset_c, const OptionalTensor& lengths, const OptionalTensor& reset,
                  const OptionalTensor& state_mask, const OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c,
                  int64_t cell, bool reverse, bool save, bool states);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
scan_backward_cuda(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                   const OptionalTensor& dstates, const torch::stable::Tensor& y, const OptionalTensor& states,
                   const OptionalTensor& tape, const torch::stable::Tensor& w_hh, const OptionalTensor& w_hr,
                   const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& reset_h,
                   const OptionalTensor& reset_c, const OptionalTensor& lengths, const OptionalTensor& reset,
                   const OptionalTensor& state_mask, const OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c,
                   int64_t cell, bool reverse);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, std::vector<torch::stable::Tensor>,
           std::vector<torch::stable::Tensor>, std::vector<torch::stable::Tensor>>
layers_forward_cuda(const torch::stable::Tensor& x, const std::vector<torch::stable::Tensor>& weights,
                    const OptionalTensor& h0, const OptionalTensor& c0, const OptionalTensor& reset_h,
                    const OptionalTensor& reset_c, const OptionalTensor& lengths, const OptionalTensor& reset,
                    const OptionalTensor& state_mask, const OptionalTensor& zoneout_h,
                    const OptionalTensor& zoneout_c, int64_t cell, int64_t num_layers, bool bidirectional,
                    bool reverse, bool save, bool with_states);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, std::vector<torch::stable::Tensor>>
layers_backward_cuda(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                     const std::vector<torch::stable::Tensor>& dstates, const torch::stable::Tensor& x,
                     const std::vector<torch::stable::Tensor>& weights, const OptionalTensor& h0,
                     const OptionalTensor& c0, const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                     const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& state_mask,
                     const OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c, const OptionalTensor& starts,
                     const std::vector<torch::stable::Tensor>& ys,
                     const std::vector<torch::stable::Tensor>& states, const std::vector<torch::stable::Tensor>& tapes,
                     int64_t cell, int64_t num_layers, bool bidirectional, bool reverse, bool with_dx,
                     bool with_weights);

// What of a stack of layers runs beside what: windows, lanes, and a piece of work a line.
std::string native_scan_schedule(bool backward, int64_t steps, int64_t layers, int64_t directions, int64_t beside,
                                 bool with_dx, bool with_weights, double products);
// Fixes windows of time and lanes that walk instead of what would be chosen (0: that); forgotten at native_scan_role.
int64_t native_scan_windows(int64_t windows, int64_t walkers);
// The role of a scan and how it divides the work, as one line of name=number, and why no better one is taken.
std::string native_scan_plan(StringHandle cell, StringHandle dtype, bool backward, int64_t hidden, int64_t batch,
                             const std::vector<int64_t>& device);
// Fixes a role and its shape instead of what the plan would choose ("", 0: the plan's own); returns the role.
std::string native_scan_role(StringHandle role, int64_t blocks, int64_t threads, int64_t rows);

}  // namespace fastseq::cuda
