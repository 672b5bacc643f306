// The primitives of csrc/primitives/tma.cuh and wgmma.cuh on the emulated machine; for emulated.h.
#pragma once

namespace fastseq::cuda {

// ---- TMA.
using TensorMap = emulation::TensorMap;

inline const char* make_tensor_map(TensorMap& map, const void* tensor, unsigned element_bytes, unsigned rank,
                                   const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                                   unsigned swizzle) {
  // What cuTensorMapEncodeTiled refuses.
  const bool width = swizzle == 0 || swizzle == 32 || swizzle == 64 || swizzle == 128;
  if (rank < 2 || rank > 4 || (element_bytes != 2 && element_bytes != 4) || !width) return "tensor map: no such kind";
  if (reinterpret_cast<uintptr_t>(tensor) % 16) return "tensor map: the tensor is not 16-byte aligned";
  if (box[0] * element_bytes % 16) return "tensor map: a box's row is no multiple of 16 bytes";
  if (swizzle && box[0] * element_bytes != swizzle) return "tensor map: a box's row is not as wide as the swizzle";
  const auto* bytes = static_cast<const unsigned char*>(tensor);
  map = {bytes, element_bytes, rank, swizzle, {1, 1, 1, 1}, {0, 0, 0, 0}, {1, 1, 1, 1}};
  for (unsigned d = 0; d < rank; ++d) {
    if (sizes[d] == 0 || box[d] == 0 || box[d] > 256) return "tensor map: a size of 0, or a box past 256";
    if (d && strides[d - 1] % 16) return "tensor map: a stride is no multiple of 16 bytes";
    map.sizes[d] = sizes[d];
    map.box[d] = box[d];
    if (d) map.strides[d] = strides[d - 1];
  }
  return nullptr;
}
template <unsigned kBytes>
inline uint32_t swizzled(uint32_t a) {
  static_assert(kBytes == 32 || kBytes == 64 || kBytes == 128, "");
  return a ^ ((a >> 7 & (kBytes / 16 - 1)) << 4);
}
inline void tma_prefetch_map(const TensorMap&) {}
inline void tma_load_1d(void* shared, const void* global, Mbar* bar, unsigned bytes, FASTSEQ_HERE) {
  emulation::tma_load_1d(shared, global, bar, bytes, where);
}
inline void tma_load_2d(void* shared, const TensorMap& map, Mbar* bar, int x, int y, FASTSEQ_HERE) {
  emulation::tma_load(shared, map, bar, 2, x, y, 0, 0, where);
}
inline void tma_load_3d(void* shared, const TensorMap& map, Mbar* bar, int x, int y, int z, FASTSEQ_HERE) {
  emulation::tma_load(shared, map, bar, 3, x, y, z, 0, where);
}
inline void tma_load_4d(void* shared, const TensorMap& map, Mbar* bar, int x, int y, int z, int w, FASTSEQ_HERE) {
  emulation::tma_load(shared, map, bar, 4, x, y, z, w, where);
}
inline void fence_proxy_async() { emulation::fence_proxy_async(); }
inline void tma_store_2d(const TensorMap& map, const void* shared, int x, int y, FASTSEQ_HERE) {
  emulation::tma_store(map, shared, 2, x, y, 0, 0, where);
}
inline void tma_store_3d(const TensorMap& map, const void* shared, int x, int y, int z, FASTSEQ_HERE) {
  emulation::tma_store(map, shared, 3, x, y, z, 0, where);
}
inline void tma_store_4d(const TensorMap& map, const void* shared, int x, int y, int z, int w, FASTSEQ_HERE) {
  emulation::tma_store(map, shared, 4, x, y, z, w, where);
}
inline void tma_commit() { emulation::tma_commit(); }
template <int N>
inline void tma_store_wait() {
  emulation::tma_store_wait(N);
}
template <int N>
inline void tma_store_wait_all() {
  emulation::tma_store_wait(N);
}

// ---- wgmma.
inline constexpr bool kHasWgmma = true;
inline uint64_t wg_desc(const void* tile, unsigned lead, unsigned stride, unsigned swizzle, FASTSEQ_HERE) {
  return emulation::wg_desc(tile, lead, stride, swizzle, where);
}
inline void wg_fence() { emulation::wg_fence(); }
inline void wg_commit(FASTSEQ_HERE) { emulation::wg_commit(where); }
template <int N>
inline void wg_wait(FASTSEQ_HERE) {
  emulation::wg_wait(N, where);
}
template <int N, int kCount>
inline void wg_wait(float (&)[kCount], FASTSEQ_HERE) {
  emulation::wg_wait(N, where);
}
inline void wg_cover(float, void*) {}
template <int N>
inline void reg_dealloc() {}
template <int N>
inline void reg_alloc() {}
template <class T, int kTransB = 0, int kTransA = 0, int kCount>
inline void wgmma(float (&c)[kCount], uint64_t a, uint64_t b, bool accumulate = true, FASTSEQ_HERE) {
  emulation::wgmma(c, kCount, nullptr, a, b, kTransA, kTransB, accumulate, !std::is_same_v<T, Bf16>, where);
}
template <class T, int kTransB = 0, int kCount>
inline void wgmma(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate = true, FASTSEQ_HERE) {
  emulation::wgmma(c, kCount, a, 0, b, false, kTransB, accumulate, !std::is_same_v<T, Bf16>, where);
}

}  // namespace fastseq::cuda
