// What tensors are made of, for every kernel. How float32 is multiplied (as TF32, say) is no dtype: a kernel's own choice.
#pragma once
#include <cstddef>

namespace fastseq {

enum class Dtype : int { f64, f32, bf16, f16, i8 };  // i8: weights of recurrent layers alone

constexpr size_t bytes_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2;
}
constexpr Dtype accumulator_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

}  // namespace fastseq
