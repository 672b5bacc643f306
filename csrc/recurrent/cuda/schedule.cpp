#include "recurrent/cuda/schedule.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace fastseq::cuda {
namespace {

constexpr int kMostWalkers = 4;
constexpr int kShortest = 16;  // steps of a window, at least
// What a further window costs, in steps: a launch, and W_hh's way onto the chip. An estimate from above: on an H200 a call
// of one step, which has a product besides, takes 20 us and more (bench/results), as 8 steps do.
constexpr double kWindowCost = 8;

class Schedule {
 public:
  explicit Schedule(const ScanStack& stack, const ScanDivision& division)
      : stack_(stack), division_(division), walks_(stack.layers * stack.directions * division.windows, -1),
        weights_(walks_), inputs_(stack.layers * division.windows, -1) {}

  int& walk(int layer, int direction, int window) { return walks_[index(layer, direction, window)]; }
  int& weights(int layer, int direction, int window) { return weights_[index(layer, direction, window)]; }
  int& input(int layer, int window) { return inputs_[layer * division_.windows + window]; }

  // Lists a piece and returns its place; of `after` what is there, and on another lane, is kept.
  int add(ScanWork work, int layer, int direction, int window, int lane, const std::vector<int>& after) {
    ScanPiece piece{work, layer, direction, window, lane, {}};
    for (int place : after)
      if (place >= 0 && pieces[place].lane != lane) piece.after.push_back(place);
    pieces.push_back(piece);
    return static_cast<int>(pieces.size()) - 1;
  }
  std::vector<int> walks(int layer, int window) {
    std::vector<int> found;
    for (int d = 0; d < stack_.directions; ++d) found.push_back(walk(layer, d, window));
    return found;
  }

  std::vector<ScanPiece> pieces;

 private:
  int index(int layer, int direction, int window) const {
    return (layer * stack_.directions + direction) * division_.windows + window;
  }
  const ScanStack& stack_;
  const ScanDivision& division_;
  std::vector<int> walks_, weights_, inputs_;
};

// Layers and windows in the order of their walks: as many layers as there are lanes to walk them take a wavefront
// together, then the next. Both count from where the walk begins.
std::vector<std::pair<int, int>> in_order(const ScanStack& stack, const ScanDivision& division) {
  std::vector<std::pair<int, int>> order;
  const int together = stack.directions == 2 ? 1 : division.walkers;
  for (int first = 0; first < stack.layers; first += together) {
    const int count = std::min(together, stack.layers - first);
    for (int diagonal = 0; diagonal < count + division.windows - 1; ++diagonal)
      for (int i = 0; i < count; ++i) {
        const int window = diagonal - i;
        if (window >= 0 && window < division.windows) order.push_back({first + i, window});
      }
  }
  return order;
}

}  // namespace

int most_walkers(const ScanStack& stack) {
  return stack.directions == 2 ? 2 : std::min(stack.layers, kMostWalkers);
}

// A wavefront of S stages over K windows takes (K + S - 1) / K of one stage's T steps and K windows' cost: least at
// K = sqrt((S - 1) T / cost). The lane of the products is a stage too, or as much of one as it has to do.
ScanDivision divide(int64_t steps, const ScanStack& stack, bool backward, int beside, const ScanWish& wish) {
  ScanDivision d;
  const bool wavefront = stack.directions == 1 && beside > 0;
  const int walking = wavefront ? std::min(stack.layers, beside) : 1;
  const double further = walking - 1 + (backward && !stack.with_weights ? 0 : std::min(1.0, stack.products));
  if (wavefront) {
    const auto best = std::llround(std::sqrt(further * double(steps) / kWindowCost));
    d.windows = int(std::clamp<int64_t>(best, 1, std::max<int64_t>(1, steps / kShortest)));
    if (wish.windows) d.windows = int(std::min<int64_t>(wish.windows, steps));
  }
  d.walkers = std::max(1, stack.directions == 2 ? std::min(2, beside) : d.windows > 1 ? walking : 1);
  if (wish.walkers) d.walkers = std::min(wish.walkers, most_walkers(stack));
  d.apart = backward ? (stack.with_weights || stack.with_dx) && (stack.layers > 1 || d.windows > 1) : d.windows > 1;
  d.slots = std::min(stack.layers, (stack.directions == 2 ? 1 : d.walkers) + d.apart);
  return d;
}

std::vector<ScanPiece> schedule_forward(const ScanStack& stack, const ScanDivision& division) {
  Schedule s(stack, division);
  std::vector<int> reader(2 * division.walkers, -1);  // the last walk of what lies in a lane's two buffers
  for (const auto& [layer, window] : in_order(stack, division)) {
    for (int d = 0; d < stack.directions; ++d) {
      const int lane = division.lane(stack, layer, d);
      int& read = reader[2 * lane + window % 2];
      std::vector<int> after = layer ? s.walks(layer - 1, window) : std::vector<int>();
      after.push_back(read);
      const int made = s.add(ScanWork::project, layer, d, window, division.apart ? division.walkers : lane, after);
      read = s.walk(layer, d, window) = s.add(ScanWork::walk, layer, d, window, lane, {made});
    }
  }
  return s.pieces;
}

std::vector<ScanPiece> schedule_backward(const ScanStack& stack, const ScanDivision& division) {
  Schedule s(stack, division);
  const int last = division.windows - 1, aside = division.lanes() - 1;
  for (const auto& [depth, later] : in_order(stack, division)) {
    const int layer = stack.layers - 1 - depth, window = last - later;
    if (depth)
      s.input(layer + 1, window) = s.add(ScanWork::input_gradient, layer + 1, 0, window,
                                         division.lane(stack, layer, 0), s.walks(layer + 1, window));
    for (int d = 0; d < stack.directions; ++d) {
      std::vector<int> after;
      if (depth) after.push_back(s.input(layer + 1, window));
      const int before = layer + division.slots;  // whose dgates lay where this layer's will
      if (window == last && before < stack.layers) {
        after.push_back(s.input(before, 0));
        if (stack.with_weights) after.push_back(s.weights(before, d, 0));
      }
      s.walk(layer, d, window) = s.add(ScanWork::walk, layer, d, window, division.lane(stack, layer, d), after);
    }
    for (int d = 0; d < stack.directions && stack.with_weights; ++d)
      s.weights(layer, d, window) =
          s.add(ScanWork::weight_gradient, layer, d, window, aside, {s.walk(layer, d, window)});
    if (layer == 0 && stack.with_dx) s.add(ScanWork::input_gradient, 0, 0, window, aside, s.walks(0, window));
  }
  return s.pieces;
}

}  // namespace fastseq::cuda
