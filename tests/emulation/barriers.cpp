// Barriers of warps, blocks and clusters, and mbarriers.
#include "emulated_calls.h"
#include "launch.h"
#include "runtime.h"

namespace fastseq::emulation {

namespace {

void open_barrier(Barrier& barrier) {
  barrier.arrived = barrier.expected = 0;
  ++barrier.phase;
  make_all_ready(barrier.waiting);
  progress();
}

void wait_in(Fiber*& list, const char* what, Where where) {
  Fiber* fiber = running;
  fiber->next_waiting = list;
  list = fiber;
  wait(fiber, what, where);
}

}  // namespace

// ---- Warp and block.

void sync_warp(uint32_t mask, Where where) {
  const char* edge = &running->in_warp->edge[running->in_warp->meetings & 1];
  edge_release(edge);
  meet([](Warp&, uint32_t) {}, mask, nullptr, "sync_warp", where);
  edge_acquire(edge);
}

void sync_block(Where where) {
  Block& block = *running->in_block;
  Barrier& barrier = block.barriers[0];
  const char* edge = &barrier.edge[barrier.phase & 1];
  land_all(running, [](const Pending* p, unsigned) { return p->kind == Pending::store; }, 0);
  edge_release(edge);
  if (++barrier.arrived == block.live)
    open_barrier(barrier);
  else
    wait_in(barrier.waiting, "sync_block", where);
  edge_acquire(edge);
}

void thread_left(Block& block) {
  if (Barrier& barrier = block.barriers[0]; barrier.arrived && barrier.arrived == block.live) open_barrier(barrier);
  Cluster& cluster = *block.in_cluster;
  if (cluster.live && cluster.arrived == cluster.live) {
    cluster.arrived = 0;
    ++cluster.phase;
    make_all_ready(cluster.waiting);
  }
}

void named_bar(unsigned id, unsigned count, bool waits, Where where) {
  if (id == 0 || id > 15) fail("a named barrier's number is 1..15", where);
  if (count == 0 || count % 32 || count > running->threads)
    fail("a named barrier counts whole warps of its block", where);
  Barrier& barrier = running->in_block->barriers[id];
  if (barrier.arrived && barrier.expected != count) fail("threads give one named barrier different counts", where);
  barrier.expected = count;
  const char* edge = &barrier.edge[barrier.phase & 1];
  edge_release(edge);
  if (++barrier.arrived == count)
    open_barrier(barrier);
  else if (waits)
    wait_in(barrier.waiting, "named_bar_sync", where);
  if (waits) edge_acquire(edge);
}

// ---- Cluster.

void cluster_arrive(bool releases, Where where) {
  Fiber* fiber = running;
  Cluster& cluster = *fiber->in_block->in_cluster;
  if (fiber->cluster_arrived) fail("a thread arrives twice at the cluster's barrier without waiting", where);
  fiber->cluster_arrived = true;
  fiber->cluster_phase = cluster.phase;
  if (releases) {
    land_all(fiber, [](const Pending* p, unsigned) { return p->kind == Pending::store; }, 0);
    edge_release(&cluster.edge[cluster.phase & 1]);
  }
  if (++cluster.arrived == cluster.live) {
    cluster.arrived = 0;
    ++cluster.phase;
    make_all_ready(cluster.waiting);
    progress();
  } else {
    pause("cluster_arrive", where);
  }
}

void cluster_wait(Where where) {
  Fiber* fiber = running;
  Cluster& cluster = *fiber->in_block->in_cluster;
  if (!fiber->cluster_arrived) fail("a thread waits at the cluster's barrier without arriving", where);
  if (cluster.phase == fiber->cluster_phase) wait_in(cluster.waiting, "cluster_wait", where);
  fiber->cluster_arrived = false;
  edge_acquire(&cluster.edge[fiber->cluster_phase & 1]);
}

// ---- mbarriers. The 8 bytes in shared memory hold the number of its state, so that what writes over them is noticed.

namespace {

constexpr uint64_t kMagic = 0x6d62617200000000ull;

MbarState* find(Block& block, const Mbar* bar) {
  const uint64_t value = *bar;
  const unsigned i = static_cast<unsigned>(value & 0xff);
  if ((value & ~0xffull) != kMagic || i >= block.mbar_count || block.mbars[i].address != bar) return nullptr;
  return &block.mbars[i];
}

MbarState& state_of(Block& block, Mbar* bar, Where where) {
  MbarState* state = find(block, bar);
  if (!state) fail("no mbarrier was initialised here, or something wrote over it", where);
  race_read(bar, sizeof *bar);
  return *state;
}

void end_phase_if_due(MbarState& state) {
  if (state.arrivals || state.bytes) return;
  ++state.phase;
  state.arrivals = state.count;
  make_all_ready(state.waiting);
  progress();
}

void arrive(MbarState& state, unsigned arrivals, unsigned bytes, Where where) {
  if (state.arrivals < arrivals) fail("more arrivals at an mbarrier than it counts", where);
  state.bytes += bytes;
  if (arrivals) edge_release(&state.edge[state.phase & 1]);
  state.arrivals -= arrivals;
  if (arrivals) end_phase_if_due(state);
}

}  // namespace

void mbar_init(Mbar* bar, unsigned count, Where where) {
  in_shared(bar, 8, 8, "mbar_init", where);
  Block& block = *running->in_block;
  if (count == 0 || count >= 1u << 20) fail("an mbarrier counts 1 .. 2^20 - 1 arrivals", where);
  race_write(bar, 8);
  MbarState* state = find(block, bar);
  if (!state) {
    if (block.mbar_count == 64) fail("more than 64 mbarriers in a block", where);
    state = &block.mbars[block.mbar_count];
    *bar = kMagic | block.mbar_count++;
  }
  *state = MbarState{};
  state->address = bar;
  state->count = state->arrivals = count;
  state->initialiser = running;
}

void fence_mbar_init() {
  Block& block = *running->in_block;
  for (unsigned i = 0; i < block.mbar_count; ++i)
    if (block.mbars[i].initialiser == running) block.mbars[i].fenced = true;
}

void mbar_arrive(Mbar* bar, unsigned arrivals, unsigned bytes, Where where) {
  arrive(state_of(*running->in_block, bar, where), arrivals, bytes, where);
  pause("mbar_arrive", where);
}

void mbar_arrive_remote(Mbar* bar, unsigned rank, Where where) {
  in_shared(bar, 8, 8, "mbar_arrive_remote", where);
  Block& target = peer(rank, "mbar_arrive_remote", where);
  auto* there = reinterpret_cast<Mbar*>(target.shared + (reinterpret_cast<unsigned char*>(bar) - running->shared));
  MbarState& state = state_of(target, there, where);
  if (!state.fenced) fail("a peer reaches an mbarrier that was initialised without fence_mbar_init", where);
  state.remote |= &target != running->in_block;
  land_all(running, [](const Pending* p, unsigned) { return p->kind == Pending::store; }, 0);
  arrive(state, 1, 0, where);
  pause("mbar_arrive_remote", where);
}

bool mbar_wait(Mbar* bar, unsigned parity, bool from_cluster, bool blocks, Where where) {
  in_shared(bar, 8, 8, "mbar_wait", where);
  MbarState& state = state_of(*running->in_block, bar, where);
  while ((state.phase & 1) == (parity & 1)) {
    if (!blocks) {
      poll(bar, state.phase, "mbar_try_wait", where);
      if ((state.phase & 1) == (parity & 1)) return false;
      break;
    }
    wait_in(state.waiting, "mbar_wait", where);
  }
  if (state.remote && !from_cluster) fail("peers arrive at this mbarrier: wait by mbar_wait_cluster", where);
  edge_acquire(&state.edge[parity & 1]);
  return true;
}

void landed_bytes(const Pending* pending, unsigned bytes) {
  MbarState* state = find(*pending->target, pending->bar);
  if (!state) return fault_on_landing("the mbarrier of an asynchronous store is gone", pending);
  state->bytes -= bytes;
  if (state->bytes < -(1 << 20)) return fault_on_landing("an mbarrier gets bytes that nobody expects", pending);
  end_phase_if_due(*state);
}

MbarState& will_land(Block& target, Mbar* bar, Where where) {
  MbarState& state = state_of(target, bar, where);
  if (!state.fenced) fail("asynchronous stores reach an mbarrier that was initialised without fence_mbar_init", where);
  state.remote |= &target != running->in_block;
  return state;
}

void edge_release(MbarState& state) {
  // It is not known yet in which phase the bytes will land.
  edge_release(&state.edge[0]);
  edge_release(&state.edge[1]);
}

}  // namespace fastseq::emulation
