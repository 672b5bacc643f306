// What the products of the scan multiply: elements of the accumulator's type, pairs of bfloat16 summed in float, or four
// bytes summed in 32-bit integers.
//
// A term is what one lane takes in at one step of a sum: an element, or where the chip multiplies pairs of bfloat16
// (AVX-512-BF16, AMX) two that follow each other along the sum, and of bytes (AVX-512-VNNI, AMX) four. Operands lie as [..][term of k][lane][element of the term];
// rows of activations are k after k, so that a term of theirs is broadcast from where it lies. An odd sum ends in a
// term whose second element is zero on both sides.
//
// The chip's instruction takes denormal inputs for zeros and rounds denormal sums to zero: at most 2^-126 a term.
#pragma once
#include <type_traits>

#include "core/simd.h"
#include "core/tiles.h"

#if defined(__AVX512BF16__) || defined(FASTSEQ_TILES)
#define FASTSEQ_PAIRS
#endif
#if defined(__AVX512VNNI__) || defined(FASTSEQ_TILES)
#define FASTSEQ_BYTES
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

template <class S>
struct OperandOf {
  using type = Accumulator<S>;
};
template <class E>
constexpr int kTerm = 1;  // elements of a term
#if defined(FASTSEQ_PAIRS)
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
template <>
constexpr int kTerm<bf16> = 2;
#endif
#if defined(FASTSEQ_BYTES)
template <>
constexpr int kTerm<q8> = 4;
#endif
// Rows in memory that a row of activations takes: of bytes the high and the low ones.
template <class E>
constexpr int kParts = kTerm<E> == 4 ? 2 : 1;
// What sums of products are kept in.
template <class E>
using Sum = std::conditional_t<kTerm<E> == 4, int32_t, Accumulator<E>>;
// The element type that a product of tensors of S is made of. Where it is bf16, a vector of terms goes by the name of
// a vector of float: its bits.
template <class S>
using Operand = typename OperandOf<S>::type;

template <class E>
constexpr long terms_of(long n) {
  return (n + kTerm<E> - 1) / kTerm<E>;
}
// Of so many gates, those whose weights lie beside each other: [unit vector][gates by so many][term of k][gate][lane]. Few
// registers hold the sums of four vectors for few rows; two gates at a time for more rows read a panel more seldom.
template <class E>
constexpr int gates_beside(int gates) {
  return kVectorRegisters < 32 && kTerm<E> == 1 && gates == 4 ? 2 : gates;
}
// n elements, brought to whole terms.
template <class E>
constexpr long whole_terms(long n) {
  return terms_of<E>(n) * kTerm<E>;
}

// Packed weights of a smaller type than the activations that they meet. A lane's word holds kWord of them that follow
// each other along the sum, and is widened on its way into the products, which are the accumulator's.
template <class A, class W>
constexpr int kWord = int(sizeof(A) / sizeof(W));

template <class W>
FASTSEQ_INLINE Vec<float> load_words(const W* p) {
  Vec<float> out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
// Element `kAt` of each lane's word.
template <class W, int kAt>
FASTSEQ_INLINE Vec<float> widen_word(Vec<float> words) {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = (Bits)words;
  if constexpr (__is_same(W, bf16))
    return kAt == 0 ? (Vec<float>)(bits << 16) : (Vec<float>)(bits & int32_t(0xffff0000));
  else
    return __builtin_convertvector((bits << (24 - 8 * kAt)) >> 24, Vec<float>);
}

// kLanes terms that lie side by side.
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> load_terms(const S* p) {
  if constexpr (kTerm<S> == 1) {
    return load(p);
  } else {
    Vec<Accumulator<S>> out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
}
// kLanes terms of E out of elements of W: loaded where W is E, else widened.
template <class E, class W>
FASTSEQ_INLINE Vec<Accumulator<E>> load_terms_as(const W* p) {
  if constexpr (kTerm<E> == 1)
    return load(p);
  else
    return load_terms(p);
}
// The same of the first n elements (at most kLanes terms); the others are zero, and not read.
template <class S>
FASTSEQ_INLINE Vec<Accumulator<S>> load_terms_n(const S* p, int n) {
#if defined(__AVX512BF16__)
  if constexpr (kTerm<S> == 2)
    return reinterpret_cast<Vec<Accumulator<S>>>(
        _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), reinterpret_cast<const void*>(p)));
#endif
  if constexpr (kTerm<S> == 1) {
    return load_n(p, n);
  } else {
    S buffer[kLanes<Accumulator<S>> * kTerm<S>] = {};
    std::memcpy(buffer, p, size_t(n) * sizeof(S));
    return load_terms(buffer);
  }
}
template <class E, class W>
FASTSEQ_INLINE Vec<Accumulator<E>> load_terms_as_n(const W* p, int n) {
  if constexpr (kTerm<E> == 1)
    return load_n(p, n);
  else
    return load_terms_n(p, n);
}
template <class E>
FASTSEQ_INLINE void store_terms(E* p, Vec<Accumulator<E>> terms) {
  std::memcpy(p, &terms, sizeof terms);
}
// One term in every lane.
template <class E>
FASTSEQ_INLINE Vec<Accumulator<E>> splat_term(const E* p) {
  if constexpr (kTerm<E> > 1) {
    typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
    int32_t term;
    std::memcpy(&term, p, sizeof term);
    return (Vec<Accumulator<E>>)(Bits{} + term);
  } else {
    return splat(*p);
  }
}
// sum + a b, lane by lane, over the elements of a term; of bytes a's are unsigned.
template <class E>
FASTSEQ_INLINE Vec<Sum<E>> add_product(Vec<Sum<E>> sum, Vec<Accumulator<E>> a, Vec<Accumulator<E>> b) {
#if defined(__AVX512VNNI__)
  if constexpr (kTerm<E> == 4) return (Vec<Sum<E>>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#endif
#if defined(__AVX512BF16__)
  if constexpr (kTerm<E> == 2)
    return (Vec<Accumulator<E>>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  if constexpr (kTerm<E> == 4)  // as below: those are multiplied by tiles alone
    return sum;
  else if constexpr (kTerm<E> == 2)  // tiles without AVX-512: only their software model
    return sum + widen_word<E, 0>(a) * widen_word<E, 0>(b) + widen_word<E, 1>(a) * widen_word<E, 1>(b);
  else
    return sum + a * b;
}
// The terms whose elements are the lanes of v[0] (and of v[1]): numbers of the storage type, widened.
template <class E>
FASTSEQ_INLINE Vec<Accumulator<E>> terms_from(const Vec<Accumulator<E>>* v) {
  if constexpr (kTerm<E> == 1) {
    return v[0];
  } else {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    return (Vec<Accumulator<E>>)(((Bits)v[0] >> 16) | ((Bits)v[1] & 0xffff0000u));
  }
}

// Rows of activations, L lanes of units at a time: of a vector's lanes the first n; those past them become zeros, which
// an odd sum's last term may reach.
template <class E>
FASTSEQ_INLINE void store_activations(E* p, Vec<Accumulator<E>> v, int n) {
  if constexpr (kTerm<E> > 1)
    if (n < kLanes<Accumulator<E>>) {
      store(p, Vec<Accumulator<E>>{});
      return store_n(p, v, n);
    }
  store(p, v);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
