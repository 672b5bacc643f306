// From products q·k to scores: scale, softcap, bias, ALiBi, and what may not be seen.
#pragma once
#include "attention/cpu/mask.h"

namespace fastseq::FASTSEQ_ISA::attention {

// Reads an element of a bias or a sink, whose type is that of q (S) or float.
template <class S>
FASTSEQ_INLINE Accumulator<S> read_number(const void* data, bool is_float, long i) {
  if (is_float) return Accumulator<S>(static_cast<const float*>(data)[i]);
  return widen(static_cast<const S*>(data)[i]);
}
template <class S>
FASTSEQ_INLINE void write_number(void* data, bool is_float, long i, Accumulator<S> value) {
  if (is_float)
    static_cast<float*>(data)[i] = float(value);
  else
    static_cast<S*>(data)[i] = narrow<S>(value);
}

// ALiBi's slope of a head, 0 where there are none.
template <class S>
FASTSEQ_INLINE Accumulator<S> slope_of(const AttentionCall& call, long h) {
  if (!call.alibi) return 0;
  return read_number<Accumulator<S>>(call.alibi, call.alibi_dtype == Dtype::f32, h);
}

// 2^(score * factor - top * factor) is one instruction and exp2, but the rounding of top * factor comes into it. From
// this exponent on that is no longer small, and may overflow, as it does where a mask's "hidden" is the least finite
// number and a query sees nothing else: then the difference of scores is taken first.
template <class A>
constexpr A kFar = A(int64_t(1) << (BitsOf<A>::mantissa - 3));

// A block of transposed scores: `keys` rows from key j0 on, 64 queries from i0 on, `vectors` of lanes in use.
template <class A>
struct Block {
  A* scores;              // [keys][64]
  const uint64_t* words;  // [keys]; null: all are seen
  long keys;
  int vectors;
};

// How one call turns q·k into the exponent of 2. Where nothing but a positive scale is asked for (`plain`) the block
// keeps the bare products and `factor` holds scale * log2 e; else the block holds finished scores. `unit` is what a score
// of the block is in exponents of e.
template <class S>
class Scoring {
 public:
  using A = Accumulator<S>;
  static constexpr int L = kLanes<A>;

  explicit Scoring(const AttentionCall& call)
      : plain(call.softcap == 0 && !call.bias.data && !call.alibi && call.scale > 0),
        unit(A(plain ? call.scale : 1)), factor(A(plain ? call.scale * kLog2e : kLog2e)), call_(call),
        bias_is_float_(call.bias_dtype == Dtype::f32) {}

  const bool plain;
  const A unit, factor;

  // Bias elements a block needs beside it, transposed; 0 without a bias.
  long scratch(long keys) const { return call_.bias.data ? keys * kQueries : 0; }

  // Finishes a block: hides what is not seen (-inf), applies all but the plain scale, and leaves in max [64] the
  // greatest score of each query (where max is given), in slope (where given) the derivative of the softcap.
  void finish(const Block<A>& x, const Sequence& s, long b, long h, long i0, int count, long j0, A* bias, A* max,
              A* slope) const {
    if (plain)
      run<true>(x, s, h, i0, j0, nullptr, max, nullptr);
    else {
      if (call_.bias.data) read_bias(b, h, i0, count, j0, x.keys, bias);
      run<false>(x, s, h, i0, j0, call_.bias.data ? bias : nullptr, max, slope);
    }
  }

 private:
  void read_bias(long b, long h, long i0, int count, long j0, long keys, A* out) const {
    const Pairs& p = call_.bias;
    const long start = b * p.batch + h * p.head + i0 * p.row + j0 * p.step;
    for (long j = 0; j < keys; ++j)
      for (int i = count; i < round_up(count, L); ++i) out[j * kQueries + i] = 0;
    for (int i = 0; i < count; ++i)
      for (long j = 0; j < keys; ++j)
        out[j * kQueries + i] = read_number<S>(p.data, bias_is_float_, start + i * p.row + j * p.step);
  }

  template <bool kPlain>
  void run(const Block<A>& x, const Sequence& s, long h, long i0, long j0, const A* bias, A* max, A* slope) const {
    const Vec<A> hidden = splat<A>(A(-kInfinity));
    const A scale = A(call_.scale), cap = A(call_.softcap), inverse_cap = cap != 0 ? 1 / cap : 0;
    const A alibi = slope_of<S>(call_, h);
    for (int v = 0; v < x.vectors; ++v) {
      Vec<A> top = hidden;
      const Vec<A> place = lane_numbers<A>() + A(i0 + v * L + s.shift);
      for (long j = 0; j < x.keys; ++j) {
        const uint64_t bits = x.words ? x.words[j] >> (v * L) & kLaneBits<A> : kLaneBits<A>;
        if (bits == 0) continue;
        A* p = x.scores + j * kQueries + v * L;
        Vec<A> score = load(p);
        if constexpr (!kPlain) {
          score *= scale;
          if (cap != 0) {
            const Vec<A> t = tanh<A>(score * inverse_cap);
            score = t * cap;
            if (slope) store(slope + (p - x.scores), 1 - t * t);
          }
          if (bias) {
            const Vec<A> add = load(bias + j * kQueries + v * L);
            score = add == A(-kInfinity) ? hidden : score + add;
          }
          if (alibi != 0) score -= magnitude<A>(place - A(j0 + j)) * alibi;
        }
        score = select<A>(bits, score, hidden);
        top = maximum<A>(score, top);
        store(p, score);
      }
      if (max) store(max + v * L, top);
    }
  }

  const AttentionCall& call_;
  const bool bias_is_float_;
};

}  // namespace fastseq::FASTSEQ_ISA::attention
