// The recurrent scan on a GPU: one layer, one direction, all time steps or a window of them. Plain arguments, no torch.
//
// Letters: T steps, B batch, H hidden units, G gates of the cell in torch's order. Pointers are to device memory, dense
// unless strides are given, of the scan's dtype unless said otherwise. Roles, of which make_plan() chooses one:
//   cluster   one launch; W_hh is spread over the blocks of a cluster, which push h to each other's shared memory and
//             tell its bytes to the receiver's mbarrier; cluster_barrier: the same, with a barrier of the whole cluster;
//   grid      one cooperative launch; W_hh is spread over many blocks, which exchange h through global memory;
//   step      a launch a step for the gates; the caller makes the products with W_hh.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "recurrent/cells.h"
#include "primitives/types.cuh"

namespace fastseq::cuda {

using ScanCell = Cell;
// The cell whose kernels a cell takes: those of a plain RNN learn its nonlinearity from ScanWalk::relu.
constexpr ScanCell code_of(ScanCell cell) { return cell == ScanCell::rnn_relu ? ScanCell::rnn_tanh : cell; }
// What the scan computes with. tf32: float32 whose products with W_hh are single ones of TF32, not three that keep its
// digits.
struct ScanNumber {
  Dtype dtype;
  bool tf32 = false;
};
enum class ScanRole : int { step, grid, cluster, cluster_barrier };
constexpr bool in_cluster(ScanRole role) { return role == ScanRole::cluster || role == ScanRole::cluster_barrier; }

// The share of a state that zoneout keeps, [total,B,H] by strides in elements, or null.
struct ScanShare {
  const void* data;
  int64_t t, b, u;
};
// What a call may have besides; each is null where it has none. A call with any of it takes kernels of its own, so that
// the others hold no registers for it.
struct ScanOptions {
  const void* mask;                // [B,H]: multiplies h where a product reads it
  const void *reset_h, *reset_c;   // [B,H]: what a reset puts in the place of h and c; null: zeros
  ScanShare zoneout_h, zoneout_c;  // of h and c of the step before
  float *dreset_h, *dreset_c;      // backward [B,H]: the gradients of reset_h and reset_c are added to these

  bool any() const { return mask || reset_h || reset_c || zoneout_h.data || zoneout_c.data; }
};

// What both directions share. A launch walks the T steps from time `first` on of `total`; pointers are to all of them.
// lengths: int64 [B] or null; reset: [total,B] by strides, or null.
struct ScanWalk {
  int T, B, H;
  int first, total;
  bool reverse;
  bool relu;  // of an RNN
  const int64_t* lengths;
  const bool* reset;
  int64_t reset_t, reset_b;
  ScanOptions options;
};

struct ScanForward : ScanWalk {
  const void* gates_x;  // W_ih x + b_ih [T,B,G*H], of the window: row [t - first,b] is row (t - first) * x_t + b * x_b
  int x_t, x_b;
  const void *w_hh, *b_hh, *h0, *c0;  // [G*H,H]; [G*H], [B,H], [B,H] or null
  void *y, *h_n, *c_n;                // [total,B,H]: row [t,b] is row t * y_t + b * y_b; [B,H], an LSTM's [B,H]
  int y_t, y_b;
  float* states;                      // [total,B,H] or null: c of every step
  void* tape;                         // [total,B,tape_of(cell)*H] or null: an LSTM's gates; GRU r,z,n,q
  const float *h_in, *c_in;           // [B,H]: what the window before left, in place of h0 and c0; or null
  float *h_out, *c_out;               // [B,H]: what the next window takes, in place of h_n and c_n; or null
};

struct ScanBackward : ScanWalk {
  const void* dy;  // [T,B,H], of the window, by rows as gates_x; or null
  int x_t, x_b;
  const void *dh_n, *dc_n;  // [B,H] or null
  const float* dstates;     // [total,B,H] or null
  const void *y, *tape, *w_hh, *h0, *c0;  // as the forward pass had them
  int y_t, y_b;
  const float* states;
  void *dgates, *dhidden, *dh0, *dc0;  // [total,B,G*H]; a GRU's [total,B,H]; [B,H] or null
  const float *dh_in, *dc_in;          // as h_in and h_out, for the walk back: in place of dh_n, dc_n and of dh0, dc0
  float *dh_out, *dc_out;
};

// ---- The choice of a role.

constexpr int kScanThreads = 512;  // of a block of the resident roles, at most
constexpr int kScanElements = 2;   // (row, unit) pairs that a thread of theirs looks after, at most
// Tiles of W_hh that a warp of theirs keeps in registers, at most. A float32 one comes apart into two; the grid's blocks
// have few, and addresses in global memory to keep; options (ScanOptions) take registers too.
constexpr int scan_held(ScanRole role, ScanNumber number, bool options) {
  return (role == ScanRole::grid ? 4 : options ? 8 : 12) / (number.dtype == Dtype::f32 && !number.tf32 ? 3 : 1) / 4 * 4;
}
constexpr int kScanCounterBytes = 128;  // of the grid's counter of arrivals: a cache line to itself
// W_hh is taken in tiles of 16 gates by 32 bytes, the vector in 32 bytes of 8 rows of the batch.
constexpr int kScanTileRows = 16, kScanTileColumns = 8, kScanTileBytes = 32;

// How the resident roles divide the work.
struct ScanShape {
  int units = 0;    // of H that a block owns
  int columns = 0;  // rows of the batch that a group of blocks walks at once; a multiple of 8
  int blocks = 0;   // that share one W_hh
  int groups = 0;   // of such blocks; each walks tiles of `columns` rows, one after the other
};

// One product of a block's rows of W (forward: gates of its units; backward: its units, W transposed) with the vector
// that the blocks exchange, in tiles of 16 rows by 32 bytes. A task, one warp's, is a tile of rows and a split of k.
struct ScanProduct {
  int rows = 0, row_tiles = 0;
  int first_k = 0, k_tiles = 0;  // in tiles of the vector
  int splits = 0, per_split = 0;
  int held = 0;              // fragments of a warp's first task that it keeps in registers
  int first_fragment = 0;    // of those in shared memory
};

// Where everything lies in a block's shared memory: offsets and sizes in bytes.
struct ScanLayout {
  ScanProduct product[2];  // the second of gru_reset_before, whose reset needs a product of its own
  int part = 0;            // elements of the vector for each gate, H and padding
  int column = 0;          // a row of the batch in the vector
  int buffer = 0;          // one of the vector's two buffers
  int partial_rows = 0;    // floats from one column of the partial sums to the next
  int copy = 0;            // the grid's copy of the vector, with which shared memory begins; 0 where it has no room
  int fragments = 0, partial = 0, bias = 0, bars = 0, shared = 0;
  int tiles = 0, stored = 0;  // of W_hh in the block, and those of them in shared memory
  // How a block's share of the vector is pushed to the cluster's other blocks: 2^row_lanes lanes take a row of it, and
  // `shares` warps a peer, those of a share `peers_apart` from one peer to the next.
  int row_lanes = 0, shares = 1, peers_apart = 1;
};

struct ScanProblem {
  ScanCell cell;
  ScanNumber number;
  bool backward;
  int H, B;
  int beside = 1;  // scans that are to run at once, each on its share of the device
  bool options = false;  // ScanOptions::any
};

struct ScanPlan {
  ScanRole role = ScanRole::step;
  ScanShape shape;
  ScanLayout layout;
  Launch launch;
  size_t workspace = 0;  // bytes of device memory that are zero when the kernel starts
  std::string reason;    // why no role before it: cluster, then grid, then step
};

// What a caller may fix instead of leaving it to the plan; -1 or 0: nothing. windows and walkers: of a stack of layers.
struct ScanWish {
  int role = -1, blocks = 0, threads = 0, columns = 0;
  int windows = 0, walkers = 0;
};

// How many groups of blocks of that launch the device holds at once; without it the limits alone decide.
using ScanResidency = int (*)(const ScanProblem&, ScanRole, const Launch&);

ScanPlan make_plan(const DeviceLimits& limits, const ScanProblem& problem, const ScanWish& wish = {},
                   ScanResidency residency = nullptr);

// ---- Launches. Each returns nullptr, or why it could not start; `stream` is a cudaStream_t.

int resident_groups(const ScanProblem& problem, ScanRole role, const Launch& launch);
const char* scan_forward(const ScanForward& args, ScanCell cell, ScanNumber number, const ScanPlan& plan,
                         void* workspace, void* stream);
const char* scan_backward(const ScanBackward& args, ScanCell cell, ScanNumber number, const ScanPlan& plan,
                          void* workspace, void* stream);

// out[i] = a[i] + b[i] of n floats, in a dtype; b may be null, out may be a.
const char* scan_add(const float* a, const float* b, void* out, int64_t n, Dtype dtype, void* stream);

// Makes device memory zero, in stream order.
const char* scan_clear(void* target, size_t bytes, void* stream);

// One launch of the role `step`, which does what lies between two products. gru_reset_before takes two launches a step
// (phase 0 and 1). Scratch is dense; nothing in it need be initialised.
//   forward   step -1 makes operand from h0, before the first product; then 0 .. T-1.
//             product [B,N] = operand W_hhᵀ: all gates' rows; phase 0: those of r and z; phase 1: the candidate's
//             operand [B,H]: h with the rows cleared that the next step clears; after phase 0: r * h_prev
//   backward  0 .. T-1 walk back; step T makes dh0 and dc0.
//             product [B,H] = operand W_hh of the launch before (none before step 0); phase 1: of phase 0
//             operand [B,N]: dgates, with a GRU's third gate as in dhidden; phase 0: the candidate's; phase 1: r's and z's
struct ScanStep {
  int step = 0, phase = 0;
  const float* product = nullptr;
  float* state = nullptr;       // [B,H]: h; backward: what reaches h beside the product
  float* cell_state = nullptr;  // [B,H], an LSTM's: c; backward: its gradient
  float* kept = nullptr;        // [B,H], gru_reset_before's: what phase 0 leaves for phase 1
  void* operand = nullptr;
};
const char* step_forward(const ScanForward& args, ScanCell cell, Dtype dtype, const ScanStep& step, void* stream);
const char* step_backward(const ScanBackward& args, ScanCell cell, Dtype dtype, const ScanStep& step,
                          void* stream);

}  // namespace fastseq::cuda
