// Checks of single primitives, which run on the emulated machine and, by a program of their own, on a GPU:
//   nvcc -std=c++17 -I. -arch=sm_90a tests/emulation/check_*.cu -o check && ./check
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "primitives/primitives.cuh"

namespace fastseq::cuda {

// Memory that a kernel reads and writes: device memory, or the host's where the kernel runs there.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, T value = T{}) : Buffer(std::vector<T>(count, value)) {}
  explicit Buffer(std::vector<T> values) : host(std::move(values)) {
#if !defined(FASTSEQ_EMULATION)
    cudaMalloc(&device, host.size() * sizeof(T));
    cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
#endif
  }
  Buffer(const Buffer&) = delete;
#if defined(FASTSEQ_EMULATION)
  T* data() { return host.data(); }
  const std::vector<T>& values() { return host; }
#else
  ~Buffer() { cudaFree(device); }
  T* data() { return device; }
  const std::vector<T>& values() {
    cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost);
    return host;
  }

 private:
  T* device = nullptr;
#endif
  std::vector<T> host;
};

// A check returns nullptr or what was wrong. `oldest` is the compute capability that it needs, as 80.
struct Check {
  const char* name;
  int oldest;
  const char* (*run)();
};
inline std::vector<Check>& checks() {
  static std::vector<Check> all;
  return all;
}
struct Register {
  Register(const char* name, int oldest, const char* (*run)()) { checks().push_back({name, oldest, run}); }
};
#define FASTSEQ_CHECK(name, oldest)                                            \
  static const char* check_##name();                                           \
  static fastseq::cuda::Register register_##name(#name, oldest, check_##name); \
  static const char* check_##name()

inline Launch shape_of(unsigned blocks, unsigned threads, size_t shared = 0, unsigned cluster = 1) {
  Launch shape;
  shape.grid.x = blocks;
  shape.threads = threads;
  shape.shared = shared;
  shape.cluster = cluster;
  return shape;
}

inline const char* complain(const std::string& text) {
  static std::string kept;
  kept = text;
  return kept.c_str();
}

// Launches, waits, and compares what the kernel wrote with what was expected, to a relative tolerance.
template <class... P, class... A>
const char* finish(void (*kernel)(P...), const Launch& shape, A... arguments) {
  if (const char* error = launch(kernel, shape, nullptr, arguments...)) return error;
#if !defined(FASTSEQ_EMULATION)
  if (const char* error = error_text(cudaDeviceSynchronize())) return error;
#endif
  return nullptr;
}
template <class T>
const char* compare(Buffer<T>& got, const std::vector<T>& expected, double tolerance = 0) {
  const std::vector<T>& values = got.values();
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = static_cast<double>(values[i]), b = static_cast<double>(expected[i]);
    if (!(std::fabs(a - b) <= tolerance * std::fmax(1.0, std::fabs(b))))
      return complain("element " + std::to_string(i) + " is " + std::to_string(a) + ", not " + std::to_string(b));
  }
  return nullptr;
}

// Small numbers that differ from place to place, exact in every format.
inline float sample(unsigned i, unsigned j) { return static_cast<float>((i * 7 + j * 13 + i * j) % 15) - 7.f; }

}  // namespace fastseq::cuda
