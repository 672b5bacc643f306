#include "kept_memory.h"

#include <cstdlib>
#include <iterator>
#include <list>
#include <mutex>
#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

namespace fastseq {
namespace {

constexpr size_t kLeast = size_t(64) << 10;  // below it the C library itself keeps what was freed
constexpr size_t kMost = size_t(64) << 20;   // of all that lies idle
constexpr size_t kHugePage = size_t(2) << 20;

// torch's, since 2.11: a tensor over memory that is given back by `deleter`.
using FromBlob = AOTITorchError (*)(void* data, int64_t rank, const int64_t* sizes, const int64_t* strides, int64_t offset,
                                    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* made,
                                    int32_t layout, const uint8_t* metadata, int64_t metadata_size,
                                    void (*deleter)(void* data, void* context), void* context);

FromBlob find_from_blob() {
#if defined(__linux__)
  if (void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD))
    return reinterpret_cast<FromBlob>(dlsym(library, "torch_from_blob"));
#endif
  return nullptr;
}

// Idle blocks, the one freed last in front. Whoever finds the lock taken goes without: in a process that was forked while
// another thread held it, it stays taken.
class Idle {
 public:
  // A block of at least so many bytes and not far above; null: none is idle.
  void* take(size_t bytes, size_t& capacity) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 && (best == blocks_.end() || block->bytes < best->bytes))
        best = block;
    if (best == blocks_.end()) return nullptr;
    void* const data = best->data;
    capacity = best->bytes;
    total_ -= capacity;
    blocks_.erase(best);
    return data;
  }
  void give(void* data, size_t bytes) {
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock && bytes <= kMost) {
        blocks_.push_front({data, bytes});
        for (total_ += bytes; total_ > kMost; blocks_.pop_back()) {
          total_ -= blocks_.back().bytes;
          std::free(blocks_.back().data);
        }
        return;
      }
    }
    std::free(data);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::list<Block> blocks_;
  size_t total_ = 0;
};

Idle& idle() {
  static Idle& blocks = *new Idle;  // tensors may be freed after everything else
  return blocks;
}

}  // namespace

void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (uintptr_t(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (uintptr_t(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

AtenTensorHandle kept_tensor(const int64_t* sizes, const int64_t* strides, int64_t rank, int32_t dtype, size_t bytes) {
  static const FromBlob from_blob = find_from_blob();
  if (!from_blob || bytes < kLeast || bytes > kMost) return nullptr;
  size_t capacity = bytes;
  void* data = idle().take(bytes, capacity);
  if (!data) {
    capacity = (bytes + 4095) / 4096 * 4096;
    data = std::aligned_alloc(64, capacity);
    if (!data) return nullptr;
    ask_for_huge_pages(data, capacity);
  }
  AtenTensorHandle made;
  // The context of the deleter is the number of bytes itself.
  const AOTITorchError failed = from_blob(
      data, rank, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(), nullptr,
      0, [](void* block, void* size) { idle().give(block, reinterpret_cast<uintptr_t>(size)); },
      reinterpret_cast<void*>(capacity));
  if (failed == AOTI_TORCH_SUCCESS) return made;
  idle().give(data, capacity);
  return nullptr;
}

}  // namespace fastseq
