// Calls one entry of a library of emulated kernels, for runs under a sanitizer: replay LIBRARY ENTRY FILE, where FILE
// has the machine's settings, the arguments and the buffers, as build.py writes them, and gets the buffers back.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

int64_t take(FILE* file) {
  int64_t value;
  if (std::fread(&value, sizeof value, 1, file) != 1) std::abort();
  return value;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  const auto set = reinterpret_cast<void (*)(uint64_t, int, unsigned, int, int, uint64_t)>(
      dlsym(library, "fastseq_emulation_set"));
  const auto entry = reinterpret_cast<const char* (*)(void* const*, const int64_t*, const double*)>(
      dlsym(library, arguments[2]));
  FILE* file = std::fopen(arguments[3], "rb");
  if (!set || !entry || !file) return std::fprintf(stderr, "no such entry or file\n"), 2;

  int64_t machine[6], counts[3];
  for (int64_t& value : machine) value = take(file);
  for (int64_t& value : counts) value = take(file);
  std::vector<int64_t> integers(counts[1] + 1);
  std::vector<double> reals(counts[2] + 1);
  for (int64_t i = 0; i < counts[1]; ++i) integers[i] = take(file);
  for (int64_t i = 0; i < counts[2]; ++i) {
    const int64_t bits = take(file);
    std::memcpy(&reals[i], &bits, sizeof bits);
  }
  std::vector<std::unique_ptr<char, Free>> buffers;
  std::vector<void*> pointers(counts[0] + 1);
  std::vector<size_t> sizes;
  for (int64_t i = 0; i < counts[0]; ++i) {
    const bool there = take(file) != 0;
    sizes.push_back(take(file));
    // Aligned as device allocations are, and no longer than asked for, so that an overrun is seen.
    void* buffer = nullptr;
    if (there && posix_memalign(&buffer, 256, sizes[i] ? sizes[i] : 1)) std::abort();
    if (sizes[i] && std::fread(buffer, 1, sizes[i], file) != sizes[i]) std::abort();
    buffers.emplace_back(static_cast<char*>(buffer));
    pointers[i] = buffer;
  }
  std::fclose(file);

  set(machine[0], static_cast<int>(machine[1]), static_cast<unsigned>(machine[2]), static_cast<int>(machine[3]),
      static_cast<int>(machine[4]), machine[5]);
  if (const char* error = entry(pointers.data(), integers.data(), reals.data()))
    return std::fprintf(stderr, "%s\n", error), 3;

  file = std::fopen(arguments[3], "wb");
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] && std::fwrite(pointers[i], 1, sizes[i], file) != sizes[i]) return 2;
  return std::fclose(file) ? 2 : 0;
}
