// exp, sigmoid and tanh, written once for scalars and vectors, for the host and the device.
//
// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2)/2, and expm1(r) = r + r^2 q(r), q a near-minimax polynomial.
// tanh and sigmoid go through expm1, so neither loses digits near 0. At most 2.5 ulp in float, 3 in double.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__CUDACC__) || defined(FASTSEQ_EMULATION)
#include "primitives/primitives.cuh"
#endif

#if defined(__CUDACC__)
#define FASTSEQ_HD __host__ __device__ __forceinline__
#else
#define FASTSEQ_HD inline __attribute__((always_inline))
#endif

#ifndef FASTSEQ_ISA
#define FASTSEQ_ISA baseline
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

// The element of a value type V (float, double, or a vector of either) and the integers of the same width.
template <class V, bool = std::is_arithmetic<V>::value>
struct Elements {
  using scalar = V;
  using bits = typename std::conditional<sizeof(V) == 4, int32_t, int64_t>::type;
};
#if !defined(__CUDACC__)
template <class V>
struct Elements<V, false> {
  using scalar = typename std::decay<decltype(V{}[0])>::type;
  using bit = typename Elements<scalar>::bits;
  typedef bit bits __attribute__((vector_size(sizeof(V))));
};
#endif
template <class V>
using Scalar = typename Elements<V>::scalar;
template <class V>
using Bits = typename Elements<V>::bits;

template <class To, class From>
FASTSEQ_HD To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out;
  memcpy(&out, &v, sizeof out);
  return out;
}

// NaN passes through.
template <class V>
FASTSEQ_HD V clamp(V x, Scalar<V> low, Scalar<V> high) {
  x = x < low ? low - V{} : x;
  return x > high ? high - V{} : x;
}
// a / b for b from 1 to 1e38.
template <class V>
FASTSEQ_HD V divide(V a, V b) {
#if defined(__CUDA_ARCH__) || defined(FASTSEQ_EMULATION)
  // From the reciprocal, corrected once: what the compiler makes of a quotient is three times as long, with a call.
  if constexpr (sizeof(V) == 4) {
    const float r = cuda::rcp(b), q = a * r;
    return q + (a - q * b) * r;
  }
#endif
  return a / b;
}
#if defined(__AVX512F__)
// Two instructions where the compiler makes four of the choice above; and a quotient from the reciprocal's 14 bits,
// corrected once, all but correctly rounded: the divider would hold up everything else.
typedef float Floats512 __attribute__((vector_size(64)));
FASTSEQ_HD Floats512 clamp(Floats512 x, float low, float high) {
  __m512 v = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), reinterpret_cast<__m512>(x));
  return reinterpret_cast<Floats512>(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), v));
}
FASTSEQ_HD Floats512 divide(Floats512 a, Floats512 b) {
  Floats512 r = reinterpret_cast<Floats512>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(b)));
  Floats512 q = a * r;
  return q + (a - q * b) * r;
}
#endif

// 2^n and p with e^x = 2^n (1 + p), for x where 2^n is a normal number, or (n one lower) 0.
template <class V>
FASTSEQ_HD V exp_parts(V x, V& power) {
  using S = Scalar<V>;
  constexpr bool single = sizeof(S) == 4;
  constexpr int mantissa = single ? 23 : 52;
  // Adding 1.5 * 2^mantissa rounds to an integer, which then lies in the low bits.
  constexpr S shifter = single ? S(0x1.8p23) : S(0x1.8p52);
  constexpr S inverse_ln2 = S(1.44269504088896340736);
  constexpr S ln2_high = single ? S(0x1.62e4p-1) : S(0x1.62e42fefa0000p-1);
  constexpr S ln2_low = single ? S(0x1.7f7d1cf79abcap-20) : S(0x1.cf79abc9e3b39p-40);
  V shifted = x * inverse_ln2 + shifter;
  V n = shifted - shifter;
  Bits<V> exponent = same_bits<Bits<V>>(shifted) << mantissa;
  power = same_bits<V>(exponent + same_bits<Bits<S>>(S(1)));
  V r = x - n * ln2_high;
  r = r - n * ln2_low;
  V q;
  if constexpr (single) {
    q = r * S(0x1.6d110ap-10) + S(0x1.120b6ep-7);
    q = q * r + S(0x1.55551ap-5);
    q = q * r + S(0x1.5554dcp-3);
    q = q * r + S(0.5);
  } else {
    q = r * S(0x1.af38a9b0ec855p-26) + S(0x1.289185613a3d6p-22);
    q = q * r + S(0x1.71de0dae63bb3p-19);
    q = q * r + S(0x1.a019b90d2ae7ap-16);
    q = q * r + S(0x1.a01a01a7c41d5p-13);
    q = q * r + S(0x1.6c16c1788bd90p-10);
    q = q * r + S(0x1.11111111109b3p-7);
    q = q * r + S(0x1.5555555553d63p-5);
    q = q * r + S(0x1.5555555555556p-3);
    q = q * r + S(0x1.0000000000001p-1);
  }
  return r * r * q + r;
}

// e^x / (1 + e^x); exactly 0 below -87 (float; double: -708), where it would leave the normal numbers: a shut gate is
// shut.
template <class V>
FASTSEQ_HD V sigmoid(V x) {
  using S = Scalar<V>;
  constexpr S limit = sizeof(S) == 4 ? S(87) : S(708);
  V power;
  V p = exp_parts(clamp(x, -limit, limit), power);
  V e = power + power * p;
  e = x < -limit ? V{} : e;
  return divide(e, e + S(1));
}

// (e^2x - 1) / (e^2x + 1)
template <class V>
FASTSEQ_HD V tanh(V x) {
  V power;
  V p = exp_parts(clamp(x + x, Scalar<V>(-44), Scalar<V>(44)), power);
  V expm1 = power * p + (power - Scalar<V>(1));
  return divide(expm1, expm1 + Scalar<V>(2));
}

template <class V>
FASTSEQ_HD V relu(V x) {
  return x < Scalar<V>(0) ? V{} : x;
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
