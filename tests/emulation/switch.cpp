// Switching stacks, telling the sanitizers of it, and memory that they watch.
#include "switch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "launch.h"

#if defined(FASTSEQ_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
}
#endif
#if defined(FASTSEQ_ADDRESS_SANITIZER)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
}
#endif

namespace fastseq::emulation {

#if defined(__x86_64__)

// Saves what a function must keep, and its stack pointer at *save; goes on where `load` was saved.
asm(R"(
.text
.type fastseq_switch_stack, @function
fastseq_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastseq_switch_stack, .-fastseq_switch_stack
)");
extern "C" void fastseq_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));

namespace {
void* new_stack(unsigned char* stack, size_t bytes, void (*main)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // main's return address, at which its frame is aligned
  *--top = reinterpret_cast<void*>(main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
void switch_stack(void** save, void* load) { fastseq_switch_stack(save, load); }
}  // namespace

#else

}  // namespace fastseq::emulation
#include <ucontext.h>
namespace fastseq::emulation {
namespace {
// The contexts lie at the fibers' stacks' tops; a stack pointer is the address of one.
ucontext_t outside;
void* new_stack(unsigned char* stack, size_t bytes, void (*main)()) {
  const size_t room = (sizeof(ucontext_t) + 63) / 64 * 64;
  auto* context = reinterpret_cast<ucontext_t*>(stack + bytes - room);
  getcontext(context);
  context->uc_stack = {stack, 0, bytes - room};
  context->uc_stack.ss_size = bytes - room;
  context->uc_link = nullptr;
  makecontext(context, main, 0);
  return context;
}
// A fiber saves into its own context, the scheduler into `outside`: whichever is not being loaded.
ucontext_t* inside = nullptr;
void switch_stack(void** save, void* load) {
  auto* target = load ? static_cast<ucontext_t*>(load) : &outside;
  ucontext_t* own = target == &outside ? inside : &outside;
  if (target != &outside) inside = target;
  *save = own == &outside ? nullptr : own;
  swapcontext(own, target);
}
}  // namespace

#endif

void prepare(Fiber& fiber, unsigned char* stack, size_t bytes, void (*main)()) {
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  fiber.stack_pointer = new_stack(stack, bytes, main);
}

void to_fiber(Context& scheduler, Fiber& fiber) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_switch_to_fiber(fiber.race_fiber, 1);
#endif
#if defined(FASTSEQ_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack, fiber.stack_bytes);
#endif
  switch_stack(&scheduler.stack_pointer, fiber.stack_pointer);
#if defined(FASTSEQ_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void to_scheduler(Context& scheduler, Fiber& fiber) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_switch_to_fiber(scheduler.race_fiber, 1);
#endif
#if defined(FASTSEQ_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(fiber.state == Fiber::done ? nullptr : &fiber.fake_stack, scheduler.stack_bottom,
                                 scheduler.stack_size);
#endif
  switch_stack(&fiber.stack_pointer, scheduler.stack_pointer);
  entered(scheduler, fiber);
}

// A fiber's first step after a switch to it.
void entered([[maybe_unused]] Context& scheduler, [[maybe_unused]] Fiber& fiber) {
#if defined(FASTSEQ_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
}

void race_start([[maybe_unused]] Context& scheduler, [[maybe_unused]] Fiber* fibers, [[maybe_unused]] size_t count) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  scheduler.race_fiber = __tsan_get_current_fiber();
  for (size_t i = 0; i < count; ++i)
    if (fibers[i].stack) fibers[i].race_fiber = __tsan_create_fiber(0);
#endif
}
void race_stop([[maybe_unused]] Fiber* fibers, [[maybe_unused]] size_t count) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  for (size_t i = 0; i < count; ++i)
    if (fibers[i].race_fiber) __tsan_destroy_fiber(fibers[i].race_fiber);
#endif
}

void edge_release([[maybe_unused]] const void* address) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_release(const_cast<void*>(address));
#endif
}
void edge_acquire([[maybe_unused]] const void* address) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_acquire(const_cast<void*>(address));
#endif
}
void race_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_read_range(const_cast<void*>(p), bytes);
#endif
}
void race_write([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_write_range(const_cast<void*>(p), bytes);
#endif
}

// ---- The asynchronous proxy.

#if defined(FASTSEQ_THREAD_SANITIZER)
namespace {
// Runs `act` as another thread of the race detector, after `before` and before `after`.
template <class F, class G, class H>
void as_proxy(void* proxy, const F& before, const G& act, const H& after) {
  void* own = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(proxy, 1);
  before();
  act();
  after();
  __tsan_switch_to_fiber(own, 1);
}
}  // namespace

void proxy_writes(Block& block, void (*write)(void*), void* argument, MbarState& state) {
  edge_release(&block.loads);
  as_proxy(
      block.loads, [&] { edge_acquire(&block.loads); }, [&] { write(argument); },
      [&] { edge_release(state), edge_release(&block.loads_edge); });
}
void proxy_reads(Block& block, void (*read)(void*), void* argument, const void* edge) {
  as_proxy(
      block.reads, [&] { edge_acquire(&block.fence_edge), edge_acquire(&block.loads_edge); }, [&] { read(argument); },
      [&] { edge_release(edge); });
}
// Created before the block runs: a fiber knows all that its creator did before.
void proxy_start(Block& block) {
  block.loads = __tsan_create_fiber(0);
  block.reads = __tsan_create_fiber(0);
}
void proxy_stop(Block& block) {
  __tsan_destroy_fiber(block.loads);
  __tsan_destroy_fiber(block.reads);
}
#else
void proxy_writes(Block&, void (*)(void*), void*, MbarState&) {}
void proxy_reads(Block&, void (*)(void*), void*, const void*) {}
void proxy_start(Block&) {}
void proxy_stop(Block&) {}
#endif

// ---- Shared memory. Mapped anew for every block: the sanitizers forget what they knew of the addresses.

namespace {
constexpr size_t kPage = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in every float type
}  // namespace

void SharedMemory::allocate(size_t size) {
  bytes = size;
  const size_t body = (size + kPage) / kPage * kPage;
  mapped = body + 2 * kPage;
  void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) std::abort();
  pages = static_cast<unsigned char*>(p);
  mprotect(pages, kPage, PROT_NONE);
  mprotect(pages + kPage + body, kPage, PROT_NONE);
  begin = pages + kPage;
  fill_bytes(begin, kPoison, body);
}
bool SharedMemory::overrun() const {
  for (const unsigned char* p = begin + bytes; p < pages + mapped - kPage; ++p)
    if (*p != kPoison) return true;
  return false;
}
SharedMemory::~SharedMemory() {
  if (pages) munmap(pages, mapped);
}

}  // namespace fastseq::emulation
