// How the blocks that share one W_hh give each other the vector it multiplies, [column][k], one exchange after another.
//
// Exchange e fills buffer e % 2. A block writes it only after exchange e - 1 has ended for it, so after every block has
// given its part of e - 1, and that is after it read e - 2 for the last time: two buffers are enough.
//   put(column, k, v)   this block's share, any thread; then
//   publish<n>(...)     of n parts, all threads; then, with other work between,
//   wait<n>(...)        of the same, all threads: from here read(at) gives 8 bytes of what all blocks put, which begins at
//                       offset().
// Whoever has waited for an exchange knows that no peer will write to its memory before it publishes again: after the
// last wait it may end.
#pragma once
#include "primitives/primitives.cuh"
#include "recurrent/cuda/recurrent.h"
#include "recurrent/cuda/number.cuh"

namespace fastseq::cuda {

// What of the vector this block owns: for each of `parts` gates, units of them from `first` on.
struct Slice {
  int part, first, units, columns;
};

// Through the shared memory of a cluster's blocks. What the two ways of telling that bytes have come share.
template <class T>
struct ClusterBuffers {
  unsigned char* buffers;
  ScanLayout layout;
  int blocks, rank, group, epoch = 0;
  int first_peer, first_row;  // of this warp, and of this lane: blocks for a warp without peers

  FASTSEQ_DEVICE ClusterBuffers(unsigned char* shared, void*, const ScanLayout& l, const ScanShape& s)
      : buffers(shared), layout(l), blocks(s.blocks), rank(cta_rank()), group(bid() / s.blocks) {
    const int share = warp() / l.peers_apart;
    first_peer = share < l.shares ? warp() % l.peers_apart : blocks;
    first_row = (lane() >> l.row_lanes) + (share << (5 - l.row_lanes));
  }

  // Zeroes what nobody writes: the padding, which W's zeros multiply. No peer writes here before all have done so.
  FASTSEQ_DEVICE void start() {
    const uint4 zero{0, 0, 0, 0};
    for (int i = tid(); i < 2 * layout.buffer / 16; i += nthreads()) reinterpret_cast<uint4*>(buffers)[i] = zero;
    sync_block();
    if (blocks > 1) cluster_sync();
  }
  FASTSEQ_DEVICE int place(int e) const { return (e & 1) * layout.buffer; }
  FASTSEQ_DEVICE unsigned char* buffer(int e) const { return buffers + place(e); }
  FASTSEQ_DEVICE void put(int column, int k, float v) {
    reinterpret_cast<T*>(buffer(epoch + 1) + column * layout.column)[k] = operand(from_float<T>(v));
  }
  // Calls send(place, peer, bytes) for this block's share, kParts parts from `from` on, 16 bytes at a time, for every peer.
  template <int kParts, class Send>
  FASTSEQ_DEVICE void push(const Slice& mine, int from, Send send) {
    const int pieces = pieces_of(mine.units), rows = kParts * mine.columns, size = static_cast<int>(sizeof(T));
    const int row_lanes = layout.row_lanes, own_piece = lane() & ((1 << row_lanes) - 1);
    for (int p = first_peer; p < blocks - 1; p += layout.peers_apart) {
      int peer = rank + 1 + p;
      if (peer >= blocks) peer -= blocks;
      for (int row = first_row; row < rows; row += layout.shares << (5 - row_lanes)) {
        unsigned char* at = buffer(epoch) + row / kParts * layout.column + ((from + row % kParts) * mine.part + mine.first) * size;
        for (int piece = own_piece; piece < pieces; piece += 1 << row_lanes)
          send(at + piece * 16, peer, *reinterpret_cast<const uint4*>(at + piece * 16));
      }
    }
  }
  FASTSEQ_DEVICE static int pieces_of(int units) { return (units * static_cast<int>(sizeof(T)) + 15) / 16; }
  FASTSEQ_DEVICE int offset() const { return place(epoch); }
  FASTSEQ_DEVICE uint2 read(int at) const { return *reinterpret_cast<const uint2*>(buffers + at); }
};

// Each store tells its bytes to the receiver's mbarrier, one for each buffer, and a block waits for its own bytes alone.
// The phase of exchange e cannot take bytes of e + 2: a peer gives those after it has this block's part of e + 1, which
// this block gives after its wait for e.
template <class T>
struct ClusterExchange : ClusterBuffers<T> {
  using Base = ClusterBuffers<T>;
  static constexpr ScanRole kRole = ScanRole::cluster;
  Mbar* bars;

  FASTSEQ_DEVICE ClusterExchange(unsigned char* shared, void* none, const ScanLayout& l, const ScanShape& s)
      : Base(shared, none, l, s), bars(reinterpret_cast<Mbar*>(shared + l.bars)) {}

  FASTSEQ_DEVICE void start() {
    if (tid() == 0) {
      mbar_init(bars, 1);
      mbar_init(bars + 1, 1);
      fence_mbar_init();
    }
    Base::start();
  }
  template <int kParts>
  FASTSEQ_DEVICE void publish(const Slice& mine, int from) {
    sync_block();
    const int e = ++this->epoch;
    if (this->blocks == 1) return;
    Mbar* bar = bars + (e & 1);
    const int theirs = Base::pieces_of(mine.part) - Base::pieces_of(mine.units);  // blocks divide a part without gaps
    if (tid() == 0) mbar_arrive_tx(bar, theirs * 16 * kParts * mine.columns);
    this->template push<kParts>(mine, from, [&](void* at, int peer, uint4 v) { st_async(at, peer, v, bar); });
  }
  template <int kParts>
  FASTSEQ_DEVICE void wait(const Slice&, int) {
    if (this->blocks > 1) mbar_wait_cluster(bars + (this->epoch & 1), (this->epoch - 1) / 2 & 1);
  }
};

// Plain stores, and a barrier of the whole cluster that waits until they have come.
template <class T>
struct ClusterBarrierExchange : ClusterBuffers<T> {
  using Base = ClusterBuffers<T>;
  static constexpr ScanRole kRole = ScanRole::cluster_barrier;
  using Base::Base;

  template <int kParts>
  FASTSEQ_DEVICE void publish(const Slice& mine, int from) {
    sync_block();
    ++this->epoch;
    if (this->blocks == 1) return;
    this->template push<kParts>(mine, from, [](void* at, int peer, uint4 v) { st_cluster_v4(at, peer, v); });
    sync_warp();
    cluster_arrive_release();
  }
  template <int kParts>
  FASTSEQ_DEVICE void wait(const Slice&, int) {
    sync_warp();  // the barrier wants whole warps
    if (this->blocks > 1) cluster_wait_acquire();
  }
};

// Through global memory, with a counter for each group of blocks: a group's tiles do not wait for another's. What has come
// is copied into shared memory at once, where there is room for it: that waits for the L2 cache once, not once a tile.
template <class T>
struct GridExchange {
  static constexpr ScanRole kRole = ScanRole::grid;
  unsigned char *buffers, *copy;
  unsigned* counter;
  ScanLayout layout;
  int blocks, rank, group, epoch = 0;

  FASTSEQ_DEVICE GridExchange(unsigned char* shared, void* workspace, const ScanLayout& l, const ScanShape& s)
      : copy(shared), layout(l), blocks(s.blocks), rank(bid() % s.blocks), group(bid() / s.blocks) {
    unsigned char* base = static_cast<unsigned char*>(workspace);
    counter = reinterpret_cast<unsigned*>(base + group * kScanCounterBytes);
    buffers = base + s.groups * kScanCounterBytes + int64_t(group) * 2 * l.buffer;
  }
  // The workspace is zero; so is the copy's padding, which W's zeros multiply.
  FASTSEQ_DEVICE void start() {
    for (int i = tid(); i < layout.copy / 16; i += nthreads()) reinterpret_cast<uint4*>(copy)[i] = uint4{0, 0, 0, 0};
    sync_block();
  }
  FASTSEQ_DEVICE unsigned char* buffer(int e) const { return buffers + (e & 1) * layout.buffer; }
  FASTSEQ_DEVICE void put(int column, int k, float v) {
    reinterpret_cast<T*>(buffer(epoch + 1) + column * layout.column)[k] = operand(from_float<T>(v));
  }
  template <int kParts>
  FASTSEQ_DEVICE void publish(const Slice&, int) {
    sync_block();
    ++epoch;
    if (tid() == 0) red_release_gpu(counter, 1);
  }
  template <int kParts>
  FASTSEQ_DEVICE void wait(const Slice& mine, int first) {
    if (tid() == 0)
      while (ld_acquire_gpu(counter) < static_cast<unsigned>(epoch) * blocks) {
      }
    sync_block();
    if (layout.copy == 0) return;
    const int part = mine.part * static_cast<int>(sizeof(T));
    const unsigned char* given = buffer(epoch);
    for (int n = warp(); n < mine.columns; n += nthreads() / 32) {
      const int column = (n + rank) % mine.columns;  // so that not all blocks ask the same part of the cache at once
      for (int i = first * part + int(lane()) * 16; i < (first + kParts) * part; i += 32 * 16)
        cp_async16(copy + column * layout.column + i, given + column * layout.column + i);
    }
    cp_commit();
    cp_wait<0>();
    sync_block();
  }
  FASTSEQ_DEVICE int offset() const { return 0; }  // in the copy, and in the exchange's own buffer
  FASTSEQ_DEVICE uint2 read(int at) const {
    if (layout.copy) return *reinterpret_cast<const uint2*>(copy + at);
    return ldcg(reinterpret_cast<const uint2*>(buffer(epoch) + at));
  }
};

}  // namespace fastseq::cuda
