// torch.ops.fastseq.scan_*.native on a GPU: tensors into the structs of recurrent.h, products by torch.
// The schemas, with every shape, are in fastseq/ops/schemas.py. The tests' emulated machine has the same operators on the CPU.
#include "recurrent/cuda/call.h"

#include <algorithm>

namespace fastseq::cuda {

void step_forward_all(Call& call, const ScanForward& a, const Tensor& w_hh) {
  const int G = gates_of(call.cell);
  const bool twice = call.cell == ScanCell::gru_reset_before;
  const int first = twice ? 2 : G;  // gates of the first product
  const int64_t B = a.B, H = a.H;
  const Tensor state = call.empty({B, H}, ScalarType::Float), cell_state = call.empty({B, H}, ScalarType::Float);
  const Tensor kept = twice ? call.empty({B, H}, ScalarType::Float) : state, operand = call.empty({B, H});
  const Tensor product = call.empty({B, first * H}, ScalarType::Float);
  const Tensor again = twice ? call.empty({B, H}, ScalarType::Float) : product;
  const Tensor w_first = torch::stable::transpose(rows_of(w_hh, 0, first * H), 0, 1);
  const Tensor w_again = twice ? torch::stable::transpose(rows_of(w_hh, 2 * H, H), 0, 1) : w_first;
  ScanStep s;
  s.state = floats(state), s.cell_state = floats(cell_state), s.kept = floats(kept), s.operand = operand.data_ptr();
  s.step = -1;
  call.check(step_forward(a, call.cell, call.number.dtype, s, call.stream()));
  for (s.step = 0; s.step < a.T; ++s.step) {
    multiply(operand, w_first, product);
    s.phase = 0, s.product = floats(product);
    call.check(step_forward(a, call.cell, call.number.dtype, s, call.stream()));
    if (!twice) continue;
    multiply(operand, w_again, again);
    s.phase = 1, s.product = floats(again);
    call.check(step_forward(a, call.cell, call.number.dtype, s, call.stream()));
  }
}

void step_backward_all(Call& call, const ScanBackward& a, const Tensor& w_hh) {
  const int G = gates_of(call.cell);
  const bool twice = call.cell == ScanCell::gru_reset_before;
  const int last = twice ? 2 : G;  // gates of the product that ends a step
  const int64_t B = a.B, H = a.H;
  const Tensor state = call.empty({B, H}, ScalarType::Float), cell_state = call.empty({B, H}, ScalarType::Float);
  const Tensor kept = twice ? call.empty({B, H}, ScalarType::Float) : state, product = call.empty({B, H}, ScalarType::Float);
  const Tensor operand = call.empty({B, last * H}), candidate = twice ? call.empty({B, H}) : operand;
  const Tensor w_last = rows_of(w_hh, 0, last * H), w_candidate = twice ? rows_of(w_hh, 2 * H, H) : w_last;
  ScanStep s;
  s.state = floats(state), s.cell_state = floats(cell_state), s.kept = floats(kept), s.product = floats(product);
  for (s.step = 0; s.step < a.T; ++s.step) {
    s.phase = 0, s.operand = candidate.data_ptr();
    call.check(step_backward(a, call.cell, call.number.dtype, s, call.stream()));
    if (twice) {
      multiply(candidate, w_candidate, product);
      s.phase = 1, s.operand = operand.data_ptr();
      call.check(step_backward(a, call.cell, call.number.dtype, s, call.stream()));
    }
    if (s.step + 1 < a.T || a.dh0 || a.options.dreset_h) multiply(operand, w_last, product);
  }
  s.phase = 0;
  if (a.dh0 || a.dc0 || a.options.dreset_h) call.check(step_backward(a, call.cell, call.number.dtype, s, call.stream()));
}

// ---- The operators.

void check_cell(ScanCell cell, const Optional& w_hr, std::initializer_list<Optional> cs) {
  STD_TORCH_CHECK(!w_hr, "scan: the native CUDA kernels have no projection (w_hr)");
  for (const Optional& c : cs) STD_TORCH_CHECK(has_c(cell) || !c, "scan: only an LSTM has c0, reset_c and zoneout_c");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_forward_cuda(
    const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
    const Optional& w_hr, const Optional& h0, const Optional& c0, const Optional& reset_h,
    const Optional& reset_c, const Optional& lengths, const Optional& reset, const Optional& state_mask,
    const Optional& zoneout_h, const Optional& zoneout_c, int64_t cell, bool reverse, bool save, bool states) {
  Call call(x, cell);
  check_cell(call.cell, w_hr, {c0, reset_c, zoneout_c});
  const int64_t G = gates_of(call.cell);
  const bool lstm = has_c(call.cell);
  STD_TORCH_CHECK(x.dim() == 3 && w_hh.dim() == 2, "scan: x must be [T, B, I] and w_hh [G*H, H]");
  const int64_t T = x.size(0), B = x.size(1), H = w_hh.size(1);
  const bool with_states = lstm && (save || states), with_tape = save && tape_of(call.cell) > 0;
  Tensor y = call.empty({T, B, H}), h_n = call.empty({B, H});
  Tensor c_n = lstm ? call.empty({B, H}) : call.empty({0});
  Tensor c_all = with_states ? call.empty({T, B, H}, ScalarType::Float) : call.empty({0});
  Tensor tape = with_tape ? call.empty({T, B, tape_of(call.cell) * H}) : call.empty({0});
  if (T == 0 || B == 0 || H == 0) return {y, h_n, c_n, c_all, tape};

  ScanForward a{};
  call.walk(a, T, B, H, reverse, lengths, reset);
  a.options = {call.pointer("state_mask", state_mask, {B, H}),
               call.pointer("reset_h", reset_h, {B, H}),
               call.pointer("reset_c", reset_c, {B, H}),
               call.share("zoneout_h", zoneout_h, {T, B, H}),
               call.share("zoneout_c", zoneout_c, {T, B, H})};
  const Tensor& w = call.dense("w_hh", w_hh, {G * H, H});
  a.w_hh = w.data_ptr();
  a.b_hh = call.pointer("b_hh", b_hh, {G * H});
  a.h0 = call.pointer("h0", h0, {B, H});
  a.c0 = call.pointer("c0", c0, {B, H});
  // One product for all steps, laid out as x is.
  const bool batch_first = !x.is_contiguous() && torch::stable::transpose(x, 0, 1).is_contiguous();
  const Tensor in_rows = batch_first ? torch::stable::transpose(x, 0, 1) : torch::stable::contiguous(x);
  const Tensor gates_x = linear(in_rows, call.dense("w_ih", w_ih, {G * H, x.size(2)}),
                                b_ih ? Optional(call.dense("b_ih", *b_ih, {G * H})) : Optional());
  a.gates_x = gates_x.data_ptr();
  a.x_t = batch_first ? 1 : int(B), a.x_b = batch_first ? int(T) : 1;
  a.y = y.data_ptr(), a.y_t = int(B), a.y_b = 1, a.h_n = h_n.data_ptr();
  if (lstm) a.c_n = c_n.data_ptr();
  if (with_states) a.states = floats(c_all);
  if (with_tape) a.tape = tape.data_ptr();

  const ScanPlan plan = call.plan(false, a);
  if (plan.role == ScanRole::step) {
    step_forward_all(call, a, w);
  } else {
    const Tensor workspace = call.zeroes(plan.workspace);
    call.check(scan_forward(a, call.cell, call.number, plan, workspace.data_ptr(), call.stream()));
  }
  return {y, h_n, c_n, c_all, tape};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward_cuda(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& y,
    const Optional& states, const Optional& tape, const Tensor& w_hh, const Optional& w_hr, const Optional& h0,
    const Optional& c0, const Optional& reset_h, const Optional& reset_c, const Optional& lengths, const Optional& reset,
    const Optional& state_mask, const Optional& zoneout_h, const Optional& zoneout_c, int64_t cell, bool reverse) {
  Call call(y, cell);
  check_cell(call.cell, w_hr, {c0, reset_c, zoneout_c});
  const int64_t G = gates_of(call.cell);
  const bool lstm = has_c(call.cell);
  STD_TORCH_CHECK((tape || tape_of(call.cell) == 0) && (states || !lstm),
                  "scan: this cell's backward pass needs its tape, an LSTM's its states");
  STD_TORCH_CHECK(lstm || (!dc_n && !dstates), "scan: only an LSTM has dc_n and dstates");
  STD_TORCH_CHECK(y.dim() == 3, "scan: y must be [T, B, H]");
  const int64_t T = y.size(0), B = y.size(1), H = y.size(2);
  Tensor dgates = call.empty({T, B, G * H});
  Tensor dhidden = call.cell == ScanCell::gru ? call.empty({T, B, H}) : call.empty({0});
  Tensor dh0 = h0 ? call.empty({B, H}) : call.empty({0}), dc0 = c0 ? call.empty({B, H}) : call.empty({0});
  const ResetGradient dreset_h(call, reset_h.has_value(), {B, H}), dreset_c(call, reset_c.has_value(), {B, H});
  if (T == 0 || B == 0 || H == 0) return {dgates, dhidden, dh0, dc0, dreset_h.give(call), dreset_c.give(call)};

  ScanBackward a{};
  call.walk(a, T, B, H, reverse, lengths, reset);
  a.options = {call.pointer("state_mask", state_mask, {B, H}),
               call.pointer("reset_h", reset_h, {B, H}),
               call.pointer("reset_c", reset_c, {B, H}),
               call.share("zoneout_h", zoneout_h, {T, B, H}),
               call.share("zoneout_c", zoneout_c, {T, B, H})};
  const Tensor& w = call.dense("w_hh", w_hh, {G * H, H});
  a.w_hh = w.data_ptr();
  a.h0 = call.pointer("h0", h0, {B, H});
  a.c0 = call.pointer("c0", c0, {B, H});
  if (dy) {
    STD_TORCH_CHECK(dy->dim() == 3 && dy->size(0) == T && dy->size(1) == B && dy->size(2) == H &&
                        dy->scalar_type() == y.scalar_type(),
                    "scan: dy must be of y's shape and dtype");
    a.dy = call.rows(*dy, a.x_t, a.x_b);
  }
  a.dh_n = call.pointer("dh_n", dh_n, {B, H});
  a.dc_n = call.pointer("dc_n", dc_n, {B, H});
  a.dstates = static_cast<const float*>(call.pointer("dstates", dstates, {T, B, H}, ScalarType::Float));
  a.y = call.dense("y", y, {T, B, H}).data_ptr(), a.y_t = int(B), a.y_b = 1;
  if (tape_of(call.cell) > 0) a.tape = call.pointer("tape", tape, {T, B, tape_of(call.cell) * H});
  if (lstm) a.states = static_cast<const float*>(call.pointer("states", states, {T, B, H}, ScalarType::Float));
  a.dgates = dgates.data_ptr();
  if (call.cell == ScanCell::gru) a.dhidden = dhidden.data_ptr();
  if (h0) a.dh0 = dh0.data_ptr();
  if (c0) a.dc0 = dc0.data_ptr();
  a.options.dreset_h = dreset_h.from(0), a.options.dreset_c = dreset_c.from(0);

  const ScanPlan plan = call.plan(true, a);
  if (plan.role == ScanRole::step) {
    step_backward_all(call, a, w);
  } else {
    const Tensor workspace = call.zeroes(plan.workspace);
    call.check(scan_backward(a, call.cell, call.number, plan, workspace.data_ptr(), call.stream()));
  }
  return {dgates, dhidden, dh0, dc0, dreset_h.give(call), dreset_c.give(call)};
}

static const std::string kRoles[] = {"step", "grid", "cluster", "cluster_barrier"};  // as ScanRole has them

std::string native_scan_plan(StringHandle cell, StringHandle dtype_name, bool backward, int64_t H, int64_t B,
                             const std::vector<int64_t>& device) {
  const std::string name = take_text(cell), dtype = take_text(dtype_name);
  const ScanNumber number{dtype == "bf16" ? Dtype::bf16 : dtype == "fp16" ? Dtype::f16 : Dtype::f32, dtype == "tf32"};
  const ScanProblem problem{cell_of(name), number, backward, int(H), int(B)};
  ScanPlan plan;
  if (device.empty()) {
    plan = device_plan(kEmulated ? 0 : torch::stable::accelerator::getCurrentDeviceIndex(), problem);
  } else {
    STD_TORCH_CHECK(device.size() == 3, "native_scan_plan: device must be [major, multiprocessors, shared memory]");
    plan = make_plan({int(device[0]), 0, int(device[1]), size_t(device[2]), size_t(device[2]) + 1024, true}, problem,
                     wish());
  }
  std::string line = std::string("role=") + kRoles[int(plan.role)];
  const auto add = [&](const char* name, int64_t n) { line += std::string(" ") + name + "=" + std::to_string(n); };
  if (plan.role != ScanRole::step) {
    add("blocks", plan.shape.blocks), add("groups", plan.shape.groups), add("units", plan.shape.units);
    add("rows", plan.shape.columns), add("threads", plan.launch.threads), add("shared", plan.layout.shared);
    add("tiles", plan.layout.tiles), add("stored", plan.layout.stored), add("workspace", int64_t(plan.workspace));
  }
  return line + (plan.reason.empty() ? "" : " reason=" + plan.reason);
}

std::string native_scan_role(StringHandle name, int64_t blocks, int64_t threads, int64_t rows) {
  const std::string role = take_text(name);
  const auto known = std::find(std::begin(kRoles), std::end(kRoles), role);
  STD_TORCH_CHECK(known != std::end(kRoles) || role.empty(),
                  "native_scan_role: step, grid, cluster, cluster_barrier or '', not ", role);
  const int found = role.empty() ? -1 : int(known - std::begin(kRoles));
  wish() = ScanWish{found, int(blocks), int(threads), int(rows)};
  return role;
}

}  // namespace fastseq::cuda
