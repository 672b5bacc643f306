// The machine that the emulated primitives run on: CUDA threads as fibers of one host thread, in warps, blocks and
// clusters; a scheduler that draws its choices from a seed; and asynchronous work that lands when it likes.
//
// A fiber runs until it has to wait: for the other lanes of a warp operation, at a barrier, or after a look at memory
// that another thread is to change. Whatever the real machine orders is ordered here by those primitives alone, which
// is also what ThreadSanitizer is told (`edge_*`); this code itself is compiled without it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "primitives/types.cuh"

namespace fastseq::emulation {

using cuda::Extent;
using cuda::Launch;
using cuda::Mbar;
using Where = std::source_location;

// What a kernel asks about itself; the first part of a fiber.
struct Thread {
  unsigned tid, threads, lane, warp;
  Extent block, grid;
  unsigned rank, cluster;  // of the cluster
  unsigned char* shared;
};

enum class Schedule { in_order, uniform, sticky, priority };

struct Settings {
  uint64_t seed = 0;
  Schedule schedule = Schedule::in_order;
  unsigned resident = 512;  // threads of a launch that run side by side, at least a block or a cluster
  cuda::DeviceLimits limits{9, 0, 132, 232448, 233472, true};
};
extern Settings settings;

struct Fiber;
struct Warp;
struct Block;
struct Cluster;
struct Warpgroup;

// A tensor map, and where in it a box lies; no map for a copy in a row.
struct TensorMap {
  const unsigned char* tensor;
  unsigned element_bytes, rank, swizzle;
  uint64_t sizes[4], strides[4];
  uint32_t box[4];
};
struct Box {
  TensorMap map;
  int at[4];
};

// Work under way: a copy or store that has been issued and has not landed.
struct Pending {
  enum Kind { copy, store, async_store, bulk_load, bulk_store, product } kind;
  Fiber* owner;
  Pending *older, *newer;  // of the same owner
  unsigned index;          // in the list of all
  unsigned group;          // of cp_commit, counted by the owner
  Block* target;
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes, valid;
  Mbar* bar;
  Where where;
  unsigned char data[16];
  struct Box box;                     // of a copy by a tensor map
  struct WarpgroupProduct* multiply;  // of a product
};

struct Fiber : Thread {
  Warp* in_warp;
  Block* in_block;
  void* stack_pointer;
  unsigned char* stack;
  size_t stack_bytes;
  enum State { ready, waiting, done } state;
  const char* doing;  // what it waits in, and where it stands
  Where where;
  Fiber* next_waiting;
  Pending *oldest, *newest;
  unsigned group;       // of copies, the one that is open
  unsigned bulk_group;  // of bulk stores
  bool fenced;          // wg_fence since the last wg_wait
  unsigned cluster_phase;
  bool cluster_arrived;
  const void* polled;
  uint64_t polled_value;
  bool fence_releases;  // a fence came before the next relaxed store
  const void* loads[8];  // relaxed loads since the last fence
  unsigned loads_count;
  void* race_fiber;  // ThreadSanitizer's
  void* fake_stack;  // AddressSanitizer's
};

// A warp operation that lanes wait in: `perform` runs when all lanes of the mask have come.
using Perform = void (*)(Warp&, uint32_t mask);

struct Warp {
  Fiber* lanes;
  unsigned count;
  unsigned index;
  uint32_t ready;    // lanes that could run
  uint32_t waiting;  // lanes in a warp operation
  Perform operation[32];
  uint32_t mask[32];
  void* arguments[32];
  unsigned rotation;  // the order in which lanes run
  bool backwards;
  int64_t priority;
  uint32_t meetings;
  char edge[2];
};

struct Barrier {
  unsigned arrived, expected;
  uint32_t phase;
  Fiber* waiting;
  char edge[2];
};

struct MbarState {
  Mbar* address;
  unsigned count, arrivals;
  int64_t bytes;
  uint32_t phase;
  bool remote, fenced;
  Fiber* initialiser;
  Fiber* waiting;
  char edge[2];
};

struct Block {
  Cluster* in_cluster;
  Extent index;
  unsigned rank, threads, live;
  bool started;  // one of its threads has run
  unsigned char* shared;
  size_t shared_bytes;
  Barrier barriers[16];
  Warpgroup* warpgroups[8];  // those that have multiplied
  void *loads, *reads;       // ThreadSanitizer's fibers of the asynchronous proxy
  char fence_edge, loads_edge;
  MbarState mbars[64];
  unsigned mbar_count;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned live, arrived;
  uint32_t phase;
  Fiber* waiting;
  char edge[2];
};

extern Fiber* running;  // the fiber that runs; null in the scheduler

// ---- Called by primitives, on a fiber.
[[noreturn]] void fail(const char* what, Where where);
void wait(Fiber* fiber, const char* what, Where where);  // until made ready
void make_ready(Fiber* fiber);
void make_all_ready(Fiber*& list);
void pause(const char* what, Where where);  // others may run first
void poll(const void* address, uint64_t value, const char* what, Where where);
void progress();
bool chance(unsigned one_in);
// Runs `perform` once all lanes of the mask wait here with the same one.
void meet(Perform perform, uint32_t mask, void* arguments, const char* what, Where where);
unsigned char* in_shared(const void* p, size_t bytes, size_t alignment, const char* what, Where where);
Block& peer(unsigned rank, const char* what, Where where);

Pending* issue(Pending::Kind kind, Block* target, Where where);
void take_off(Pending* pending);
void fault_on_landing(const char* what, const Pending* pending);
void land(Pending* pending);
void land_bulk(Pending* pending);
void land_product(Pending* pending);
void forget_warpgroups(Block& block);
void land_one(unsigned i);  // of the list of all
unsigned under_way();
void forget_all();
void land_all(Fiber* owner, bool (*wanted)(const Pending*, unsigned), unsigned argument);
void landed_bytes(const Pending* pending, unsigned bytes);  // at its mbarrier
MbarState& will_land(Block& target, Mbar* bar, Where where);

// ---- What ThreadSanitizer is told; nothing without it.
void edge_release(const void* address);
void edge_release(MbarState& state);  // by bytes that will land
void edge_acquire(const void* address);
void race_read(const void* p, size_t bytes);
void race_write(const void* p, size_t bytes);

// The asynchronous proxy: what TMA writes for a thread that has seen what must come before, and what TMA and wgmma
// read, which only knows what fence_proxy_async has shown it and what TMA has loaded.
void proxy_writes(Block& block, void (*write)(void*), void* argument, MbarState& state);
void proxy_reads(Block& block, void (*read)(void*), void* argument, const void* edge);

inline void copy_bytes(unsigned char* to, const unsigned char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) to[i] = from[i];
}
inline void fill_bytes(unsigned char* to, unsigned char value, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) to[i] = value;
}

}  // namespace fastseq::emulation
