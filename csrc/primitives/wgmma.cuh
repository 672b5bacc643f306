// Products of a warpgroup (wgmma): sm_90a alone; a trap on all other code.
//
// Four warps, 128 threads of which the first's number is a multiple of 128, multiply asynchronously:
//   c[64, N] (+)= a[64, 16] b[16, N]
// b is read from shared memory, and a from there or from registers. In order: wg_fence() once the registers hold what
// they should, wgmma(...) as many as wanted, wg_commit(), wg_wait<n>(c), which waits until at most the n latest groups
// are under way; c and a's registers must be left alone between. What ordinary stores put into shared memory needs
// fence_proxy_async() by the storing threads and a barrier before.
//
// Warp w of the four, with g = lane / 4 and t = 2 * (lane % 4), holds
//   c[4 j + i] = (16 w + g + i / 2 * 8, 8 j + t + i % 2)
// and a as mma_m16n8k16 does, of rows 16 w..16 w + 15.
#pragma once
#include "primitives/tma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTSEQ_SM90A(...) __VA_ARGS__
#else
#define FASTSEQ_SM90A(...) trap()
#endif

namespace fastseq::cuda {

// Whether this code is for sm_90a: `if constexpr (kHasWgmma) ... else trap();` leaves a kernel's body out elsewhere.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

template <class T>
constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<Bf16> = true;

// Describes an operand's tile in shared memory, swizzled by 128, 64 or 32 bytes or not at all (0), from the address of
// its first element; `swizzle` wide rows of the tile lie in the order of the swizzle, eight of them an atom.
//   k contiguous: `stride` bytes from one atom of 8 rows (of m or n) to the next; `lead` is not read. 16 further k are
//     32 bytes further on, inside the rows.
//   m or n contiguous (transposed): an atom is 8 k; `stride` bytes to the next 8 k, `lead` bytes to the next `swizzle`
//     bytes of m or n.
//   without swizzle: atoms of 8 rows by 16 bytes; k contiguous: `lead` to the next 8 k, `stride` to the next 8 rows.
FASTSEQ_DEVICE uint64_t wg_desc(const void* tile, unsigned lead, unsigned stride, unsigned swizzle) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return (detail::shared_address(tile) & 0x3ffff) >> 4 | static_cast<uint64_t>(lead >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | mode << 62;
}
FASTSEQ_DEVICE void wg_fence() { FASTSEQ_SM90A(asm volatile("wgmma.fence.sync.aligned;" ::: "memory")); }
FASTSEQ_DEVICE void wg_commit() { FASTSEQ_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")); }
template <int N>
FASTSEQ_DEVICE void wg_wait() {
  FASTSEQ_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"));
}
// The same; and the compiler knows that `c` is only then what it is.
template <int N, int kCount>
FASTSEQ_DEVICE void wg_wait(float (&c)[kCount]) {
  wg_wait<N>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
// Keeps the compiler from moving a wait that follows ahead of what x >= 0 is computed from, which products under way
// were to cover: a store into shared memory that never happens.
FASTSEQ_DEVICE void wg_cover(float x, void* shared) {
  asm volatile("{\n .reg .pred p;\n setp.lt.f32 p, %0, 0f00000000;\n @p st.shared.f32 [%1], %0;\n}" ::"f"(x),
               "r"(detail::shared_address(shared))
               : "memory");
}
// Gives registers back to the multiprocessor, or takes more: all warps of a warpgroup call it; a multiple of 8.
template <int N>
FASTSEQ_DEVICE void reg_dealloc() {
  FASTSEQ_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)));
}
template <int N>
FASTSEQ_DEVICE void reg_alloc() {
  FASTSEQ_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)));
}

// clang-format off
#define FASTSEQ_ALL(...) __VA_ARGS__
#define FASTSEQ_C8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), \
                      "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define FASTSEQ_C16(i) FASTSEQ_C8(i), FASTSEQ_C8(i + 8)
#define FASTSEQ_C32(i) FASTSEQ_C16(i), FASTSEQ_C16(i + 16)
#define FASTSEQ_C64(i) FASTSEQ_C32(i), FASTSEQ_C32(i + 32)
#define FASTSEQ_R8 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTSEQ_R16 \
  FASTSEQ_R8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTSEQ_R32 \
  FASTSEQ_R16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTSEQ_R40 \
  FASTSEQ_R32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTSEQ_R64 \
  FASTSEQ_R32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTSEQ_R88 \
  FASTSEQ_R64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FASTSEQ_R96 \
  FASTSEQ_R88 \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTSEQ_R128 \
  FASTSEQ_R64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c += a b or, unless `accumulate`, c = a b. TYPE is bf16 or f16; REGS and OUT name the accumulators, I0... the operands
// after them.
#define FASTSEQ_WGMMA_SS(N, TYPE, REGS, OUT, A, B, P, TA, TB) \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" P ", 0;\n wgmma.mma_async.sync.aligned.m64n" N "k16.f32." \
               TYPE "." TYPE " {" REGS "}, %" A ", %" B ", p, 1, 1, %" TA ", %" TB ";\n}" \
               : FASTSEQ_ALL OUT : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransA), "n"(kTransB))
#define FASTSEQ_WGMMA_RS(N, TYPE, REGS, OUT, A0, A1, A2, A3, B, P, T) \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" P ", 0;\n wgmma.mma_async.sync.aligned.m64n" N "k16.f32." \
               TYPE "." TYPE " {" REGS "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, %" T ";\n}" \
               : FASTSEQ_ALL OUT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), \
                 "r"(static_cast<int>(accumulate)), "n"(kTransB))
#define FASTSEQ_WGMMA(COUNT, N, REGS, OUT, I0, I1, I2, I3, I4, I5, I6) \
  template <class T, int kTransB = 0, int kTransA = 0> \
  FASTSEQ_DEVICE void wgmma(float (&c)[COUNT], uint64_t a, uint64_t b, bool accumulate = true) { \
    if constexpr (is_bf16<T>) \
      FASTSEQ_SM90A(FASTSEQ_WGMMA_SS(N, "bf16", REGS, OUT, I0, I1, I2, I3, I4)); \
    else \
      FASTSEQ_SM90A(FASTSEQ_WGMMA_SS(N, "f16", REGS, OUT, I0, I1, I2, I3, I4)); \
  } \
  template <class T, int kTransB = 0> \
  FASTSEQ_DEVICE void wgmma(float (&c)[COUNT], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) { \
    if constexpr (is_bf16<T>) \
      FASTSEQ_SM90A(FASTSEQ_WGMMA_RS(N, "bf16", REGS, OUT, I0, I1, I2, I3, I4, I5, I6)); \
    else \
      FASTSEQ_SM90A(FASTSEQ_WGMMA_RS(N, "f16", REGS, OUT, I0, I1, I2, I3, I4, I5, I6)); \
  }

FASTSEQ_WGMMA(8, "16", FASTSEQ_R8, (FASTSEQ_C8(0)),
              "8", "9", "10", "11", "12", "13", "14")
FASTSEQ_WGMMA(16, "32", FASTSEQ_R16, (FASTSEQ_C16(0)),
              "16", "17", "18", "19", "20", "21", "22")
FASTSEQ_WGMMA(32, "64", FASTSEQ_R32, (FASTSEQ_C32(0)),
              "32", "33", "34", "35", "36", "37", "38")
FASTSEQ_WGMMA(40, "80", FASTSEQ_R40, (FASTSEQ_C32(0), FASTSEQ_C8(32)),
              "40", "41", "42", "43", "44", "45", "46")
FASTSEQ_WGMMA(64, "128", FASTSEQ_R64, (FASTSEQ_C64(0)),
              "64", "65", "66", "67", "68", "69", "70")
FASTSEQ_WGMMA(88, "176", FASTSEQ_R88, (FASTSEQ_C64(0), FASTSEQ_C16(64), FASTSEQ_C8(80)),
              "88", "89", "90", "91", "92", "93", "94")
FASTSEQ_WGMMA(96, "192", FASTSEQ_R96, (FASTSEQ_C64(0), FASTSEQ_C32(64)),
              "96", "97", "98", "99", "100", "101", "102")
FASTSEQ_WGMMA(128, "256", FASTSEQ_R128, (FASTSEQ_C64(0), FASTSEQ_C64(64)),
              "128", "129", "130", "131", "132", "133", "134")

// clang-format on
}  // namespace fastseq::cuda
