#include "core/isa.h"

#include <atomic>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastseq {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if defined(__x86_64__)
// F16C, MOVBE and LZCNT belong to what the compiler may emit for these sets, but not every compiler's
// __builtin_cpu_supports knows their names.
bool cpuid_extras() {
  unsigned a, b, c, d, extended_c;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  if (!__get_cpuid(0x80000001, &a, &b, &extended_c, &d)) return false;
  return (c >> 29 & 1) && (c >> 22 & 1) && (extended_c >> 5 & 1);
}

// Whether the chip has matrix tiles for bfloat16 and bytes, and the system lets this process use them: it saves 8 KiB of them a
// thread, and so wants to be asked. Once allowed, all threads of the process are.
bool tiles_allowed() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE: xgetbv is there
  unsigned saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kConfigurationAndData = 3u << 17;
  if ((saved & kConfigurationAndData) != kConfigurationAndData) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best() {
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_built(Isa(i)) && isa_supported(Isa(i))) return Isa(i);
  return Isa::baseline;
}

std::atomic<int>& active() {
  static std::atomic<int> isa{int(best())};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

bool isa_built(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return true;
#if defined(FASTSEQ_HAVE_AVX2)
    case Isa::avx2:
      return true;
#endif
#if defined(FASTSEQ_HAVE_AVX512)
    case Isa::avx512:
      return true;
#endif
#if defined(FASTSEQ_HAVE_AVX512_BF16)
    case Isa::avx512_bf16:
      return true;
#endif
#if defined(FASTSEQ_HAVE_AMX_BF16)
    case Isa::amx_bf16:
      return true;
#endif
    default:
      return false;
  }
}

bool isa_supported(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
#if defined(FASTSEQ_TILE_MODEL)
  if (isa == Isa::amx_bf16) return true;  // compiled for any processor
#endif
  // These look at XGETBV too: a register file that the operating system does not save counts as missing.
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && cpuid_extras();
  if (isa == Isa::avx2) return avx2;
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  // A chip with the one has the other; kernels of the set use both.
  bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512_bf16) return avx512_bf16;
  static const bool tiles = avx512_bf16 && tiles_allowed();
  return tiles;
#else
  return false;
#endif
}

Isa active_isa() { return Isa(active().load(std::memory_order_relaxed)); }

bool set_isa(const char* name) {
  if (!std::strcmp(name, "auto")) {
    active().store(int(best()), std::memory_order_relaxed);
    return true;
  }
  for (int i = 0; i < kIsaCount; ++i)
    if (!std::strcmp(name, kNames[i]) && isa_built(Isa(i)) && isa_supported(Isa(i))) {
      active().store(i, std::memory_order_relaxed);
      return true;
    }
  return false;
}

const char* usable_isas() {
  struct List {
    char text[64] = {};
    List() {
      for (int i = 0; i < kIsaCount; ++i)
        if (isa_built(Isa(i)) && isa_supported(Isa(i))) {
          if (i) std::strcat(text, " ");
          std::strcat(text, kNames[i]);
        }
    }
  };
  static const List list;
  return list.text;
}

}  // namespace fastseq
