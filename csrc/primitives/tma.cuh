// Bulk copies by tensor maps (TMA): sm_90 and newer; a trap on older code. A box is a rectangle of at most 4 dimensions
// of a tensor in global memory; in shared memory it lies densely, its first dimension (the contiguous one) fastest, and
// swizzled if the map says so: with rows of 128, 64 or 32 bytes, whatever lies at byte a of a 1024-byte aligned tile is
// found at swizzled<bytes>(a). What a box covers outside the tensor is loaded as zero and not stored.
#pragma once
#include <cuda.h>

#include "primitives/sm90.cuh"

namespace fastseq::cuda {

struct alignas(128) TensorMap {
  CUtensorMap map;
};

// Describes a tensor of `rank` dimensions (2..4), fastest first: `sizes`, `strides` in bytes of dimensions 1..
// (multiples of 16), and `box`, the extent of one copy. `element_bytes` is 2 or 4; `swizzle` is 0 or what a box's row
// has, 32, 64 or 128 bytes. Returns nullptr or the error.
inline const char* make_tensor_map(TensorMap& map, const void* tensor, unsigned element_bytes, unsigned rank,
                                   const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                                   unsigned swizzle) {
  // The driver's function comes through the runtime: nothing links to the driver.
  static void* function = nullptr;
  if (!function) {
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess) return error_text(status);
    if (found != cudaDriverEntryPointSuccess || !function) return "the driver has no cuTensorMapEncodeTiled";
  }
  const uint32_t steps[4] = {1, 1, 1, 1};
  const auto mode = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                    : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                    : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map.map, element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32, rank,
      const_cast<void*>(tensor), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the tensor map";
}

// Where byte `a` of a 1024-byte aligned tile lies when it is swizzled.
template <unsigned kBytes>
FASTSEQ_DEVICE uint32_t swizzled(uint32_t a) {
  static_assert(kBytes == 32 || kBytes == 64 || kBytes == 128, "");
  return a ^ ((a >> 7 & (kBytes / 16 - 1)) << 4);
}

FASTSEQ_DEVICE void tma_prefetch_map(const TensorMap& map) {
  FASTSEQ_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"));
}

// One thread starts the copy of the box at (x, y, z, w) into this block's shared memory (128-byte aligned; 1024 if
// swizzled); its bytes, zeros included, arrive at `bar`, which must expect them.
FASTSEQ_DEVICE void tma_load_2d(void* shared, const TensorMap& map, Mbar* bar, int x, int y) {
  FASTSEQ_SM90(
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                   " [%0], [%1, {%3, %4}], [%2];" ::"r"(detail::shared_address(shared)),
                   "l"(&map), "r"(detail::shared_address(bar)), "r"(x), "r"(y)
                   : "memory"));
}
FASTSEQ_DEVICE void tma_load_3d(void* shared, const TensorMap& map, Mbar* bar, int x, int y, int z) {
  FASTSEQ_SM90(
      asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                   " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(detail::shared_address(shared)),
                   "l"(&map), "r"(detail::shared_address(bar)), "r"(x), "r"(y), "r"(z)
                   : "memory"));
}
FASTSEQ_DEVICE void tma_load_4d(void* shared, const TensorMap& map, Mbar* bar, int x, int y, int z, int w) {
  FASTSEQ_SM90(
      asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                   " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(detail::shared_address(shared)),
                   "l"(&map), "r"(detail::shared_address(bar)), "r"(x), "r"(y), "r"(z), "r"(w)
                   : "memory"));
}
// The same for `bytes` (a multiple of 16) that lie in a row, both ends 16-byte aligned.
FASTSEQ_DEVICE void tma_load_1d(void* shared, const void* global, Mbar* bar, unsigned bytes) {
  FASTSEQ_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(
          detail::shared_address(shared)),
      "l"(global), "r"(detail::shared_address(bar)), "r"(bytes)
      : "memory"));
}

// One thread starts the copy of a box from shared memory. What ordinary stores put there is copied only if each storing
// thread has called fence_proxy_async and a barrier followed. tma_commit closes a group of this thread's stores;
// tma_store_wait<N> waits until at most the N latest groups still read shared memory, tma_store_wait_all<N> until they
// are in global memory.
FASTSEQ_DEVICE void fence_proxy_async() {
  FASTSEQ_SM90(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
}
FASTSEQ_DEVICE void tma_store_2d(const TensorMap& map, const void* shared, int x, int y) {
  FASTSEQ_SM90(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                                &map),
                            "r"(detail::shared_address(shared)), "r"(x), "r"(y)
                            : "memory"));
}
FASTSEQ_DEVICE void tma_store_3d(const TensorMap& map, const void* shared, int x, int y, int z) {
  FASTSEQ_SM90(
      asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                   "r"(detail::shared_address(shared)), "r"(x), "r"(y), "r"(z)
                   : "memory"));
}
FASTSEQ_DEVICE void tma_store_4d(const TensorMap& map, const void* shared, int x, int y, int z, int w) {
  FASTSEQ_SM90(
      asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                       &map),
                   "r"(detail::shared_address(shared)), "r"(x), "r"(y), "r"(z), "r"(w)
                   : "memory"));
}
FASTSEQ_DEVICE void tma_commit() { FASTSEQ_SM90(asm volatile("cp.async.bulk.commit_group;" ::: "memory")); }
template <int N>
FASTSEQ_DEVICE void tma_store_wait() {
  FASTSEQ_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"));
}
template <int N>
FASTSEQ_DEVICE void tma_store_wait_all() {
  FASTSEQ_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"));
}

}  // namespace fastseq::cuda
