// Rows of activations in bytes, for products with weights of int8.
//
// A number v of a row becomes the whole number round(32639 v / peak), peak being the row's largest magnitude, and that plus
// 32896 two bytes: chips multiply unsigned bytes by signed ones. Each byte is 128 too large, and what that adds to a sum is
// taken off where it starts: at -128 times the sum of its weights. Sums are exact, so that they depend on nothing but their
// row. 256 times the high bytes' plus the low bytes' sum, times peak / 32639 and the weights' scale, is a number again.
// With one byte alone, activations would lose more than int8 weights do.
#pragma once
#include "recurrent/cpu/pack.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// The longest sums of bytes that are sure to fit 32 bits.
constexpr long kLongestBytes = 65536;

// Bytes that a part of a row of n takes.
constexpr long row_of_bytes(long n) { return padded<float>(n); }

// Lays n numbers, `stride` apart, down as high bytes and, `low` further, low bytes; returns what these are times: NaN
// where a number is not finite.
inline float lay_bytes(q8* to, long low, const float* from, long stride, long n) {
  constexpr int L = kLanes<float>;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  auto at = [&](long i) { return load_strided(from + i * stride, stride, int(n - i < L ? n - i : L)); };
  Bits peaks = {};  // as integers, magnitudes are in the same order, and NaN is above all
  for (long i = 0; i < n; i += L) {
    const Bits magnitude = (Bits)at(i) & 0x7fffffff;
    peaks = magnitude > peaks ? magnitude : peaks;
  }
  int32_t bits = 0;
  for (int l = 0; l < L; ++l) bits = peaks[l] > bits ? peaks[l] : bits;
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  constexpr int32_t kInfinity = 0x7f800000;
  constexpr float kMost = 32639;
  constexpr float kSmallest = 1e-30f;  // what is below counts as zero: its reciprocal may be infinite
  const Vec<float> factor = splat(bits < kInfinity && peak >= kSmallest ? kMost / peak : 0.0f);
  // A number of this size has its last binary place at 1: adding it rounds to whole numbers, in the low bits.
  const Vec<float> whole = splat(0x1.8p23f + 32896);
  for (long i = 0; i < n; i += L) {
    const Bits rounded = (Bits)(at(i) * factor + whole);
    const Bytes parts[] = {__builtin_convertvector(rounded >> 8 & 0xff, Bytes), __builtin_convertvector(rounded & 0xff, Bytes)};
    std::memcpy(to + i, &parts[0], sizeof parts[0]);
    std::memcpy(to + low + i, &parts[1], sizeof parts[1]);
  }
  return bits >= kInfinity ? __builtin_nanf("") : peak >= kSmallest ? peak / kMost : 0;
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
