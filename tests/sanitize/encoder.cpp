// Random calls of what a transformer's layer does to each row: norms, one or two products, activations, 1 to 3 threads.
#include "encoder/cpu/feed_forward.h"

#include "harness.h"

namespace driver {
namespace {

using fastseq::Activation;
using fastseq::FeedForward;

struct Problem {
  int64_t rows, in, width, out;  // width 0: a single product
  int threads;
  Activation activation;
  bool is_widened = false;
  Array x, residual, before, before_bias, after, after_bias, w1, b1, w2, b2;

  explicit Problem(Random& random) {
    rows = random.pick({1, 2, 13, 14, 15, 31, 33, 64, 130, 180});
    in = random.pick({1, 5, 16, 31, 32, 33, 64, 100});
    out = random.pick({32, 64, 96});
    width = random.chance(0.6) ? random.pick({32, 64, 512, 544}) : 0;
    threads = int(1 + random.below(3));
    activation = Activation(random.below(3));
    auto maybe = [&](int64_t n) { return random.chance(0.6) ? random.array(Dtype::f32, n, 1) : Array(); };
    x = random.array(Dtype::f32, rows * in, 2);
    residual = maybe(rows * out);
    if (in > 4 && random.chance(0.4)) before = random.array(Dtype::f32, in, 1), before_bias = maybe(in);
    if (random.chance(0.4)) after = random.array(Dtype::f32, out, 1), after_bias = maybe(out);
    const int64_t first = width ? width : out;
    w1 = random.array(Dtype::f32, first * in, 0.5), b1 = maybe(first);
    if (width) w2 = random.array(Dtype::f32, out * width, 0.1), b2 = maybe(out);
  }

  std::string describe(uint64_t seed) const {
    char text[160];
    std::snprintf(text, sizeof text, "encoder %llu: rows %ld in %ld width %ld out %ld threads %d activation %d",
                  (unsigned long long)seed, long(rows), long(in), long(width), long(out), threads, int(activation));
    return text;
  }
  Problem widened() const {
    Problem copy = *this;
    copy.is_widened = true;
    return copy;
  }

  Outputs run() const { return {{"y", is_widened ? plainly() : by_kernel()}}; }

 private:
  static const float* data(const Array& a) { return static_cast<const float*>(a.data()); }

  Array by_kernel() const {
    Array y(Dtype::f32, rows * out);
    const int64_t first = width ? width : out;
    FeedForward p{rows, threads, data(x), data(residual), {data(before), data(before_bias), 1e-5},
                  {data(after), data(after_bias), 1e-5}, {data(w1), data(b1), in, first},
                  {data(w2), data(b2), width, width ? out : 0}, activation, static_cast<float*>(y.data()), nullptr};
    Array workspace(Dtype::f32, int64_t(FASTSEQ_DISPATCH(feed_forward_workspace, p) / 4), 64);
    p.workspace = workspace.data();
    FASTSEQ_DISPATCH(feed_forward, p);
    return y;
  }

  static void normalise(const Array& weight, const Array& bias, std::vector<double>& v) {
    if (weight.absent()) return;
    double mean = 0, variance = 0;
    for (double e : v) mean += e / double(v.size());
    for (double e : v) variance += (e - mean) * (e - mean) / double(v.size());
    for (size_t i = 0; i < v.size(); ++i)
      v[i] = (v[i] - mean) / std::sqrt(variance + 1e-5) * weight[int64_t(i)] + (bias.absent() ? 0 : bias[int64_t(i)]);
  }
  static std::vector<double> times(const Array& w, const Array& bias, const std::vector<double>& v, int64_t n) {
    std::vector<double> y;
    for (int64_t i = 0; i < n; ++i) {
      double sum = bias.absent() ? 0 : bias[i];
      for (size_t k = 0; k < v.size(); ++k) sum += w[i * int64_t(v.size()) + int64_t(k)] * v[k];
      y.push_back(sum);
    }
    return y;
  }
  double act(double v) const {
    if (activation == Activation::relu) return v < 0 ? 0 : v;
    return activation == Activation::gelu ? v * 0.5 * std::erfc(-v * std::sqrt(0.5)) : v;
  }
  Array plainly() const {
    Array y(Dtype::f64, rows * out);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> v;
      for (int64_t e = 0; e < in; ++e) v.push_back(x[r * in + e]);
      normalise(before, before_bias, v);
      v = times(w1, b1, v, width ? width : out);
      // Without a second product the activation is the last, the residual's too.
      if (width) {
        for (double& e : v) e = act(e);
        v = times(w2, b2, v, out);
      }
      for (int64_t i = 0; i < out; ++i) {
        v[size_t(i)] += residual.absent() ? 0 : residual[r * out + i];
        if (!width) v[size_t(i)] = act(v[size_t(i)]);
      }
      normalise(after, after_bias, v);
      for (int64_t i = 0; i < out; ++i) y.set(r * out + i, v[size_t(i)]);
    }
    return y;
  }
};

}  // namespace

int encoder_case(uint64_t seed) {
  Random random(seed + 2000000);
  Problem problem(random);
  return over_isas(problem.describe(seed), rounding(Dtype::f32, double(problem.in + problem.width), 8), problem);
}

}  // namespace driver
