// out[c] = sum over r of x[r][c], for a contiguous matrix: plain structs in, nothing of torch.
#pragma once
#include "attention.h"

namespace fastseq {

struct ColumnSums {
  AttentionCall::Dtype dtype;
  const void* x;  // [rows, columns]
  long rows, columns;
  void* out;  // [columns], x's dtype; summed in float where that is of 16 bits
  int threads;
};

FASTSEQ_DECLARE(void, column_sums, (const ColumnSums& call))

}  // namespace fastseq
