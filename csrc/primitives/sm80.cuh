// What every supported GPU has (sm_80 and newer). The names are explained here; the emulation has the same.
#pragma once
#include "primitives/launch.cuh"
#include "primitives/types.cuh"

namespace fastseq::cuda {

// ---- Where a thread stands: in its block, its block in the grid (along x unless named otherwise), its warp.
FASTSEQ_DEVICE unsigned tid() { return threadIdx.x; }
FASTSEQ_DEVICE unsigned nthreads() { return blockDim.x; }
FASTSEQ_DEVICE unsigned lane() { return threadIdx.x & 31; }
FASTSEQ_DEVICE unsigned warp() { return threadIdx.x >> 5; }
FASTSEQ_DEVICE unsigned bid() { return blockIdx.x; }
FASTSEQ_DEVICE unsigned bid_y() { return blockIdx.y; }
FASTSEQ_DEVICE unsigned bid_z() { return blockIdx.z; }
FASTSEQ_DEVICE unsigned nblocks() { return gridDim.x; }
FASTSEQ_DEVICE unsigned nblocks_y() { return gridDim.y; }
FASTSEQ_DEVICE unsigned nblocks_z() { return gridDim.z; }

// The block's dynamic shared memory, 1024-byte aligned, holding anything at first.
FASTSEQ_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char fastseq_shared_memory[];
  return fastseq_shared_memory;
}

namespace detail {
FASTSEQ_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
}  // namespace detail

// ---- Arithmetic of a few ulp, flushing subnormals: 2^x, log2 x, 1/x, 1/sqrt x (about 2 ulp), tanh (2^-11 relative).
FASTSEQ_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTSEQ_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTSEQ_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTSEQ_DEVICE float rsqrt_(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTSEQ_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The greater and the smaller; NaN if either is NaN.
FASTSEQ_DEVICE float max_(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
FASTSEQ_DEVICE float min_(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// ---- 16-bit floats, and fp32 rounded to tf32 (to nearest, ties away), as mma takes it.
FASTSEQ_DEVICE float to_float(float x) { return x; }
FASTSEQ_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FASTSEQ_DEVICE float to_float(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
FASTSEQ_DEVICE T from_float(float x);
template <>
FASTSEQ_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FASTSEQ_DEVICE Bf16 from_float<Bf16>(float x) {
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
FASTSEQ_DEVICE Fp16 from_float<Fp16>(float x) {
  Fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two 16-bit floats in one register, `low` in its lower half, as mma's fragments hold them.
template <class T>
FASTSEQ_DEVICE uint32_t pack2(float low, float high);
template <>
FASTSEQ_DEVICE uint32_t pack2<Bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
FASTSEQ_DEVICE uint32_t pack2<Fp16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <class T>
FASTSEQ_DEVICE float2 unpack2(uint32_t pair) {
  return make_float2(to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)}));
}
FASTSEQ_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
FASTSEQ_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FASTSEQ_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// ---- Barriers. All threads of the block that have not returned; the given lanes of the warp; or one of the barriers
// 1..15, which opens when `count` threads, whole warps, have arrived, and for which named_bar_arrive does not wait.
FASTSEQ_DEVICE void sync_block() { __syncthreads(); }
FASTSEQ_DEVICE void sync_warp(uint32_t mask = 0xffffffffu) { __syncwarp(mask); }
FASTSEQ_DEVICE void named_bar_sync(unsigned id, unsigned count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
FASTSEQ_DEVICE void named_bar_arrive(unsigned id, unsigned count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ---- Warp exchange: the value of lane ^ mask, of lane `from`, of the lane `by` below or above (own value at the rim).
template <class T>
FASTSEQ_DEVICE T shfl_xor(T v, unsigned mask, uint32_t lanes = 0xffffffffu) {
  return __shfl_xor_sync(lanes, v, static_cast<int>(mask));
}
template <class T>
FASTSEQ_DEVICE T shfl_idx(T v, unsigned from, uint32_t lanes = 0xffffffffu) {
  return __shfl_sync(lanes, v, static_cast<int>(from));
}
template <class T>
FASTSEQ_DEVICE T shfl_up(T v, unsigned by, uint32_t lanes = 0xffffffffu) {
  return __shfl_up_sync(lanes, v, by);
}
template <class T>
FASTSEQ_DEVICE T shfl_down(T v, unsigned by, uint32_t lanes = 0xffffffffu) {
  return __shfl_down_sync(lanes, v, by);
}
// Bit l is set where lane l's predicate holds.
FASTSEQ_DEVICE uint32_t ballot(bool predicate, uint32_t lanes = 0xffffffffu) { return __ballot_sync(lanes, predicate); }

// ---- Matrix fragments. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes a row, 16-byte aligned); x1
// uses the addresses of lanes 0..7, x2 of 0..15. r[i] gets of matrix i row lane / 4, elements 2 * (lane % 4) and next.
FASTSEQ_DEVICE void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(detail::shared_address(row))
               : "memory");
}
FASTSEQ_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(row))
               : "memory");
}
FASTSEQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(row))
               : "memory");
}
// The same, each 8x8 matrix transposed: row lane / 4 of what r[i] gets is that column of the stored matrix.
FASTSEQ_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(row))
               : "memory");
}
FASTSEQ_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(row))
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8], with g = lane / 4 and t = 2 * (lane % 4):
//   a[0] = (g, t..t+1), a[1] = (g + 8, t..), a[2] = (g, t + 8..), a[3] = (g + 8, t + 8..)
//   b[0] = (t..t+1, g), b[1] = (t + 8.., g);  c[0..1] = (g, t..t+1), c[2..3] = (g + 8, t..t+1)
template <class T>
FASTSEQ_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
FASTSEQ_DEVICE void mma_m16n8k16<Bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FASTSEQ_DEVICE void mma_m16n8k16<Fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c[16, 8] += a[16, 8] b[8, 8] in tf32 (the operands' low 13 bits are not read), with g = lane / 4 and t = lane % 4:
//   a[0] = (g, t), a[1] = (g + 8, t), a[2] = (g, t + 4), a[3] = (g + 8, t + 4);  b[0] = (t, g), b[1] = (t + 4, g)
//   c as above
FASTSEQ_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Asynchronous copies from global to shared memory: 16, 8 or 4 bytes, aligned so; of them the first `valid` are
// read and the rest become zero. cp_commit closes a group; cp_wait<N> waits until at most the N latest groups of this
// thread are under way; others see the bytes after a barrier that follows.
FASTSEQ_DEVICE void cp_async16(void* shared, const void* global, unsigned valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(valid)
               : "memory");
}
FASTSEQ_DEVICE void cp_async8(void* shared, const void* global, unsigned valid = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(valid)
               : "memory");
}
FASTSEQ_DEVICE void cp_async4(void* shared, const void* global, unsigned valid = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(valid)
               : "memory");
}
FASTSEQ_DEVICE void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
FASTSEQ_DEVICE void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Global memory between blocks. A release store or addition makes all that this thread wrote, or saw written,
// visible to whoever reads it by ld_acquire_gpu; `relaxed` ones only do so with fence_gpu on both sides.
FASTSEQ_DEVICE void st_release_gpu(unsigned* p, unsigned v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTSEQ_DEVICE void st_relaxed_gpu(unsigned* p, unsigned v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTSEQ_DEVICE void red_release_gpu(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTSEQ_DEVICE void red_relaxed_gpu(unsigned* p, unsigned v) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTSEQ_DEVICE unsigned ld_acquire_gpu(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FASTSEQ_DEVICE unsigned ld_relaxed_gpu(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Adds and returns what was there before, releasing and acquiring.
FASTSEQ_DEVICE unsigned add_acq_rel_gpu(unsigned* p, unsigned v) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
FASTSEQ_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Adds in any order, without ordering anything else.
FASTSEQ_DEVICE void red_add(float* p, float v) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

// Loads past the first-level cache, for what other blocks wrote in this launch; stores that stay in the second level.
template <class T>
FASTSEQ_DEVICE T ldcg(const T* p) {
  return __ldcg(p);
}
template <class T>
FASTSEQ_DEVICE void stcg(T* p, T v) {
  __stcg(p, v);
}
// Loads of what no thread writes during the launch.
template <class T>
FASTSEQ_DEVICE T ldg(const T* p) {
  return __ldg(p);
}

// Starts bringing the cache line of what no thread writes during the launch into the second level.
FASTSEQ_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Ends the kernel with an error.
FASTSEQ_DEVICE void trap() { asm volatile("trap;"); }

}  // namespace fastseq::cuda
