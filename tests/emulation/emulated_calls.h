// What emulated.h calls: the primitives that need the machine.
#pragma once
#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace fastseq::emulation {

extern Fiber* running;
inline const Thread& me() { return *running; }

int resident_clusters(const Launch& shape);
int blocks_per_multiprocessor(const Launch& shape);

float from_half(uint16_t bits);
uint16_t to_half(float x);
inline uint16_t to_bfloat(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void sync_block(Where where);
void sync_warp(uint32_t mask, Where where);
void named_bar(unsigned id, unsigned count, bool waits, Where where);
uint64_t shuffle(uint64_t v, unsigned from, uint32_t lanes, Where where);
uint32_t ballot(bool predicate, uint32_t lanes, Where where);

enum class Operand { bf16, fp16, tf32 };
void ldmatrix(uint32_t* r, unsigned count, bool transposed, const void* row, Where where);
void mma(float* c, const uint32_t* a, const uint32_t* b, Operand operand, Where where);

void cp_async(void* shared, const void* global, unsigned bytes, unsigned valid, Where where);
void cp_commit();
void cp_wait(unsigned left);

void stored(Where where);
void loaded(const void* p, unsigned v, bool acquires, Where where);
bool fenced();
const void* fence();  // each place to acquire from, then null

void cluster_arrive(bool releases, Where where);
void cluster_wait(Where where);
void st_cluster(void* p, unsigned rank, const void* v, unsigned bytes, Where where);
void ld_cluster(const void* p, unsigned rank, void* v, unsigned bytes, Where where);
void st_async(void* p, unsigned rank, const void* v, unsigned bytes, Mbar* bar, Where where);

void mbar_init(Mbar* bar, unsigned count, Where where);
void fence_mbar_init();
void mbar_arrive(Mbar* bar, unsigned arrivals, unsigned bytes, Where where);
void mbar_arrive_remote(Mbar* bar, unsigned rank, Where where);
void tma_load(void* shared, const TensorMap& map, Mbar* bar, unsigned rank, int x, int y, int z, int w, Where where);
void tma_load_1d(void* shared, const void* global, Mbar* bar, unsigned bytes, Where where);
void tma_store(const TensorMap& map, const void* shared, unsigned rank, int x, int y, int z, int w, Where where);
void tma_commit();
void tma_store_wait(unsigned left);
void fence_proxy_async();

uint64_t wg_desc(const void* tile, unsigned lead, unsigned stride, unsigned swizzle, Where where);
void wgmma(float* c, unsigned count, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool a_transposed,
           bool b_transposed, bool accumulate, bool half, Where where);
void wg_fence();
void wg_commit(Where where);
void wg_wait(unsigned left, Where where);

bool mbar_wait(Mbar* bar, unsigned parity, bool from_cluster, bool blocks, Where where);

}  // namespace fastseq::emulation
