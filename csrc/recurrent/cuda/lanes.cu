// Lanes as CUDA streams. A thread keeps its own for each device, so that one that is captured is never another's.
#include "recurrent/cuda/lanes.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <deque>
#include <map>

#include "primitives/stream.cuh"

namespace fastseq::cuda {
namespace {

void check(const char* error) { STD_TORCH_CHECK(!error, "scan: a CUDA stream: ", error); }

// Made when first asked for, and kept until the process ends: the driver may be gone before a thread's variables are.
struct Kept {
  std::deque<Stream> streams;
  std::deque<Event> events;
  Stream stream(size_t i) {
    while (streams.size() <= i) check(make_stream(streams.emplace_back()));
    return streams[i];
  }
  Event event(size_t i) {
    while (events.size() <= i) check(make_event(events.emplace_back()));
    return events[i];
  }
};
Kept& kept(int device) {
  static thread_local std::map<int, Kept*> all;
  Kept*& found = all[device];
  if (!found) found = new Kept;
  return *found;
}

}  // namespace

struct Lanes::State {
  int device, count, callers;
  Stream caller;
  Kept& own;
  std::vector<char> begun;   // lanes that have left the caller's
  std::vector<int> lane_of;  // of each work

  Stream stream(int lane) { return lane == callers ? caller : own.stream(lane); }
};

// Event 0 is the fork, event 1 + n follows work n.
Lanes::Lanes(int device, void* stream, int count, int callers)
    : state_(new State{
          device, count, callers, static_cast<Stream>(stream), kept(device), std::vector<char>(count), {}}) {
  if (count > 1) check(record_event(state_->own.event(0), state_->caller));
}

Lanes::~Lanes() {
  try {
    join();
  } catch (...) {
  }
}

int Lanes::add(int lane, const std::vector<int>& after, Work work) {
  State& s = *state_;
  const Stream stream = s.stream(lane);
  const bool aside = lane != s.callers;
  if (aside && !s.begun[lane]) check(wait_event(s.own.event(0), stream));
  s.begun[lane] = true;
  for (int other : after)
    if (s.lane_of[other] != lane) check(wait_event(s.own.event(1 + other), stream));
  {
    CUDAStreamGuardHandle guard = nullptr;
    if (aside) TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_stream_guard(stream, s.device, &guard));
    const std::unique_ptr<CUDAStreamGuardOpaque, void (*)(CUDAStreamGuardHandle)> held(
        guard, [](CUDAStreamGuardHandle g) { aoti_torch_delete_cuda_stream_guard(g); });
    work(stream);
  }
  const int number = static_cast<int>(s.lane_of.size());
  s.lane_of.push_back(lane);
  if (s.count > 1) check(record_event(s.own.event(1 + number), stream));
  return number;
}

void Lanes::join() {
  State& s = *state_;
  for (int lane = 0; lane < s.count; ++lane) {
    if (lane == s.callers || !s.begun[lane]) continue;
    s.begun[lane] = false;
    const Event done = s.own.event(0);  // all that waited for the fork has been told so
    check(record_event(done, s.stream(lane)));
    check(wait_event(done, s.caller));
  }
}

}  // namespace fastseq::cuda
