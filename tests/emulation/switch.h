// Switching between the scheduler and fibers.
#pragma once
#include <cstddef>

#include "runtime.h"

namespace fastseq::emulation {

// The scheduler's side of a switch.
struct Context {
  void* stack_pointer = nullptr;
  void* race_fiber = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

void prepare(Fiber& fiber, unsigned char* stack, size_t bytes, void (*main)());
void to_fiber(Context& scheduler, Fiber& fiber);
void to_scheduler(Context& scheduler, Fiber& fiber);
void entered(Context& scheduler, Fiber& fiber);  // a fiber's first act
void race_start(Context& scheduler, Fiber* fibers, size_t count);
void race_stop(Fiber* fibers, size_t count);
void proxy_start(Block& block);
void proxy_stop(Block& block);

}  // namespace fastseq::emulation
