// One check for each primitive of primitives/tma.cuh (sm_90) and primitives/wgmma.cuh (sm_90a alone).
#include "tests/emulation/check.h"

namespace fastseq::cuda {

constexpr int kWgmma = 91;  // sm_90 and nothing newer

// ---- TMA. A tensor of 2-byte elements, whose values are their numbers; boxes may lie partly outside it.

const std::vector<uint64_t> kSizes = {72, 5, 3, 2};   // elements, fastest first
const std::vector<uint64_t> kStrides = {160, 960, 3200};  // bytes of dimensions 1..: rows are padded

std::vector<uint16_t> numbered(size_t count) {
  std::vector<uint16_t> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<uint16_t>(i + 1);
  return values;
}
// The element at a place of the tensor, or 0 outside it.
uint16_t element_at(int x, int y, int z, int w) {
  if (x < 0 || y < 0 || z < 0 || w < 0 || x >= 72 || y >= 5 || z >= 3 || w >= 2) return 0;
  return static_cast<uint16_t>((x * 2 + y * 160 + z * 960 + w * 3200) / 2 + 1);
}

template <unsigned kSwizzle>
FASTSEQ_KERNEL(64, 1) boxes(FASTSEQ_IN_PLACE TensorMap map, unsigned rank, int4 at, unsigned count, uint16_t* out) {
  unsigned char* tile = shared_memory();
  auto* bar = reinterpret_cast<Mbar*>(tile + 16384);
  if (tid() == 0) {
    tma_prefetch_map(map);
    mbar_init(bar, 1);
    fence_mbar_init();
  }
  sync_block();
  if (tid() == 0) {
    mbar_arrive_tx(bar, count * 2);
    if (rank == 2) tma_load_2d(tile, map, bar, at.x, at.y);
    if (rank == 3) tma_load_3d(tile, map, bar, at.x, at.y, at.z);
    if (rank == 4) tma_load_4d(tile, map, bar, at.x, at.y, at.z, at.w);
  }
  mbar_wait(bar, 0);
  for (unsigned i = tid(); i < count; i += 64) {
    uint32_t place = 2 * i;
    if constexpr (kSwizzle != 0) place = swizzled<kSwizzle>(place);
    out[i] = *reinterpret_cast<uint16_t*>(tile + place);
  }
}
template <unsigned kSwizzle>
const char* check_boxes() {
  Buffer<uint16_t> tensor(numbered(3200));
  const int places[3][4] = {{0, 0, 0, 0}, {48, 3, 2, 1}, {-3, -1, 1, 1}};
  for (unsigned rank = 2; rank <= 4; ++rank)
    for (const int* at : places) {
      const uint32_t box[4] = {kSwizzle ? kSwizzle / 2 : 24, 4, rank > 2 ? 2u : 1u, rank > 3 ? 2u : 1u};
      const unsigned count = box[0] * box[1] * box[2] * box[3];
      TensorMap map;
      if (const char* error =
              make_tensor_map(map, tensor.data(), 2, rank, kSizes.data(), kStrides.data(), box, kSwizzle))
        return error;
      std::vector<uint16_t> expected;
      for (unsigned w = 0; w < box[3]; ++w)
        for (unsigned z = 0; z < box[2]; ++z)
          for (unsigned y = 0; y < box[1]; ++y)
            for (unsigned x = 0; x < box[0]; ++x)
              expected.push_back(element_at(at[0] + static_cast<int>(x), at[1] + static_cast<int>(y),
                                            rank > 2 ? at[2] + static_cast<int>(z) : 0,
                                            rank > 3 ? at[3] + static_cast<int>(w) : 0));
      Buffer<uint16_t> out(count);
      const int4 place = make_int4(at[0], at[1], at[2], at[3]);
      if (const char* error = finish(boxes<kSwizzle>, shape_of(1, 64, 16384 + 64), map, rank, place, count, out.data()))
        return error;
      if (const char* error = compare(out, expected)) return error;
    }
  return nullptr;
}
FASTSEQ_CHECK(tma_load, 90) { return check_boxes<0>(); }
FASTSEQ_CHECK(tma_load_swizzled_by_32, 90) { return check_boxes<32>(); }
FASTSEQ_CHECK(tma_load_swizzled_by_64, 90) { return check_boxes<64>(); }
FASTSEQ_CHECK(tma_load_swizzled_by_128, 90) { return check_boxes<128>(); }

FASTSEQ_KERNEL(64, 1) stored_box(FASTSEQ_IN_PLACE TensorMap map, unsigned rank, int4 at) {
  auto* tile = reinterpret_cast<uint16_t*>(shared_memory());  // [2, 2, 4, 64] swizzled
  for (unsigned i = tid(); i < 1024; i += 64) tile[swizzled<128>(2 * i) / 2] = static_cast<uint16_t>(i + 5000);
  fence_proxy_async();
  sync_block();
  if (tid() == 0) {
    if (rank == 2) tma_store_2d(map, tile, at.x, at.y);
    if (rank == 3) tma_store_3d(map, tile, at.x, at.y, at.z);
    if (rank == 4) tma_store_4d(map, tile, at.x, at.y, at.z, at.w);
    tma_commit();
    tma_store_wait<0>();
    tma_store_wait_all<0>();
  }
}
FASTSEQ_CHECK(tma_store, 90) {
  for (unsigned rank = 2; rank <= 4; ++rank) {
    std::vector<uint16_t> expected = numbered(3200);
    Buffer<uint16_t> tensor(expected);
    const uint32_t box[4] = {64, 4, rank > 2 ? 2u : 1u, rank > 3 ? 2u : 1u};
    TensorMap map;
    if (const char* error = make_tensor_map(map, tensor.data(), 2, rank, kSizes.data(), kStrides.data(), box, 128))
      return error;
    unsigned i = 0;
    for (unsigned w = 0; w < box[3]; ++w)
      for (unsigned z = 0; z < box[2]; ++z)
        for (unsigned y = 0; y < 4; ++y)
          for (unsigned x = 0; x < 64; ++x, ++i) {
            const unsigned at[4] = {x + 16, y + 2, rank > 2 ? z + 1 : 0, rank > 3 ? w + 1 : 0};
            if (at[0] < 72 && at[1] < 5 && at[2] < 3 && at[3] < 2)
              expected[at[0] + at[1] * 80 + at[2] * 480 + at[3] * 1600] = static_cast<uint16_t>(i + 5000);
          }
    if (const char* error = finish(stored_box, shape_of(1, 64, 2048), map, rank, make_int4(16, 2, 1, 1))) return error;
    if (const char* error = compare(tensor, expected)) return error;
  }
  return nullptr;
}

FASTSEQ_KERNEL(32, 1) row_load(const unsigned* in, unsigned* out) {
  auto* bar = reinterpret_cast<Mbar*>(shared_memory());
  auto* line = reinterpret_cast<unsigned*>(shared_memory() + 128);
  if (tid() == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
    tma_load_1d(line, in, bar, 128);
    mbar_arrive_tx(bar, 128);
  }
  sync_block();
  mbar_wait(bar, 0);
  out[tid()] = line[tid() ^ 3];
}
FASTSEQ_CHECK(tma_load_of_a_row, 90) {
  std::vector<unsigned> in, expected;
  for (unsigned i = 0; i < 32; ++i) in.push_back(3 * i), expected.push_back(3 * (i ^ 3));
  Buffer<unsigned> source(in), out(32);
  const unsigned* from = source.data();
  if (const char* error = finish(row_load, shape_of(1, 32, 256), from, out.data())) return error;
  return compare(out, expected);
}

FASTSEQ_CHECK(tensor_maps_refused, 90) {
  Buffer<uint16_t> tensor(1024);
  TensorMap map;
  const uint64_t sizes[2] = {64, 4}, strides[1] = {130};
  const uint32_t box[2] = {64, 4};
  if (!make_tensor_map(map, tensor.data(), 2, 2, sizes, strides, box, 128)) return "a stride of 130 bytes";
  return nullptr;
}

// ---- wgmma: c[64, N] = a[64, 64] b[64, N], then c += the same; a in shared memory or registers, b as n rows of k or
// as k rows of n, swizzled by 128 bytes.

enum class Form { shared, registers, transposed };

template <class T, int N, Form kForm>
FASTSEQ_KERNEL(128, 1) products(const float* a, const float* b, float* c) {
  unsigned char* tile_a = shared_memory();         // [64 m, 64 k]
  unsigned char* tile_b = shared_memory() + 8192;  // [N, 64 k], or [N / 64][64 k, 64 n]
  for (unsigned i = tid(); i < 64 * 64; i += 128)
    *reinterpret_cast<T*>(tile_a + swizzled<128>(2 * i)) = from_float<T>(a[i]);
  for (unsigned i = tid(); i < 64 * N; i += 128) {
    const unsigned n = i / 64, k = i % 64;
    const uint32_t place = kForm == Form::transposed ? n / 64 * 8192 + swizzled<128>(k * 128 + n % 64 * 2)
                                                     : swizzled<128>(2 * i);
    *reinterpret_cast<T*>(tile_b + place) = from_float<T>(b[k * N + n]);
  }
  fence_proxy_async();
  sync_block();
  float sums[N / 2];
  const unsigned row = warp() * 16 + lane() / 4, column = lane() % 4 * 2;
  wg_fence();
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kForm == Form::registers) {
        uint32_t fragment[4];
        for (int i = 0; i < 4; ++i) {
          const float* from = a + (row + i % 2 * 8) * 64 + k * 16 + column + i / 2 * 8;
          fragment[i] = pack2<T>(from[0], from[1]);
        }
        wg_fence();
        wgmma<T>(sums, fragment, wg_desc(tile_b + 32 * k, 16, 1024, 128), pass + k > 0);
        wg_commit();
        wg_wait<0>(sums);
        wg_fence();
      } else if constexpr (kForm == Form::transposed) {
        wgmma<T, 1>(sums, wg_desc(tile_a + 32 * k, 16, 1024, 128), wg_desc(tile_b + 2048 * k, 8192, 1024, 128),
                    pass + k > 0);
      } else {
        wgmma<T>(sums, wg_desc(tile_a + 32 * k, 16, 1024, 128), wg_desc(tile_b + 32 * k, 16, 1024, 128), pass + k > 0);
      }
    }
    wg_commit();
  }
  wg_wait<1>();
  wg_wait<0>(sums);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) c[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = sums[i];
}
template <int N>
const char* check_products(void (*kernel)(const float*, const float*, float*)) {
  std::vector<float> a, b, expected;
  for (unsigned i = 0; i < 64 * 64; ++i) a.push_back(sample(i / 64, i % 64));
  for (unsigned i = 0; i < 64 * N; ++i) b.push_back(sample(i / N + 3, i % N + 1));
  for (unsigned m = 0; m < 64; ++m)
    for (unsigned n = 0; n < N; ++n) {
      float sum = 0;
      for (unsigned k = 0; k < 64; ++k) sum += a[m * 64 + k] * b[k * N + n];
      expected.push_back(2 * sum);
    }
  Buffer<float> da(a), db(b), c(64 * N);
  const float *pa = da.data(), *pb = db.data();
  if (const char* error = finish(kernel, shape_of(1, 128, 8192 + 128 * N), pa, pb, c.data())) return error;
  return compare(c, expected);
}
FASTSEQ_CHECK(wgmma_n16, kWgmma) { return check_products<16>(products<Bf16, 16, Form::shared>); }
FASTSEQ_CHECK(wgmma_n32_fp16, kWgmma) { return check_products<32>(products<Fp16, 32, Form::shared>); }
FASTSEQ_CHECK(wgmma_n64_registers, kWgmma) { return check_products<64>(products<Bf16, 64, Form::registers>); }
FASTSEQ_CHECK(wgmma_n64_transposed, kWgmma) { return check_products<64>(products<Fp16, 64, Form::transposed>); }
FASTSEQ_CHECK(wgmma_n80, kWgmma) { return check_products<80>(products<Fp16, 80, Form::shared>); }
FASTSEQ_CHECK(wgmma_n128_transposed, kWgmma) { return check_products<128>(products<Bf16, 128, Form::transposed>); }
FASTSEQ_CHECK(wgmma_n176_registers, kWgmma) { return check_products<176>(products<Bf16, 176, Form::registers>); }
FASTSEQ_CHECK(wgmma_n256, kWgmma) { return check_products<256>(products<Bf16, 256, Form::shared>); }

// ---- Registers move from a warpgroup to two others, and a store that never happens.

FASTSEQ_KERNEL(384, 1) registers(float* out) {
  auto* line = reinterpret_cast<float*>(shared_memory());
  line[tid()] = static_cast<float>(tid());
  if (warp() < 4)
    reg_dealloc<40>();
  else
    reg_alloc<232>();
  wg_cover(line[tid()] + 1, line + tid());
  out[tid()] = 2 * line[tid()];
}
FASTSEQ_CHECK(registers, kWgmma) {
  Buffer<float> out(384);
  std::vector<float> expected;
  for (unsigned i = 0; i < 384; ++i) expected.push_back(2.f * static_cast<float>(i));
  if (const char* error = finish(registers, shape_of(1, 384, 384 * 4), out.data())) return error;
  return compare(out, expected);
}

}  // namespace fastseq::cuda
