// Runs the checks: on a GPU as a program, on the emulated machine one by one from outside.
#include "tests/emulation/check.h"

#if defined(FASTSEQ_EMULATION)
#include "tests/emulation/entry.h"

FASTSEQ_ENTRY(check_name) {
  const auto& all = fastseq::cuda::checks();
  return static_cast<size_t>(n[0]) < all.size() ? all[n[0]].name : nullptr;
}
FASTSEQ_ENTRY(check_run) { return fastseq::cuda::checks()[n[0]].run(); }

#else

int main() {
  using namespace fastseq::cuda;
  DeviceLimits limits{};
  if (const char* error = device_limits(limits)) return std::printf("no GPU: %s\n", error), 1;
  int failed = 0;
  for (const Check& check : checks()) {
    const bool exact = check.oldest == 90 + 1;  // wgmma: sm_90 alone
    const bool can = exact ? limits.major == 9 : 10 * limits.major + limits.minor >= check.oldest;
    const char* error = can ? check.run() : nullptr;
    std::printf("%-32s %s\n", check.name, !can ? "needs another GPU" : error ? error : "ok");
    failed += error != nullptr;
  }
  return failed != 0;
}
#endif
