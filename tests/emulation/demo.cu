// Small kernels of the kinds that this package has, in which the mutation suite plants faults: a double-buffered
// pipeline of copies, a recurrence over a cluster, one over a grid by a barrier and one by flags, a ring of TMA copies.
#include "primitives/primitives.cuh"
#include "tests/emulation/entry.h"

namespace fastseq::cuda {

// y[16, 32] = x[16, K] w[32, K]^T in bf16. Four warps take 8 columns each; tiles of 16 of K come by cp.async, one
// ahead.
FASTSEQ_KERNEL(128, 1) pipeline(const Bf16* x, const Bf16* w, float* y, int k) {
  auto* stages = reinterpret_cast<Bf16*>(shared_memory());  // [2][48, 16]: 16 rows of x, 32 of w
  const auto load = [&](int tile) {
    Bf16* stage = stages + tile % 2 * 768;
    const unsigned row = tid() / 2, half = tid() % 2 * 8;
    if (row < 16) cp_async16(stage + row * 16 + half, x + row * k + tile * 16 + half);
    if (row >= 16 && row < 48) cp_async16(stage + row * 16 + half, w + (row - 16) * k + tile * 16 + half);
  };
  float c[4] = {};
  load(0);
  cp_commit();
  for (int tile = 0; tile < k / 16; ++tile) {
    if (tile + 1 < k / 16) load(tile + 1);
    cp_commit();
    cp_wait<1>();
    sync_block();  // all have waited
    const Bf16* stage = stages + tile % 2 * 768;
    uint32_t a[4], b[2];
    ldmatrix_x4(a, stage + lane() % 16 * 16 + lane() / 16 * 8);
    ldmatrix_x2(b, stage + (16 + warp() * 8 + lane() % 8) * 16 + lane() / 8 % 2 * 8);
    mma_m16n8k16<Bf16>(c, a, b);
    sync_block();  // all have read
  }
  const unsigned row = lane() / 4, column = warp() * 8 + lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) y[(row + i / 2 * 8) * 32 + column + i % 2] = c[i];
}

// h_t[j] = tanh(x_t[j] + sum over the 64 units of w[j, k] h_{t-1}[k]), h split over two blocks of 32 threads each:
// every thread has one unit, and pushes its value into both blocks. y[t, j].
FASTSEQ_KERNEL(32, 1) cluster_scan(const float* x, const float* w, float* y, int steps) {
  auto* h = reinterpret_cast<float*>(shared_memory());  // [2][64]
  const unsigned unit = cta_rank() * 32 + tid(), peer = cta_rank() ^ 1;
  h[tid()] = h[32 + tid()] = 0;
  cluster_sync();  // both blocks run and are zero
  for (int t = 0; t < steps; ++t) {
    const float* now = h + t % 2 * 64;
    float* next = h + (t + 1) % 2 * 64;
    float sum = x[t * 64 + unit];
    for (int k = 0; k < 64; ++k) sum += w[unit * 64 + k] * now[k];
    const float v = tanhf(sum);
    y[t * 64 + unit] = v;
    next[unit] = v;
    st_cluster_u32(next + unit, peer, float_bits(v));
    cluster_arrive_release();  // the step
    cluster_wait_acquire();
  }
}

// The same scan by asynchronous stores and mbarriers, with a sum over the warp's lanes: y[t] = sum of h_t.
FASTSEQ_KERNEL(32, 1) mbar_scan(const float* x, const float* w, float* y, int steps) {
  auto* full = reinterpret_cast<Mbar*>(shared_memory());      // [2]
  auto* h = reinterpret_cast<float*>(shared_memory() + 128);  // [2][64]
  const unsigned unit = cta_rank() * 32 + tid();
  if (tid() == 0) {
    mbar_init(full, 1);
    mbar_init(full + 1, 1);
    fence_mbar_init();
    mbar_arrive_tx(full + 1, 256);  // for step 0
    if (steps > 1) mbar_arrive_tx(full, 256);
  }
  h[tid()] = h[32 + tid()] = 0;
  cluster_sync();
  for (int t = 0; t < steps; ++t) {
    const unsigned now = t % 2, next = now ^ 1;
    if (t > 0) {
      mbar_wait_cluster(full + now, (t - 1) / 2 % 2);  // h_t has come
      if (tid() == 0 && t + 1 < steps) mbar_arrive_tx(full + now, 256);
    }
    float sum = x[t * 64 + unit];
    for (int k = 0; k < 64; ++k) sum += w[unit * 64 + k] * h[now * 64 + k];
    const float v = tanhf(sum);
    // Whoever has all of h_{t+1} knows that everyone has read h_t, and may store over it.
    for (unsigned to = 0; to < 2; ++to) st_async(h + next * 64 + unit, to, float_bits(v), full + next);
    float total = v;
    for (unsigned by = 16; by > 0; by /= 2) total += shfl_xor(total, by);
    if (tid() == 0) y[t * 2 + cta_rank()] = total;
  }
  mbar_wait_cluster(full + steps % 2, (steps - 1) / 2 % 2);  // the last h has come: none lands in what is gone
  cluster_sync();
}

// The same scan over the blocks of a cooperative launch, 16 units a block, h in global memory: y[t, j] is h itself.
FASTSEQ_KERNEL(64, 1) grid_scan(const float* x, const float* w, float* y, unsigned* arrived, int steps) {
  auto* part = reinterpret_cast<float*>(shared_memory());  // [4][16]: a quarter of the sum each
  const unsigned unit = bid() * 16 + tid() % 16, quarter = tid() / 16, units = nblocks() * 16;
  for (int t = 0; t < steps; ++t) {
    float sum = 0;
    if (t > 0)
      for (unsigned k = quarter; k < units; k += 4) sum += w[unit * units + k] * ldcg(y + (t - 1) * units + k);
    part[quarter * 16 + tid() % 16] = sum;
    sync_block();  // the parts are there
    if (tid() >= 32 && tid() < 48)
      stcg(y + t * units + unit, tanhf(x[t * units + unit] + part[tid() - 32] + part[tid() - 16] + part[tid()] +
                                       part[tid() + 16]));
    sync_block();  // before the grid's arrival
    if (tid() == 0) {
      red_release_gpu(arrived, 1);
      while (ld_acquire_gpu(arrived) < nblocks() * (t + 1)) {
      }
    }
    sync_block();  // the grid has arrived
  }
}

// Flags in place of the barrier: each block has its own, and two consumer warps wait for the blocks one after another
// while two producer warps, behind a named barrier, do the sum that has come.
FASTSEQ_KERNEL(64, 1) flag_scan(const float* x, const float* w, float* y, unsigned* flag, int steps) {
  auto* h = reinterpret_cast<float*>(shared_memory());  // [units]
  const unsigned units = nblocks() * 32, unit = bid() * 32 + lane();
  for (int t = 0; t < steps; ++t) {
    if (warp() == 1) {  // brings h_{t-1} in
      if (t > 0)
        for (unsigned from = 0; from < nblocks(); ++from) {
          while (ld_acquire_gpu(flag + from) < static_cast<unsigned>(t)) {
          }
          h[from * 32 + lane()] = ldcg(y + (t - 1) * units + from * 32 + lane());
        }
      named_bar_arrive(1, 64);  // h is full
      named_bar_sync(2, 64);    // h is empty
    } else {
      named_bar_sync(1, 64);
      float sum = x[t * units + unit];
      if (t > 0)
        for (unsigned k = 0; k < units; ++k) sum += w[unit * units + k] * h[k];
      stcg(y + t * units + unit, tanhf(sum));
      named_bar_arrive(2, 64);
      sync_warp();  // all lanes have stored
      if (lane() == 0) st_release_gpu(flag + bid(), t + 1);
    }
  }
}

}  // namespace fastseq::cuda

using namespace fastseq::cuda;

namespace {
Launch shape(unsigned blocks, unsigned threads, size_t shared, unsigned cluster, bool cooperative) {
  Launch launch;
  launch.grid.x = blocks;
  launch.threads = threads;
  launch.shared = shared;
  launch.cluster = cluster;
  launch.cooperative = cooperative;
  return launch;
}
const float* in(const void* p) { return static_cast<const float*>(p); }
float* out(void* p) { return static_cast<float*>(p); }
}  // namespace

FASTSEQ_ENTRY(run_pipeline) {
  return launch(pipeline, shape(1, 128, 2 * 768 * 2, 1, false), nullptr, static_cast<const Bf16*>(p[0]),
                static_cast<const Bf16*>(p[1]), out(p[2]), static_cast<int>(n[0]));
}
FASTSEQ_ENTRY(run_cluster_scan) {
  return launch(cluster_scan, shape(2, 32, 512, 2, false), nullptr, in(p[0]), in(p[1]), out(p[2]),
                static_cast<int>(n[0]));
}
FASTSEQ_ENTRY(run_mbar_scan) {
  return launch(mbar_scan, shape(2, 32, 128 + 512, 2, false), nullptr, in(p[0]), in(p[1]), out(p[2]),
                static_cast<int>(n[0]));
}
FASTSEQ_ENTRY(run_grid_scan) {
  return launch(grid_scan, shape(4, 64, 256, 1, n[1] != 0), nullptr, in(p[0]), in(p[1]), out(p[2]),
                static_cast<unsigned*>(p[3]), static_cast<int>(n[0]));
}
FASTSEQ_ENTRY(run_flag_scan) {
  return launch(flag_scan, shape(2, 64, 256, 1, true), nullptr, in(p[0]), in(p[1]), out(p[2]),
                static_cast<unsigned*>(p[3]), static_cast<int>(n[0]));
}
