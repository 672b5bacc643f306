// What of the device the operators need. Defined in device.cu.
#pragma once
#include "recurrent/cuda/recurrent.h"

namespace fastseq::cuda {

#if defined(FASTSEQ_EMULATION)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// The plan for a device, which must be the current one. Its occupancy is asked once for each problem. What cannot be
// read of the device is the reason of a plan without a resident role.
ScanPlan device_plan(int device, const ScanProblem& problem);
// What tests and measurements fixed.
ScanWish& wish();

}  // namespace fastseq::cuda
