// What launching needs of the rest: a kernel with its arguments bound, shared memory, and ThreadSanitizer's fibers.
#pragma once
#include <cstddef>

#include "runtime.h"

namespace fastseq::emulation {

using Body = void (*)(void*);

// Runs a kernel over a grid; nullptr, or what was wrong with the launch, or what went wrong in it.
const char* run_launch(const Launch& shape, Body body, void* arguments);

// A block's shared memory: all NaN at first, between pages that nothing may touch, and 1024-byte aligned.
struct SharedMemory {
  unsigned char *pages = nullptr, *begin = nullptr;
  size_t bytes = 0, mapped = 0;

  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory();
  void allocate(size_t size);
  bool overrun() const;  // whether the bytes between the end and the next page were written
};

void finished(Fiber* fiber);       // a thread returned from the kernel
void thread_left(Block& block);    // barriers that wait for one thread less

}  // namespace fastseq::emulation
