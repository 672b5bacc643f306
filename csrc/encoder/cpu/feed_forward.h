// What a transformer's layer does to each row (token) by itself, on the CPU: plain structs in, a plain array out.
//
//   y = after(residual + W2 act(W1 before(x) + b1) + b2)
//
// Either norm, either bias, the residual and the whole second product may be absent. float32.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/isa.h"

namespace fastseq {

enum class Activation : int { none, relu, gelu };  // torch's exact gelu

struct LayerNorm {
  const float *weight = nullptr, *bias = nullptr;  // [features]; without a weight there is no norm, a bias may be null
  double eps = 0;
};

struct Product {
  const float* w = nullptr;  // [out, in], contiguous; null: there is no such product
  const float* bias = nullptr;
  int64_t in = 0, out = 0;  // out: a multiple of kProductColumns
};
constexpr int64_t kProductColumns = 32;  // whole vectors in every instruction set

struct FeedForward {
  int64_t rows;
  int threads;
  const float *x, *residual;  // [rows, first.in]; [rows, features of y] or null
  LayerNorm before, after;
  Product first, second;
  Activation activation;  // of the first product
  float* y;               // [rows, out of the last product]
  void* workspace;        // of feed_forward_workspace bytes, aligned to 64
};

FASTSEQ_DECLARE(size_t, feed_forward_workspace, (const FeedForward& p))
FASTSEQ_DECLARE(void, feed_forward, (const FeedForward& p))

}  // namespace fastseq
