// The plan and the workspace of a walk that an entry calls without torch.
#pragma once
#include <cstdlib>
#include <cstring>

#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

struct Setting {
  ScanCell cell;
  ScanPlan plan;
  void* workspace;

  // Of a walk whose options are set. n: T, B, H, reverse, cell, role, blocks, threads, rows
  Setting(ScanWalk& a, const int64_t* n, bool backward, const void* lengths, const void* reset)
      : cell(static_cast<ScanCell>(n[4])) {
    a.T = a.total = int(n[0]), a.B = int(n[1]), a.H = int(n[2]), a.reverse = n[3];
    a.lengths = static_cast<const int64_t*>(lengths);
    a.reset = static_cast<const bool*>(reset), a.reset_t = a.B, a.reset_b = 1;
    DeviceLimits limits{};
    device_limits(limits);
    plan = make_plan(limits, {cell, {Dtype::bf16}, backward, a.H, a.B, 1, a.options.any()},
                     {int(n[5]), int(n[6]), int(n[7]), int(n[8])});
    workspace = std::aligned_alloc(256, (plan.workspace + 511) / 256 * 256);
    std::memset(workspace, 0, plan.workspace);
  }
  Setting(const Setting&) = delete;
  ~Setting() { std::free(workspace); }
  Resident resident() const { return {plan.shape, plan.layout, workspace}; }
};

}  // namespace fastseq::cuda
