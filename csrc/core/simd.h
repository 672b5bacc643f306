// Fixed-width vectors for the CPU kernels, on the compiler's own vector types (GCC and Clang, x86 and Arm).
//
// Every kernel source is compiled once per instruction set, with FASTSEQ_ISA naming its inner namespace, so that
// the same function exists several times in one library and is picked at load (isa.h). Nothing here may be used
// across two instruction sets: all of it lives inside the namespace.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

#ifndef FASTSEQ_ISA
#define FASTSEQ_ISA baseline
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

#define FASTSEQ_INLINE inline __attribute__((always_inline))
// Before a loop over an array of vectors, so that these become registers.
#if defined(__clang__)
#define FASTSEQ_UNROLL _Pragma("unroll")
#else
#define FASTSEQ_UNROLL _Pragma("GCC unroll 16")
#endif

// Storage types of 16 bits. The accumulator of either is float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Of weights, and of a cache's keys and values: a whole number of its row's scale.
struct q8 {
  int8_t value;
};

// The type that a storage type is computed in.
template <class S>
struct AccumulatorOf {
  using type = S;
};
template <>
struct AccumulatorOf<bf16> {
  using type = float;
};
template <>
struct AccumulatorOf<f16> {
  using type = float;
};
template <>
struct AccumulatorOf<q8> {
  using type = float;
};
template <class S>
using Accumulator = typename AccumulatorOf<S>::type;

FASTSEQ_INLINE float widen(float v) { return v; }
FASTSEQ_INLINE double widen(double v) { return v; }
FASTSEQ_INLINE float widen(q8 v) { return float(v.value); }
FASTSEQ_INLINE float widen(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
FASTSEQ_INLINE float widen(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = uint32_t(v.bits & 0x7fff) << 13;
  // Shift the exponent into place by a multiplication, which also normalises subnormals.
  float scaled;
  std::memcpy(&scaled, &magnitude, 4);
  scaled *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  if ((v.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

template <class S>
S narrow(Accumulator<S> v);
template <>
FASTSEQ_INLINE float narrow<float>(float v) {
  return v;
}
template <>
FASTSEQ_INLINE double narrow<double>(double v) {
  return v;
}
template <>
FASTSEQ_INLINE bf16 narrow<bf16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{uint16_t((bits >> 16) | 0x40)};
  return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
FASTSEQ_INLINE f16 narrow<f16>(float v) {
#if defined(__F16C__)
  return f16{uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return f16{uint16_t(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff))};
  if (magnitude >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal or zero: let float addition do the rounding
    float value, shifter = 0.5f;
    std::memcpy(&value, &magnitude, 4);
    value += shifter;
    std::memcpy(&magnitude, &value, 4);
    return f16{uint16_t(sign | (magnitude - 0x3f000000))};
  }
  magnitude += 0xc8000fff + ((magnitude >> 13) & 1);
  return f16{uint16_t(sign | (magnitude >> 13))};
#endif
}

template <class A>
FASTSEQ_INLINE Vec<A> splat(A v) {
  return v - Vec<A>{};  // not `0 + v`: that is no plain copy for a negative zero, and costs an addition
}

// Unaligned loads and stores of kLanes<Accumulator<S>> elements, widened to the accumulator or narrowed from it.
// (The maskz forms with a full mask are the plain instructions; GCC 12 takes the plain intrinsics for uninitialised.)
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> load(const S* p) {
  using A = Accumulator<S>;
  Vec<A> out;
  if constexpr (sizeof(S) == sizeof(A)) {
    std::memcpy(&out, p, sizeof out);
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(S, q8)) {
      __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      return reinterpret_cast<Vec<A>>(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes)));
    }
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (__is_same(S, bf16))
      out = reinterpret_cast<Vec<A>>(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, raw), 16));
    else
      out = reinterpret_cast<Vec<A>>(_mm512_maskz_cvtph_ps(0xffff, raw));
#elif defined(__AVX2__)
    if constexpr (__is_same(S, q8)) {
      __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return reinterpret_cast<Vec<A>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
    }
    __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(S, bf16))
      out = reinterpret_cast<Vec<A>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    else
      out = reinterpret_cast<Vec<A>>(_mm256_cvtph_ps(raw));
#else
    FASTSEQ_UNROLL for (int i = 0; i < kLanes<A>; ++i) out[i] = widen(p[i]);
#endif
  }
  return out;
}
template <class S>
FASTSEQ_INLINE void store(S* p, Vec<Accumulator<S>> v) {
  using A = Accumulator<S>;
  if constexpr (sizeof(S) == sizeof(A)) {
    std::memcpy(p, &v, sizeof v);
  } else {
#if defined(__AVX512F__)
    __m256i raw;
    if constexpr (__is_same(S, bf16)) {
#if defined(__AVX512BF16__)
      __m256bh packed = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
      std::memcpy(&raw, &packed, sizeof raw);
#else
      __m512i bits = reinterpret_cast<__m512i>(v);
      __m512i even = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
      __mmask16 nan = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(v), _CMP_UNORD_Q);
      rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
      raw = _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, rounded, 16));
#endif
    } else {
      raw = _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), raw);
#elif defined(__AVX2__)
    __m128i raw;
    if constexpr (__is_same(S, bf16)) {
      __m256i bits = reinterpret_cast<__m256i>(v);
      __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
      __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      __m256 nan = _mm256_cmp_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256>(v), _CMP_UNORD_Q);
      rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, reinterpret_cast<__m256i>(nan)), 16);
      raw = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    } else {
      raw = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), raw);
#else
    FASTSEQ_UNROLL for (int i = 0; i < kLanes<A>; ++i) p[i] = narrow<S>(v[i]);
#endif
  }
}

// The first n elements only (0 <= n <= kLanes): memory past them is neither read nor written; lanes past them are 0.
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> load_n(const S* p, int n) {
  using A = Accumulator<S>;
  if (n >= kLanes<A>) return load(p);
#if defined(__AVX512F__)
  if constexpr (__is_same(S, float))
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  if constexpr (__is_same(S, double))
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
#endif
  S buffer[kLanes<A>] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(S));
  return load(buffer);
}
template <class S>
FASTSEQ_INLINE void store_n(S* p, Vec<Accumulator<S>> v, int n) {
  using A = Accumulator<S>;
  if (n >= kLanes<A>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (__is_same(S, float))
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), reinterpret_cast<__m512>(v));
  if constexpr (__is_same(S, double))
    return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), reinterpret_cast<__m512d>(v));
#endif
  S buffer[kLanes<A>];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(n) * sizeof(S));
}

// body(S{}) with the storage type S of a dtype.
template <class Body>
auto for_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f64:
      return body(double{});
    case Dtype::f32:
      return body(float{});
    case Dtype::bf16:
      return body(bf16{});
    default:
      return body(f16{});
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
