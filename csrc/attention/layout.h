// How the results of attention lie in memory. kernels/attention/layout.py has the same rule for Python.
#pragma once
#include <cstdint>

namespace fastseq {

constexpr int64_t kMostDimensions = 4;

// Strides of a dense tensor of `sizes` whose dimensions lie in memory in the order of x's, as torch.empty_like has it; but
// the last dimension, of features, is always innermost. A dimension along which x is broadcast has no place in memory: it
// keeps its place among the others.
inline void strides_as(int64_t rank, const int64_t* x_sizes, const int64_t* x_strides, const int64_t* sizes,
                       int64_t* strides) {
  int64_t inward[kMostDimensions] = {rank - 1}, count = 1;  // dimensions, innermost first
  for (int64_t d = rank - 2; d >= 0; --d) {
    int64_t place = count;
    for (int64_t n = count - 1; n > 0; --n) {
      const int64_t other = inward[n], own = x_strides[d], its = x_strides[other];
      if (own == 0 || its == 0) continue;
      if (own > its || (own == its && x_sizes[d] >= x_sizes[other])) break;
      place = n;
    }
    for (int64_t n = count++; n > place; --n) inward[n] = inward[n - 1];
    inward[place] = d;
  }
  int64_t step = 1;
  for (int64_t n = 0; n < rank; step *= sizes[inward[n]] > 0 ? sizes[inward[n]] : 1, ++n) strides[inward[n]] = step;
}

}  // namespace fastseq
