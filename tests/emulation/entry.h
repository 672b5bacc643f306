// How a test calls an emulated kernel from outside: every entry has the same signature, so that Python calls it in its
// own process by ctypes, and replay.cpp calls it in a process of its own under a sanitizer.
//
//   FASTSEQ_ENTRY(scale) {                        // pointers p, integers n, reals x; nullptr or the error
//     return launch(..., static_cast<const float*>(p[0]), static_cast<float*>(p[1]), static_cast<int>(n[0]));
//   }
#pragma once
#include <cstdint>

#define FASTSEQ_ENTRY(name)                                                                                   \
  extern "C" __attribute__((visibility("default"))) const char* name([[maybe_unused]] void* const* p,         \
                                                                     [[maybe_unused]] const int64_t* n,       \
                                                                     [[maybe_unused]] const double* x)
