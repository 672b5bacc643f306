// One check for each primitive of primitives/sm80.cuh.
#include "tests/emulation/check.h"

namespace fastseq::cuda {

// ---- Indices.

FASTSEQ_KERNEL(96, 1) indices(unsigned* out) {
  const unsigned block = (bid_z() * nblocks_y() + bid_y()) * nblocks() + bid();
  out[block * nthreads() + tid()] = tid() + 100 * lane() + 10000 * warp() + 100000 * bid() + 1000000 * bid_y() +
                                    10000000 * bid_z() + 100000000 * nblocks_z();
}
FASTSEQ_CHECK(indices, 80) {
  Buffer<unsigned> out(12 * 96);
  Launch shape = shape_of(3, 96);
  shape.grid.y = shape.grid.z = 2;
  std::vector<unsigned> expected;
  for (unsigned block = 0; block < 12; ++block)
    for (unsigned t = 0; t < 96; ++t)
      expected.push_back(t + 100 * (t % 32) + 10000 * (t / 32) + 100000 * (block % 3) + 1000000 * (block / 3 % 2) +
                         10000000 * (block / 6) + 200000000);
  if (const char* error = finish(indices, shape, out.data())) return error;
  return compare(out, expected);
}

// ---- Arithmetic and 16-bit floats.

FASTSEQ_KERNEL(32, 1) arithmetic(const float* x, float* y) {
  const float v = x[tid()];
  const float results[] = {ex2(v),          lg2(v),          rcp(v),     rsqrt_(v), tanh_approx(v),
                           max_(v, 2.f),    min_(v, 2.f),    bits_float(to_tf32(v)),
                           to_float(from_float<Bf16>(v)), to_float(from_float<Fp16>(v)), from_float<float>(v)};
  for (int i = 0; i < 11; ++i) y[i * 32 + tid()] = results[i];
}
FASTSEQ_CHECK(arithmetic, 80) {
  std::vector<float> x;
  for (int i = 0; i < 32; ++i) x.push_back(std::ldexp(1.f + 0.037f * static_cast<float>(i), i / 4 - 6));
  std::vector<std::vector<float>> expected(11);
  const auto rounded = [](float v, int bits) {  // to so many bits after the point, no ties among the samples
    int exponent;
    const double fraction = std::frexp(static_cast<double>(v), &exponent);
    return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(fraction, bits + 1)), exponent - bits - 1));
  };
  for (float v : x) {
    const float row[] = {std::exp2(v), std::log2(v),     1 / v,          1 / std::sqrt(v), std::tanh(v),
                         v > 2 ? v : 2, v < 2 ? v : 2, rounded(v, 10), rounded(v, 7),    rounded(v, 10), v};
    for (int i = 0; i < 11; ++i) expected[i].push_back(row[i]);
  }
  Buffer<float> in(x), out(11 * 32);
  if (const char* error = finish(arithmetic, shape_of(1, 32), in.data(), out.data())) return error;
  const std::vector<float> values = out.values();
  for (int i = 0; i < 11; ++i) {
    Buffer<float> row(std::vector<float>(values.begin() + 32 * i, values.begin() + 32 * (i + 1)));
    if (const char* error = compare(row, expected[i], i == 4 ? 1e-3 : i < 4 ? 1e-6 : 0))
      return complain("row " + std::to_string(i) + ": " + error);
  }
  return nullptr;
}

FASTSEQ_KERNEL(32, 1) nan_passes(float* y) {
  const float nan = bits_float(0x7fc00000u);
  const float results[] = {max_(nan, 1.f), max_(1.f, nan), min_(nan, 1.f), min_(1.f, nan),
                           to_float(from_float<Bf16>(nan)), to_float(from_float<Fp16>(nan))};
  for (int i = 0; i < 6; ++i) y[i] = results[i] != results[i] ? 1.f : 0.f;
}
FASTSEQ_CHECK(nan_passes, 80) {
  Buffer<float> out(6);
  if (const char* error = finish(nan_passes, shape_of(1, 1), out.data())) return error;
  return compare(out, std::vector<float>(6, 1.f));
}

template <class T>
FASTSEQ_KERNEL(32, 1) halves(const float* x, unsigned* bits, float* back) {
  const unsigned pair = pack2<T>(x[2 * tid()], x[2 * tid() + 1]);
  bits[tid()] = pair;
  const float2 both = unpack2<T>(pair);
  back[2 * tid()] = both.x, back[2 * tid() + 1] = both.y;
}
// Rounding to nearest even, overflow, subnormals and both zeros, by hand.
const std::vector<float> kHalfInputs = {1.f,       -2.f,      65504.f,   65519.f, 65520.f, 1e9f,
                                        0x1p-24f,  0x1.8p-25f, 0x1p-26f, 0.f,     -0.f,    1.00048828125f,
                                        1.00146484375f, -0.333f, 6.1e-5f, 0x1p-14f};
FASTSEQ_CHECK(fp16_conversions, 80) {
  Buffer<float> in(kHalfInputs), back(16);
  Buffer<unsigned> bits(8);
  if (const char* error = finish(halves<Fp16>, shape_of(1, 8), in.data(), bits.data(), back.data())) return error;
  return compare(bits, {0xc0003c00u, 0x7bff7bffu, 0x7c007c00u, 0x00010001u, 0x00000000u, 0x3c008000u, 0xb5543c02u,
                        0x040003ffu});
}
FASTSEQ_CHECK(bf16_conversions, 80) {
  Buffer<float> in({1.f, -2.f, 1.00390625f, 1.01171875f, 3.4e38f, -0.f, 0.333f, 1e-40f}), back(8);
  Buffer<unsigned> bits(4);
  if (const char* error = finish(halves<Bf16>, shape_of(1, 4), in.data(), bits.data(), back.data())) return error;
  return compare(bits, {0xc0003f80u, 0x3f823f80u, 0x80007f80u, 0x00013eaau});
}

// ---- Barriers.

FASTSEQ_KERNEL(128, 1) block_barrier(unsigned* out) {
  auto* line = reinterpret_cast<unsigned*>(shared_memory());
  unsigned v = tid();
  for (int step = 0; step < 5; ++step) {
    line[tid()] = v;
    sync_block();
    v = line[(tid() + 37) % nthreads()] + 1;
    sync_block();
  }
  out[tid()] = v;
}
FASTSEQ_CHECK(block_barrier, 80) {
  Buffer<unsigned> out(128);
  std::vector<unsigned> expected;
  for (unsigned t = 0; t < 128; ++t) expected.push_back((t + 5 * 37) % 128 + 5);
  if (const char* error = finish(block_barrier, shape_of(1, 128, 512), out.data())) return error;
  return compare(out, expected);
}

FASTSEQ_KERNEL(128, 1) early_exit(unsigned* out) {
  auto* line = reinterpret_cast<unsigned*>(shared_memory());
  if (warp() == 1) return;  // barriers go on without it
  line[tid()] = tid();
  sync_block();
  out[tid()] = line[tid() ^ 96];
}
FASTSEQ_CHECK(block_barrier_after_a_warp_has_returned, 80) {
  Buffer<unsigned> out(128, 7);
  std::vector<unsigned> expected;
  for (unsigned t = 0; t < 128; ++t) expected.push_back(t / 32 == 1 ? 7 : t ^ 96);
  expected[64] = 0;  // reads what warp 1 did not write: not compared
  if (const char* error = finish(early_exit, shape_of(1, 128, 512), out.data())) return error;
  const std::vector<unsigned> values = out.values();
  for (unsigned t = 0; t < 128; ++t)
    if (t / 32 != 1 && t / 32 != 2 && values[t] != expected[t]) return complain("thread " + std::to_string(t));
  return nullptr;
}

// Two warps fill a ring of two slots, two others read it: full and empty are barriers 1.. and 3..
FASTSEQ_KERNEL(128, 1) named_barriers(unsigned* out, unsigned steps) {
  auto* slots = reinterpret_cast<unsigned*>(shared_memory());
  unsigned sum = 0;
  for (unsigned step = 0; step < steps; ++step) {
    const unsigned slot = step % 2;
    if (warp() < 2) {
      if (step >= 2) named_bar_sync(3 + slot, 128);
      slots[slot * 64 + tid()] = step * 64 + tid();
      named_bar_arrive(1 + slot, 128);
    } else {
      named_bar_sync(1 + slot, 128);
      sum += slots[slot * 64 + (tid() ^ 32) - 64];
      if (step + 2 < steps) named_bar_arrive(3 + slot, 128);
    }
  }
  if (warp() >= 2) out[tid() - 64] = sum;
}
FASTSEQ_CHECK(named_barriers, 80) {
  Buffer<unsigned> out(64);
  std::vector<unsigned> expected;
  for (unsigned t = 0; t < 64; ++t) expected.push_back(64 * 21 + 7 * (t ^ 32));
  if (const char* error = finish(named_barriers, shape_of(1, 128, 512), out.data(), 7u)) return error;
  return compare(out, expected);
}

FASTSEQ_KERNEL(32, 1) warp_barrier(unsigned* out) {
  auto* line = reinterpret_cast<unsigned*>(shared_memory());
  const unsigned half = lane() < 16 ? 0xffffu : 0xffff0000u;
  line[lane()] = lane() * lane();
  sync_warp(half);
  const unsigned v = line[lane() ^ 15];
  sync_warp();
  line[lane()] = v;
  sync_warp();
  out[lane()] = line[lane() ^ 16];
}
FASTSEQ_CHECK(warp_barrier, 80) {
  Buffer<unsigned> out(32);
  std::vector<unsigned> expected;
  for (unsigned t = 0; t < 32; ++t) expected.push_back((t ^ 31) * (t ^ 31));
  if (const char* error = finish(warp_barrier, shape_of(1, 32, 128), out.data())) return error;
  return compare(out, expected);
}

// ---- Exchange in a warp.

FASTSEQ_KERNEL(32, 1) exchange(unsigned* out) {
  const unsigned v = lane() * 3;
  const unsigned results[] = {shfl_xor(v, 5), shfl_idx(v, 9), shfl_up(v, 3), shfl_down(v, 4), ballot(lane() % 3 == 0),
                              float_bits(shfl_xor(static_cast<float>(lane()), 1)),
                              lane() < 8 ? shfl_xor(v, 2, 0xffu) : ballot(true, 0xffffff00u)};
  for (int i = 0; i < 7; ++i) out[i * 32 + lane()] = results[i];
}
FASTSEQ_CHECK(exchange, 80) {
  Buffer<unsigned> out(7 * 32);
  std::vector<unsigned> expected(7 * 32);
  for (unsigned l = 0; l < 32; ++l) {
    const float neighbour = static_cast<float>(l ^ 1);
    unsigned bits;
    std::memcpy(&bits, &neighbour, 4);
    const unsigned row[] = {(l ^ 5) * 3, 27,         (l < 3 ? l : l - 3) * 3, (l + 4 < 32 ? l + 4 : l) * 3,
                            0x49249249u, bits,       l < 8 ? (l ^ 2) * 3 : 0xffffff00u};
    for (int i = 0; i < 7; ++i) expected[i * 32 + l] = row[i];
  }
  if (const char* error = finish(exchange, shape_of(1, 32), out.data())) return error;
  return compare(out, expected);
}

// ---- Fragments. The stored element at (row, column) is 8 row + column.

FASTSEQ_KERNEL(32, 1) fragments(unsigned* out) {
  auto* tile = reinterpret_cast<uint16_t*>(shared_memory());  // [32, 8]
  for (unsigned i = 0; i < 8; ++i) tile[lane() * 8 + i] = static_cast<uint16_t>(lane() * 8 + i);
  sync_block();
  uint32_t x1[1], x2[2], x4[4], t2[2], t4[4];
  ldmatrix_x1(x1, tile + lane() % 8 * 8);
  ldmatrix_x2(x2, tile + lane() % 16 * 8);
  ldmatrix_x4(x4, tile + lane() * 8);
  ldmatrix_x2_trans(t2, tile + lane() % 16 * 8);
  ldmatrix_x4_trans(t4, tile + lane() * 8);
  const uint32_t all[] = {x1[0], x2[0], x2[1], x4[0], x4[1], x4[2], x4[3], t2[0], t2[1], t4[0], t4[1], t4[2], t4[3]};
  for (int i = 0; i < 13; ++i) out[i * 32 + lane()] = all[i];
}
FASTSEQ_CHECK(fragments, 80) {
  Buffer<unsigned> out(13 * 32);
  const unsigned matrix[] = {0, 0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3};
  std::vector<unsigned> expected;
  for (int i = 0; i < 13; ++i)
    for (unsigned l = 0; l < 32; ++l) {
      const unsigned row = l / 4, column = l % 4 * 2, first = matrix[i] * 64;
      expected.push_back(i < 7 ? (first + row * 8 + column) | (first + row * 8 + column + 1) << 16
                               : (first + column * 8 + row) | (first + (column + 1) * 8 + row) << 16);
    }
  if (const char* error = finish(fragments, shape_of(1, 32, 512), out.data())) return error;
  return compare(out, expected);
}

// ---- Products of whole numbers, exact in every format.

template <class T>
FASTSEQ_KERNEL(32, 1) product16(const float* a, const float* b, float* c) {  // a [16, 16], b [16, 8], c [16, 8]
  const unsigned g = lane() / 4, t = lane() % 4 * 2;
  const auto pair_a = [&](unsigned row, unsigned k) { return pack2<T>(a[row * 16 + k], a[row * 16 + k + 1]); };
  const auto pair_b = [&](unsigned k) { return pack2<T>(b[k * 8 + g], b[(k + 1) * 8 + g]); };
  const uint32_t fa[4] = {pair_a(g, t), pair_a(g + 8, t), pair_a(g, t + 8), pair_a(g + 8, t + 8)};
  const uint32_t fb[2] = {pair_b(t), pair_b(t + 8)};
  float fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(g + i / 2 * 8) * 8 + t + i % 2];
  mma_m16n8k16<T>(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t + i % 2] = fc[i];
}
FASTSEQ_KERNEL(32, 1) product8(const float* a, const float* b, float* c) {  // a [16, 8], b [8, 8], c [16, 8]
  const unsigned g = lane() / 4, t = lane() % 4;
  const uint32_t fa[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                          to_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t fb[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
  float fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k8_tf32(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}
const char* check_product(void (*kernel)(const float*, const float*, float*), unsigned depth) {
  std::vector<float> a, b, c, expected;
  for (unsigned m = 0; m < 16; ++m)
    for (unsigned k = 0; k < depth; ++k) a.push_back(sample(m, k));
  for (unsigned k = 0; k < depth; ++k)
    for (unsigned n = 0; n < 8; ++n) b.push_back(sample(k + 3, n + 5));
  for (unsigned m = 0; m < 16; ++m)
    for (unsigned n = 0; n < 8; ++n) {
      c.push_back(sample(m + 1, n + 2));
      expected.push_back(c.back());
      for (unsigned k = 0; k < depth; ++k) expected.back() += a[m * depth + k] * b[k * 8 + n];
    }
  Buffer<float> da(a), db(b), dc(c);
  const float *pa = da.data(), *pb = db.data();
  if (const char* error = finish(kernel, shape_of(1, 32), pa, pb, dc.data())) return error;
  return compare(dc, expected);
}
FASTSEQ_CHECK(product_bf16, 80) { return check_product(product16<Bf16>, 16); }
FASTSEQ_CHECK(product_fp16, 80) { return check_product(product16<Fp16>, 16); }
FASTSEQ_CHECK(product_tf32, 80) { return check_product(product8, 8); }

// ---- Asynchronous copies: of 16, 8 and 4 bytes, in three groups, the last two read while later ones are under way.

FASTSEQ_KERNEL(32, 1) copies(const unsigned* in, unsigned* out) {
  auto* tile = reinterpret_cast<unsigned*>(shared_memory());
  cp_async16(tile + 4 * tid(), in + 4 * tid(), tid() % 2 ? 16 : 4);
  cp_commit();
  cp_async8(tile + 128 + 2 * tid(), in + 128 + 2 * tid(), tid() % 2 ? 8 : 0);
  cp_commit();
  cp_async4(tile + 192 + tid(), in + 192 + tid());
  cp_commit();
  cp_wait<2>();
  sync_block();
  for (unsigned i = tid(); i < 128; i += 32) out[i] = tile[i ^ 1];
  cp_wait<1>();
  sync_block();
  for (unsigned i = 128 + tid(); i < 192; i += 32) out[i] = tile[i ^ 1];
  cp_wait<0>();
  sync_block();
  out[192 + tid()] = tile[192 + (tid() ^ 1)];
}
FASTSEQ_CHECK(copies, 80) {
  std::vector<unsigned> in, expected;
  for (unsigned i = 0; i < 224; ++i) in.push_back(1000 + i);
  for (unsigned i = 0; i < 224; ++i) {
    const unsigned j = i ^ 1;
    const bool zero = j < 128 ? j / 4 % 2 == 0 && j % 4 : j < 192 && (j - 128) / 2 % 2 == 0;
    expected.push_back(zero ? 0 : in[j]);
  }
  Buffer<unsigned> source(in), out(224);
  const unsigned* from = source.data();
  if (const char* error = finish(copies, shape_of(1, 32, 1024), from, out.data())) return error;
  return compare(out, expected);
}

// ---- Flags. Blocks pass a number on, each by the kind of flag its step asks for.

FASTSEQ_KERNEL(32, 1) flags(unsigned* flag, unsigned* data, unsigned* out, int kind) {
  const unsigned b = bid();
  if (b > 0) {
    if (tid() == 0) {
      if (kind == 2) {
        while (ld_relaxed_gpu(flag + b) == 0) {
        }
        fence_gpu();
      } else {
        while (ld_acquire_gpu(flag + b) == 0) {
        }
      }
    }
    sync_block();
  }
  const unsigned v = b == 0 ? tid() : ldcg(data + (b - 1) * 32 + (tid() ^ 1)) + 1;
  stcg(data + b * 32 + tid(), v);
  out[b * 32 + tid()] = v;
  sync_block();
  if (tid() == 0 && b + 1 < nblocks()) {
    if (kind == 0) st_release_gpu(flag + b + 1, 1);
    if (kind == 1) red_release_gpu(flag + b + 1, 1);
    if (kind == 2) {
      fence_gpu();
      if (b % 2)
        st_relaxed_gpu(flag + b + 1, 1);
      else
        red_relaxed_gpu(flag + b + 1, 1);
    }
    if (kind == 3) add_acq_rel_gpu(flag + b + 1, 1);
  }
}
FASTSEQ_CHECK(flags, 80) {
  std::vector<unsigned> expected;
  for (unsigned b = 0; b < 6; ++b)
    for (unsigned t = 0; t < 32; ++t) expected.push_back((t ^ (b & 1)) + b);
  for (int kind = 0; kind < 4; ++kind) {
    Buffer<unsigned> flag(7), data(192), out(192);
    Launch shape = shape_of(6, 32);
    shape.cooperative = true;
    if (const char* error = finish(flags, shape, flag.data(), data.data(), out.data(), kind)) return error;
    if (const char* error = compare(out, expected)) return error;
  }
  return nullptr;
}

FASTSEQ_KERNEL(64, 1) sums(float* sum, unsigned* arrived, float* out, const float* in) {
  prefetch_l2(in + bid() * 64 + tid());
  red_add(sum, ldg(in + bid() * 64 + tid()));
  sync_block();
  if (tid() == 0) {
    fence_gpu();
    if (add_acq_rel_gpu(arrived, 1) + 1 == nblocks()) out[0] = ldcg(sum);
  }
}
FASTSEQ_CHECK(sums, 80) {
  std::vector<float> in;
  float total = 0;
  for (unsigned i = 0; i < 320; ++i) in.push_back(sample(i, 2)), total += in.back();
  Buffer<float> source(in), sum(1), out(1);
  Buffer<unsigned> arrived(1);
  const float* from = source.data();
  if (const char* error = finish(sums, shape_of(5, 64), sum.data(), arrived.data(), out.data(), from)) return error;
  return compare(out, std::vector<float>{total});
}

// ---- Launches that cannot be.

FASTSEQ_CHECK(refused_launches, 80) {
  Buffer<unsigned> out(4096);
  if (!launch(indices, shape_of(1, 2048), nullptr, out.data())) return "2048 threads a block";
  if (!launch(indices, shape_of(1, 32, 1 << 20), nullptr, out.data())) return "1 MiB of shared memory";
  Launch shape = shape_of(100000, 96);
  shape.cooperative = true;
  if (!launch(indices, shape, nullptr, out.data())) return "100000 blocks at once";
  DeviceLimits limits{};
  if (const char* error = device_limits(limits)) return error;
  if (limits.major < 8 || limits.multiprocessors < 1) return "limits of the device";
  if (blocks_per_multiprocessor(indices, shape_of(1, 96)) < 1) return "no block fits";
  return set_zero(out.data(), 4096, nullptr);
}

}  // namespace fastseq::cuda
