// Bulk copies between global and shared memory (TMA).
#include "emulated_calls.h"
#include "runtime.h"

namespace fastseq::emulation {

namespace {

constexpr unsigned char kPoison = 0xff;

unsigned box_bytes(const TensorMap& map) {
  unsigned bytes = map.element_bytes;
  for (unsigned d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

// Calls with the byte in shared memory and in the tensor (null outside it) of every element of the box.
template <class F>
void each_element(const Box& box, const F& call) {
  const TensorMap& map = box.map;
  unsigned dense = 0;
  for (unsigned w = 0; w < map.box[3]; ++w)
    for (unsigned z = 0; z < map.box[2]; ++z)
      for (unsigned y = 0; y < map.box[1]; ++y)
        for (unsigned x = 0; x < map.box[0]; ++x, dense += map.element_bytes) {
          const int64_t at[4] = {box.at[0] + int64_t{x}, box.at[1] + int64_t{y}, box.at[2] + int64_t{z},
                                 box.at[3] + int64_t{w}};
          const unsigned char* element = map.tensor + at[0] * map.element_bytes;
          bool inside = true;
          for (unsigned d = 0; d < 4; ++d) {
            inside &= at[d] >= 0 && at[d] < static_cast<int64_t>(map.sizes[d]);
            if (d) element += at[d] * static_cast<int64_t>(map.strides[d]);
          }
          const unsigned place = map.swizzle ? dense ^ ((dense >> 7 & (map.swizzle / 16 - 1)) << 4) : dense;
          call(place, inside ? const_cast<unsigned char*>(element) : nullptr);
        }
}

unsigned alignment_of(const TensorMap& map) { return map.swizzle ? 8 * map.swizzle : 128; }

void check_map(const TensorMap& map, unsigned rank, Where where) {
  if (!map.tensor || map.rank != rank) fail("TMA: the tensor map has another number of dimensions", where);
}

void load(void* shared, unsigned bytes, unsigned alignment, Mbar* bar, const Box& box, const void* from, Where where) {
  unsigned char* to = in_shared(shared, bytes, alignment, "tma_load", where);
  in_shared(bar, 8, 8, "tma_load", where);
  MbarState& state = will_land(*running->in_block, bar, where);
  Pending* pending = issue(Pending::bulk_load, running->in_block, where);
  pending->to = to;
  pending->bytes = bytes;
  pending->bar = bar;
  pending->box = box;
  pending->from = static_cast<const unsigned char*>(from);
  proxy_writes(
      *running->in_block,
      [](void* p) {
        const auto* bulk = static_cast<Pending*>(p);
        race_write(bulk->to, bulk->bytes);
        if (bulk->from) return race_read(bulk->from, bulk->bytes);
        each_element(bulk->box, [&](unsigned, unsigned char* element) {
          if (element) race_read(element, bulk->box.map.element_bytes);
        });
      },
      pending, state);
  fill_bytes(to, kPoison, bytes);
  pause("tma_load", where);
}

}  // namespace

void tma_load(void* shared, const TensorMap& map, Mbar* bar, unsigned rank, int x, int y, int z, int w, Where where) {
  check_map(map, rank, where);
  load(shared, box_bytes(map), alignment_of(map), bar, {map, {x, y, z, w}}, nullptr, where);
}

void tma_load_1d(void* shared, const void* global, Mbar* bar, unsigned bytes, Where where) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) fail("tma_load_1d: not in units of 16 bytes", where);
  load(shared, bytes, 16, bar, {}, global, where);
}

void tma_store(const TensorMap& map, const void* shared, unsigned rank, int x, int y, int z, int w, Where where) {
  check_map(map, rank, where);
  unsigned char* from = in_shared(shared, box_bytes(map), alignment_of(map), "tma_store", where);
  Pending* pending = issue(Pending::bulk_store, running->in_block, where);
  pending->from = from;
  pending->bytes = box_bytes(map);
  pending->box = {map, {x, y, z, w}};
  pending->group = running->bulk_group;
  proxy_reads(
      *running->in_block,
      [](void* p) {
        const auto* store = static_cast<Pending*>(p);
        race_read(store->from, store->bytes);
        each_element(store->box, [&](unsigned, unsigned char* element) {
          if (element) race_write(element, store->box.map.element_bytes);
        });
      },
      pending, &running->bulk_group);
  pause("tma_store", where);
}

void tma_commit() { ++running->bulk_group; }

void tma_store_wait(unsigned left) {
  Fiber* fiber = running;
  for (Pending *p = fiber->oldest, *next; p; p = next) {
    next = p->newer;
    if (p->kind != Pending::bulk_store || p->group + left >= fiber->bulk_group) continue;
    edge_acquire(&fiber->bulk_group);
    land(p);
  }
}

void land_bulk(Pending* pending) {
  if (!pending->target->live)
    return fault_on_landing(pending->kind == Pending::bulk_load
                                ? "a bulk load lands in the shared memory of a block that has returned"
                                : "a bulk store reads the shared memory of a block that has returned",
                            pending);
  if (pending->kind == Pending::bulk_load) {
    if (pending->box.map.tensor)
      each_element(pending->box, [&](unsigned place, const unsigned char* element) {
        const unsigned bytes = pending->box.map.element_bytes;
        if (element)
          copy_bytes(pending->to + place, element, bytes);
        else
          fill_bytes(pending->to + place, 0, bytes);
      });
    else
      copy_bytes(pending->to, pending->from, pending->bytes);
    landed_bytes(pending, pending->bytes);
  } else {
    each_element(pending->box, [&](unsigned place, unsigned char* element) {
      if (element) copy_bytes(element, pending->from + place, pending->box.map.element_bytes);
    });
  }
}

void fence_proxy_async() { edge_release(&running->in_block->fence_edge); }

}  // namespace fastseq::emulation
