// The list of work under way.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "runtime.h"

namespace fastseq::emulation {

namespace {

// A vector that never asks malloc, which ThreadSanitizer would follow from fibers.
template <class T>
struct Raw {
  T* items = nullptr;
  size_t count = 0, room = 0;

  static T* pages(size_t n) {
    return reinterpret_cast<T*>(syscall(SYS_mmap, nullptr, n * sizeof(T), PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  void push_back(T item) {
    if (count == room) {
      T* more = pages(room ? 2 * room : 4096);
      for (size_t i = 0; i < count; ++i) more[i] = items[i];
      if (items) syscall(SYS_munmap, items, room * sizeof(T));
      items = more;
      room = room ? 2 * room : 4096;
    }
    items[count++] = item;
  }
  T& back() { return items[count - 1]; }
  void pop_back() { --count; }
  bool empty() const { return count == 0; }
  T& operator[](size_t i) { return items[i]; }
};

Raw<Pending*> list, spare;

}  // namespace

Pending* issue(Pending::Kind kind, Block* target, Where where) {
  if (spare.empty()) {
    constexpr size_t kMore = 1024;
    Pending* more = Raw<Pending>::pages(kMore);
    for (size_t i = 0; i < kMore; ++i) spare.push_back(&more[i]);
  }
  Pending* pending = spare.back();
  spare.pop_back();
  Fiber* owner = running;
  *pending = Pending{};
  pending->kind = kind;
  pending->owner = owner;
  pending->target = target;
  pending->where = where;
  pending->group = owner->group;
  pending->index = static_cast<unsigned>(list.count);
  pending->older = owner->newest;
  (owner->newest ? owner->newest->newer : owner->oldest) = pending;
  owner->newest = pending;
  list.push_back(pending);
  return pending;
}

void take_off(Pending* pending) {
  list[pending->index] = list.back();
  list[pending->index]->index = pending->index;
  list.pop_back();
  Fiber* owner = pending->owner;
  (pending->older ? pending->older->newer : owner->oldest) = pending->newer;
  (pending->newer ? pending->newer->older : owner->newest) = pending->older;
  spare.push_back(pending);
}

void land_all(Fiber* owner, bool (*wanted)(const Pending*, unsigned), unsigned argument) {
  for (Pending *p = owner->oldest, *next; p; p = next) {
    next = p->newer;
    if (wanted(p, argument)) land(p);
  }
}

unsigned under_way() { return static_cast<unsigned>(list.count); }
void land_one(unsigned i) { land(list[i]); }
void forget_all() {
  for (; !list.empty(); list.pop_back()) spare.push_back(list.back());
}

}  // namespace fastseq::emulation
