// Types that the real primitives and their emulation share.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastseq::cuda {

// 16-bit floats as their bits; to_float(), from_float<T>() and pack2<T>() convert.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

// The shape of a launch. `cluster` blocks along x form a cluster (sm_90); a cooperative launch has all its blocks
// resident at once, or fails. `shared` is the dynamic shared memory of a block in bytes.
struct Launch {
  Extent grid{};
  unsigned threads = 1;
  unsigned cluster = 1;
  size_t shared = 0;
  bool cooperative = false;
};

// What a device offers, as far as the choice of a kernel depends on it.
struct DeviceLimits {
  int major, minor;
  int multiprocessors;
  size_t shared_per_block;           // the opt-in maximum, in bytes
  size_t shared_per_multiprocessor;  // in bytes
  bool cooperative;
};

// A barrier in shared memory that counts arrivals and bytes (mbarrier).
using Mbar = uint64_t;

}  // namespace fastseq::cuda
