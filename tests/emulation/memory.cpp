// Shared memory of a block and of its peers, asynchronous copies and stores, flags in global memory.
#include "emulated_calls.h"
#include "launch.h"
#include "runtime.h"

namespace fastseq::emulation {

namespace {
constexpr unsigned char kPoison = 0xff;
bool is_store(const Pending* p, unsigned) { return p->kind == Pending::store; }
}  // namespace

unsigned char* in_shared(const void* p, size_t bytes, size_t alignment, const char* what, Where where) {
  Block& block = *running->in_block;
  auto* address = static_cast<unsigned char*>(const_cast<void*>(p));
  running->doing = what;
  if (address < block.shared || address + bytes > block.shared + block.shared_bytes)
    fail("an address outside the block's shared memory", where);
  if (reinterpret_cast<uintptr_t>(address) % alignment) fail("a misaligned address in shared memory", where);
  return address;
}

Block& peer(unsigned rank, const char* what, Where where) {
  Cluster& cluster = *running->in_block->in_cluster;
  running->doing = what;
  if (rank >= cluster.blocks.size()) fail("no block of the cluster has that rank", where);
  Block& block = *cluster.blocks[rank];
  if (!block.started) fail("the peer block has not started yet", where);
  if (!block.live) fail("the peer block has returned: its shared memory is gone", where);
  return block;
}

// ---- cp.async

void cp_async(void* shared, const void* global, unsigned bytes, unsigned valid, Where where) {
  unsigned char* to = in_shared(shared, bytes, bytes, "cp_async", where);
  if (valid > bytes) fail("cp_async: more valid bytes than bytes", where);
  if (reinterpret_cast<uintptr_t>(global) % bytes) fail("cp_async: a misaligned address in global memory", where);
  race_read(global, valid);
  race_write(to, bytes);
  fill_bytes(to, kPoison, bytes);
  Pending* pending = issue(Pending::copy, running->in_block, where);
  pending->to = to;
  pending->from = static_cast<const unsigned char*>(global);
  pending->bytes = bytes;
  pending->valid = valid;
}

void cp_commit() { ++running->group; }

void cp_wait(unsigned left) {
  // Groups older than the `left` latest that are closed; what is in the open group is not waited for.
  Fiber* fiber = running;
  if (fiber->group < left) return;
  for (Pending *p = fiber->oldest, *next; p; p = next) {
    next = p->newer;
    if (p->kind != Pending::copy || p->group + left >= fiber->group) continue;
    race_write(p->to, p->bytes);
    land(p);
  }
}

// ---- Shared memory of peers.

void st_cluster(void* p, unsigned rank, const void* v, unsigned bytes, Where where) {
  unsigned char* own = in_shared(p, bytes, bytes, "st_cluster", where);
  Block& target = peer(rank, "st_cluster", where);
  unsigned char* to = target.shared + (own - running->shared);
  race_write(to, bytes);
  // A thread's stores to one place land in their order.
  for (Pending *older = running->oldest, *next; older; older = next) {
    next = older->newer;
    if (older->kind == Pending::store && older->to < to + bytes && to < older->to + older->bytes) land(older);
  }
  Pending* pending = issue(Pending::store, &target, where);
  pending->to = to;
  pending->bytes = bytes;
  copy_bytes(pending->data, static_cast<const unsigned char*>(v), bytes);
}

void ld_cluster(const void* p, unsigned rank, void* v, unsigned bytes, Where where) {
  unsigned char* own = in_shared(p, bytes, bytes, "ld_cluster", where);
  Block& target = peer(rank, "ld_cluster", where);
  const unsigned char* from = target.shared + (own - running->shared);
  land_all(running, is_store, 0);
  race_read(from, bytes);
  copy_bytes(static_cast<unsigned char*>(v), from, bytes);
}

void st_async(void* p, unsigned rank, const void* v, unsigned bytes, Mbar* bar, Where where) {
  unsigned char* own = in_shared(p, bytes, bytes, "st_async", where);
  auto* own_bar = in_shared(bar, 8, 8, "st_async", where);
  Block& target = peer(rank, "st_async", where);
  unsigned char* to = target.shared + (own - running->shared);
  auto* there = reinterpret_cast<Mbar*>(target.shared + (own_bar - running->shared));
  MbarState& state = will_land(target, there, where);
  race_write(to, bytes);
  edge_release(state);
  fill_bytes(to, kPoison, bytes);
  Pending* pending = issue(Pending::async_store, &target, where);
  pending->to = to;
  pending->bytes = bytes;
  pending->bar = there;
  copy_bytes(pending->data, static_cast<const unsigned char*>(v), bytes);
}

void land(Pending* pending) {
  progress();
  switch (pending->kind) {
    case Pending::copy:
      copy_bytes(pending->to, pending->from, pending->valid);
      fill_bytes(pending->to + pending->valid, 0, pending->bytes - pending->valid);
      break;
    case Pending::store:
    case Pending::async_store:
      if (!pending->target->live) {
        fault_on_landing("a store lands in the shared memory of a block that has returned", pending);
        break;
      }
      copy_bytes(pending->to, pending->data, pending->bytes);
      if (pending->kind == Pending::async_store) landed_bytes(pending, pending->bytes);
      break;
    case Pending::bulk_load:
    case Pending::bulk_store:
      land_bulk(pending);
      break;
    case Pending::product:
      return land_product(pending);
  }
  take_off(pending);
}

// ---- Flags in global memory.

void stored(Where where) { pause("a store to a flag", where); }

void loaded(const void* p, unsigned v, bool acquires, Where where) {
  Fiber* fiber = running;
  if (!acquires) {
    bool known = false;
    for (unsigned i = 0; i < fiber->loads_count && i < 8; ++i) known |= fiber->loads[i] == p;
    if (!known) fiber->loads[fiber->loads_count++ % 8] = p;
  }
  poll(p, v, acquires ? "ld_acquire_gpu" : "ld_relaxed_gpu", where);
}

bool fenced() { return running->fence_releases; }

const void* fence() {
  Fiber* fiber = running;
  fiber->fence_releases = true;
  land_all(fiber, is_store, 0);
  if (fiber->loads_count > 8) fiber->loads_count = 8;
  return fiber->loads_count ? fiber->loads[--fiber->loads_count] : nullptr;
}

}  // namespace fastseq::emulation
