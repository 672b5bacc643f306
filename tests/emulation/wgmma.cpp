// Products of a warpgroup. They read shared memory at some time between their issue and the wait for them; until then
// their accumulators hold NaN, and registers that are an operand must still hold it when the wait is over.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "emulated_calls.h"
#include "runtime.h"

namespace fastseq::emulation {

// The accumulators of one array `c` of all 128 threads, while products into it are under way.
struct Accumulators {
  float* c[128];
  unsigned count;
  unsigned under_way;
  float values[128][128];
};

struct WarpgroupProduct {
  Warpgroup* warpgroup;
  WarpgroupProduct* next;  // in the order of issue
  Pending* pending;        // none once it is done
  Accumulators* accumulators;
  const unsigned char *a, *b;
  uint64_t a_descriptor, b_descriptor;
  unsigned n, group;
  bool a_in_registers, a_transposed, b_transposed, accumulate, half;
  uint32_t registers[128][4];
  const uint32_t* operand[128];  // where those lie
  Where where;
};

struct Warpgroup {
  Block* block;
  unsigned arrived;
  void* arguments[128];
  Fiber* fibers[128];
  unsigned group;
  WarpgroupProduct *oldest, *newest;
  Accumulators* held[16];
  char edge[8];
};

namespace {

template <class T>
struct Pool {
  T* free[64];
  unsigned count = 0;
  T* take() {
    if (count) return free[--count];
    return reinterpret_cast<T*>(
        syscall(SYS_mmap, nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  void give(T* item) {
    if (count < 64) free[count++] = item;
  }
};
Pool<Accumulators> accumulators_pool;
Pool<WarpgroupProduct> products_pool;
Pool<Warpgroup> warpgroups_pool;

float read_half(const unsigned char* p, bool half) {
  uint16_t bits;
  __builtin_memcpy(&bits, p, 2);
  if (half) return from_half(bits);
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}

// Where the element (row of m or n, k) of an operand lies, from the start of the block's shared memory.
uint32_t place(uint64_t descriptor, bool transposed, unsigned row, unsigned k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, lead = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const unsigned mode = descriptor >> 62, bytes = mode == 0 ? 16 : 256u >> mode;
  uint32_t a;
  if (transposed) {
    const unsigned across = bytes / 2;
    const uint32_t far = mode ? lead : stride, deep = mode ? stride : lead;
    a = start + row / across * far + row % across * 2 + k % 8 * bytes + k / 8 * deep;
  } else if (mode == 0) {
    a = start + row / 8 * stride + k / 8 * lead + row % 8 * 16 + k % 8 * 2;
  } else {
    a = start + row / 8 * stride + row % 8 * bytes + k * 2;
  }
  return mode ? a ^ ((a >> 7 & (bytes / 16 - 1)) << 4) : a;
}

unsigned char* shared_at(Block& block, uint32_t address) {
  return address + 2 <= block.shared_bytes ? block.shared + address : nullptr;
}

template <class F>
void each_operand(WarpgroupProduct& product, const F& call) {
  for (unsigned k = 0; k < 16; ++k) {
    if (!product.a_in_registers)
      for (unsigned m = 0; m < 64; ++m) call(true, m, k, place(product.a_descriptor, product.a_transposed, m, k));
    for (unsigned n = 0; n < product.n; ++n)
      call(false, n, k, place(product.b_descriptor, product.b_transposed, n, k));
  }
}

void compute(WarpgroupProduct& product) {
  static float a[64][16], b[16][256], row[256];
  Block& block = *product.warpgroup->block;
  each_operand(product, [&](bool is_a, unsigned i, unsigned k, uint32_t address) {
    const unsigned char* p = shared_at(block, address);
    (is_a ? a[i][k] : b[k][i]) = p ? read_half(p, product.half) : __builtin_nanf("");
  });
  if (product.a_in_registers)
    for (unsigned thread = 0; thread < 128; ++thread)
      for (unsigned i = 0; i < 4; ++i)
        for (unsigned j = 0; j < 2; ++j) {
          const uint16_t bits = static_cast<uint16_t>(product.registers[thread][i] >> 16 * j);
          a[thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8][thread % 4 * 2 + i / 2 * 8 + j] =
              read_half(reinterpret_cast<const unsigned char*>(&bits), product.half);
        }
  for (unsigned m = 0; m < 64; ++m) {
    for (unsigned n = 0; n < product.n; ++n) row[n] = 0;
    for (unsigned k = 0; k < 16; ++k)
      for (unsigned n = 0; n < product.n; ++n) row[n] += a[m][k] * b[k][n];
    for (unsigned n = 0; n < product.n; ++n) {
      const unsigned thread = m / 16 * 32 + m % 8 * 4 + n % 8 / 2;
      float& c = product.accumulators->values[thread][n / 8 * 4 + m % 16 / 8 * 2 + n % 2];
      c = (product.accumulate ? c : 0) + row[n];
    }
  }
}

Warpgroup& warpgroup_of(Fiber* fiber, Where where) {
  Block& block = *fiber->in_block;
  if (fiber->tid / 128 * 128 + 128 > block.threads) fail("wgmma: fewer than 128 threads in the warpgroup", where);
  Warpgroup*& warpgroup = block.warpgroups[fiber->tid / 128];
  if (!warpgroup) {
    warpgroup = warpgroups_pool.take();
    *warpgroup = Warpgroup{};
    warpgroup->block = &block;
  }
  return *warpgroup;
}

// Waits until all 128 threads are here; the last one runs `perform` and lets the others go on.
void meet_warpgroup(Warpgroup& warpgroup, void* arguments, void (*perform)(Warpgroup&), const char* what,
                    Where where) {
  Fiber* fiber = running;
  const unsigned thread = fiber->tid % 128;
  warpgroup.arguments[thread] = arguments;
  warpgroup.fibers[thread] = fiber;
  if (++warpgroup.arrived < 128) return wait(fiber, what, where);
  warpgroup.arrived = 0;
  perform(warpgroup);
  for (Fiber* other : warpgroup.fibers)
    if (other != fiber) make_ready(other);
  progress();
}

struct Call {
  float* c;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  unsigned n;
  bool a_transposed, b_transposed, accumulate, half;
  Where where;
};

void start(Warpgroup& warpgroup) {
  const Call& first = *static_cast<Call*>(warpgroup.arguments[0]);
  WarpgroupProduct* product = products_pool.take();
  product->warpgroup = &warpgroup;
  product->next = nullptr;
  product->a_descriptor = first.a_descriptor;
  product->b_descriptor = first.b_descriptor;
  product->n = first.n;
  product->group = warpgroup.group;
  product->a_in_registers = first.a != nullptr;
  product->a_transposed = first.a_transposed;
  product->b_transposed = first.b_transposed;
  product->accumulate = first.accumulate;
  product->half = first.half;
  product->where = first.where;
  Accumulators** held = warpgroup.held;
  while (*held && (*held)->c[0] != first.c) ++held;
  const bool fresh = !*held;
  if (fresh) {
    if (held == warpgroup.held + 15) fail("wgmma: more than 15 arrays of accumulators under way", first.where);
    *held = accumulators_pool.take();
    (*held)->count = first.n / 2;
    (*held)->under_way = 0;
  }
  Accumulators& accumulators = **held;
  ++accumulators.under_way;
  product->accumulators = &accumulators;
  for (unsigned thread = 0; thread < 128; ++thread) {
    const Call& own = *static_cast<Call*>(warpgroup.arguments[thread]);
    if (own.n != first.n || own.b_descriptor != first.b_descriptor || own.a_descriptor != first.a_descriptor ||
        own.accumulate != first.accumulate || own.half != first.half)
      fail("wgmma: the threads of a warpgroup ask for different products", own.where);
    product->operand[thread] = own.a;
    if (own.a) __builtin_memcpy(product->registers[thread], own.a, sizeof(product->registers[thread]));
    if (!fresh) continue;
    accumulators.c[thread] = own.c;
    for (unsigned i = 0; i < accumulators.count; ++i) {
      accumulators.values[thread][i] = own.c[i];
      own.c[i] = __builtin_nanf("");
    }
  }
  (warpgroup.newest ? warpgroup.newest->next : warpgroup.oldest) = product;
  warpgroup.newest = product;
  Pending* pending = issue(Pending::product, warpgroup.block, first.where);
  pending->multiply = product;
  product->pending = pending;
  bool outside = false;
  each_operand(*product, [&](bool, unsigned, unsigned, uint32_t address) {
    outside |= !shared_at(*warpgroup.block, address);
  });
  if (outside) fail("wgmma: a descriptor reaches outside the block's shared memory", first.where);
  proxy_reads(
      *warpgroup.block,
      [](void* p) {
        auto& reader = *static_cast<WarpgroupProduct*>(p);
        each_operand(reader, [&](bool, unsigned, unsigned, uint32_t address) {
          race_read(shared_at(*reader.warpgroup->block, address), 2);
        });
      },
      product, &warpgroup.edge[product->group & 7]);
}

struct Wait {
  unsigned left;
};

void finish_groups(Warpgroup& warpgroup) {
  const unsigned left = static_cast<Wait*>(warpgroup.arguments[0])->left;
  while (warpgroup.oldest && warpgroup.oldest->group + left < warpgroup.group) {
    WarpgroupProduct* product = warpgroup.oldest;
    if (product->pending) land(product->pending);
    for (unsigned thread = 0; thread < 128 && product->a_in_registers; ++thread)
      if (__builtin_memcmp(product->registers[thread], product->operand[thread], sizeof(product->registers[thread])))
        fail("wgmma: an operand in registers was overwritten before the wait", product->where);
    warpgroup.oldest = product->next;
    if (!warpgroup.oldest) warpgroup.newest = nullptr;
    if (--product->accumulators->under_way == 0) {
      Accumulators* done = product->accumulators;
      for (unsigned thread = 0; thread < 128; ++thread)
        for (unsigned i = 0; i < done->count; ++i) done->c[thread][i] = done->values[thread][i];
      Accumulators** held = warpgroup.held;
      while (*held != done) ++held;
      for (; *held; ++held) *held = held[1];
      accumulators_pool.give(done);
    }
    products_pool.give(product);
  }
}

}  // namespace

// Products are done in the order of their issue: those before this one first.
void land_product(Pending* pending) {
  WarpgroupProduct* product = pending->multiply->warpgroup->oldest;
  for (bool last = false; !last; product = product->next) {
    last = product->pending == pending;
    if (!product->pending) continue;
    compute(*product);
    take_off(product->pending);
    product->pending = nullptr;
  }
}

void wgmma(float* c, unsigned count, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool a_transposed,
           bool b_transposed, bool accumulate, bool half, Where where) {
  if (!running->fenced) fail("wgmma without wg_fence since the last wait", where);
  Call own{c, a, a_descriptor, b_descriptor, 2 * count, a_transposed, b_transposed, accumulate, half, where};
  meet_warpgroup(warpgroup_of(running, where), &own, start, "wgmma", where);
}

uint64_t wg_desc(const void* tile, unsigned lead, unsigned stride, unsigned swizzle, Where where) {
  const unsigned char* address = in_shared(tile, 16, 16, "wg_desc", where);
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return static_cast<uint64_t>(address - running->shared) >> 4 | static_cast<uint64_t>(lead >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | mode << 62;
}

void wg_fence() { running->fenced = true; }

void wg_commit(Where where) {
  int nothing;
  meet_warpgroup(
      warpgroup_of(running, where), &nothing, [](Warpgroup& warpgroup) { ++warpgroup.group; }, "wg_commit", where);
}

void wg_wait(unsigned left, Where where) {
  Warpgroup& warpgroup = warpgroup_of(running, where);
  Wait own{left};
  const unsigned group = warpgroup.group;
  meet_warpgroup(warpgroup, &own, finish_groups, "wg_wait", where);
  for (unsigned done = group > 7 ? group - 7 : 0; done + left < group; ++done) edge_acquire(&warpgroup.edge[done & 7]);
  running->fenced = false;
}

void forget_warpgroups(Block& block) {
  for (Warpgroup*& warpgroup : block.warpgroups) {
    if (!warpgroup) continue;
    for (WarpgroupProduct *p = warpgroup->oldest, *next; p; p = next) {
      next = p->next;
      products_pool.give(p);
    }
    for (Accumulators** held = warpgroup->held; *held; ++held) accumulators_pool.give(*held);
    warpgroups_pool.give(warpgroup);
    warpgroup = nullptr;
  }
}

}  // namespace fastseq::emulation
