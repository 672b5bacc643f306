// Fibers, the scheduler, and the reports of deadlock and livelock.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "emulated_calls.h"
#include "launch.h"
#include "runtime.h"
#include "switch.h"

namespace fastseq::emulation {

Settings settings;
Fiber* running = nullptr;

namespace {

constexpr size_t kStack = 64 * 1024, kGuard = 4096;

// Stacks are kept from launch to launch, each above a page that nothing may touch.
struct Stacks {
  unsigned char* base = nullptr;
  size_t count = 0;

  unsigned char* at(size_t i) { return base + i * (kStack + kGuard) + kGuard; }
  void reserve(size_t wanted) {
    if (wanted <= count) return;
    if (base) munmap(base, count * (kStack + kGuard));
    count = wanted;
    void* p = mmap(nullptr, count * (kStack + kGuard), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    base = static_cast<unsigned char*>(p);
    for (size_t i = 0; i < count; ++i) mprotect(at(i) - kGuard, kGuard, PROT_NONE);
  }
} stacks;

// One wave of blocks: those that are resident together.
struct Wave {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  unsigned live = 0;
  Warp* current = nullptr;
  size_t cursor = 0;
  int64_t lowest = 0;
  uint64_t idle_polls = 0;
};

Wave* wave = nullptr;
Context scheduler;
std::string report;
bool failed = false;
uint64_t random_state = 1;
unsigned landing_one_in = 0;
Body body;
void* body_arguments;

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull >> 16;
}
unsigned random_below(unsigned n) { return static_cast<unsigned>((random_bits() & 0xffffffffu) * n >> 32); }

std::string place(const Block& block) {
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
  return text;
}
std::string line_of(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

// Where every warp of the wave stands: lanes that wait in the same place together.
std::string standings() {
  std::string text;
  unsigned lines = 0;
  for (const Warp& warp : wave->warps) {
    uint32_t told = 0;
    for (unsigned i = 0; i < warp.count; ++i) {
      const Fiber& fiber = warp.lanes[i];
      if ((told >> i & 1) || fiber.state == Fiber::done) continue;
      uint32_t lanes = 0;
      for (unsigned j = i; j < warp.count; ++j) {
        const Fiber& other = warp.lanes[j];
        if (other.state != Fiber::done && other.doing == fiber.doing && other.where.line() == fiber.where.line())
          lanes |= 1u << j;
      }
      told |= lanes;
      if (++lines > 40) continue;
      char mask[48];
      std::snprintf(mask, sizeof mask, " warp %u lanes %08x: ", fiber.warp, lanes);
      text += "\n  " + place(*fiber.in_block) + mask + (fiber.doing ? fiber.doing : "not started") + " at " +
              line_of(fiber.where);
    }
  }
  if (lines > 40) text += "\n  and " + std::to_string(lines - 40) + " more";
  return text;
}

// What a fiber found wrong; it never runs again, and its words are put together on the scheduler's stack.
struct Fault {
  const char* what;
  const Fiber* fiber;
  Where where;
} fault;

void describe_fault() {
  report = fault.what;
  if (fault.fiber)
    report += " in " + place(*fault.fiber->in_block) + " warp " + std::to_string(fault.fiber->warp) + " lane " +
              std::to_string(fault.fiber->lane) + " at " + line_of(fault.where);
}

// Takes the fiber that runs back to the scheduler.
void leave(Fiber* fiber) { to_scheduler(scheduler, *fiber); }

[[noreturn]] void fiber_main() {
  Fiber* fiber = running;
  entered(scheduler, *fiber);
  fiber->in_block->started = true;
  edge_acquire(wave);
  body(body_arguments);
  finished(fiber);
  leave(fiber);
  __builtin_unreachable();
}

Fiber* next_lane(Warp& warp) {
  const unsigned turn = warp.rotation;
  const uint32_t rotated = turn ? warp.ready >> turn | warp.ready << (32 - turn) : warp.ready;
  const unsigned bit = warp.backwards ? 31 - __builtin_clz(rotated) : __builtin_ctz(rotated);
  return &warp.lanes[(bit + turn) & 31];
}

Warp* random_warp() {
  unsigned count = 0;
  Warp* chosen = nullptr;
  for (Warp& warp : wave->warps)
    if (warp.ready && random_below(++count) == 0) chosen = &warp;
  return chosen;
}

// The fiber that runs next; null when none can.
Fiber* pick() {
  Warp*& current = wave->current;
  switch (settings.schedule) {
    case Schedule::in_order:
      for (size_t i = 0, n = wave->warps.size(); i < n; ++i)
        if (Warp& warp = wave->warps[(wave->cursor + i) % n]; warp.ready) {
          wave->cursor = warp.index;
          return next_lane(warp);
        }
      return nullptr;
    case Schedule::uniform: {
      Warp* warp = random_warp();
      if (!warp) return nullptr;
      warp->rotation = random_below(32);
      return next_lane(*warp);
    }
    case Schedule::sticky:
      if (!current || !current->ready) current = random_warp();
      return current ? next_lane(*current) : nullptr;
    case Schedule::priority: {
      Warp* best = nullptr;
      for (Warp& warp : wave->warps)
        if (warp.ready && (!best || warp.priority > best->priority)) best = &warp;
      return best ? next_lane(*best) : nullptr;
    }
  }
  return nullptr;
}

void run_wave() {
  while (wave->live && !failed) {
    if (under_way() && landing_one_in && random_below(landing_one_in) == 0) land_one(random_below(under_way()));
    Fiber* fiber = pick();
    const bool stuck = wave->idle_polls > 256 + 16ull * wave->live;
    if (!fiber || stuck) {
      if (under_way()) {
        // Pollers would take long to starve it out of the list one by one.
        for (unsigned n = stuck ? under_way() / 4 + 1 : 1; n && !failed; --n) land_one(random_below(under_way()));
        wave->idle_polls = 0;
      } else {
        failed = true;
        fault.what = nullptr;
        report = (fiber ? "livelock: every thread that can run polls memory that nobody will change"
                        : "deadlock: no thread can run") +
                 standings();
      }
      continue;
    }
    running = fiber;
    to_fiber(scheduler, *fiber);
    running = nullptr;
  }
  while (!failed && under_way()) land_one(under_way() - 1);
}

}  // namespace

// ---- Fibers.

void make_ready(Fiber* fiber) {
  fiber->state = Fiber::ready;
  fiber->in_warp->ready |= 1u << fiber->lane;
}
void make_all_ready(Fiber*& list) {
  while (list) {
    Fiber* fiber = list;
    list = fiber->next_waiting;
    make_ready(fiber);
  }
}
void progress() {
  if (wave) wave->idle_polls = 0;
}
bool chance(unsigned one_in) { return random_below(one_in) == 0; }

void wait(Fiber* fiber, const char* what, Where where) {
  fiber->doing = what;
  fiber->where = where;
  fiber->state = Fiber::waiting;
  fiber->in_warp->ready &= ~(1u << fiber->lane);
  progress();
  leave(fiber);
}

void pause(const char* what, Where where) {
  Fiber* fiber = running;
  progress();
  if (settings.schedule == Schedule::in_order || !chance(4)) return;
  if (settings.schedule == Schedule::priority) {
    if (!chance(4)) return;
    fiber->in_warp->priority = static_cast<int64_t>(random_bits() & 0xffff);
  }
  fiber->doing = what;
  fiber->where = where;
  wave->current = nullptr;
  leave(fiber);
}

void poll(const void* address, uint64_t value, const char* what, Where where) {
  Fiber* fiber = running;
  fiber->doing = what;
  fiber->where = where;
  if (fiber->polled == address && fiber->polled_value == value) {
    ++wave->idle_polls;
  } else {
    progress();
    fiber->polled = address;
    fiber->polled_value = value;
  }
  // It goes behind all the others: what it waits for is theirs to do.
  Warp& warp = *fiber->in_warp;
  warp.priority = --wave->lowest;
  warp.rotation = (fiber->lane + (warp.backwards ? 0 : 1)) & 31;
  wave->current = nullptr;
  wave->cursor = warp.index + 1;
  leave(fiber);
}

void fail(const char* what, Where where) {
  fault = {what, running, where};
  failed = true;
  leave(running);
  __builtin_unreachable();
}

void fault_on_landing(const char* what, const Pending* pending) {
  fault = {what, pending->owner, pending->where};
  failed = true;
}

void meet(Perform perform, uint32_t mask, void* arguments, const char* what, Where where) {
  Fiber* fiber = running;
  Warp& warp = *fiber->in_warp;
  if (!(mask >> fiber->lane & 1)) fail("a lane takes part in a warp operation whose mask leaves it out", where);
  warp.waiting |= 1u << fiber->lane;
  warp.operation[fiber->lane] = perform;
  warp.mask[fiber->lane] = mask;
  warp.arguments[fiber->lane] = arguments;
  // Lanes beyond the block's threads are no lanes.
  bool complete = true;
  for (uint32_t left = mask; left && complete; left &= left - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(left));
    complete = (warp.waiting >> lane & 1) && warp.operation[lane] == perform && warp.mask[lane] == mask;
  }
  if (!complete) return wait(fiber, what, where);
  perform(warp, mask);
  warp.waiting &= ~mask;
  ++warp.meetings;
  for (uint32_t left = mask & ~(1u << fiber->lane); left; left &= left - 1)
    make_ready(&warp.lanes[__builtin_ctz(left)]);
  progress();
}

// ---- Launching.

namespace {

void set_up(const Launch& shape, const std::vector<unsigned>& groups, std::vector<SharedMemory>& memory) {
  const unsigned per_group = shape.cooperative ? shape.grid.x * shape.grid.y * shape.grid.z : shape.cluster;
  const unsigned blocks = static_cast<unsigned>(groups.size()) * per_group;
  const unsigned warps = (shape.threads + 31) / 32;
  wave->fibers.resize(size_t{blocks} * warps * 32);
  wave->warps.resize(size_t{blocks} * warps);
  wave->blocks.resize(blocks);
  wave->clusters.resize(blocks / shape.cluster);
  stacks.reserve(size_t{blocks} * shape.threads);
  size_t stack = 0;
  for (unsigned b = 0; b < blocks; ++b) {
    Block& block = wave->blocks[b];
    const unsigned flat = groups[b / per_group] * per_group + b % per_group;
    block.index = {flat % shape.grid.x, flat / shape.grid.x % shape.grid.y, flat / shape.grid.x / shape.grid.y};
    block.in_cluster = &wave->clusters[b / shape.cluster];
    block.in_cluster->blocks.push_back(&block);
    block.in_cluster->live += shape.threads;
    block.rank = b % shape.cluster;
    block.threads = block.live = shape.threads;
    block.shared = memory[b].begin;
    block.shared_bytes = shape.shared;
    proxy_start(block);
    for (unsigned t = 0; t < shape.threads; ++t) {
      Fiber& fiber = wave->fibers[(size_t{b} * warps + t / 32) * 32 + t % 32];
      static_cast<Thread&>(fiber) = Thread{t,          shape.threads, t % 32,        t / 32,      block.index,
                                           shape.grid, block.rank,    shape.cluster, block.shared};
      fiber.in_block = &block;
      fiber.in_warp = &wave->warps[size_t{b} * warps + t / 32];
      fiber.stack = stacks.at(stack++);
      prepare(fiber, fiber.stack, kStack, fiber_main);
    }
    for (unsigned w = 0; w < warps; ++w) {
      Warp& warp = wave->warps[size_t{b} * warps + w];
      warp.index = b * warps + w;
      warp.lanes = &wave->fibers[(size_t{b} * warps + w) * 32];
      warp.count = std::min(32u, shape.threads - w * 32);
      warp.ready = warp.count == 32 ? ~0u : (1u << warp.count) - 1;
      warp.priority = static_cast<int64_t>(random_bits() & 0xffff);
      if (settings.schedule != Schedule::in_order) {
        warp.rotation = random_below(32);
        warp.backwards = random_below(2) != 0;
      }
    }
  }
  wave->live = blocks * shape.threads;
}

}  // namespace

void finished(Fiber* fiber) {
  Block& block = *fiber->in_block;
  Cluster& cluster = *block.in_cluster;
  land_all(fiber, [](const Pending* p, unsigned) { return p->kind == Pending::copy; }, 0);
  edge_release(wave);
  fiber->state = Fiber::done;
  fiber->in_warp->ready &= ~(1u << fiber->lane);
  --wave->live;
  --block.live;
  --cluster.live;
  if (fiber->cluster_arrived && cluster.phase == fiber->cluster_phase) --cluster.arrived;
  thread_left(block);
  progress();
}

int blocks_per_multiprocessor(const Launch& shape) {
  const cuda::DeviceLimits& limits = settings.limits;
  if (shape.shared > limits.shared_per_block) return 0;
  return static_cast<int>(std::min<size_t>(limits.shared_per_multiprocessor / (shape.shared + 1024),
                                           2048 / std::max(shape.threads, 1u)));
}
int resident_clusters(const Launch& shape) {
  if (settings.limits.major < 9) return 0;
  return settings.limits.multiprocessors * blocks_per_multiprocessor(shape) / static_cast<int>(shape.cluster);
}

const char* run_launch(const Launch& shape, Body kernel, void* arguments) {
  const unsigned blocks = shape.grid.x * shape.grid.y * shape.grid.z;
  const cuda::DeviceLimits& limits = settings.limits;
  if (!blocks || !shape.threads || shape.threads > 1024) return "invalid configuration argument";
  if (shape.shared > limits.shared_per_block) return "invalid argument: shared memory of a block";
  if (shape.cluster == 0 || shape.grid.x % shape.cluster || shape.cluster > 16) return "invalid cluster size";
  if (shape.cluster > 1 && limits.major < 9) return "this device has no clusters";
  if (shape.cooperative && blocks > static_cast<unsigned>(limits.multiprocessors * blocks_per_multiprocessor(shape)))
    return "too many blocks in cooperative launch";
  if (running || wave) return "a kernel launches a kernel";

  random_state = (settings.seed + 1) * 0x9e3779b97f4a7c15ull;
  for (int i = 0; i < 8; ++i) random_bits();
  constexpr unsigned kLanding[] = {0, 2, 16, 256};
  landing_one_in = settings.schedule == Schedule::in_order ? 0 : kLanding[random_below(4)];
  body = kernel;
  body_arguments = arguments;
  failed = false;

  const unsigned per_group = shape.cooperative ? blocks : shape.cluster;
  std::vector<unsigned> groups(blocks / per_group);
  for (unsigned i = 0; i < groups.size(); ++i) groups[i] = i;
  if (settings.schedule != Schedule::in_order)
    for (size_t i = groups.size(); i > 1; --i)
      std::swap(groups[i - 1], groups[random_below(static_cast<unsigned>(i))]);
  const size_t together = std::max<size_t>(1, settings.resident / (per_group * shape.threads));
  for (size_t first = 0; first < groups.size() && !failed; first += together) {
    Wave here;
    wave = &here;
    const std::vector<unsigned> now(groups.begin() + first,
                                    groups.begin() + std::min(groups.size(), first + together));
    std::vector<SharedMemory> memory(now.size() * per_group);
    for (SharedMemory& m : memory) m.allocate(shape.shared);
    set_up(shape, now, memory);
    race_start(scheduler, here.fibers.data(), here.fibers.size());
    edge_release(wave);
    run_wave();
    if (failed && fault.what) describe_fault();
    if (!failed)
      for (size_t b = 0; b < memory.size(); ++b)
        if (memory[b].overrun()) {
          failed = true;
          fault.what = nullptr;
          report = "something was written past the end of shared memory in " + place(here.blocks[b]);
        }
    edge_acquire(wave);
    race_stop(here.fibers.data(), here.fibers.size());
    forget_all();
    for (Block& block : here.blocks) proxy_stop(block), forget_warpgroups(block);
    wave = nullptr;
    running = nullptr;
  }
  return failed ? report.c_str() : nullptr;
}

}  // namespace fastseq::emulation
