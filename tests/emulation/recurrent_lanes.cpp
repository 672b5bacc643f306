// Lanes without streams: works are kept until the join, and then run in an order drawn from the machine's seed, of those
// that the lanes and the waits allow; deaf lanes do not hear the waits. In order, they run at once.
#include "recurrent/cuda/lanes.h"

#include <cstdint>
#include <stdexcept>

#include "runtime.h"

namespace {
bool deaf = false;
}
extern "C" __attribute__((visibility("default"))) void fastseq_lanes_deaf(int value) { deaf = value; }

namespace fastseq::cuda {

struct Lanes::State {
  struct Kept {
    int lane;
    std::vector<int> after;
    Work work;
    bool done = false;
  };
  std::vector<Kept> works;
  int count = 0;
  uint64_t random = 0;

  unsigned below(unsigned n) {
    random += 0x9e3779b97f4a7c15ull;
    uint64_t z = random;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<unsigned>((z ^ (z >> 31)) % n);
  }
};

Lanes::Lanes(int, void*, int count, int) : state_(new State{{}, count, emulation::settings.seed + 1}) {}
Lanes::~Lanes() = default;  // an error ends the call: what was left to do is forgotten

int Lanes::add(int lane, const std::vector<int>& after, Work work) {
  State& s = *state_;
  s.works.push_back({lane, after, std::move(work)});
  if (emulation::settings.schedule == emulation::Schedule::in_order) {
    s.works.back().work(nullptr);
    s.works.back().done = true;
  }
  return static_cast<int>(s.works.size()) - 1;
}

void Lanes::join() {
  State& s = *state_;
  // Uniform: any lane that can go on. Else by priority: one lane runs as far as it can before another gets its turn.
  std::vector<unsigned> priority;
  for (int i = 0; i < s.count; ++i) priority.push_back(s.below(1000));
  while (true) {
    std::vector<State::Kept*> ready;
    for (int lane = 0; lane < s.count; ++lane)
      for (State::Kept& next : s.works) {
        if (next.lane != lane || next.done) continue;
        bool free = true;
        for (int other : next.after) free = free && (deaf || s.works[other].done);
        if (free) ready.push_back(&next);
        break;
      }
    if (ready.empty()) break;
    State::Kept* chosen = ready[s.below(unsigned(ready.size()))];
    if (emulation::settings.schedule != emulation::Schedule::uniform)
      for (State::Kept* other : ready)
        if (priority[other->lane] > priority[chosen->lane]) chosen = other;
    chosen->work(nullptr);
    chosen->done = true;
  }
  for (const State::Kept& left : s.works)
    if (!left.done) throw std::runtime_error("lanes: works wait for each other");
  s.works.clear();
}

}  // namespace fastseq::cuda
