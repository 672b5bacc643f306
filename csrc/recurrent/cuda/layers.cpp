// torch.ops.fastseq.layers_*.native on a GPU: a stack of layers in one call, with what is independent side by side. The
// schemas are in fastseq/ops/layers.py; schedule.h says what runs when, this file what each piece does.
#include "recurrent/cuda/call.h"
#include "recurrent/cuda/lanes.h"
#include "recurrent/cuda/schedule.h"

#include <algorithm>

namespace fastseq::cuda {
namespace {

using Tensors = std::vector<Tensor>;

Tensor rows_as_matrix(const Tensor& t, int64_t columns) { return torch::stable::view(t, {-1, columns}); }
Tensor columns_of(Tensor t, int64_t from, int64_t count) { return torch::stable::narrow(t, 1, from, count); }
Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
// The place of a row of a tensor, or null where the tensor is empty.
char* row_at(const Tensor& t, int64_t row, int64_t bytes) {
  return t.numel() ? static_cast<char*>(t.data_ptr()) + row * bytes : nullptr;
}

// A stack, its sizes and its plan; what both ways share.
struct Layers {
  Call call;
  ScanStack stack;
  ScanDivision division;
  ScanPlan plan;
  ScanWalk walk{};
  Tensors weights;  // w_ih, w_hh and, with biases, b_ih, b_hh, a layer and direction at a time
  int width, G;
  int64_t T, B, H, D, size;
  Tensors carry_h, carry_c, workspace;  // of a layer and direction, of a lane
  std::vector<ScanOptions> options;     // of a layer and direction
  Optional mask, reset_h;               // [rows,B,H]

  Layers(const Tensor& x, const Tensors& given, int64_t cell, int64_t num_layers, bool bidirectional, bool reverse,
         const Optional& lengths, const Optional& reset)
      : call(x, cell) {
    STD_TORCH_CHECK(!reverse, "scan: the native CUDA kernels have no stack that walks backwards alone");
    stack.layers = int(num_layers), stack.directions = bidirectional ? 2 : 1, G = gates_of(call.cell);
    const int64_t rows = num_layers * stack.directions;
    width = rows > 0 ? int(given.size()) / int(rows) : 0;
    STD_TORCH_CHECK((width == 2 || width == 4) && int64_t(given.size()) == rows * width && x.dim() == 3,
                    "scan: x must be [T, B, I], and weights those of every layer and direction");
    T = x.size(0), B = x.size(1), H = given[1].size(1), D = stack.directions, size = int(bytes_of(call.number.dtype));
    STD_TORCH_CHECK(T > 0 && B > 0 && H > 0, "scan: a stack of layers in one call needs T, B and H above 0");
    for (int64_t i = 0; i < num_layers * D; ++i) {
      const Tensor* w = &given[i * width];
      weights.push_back(call.dense("w_ih", w[0], {G * H, inputs(i / D, x)}));
      weights.push_back(call.dense("w_hh", w[1], {G * H, H}));
      for (int b = 2; b < width; ++b) weights.push_back(call.dense("a bias", w[b], {G * H}));
    }
    call.walk(walk, T, B, H, false, lengths, reset);
  }

  // What layers and directions have besides; before divide(), whose plan it is part of.
  void set_options(const Optional& state_mask, const Optional& put_h, const Optional& put_c, const Optional& zoneout_h,
                   const Optional& zoneout_c) {
    const int64_t rows = stack.layers * D;
    const auto dense = [&](const char* s, const Optional& t) { return t ? Optional(call.dense(s, *t, {rows, B, H})) : t; };
    const Optional reset_c = dense("reset_c", put_c);
    mask = dense("state_mask", state_mask), reset_h = dense("reset_h", put_h);
    for (int64_t i = 0; i < rows; ++i) {
      const auto row = [&](const Optional& t) { return t ? row_at(*t, i, B * H * size) : nullptr; };
      const auto share = [&](const char* name, const Optional& t) { return call.share(name, t, {rows, T, B, H}, i); };
      options.push_back({row(mask), row(reset_h), row(reset_c), share("zoneout_h", zoneout_h),
                         share("zoneout_c", zoneout_c)});
    }
    walk.options = options[0];
  }
  int64_t inputs(int64_t layer, const Tensor& x) const { return layer ? D * H : x.size(2); }
  const Tensor& weight(int layer, int direction, int which) const {
    return weights[(layer * D + direction) * width + which];
  }
  // Chooses the plan and the division: as many walks side by side as leave each one's role as it is alone.
  void divide(const Tensor& x, bool backward) {
    plan = call.plan(backward, walk);
    int beside = plan.role == ScanRole::step ? 0 : 1;
    for (int n = most_walkers(stack); beside == 1 && n > 1; --n) {
      const ScanPlan shared = call.plan(backward, walk, n);
      if (shared.role == plan.role) plan = shared, beside = n;
    }
    // Products at half of an H100's rate, by estimate; a step as long as on an H200, where most took 2 to 3.5 us. They
    // decide into how many windows a lone layer is cut, by the square root. Nobody has timed other divisions.
    const double rate = call.number.dtype != Dtype::f32 ? 4e14 : call.number.tf32 ? 2e14 : 4e13;
    const double step = 2.5e-6;
    const double factors = backward ? inputs(0, x) * (stack.with_dx ? 2.0 : 1.0) + H : inputs(0, x);
    stack.products = 2.0 * B * G * H * factors / rate / step;
    division = cuda::divide(T, stack, backward, beside, wish());
    if (plan.role == ScanRole::step) division.walkers = division.windows = 1;
    if (division.walkers < beside) {  // a larger share for each
      const ScanPlan shared = call.plan(backward, walk, division.walkers);
      if (shared.role == plan.role) plan = shared;
    }
    const bool lstm = has_c(call.cell);
    for (int64_t i = 0; division.windows > 1 && i < stack.layers * D; ++i) {
      carry_h.push_back(call.empty({B, H}, ScalarType::Float));
      carry_c.push_back(lstm ? call.empty({B, H}, ScalarType::Float) : carry_h.back());
    }
    for (int i = 0; i < division.walkers; ++i)
      workspace.push_back(call.empty({int64_t(plan.workspace)}, ScalarType::Byte));
  }
  int64_t begin(int window) const { return T * window / division.windows; }
  int64_t steps(int window) const { return begin(window + 1) - begin(window); }
  int64_t longest() const { return (T + division.windows - 1) / division.windows; }
  // The lane on the caller's stream: that of the products. The role `step` has torch's in its walks.
  int callers() const { return division.apart && plan.role != ScanRole::step ? division.lanes() - 1 : 0; }
  // The part of a walk that all launches have in common.
  void set(ScanWalk& a, const ScanPiece& p) const {
    a = walk;
    a.T = int(steps(p.window)), a.first = int(begin(p.window)), a.reverse = p.direction == 1;
    a.options = options[p.layer * D + p.direction];
  }
  void clear(int lane, void* stream) const {
    if (plan.workspace) call.check(scan_clear(workspace[lane].data_ptr(), plan.workspace, stream));
  }
  int lane(const ScanPiece& p) const { return division.lane(stack, p.layer, p.direction); }
};

// ---- Forward.

struct ForwardLayers : Layers {
  using Layers::Layers;
  Tensor x, y, h_n, c_n;
  Tensors ys, states, tapes, gates;
  const void *h0 = nullptr, *c0 = nullptr;

  Tensor window_of(const Tensor& t, int window) const {
    return rows_as_matrix(rows_of(t, begin(window), steps(window)), t.size(2));
  }
  const Tensor& buffer(const ScanPiece& p) const { return gates[2 * lane(p) + p.window % 2]; }

  // A whole x in batch order is projected in one product; a window of one has no rows at one distance from each other.
  bool batch_first(const ScanPiece& p) const { return p.layer == 0 && !x.is_contiguous(); }
  void project(const ScanPiece& p) const {
    const Tensor input = batch_first(p) ? rows_as_matrix(transposed(x), x.size(2))
                                        : window_of(p.layer ? ys[p.layer - 1] : x, p.window);
    linear_out(input, weight(p.layer, p.direction, 0),
               width > 2 ? Optional(weight(p.layer, p.direction, 2)) : Optional(),
               rows_of(buffer(p), 0, steps(p.window) * B));
  }
  void step(const ScanPiece& p, void* stream) {
    const int64_t i = p.layer * D + p.direction;
    ScanForward a{};
    set(a, p);
    a.gates_x = buffer(p).data_ptr(), a.x_t = batch_first(p) ? 1 : int(B), a.x_b = batch_first(p) ? int(T) : 1;
    a.w_hh = weight(p.layer, p.direction, 1).data_ptr();
    a.b_hh = width > 2 ? weight(p.layer, p.direction, 3).data_ptr() : nullptr;
    a.h0 = h0 ? static_cast<const char*>(h0) + i * B * H * size : nullptr;
    a.c0 = c0 ? static_cast<const char*>(c0) + i * B * H * size : nullptr;
    a.y = row_at(ys[p.layer], p.direction, H * size), a.y_t = int(B * D), a.y_b = int(D);
    a.h_n = row_at(h_n, i, B * H * size), a.c_n = row_at(c_n, i, B * H * size);
    a.states = states[i].numel() ? floats(states[i]) : nullptr;
    a.tape = tapes[i].numel() ? tapes[i].data_ptr() : nullptr;
    if (p.window > 0) a.h_in = floats(carry_h[i]), a.c_in = floats(carry_c[i]);
    if (p.window < division.windows - 1) a.h_out = floats(carry_h[i]), a.c_out = floats(carry_c[i]);
    if (plan.role == ScanRole::step) return step_forward_all(call, a, weight(p.layer, p.direction, 1));
    clear(p.lane, stream);
    call.check(scan_forward(a, call.cell, call.number, plan, workspace[p.lane].data_ptr(), stream));
  }
  void run() {
    Lanes lanes(call.device(), call.stream(), division.lanes(), callers());
    for (const ScanPiece& p : schedule_forward(stack, division))
      lanes.add(p.lane, p.after, [this, p](void* stream) { p.work == ScanWork::walk ? step(p, stream) : project(p); });
    lanes.join();
  }
};

// ---- Backward.

// A sum of products, one window's after another's: float32 until it is whole, then rounded once.
struct Sum {
  Tensor out, sum, scratch;
  bool begun = false;

  Sum(Layers& layers, Tensor result, const Tensor& scratch_)
      : out(result),
        sum(layers.size == 4 ? result : layers.call.empty({result.size(0), result.size(1)}, ScalarType::Float)),
        scratch(scratch_) {}
  // Adds a b to the rows from `row` on.
  void add(const Tensor& a, const Tensor& b, int64_t row, bool first, void* stream) {
    const int64_t M = a.size(0), N = b.size(1);
    const Tensor target = rows_of(sum, row, M);
    if (first) return multiply(a, b, target);
    const Tensor product = torch::stable::view(rows_of(scratch, 0, M * N), {M, N});
    multiply(a, b, product);
    Call::check(scan_add(floats(target), floats(product), target.data_ptr(), M * N, Dtype::f32, stream));
  }
  void clear(int64_t row, int64_t count) const {
    Tensor rows = rows_of(sum, row, count);
    torch::stable::zero_(rows);
  }
  void finish(Dtype dtype, void* stream) const {
    if (sum.data_ptr() != out.data_ptr())
      Call::check(scan_add(floats(sum), nullptr, out.data_ptr(), out.numel(), dtype, stream));
  }
};

struct BackwardLayers : Layers {
  using Layers::Layers;
  Tensor x, dx, dh0, dc0;
  std::optional<ResetGradient> dreset_h, dreset_c;
  Optional resets, keep, starts;
  const char* dy = nullptr;
  int dy_t = 0, dy_b = 0;  // of its rows, by direction
  const void *dh_n = nullptr, *dc_n = nullptr, *h0 = nullptr, *c0 = nullptr;
  Optional h0_tensor;
  Tensors dstates, ys, states, tapes;
  Tensors dgates, dhidden;  // of a slot and direction
  Tensors dinput;           // of a lane: the gradient of the layer's output in a window
  Tensors halves;           // of an input's gradient, where there are two directions: float32, before they are added
  Tensors dweights;
  std::vector<Sum> of_inputs, of_states;

  const Tensor& slot(const Tensors& of, const ScanPiece& p, int direction) const {
    return of[(p.layer % division.slots) * D + direction];
  }
  Tensor window_of(const Tensor& t, int window) const { return rows_of(t, begin(window) * B, steps(window) * B); }

  void step(const ScanPiece& p, void* stream) {
    const int64_t i = p.layer * D + p.direction;
    ScanBackward a{};
    set(a, p);
    a.options.dreset_h = dreset_h->from(i * B * H), a.options.dreset_c = dreset_c->from(i * B * H);
    const bool top = p.layer == stack.layers - 1;
    const int from = division.lane(stack, p.layer, 0);
    if (!top) a.dy = row_at(dinput[from], p.direction, H * size), a.x_t = int(B * D), a.x_b = int(D);
    if (top && dy) a.dy = dy + (int64_t(begin(p.window)) * dy_t + p.direction) * H * size, a.x_t = dy_t, a.x_b = dy_b;
    const auto of = [&](const void* all) {
      return all ? static_cast<const char*>(all) + i * B * H * size : nullptr;
    };
    a.dh_n = of(dh_n), a.dc_n = of(dc_n), a.h0 = of(h0), a.c0 = of(c0);
    if (top && !dstates.empty()) a.dstates = floats(dstates[p.direction]);
    a.y = row_at(ys[p.layer], p.direction, H * size), a.y_t = int(B * D), a.y_b = int(D);
    a.tape = tapes[i].numel() ? tapes[i].data_ptr() : nullptr;
    a.states = states[i].numel() ? floats(states[i]) : nullptr;
    a.w_hh = weight(p.layer, p.direction, 1).data_ptr();
    a.dgates = slot(dgates, p, p.direction).data_ptr();
    a.dhidden = call.cell == ScanCell::gru ? slot(dhidden, p, p.direction).data_ptr() : nullptr;
    if (h0) a.dh0 = row_at(dh0, i, B * H * size);
    if (c0) a.dc0 = row_at(dc0, i, B * H * size);
    if (p.window < division.windows - 1) a.dh_in = floats(carry_h[i]), a.dc_in = floats(carry_c[i]);
    if (p.window > 0) a.dh_out = floats(carry_h[i]), a.dc_out = floats(carry_c[i]);
    if (plan.role == ScanRole::step) return step_backward_all(call, a, weight(p.layer, p.direction, 1));
    clear(lane(p), stream);
    call.check(scan_backward(a, call.cell, call.number, plan, workspace[lane(p)].data_ptr(), stream));
  }
  // dgates W_ih, of both directions.
  void input_gradient(const ScanPiece& p, void* stream) const {
    const int64_t rows = steps(p.window) * B;
    const Tensor out = p.layer ? rows_of(dinput[p.lane], 0, rows) : window_of(dx, p.window);
    if (D == 1) {
      mm_out(window_of(slot(dgates, p, 0), p.window), weight(p.layer, 0, 0), out);
      return;
    }
    Tensors parts;
    for (int d = 0; d < 2; ++d) {
      const int64_t columns = out.size(1);
      parts.push_back(torch::stable::view(rows_of(halves[d], 0, rows * columns), {rows, columns}));
      multiply(slot(dgates, p, d), weight(p.layer, d, 0), parts[d]);
    }
    Call::check(scan_add(floats(parts[0]), floats(parts[1]), out.data_ptr(), out.numel(), call.number.dtype, stream));
  }
  // h times the mask: [n*B,H] of a layer and direction.
  Tensor masked(const Tensor& h, int64_t i) const {
    if (!mask) return h;
    return rows_as_matrix(times(torch::stable::view(h, {-1, B, H}), torch::stable::select(*mask, 0, i)), H);
  }
  // What a window adds to the gradients of W_ih, W_hh and the biases: dgatesᵀ x, dgatesᵀ h_prev, and dgates' sums. h_prev
  // is y, one step aside, h0 where a walk begins, and reset_h where a step is reset.
  void weight_gradient(const ScanPiece& p, void* stream) {
    const int64_t i = p.layer * D + p.direction, n = steps(p.window), t0 = begin(p.window);
    const bool reverse = p.direction == 1, gru = call.cell == ScanCell::gru, begun = p.window == division.windows - 1;
    const bool twice = call.cell == ScanCell::gru_reset_before, done = p.window == 0;
    const Tensor d = window_of(slot(dgates, p, p.direction), p.window);
    const Tensor input = p.layer ? rows_as_matrix(ys[p.layer - 1], D * H) : rows_as_matrix(x, x.size(2));
    of_inputs[i].add(transposed(d), window_of(input, p.window), 0, begun, stream);

    Tensor kept = d, kept_hidden = gru ? window_of(slot(dhidden, p, p.direction), p.window) : d;
    const Tensor hidden = kept_hidden;
    if (keep) {  // a cleared state has no part in the product
      const Tensor live = window_of(*keep, p.window);
      kept = times(kept, live);
      kept_hidden = gru ? times(kept_hidden, live) : kept;
    }
    const Tensor y = columns_of(rows_as_matrix(ys[p.layer], D * H), p.direction * H, H);
    // Rows [from, from + count) of the window against those of y from `at` on.
    const int64_t whole = reverse ? n - (t0 + n == T) : n - (t0 == 0);
    const int64_t from = !reverse && t0 == 0 ? 1 : 0, at = reverse ? t0 + 1 : t0 - 1 + from;
    const Tensor before = whole > 0 ? masked(rows_of(y, at * B, whole * B), i) : y;
    const auto against = [&](const Tensor& all, const Tensor& gradients, int64_t row, int64_t column, int64_t count) {
      bool first = begun;
      const auto share = [&](Tensor g) { return transposed(columns_of(g, column, count)); };
      if (whole > 0) {
        const Tensor own = share(rows_of(gradients, from * B, whole * B));
        of_states[i].add(own, before, row, first, stream);
        first = false;
      }
      if (reverse ? t0 + n == T : t0 == 0) {
        Tensor start = rows_of(gradients, reverse ? (n - 1) * B : 0, B);
        if (h0_tensor && reverse && starts)
          start = rows_as_matrix(take_steps(torch::stable::view(gradients, {n, B, gradients.size(1)}), *starts),
                                 gradients.size(1));
        if (h0_tensor)
          of_states[i].add(share(start), masked(torch::stable::select(*h0_tensor, 0, i), i), row, first, stream);
        else if (first)
          of_states[i].clear(row, count);
      }
      if (resets && reset_h) {
        const int64_t over[] = {0};
        const Tensor at_resets = torch::stable::view(window_of(*resets, p.window), {n, B, 1});
        const Tensor here = times(torch::stable::view(all, {n, B, all.size(1)}), at_resets);
        const Tensor of_resets = share(torch::stable::sum(here, torch::headeronly::IntHeaderOnlyArrayRef(over, 1), false));
        of_states[i].add(of_resets, masked(torch::stable::select(*reset_h, 0, i), i), row, false, stream);
      }
    };
    if (gru || twice) {
      against(d, kept, 0, 0, 2 * H);
      if (gru) {
        against(hidden, kept_hidden, 2 * H, 0, H);
      } else {
        const Tensor q = columns_of(window_of(rows_as_matrix(tapes[i], tape_of(call.cell) * H), p.window), 3 * H, H);  // r * h_prev
        of_states[i].add(transposed(columns_of(d, 2 * H, H)), q, 2 * H, begun, stream);
      }
    } else {
      against(d, kept, 0, 0, G * H);
    }
    if (width > 2) {
      add_rows(d, biases[2 * i], 0, begun, stream);
      if (gru) {
        add_rows(columns_of(d, 0, 2 * H), biases[2 * i + 1], 0, begun, stream);
        add_rows(hidden, biases[2 * i + 1], 2 * H, begun, stream);
      }
    }
    if (!done) return;
    of_inputs[i].finish(call.number.dtype, stream);
    of_states[i].finish(call.number.dtype, stream);
    for (int b = 2; b < width; ++b)
      call.check(scan_add(floats(biases[2 * i + (gru ? b - 2 : 0)]), nullptr, dweights[i * width + b].data_ptr(), G * H,
                          call.number.dtype, stream));
  }
  Tensors biases;  // sums of dgates' rows, in float32

  void run() {
    Lanes lanes(call.device(), call.stream(), division.lanes(), callers());
    for (const ScanPiece& p : schedule_backward(stack, division))
      lanes.add(p.lane, p.after, [this, p](void* stream) {
        if (p.work == ScanWork::walk)
          step(p, stream);
        else if (p.work == ScanWork::input_gradient)
          input_gradient(p, stream);
        else
          weight_gradient(p, stream);
      });
    lanes.join();
  }

 private:
  static void add_rows(const Tensor& d, const Tensor& sum, int64_t at, bool first, void* stream) {
    const int64_t columns = d.size(1), over[] = {0};
    const torch::headeronly::IntHeaderOnlyArrayRef axes(over, 1);
    const Tensor added = torch::stable::sum(d, axes, false, ScalarType::Float), target = rows_of(sum, at, columns);
    const float* before = first ? nullptr : floats(target);
    Call::check(scan_add(floats(added), before, target.data_ptr(), columns, Dtype::f32, stream));
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors> layers_forward_cuda(
    const Tensor& x, const Tensors& weights, const Optional& h0, const Optional& c0, const Optional& reset_h,
    const Optional& reset_c, const Optional& lengths, const Optional& reset, const Optional& state_mask,
    const Optional& zoneout_h, const Optional& zoneout_c, int64_t cell, int64_t num_layers, bool bidirectional, bool reverse,
    bool save, bool with_states) {
  ForwardLayers a(x, weights, cell, num_layers, bidirectional, reverse, lengths, reset);
  const int64_t T = a.T, B = a.B, H = a.H, D = a.D, rows = num_layers * D, tape = tape_of(a.call.cell);
  const bool lstm = has_c(a.call.cell);
  check_cell(a.call.cell, std::nullopt, {c0, reset_c, zoneout_c});
  a.set_options(state_mask, reset_h, reset_c, zoneout_h, zoneout_c);
  a.divide(x, false);
  const bool as_it_lies = a.division.windows == 1 && transposed(x).is_contiguous();
  a.x = as_it_lies ? x : a.call.dense("x", x, {T, B, x.size(2)});
  a.h0 = a.call.pointer("h0", h0, {rows, B, H});
  a.c0 = a.call.pointer("c0", c0, {rows, B, H});
  // Two buffers are enough where nothing is kept: a window of a layer comes after that of the layer before it has been
  // read, and so after all that read the layer two below.
  for (int64_t layer = 0; layer < num_layers; ++layer)
    a.ys.push_back(!save && layer > 1 && layer < num_layers - 1 ? a.ys[layer - 2] : a.call.empty({T, B, D * H}));
  a.y = a.ys.back();
  a.h_n = a.call.empty({rows, B, H});
  a.c_n = lstm ? a.call.empty({rows, B, H}) : a.call.empty({0});
  for (int64_t i = 0; i < rows; ++i) {
    const bool kept = lstm && (save || (with_states && i >= rows - D));
    a.states.push_back(kept ? a.call.empty({T, B, H}, ScalarType::Float) : a.call.empty({0}));
    a.tapes.push_back(save && tape > 0 ? a.call.empty({T, B, tape * H}) : a.call.empty({0}));
  }
  for (int i = 0; i < 2 * a.division.walkers; ++i)
    a.gates.push_back(a.call.empty({i % 2 && a.division.windows == 1 ? 0 : a.longest() * B, a.G * H}));
  a.run();
  Tensors below(a.ys.begin(), a.ys.end() - 1);
  if (!save) below.clear(), a.tapes.clear(), a.states.erase(a.states.begin(), a.states.end() - D);
  if (tape == 0) a.tapes.clear();
  if (!lstm || !(save || with_states)) a.states.clear();
  return {a.y, a.h_n, a.c_n, below, a.states, a.tapes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors> layers_backward_cuda(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Tensors& dstates, const Tensor& x,
    const Tensors& weights, const Optional& h0, const Optional& c0, const Optional& reset_h,
    const Optional& reset_c, const Optional& lengths, const Optional& reset, const Optional& state_mask,
    const Optional& zoneout_h, const Optional& zoneout_c, const Optional& starts, const Tensors& ys,
    const Tensors& states, const Tensors& tapes, int64_t cell, int64_t num_layers, bool bidirectional, bool reverse,
    bool with_dx, bool with_weights) {
  BackwardLayers a(x, weights, cell, num_layers, bidirectional, reverse, lengths, reset);
  const int64_t T = a.T, B = a.B, H = a.H, D = a.D, rows = num_layers * D, N = a.G * H, tape = tape_of(a.call.cell);
  const bool lstm = has_c(a.call.cell), gru = a.call.cell == ScanCell::gru;
  check_cell(a.call.cell, std::nullopt, {c0, reset_c, zoneout_c});
  a.set_options(state_mask, reset_h, reset_c, zoneout_h, zoneout_c);
  STD_TORCH_CHECK(int64_t(ys.size()) == num_layers && int64_t(tapes.size()) == (tape > 0 ? rows : 0) &&
                      int64_t(states.size()) == (lstm ? rows : 0) && (dstates.empty() || (lstm && int64_t(dstates.size()) == D)),
                  "scan: the backward pass needs what the forward pass saved, of every layer and direction");
  a.stack.with_dx = with_dx, a.stack.with_weights = with_weights;
  a.divide(x, true);
  a.x = a.call.dense("x", x, {T, B, x.size(2)});
  if (dy) {
    STD_TORCH_CHECK(dy->dim() == 3 && dy->size(0) == T && dy->size(1) == B && dy->size(2) == D * H &&
                        dy->scalar_type() == x.scalar_type(),
                    "scan: dy must be of y's shape and dtype");
    a.dy = static_cast<const char*>(a.call.rows(*dy, a.dy_t, a.dy_b));
    a.dy_t *= D, a.dy_b *= D;
  }
  a.dh_n = a.call.pointer("dh_n", dh_n, {rows, B, H}), a.dc_n = a.call.pointer("dc_n", dc_n, {rows, B, H});
  if (h0) a.h0_tensor = a.call.dense("h0", *h0, {rows, B, H}), a.h0 = a.h0_tensor->data_ptr();
  a.c0 = a.call.pointer("c0", c0, {rows, B, H});
  for (const Tensor& t : dstates) a.dstates.push_back(a.call.dense("dstates", t, {T, B, H}, ScalarType::Float));
  for (const Tensor& t : ys) a.ys.push_back(a.call.dense("y", t, {T, B, D * H}));
  for (int64_t i = 0; i < rows; ++i) {
    a.tapes.push_back(tape > 0 ? a.call.dense("tape", tapes[i], {T, B, tape * H}) : a.call.empty({0}));
    a.states.push_back(lstm ? a.call.dense("states", states[i], {T, B, H}, ScalarType::Float) : a.call.empty({0}));
  }
  if (reset && with_weights) {
    a.resets = torch::stable::view(a.call.dense("reset", *reset, {T, B}, ScalarType::Bool), {T * B, 1});
    a.keep = logical_not(*a.resets);
  }
  if (starts) a.starts = a.call.dense("starts", *starts, {1, B, 1}, ScalarType::Long);

  a.dx = with_dx ? a.call.empty({T * B, x.size(2)}) : a.call.empty({0});
  a.dh0 = h0 ? a.call.empty({rows, B, H}) : a.call.empty({0});
  a.dc0 = c0 ? a.call.empty({rows, B, H}) : a.call.empty({0});
  a.dreset_h.emplace(a.call, reset_h.has_value(), std::initializer_list<int64_t>{rows, B, H});
  a.dreset_c.emplace(a.call, reset_c.has_value(), std::initializer_list<int64_t>{rows, B, H});
  for (int64_t i = 0; i < a.division.slots * D; ++i) {
    a.dgates.push_back(a.call.empty({T * B, N}));
    a.dhidden.push_back(a.call.empty({gru ? T * B : 0, H}));
  }
  for (int lane = 0; lane < a.division.walkers && num_layers > 1; ++lane)
    a.dinput.push_back(a.call.empty({a.longest() * B, D * H}));
  for (int64_t d = 0; d < D && D == 2; ++d)
    a.halves.push_back(a.call.empty({T * B * std::max(x.size(2), num_layers > 1 ? D * H : 1)}, ScalarType::Float));
  if (with_weights) {
    const int64_t widest = std::max({x.size(2), H, num_layers > 1 ? D * H : H});
    const Tensor scratch = a.call.empty({N * widest}, ScalarType::Float);
    for (int64_t i = 0; i < rows * a.width; ++i) {
      const Tensor& w = a.weights[i];
      const int which = i % a.width;
      if (which < 2) {
        a.dweights.push_back(a.call.empty({N, w.size(1)}));
        (which ? a.of_states : a.of_inputs).push_back(Sum(a, a.dweights.back(), scratch));
      } else {
        a.dweights.push_back(a.call.empty({N}));
        a.biases.push_back(a.call.empty({N}, ScalarType::Float));
      }
    }
  }
  a.run();
  const Tensor dx = with_dx ? torch::stable::view(a.dx, {T, B, x.size(2)}) : a.dx;
  return {dx, a.dh0, a.dc0, a.dreset_h->give(a.call), a.dreset_c->give(a.call), a.dweights};
}

std::string native_scan_schedule(bool backward, int64_t steps, int64_t layers, int64_t directions, int64_t beside,
                                 bool with_dx, bool with_weights, double products) {
  const ScanStack stack{int(layers), int(directions), with_dx, with_weights, products};
  const ScanDivision d = divide(steps, stack, backward, int(beside), wish());
  static const char* names[] = {"project", "walk", "input_gradient", "weight_gradient"};
  std::string lines = "windows=" + std::to_string(d.windows) + " walkers=" + std::to_string(d.walkers) +
                      " lanes=" + std::to_string(d.lanes()) + " slots=" + std::to_string(d.slots);
  for (const ScanPiece& p : backward ? schedule_backward(stack, d) : schedule_forward(stack, d)) {
    lines += "\n" + std::string(names[int(p.work)]);
    for (int n : {p.layer, p.direction, p.window, p.lane}) lines += " " + std::to_string(n);
    for (int n : p.after) lines += " " + std::to_string(n);
  }
  return lines;
}

int64_t native_scan_windows(int64_t windows, int64_t walkers) {
  wish().windows = int(windows), wish().walkers = int(walkers);
  return windows;
}

}  // namespace fastseq::cuda
