// The one table of what is compiled: kinds of heads, dtypes, feature classes, and the tile of each kernel for them.
//
// A head of fewer features runs in the next larger kind, its missing columns zero in shared memory. Two feature classes:
// plain (limits of causality, window and lengths, sinks, grouped heads, packed batches), and general (all else, which
// `is_general` names).
#pragma once
#include <type_traits>

#include "attention/cuda/schedule.cuh"

namespace fastseq::cuda::attention {

template <int kDim_, int kDimV_>
struct Heads {
  static constexpr int kDim = kDim_, kDimV = kDimV_;
  static constexpr bool fits(const AttentionCall& call) { return call.dim <= kDim && call.dim_v <= kDimV; }
};

// Calls visit(T(), Heads<..>()) for the call's dtype and the smallest kind of heads that holds it.
template <class Visit>
const char* with_heads(const AttentionCall& call, const Visit& visit) {
  const auto with_type = [&](auto heads) {
    return call.dtype == Dtype::bf16 ? visit(Bf16(), heads) : visit(Fp16(), heads);
  };
  if (Heads<64, 64>::fits(call)) return with_type(Heads<64, 64>());
  if (Heads<96, 96>::fits(call)) return with_type(Heads<96, 96>());
  if (Heads<128, 128>::fits(call)) return with_type(Heads<128, 128>());
  if (Heads<192, 128>::fits(call)) return with_type(Heads<192, 128>());
  return with_type(Heads<256, 256>());
}

template <class T_, class HeadsOf, bool kGeneral_>
struct Shape {
  using T = T_;
  static constexpr int kDim = HeadsOf::kDim, kDimV = HeadsOf::kDimV;
  static constexpr bool kGeneral = kGeneral_;
};

// A block makes kBlockM rows of o, each of its warps 16 kM, meeting kBlockN keys at a time.
template <class T, class HeadsOf, bool kGeneral>
struct ForwardShape : Shape<T, HeadsOf, kGeneral> {
  static constexpr int kM = kGeneral || HeadsOf::kDim > 192 ? 1 : 2, kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kBlockM = 16 * kM * kWarps;
  static constexpr int kBlockN = kM == 2 && HeadsOf::kDim > 64 ? 32 : 64;
  static constexpr int kBlocks = HeadsOf::kDim <= 192 ? 2 : 1;
  static constexpr int kShared = 2 * (kBlockM * HeadsOf::kDim + kBlockN * (HeadsOf::kDim + HeadsOf::kDimV));
};

// Forward on Hopper, plain alone: kGroups warpgroups make 64 rows of o each and one more brings the tiles, kStages
// buffers of K and of V of kBlockN keys ahead, and the next q where it has room. kLarge, of two kinds of heads: of 128
// features longer tiles of keys, for calls without limits; of 64 more rows, for lengths of which the last tile then wastes
// no more. kTurns: the groups' products take turns, so that the exponentials of one run under those of the others.
template <class T, class HeadsOf, bool kLarge>
struct HopperForwardShape : Shape<T, HeadsOf, false> {
  static constexpr int kDim = HeadsOf::kDim, kDimV = HeadsOf::kDimV;
  static constexpr int kGroups = kDim <= 64 && kLarge ? 3 : 2, kThreads = 128 * (kGroups + 1), kBlockM = 64 * kGroups;
  static constexpr int kBlockN = kDim > 192 ? 80 : kDim == 128 && kLarge ? 176 : 128;
  static constexpr int kStages = 2;
  static constexpr bool kTurns = kDim <= 192;
  static constexpr int kRegisters = kGroups == 3 ? 160 : 232, kBringingRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kTileQ = 2 * kBlockM * kDim, kTilesOfKeys = 2 * kStages * kBlockN * (kDim + kDimV);
  static constexpr int kBars = 1024;
  static constexpr int kStagesQ = 2 * kTileQ + kTilesOfKeys + kBars <= 227 * 1024 ? 2 : 1;
  static constexpr int kTiles = kStagesQ * kTileQ + kTilesOfKeys;
  static constexpr int kShared = kTiles + kBars;
};

// The kinds of heads that it has: 96 runs as 128.
template <class Visit>
const char* with_hopper_heads(const AttentionCall& call, const Visit& visit) {
  return with_heads(call, [&](auto t, auto heads) {
    using H = decltype(heads);
    using Kept = std::conditional_t<H::kDim == 96, Heads<128, 128>, H>;
    return visit(t, Kept());
  });
}

// dk and dv: a block owns kBlockN keys, a warp 16 of them, meeting kBlockM queries at a time; kParts share the columns.
template <class T, class HeadsOf, bool kGeneral>
struct KeysShape : Shape<T, HeadsOf, kGeneral> {
  static constexpr int kWarps = HeadsOf::kDim > 192 ? 4 : 8, kThreads = 32 * kWarps, kBlocks = 1, kBlockN = 16 * kWarps;
  static constexpr int kBlockM = HeadsOf::kDim <= (kGeneral ? 64 : 96) ? 64 : HeadsOf::kDim == 192 ? 16 : 32;
  static constexpr int kParts = HeadsOf::kDim <= 192 ? 1 : kGeneral ? 4 : 2;
  static constexpr int kNumbers = kGeneral ? 3 : 2;  // of each query: log, delta, share
  static constexpr int kShared =
      2 * (kBlockN + 2 * kBlockM) * (HeadsOf::kDim + HeadsOf::kDimV) + 8 * kNumbers * kBlockM;
};

// dq: a block owns kBlockM queries, a warp 16 of them, meeting kBlockN keys at a time.
template <class T, class HeadsOf, bool kGeneral>
struct QueriesShape : Shape<T, HeadsOf, kGeneral> {
  static constexpr int kWarps = HeadsOf::kDim > 192 ? 4 : 8, kThreads = 32 * kWarps, kBlocks = 1;
  static constexpr int kBlockM = 16 * kWarps, kBlockN = HeadsOf::kDim > 128 ? 32 : 64;
  // Sums of rows, of threads that are short of registers.
  static constexpr int kSums = kGeneral && (HeadsOf::kDim == 128 || HeadsOf::kDim == 256) ? 36 * kThreads : 0;
  static constexpr int kShared = 2 * (kBlockM + 2 * kBlockN) * (HeadsOf::kDim + HeadsOf::kDimV) + kSums;
};

// Decoding: each of kWarps warps meets kBlockN keys at a time, kStages - 1 tiles ahead of its products.
template <class T, class HeadsOf, bool kGeneral>
struct DecodeShape : Shape<T, HeadsOf, kGeneral> {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = 1, kBlockN = 16;
  static constexpr int kStages = HeadsOf::kDim > 192 ? 2 : 3;
  static constexpr int kTiles = 2 * (16 * HeadsOf::kDim + kWarps * kStages * kBlockN * (HeadsOf::kDim + HeadsOf::kDimV));
  static constexpr int kResults = 4 * kWarps * 16 * (HeadsOf::kDimV + 1);
  static constexpr int kShared = kTiles > kResults ? kTiles : kResults;
};

// dk and dv (kOfKeys), or dq, on Hopper, plain alone: kGroups warpgroups own 64 rows each of the kNear, meeting kFar rows
// of the other side at a time, and one more brings the tiles, kStages buffers ahead; kParts share the columns.
template <class T, class HeadsOf, bool kOfKeys_>
struct HopperGradientShape : Shape<T, HeadsOf, false> {
  static constexpr int kDim = HeadsOf::kDim, kDimV = HeadsOf::kDimV;
  static constexpr bool kOfKeys = kOfKeys_;
  static constexpr int kGroups = 2, kThreads = 128 * (kGroups + 1), kNear = 64 * kGroups;
  static constexpr int kFar = kDim <= 64 ? 128 : kDim <= 128 ? (kOfKeys ? 64 : 128) : kDim <= 192 && !kOfKeys ? 64 : 32;
  static constexpr int kParts = kOfKeys && kDim > 192 ? 2 : 1;
  static constexpr int kRegisters = 232, kBringingRegisters = 40;
  static constexpr int kRow = 2 * (kDim + kDimV), kNumbers = kOfKeys ? 8 : 0, kBars = 256;
  static constexpr int kStages = kNear * kRow + 3 * kFar * (kRow + kNumbers) + kBars <= 227 * 1024 ? 3 : 2;
  static constexpr int kTiles = (kNear + kStages * kFar) * kRow;
  static constexpr int kShared = kTiles + kStages * kFar * kNumbers + kBars;
};

// The bias's gradient: a block owns kBlockM x kBlockN numbers, and meets the tiles of scores that share them in turn.
template <class T, class HeadsOf>
struct BiasShape : Shape<T, HeadsOf, true> {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = 1, kBlockM = 64, kBlockN = 64;
  static constexpr int kTiles = 2 * (kBlockM + kBlockN) * (HeadsOf::kDim + HeadsOf::kDimV);
  static constexpr int kSums = 4 * kBlockM * (kBlockN + 1);
  static constexpr int kShared = kTiles > kSums ? kTiles : kSums;
};

}  // namespace fastseq::cuda::attention
