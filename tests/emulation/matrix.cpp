// Warp exchange, matrix fragments and their products, 16-bit floats.
#include <cstring>

#include "emulated_calls.h"
#include "runtime.h"

namespace fastseq::emulation {

// ---- 16-bit floats.

float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  uint32_t out;
  if (exponent == 31) {
    out = sign | 0x7f800000u | fraction << 13;
  } else if (exponent) {
    out = sign | (exponent + 112) << 23 | fraction << 13;
  } else {
    const float small = static_cast<float>(fraction) * 0x1p-24f;
    __builtin_memcpy(&out, &small, 4);
    out |= sign;
  }
  float x;
  __builtin_memcpy(&x, &out, 4);
  return x;
}

uint16_t to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {                       // subnormal: the addition rounds
    float y;
    __builtin_memcpy(&y, &bits, 4);
    y += 0.5f;
    __builtin_memcpy(&bits, &y, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xc8000fff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | bits >> 13);
}

namespace {

float half_table[65536];
struct FillTable {
  FillTable() {
    for (unsigned i = 0; i < 65536; ++i) half_table[i] = from_half(static_cast<uint16_t>(i));
  }
} fill_table;

float element(uint16_t bits, Operand operand) {
  if (operand == Operand::fp16) return half_table[bits];
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}

// ---- Exchange.

struct Shuffle {
  uint64_t value;
  unsigned from;
  uint64_t result;
};
void perform_shuffle(Warp& warp, uint32_t mask) {
  for (uint32_t left = mask; left; left &= left - 1) {
    auto* own = static_cast<Shuffle*>(warp.arguments[__builtin_ctz(left)]);
    // The value of a lane that takes no part is undefined.
    own->result = mask >> own->from & 1 ? static_cast<Shuffle*>(warp.arguments[own->from])->value : ~0ull;
  }
}

struct Ballot {
  bool predicate;
  uint32_t result;
};
void perform_ballot(Warp& warp, uint32_t mask) {
  uint32_t result = 0;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    result |= uint32_t{static_cast<Ballot*>(warp.arguments[lane])->predicate} << lane;
  }
  for (uint32_t left = mask; left; left &= left - 1)
    static_cast<Ballot*>(warp.arguments[__builtin_ctz(left)])->result = result;
}

// ---- Fragments.

struct Load {
  const unsigned char* row;
  uint32_t* r;
};
template <int kCount, bool kTransposed>
void perform_load(Warp& warp, uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* own = static_cast<Load*>(warp.arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kCount; ++i) {
      const auto row = [&](int r) { return static_cast<Load*>(warp.arguments[8 * i + r])->row; };
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j)
        __builtin_memcpy(&pair[j], kTransposed ? row(2 * t + j) + 2 * g : row(g) + 4 * t + 2 * j, 2);
      own->r[i] = pair[0] | uint32_t{pair[1]} << 16;
    }
  }
}

struct Product {
  float* c;
  const uint32_t *a, *b;
};
// A and B of m16n8kK in fp32, multiplied row by row.
template <int K>
void multiply(Warp& warp, const float (&a)[16][K], const float (&b)[K][8]) {
  float c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const float* own = static_cast<Product*>(warp.arguments[lane])->c;
    for (int i = 0; i < 4; ++i) c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = own[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    float* own = static_cast<Product*>(warp.arguments[lane])->c;
    for (int i = 0; i < 4; ++i) own[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}
template <Operand kOperand>
void perform_product16(Warp& warp, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<Product*>(warp.arguments[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][t + i / 2 * 8 + j] = element(static_cast<uint16_t>(own->a[i] >> 16 * j), kOperand);
      for (int i = 0; i < 2; ++i) b[t + 8 * i + j][g] = element(static_cast<uint16_t>(own->b[i] >> 16 * j), kOperand);
    }
  }
  multiply(warp, a, b);
}
void perform_product8(Warp& warp, uint32_t) {
  float a[16][8], b[8][8];
  const auto tf32 = [](uint32_t bits) {
    bits &= ~0x1fffu;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<Product*>(warp.arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = tf32(own->a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32(own->b[i]);
  }
  multiply(warp, a, b);
}

}  // namespace

uint64_t shuffle(uint64_t v, unsigned from, uint32_t lanes, Where where) {
  Shuffle own{v, from, 0};
  meet(perform_shuffle, lanes, &own, "shfl", where);
  return own.result;
}

uint32_t ballot(bool predicate, uint32_t lanes, Where where) {
  Ballot own{predicate, 0};
  meet(perform_ballot, lanes, &own, "ballot", where);
  return own.result;
}

void ldmatrix(uint32_t* r, unsigned count, bool transposed, const void* row, Where where) {
  Load own{static_cast<const unsigned char*>(row), r};
  if (running->lane < 8 * count) race_read(in_shared(row, 16, 16, "ldmatrix", where), 16);
  const Perform perform = count == 1   ? perform_load<1, false>
                          : count == 2 ? (transposed ? perform_load<2, true> : perform_load<2, false>)
                                       : (transposed ? perform_load<4, true> : perform_load<4, false>);
  meet(perform, ~0u, &own, "ldmatrix", where);
}

void mma(float* c, const uint32_t* a, const uint32_t* b, Operand operand, Where where) {
  Product own{c, a, b};
  meet(operand == Operand::bf16   ? perform_product16<Operand::bf16>
       : operand == Operand::fp16 ? perform_product16<Operand::fp16>
                                  : perform_product8,
       ~0u, &own, "mma", where);
}

}  // namespace fastseq::emulation
