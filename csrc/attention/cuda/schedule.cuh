// Which tile a block computes, and which tiles of the other side it meets.
#pragma once
#include "attention/cuda/attention.h"
#include "primitives/primitives.cuh"

namespace fastseq::cuda::attention {

FASTSEQ_DEVICE int at_most(int a, int b) { return a < b ? a : b; }
FASTSEQ_DEVICE int at_least(int a, int b) { return a > b ? a : b; }
FASTSEQ_DEVICE int round_up(int a, int n) { return (a + n - 1) / n * n; }

// One sequence of the batch; number `batch` of a packed one are the rows that belong to none. Rows from tq on and keys
// from tk on are padding.
struct Sequence {
  int q_row, k_row;  // where it begins
  int rows, keys;    // present
  int tq, tk;        // that count
  int prefix;        // keys that every query sees; of the general class alone
  int shift;

  FASTSEQ_DEVICE Sequence(const AttentionCall& call, int b) {
    if (call.cu_q != nullptr) {
      const bool real = b < call.batch;
      q_row = call.cu_q[b], k_row = call.cu_k[b];
      rows = (real ? call.cu_q[b + 1] : call.length_q) - q_row;
      keys = (real ? call.cu_k[b + 1] : call.length_k) - k_row;
      tq = real ? rows : 0, tk = real ? keys : 0;
    } else {
      q_row = k_row = 0;
      rows = tq = call.length_q, keys = tk = call.length_k;
      if (call.lengths_q != nullptr) tq = at_least(0, at_most(rows, int(call.lengths_q[b])));
      if (call.lengths_k != nullptr) tk = at_least(0, at_most(keys, int(call.lengths_k[b])));
    }
    prefix = call.prefix != nullptr && tk > 0 ? at_least(0, at_most(tk, int(call.prefix[b]))) : 0;
    shift = call.bottom_right ? tk - tq : 0;
  }
};

template <class T>
FASTSEQ_DEVICE T* at(const View& view, int b, int h, int64_t row) {
  return static_cast<T*>(view.data) + int64_t(b) * view.batch + int64_t(h) * view.head + row * view.row;
}

// Blocks over tiles of kBlock rows of every sequence and head. Packed lengths are not known to the host: sequence b owns
// the slots from cu[b] / kBlock + b on, never fewer than it has tiles, and so the grid follows from their sum.
struct Tiling {
  const int32_t* cu = nullptr;
  int32_t tiles = 0;     // slots a head
  int32_t heads = 0;     // of one sequence
  int32_t units = 0;     // heads that own slots: of all sequences, packed of one
  int32_t together = 1;  // heads whose tiles run side by side, so that what they read stays in the L2 cache
  bool ascending = false;  // in such a group the first tiles come first, else the last
  int64_t blocks() const { return int64_t(tiles) * units; }
};

inline Tiling tiling_of(const AttentionCall& call, bool of_keys, int block) {
  constexpr int64_t kCache = int64_t(32) << 20;
  Tiling t;
  const int64_t length = of_keys ? call.length_k : call.length_q;
  t.cu = of_keys ? call.cu_k : call.cu_q;
  t.tiles = int32_t(t.cu != nullptr ? length / block + call.batch + 1 : (length + block - 1) / block);
  t.ascending = of_keys;  // a causal limit makes the last rows of queries the longest, and the first of keys
  t.heads = of_keys ? call.heads_k : call.heads_q;
  t.units = t.cu != nullptr ? t.heads : call.batch * t.heads;
  // What a tile meets: keys of a head that `group` heads share, or queries of the group.
  const int64_t met = int64_t(of_keys ? call.length_q : call.length_k) * (call.dim + call.dim_v) * 2;
  const int64_t heads = met > 0 && met < kCache ? kCache / met : 1;
  const int64_t together = of_keys ? (heads > call.group ? heads / call.group : 1) : heads * call.group;
  t.together = int32_t(together < t.units ? together : t.units > 0 ? t.units : 1);
  return t;
}

struct Slot {
  int b, h, tile;
  int slot;  // of all slots of a head; unlike `tile` it tells sequences of a packed batch apart
};

template <int kBlock>
FASTSEQ_DEVICE Slot find_slot(const AttentionCall& call, const Tiling& t, int block) {
  const int first = block / (t.together * t.tiles) * t.together;
  const int size = at_most(t.together, t.units - first);
  const int index = block - first * t.tiles;
  const int slot = t.ascending ? index / size : t.tiles - 1 - index / size, unit = first + index % size;
  if (t.cu == nullptr) return {unit / t.heads, unit % t.heads, slot, slot};
  int low = 0, high = call.batch;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (t.cu[middle] / kBlock + middle <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  return {low, unit, slot - (t.cu[low] / kBlock + low), slot};
}

// The tiles of a block that stays on its multiprocessor: it takes one of each round, and every other round is walked
// backwards, so that whoever had a longer tile gets a shorter one. each(slot, sequence).
template <int kBlock, class Each>
FASTSEQ_DEVICE void for_each_slot(const AttentionCall& call, const Tiling& t, const Each& each) {
  const int all = t.tiles * t.units, together = int(nblocks()), own = int(bid());
  bool backwards = false;
  for (int first = 0; first < all; first += together, backwards = !backwards) {
    const int block = first + (backwards ? together - 1 - own : own);
    if (block >= all) continue;
    const Slot slot = find_slot<kBlock>(call, t, block);
    each(slot, Sequence(call, slot.b));
  }
}

// What the limits (causality, window, lengths) say, in kernels of either class.

// The keys that query i sees.
template <bool kGeneral>
struct SeenKeys {
  int begin, end, prefix;
  FASTSEQ_DEVICE SeenKeys(const AttentionCall& call, const Sequence& own, int i) {
    const int centre = i + own.shift;
    begin = centre - call.left, end = i < own.tq ? at_most(own.tk, centre + call.right + 1) : 0;
    prefix = kGeneral ? own.prefix : 0;
  }
  FASTSEQ_DEVICE bool hides(int j) const {
    const bool outside = (j < begin) | (j >= end);
    return kGeneral ? outside & (j >= prefix) : outside;
  }
};

// Whether key j is hidden from query i, lengths aside.
template <bool kGeneral>
FASTSEQ_DEVICE bool hides(const AttentionCall& call, const Sequence& own, int i, int j) {
  const int centre = i + own.shift;
  const bool outside = (j < centre - call.left) | (j > centre + call.right);
  return kGeneral ? outside & (j >= own.prefix) : outside;
}

// Tiles [begin, end), counted in positions, of which those in [whole_begin, whole_end) are seen by everybody.
struct Range {
  int begin, whole_begin, whole_end, end;
  FASTSEQ_DEVICE bool masked(int tile) const { return tile < whole_begin || tile >= whole_end; }
};

// Keys that queries first..last see.
template <bool kGeneral>
FASTSEQ_DEVICE Range keys_of(const AttentionCall& call, const Sequence& s, int first, int last, int block) {
  if (first > last) return {0, 0, 0, 0};
  Range r;
  r.end = at_least(0, at_most(s.tk, last + s.shift + call.right + 1));
  r.begin = at_least(0, first + s.shift - call.left);
  r.whole_begin = at_least(0, last + s.shift - call.left);
  r.whole_end = at_least(0, at_most(s.tk, first + s.shift + call.right + 1));
  if (kGeneral) {  // what is between the prefix and a window is visited, and hidden
    if (s.prefix > 0) r.begin = 0;
    r.end = at_least(r.end, s.prefix);
    if (r.whole_begin <= s.prefix) r.whole_begin = 0, r.whole_end = at_least(r.whole_end, s.prefix);
  }
  r.begin = r.begin / block * block;
  r.whole_begin = round_up(r.whole_begin, block);
  r.whole_end = r.whole_end / block * block;
  return r;
}

// Queries that see keys first..last.
template <bool kGeneral>
FASTSEQ_DEVICE Range queries_of(const AttentionCall& call, const Sequence& s, int first, int last, int block) {
  if (first > last) return {0, 0, 0, 0};
  Range r;
  r.end = at_least(0, at_most(s.tq, last - s.shift + call.left + 1));
  r.begin = at_least(0, first - s.shift - call.right) / block * block;
  r.whole_begin = round_up(at_least(0, last - s.shift - call.right), block);
  r.whole_end = at_least(0, at_most(s.tq, first - s.shift + call.left + 1)) / block * block;
  if (kGeneral && first < s.prefix) r.begin = 0, r.end = s.tq;
  if (kGeneral && last < s.prefix) r.whole_begin = 0, r.whole_end = s.tq / block * block;
  return r;
}

}  // namespace fastseq::cuda::attention
