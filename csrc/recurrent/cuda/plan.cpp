// Which role a scan gets, from what the device has. What each kernel needs is reckoned here and nowhere else.
#include "recurrent/cuda/recurrent.h"

#include <algorithm>

namespace fastseq::cuda {
namespace {

int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
int parts(int n, int size) { return (n + size - 1) / size; }
std::string text(long long n) { return std::to_string(n); }

constexpr int kFragmentBytes = kScanTileRows * kScanTileBytes;
// Rows of the batch that a group of blocks walks at once.
constexpr int kColumns[] = {8, 16, 32, 64};
constexpr int kClusters[] = {1, 2, 4, 8, 16};
// Of W_hh in a block of a cluster: more blocks, with fewer each, take longer to exchange h than they save. Measured on an
// H200, as are the other choices below.
constexpr int kFewTiles = 96;

ScanLayout make_layout(const ScanProblem& q, ScanRole role, const ScanShape& shape, int threads, bool copied) {
  const int size = int(bytes_of(q.number.dtype)), gates = gates_of(q.cell), warps = threads / 32;
  const bool twice = q.cell == ScanCell::gru_reset_before;
  const int direct = twice ? 2 : gates;  // gates of the first product
  ScanLayout l;
  l.part = up(q.H, 16 / size);
  l.column = up((q.backward ? gates : 1) * l.part * size, 64) + kScanTileBytes;  // a warp's reads meet no bank twice
  l.buffer = l.column * shape.columns;
  int stored = 0, splits = 0;
  for (int i = 0; i < (twice ? 2 : 1); ++i) {
    ScanProduct& p = l.product[i];
    const int own = i ? 1 : direct;  // gates of this product
    p.rows = (q.backward ? 1 : own) * shape.units;
    p.row_tiles = parts(p.rows, kScanTileRows);
    p.first_k = q.backward && i ? direct * l.part * size / kScanTileBytes : 0;
    p.k_tiles = parts((q.backward ? own : 1) * l.part * size, kScanTileBytes);
    p.splits = std::clamp(warps / p.row_tiles, 1, p.k_tiles);
    p.per_split = parts(p.k_tiles, p.splits);
    p.splits = parts(p.k_tiles, p.per_split);
    p.held = i ? 0 : std::min(scan_held(role, q.number, q.options), p.per_split);
    p.first_fragment = stored;
    const int tasks = p.row_tiles * p.splits;
    stored += tasks * p.per_split - std::min(tasks, warps) * p.held;
    l.tiles += tasks * p.per_split;
    l.partial_rows = std::max(l.partial_rows, p.row_tiles * kScanTileRows + 4);
    splits = std::max(splits, p.splits);
  }
  l.stored = stored;
  const int peers = std::max(1, shape.blocks - 1);
  l.shares = std::max(1, warps / peers), l.peers_apart = std::min(warps, peers);
  while (l.row_lanes < 5 && 16 << l.row_lanes < shape.units * size) ++l.row_lanes;
  l.copy = copied ? l.buffer : 0;
  l.fragments = in_cluster(role) ? 2 * l.buffer : l.copy;
  l.partial = l.fragments + stored * kFragmentBytes;
  l.bias = l.partial + splits * shape.columns * l.partial_rows * 4;
  l.bars = up(l.bias + (q.backward ? 0 : gates * shape.units * 4), 16);
  l.shared = l.bars + (role == ScanRole::cluster ? 16 : 0);  // a barrier for each buffer
  return l;
}

// A plan for at most so many blocks and for so many columns, or none (role step) and why.
ScanPlan attempt(const DeviceLimits& limits, const ScanProblem& q, ScanRole role, int blocks, int columns,
                 int threads) {
  ScanPlan plan;
  const int step = 16 / int(bytes_of(q.number.dtype));
  plan.shape.columns = columns;
  plan.shape.units = up(parts(q.H, blocks), step);
  plan.shape.blocks = parts(q.H, plan.shape.units);  // none without units: who waits for its bytes would wait for ever
  const int wanted = threads;
  for (threads = wanted ? wanted : 128;; threads *= 2) {
    for (bool copied : {role == ScanRole::grid, false}) {
      plan.layout = make_layout(q, role, plan.shape, threads, copied);
      if (plan.layout.shared <= static_cast<long long>(limits.shared_per_block)) break;
    }
    // One element a thread, and of W_hh as much as the registers hold; backward, where a warp's products are longer, less.
    const int held = scan_held(role, q.number, q.options), each = in_cluster(role) ? 1 : kScanElements;
    const bool enough = plan.shape.units * columns <= each * threads &&
                        plan.layout.tiles <= (q.backward ? std::min(held, 8) : held) * threads / 32;
    if (wanted || enough || threads == kScanThreads) break;
  }
  plan.launch.threads = threads;
  plan.launch.shared = plan.layout.shared;
  if (plan.layout.shared > static_cast<long long>(limits.shared_per_block))
    plan.reason = "needs " + text(plan.layout.shared) + " bytes of shared memory a block; this device has " +
                  text(limits.shared_per_block);
  else if (plan.shape.units * columns > kScanElements * threads)
    plan.reason = "leaves more than " + text(kScanElements) + " elements to a thread";
  else
    plan.role = role;
  return plan;
}

void place(ScanPlan& plan, const ScanProblem& q, int at_once) {
  const int tiles = parts(q.B, plan.shape.columns);
  plan.shape.groups = std::max(1, std::min(tiles, at_once));
  plan.launch.grid.x = plan.shape.groups * plan.shape.blocks;
  if (in_cluster(plan.role)) {
    plan.launch.cluster = plan.shape.blocks;
  } else {
    plan.launch.cooperative = true;
    plan.workspace = size_t(plan.shape.groups) * (kScanCounterBytes + 2 * size_t(plan.layout.buffer));
  }
}

ScanPlan plan_cluster(const DeviceLimits& limits, const ScanProblem& q, ScanRole role, const ScanWish& wish,
                      ScanResidency residency) {
  ScanPlan best;
  if (limits.major < 9) {
    best.reason = "clusters of blocks need compute capability 9.0";
    return best;
  }
  int best_groups = 0;
  bool best_suits = false;
  for (int most : kClusters) {
    if (wish.blocks && most != wish.blocks) continue;
    const int first = wish.columns ? wish.columns : kColumns[0];
    ScanPlan plan = attempt(limits, q, role, most, first, wish.threads);
    const int blocks = plan.shape.blocks;
    if (blocks == best.shape.blocks) break;  // no more can share H
    if (plan.role == ScanRole::step) {
      if (best.role == ScanRole::step) best.reason = "a cluster of " + text(blocks) + " " + plan.reason;
      continue;
    }
    const auto groups_of = [&](ScanPlan& p) {
      p.launch.cluster = blocks;
      p.launch.grid.x = blocks;
      if (!residency) return limits.multiprocessors / blocks / q.beside;
      const int found = residency(q, role, p.launch);
      return (blocks == 1 ? found * limits.multiprocessors : found) / q.beside;
    };
    int groups = groups_of(plan);
    if (groups == 0) {
      if (best.role == ScanRole::step)
        best.reason = "this device holds no cluster of " + text(blocks) + " blocks of " + text(plan.layout.shared) +
                      " bytes of shared memory";
      continue;
    }
    for (int columns : kColumns) {  // more rows a group, where there are not groups enough for all
      if (wish.columns || groups * plan.shape.columns >= q.B) break;
      if (columns == first) continue;
      ScanPlan wider = attempt(limits, q, role, most, columns, wish.threads);
      const int fewer = wider.role == ScanRole::step ? 0 : groups_of(wider);
      if (fewer * wider.shape.columns <= groups * plan.shape.columns) break;
      plan = wider, groups = fewer;
    }
    // As few blocks as have few tiles each; failing that, as many as there are, if all rows walk at once.
    const bool suits = groups * plan.shape.columns >= q.B;
    if (best.role != ScanRole::step && (best.layout.tiles <= kFewTiles || (best_suits && !suits))) break;
    best = plan, best_groups = groups, best_suits = suits;
  }
  if (best.role != ScanRole::step) place(best, q, best_groups);
  return best;
}

ScanPlan plan_grid(const DeviceLimits& limits, const ScanProblem& q, const ScanWish& wish, ScanResidency residency) {
  ScanPlan best;
  if (limits.major < 8 || !limits.cooperative) {
    best.reason = "a grid whose blocks wait for each other needs compute capability 8.0 and cooperative launches";
    return best;
  }
  const int step = 16 / int(bytes_of(q.number.dtype)), most = limits.multiprocessors / q.beside;
  double least = 0;
  int fewest = 0;
  for (int share : {1, 2}) {  // groups that divide the device; more have fewer rows each, and more of W_hh a block
    const int units = wish.blocks ? up(parts(q.H, wish.blocks), step) : up(parts(q.H, most / share), step);
    const int blocks = parts(q.H, units);
    fewest = blocks;
    for (int columns : kColumns) {
      if (wish.columns) columns = wish.columns;
      ScanPlan plan = attempt(limits, q, ScanRole::grid, blocks, columns, wish.threads);
      if (plan.role == ScanRole::step || (residency && residency(q, ScanRole::grid, plan.launch) == 0)) {
        if (best.role == ScanRole::step) best = plan;
        break;
      }
      place(plan, q, most / blocks);
      // A step's time, in units of an exchange without bytes: what a block reads of the vector, twice as long where it
      // has no room for a copy; and its products.
      const double bytes = double(plan.layout.buffer) * (plan.layout.copy ? 1 : 2) / 32768;
      const double tiles = double(plan.layout.tiles) * 32 / plan.launch.threads / 12;
      const double cost = parts(q.B, plan.shape.groups * columns) * (1 + bytes + tiles * columns / (columns < 16 ? 8 : 16));
      if (best.role == ScanRole::step || cost < least) best = plan, least = cost;
      if (wish.columns || plan.shape.groups * columns >= q.B) break;
    }
    if (wish.blocks) break;
  }
  if (best.role == ScanRole::step) best.reason = "a grid of " + text(fewest) + " blocks " + best.reason;
  return best;
}

}  // namespace

ScanPlan make_plan(const DeviceLimits& limits, const ScanProblem& problem, const ScanWish& wish,
                   ScanResidency residency) {
  std::string reason;
  for (ScanRole role : {ScanRole::cluster, ScanRole::cluster_barrier, ScanRole::grid}) {
    if (wish.role >= 0 ? wish.role != static_cast<int>(role) : role == ScanRole::cluster_barrier) continue;
    if (role == ScanRole::cluster_barrier && problem.options) {
      reason = "the role cluster_barrier has no options";
      continue;
    }
    ScanPlan plan = in_cluster(role) ? plan_cluster(limits, problem, role, wish, residency)
                                     : plan_grid(limits, problem, wish, residency);
    if (plan.role == role) {
      plan.reason = reason;
      return plan;
    }
    reason += (reason.empty() ? "" : "; ") + plan.reason;
  }
  ScanPlan plan;
  plan.reason = reason.empty() ? "asked for" : reason;
  return plan;
}

}  // namespace fastseq::cuda
