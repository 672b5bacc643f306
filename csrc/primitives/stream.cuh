// Streams and events: host code.
#pragma once
#if defined(FASTSEQ_EMULATION)
#include "emulated_stream.h"
#else
#include "primitives/launch.cuh"

namespace fastseq::cuda {

// A stream beside the caller's, whose blocks go first; an event, at which a stream waits for another's work so far. Each
// call returns nullptr or the error.
using Event = cudaEvent_t;
inline const char* make_stream(Stream& stream) {
  int lowest = 0, highest = 0;
  const cudaError_t status = cudaDeviceGetStreamPriorityRange(&lowest, &highest);
  if (status != cudaSuccess) return error_text(status);
  return error_text(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest));
}
inline const char* make_event(Event& event) {
  return error_text(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
}
inline const char* record_event(Event event, Stream stream) { return error_text(cudaEventRecord(event, stream)); }
inline const char* wait_event(Event event, Stream stream) { return error_text(cudaStreamWaitEvent(stream, event, 0)); }

}  // namespace fastseq::cuda
#endif
