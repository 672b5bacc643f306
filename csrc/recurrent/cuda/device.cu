// Plans for the device that is current.
#include "recurrent/cuda/device.h"

#include <array>
#include <map>
#include <mutex>

#include "primitives/primitives.cuh"

namespace fastseq::cuda {

ScanWish& wish() {
  static ScanWish fixed;
  return fixed;
}

ScanPlan device_plan(int device, const ScanProblem& problem) {
  static std::mutex mutex;
  static std::map<std::array<int, 13>, ScanPlan> plans;
  const ScanWish& w = wish();
  const auto& [dtype, tf32] = problem.number;
  const std::array<int, 13> key{device,    int(problem.cell), int(dtype),      tf32,   problem.backward, problem.H,
                                problem.B, problem.beside,    problem.options, w.role, w.blocks,         w.threads,
                                w.columns};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end() && !kEmulated) return found->second;  // the emulated device's limits change
  DeviceLimits limits{};
  if (const char* error = device_limits(limits)) {
    ScanPlan none;
    none.reason = error;
    return none;
  }
  if (plans.size() > 4096) plans.clear();  // as many batch sizes as a program may come to have
  return plans[key] = make_plan(limits, problem, w, resident_groups);
}

}  // namespace fastseq::cuda
