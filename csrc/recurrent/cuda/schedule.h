// What of a stack of layers runs beside what: pieces of work, the lane of each, and the pieces it waits for.
//
// Time is cut into windows. Layer l walks window k while layer l - 1 walks window k + 1; the two directions of a layer
// walk at once, and then there is one window, as the second begins where the first ends. Beside the walks a lane of its
// own has the products: forward the next window's projection, in backward the gradients of the weights, window by
// window in one order. Pieces of a lane run in the order in which they are listed.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "recurrent/cuda/recurrent.h"

namespace fastseq::cuda {

enum class ScanWork : int {
  project,          // gates_x of a window, into a buffer of the lane that walks it
  walk,             // one direction of one layer over a window, forward or back
  input_gradient,   // the gradient of a layer's input in a window: of x, or into the buffer of the lane that needs it
  weight_gradient,  // what a window adds to the gradients of one direction's weights
};

struct ScanPiece {
  ScanWork work;
  int layer, direction, window, lane;
  std::vector<int> after;  // pieces on other lanes, by their place in the list
};

struct ScanStack {
  int layers = 1, directions = 1;
  bool with_dx = false, with_weights = false;
  double products = 0;  // time of a window's products beside its walk's, estimated
};

// How many windows and lanes: a pure function of sizes and of what the device holds at once.
struct ScanDivision {
  int windows = 1;
  int walkers = 1;     // lanes that walk
  bool apart = false;  // a further lane, the last, has products
  int slots = 1;       // layers whose dgates are kept at once
  int lanes() const { return walkers + apart; }
  // The lane that walks a layer and direction.
  int lane(const ScanStack& stack, int layer, int direction) const {
    return (stack.directions == 2 ? direction : layer) % walkers;
  }
};

// `beside`: how many walks the device holds at once, each on its share; 0: the role is `step`, whose loop is the host's.
ScanDivision divide(int64_t steps, const ScanStack& stack, bool backward, int beside, const ScanWish& wish = {});
// Lanes that could walk at once, at most.
int most_walkers(const ScanStack& stack);

std::vector<ScanPiece> schedule_forward(const ScanStack& stack, const ScanDivision& division);
std::vector<ScanPiece> schedule_backward(const ScanStack& stack, const ScanDivision& division);

}  // namespace fastseq::cuda
