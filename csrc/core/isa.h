// Which instruction set the CPU kernels run on.
//
// Each kernel source is compiled once per instruction set into a namespace of that name (simd.h). A kernel family
// declares an entry point for all of them with FASTSEQ_DECLARE and calls the one in force with FASTSEQ_DISPATCH:
//
//   FASTSEQ_DECLARE(void, scan_forward, (const ScanForward& args))   // in recurrent.h, inside namespace fastseq
//   FASTSEQ_DISPATCH(scan_forward, args);                            // in a caller
//
// The build defines FASTSEQ_HAVE_<SET> for each set besides baseline whose objects are linked in; kernels themselves
// are compiled without them and must not dispatch.
#pragma once

namespace fastseq {

enum class Isa : int { baseline, avx2, avx512, avx512_bf16, amx_bf16 };  // each contains those before it
constexpr int kIsaCount = 5;

// The name of a set, as in the enum.
const char* isa_name(Isa isa);
// Whether the kernels of this set are in this library, and whether this processor and operating system run them.
bool isa_built(Isa isa);
bool isa_supported(Isa isa);

// The set in force: the best that is built and supported, unless set_isa named another.
Isa active_isa();
// Forces a set by name from the next call on, in every thread; "auto" goes back to the best. Returns false, and changes
// nothing, for a name that is unknown, not built, or not supported here.
bool set_isa(const char* name);
// The names of the sets that set_isa would accept, separated by spaces, best last. Static storage.
const char* usable_isas();

}  // namespace fastseq

#define FASTSEQ_DECLARE(result, name, arguments) \
  namespace baseline {                           \
  result name arguments;                         \
  }                                              \
  namespace avx2 {                               \
  result name arguments;                         \
  }                                              \
  namespace avx512 {                             \
  result name arguments;                         \
  }                                              \
  namespace avx512_bf16 {                        \
  result name arguments;                         \
  }                                              \
  namespace amx_bf16 {                           \
  result name arguments;                         \
  }

#define FASTSEQ_CASE(isa, name, ...) \
  case ::fastseq::Isa::isa:          \
    return ::fastseq::isa::name(__VA_ARGS__);
#if defined(FASTSEQ_HAVE_AVX2)
#define FASTSEQ_CASE_AVX2(name, ...) FASTSEQ_CASE(avx2, name, __VA_ARGS__)
#else
#define FASTSEQ_CASE_AVX2(name, ...)
#endif
#if defined(FASTSEQ_HAVE_AVX512)
#define FASTSEQ_CASE_AVX512(name, ...) FASTSEQ_CASE(avx512, name, __VA_ARGS__)
#else
#define FASTSEQ_CASE_AVX512(name, ...)
#endif
#if defined(FASTSEQ_HAVE_AVX512_BF16)
#define FASTSEQ_CASE_AVX512_BF16(name, ...) FASTSEQ_CASE(avx512_bf16, name, __VA_ARGS__)
#else
#define FASTSEQ_CASE_AVX512_BF16(name, ...)
#endif
#if defined(FASTSEQ_HAVE_AMX_BF16)
#define FASTSEQ_CASE_AMX_BF16(name, ...) FASTSEQ_CASE(amx_bf16, name, __VA_ARGS__)
#else
#define FASTSEQ_CASE_AMX_BF16(name, ...)
#endif

// An expression: the result of name(...) in the namespace of the set in force.
#define FASTSEQ_DISPATCH(name, ...)                  \
  [&]() -> decltype(auto) {                          \
    switch (::fastseq::active_isa()) {               \
      FASTSEQ_CASE_AVX2(name, __VA_ARGS__)           \
      FASTSEQ_CASE_AVX512(name, __VA_ARGS__)         \
      FASTSEQ_CASE_AVX512_BF16(name, __VA_ARGS__)    \
      FASTSEQ_CASE_AMX_BF16(name, __VA_ARGS__)       \
      default:                                       \
        return ::fastseq::baseline::name(__VA_ARGS__); \
    }                                                \
  }()
