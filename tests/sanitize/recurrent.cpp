// Random calls of the recurrent scan, forward and backward: odd shapes, lengths, resets, masks, zoneout, strides, 1 to 4
// threads.
#include "recurrent/cpu/recurrent.h"

#include "harness.h"

namespace driver {
namespace {

using fastseq::Cell;
using fastseq::ScanBackward;
using fastseq::ScanForward;
using fastseq::ScanProducts;
using fastseq::ScanSizes;
using fastseq::ScanView;

// [n, m, e] without gaps; with `swapped`, laid out as [m, n, e].
ScanView view(const Array& a, int64_t n, int64_t m, int64_t e, bool swapped = false) {
  if (a.absent()) return {};
  return swapped ? ScanView{a.data(), e, n * e, 1} : ScanView{a.data(), m * e, e, 1};
}
// A matrix or a vector; with `transposed` its storage is column-major.
ScanView rows(const Array& a, int64_t n, int64_t e, bool transposed = false) {
  if (a.absent()) return {};
  return transposed ? ScanView{a.data(), 0, 1, n} : ScanView{a.data(), 0, e, 1};
}

struct Problem {
  Cell cell;
  Dtype dtype, weights;  // weights: of the matrices
  int64_t T, B, I, H, P, G, tape;
  bool narrow = false;      // products multiply the type of the weights
  bool reverse, deterministic, batch_first, transposed, save, states;
  int threads;
  Array x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, mask, reset_h, reset_c, keep_h, keep_c, dy, dh_n, dc_n, dstates;
  Array kinked_y;  // the walk back of rnn_relu takes this y: in its own, rounding decides on which side of 0 some are
  std::vector<int64_t> lengths;
  std::shared_ptr<bool[]> reset;
  std::vector<int64_t> read, write;  // rows of a block of states, or none

  bool lstm() const { return fastseq::has_c(cell); }
  Dtype accumulator() const { return accumulator_of(dtype); }

  explicit Problem(Random& random) {
    cell = Cell(random.below(fastseq::kCellCount));
    dtype = Dtype(random.below(4));
    T = random.pick({1, 1, 2, 3, 7, 17});
    B = random.pick({1, 1, 2, 3, 6, 7, 9, 17, 33});
    I = random.pick({1, 3, 7, 16, 17, 33, 40, 65});
    H = random.pick({1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 65, 129});
    threads = int(1 + random.below(3));
    // Work enough for the threads to share the units of one step: few rows, many units.
    if (random.chance(0.4)) {
      T = random.pick({2, 3, 7});
      B = random.pick({1, 1, 2, 3, 4});
      I = random.pick({17, 65, 129});
      H = random.pick({65, 129, 177, 257});
      threads = int(2 + random.below(3));
    }
    bool projected = lstm() && random.chance(0.4);
    P = projected ? 1 + random.below(H) : H;
    G = fastseq::gates_of(cell);
    tape = fastseq::tape_of(cell);
    reverse = random.chance(0.4), deterministic = random.chance(0.3);
    batch_first = random.chance(0.4);
    transposed = random.chance(0.15);
    save = random.chance(0.8);
    double scale = 1 / std::sqrt(double(H));
    x = random.array(dtype, T * B * I, 1);
    weights = dtype;
    if (dtype == Dtype::f32 && random.chance(0.5)) {  // as in inference
      weights = random.chance(0.5) ? Dtype::bf16 : Dtype::i8;
      narrow = random.chance(0.6), save = false;
    }
    const double most = weights == Dtype::i8 ? 127 : scale;
    w_ih = random.array(weights, G * H * I, most);
    w_hh = random.array(weights, G * H * P, most);
    if (random.chance(0.7)) {
      b_ih = random.array(dtype, G * H, scale);
      b_hh = random.array(dtype, G * H, scale);
    }
    if (projected) w_hr = random.array(weights, P * H, most);
    h0 = random.array(dtype, B * P, 1);
    if (lstm()) c0 = random.array(dtype, B * H, 1);
    if (random.chance(0.8)) dy = random.array(dtype, T * B * P, 1);
    if (random.chance(0.7)) dh_n = random.array(dtype, B * P, 1);
    if (lstm() && random.chance(0.7)) dc_n = random.array(dtype, B * H, 1);
    if (lstm() && random.chance(0.3)) dstates = random.array(accumulator(), T * B * H, 1);
    states = lstm() && (save || random.chance(0.5));
    if (cell == Cell::rnn_relu) kinked_y = random.array(dtype, T * B * P, 1);
    if (random.chance(0.4))
      for (int64_t b = 0; b < B; ++b) lengths.push_back(random.below(T + 1));
    if (random.chance(0.3)) {
      reset.reset(new bool[size_t(T * B)]);
      for (int64_t i = 0; i < T * B; ++i) reset[size_t(i)] = random.chance(0.2);
    }
    if (random.chance(0.3)) {  // as recurrent dropout draws it
      mask = Array(dtype, B * P);
      for (int64_t i = 0; i < B * P; ++i) mask.set(i, random.chance(0.5) ? 1.5 : 0);
    }
    if (reset && random.chance(0.5)) {
      reset_h = random.array(dtype, B * P, 1);
      if (lstm()) reset_c = random.array(dtype, B * H, 1);
    }
    for (Array* keep : {&keep_h, &keep_c}) {  // as zoneout draws them
      if (!random.chance(0.25) || (keep == &keep_c && (!lstm() || projected))) continue;
      *keep = Array(dtype, T * B * P);
      for (int64_t i = 0; i < keep->size(); ++i) keep->set(i, random.chance(0.3) ? 1 : 0);
    }
    if (random.chance(0.3)) {  // as in inference: every second row of the block is for states that are read
      save = false;
      const int64_t turn = random.below(B);
      for (int64_t b = 0; b < B; ++b) read.push_back(2 * ((b + turn) % B)), write.push_back(2 * (B - 1 - b) + 1);
    }
  }

  std::string describe(uint64_t seed) const {
    char text[200];
    std::snprintf(text, sizeof text, "recurrent seed %lu: %s %s of %s%s T%ld B%ld I%ld H%ld P%ld threads %d%s%s%s%s%s%s%s%s",
                  (unsigned long)seed, fastseq::kCells[int(cell)].name, kDtypeNames[int(dtype)], kDtypeNames[int(weights)],
                  narrow ? " multiplied" : "", long(T), long(B), long(I), long(H), long(P), threads,
                  reverse ? " reverse" : "", lengths.empty() ? "" : " lengths", reset ? " reset" : "",
                  reset_h.absent() ? "" : " to a state", keep_h.absent() ? "" : " h kept", keep_c.absent() ? "" : " c kept",
                  mask.absent() ? "" : " mask", transposed ? " transposed" : "");
    return text;
  }

  void fill(ScanSizes& p) const {
    p.cell = cell;
    p.dtype = dtype;
    p.T = T, p.B = B, p.I = I, p.H = H, p.P = P;
    p.reverse = reverse;
    p.threads = threads;
    p.deterministic = deterministic;
    p.lengths = lengths.empty() ? nullptr : lengths.data();
    p.reset = reset.get();
    p.reset_t = B, p.reset_b = 1;
    p.mask = rows(mask, B, P);
    p.reset_h = rows(reset_h, B, P), p.reset_c = rows(reset_c, B, H);
    p.keep_h = view(keep_h, T, B, P), p.keep_c = view(keep_c, T, B, H);
  }

  // Marks what may hold anything in an output [T,B,n]: the steps past each sequence's length.
  std::vector<bool> past_lengths(int64_t n) const {
    std::vector<bool> out(size_t(T * B * n), false);
    for (int64_t t = 0; t < T && !lengths.empty(); ++t)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t e = 0; e < n; ++e) out[size_t((t * B + b) * n + e)] = t >= lengths[size_t(b)];
    return out;
  }

  Problem widened() const {
    Problem out = *this;
    out.dtype = Dtype::f64;
    for (Array* a : {&out.x, &out.w_ih, &out.w_hh, &out.b_ih, &out.b_hh, &out.w_hr, &out.h0, &out.c0, &out.mask,
                     &out.reset_h, &out.reset_c, &out.keep_h, &out.keep_c, &out.dy, &out.dh_n, &out.dc_n, &out.dstates, &out.kinked_y})
      *a = a->widened();
    if (weights == Dtype::i8) times_scales(out.w_ih, G * H, I), times_scales(out.w_hh, G * H, P), times_scales(out.w_hr, P, H);
    return out;
  }

  // Of an int8 matrix [n, K]: the scale of each row, and what its products' sums start from (ScanForward::narrow).
  double scale_of(int64_t row) const { return double(float(double(1 + row % 3) / 400 / std::sqrt(double(H)))); }
  int64_t place(int64_t row, int64_t k, int64_t n, int64_t K) const { return transposed ? k * n + row : row * K + k; }
  Array scales(const Array& w, int64_t n, int64_t K) const {
    if (w.absent() || weights != Dtype::i8) return {};
    Array out(Dtype::f32, 2 * n);
    for (int64_t row = 0; row < n; ++row) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += w[place(row, k, n, K)];
      out.set(row, scale_of(row)), out.set(n + row, -128 * sum);
    }
    return out;
  }
  void times_scales(Array& w, int64_t n, int64_t K) const {
    for (int64_t row = 0; row < n && !w.absent(); ++row)
      for (int64_t k = 0; k < K; ++k) w.set(place(row, k, n, K), w[place(row, k, n, K)] * scale_of(row));
  }

  // The matrix w [(gates + apart)*H, K] as weights of a smaller type than x are packed (recurrent.h).
  Array packed(const Array& w, int64_t gates, int64_t apart, int64_t H, int64_t K) const {
    if (w.absent()) return {};
    const fastseq::ScanPacked layout{FASTSEQ_DISPATCH(scan_lanes), int64_t(4 / bytes_of(weights))};
    const int64_t row = layout.lanes * layout.word, words = layout.words(K), all = gates + apart;
    Array out(weights, layout.vectors(H) * words * all * row);
    for (int64_t i = 0; i < out.size(); ++i) out.set(i, 0);
    for (int64_t g = 0; g < all; ++g)
      for (int64_t unit = 0; unit < H; ++unit)
        for (int64_t k = 0; k < K; ++k) {
          const int64_t block = g < gates ? 0 : layout.vectors(H) * words * gates, width = g < gates ? gates : apart;
          const int64_t at = (unit / layout.lanes * words + k / layout.word) * width + (g < gates ? g : g - gates);
          const int64_t from = transposed ? k * all * H + g * H + unit : (g * H + unit) * K + k;
          out.set((block + at) * row + unit % layout.lanes * layout.word + k % layout.word, w[from]);
        }
    return out;
  }

  // A block in which the rows that are read have these states, and the others NaN.
  Array block_of(const Array& states, int64_t n) const {
    if (states.absent()) return {};
    Array out(dtype, 2 * B * n);
    for (int64_t i = 0; i < B * n; ++i) out.set(read[size_t(i / n)] * n + i % n, states[i]);
    return out;
  }
  // The rows of it that are written.
  Array written(const Array& block, int64_t n) const {
    Array out(dtype, B * n);
    for (int64_t i = 0; i < B * n; ++i) out.set(i, block[write[size_t(i / n)] * n + i % n]);
    return out;
  }

  Outputs run() const {
    Array y(dtype, T * B * P), h_n(dtype, B * P), c_n, all_states, saved;
    if (lstm()) c_n = Array(dtype, B * H);
    if (states) all_states = Array(accumulator(), T * B * H);
    if (save && tape) saved = Array(dtype, T * B * tape * H);
    ScanForward p{};
    fill(p);
    p.weights = dtype == Dtype::f64 ? dtype : weights;
    p.x = view(x, T, B, I, batch_first);
    p.w_ih = rows(w_ih, G * H, I, transposed);
    p.w_hh = rows(w_hh, G * H, P, transposed);
    p.w_hr = rows(w_hr, P, H, transposed);
    Array small[3], scale[3];
    if (dtype == Dtype::f32 && weights != dtype) {
      const int64_t apart = cell == Cell::gru_reset_before;
      small[0] = packed(w_ih, G, 0, H, I), small[1] = packed(w_hh, G - apart, apart, H, P);
      small[2] = packed(w_hr, 1, 0, P, H);
      scale[0] = scales(w_ih, G * H, I), scale[1] = scales(w_hh, G * H, P), scale[2] = scales(w_hr, P, H);
      p.s_ih = rows(scale[0], 2, G * H), p.s_hh = rows(scale[1], 2, G * H), p.s_hr = rows(scale[2], 2, P);
      p.narrow = narrow;
      p.w_ih = rows(small[0], 1, 1), p.w_hh = rows(small[1], 1, 1), p.w_hr = rows(small[2], 1, 1);
    }
    p.b_ih = rows(b_ih, 1, G * H);
    p.b_hh = rows(b_hh, 1, G * H);
    p.h0 = rows(h0, B, P);
    p.c0 = rows(c0, B, H);
    Array block_h, block_c;
    if (!read.empty()) {
      block_h = block_of(h0, P), block_c = block_of(c0, H);
      p.read = read.data(), p.write = write.data();
      p.h0 = p.h_kept = rows(block_h, 2 * B, P);
      p.c0 = p.c_kept = rows(block_c, 2 * B, H);
    }
    p.y = view(y, T, B, P);
    p.h_n = rows(h_n, B, P);
    p.c_n = rows(c_n, B, H);
    p.states = view(all_states, T, B, H);
    p.tape = view(saved, T, B, tape * H);
    Array forward_space(Dtype::bf16, int64_t(FASTSEQ_DISPATCH(scan_forward_workspace, p) + 1) / 2, 64);
    p.workspace = forward_space.data();
    FASTSEQ_DISPATCH(scan_forward, p);
    Outputs out = {{"y", y}, {"h_n", h_n}};
    if (lstm()) out.push_back({"c_n", c_n});
    if (!read.empty()) out.push_back({"block of h", written(block_h, P)});
    if (!read.empty() && lstm()) out.push_back({"block of c", written(block_c, H)});
    if (states) out.push_back({"states", all_states, false, past_lengths(H)});
    if (!saved.absent()) out.push_back({"tape", saved, false, past_lengths(tape * H)});
    if (!save) return out;

    Array dgates(dtype, T * B * G * H), dhidden, dh0(dtype, B * P), dc0, dreset_h(dtype, reset_h.size()),
        dreset_c(dtype, reset_c.size());
    int64_t hidden = cell == Cell::gru ? H : !w_hr.absent() ? P : 0;
    if (hidden) dhidden = Array(dtype, T * B * hidden);
    if (lstm()) dc0 = Array(dtype, B * H);
    ScanBackward q{};
    fill(q);
    q.dy = view(dy, T, B, P, batch_first);
    q.dh_n = rows(dh_n, B, P);
    q.dc_n = rows(dc_n, B, H);
    q.dstates = view(dstates, T, B, H);
    q.y = kinked_y.absent() ? p.y : view(kinked_y, T, B, P);
    q.states = p.states, q.tape = p.tape;
    q.w_hh = p.w_hh, q.w_hr = p.w_hr, q.h0 = p.h0, q.c0 = p.c0;
    q.dgates = view(dgates, T, B, G * H);
    q.dhidden = view(dhidden, T, B, hidden);
    q.dh0 = rows(dh0, B, P);
    q.dc0 = rows(dc0, B, H);
    if (!reset_h.absent()) q.dreset_h = rows(dreset_h, B, P);
    if (!reset_c.absent()) q.dreset_c = rows(dreset_c, B, H);
    Array backward_space(Dtype::bf16, int64_t(FASTSEQ_DISPATCH(scan_backward_workspace, q) + 1) / 2, 64);
    q.workspace = backward_space.data();
    FASTSEQ_DISPATCH(scan_backward, q);
    out.push_back({"dgates", dgates});
    out.push_back({"dh0", dh0});
    if (hidden) out.push_back({"dhidden", dhidden});
    if (lstm()) out.push_back({"dc0", dc0});
    if (!reset_h.absent()) out.push_back({"dreset_h", dreset_h});
    if (!reset_c.absent()) out.push_back({"dreset_c", dreset_c});

    Array dx(dtype, x.size()), dw_ih(dtype, w_ih.size()), dw_hh(dtype, w_hh.size()), db_ih(dtype, G * H), db_hh(dtype, G * H);
    ScanProducts r{};
    fill(r);
    r.dgates = q.dgates, r.x = p.x, r.w_ih = p.w_ih, r.y = q.y, r.h0 = p.h0;
    if (cell == Cell::gru) r.dhidden = q.dhidden;
    if (cell == Cell::gru_reset_before) r.tape = p.tape;
    r.dx = view(dx, T, B, I);
    r.dw_ih = rows(dw_ih, G * H, I);
    r.dw_hh = rows(dw_hh, G * H, P);
    r.db_ih = rows(db_ih, 1, G * H);
    r.db_hh = rows(db_hh, 1, G * H);
    Array products_space(Dtype::bf16, int64_t(FASTSEQ_DISPATCH(scan_products_workspace, r) + 1) / 2, 64);
    r.workspace = products_space.data();
    FASTSEQ_DISPATCH(scan_products, r);
    out.insert(out.end(), {{"dx", dx}, {"dw_ih", dw_ih}, {"dw_hh", dw_hh}, {"db_ih", db_ih}, {"db_hh", db_hh}});
    return out;
  }
};

}  // namespace

int recurrent_case(uint64_t seed) {
  Random random(seed);
  Problem problem(random);
  double terms = double(problem.I + problem.G * problem.H + problem.T * problem.B);
  double tolerance = rounding(problem.narrow ? Dtype::bf16 : problem.dtype, terms, double(problem.T));
  return over_isas(problem.describe(seed), tolerance, problem);
}

}  // namespace driver
