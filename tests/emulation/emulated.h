// The primitives of csrc/primitives/*.cuh, where they are explained, on the emulated machine. Each takes, beyond
// the real one's arguments, the line that called it, for reports.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "primitives/types.cuh"
#include "emulated_calls.h"
#include "launch.h"

#define FASTSEQ_KERNEL(threads, blocks) void
#define FASTSEQ_DEVICE inline
#define FASTSEQ_IN_PLACE const
#define FASTSEQ_HERE emulation::Where where = emulation::Where::current()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace fastseq::cuda {

// ---- Launching.
using Stream = void*;

template <class... P, class... A>
const char* launch(void (*kernel)(P...), const Launch& shape, Stream, A&&... arguments) {
  std::tuple<std::decay_t<P>...> values(std::decay_t<P>(std::forward<A>(arguments))...);
  auto body = [&] { std::apply(kernel, values); };
  return emulation::run_launch(shape, [](void* call) { (*static_cast<decltype(body)*>(call))(); }, &body);
}
template <class... P>
int resident_clusters(void (*)(P...), const Launch& shape) {
  return emulation::resident_clusters(shape);
}
template <class... P>
int blocks_per_multiprocessor(void (*)(P...), const Launch& shape) {
  return emulation::blocks_per_multiprocessor(shape);
}
inline const char* device_limits(DeviceLimits& limits) {
  limits = emulation::settings.limits;
  return nullptr;
}
inline const char* set_zero(void* target, size_t bytes, Stream) {
  memset(target, 0, bytes);
  return nullptr;
}

// ---- Where a thread stands.
inline unsigned tid() { return emulation::me().tid; }
inline unsigned nthreads() { return emulation::me().threads; }
inline unsigned lane() { return emulation::me().lane; }
inline unsigned warp() { return emulation::me().warp; }
inline unsigned bid() { return emulation::me().block.x; }
inline unsigned bid_y() { return emulation::me().block.y; }
inline unsigned bid_z() { return emulation::me().block.z; }
inline unsigned nblocks() { return emulation::me().grid.x; }
inline unsigned nblocks_y() { return emulation::me().grid.y; }
inline unsigned nblocks_z() { return emulation::me().grid.z; }
inline unsigned cta_rank() { return emulation::me().rank; }
inline unsigned cluster_size() { return emulation::me().cluster; }
inline unsigned char* shared_memory() { return emulation::me().shared; }

// ---- Arithmetic.
inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float ex2(float x) { return exp2f(x); }
inline float lg2(float x) { return log2f(x); }
inline float rcp(float x) { return 1.f / x; }
inline float rsqrt_(float x) { return 1.f / sqrtf(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline float max_(float x, float y) { return x != x || y != y ? x + y : x > y ? x : y; }
inline float min_(float x, float y) { return x != x || y != y ? x + y : x < y ? x : y; }

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_float(uint32_t{x.bits} << 16); }
inline float to_float(Fp16 x) { return emulation::from_half(x.bits); }
template <class T>
inline T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, Bf16>)
    return {emulation::to_bfloat(x)};
  else
    return {emulation::to_half(x)};
}
template <class T>
inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}
template <class T>
inline float2 unpack2(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  return x - x == 0 ? (bits + 0x1000u) & ~0x1fffu : bits;
}

// ---- Barriers and warp exchange.
inline void sync_block(FASTSEQ_HERE) { emulation::sync_block(where); }
inline void sync_warp(uint32_t mask = 0xffffffffu, FASTSEQ_HERE) { emulation::sync_warp(mask, where); }
inline void named_bar_sync(unsigned id, unsigned count, FASTSEQ_HERE) { emulation::named_bar(id, count, true, where); }
inline void named_bar_arrive(unsigned id, unsigned count, FASTSEQ_HERE) {
  emulation::named_bar(id, count, false, where);
}
template <class T>
inline T shuffle(T v, unsigned from, uint32_t lanes, emulation::Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = emulation::shuffle(bits, from, lanes, where);
  memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T>
inline T shfl_xor(T v, unsigned mask, uint32_t lanes = 0xffffffffu, FASTSEQ_HERE) {
  return shuffle(v, lane() ^ mask, lanes, where);
}
template <class T>
inline T shfl_idx(T v, unsigned from, uint32_t lanes = 0xffffffffu, FASTSEQ_HERE) {
  return shuffle(v, from & 31, lanes, where);
}
template <class T>
inline T shfl_up(T v, unsigned by, uint32_t lanes = 0xffffffffu, FASTSEQ_HERE) {
  return shuffle(v, lane() >= by ? lane() - by : lane(), lanes, where);
}
template <class T>
inline T shfl_down(T v, unsigned by, uint32_t lanes = 0xffffffffu, FASTSEQ_HERE) {
  return shuffle(v, lane() + by < 32 ? lane() + by : lane(), lanes, where);
}
inline uint32_t ballot(bool predicate, uint32_t lanes = 0xffffffffu, FASTSEQ_HERE) {
  return emulation::ballot(predicate, lanes, where);
}

// ---- Matrix fragments.
inline void ldmatrix_x1(uint32_t (&r)[1], const void* row, FASTSEQ_HERE) {
  emulation::ldmatrix(r, 1, false, row, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, FASTSEQ_HERE) {
  emulation::ldmatrix(r, 2, false, row, where);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, FASTSEQ_HERE) {
  emulation::ldmatrix(r, 4, false, row, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, FASTSEQ_HERE) {
  emulation::ldmatrix(r, 2, true, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, FASTSEQ_HERE) {
  emulation::ldmatrix(r, 4, true, row, where);
}
template <class T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTSEQ_HERE) {
  emulation::mma(c, a, b, std::is_same_v<T, Bf16> ? emulation::Operand::bf16 : emulation::Operand::fp16, where);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTSEQ_HERE) {
  emulation::mma(c, a, b, emulation::Operand::tf32, where);
}

// ---- Asynchronous copies.
inline void cp_async16(void* shared, const void* global, unsigned valid = 16, FASTSEQ_HERE) {
  emulation::cp_async(shared, global, 16, valid, where);
}
inline void cp_async8(void* shared, const void* global, unsigned valid = 8, FASTSEQ_HERE) {
  emulation::cp_async(shared, global, 8, valid, where);
}
inline void cp_async4(void* shared, const void* global, unsigned valid = 4, FASTSEQ_HERE) {
  emulation::cp_async(shared, global, 4, valid, where);
}
inline void cp_commit() { emulation::cp_commit(); }
template <int N>
inline void cp_wait() {
  emulation::cp_wait(N);
}

// ---- Global memory between blocks. ThreadSanitizer knows these atomics by itself, but for fences.
inline void st_release_gpu(unsigned* p, unsigned v, FASTSEQ_HERE) {
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
  emulation::stored(where);
}
inline void st_relaxed_gpu(unsigned* p, unsigned v, FASTSEQ_HERE) {
  __atomic_store_n(p, v, emulation::fenced() ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
  emulation::stored(where);
}
inline void red_release_gpu(unsigned* p, unsigned v, FASTSEQ_HERE) {
  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
  emulation::stored(where);
}
inline void red_relaxed_gpu(unsigned* p, unsigned v, FASTSEQ_HERE) {
  __atomic_fetch_add(p, v, emulation::fenced() ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
  emulation::stored(where);
}
inline unsigned ld_acquire_gpu(const unsigned* p, FASTSEQ_HERE) {
  const unsigned v = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  emulation::loaded(p, v, true, where);
  return v;
}
inline unsigned ld_relaxed_gpu(const unsigned* p, FASTSEQ_HERE) {
  const unsigned v = __atomic_load_n(p, __ATOMIC_RELAXED);
  emulation::loaded(p, v, false, where);
  return v;
}
inline unsigned add_acq_rel_gpu(unsigned* p, unsigned v, FASTSEQ_HERE) {
  const unsigned before = __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
  emulation::stored(where);
  return before;
}
inline void fence_gpu() {
  while (const void* p = emulation::fence())
    (void)__atomic_load_n(static_cast<const unsigned*>(p), __ATOMIC_ACQUIRE);
}
inline void red_add(float* p, float v) {
  auto* bits = reinterpret_cast<uint32_t*>(p);
  uint32_t before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &before, float_bits(bits_float(before) + v), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
}
template <class T>
inline T ldcg(const T* p) {
  return *p;
}
template <class T>
inline void stcg(T* p, T v) {
  *p = v;
}
template <class T>
inline T ldg(const T* p) {
  return *p;
}
inline void prefetch_l2(const void*) {}
inline void trap(FASTSEQ_HERE) { emulation::fail("trap", where); }

// ---- Clusters.
inline void cluster_arrive_release(FASTSEQ_HERE) { emulation::cluster_arrive(true, where); }
inline void cluster_arrive_relaxed(FASTSEQ_HERE) { emulation::cluster_arrive(false, where); }
inline void cluster_wait_acquire(FASTSEQ_HERE) { emulation::cluster_wait(where); }
inline void cluster_sync(FASTSEQ_HERE) {
  emulation::cluster_arrive(true, where);
  emulation::cluster_wait(where);
}
inline void st_cluster_u32(void* p, unsigned rank, uint32_t v, FASTSEQ_HERE) {
  emulation::st_cluster(p, rank, &v, sizeof v, where);
}
inline void st_cluster_v2(void* p, unsigned rank, uint2 v, FASTSEQ_HERE) {
  emulation::st_cluster(p, rank, &v, sizeof v, where);
}
inline void st_cluster_v4(void* p, unsigned rank, uint4 v, FASTSEQ_HERE) {
  emulation::st_cluster(p, rank, &v, sizeof v, where);
}
inline uint32_t ld_cluster_u32(const void* p, unsigned rank, FASTSEQ_HERE) {
  uint32_t v;
  emulation::ld_cluster(p, rank, &v, sizeof v, where);
  return v;
}
inline uint4 ld_cluster_v4(const void* p, unsigned rank, FASTSEQ_HERE) {
  uint4 v;
  emulation::ld_cluster(p, rank, &v, sizeof v, where);
  return v;
}

// ---- mbarriers.
inline void mbar_init(Mbar* bar, unsigned count, FASTSEQ_HERE) { emulation::mbar_init(bar, count, where); }
inline void fence_mbar_init() { emulation::fence_mbar_init(); }
inline void mbar_arrive(Mbar* bar, FASTSEQ_HERE) { emulation::mbar_arrive(bar, 1, 0, where); }
inline void mbar_arrive_tx(Mbar* bar, unsigned bytes, FASTSEQ_HERE) { emulation::mbar_arrive(bar, 1, bytes, where); }
inline void mbar_expect_tx(Mbar* bar, unsigned bytes, FASTSEQ_HERE) { emulation::mbar_arrive(bar, 0, bytes, where); }
inline void mbar_arrive_remote(Mbar* bar, unsigned rank, FASTSEQ_HERE) {
  emulation::mbar_arrive_remote(bar, rank, where);
}
inline bool mbar_try_wait(Mbar* bar, unsigned parity, FASTSEQ_HERE) {
  return emulation::mbar_wait(bar, parity, false, false, where);
}
inline bool mbar_try_wait_cluster(Mbar* bar, unsigned parity, FASTSEQ_HERE) {
  return emulation::mbar_wait(bar, parity, true, false, where);
}
inline void mbar_wait(Mbar* bar, unsigned parity, FASTSEQ_HERE) {
  emulation::mbar_wait(bar, parity, false, true, where);
}
inline void mbar_wait_cluster(Mbar* bar, unsigned parity, FASTSEQ_HERE) {
  emulation::mbar_wait(bar, parity, true, true, where);
}
inline void st_async(void* p, unsigned rank, uint32_t v, Mbar* bar, FASTSEQ_HERE) {
  emulation::st_async(p, rank, &v, sizeof v, bar, where);
}
inline void st_async(void* p, unsigned rank, uint2 v, Mbar* bar, FASTSEQ_HERE) {
  emulation::st_async(p, rank, &v, sizeof v, bar, where);
}
inline void st_async(void* p, unsigned rank, uint4 v, Mbar* bar, FASTSEQ_HERE) {
  emulation::st_async(p, rank, &v, sizeof v, bar, where);
}

}  // namespace fastseq::cuda

#include "emulated_sm90a.h"
