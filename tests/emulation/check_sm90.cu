// One check for each primitive of primitives/sm90.cuh.
#include "tests/emulation/check.h"

namespace fastseq::cuda {

FASTSEQ_KERNEL(64, 1) ranks(unsigned* out) { out[bid() * 64 + tid()] = cta_rank() * 100 + cluster_size(); }
FASTSEQ_CHECK(cluster_ranks, 90) {
  for (unsigned size : {1u, 2u, 4u, 8u}) {
    Buffer<unsigned> out(16 * 64);
    std::vector<unsigned> expected;
    for (unsigned i = 0; i < 16 * 64; ++i) expected.push_back(i / 64 % size * 100 + size);
    if (const char* error = finish(ranks, shape_of(16, 64, 0, size), out.data())) return error;
    if (const char* error = compare(out, expected)) return error;
    if (resident_clusters(ranks, shape_of(16, 64, 0, size)) < 1) return "no cluster fits";
  }
  return nullptr;
}

// Every block sends its next peer a line of each width and reads the previous one's, step after step.
FASTSEQ_KERNEL(32, 1) peers(unsigned* out, unsigned steps) {
  auto* line = reinterpret_cast<unsigned*>(shared_memory());  // [2][32 * 7 and padding]
  unsigned sum = 0;
  const unsigned next = (cta_rank() + 1) % cluster_size();
  cluster_arrive_relaxed();
  cluster_wait_acquire();
  for (unsigned step = 0; step < steps; ++step) {
    unsigned* half = line + step % 2 * 256;
    const unsigned v = bid() * 1000 + step * 100 + tid();
    st_cluster_u32(half + tid(), next, v);
    st_cluster_v2(half + 32 + 2 * tid(), next, make_uint2(v, 2 * v));
    st_cluster_v4(half + 96 + 4 * tid(), next, make_uint4(v, 2 * v, 3 * v, 4 * v));
    cluster_arrive_release();
    cluster_wait_acquire();
    for (unsigned i = tid(); i < 224; i += 32) sum += half[i];
    sum += ld_cluster_u32(half + (tid() ^ 1), next) + ld_cluster_v4(half + 96 + 4 * tid(), next).w;
  }
  out[bid() * 32 + tid()] = sum;
  cluster_sync();
}
FASTSEQ_CHECK(peer_memory, 90) {
  const unsigned steps = 4;
  Buffer<unsigned> out(8 * 32);
  std::vector<unsigned> expected;
  for (unsigned b = 0; b < 8; ++b) {
    const auto sent = [](unsigned block, unsigned step, unsigned t) { return block * 1000 + step * 100 + t; };
    const unsigned previous = b / 4 * 4 + (b + 3) % 4;
    for (unsigned t = 0; t < 32; ++t) {
      unsigned sum = 0;
      for (unsigned step = 0; step < steps; ++step) {
        sum += sent(previous, step, t);
        for (unsigned i = 32 + t; i < 96; i += 32) sum += sent(previous, step, (i - 32) / 2) * (1 + i % 2);
        for (unsigned i = 96 + t; i < 224; i += 32) sum += sent(previous, step, (i - 96) / 4) * (1 + i % 4);
        sum += sent(b, step, t ^ 1) + 4 * sent(b, step, t);
      }
      expected.push_back(sum);
    }
  }
  if (const char* error = finish(peers, shape_of(8, 32, 2048, 4), out.data(), steps)) return error;
  return compare(out, expected);
}

// A ring of two slots between one producing and one consuming warp, by full and empty mbarriers.
FASTSEQ_KERNEL(64, 1) local_mbars(unsigned* out, unsigned steps) {
  auto* bars = reinterpret_cast<Mbar*>(shared_memory());  // full[2], empty[2]
  auto* slots = reinterpret_cast<unsigned*>(shared_memory() + 64);
  if (tid() == 0) {
    for (int i = 0; i < 4; ++i) mbar_init(bars + i, 32);
    fence_mbar_init();
  }
  sync_block();
  unsigned sum = 0;
  for (unsigned step = 0; step < steps; ++step) {
    const unsigned slot = step % 2, parity = step / 2 % 2;
    if (warp() == 0) {
      mbar_wait(bars + 2 + slot, parity ^ 1);
      slots[slot * 32 + lane()] = step * 32 + lane();
      mbar_arrive(bars + slot);
    } else {
      while (!mbar_try_wait(bars + slot, parity)) {
      }
      sum += slots[slot * 32 + (lane() ^ 1)];
      mbar_arrive(bars + 2 + slot);
    }
  }
  if (warp() == 1) out[lane()] = sum;
}
FASTSEQ_CHECK(mbarriers, 90) {
  Buffer<unsigned> out(32);
  std::vector<unsigned> expected;
  for (unsigned l = 0; l < 32; ++l) expected.push_back(45 * 32 + 10 * (l ^ 1));
  if (const char* error = finish(local_mbars, shape_of(1, 64, 512), out.data(), 10u)) return error;
  return compare(out, expected);
}

// Each block stores asynchronously into its peers and waits for their bytes; it tells them that it has read by a remote
// arrival, in place of a cluster barrier a step.
FASTSEQ_KERNEL(32, 1) async_stores(unsigned* out, unsigned steps) {
  auto* bars = reinterpret_cast<Mbar*>(shared_memory());  // full[2], empty[2]
  auto* slots = reinterpret_cast<unsigned*>(shared_memory() + 64);  // [2][blocks][32 * 7 rounded up]
  const unsigned blocks = cluster_size();
  if (tid() == 0) {
    for (int i = 0; i < 2; ++i) mbar_init(bars + i, 1), mbar_init(bars + 2 + i, blocks);
    fence_mbar_init();
  }
  cluster_sync();
  unsigned sum = 0;
  for (unsigned step = 0; step < steps; ++step) {
    const unsigned slot = step % 2, parity = step / 2 % 2;
    if (tid() == 0) mbar_arrive_tx(bars + slot, blocks * 32 * 28);
    mbar_wait_cluster(bars + 2 + slot, parity ^ 1);
    unsigned* line = slots + (slot * blocks + cta_rank()) * 256;
    const unsigned v = cta_rank() * 1000 + step * 100 + tid();
    for (unsigned to = 0; to < blocks; ++to) {
      st_async(line + tid(), to, v, bars + slot);
      st_async(line + 32 + 2 * tid(), to, make_uint2(v, 2 * v), bars + slot);
      st_async(line + 96 + 4 * tid(), to, make_uint4(v, 2 * v, 3 * v, 4 * v), bars + slot);
    }
    if (step % 3 == 0) {
      while (!mbar_try_wait_cluster(bars + slot, parity)) {
      }
    } else {
      mbar_wait_cluster(bars + slot, parity);
    }
    for (unsigned from = 0; from < blocks; ++from)
      for (unsigned i = tid(); i < 224; i += 32) sum += slots[(slot * blocks + from) * 256 + i];
    sync_block();
    if (tid() < blocks) mbar_arrive_remote(bars + 2 + slot, tid());
  }
  out[bid() * 32 + tid()] = sum;
  cluster_sync();
}
FASTSEQ_CHECK(async_stores, 90) {
  const unsigned blocks = 4, steps = 7;
  Buffer<unsigned> out(blocks * 32);
  std::vector<unsigned> expected;
  for (unsigned b = 0; b < blocks; ++b)
    for (unsigned t = 0; t < 32; ++t) {
      unsigned sum = 0;
      for (unsigned step = 0; step < steps; ++step)
        for (unsigned from = 0; from < blocks; ++from) {
          const auto sent = [&](unsigned thread) { return from * 1000 + step * 100 + thread; };
          sum += sent(t);
          for (unsigned i = 32 + t; i < 96; i += 32) sum += sent((i - 32) / 2) * (1 + i % 2);
          for (unsigned i = 96 + t; i < 224; i += 32) sum += sent((i - 96) / 4) * (1 + i % 4);
        }
      expected.push_back(sum);
    }
  if (const char* error = finish(async_stores, shape_of(blocks, 32, 64 + 8 * 1024, blocks), out.data(), steps))
    return error;
  return compare(out, expected);
}

// Two arrivals and expected bytes of one phase, in either order.
FASTSEQ_KERNEL(32, 1) expected_bytes(unsigned* out) {
  auto* bar = reinterpret_cast<Mbar*>(shared_memory());
  auto* line = reinterpret_cast<unsigned*>(shared_memory() + 64);
  if (tid() == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
    mbar_expect_tx(bar, 128);
  }
  cluster_sync();
  st_async(line + tid(), 0, tid() + 1, bar);
  if (tid() == 0) mbar_arrive(bar);
  mbar_wait_cluster(bar, 0);
  out[tid()] = line[tid() ^ 1];
}
FASTSEQ_CHECK(expected_bytes, 90) {
  Buffer<unsigned> out(32);
  std::vector<unsigned> expected;
  for (unsigned t = 0; t < 32; ++t) expected.push_back((t ^ 1) + 1);
  if (const char* error = finish(expected_bytes, shape_of(1, 32, 256, 1), out.data())) return error;
  return compare(out, expected);
}

}  // namespace fastseq::cuda
