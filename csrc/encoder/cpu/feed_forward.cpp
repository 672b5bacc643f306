// Each thread takes blocks of rows through both products: what is between them stays in its own cache. The weights are
// packed at each call, once for all threads, so there is no copy of them that could be out of date; a call has rows
// enough to pay for it.
#include "encoder/cpu/feed_forward.h"

#include <atomic>
#include <cmath>

#include "core/math.h"
#include "encoder/cpu/product.h"

namespace fastseq {
namespace FASTSEQ_ISA {
namespace {

using V = Vec<float>;
constexpr int L = kLanes<float>;
constexpr long kChunk = 512;  // columns between the products; also the longest sum of the second in one piece

// x Phi(x). log(2 Phi(-a)) is a polynomial for a from 0 to 6, where gelu(-a) is above -6e-9: 2e-9 from the exact value.
FASTSEQ_INLINE V gelu(V x) {
  const V size = x < 0.0f ? -x : x;
  const V a = size > 6.0f ? V{} + 6.0f : size;
  V p = a * 2.855403238e-7f - 5.621437595e-6f;
  p = p * a + 4.607841400e-5f;
  p = p * a - 1.788986410e-4f;
  p = p * a - 2.161616612e-5f;
  p = p * a + 4.836518317e-3f;
  p = p * a - 3.636266664e-2f;
  p = p * a - 3.183034658e-1f;
  p = p * a - 7.978850603e-1f;
  V power;
  const V e = exp_parts(p * a, power);
  V tail = 0.5f * (power + power * e);
  tail = size > 6.0f ? V{} : tail;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

FASTSEQ_INLINE V activate(V x, Activation activation) {
  return activation == Activation::gelu ? gelu(x) : activation == Activation::relu ? relu(x) : x;
}

FASTSEQ_INLINE int lanes(long at, long n) { return int(n - at < L ? n - at : L); }

// norm(x) of n features, handed to put(at, vector, lanes).
template <class Put>
void normalise(const LayerNorm& norm, const float* x, long n, const Put& put) {
  V sum{}, squares{};
  for (long e = 0; e < n; e += L) sum += load_n(x + e, lanes(e, n));
  const float mean = sum_lanes<float>(sum) / float(n);
  for (long e = 0; e < n; e += L) {
    V v = load_n(x + e, lanes(e, n)) - mean;
    if (lanes(e, n) < L)
      for (int i = lanes(e, n); i < L; ++i) v[i] = 0;
    squares += v * v;
  }
  const float scale = float(1 / std::sqrt(double(sum_lanes<float>(squares)) / double(n) + norm.eps));
  for (long e = 0; e < n; e += L) {
    const int some = lanes(e, n);
    V v = (load_n(x + e, some) - mean) * scale * load_n(norm.weight + e, some);
    if (norm.bias) v += load_n(norm.bias + e, some);
    put(e, v, some);
  }
}

class Call {
 public:
  using Weight = Products::Weight;

  Call(const FeedForward& p, void* workspace) : p_(p) {
    Arena arena{static_cast<char*>(workspace)};
    units_ = (p.rows + Products::kUnit - 1) / Products::kUnit;
    const long most = Products::kBlockRows / Products::kUnit;
    blocks_ = (units_ + most - 1) / most;
    threads_ = p.threads > 0 ? p.threads : 1;  // also where there are fewer units of rows: all of them pack
    blocks_ = (blocks_ + threads_ - 1) / threads_ * threads_;
    first_ = arena.take<Weight>(Products::weights(p.first.in, p.first.out));
    if (p.second.w) second_ = arena.take<Weight>(Products::weights(p.second.in, p.second.out));
    one_ = Products::activations(p.first.in), both_ = one_ + (p.second.w ? Products::activations(kChunk) : 0);
    rows_ = arena.take<Products::Activation>(threads_ * both_);
    bytes = arena.used;
  }

  void run() {
    std::atomic<long> next{0};
    parallel(threads_, [&](const Team& team) {
      pack(p_.first, first_, team);
      if (p_.second.w) pack(p_.second, second_, team);
      team.sync();
      const TilesInUse tiles;
      for (long block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks_;) {
        const Share units = share_of(units_, int(block), int(blocks_));
        const long end = units.end * Products::kUnit;
        rows(units.begin * Products::kUnit, end < p_.rows ? end : p_.rows, rows_ + team.rank * both_);
      }
    });
  }

  size_t bytes;

 private:
  static void pack(const Product& p, Weight* to, const Team& team) {
    const Share mine = share_of(p.out / Products::kColumns, team.rank, team.size);
    for (long panel = mine.begin; panel < mine.end; ++panel) Products::pack(to, p.w, p.in, panel);
  }

  void rows(long first, long last, Products::Activation* x) const {
    const Product &one = p_.first, &two = p_.second;
    const long n = last - first, out = two.w ? two.out : one.out, in = one.in;
    for (long r = 0; r < n; ++r) {
      const float* row = p_.x + (first + r) * in;
      auto put = [&](long e, V v, int some) { Products::put(x, in, r, e, v, some); };
      if (p_.before.weight)
        normalise(p_.before, row, in, put);
      else
        for (long e = 0; e < in; e += L) put(e, load_n(row + e, lanes(e, in)), lanes(e, in));
      for (long e = in; e < Products::padded(in); ++e) put(e, V{}, 1);
    }
    float* const y = p_.y + first * out;
    const float* const residual = p_.residual ? p_.residual + first * out : nullptr;
    auto finish = [&](const float* bias, const float* from, Activation activation) {
      return [=](long r, long e, V sum) {
        if (bias) sum += load(bias + e);
        if (from) sum += load(from + r * out + e);
        store(y + r * out + e, activate(sum, activation));
      };
    };
    if (!two.w)
      Products::multiply({first_, in, 0, in, 0, out}, x, in, 0, n, finish(one.bias, residual, p_.activation));
    Products::Activation* const between = x + one_;
    for (long k = 0; two.w && k < two.in; k += kChunk) {
      const long depth = two.in - k < kChunk ? two.in - k : kChunk;
      Products::multiply({first_, in, 0, in, k, k + depth}, x, in, 0, n, [&](long r, long e, V sum) {
        if (one.bias) sum += load(one.bias + e);
        Products::put(between, kChunk, r, e - k, activate(sum, p_.activation), L);
      });
      const bool starts = k == 0, ends = k + depth == two.in;
      // The bias and the residual last: a large residual would make every rounding before it larger.
      Products::multiply({second_, two.in, k, depth, 0, out}, between, kChunk, 0, n, [&](long r, long e, V sum) {
        float* const to = y + r * out + e;
        if (!starts) sum += load(to);
        if (ends && two.bias) sum += load(two.bias + e);
        if (ends && residual) sum += load(residual + r * out + e);
        store(to, sum);
      });
    }
    for (long r = 0; p_.after.weight && r < n; ++r) {
      float* const row = y + r * out;
      normalise(p_.after, row, out, [&](long e, V v, int some) { store_n(row + e, v, some); });
    }
  }

  const FeedForward& p_;
  int threads_;
  long units_, blocks_, one_, both_;
  Weight *first_, *second_ = nullptr;
  Products::Activation* rows_;  // of each thread, for both products
};

}  // namespace

size_t feed_forward_workspace(const FeedForward& p) { return Call(p, nullptr).bytes; }

void feed_forward(const FeedForward& p) { Call(p, p.workspace).run(); }

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
