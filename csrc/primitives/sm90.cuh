// Clusters, shared-memory barriers that count bytes, and memory of peer blocks: sm_90 and newer. On older code each of
// them traps, so that one kernel source compiles for every GPU.
#pragma once
#include "primitives/sm80.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTSEQ_SM90(...) __VA_ARGS__
#else
#define FASTSEQ_SM90(...) trap()
#endif

namespace fastseq::cuda {

namespace detail {
// The address, in the cluster's window, that `p` has in block `rank`.
FASTSEQ_DEVICE uint32_t peer_address(const void* p, unsigned rank) {
  uint32_t address = 0;
  FASTSEQ_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank)));
  return address;
}
}  // namespace detail

// ---- The cluster: this block's rank in it, its number of blocks, and a barrier of all its threads in two halves.
// What was written before arrive_release is seen after wait_acquire, in any block's shared memory; arrive_relaxed only
// counts. Every thread arrives once and waits once, in turn.
FASTSEQ_DEVICE unsigned cta_rank() {
  unsigned rank = 0;
  FASTSEQ_SM90(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}
FASTSEQ_DEVICE unsigned cluster_size() {
  unsigned size = 1;
  FASTSEQ_SM90(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size)));
  return size;
}
FASTSEQ_DEVICE void cluster_arrive_release() {
  FASTSEQ_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"));
}
FASTSEQ_DEVICE void cluster_arrive_relaxed() {
  FASTSEQ_SM90(asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"));
}
FASTSEQ_DEVICE void cluster_wait_acquire() {
  FASTSEQ_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"));
}
FASTSEQ_DEVICE void cluster_sync() {
  cluster_arrive_release();
  cluster_wait_acquire();
}

// ---- Shared memory of block `rank` of the cluster: `p` is the place in this block's own shared memory that lies at
// the same offset. A store is seen there after a cluster barrier or an mbarrier that orders it. The peer must not have
// returned: a cluster barrier before the first store and one after the last.
FASTSEQ_DEVICE void st_cluster_u32(void* p, unsigned rank, uint32_t v) {
  FASTSEQ_SM90(asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(detail::peer_address(p, rank)), "r"(v)
                            : "memory"));
}
FASTSEQ_DEVICE void st_cluster_v2(void* p, unsigned rank, uint2 v) {
  FASTSEQ_SM90(asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(detail::peer_address(p, rank)),
                            "r"(v.x), "r"(v.y)
                            : "memory"));
}
FASTSEQ_DEVICE void st_cluster_v4(void* p, unsigned rank, uint4 v) {
  FASTSEQ_SM90(asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(detail::peer_address(p, rank)),
                            "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                            : "memory"));
}
FASTSEQ_DEVICE uint32_t ld_cluster_u32(const void* p, unsigned rank) {
  uint32_t v = 0;
  FASTSEQ_SM90(asm volatile("ld.shared::cluster.u32 %0, [%1];"
                            : "=r"(v)
                            : "r"(detail::peer_address(p, rank))
                            : "memory"));
  return v;
}
FASTSEQ_DEVICE uint4 ld_cluster_v4(const void* p, unsigned rank) {
  uint4 v{};
  FASTSEQ_SM90(asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                            : "r"(detail::peer_address(p, rank))
                            : "memory"));
  return v;
}

// ---- mbarriers: 8 bytes of shared memory, 8-byte aligned. A phase ends when `count` arrivals have come and all the
// bytes expected have landed; the wait for phase n (0, 1, 2...) is the wait for parity n % 2. One thread initialises,
// then fence_mbar_init and a block or cluster barrier, before others use it.
FASTSEQ_DEVICE void mbar_init(Mbar* bar, unsigned count) {
  FASTSEQ_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(bar)), "r"(count)
                            : "memory"));
}
FASTSEQ_DEVICE void fence_mbar_init() {
  FASTSEQ_SM90(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"));
}
// Arrives once, releasing what this thread wrote.
FASTSEQ_DEVICE void mbar_arrive(Mbar* bar) {
  FASTSEQ_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(bar))
                            : "memory"));
}
// Arrives once and makes the phase wait for so many more bytes.
FASTSEQ_DEVICE void mbar_arrive_tx(Mbar* bar, unsigned bytes) {
  FASTSEQ_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                                detail::shared_address(bar)),
                            "r"(bytes)
                            : "memory"));
}
// Makes the phase wait for so many more bytes without arriving.
FASTSEQ_DEVICE void mbar_expect_tx(Mbar* bar, unsigned bytes) {
  FASTSEQ_SM90(asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(
                                detail::shared_address(bar)),
                            "r"(bytes)
                            : "memory"));
}
// Arrives at the barrier of block `rank`, releasing what this thread wrote to the cluster.
FASTSEQ_DEVICE void mbar_arrive_remote(Mbar* bar, unsigned rank) {
  FASTSEQ_SM90(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                                detail::peer_address(bar, rank))
                            : "memory"));
}
// Whether the phase of that parity has ended, acquiring what the arrivals released; it may suspend the thread a while.
// The second acquires from the whole cluster: it is the one for barriers at which peers arrive or store.
FASTSEQ_DEVICE bool mbar_try_wait(Mbar* bar, unsigned parity) {
  uint32_t done = 1;
  FASTSEQ_SM90(asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                            " selp.u32 %0, 1, 0, p;\n}"
                            : "=r"(done)
                            : "r"(detail::shared_address(bar)), "r"(parity)
                            : "memory"));
  return done != 0;
}
FASTSEQ_DEVICE bool mbar_try_wait_cluster(Mbar* bar, unsigned parity) {
  uint32_t done = 1;
  FASTSEQ_SM90(
      asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                   " selp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(detail::shared_address(bar)), "r"(parity)
                   : "memory"));
  return done != 0;
}
FASTSEQ_DEVICE void mbar_wait(Mbar* bar, unsigned parity) {
  while (!mbar_try_wait(bar, parity)) {
  }
}
FASTSEQ_DEVICE void mbar_wait_cluster(Mbar* bar, unsigned parity) {
  while (!mbar_try_wait_cluster(bar, parity)) {
  }
}

// ---- Stores to block `rank` that report their bytes (4, 8 or 16) to that block's mbarrier when they have landed.
// `p` and `bar` are places in this block's shared memory, as above; the receiver waits by mbar_wait_cluster.
FASTSEQ_DEVICE void st_async(void* p, unsigned rank, uint32_t v, Mbar* bar) {
  FASTSEQ_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                                detail::peer_address(p, rank)),
                            "r"(v), "r"(detail::peer_address(bar, rank))
                            : "memory"));
}
FASTSEQ_DEVICE void st_async(void* p, unsigned rank, uint2 v, Mbar* bar) {
  FASTSEQ_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(
                                detail::peer_address(p, rank)),
                            "r"(v.x), "r"(v.y), "r"(detail::peer_address(bar, rank))
                            : "memory"));
}
FASTSEQ_DEVICE void st_async(void* p, unsigned rank, uint4 v, Mbar* bar) {
  FASTSEQ_SM90(
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                       detail::peer_address(p, rank)),
                   "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(detail::peer_address(bar, rank))
                   : "memory"));
}

}  // namespace fastseq::cuda
