// Every device primitive that the kernels of this folder use, each wrapped once under a plain name. Nothing else of
// CUDA appears in a kernel, so that the same .cu file is compiled
//   by nvcc  (-std=c++17; sm_80, sm_89, sm_90a, sm_100) for the GPU, and
//   by g++   (-std=c++20 -DFASTSEQ_EMULATION) for the host, where tests/emulation runs its threads as fibers.
//
// How a kernel is written:
//
//   #include "primitives/primitives.cuh"
//   namespace fastseq::cuda {
//   template <class T>
//   FASTSEQ_KERNEL(128, 1) scale(const T* x, T* y, int n) {     // at most 128 threads, at least one block an SM
//     T* tile = reinterpret_cast<T*>(shared_memory());          // dynamic shared memory, 1024-byte aligned
//     ...                                                       // tid(), bid(), sync_block(), cp_async16(...), ...
//   }
//   FASTSEQ_DEVICE float helper(float v) { ... }                // a device function, inlined
//   }
//   // On the host; an error or nullptr comes back:
//   Launch shape;
//   shape.grid.x = 8, shape.threads = 128, shape.shared = bytes;
//   const char* error = launch(scale<Bf16>, shape, stream, x, y, n);
//
// A test calls it through an entry (tests/emulation/entry.h), a second file that includes the .cu; see build.py there.
//
// Rules that the emulation and the older architectures ask for:
//   - no <<<>>>, __shared__, __global__, threadIdx, asm or CUDA header outside primitives*.cuh, nor static shared
//     arrays;
//   - arrays of registers are passed by reference, `uint32_t (&a)[4]`;
//   - threads wait for each other only by what is here: a loop that polls memory does so by ld_acquire_gpu or
//     mbar_try_wait, never by a plain load;
//   - all lanes of a warp-wide operation (sync_warp, shfl_*, ldmatrix_*, mma_*) take part, or those of its mask;
//   - whatever needs sm_90 (clusters, mbarrier transactions, TMA) traps on older code, so one kernel source compiles
//     for all; a kernel that uses wgmma is only launched on sm_90.
#pragma once
#include <cstddef>
#include <cstdint>

#include "primitives/types.cuh"

#if defined(FASTSEQ_EMULATION)
#include "emulated.h"
#else
#include "primitives/launch.cuh"
#include "primitives/sm80.cuh"
#include "primitives/sm90.cuh"
#include "primitives/tma.cuh"
#include "primitives/wgmma.cuh"
#endif
