// The numbers of the scan: how one lies in memory (T, read by to_float and written by from_float) and how it enters the
// product with W_hh (operand).
#pragma once
#include "primitives/primitives.cuh"
#include "recurrent/cuda/recurrent.h"

namespace fastseq::cuda {

// A float32 that is rounded to TF32 where it is multiplied, once for all products that it enters.
struct Tf32 {
  float value;
};
FASTSEQ_DEVICE float to_float(Tf32 x) { return x.value; }
template <>
FASTSEQ_DEVICE Tf32 from_float<Tf32>(float x) {
  return {x};
}

template <class T>
FASTSEQ_DEVICE T operand(T x) {
  return x;
}
FASTSEQ_DEVICE Tf32 operand(Tf32 x) { return {bits_float(to_tf32(x.value))}; }

template <class T>
constexpr ScanNumber kNumber = {Dtype::f32};
template <>
constexpr ScanNumber kNumber<Bf16> = {Dtype::bf16};
template <>
constexpr ScanNumber kNumber<Fp16> = {Dtype::f16};
template <>
constexpr ScanNumber kNumber<Tf32> = {Dtype::f32, true};

// Whether a product is three of TF32, which keep float32's digits.
template <class T>
constexpr bool kThreefold = false;
template <>
constexpr bool kThreefold<float> = true;

}  // namespace fastseq::cuda
