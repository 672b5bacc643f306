// Work on several streams: one lane is the caller's, which the others leave at their first work and join at the end.
// The host waits for nothing, and all of it can be captured in a CUDA graph. The others' streams have the highest
// priority: their blocks go before those of large products on the caller's. Tensors that two lanes use must be made
// before the first work and live until join().
#pragma once
#include <functional>
#include <memory>
#include <vector>

namespace fastseq::cuda {

class Lanes {
 public:
  using Work = std::function<void(void* stream)>;

  Lanes(int device, void* stream, int count, int callers);
  ~Lanes();  // joins, so that nothing is left running beside the caller's stream when an error ends the call
  // Enqueues work on a lane, after the works of other lanes that are named by their numbers; returns its number. Inside,
  // the lane's stream is torch's current one.
  int add(int lane, const std::vector<int>& after, Work work);
  void join();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fastseq::cuda
