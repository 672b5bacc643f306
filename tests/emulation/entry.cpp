// The machine's settings, from outside.
#include "runtime.h"

// schedule: 0 in order, 1 uniform, 2 sticky, 3 by priority. A number that is 0 leaves that limit as it is.
extern "C" __attribute__((visibility("default"))) void fastseq_emulation_set(uint64_t seed, int schedule,
                                                                             unsigned resident, int major,
                                                                             int multiprocessors,
                                                                             uint64_t shared_per_block) {
  using namespace fastseq::emulation;
  settings = Settings{};
  settings.seed = seed;
  settings.schedule = static_cast<Schedule>(schedule);
  if (resident) settings.resident = resident;
  if (major) settings.limits.major = major;
  if (multiprocessors) settings.limits.multiprocessors = multiprocessors;
  if (shared_per_block) {
    settings.limits.shared_per_block = shared_per_block;
    settings.limits.shared_per_multiprocessor = shared_per_block + 1024;
  }
}
