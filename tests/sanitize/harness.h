// What the sanitizer driver's cases share: exactly sized, poisoned heap arrays, random draws, and the comparison of
// one instruction set's outputs with another's. No Python, no torch.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/simd.h"
#include "core/tiles.h"

namespace driver {

using fastseq::accumulator_of;
using fastseq::bytes_of;
using fastseq::Dtype;
constexpr const char* kDtypeNames[] = {"f64", "f32", "bf16", "f16", "i8"};
inline double epsilon_of(Dtype d) {
  return d == Dtype::f64 ? 0x1p-52 : d == Dtype::f32 ? 0x1p-23 : d == Dtype::bf16 ? 0x1p-7 : 0x1p-10;
}

// n elements on the heap, not a byte more, so that AddressSanitizer sees any access past the end. Filled with ones in
// every bit, which is a NaN in all four types: what a kernel reads without its being written shows in the outputs.
class Array {
 public:
  Array() = default;
  Array(Dtype dtype, int64_t n, size_t alignment = 0) : dtype_(dtype), n_(n) {
    void* raw = nullptr;
    size_t bytes = size_t(n) * bytes_of(dtype);
    if (alignment ? posix_memalign(&raw, alignment, bytes) : !(raw = std::malloc(bytes ? bytes : 1))) std::abort();
    std::memset(raw, 0xff, bytes);
    data_.reset(static_cast<char*>(raw), std::free);
  }

  bool absent() const { return !data_; }
  void* data() const { return data_.get(); }
  Dtype dtype() const { return dtype_; }
  int64_t size() const { return n_; }
  // The same values as double.
  Array widened() const {
    if (absent()) return {};
    Array out(Dtype::f64, n_);
    for (int64_t i = 0; i < n_; ++i) out.set(i, (*this)[i]);
    return out;
  }
  double operator[](int64_t i) const {
    switch (dtype_) {
      case Dtype::f64:
        return fetch<double>(i);
      case Dtype::f32:
        return fetch<float>(i);
      case Dtype::bf16:
        return fastseq::baseline::widen(fetch<fastseq::baseline::bf16>(i));
      case Dtype::i8:
        return fetch<int8_t>(i);
      default:
        return fastseq::baseline::widen(fetch<fastseq::baseline::f16>(i));
    }
  }
  void set(int64_t i, double v) {
    switch (dtype_) {
      case Dtype::f64:
        return put(i, v);
      case Dtype::f32:
        return put(i, float(v));
      case Dtype::bf16:
        return put(i, fastseq::baseline::narrow<fastseq::baseline::bf16>(float(v)));
      case Dtype::i8:
        return put(i, int8_t(std::lround(v)));
      default:
        return put(i, fastseq::baseline::narrow<fastseq::baseline::f16>(float(v)));
    }
  }

 private:
  template <class T>
  T fetch(int64_t i) const {
    T v;
    std::memcpy(&v, data_.get() + i * int64_t(sizeof(T)), sizeof(T));
    return v;
  }
  template <class T>
  void put(int64_t i, T v) {
    std::memcpy(data_.get() + i * int64_t(sizeof(T)), &v, sizeof(T));
  }
  Dtype dtype_ = Dtype::f32;
  int64_t n_ = 0;
  std::shared_ptr<char> data_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545f4914f6cdd1du >> 16;
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return double(bits() & 0xffffffff) / 4294967296.0; }
  double uniform(double scale) { return (2 * uniform() - 1) * scale; }
  int64_t pick(const std::vector<int64_t>& values) { return values[size_t(below(int64_t(values.size())))]; }
  Array array(Dtype dtype, int64_t n, double scale) {
    Array out(dtype, n);
    for (int64_t i = 0; i < n; ++i) out.set(i, uniform(scale));
    return out;
  }

 private:
  uint64_t state_;
};

struct Output {
  std::string name;
  Array values;
  bool minus_infinity = false;  // an allowed value
  std::vector<bool> unspecified = {};
};
using Outputs = std::vector<Output>;

// Everything finite, and no further from what is expected than `tolerance` times the largest value of an output.
inline bool agree(const std::string& what, const Outputs& got, const Outputs& expected, double tolerance) {
  for (size_t k = 0; k < got.size(); ++k) {
    const Array &a = got[k].values, &b = expected[k].values;
    auto skipped = [&](int64_t i) { return !got[k].unspecified.empty() && got[k].unspecified[size_t(i)]; };
    double largest = 1;
    for (int64_t i = 0; i < b.size(); ++i)
      if (!skipped(i) && std::isfinite(b[i])) largest = std::fmax(largest, std::fabs(b[i]));
    for (int64_t i = 0; i < a.size(); ++i) {
      if (skipped(i) || (got[k].minus_infinity && a[i] == -INFINITY && b[i] == -INFINITY)) continue;
      if (std::isfinite(a[i]) && std::fabs(a[i] - b[i]) <= tolerance * largest) continue;
      std::printf("FAILED %s: %s[%ld] of %ld is %.9g, expected %.9g within %.3g\n", what.c_str(), got[k].name.c_str(),
                  long(i), long(a.size()), a[i], b[i], tolerance * largest);
      return false;
    }
  }
  return true;
}

// What is running, for the last words of a program that a sanitizer ends.
inline std::string current = "nothing";

// Runs the problem on each instruction set this machine has, and compares all of them with the same problem in f64 on
// the baseline set, whose kernels are other instances of the templates. Returns the number of failures.
template <class Problem>
int over_isas(const std::string& what, double tolerance, const Problem& problem) {
  fastseq::set_isa("baseline");
  current = what + ", in f64";
  const Outputs expected = problem.widened().run();
  int failures = 0;
  for (int i = 0; i < fastseq::kIsaCount; ++i) {
    if (!fastseq::set_isa(fastseq::isa_name(fastseq::Isa(i)))) continue;
    current = what + " on " + fastseq::isa_name(fastseq::Isa(i));
    failures += !agree(current, problem.run(), expected, tolerance);
#if defined(FASTSEQ_TILE_MODEL)
    if (tile_model::configured != 0) std::printf("FAILED %s: a thread keeps its tiles\n", current.c_str()), ++failures;
#endif
  }
  return failures;
}

// What rounding may change: a sum of `terms` products by about terms * eps of its largest partial sum, and what is stored
// in 16 bits by a rounding of that type; `steps` such errors feed on each other. A factor of 4 for the few sums and
// roundings that stand in a row within a step.
inline double rounding(Dtype dtype, double terms, double steps) {
  double stored = bytes_of(dtype) == 2 ? epsilon_of(dtype) : 0;
  return 4 * steps * (terms * epsilon_of(accumulator_of(dtype)) + stored);
}

// Draws one case from `seed`, runs it, returns the number of failures.
int recurrent_case(uint64_t seed);
int normed_case(uint64_t seed);
int attention_case(uint64_t seed);
int encoder_case(uint64_t seed);

}  // namespace driver
