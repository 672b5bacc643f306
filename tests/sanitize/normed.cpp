// Random calls of the recurrence with layer normalisation, forward and backward: odd shapes, lengths, resets, masks,
// strides, 1 to 4 threads.
#include "recurrent/cpu/normed.h"

#include "harness.h"

namespace driver {
namespace {

using fastseq::Cell;
using fastseq::NormedBackward;
using fastseq::NormedForward;
using fastseq::NormedSizes;
using fastseq::ScanView;

ScanView steps(const Array& a, int64_t B, int64_t e) { return a.absent() ? ScanView{} : ScanView{a.data(), B * e, e, 1}; }
ScanView rows(const Array& a, int64_t n, int64_t e, bool transposed = false) {
  if (a.absent()) return {};
  return transposed ? ScanView{a.data(), 0, 1, n} : ScanView{a.data(), 0, e, 1};
}

struct Problem {
  Cell cell;
  Dtype dtype;
  int64_t T, B, H, G;
  bool joint, reverse, deterministic, transposed, save;
  int threads;
  Array gx, w_hh, gain, shift, gain_c, shift_c, h0, c0, mask, dy, dh_n, dc_n, dstates;
  Array kinked_y;  // as in recurrent.cpp
  std::vector<int64_t> lengths;
  std::shared_ptr<bool[]> reset;

  bool lstm() const { return fastseq::has_c(cell); }
  Dtype accumulator() const { return accumulator_of(dtype); }

  explicit Problem(Random& random) {
    do cell = Cell(random.below(fastseq::kCellCount));
    while (cell == Cell::gru_reset_before);
    joint = cell == Cell::gru && random.chance(0.5);
    dtype = Dtype(random.below(4));
    T = random.pick({1, 1, 2, 3, 5});
    B = random.pick({1, 1, 2, 3, 6, 7, 9, 17, 33});
    H = random.pick({7, 8, 15, 16, 17, 31, 33, 48, 65, 129});
    threads = int(1 + random.below(3));
    if (random.chance(0.4)) {  // work enough for the threads to share the units of one step
      T = random.pick({2, 3});
      B = random.pick({1, 1, 2, 3});
      H = random.pick({129, 177, 257});
      threads = int(2 + random.below(3));
    }
    G = fastseq::gates_of(cell);
    reverse = random.chance(0.4), deterministic = random.chance(0.3), transposed = random.chance(0.15);
    save = random.chance(0.8);
    gx = random.array(dtype, T * B * G * H, 1);
    w_hh = random.array(dtype, G * H * H, 1);  // of a variance that leaves rounding small beside it
    gain = random.array(dtype, G * H, 1);
    if (random.chance(0.7)) shift = random.array(dtype, G * H, 1);
    h0 = random.array(dtype, B * H, 1);
    if (lstm()) gain_c = random.array(dtype, H, 1), shift_c = random.array(dtype, H, 1), c0 = random.array(dtype, B * H, 2);
    if (random.chance(0.8)) dy = random.array(dtype, T * B * H, 1);
    if (random.chance(0.7)) dh_n = random.array(dtype, B * H, 1);
    if (lstm() && random.chance(0.7)) dc_n = random.array(dtype, B * H, 1);
    if (lstm() && random.chance(0.3)) dstates = random.array(accumulator(), T * B * H, 1);
    if (cell == Cell::rnn_relu) kinked_y = random.array(dtype, T * B * H, 1);
    if (random.chance(0.4))
      for (int64_t b = 0; b < B; ++b) lengths.push_back(random.below(T + 1));
    if (random.chance(0.3)) {
      reset.reset(new bool[size_t(T * B)]);
      for (int64_t i = 0; i < T * B; ++i) reset[size_t(i)] = random.chance(0.2);
    }
    if (random.chance(0.3)) {
      mask = Array(dtype, B * H);
      for (int64_t i = 0; i < B * H; ++i) mask.set(i, random.chance(0.5) ? 1.5 : 0);
    }
  }

  std::string describe(uint64_t seed) const {
    char text[200];
    std::snprintf(text, sizeof text, "normed seed %lu: %s%s of %s T%ld B%ld H%ld threads %d%s%s%s%s%s", (unsigned long)seed,
                  joint ? "joint " : "", fastseq::kCells[int(cell)].name, kDtypeNames[int(dtype)], long(T), long(B), long(H),
                  threads, reverse ? " reverse" : "", lengths.empty() ? "" : " lengths", reset ? " reset" : "",
                  mask.absent() ? "" : " mask", transposed ? " transposed" : "");
    return text;
  }
  Problem widened() const {
    Problem out = *this;
    out.dtype = Dtype::f64;
    for (Array* a : {&out.gx, &out.w_hh, &out.gain, &out.shift, &out.gain_c, &out.shift_c, &out.h0, &out.c0, &out.mask,
                     &out.dy, &out.dh_n, &out.dc_n, &out.dstates, &out.kinked_y})
      *a = a->widened();
    return out;
  }

  void fill(NormedSizes& p) const {
    p.cell = cell, p.dtype = dtype, p.joint = joint;
    p.T = T, p.B = B, p.I = 0, p.H = p.P = H;
    p.reverse = reverse, p.threads = threads, p.deterministic = deterministic;
    p.lengths = lengths.empty() ? nullptr : lengths.data();
    p.reset = reset.get(), p.reset_t = B, p.reset_b = 1;
    p.mask = rows(mask, B, H);
  }
  template <class P>
  void parameters(P& p) const {
    p.w_hh = rows(w_hh, G * H, H, transposed);
    p.gain = rows(gain, 1, G * H), p.shift = rows(shift, 1, G * H);
    p.gain_c = rows(gain_c, 1, H), p.shift_c = rows(shift_c, 1, H);
    p.h0 = rows(h0, B, H), p.c0 = rows(c0, B, H);
  }

  Outputs run() const {
    const int64_t tape_width = fastseq::normed_tape_of(cell) * H, stats_width = fastseq::normed_stats_of(cell);
    Array y(dtype, T * B * H), h_n(dtype, B * H), c_n, states, tape, stats;
    if (lstm()) c_n = Array(dtype, B * H);
    if (save) tape = Array(dtype, T * B * tape_width), stats = Array(accumulator(), T * B * stats_width);
    if (save && lstm()) states = Array(accumulator(), T * B * H);
    NormedForward p{};
    fill(p);
    parameters(p);
    p.gx = steps(gx, B, G * H);
    p.y = steps(y, B, H), p.h_n = rows(h_n, B, H), p.c_n = rows(c_n, B, H);
    p.states = steps(states, B, H), p.tape = steps(tape, B, tape_width), p.stats = steps(stats, B, stats_width);
    Array space(Dtype::bf16, int64_t(FASTSEQ_DISPATCH(normed_forward_workspace, p) + 1) / 2, 64);
    p.workspace = space.data();
    FASTSEQ_DISPATCH(normed_forward, p);
    Outputs out = {{"y", y}, {"h_n", h_n}};
    if (lstm()) out.push_back({"c_n", c_n});
    if (!save) return out;
    out.insert(out.end(), {{"tape", tape}, {"stats", stats}});

    Array dgx, dproduct(dtype, T * B * G * H), dgain(dtype, G * H), dshift, dgain_c, dshift_c, dh0(dtype, B * H), dc0;
    if (!joint) dgx = Array(dtype, T * B * G * H);
    if (!shift.absent()) dshift = Array(dtype, G * H);
    if (lstm()) dgain_c = Array(dtype, H), dshift_c = Array(dtype, H), dc0 = Array(dtype, B * H);
    NormedBackward q{};
    fill(q);
    parameters(q);
    q.dy = steps(dy, B, H), q.dh_n = rows(dh_n, B, H), q.dc_n = rows(dc_n, B, H), q.dstates = steps(dstates, B, H);
    q.y = kinked_y.absent() ? p.y : steps(kinked_y, B, H);
    q.states = p.states, q.tape = p.tape, q.stats = p.stats;
    q.dgx = steps(dgx, B, G * H), q.dproduct = steps(dproduct, B, G * H);
    q.dgain = rows(dgain, 1, G * H), q.dshift = rows(dshift, 1, G * H);
    q.dgain_c = rows(dgain_c, 1, H), q.dshift_c = rows(dshift_c, 1, H);
    q.dh0 = rows(dh0, B, H), q.dc0 = rows(dc0, B, H);
    Array back_space(Dtype::bf16, int64_t(FASTSEQ_DISPATCH(normed_backward_workspace, q) + 1) / 2, 64);
    q.workspace = back_space.data();
    FASTSEQ_DISPATCH(normed_backward, q);
    out.insert(out.end(), {{"dproduct", dproduct}, {"dgain", dgain}, {"dh0", dh0}});
    if (!joint) out.push_back({"dgx", dgx});
    if (!shift.absent()) out.push_back({"dshift", dshift});
    if (lstm()) out.insert(out.end(), {{"dgain_c", dgain_c}, {"dshift_c", dshift_c}, {"dc0", dc0}});
    return out;
  }
};

}  // namespace

int normed_case(uint64_t seed) {
  Random random(seed);
  Problem problem(random);
  // A normalisation may multiply what was rounded before it, here by a few.
  const double tolerance = 4 * rounding(problem.dtype, double(problem.G * problem.H + problem.T * problem.B), double(problem.T));
  return over_isas(problem.describe(seed), tolerance, problem);
}

}  // namespace driver
