// Vector pieces of the attention kernels: 2^x, tanh, selection by bits, bfloat16 pairs.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "core/lanes.h"

namespace fastseq::FASTSEQ_ISA::attention {

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;  // products of bfloat16 pairs into float
#else
constexpr bool kHasDot = false;
#endif

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class A>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23;
  static constexpr float shifter = 0x1.8p23f, smallest = -126, largest = 128;
};
template <>
struct BitsOf<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52;
  static constexpr double shifter = 0x1.8p52, smallest = -1022, largest = 1024;
};
template <class A>
using IntVec = Vec<typename BitsOf<A>::Int>;

// Coefficients c1.. of 2^r = 1 + c1 r + ... on [-1/2, 1/2]: minimax under p(0) = 1, so that 2^0 is exactly 1.
// Relative errors: degree 4, 3.6e-6 (enough where the result becomes a bfloat16); 6, 2.6e-9. For double the series.
template <class A, int kDegree>
FASTSEQ_INLINE A exp2_coefficient(int i) {
  if constexpr (kDegree == 4) {
    constexpr A c[] = {A(0.6931136044030871), A(0.2402071107874236), A(0.055976883631754994), A(0.009782912562327625)};
    return c[i];
  } else if constexpr (kDegree == 6) {
    constexpr A c[] = {A(0.693147214968037),    A(0.24022652782875065),   A(0.055503105510005014),
                       A(0.009617692975052276), A(0.0013406643903480337), A(0.00015594677498939957)};
    return c[i];
  } else {
    constexpr A c[] = {A(0.6931471805599453),     A(0.2402265069591007),     A(0.055504108664821576),
                       A(0.009618129107628477),   A(0.0013333558146428441),  A(0.00015403530393381606),
                       A(1.5252733804059838e-05), A(1.3215486790144305e-06), A(1.0178086009239696e-07),
                       A(7.054911620801121e-09),  A(4.44553827187081e-10),   A(2.5678435993488196e-11),
                       A(1.3691488853904124e-12)};
    return c[i];
  }
}
template <class A>
constexpr int kFullDegree = sizeof(A) == 8 ? 13 : 6;

// (2^r - 1) / r
template <class A, int kDegree>
FASTSEQ_INLINE Vec<A> exp2_slope(Vec<A> r) {
  Vec<A> p = splat<A>(exp2_coefficient<A, kDegree>(kDegree - 1));
#pragma GCC unroll 16
  for (int i = kDegree - 2; i >= 0; --i) p = p * r + exp2_coefficient<A, kDegree>(i);
  return p;
}

// 2^x. Results near the smallest normal number and below are 0; 2^-inf is 0; NaN stays. A scalef that underflows would take
// some Intel chips 150 cycles, and every hidden score is one.
template <class A, int kDegree = kFullDegree<A>>
FASTSEQ_INLINE Vec<A> exp2(Vec<A> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-125.0f), _CMP_NLE_UQ);  // or NaN
    __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec<A> r = (Vec<A>)_mm512_sub_ps((__m512)x, n);
    return (Vec<A>)_mm512_maskz_scalef_ps(normal, (__m512)(exp2_slope<A, kDegree>(r) * r + A(1)), n);
  } else {
    const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(-1021.0), _CMP_NLE_UQ);  // or NaN
    __m512d n = _mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec<A> r = (Vec<A>)_mm512_sub_pd((__m512d)x, n);
    return (Vec<A>)_mm512_maskz_scalef_pd(normal, (__m512d)(exp2_slope<A, kDegree>(r) * r + A(1)), n);
  }
#else
  using B = BitsOf<A>;
  Vec<A> shifted = x + B::shifter;  // the integer part now lies in the lowest bits
  Vec<A> r = x - (shifted - B::shifter);
  Vec<A> p = exp2_slope<A, kDegree>(r) * r + A(1);
  p = (Vec<A>)((IntVec<A>)p + ((IntVec<A>)shifted << B::mantissa));
  p = x < B::smallest ? splat<A>(0) : p;
  p = x >= B::largest ? splat<A>(A(kInfinity)) : p;
  return x != x ? x : p;
#endif
}

// tanh by expm1(2x) = 2^n (2^r - 1) + (2^n - 1), which keeps small x exact to rounding.
template <class A>
FASTSEQ_INLINE Vec<A> tanh(Vec<A> x) {
  using B = BitsOf<A>;
  Vec<A> y = x * A(2 * kLog2e);
  y = y > A(60) ? splat<A>(60) : y;
  y = y < A(-60) ? splat<A>(-60) : y;
  Vec<A> shifted = y + B::shifter;
  Vec<A> r = y - (shifted - B::shifter);
  Vec<A> power = (Vec<A>)((IntVec<A>)splat<A>(1) + ((IntVec<A>)shifted << B::mantissa));
  Vec<A> e = exp2_slope<A, kFullDegree<A>>(r) * r * power + (power - A(1));
  return e / (e + A(2));
}

template <class A>
FASTSEQ_INLINE Vec<A> maximum(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}
template <class A>
FASTSEQ_INLINE Vec<A> magnitude(Vec<A> x) {
  return x < A(0) ? -x : x;
}
// Whether a comparison holds in any lane.
template <class A>
FASTSEQ_INLINE bool any(IntVec<A> lanes) {
  typename BitsOf<A>::Int found = 0;
  FASTSEQ_UNROLL for (int i = 0; i < kLanes<A>; ++i) found |= lanes[i];
  return found != 0;
}
// 0, 1, 2, ...
template <class A>
FASTSEQ_INLINE Vec<A> lane_numbers() {
  Vec<A> out;
  FASTSEQ_UNROLL for (int i = 0; i < kLanes<A>; ++i) out[i] = A(i);
  return out;
}

template <class A>
constexpr uint64_t kLaneBits = (uint64_t(1) << kLanes<A>)-1;

// Lane i is yes's where bit i of `bits` is set, else no's.
template <class A>
FASTSEQ_INLINE Vec<A> select(uint64_t bits, Vec<A> yes, Vec<A> no) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Vec<A>)_mm512_mask_blend_ps(__mmask16(bits), (__m512)no, (__m512)yes);
  else
    return (Vec<A>)_mm512_mask_blend_pd(__mmask8(bits), (__m512d)no, (__m512d)yes);
#else
  using Int = typename BitsOf<A>::Int;
  IntVec<A> lane;
  FASTSEQ_UNROLL for (int i = 0; i < kLanes<A>; ++i) lane[i] = Int(1) << i;
  return ((splat<Int>(Int(bits & kLaneBits<A>)) & lane) != 0) ? yes : no;
#endif
}

// Two rows of 16-bit elements side by side: element i of the result is (low[i], high[i]). n: elements that exist.
FASTSEQ_INLINE void interleave(const bf16* low, const bf16* high, int n, uint32_t* out) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + i)));
    __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + i)));
    _mm512_storeu_si512(out + i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
#endif
  for (; i < n; ++i) out[i] = uint32_t(low[i].bits) | uint32_t(high[i].bits) << 16;
}

#if defined(__AVX512BF16__)
// The pair (low, high) of each lane, rounded to bfloat16.
FASTSEQ_INLINE __m512i narrow_pairs(Vec<float> low, Vec<float> high) {
  __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
  __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
#endif

constexpr long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr long least(long a, long b) { return a < b ? a : b; }
constexpr long most(long a, long b) { return a > b ? a : b; }

// Hands out cache-line-aligned pieces of one block of memory. With no block it only counts what it would need.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(long count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * long(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  long used() const { return used_; }

 private:
  char* base_;
  long used_ = 0;
};

struct Memory {
  explicit Memory(long bytes) : data(static_cast<char*>(std::aligned_alloc(64, size_t(round_up(bytes + 64, 64))))) {}
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data;
};

}  // namespace fastseq::FASTSEQ_ISA::attention
