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
constexpr ScanDtype kDtype = ScanDtype::f32;
template <>
constexpr ScanDtype kDtype<Bf16> = ScanDtype::bf16;
template <>
constexpr ScanDtype kDtype<Fp16> = ScanDtype::f16;
template <>
constexpr ScanDtype kDtype<Tf32> = ScanDtype::tf32;

}  // namespace fastseq::cuda
