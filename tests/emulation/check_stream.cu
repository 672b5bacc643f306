// A check of primitives/stream.cuh: work on two streams in the order that their events ask for.
#include "primitives/stream.cuh"
#include "tests/emulation/check.h"

namespace fastseq::cuda {

// Late: what it reads has to have been written long before.
FASTSEQ_KERNEL(32, 1) add_late(const unsigned* from, unsigned* to, unsigned turns) {
  unsigned spent = 0;
  for (unsigned i = 0; i < turns; ++i) spent += ld_relaxed_gpu(from + tid()) & 1u << 31;
  to[tid()] = from[tid()] + 1 + spent;
}
FASTSEQ_CHECK(streams, 80) {
  Stream side{};
  Event forked{}, joined{};
  if (const char* error = make_stream(side)) return error;
  if (const char* error = make_event(forked)) return error;
  if (const char* error = make_event(joined)) return error;
  Buffer<unsigned> a(32, 5), b(32), c(32), d(32);
#if defined(FASTSEQ_EMULATION)
  const unsigned turns = 2;
#else
  const unsigned turns = 1u << 16;  // some milliseconds: long enough for the other stream to overtake
#endif
  const Launch shape = shape_of(1, 32);
  Stream caller{};
#if !defined(FASTSEQ_EMULATION)
  cudaStreamCreateWithFlags(&caller, cudaStreamNonBlocking);  // the default stream would wait for all others
#endif
  for (const char* error : {launch(add_late, shape, caller, a.data(), b.data(), turns), record_event(forked, caller),
                            wait_event(forked, side), launch(add_late, shape, side, b.data(), c.data(), turns),
                            record_event(joined, side), wait_event(joined, caller),
                            launch(add_late, shape, caller, c.data(), d.data(), 0u)})
    if (error) return error;
#if !defined(FASTSEQ_EMULATION)
  if (const char* error = error_text(cudaDeviceSynchronize())) return error;
#endif
  return compare(d, std::vector<unsigned>(32, 8));
}

}  // namespace fastseq::cuda
