#include "recurrent/stack.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "core/settings.h"

namespace fastseq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a thread keeps from call to call: fresh memory would fault in all its pages at every step of a training.
thread_local Workspace between[2];       // outputs of the layer before and of this one, in inference
thread_local Workspace gates, hidden;    // dgates and dhidden of a walk back, which go no further than its products
thread_local Workspace inputs_below[2];  // gradients of a layer's input

// A tensor in such memory, up to a size.
Tensor kept(Workspace& memory, std::initializer_list<int64_t> sizes, Dtype dtype, size_t most = Workspace::kKept / 4) {
  size_t bytes = bytes_of(dtype);
  for (int64_t size : sizes) bytes *= size_t(size);
  return bytes <= most ? memory.tensor(sizes, dtype) : empty(sizes, dtype);
}

// A contiguous tensor [T,B,n], of which no one else has a view.
ScanView whole(const Tensor& t, int64_t B, int64_t n) { return {t.data_ptr(), B * n, n, 1}; }

// The scales of an int8 matrix's rows.
ScanView scales(const char* of, AtenTensorHandle given, int64_t rows, bool narrow) {
  const std::string name = std::string("scales of ") + of;
  const ScanView out = narrow ? view(name.c_str(), given, Dtype::f32, {2, rows}) : view(name.c_str(), given, Dtype::f32, {rows});
  FASTSEQ_CHECK(out.e == 1, "scan: scales of ", of, " must be contiguous");
  return out;
}

}  // namespace

Layout layout_of(const char* name) {
  const char* const names[] = {"scan", "layer", "batch_first", "cell"};
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(name, names[i])) return Layout(i);
  refuse("scan: layout must be scan, layer, batch_first or cell, not ", name);
}

OptionalTensor set_lengths(ScanSizes& s, const OptionalTensor& lengths, const OptionalTensor& reset) {
  OptionalTensor dense_lengths;
  if (lengths) {
    FASTSEQ_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 &&
                      lengths->size(0) == s.B,
                  "scan: lengths must be an int64 CPU tensor of shape [", s.B, "]");
    check_readable("lengths", lengths->get());
    dense_lengths = s.B > 1 && lengths->stride(0) != 1 ? torch::stable::contiguous(*lengths) : *lengths;
    s.lengths = static_cast<const int64_t*>(dense_lengths->data_ptr());
  }
  if (reset) {
    FASTSEQ_CHECK(reset->is_cpu() && reset->scalar_type() == ScalarType::Bool && reset->dim() == 2 &&
                      reset->size(0) == s.T && reset->size(1) == s.B,
                  "scan: reset must be a bool CPU tensor of shape [", s.T, ", ", s.B, "]");
    check_readable("reset", reset->get());
    s.reset = static_cast<const bool*>(reset->data_ptr());
    s.reset_t = reset->stride(0), s.reset_b = reset->stride(1);
  }
  return dense_lengths;
}

Stack::Stack(const StackCall& call) : call_(call) {
  ScanForward& p = p_;
  p.cell = call.cell;
  p.dtype = dtype_of(call.x);
  p.threads = int(torch::stable::get_num_threads());
  p.deterministic = is_deterministic();
  rank_ = rank_of(call.x);
  const int64_t *x = sizes_of(call.x), steps = is_cell() ? 0 : 1;
  FASTSEQ_CHECK(rank_ - steps == 2 || (rank_ - steps == 1 && call.layout != Layout::scan),
                "scan: x must be [T, B, I] or [T, I], a cell's [B, I] or [I]");
  batched_ = rank_ - steps == 2, swapped_ = batched_ && call.layout == Layout::batch_first;
  gates_ = gates_of(p.cell), tape_ = tape_of(p.cell);
  directions_ = call.bidirectional ? 2 : 1, rows_ = call.num_layers * directions_;
  const bool one_row = call.layout == Layout::scan || is_cell() || call.reverse;
  FASTSEQ_CHECK(rows_ > 0 && (!one_row || rows_ == 1), "scan: a cell, or a scan, is one layer of one direction");
  width_ = call.weight_count / rows_;
  FASTSEQ_CHECK(width_ >= 2 && width_ <= 5 && width_ * rows_ == call.weight_count,
                "scan: weights must be w_ih, w_hh, biases and projection of each layer and direction");
  biases_ = width_ >= 4, projected_ = width_ % 2 == 1;
  p.weights = weights_of(call.weights[0], p.dtype);
  p.narrow = call.narrow;
  scaled_ = p.weights == Dtype::i8;
  FASTSEQ_CHECK(call.scale_count == (scaled_ ? rows_ * (2 + projected_) : 0),
                "scan: scales must be one [rows] of each int8 matrix, and none without these");
  FASTSEQ_CHECK(lstm() || (!projected_ && !call.c0 && !call.reset_c && !call.keep_c),
                "scan: only an LSTM has w_hr, c0, reset_c and zoneout_c");
  FASTSEQ_CHECK(!call.reset_h || call.reset, "scan: reset_h goes with reset");
  FASTSEQ_CHECK(!call.reset_c || call.reset_h, "scan: reset_c goes with reset_h");
  FASTSEQ_CHECK(!projected_ || !call.keep_c, "scan: there is no zoneout_c beside w_hr");
  const bool packed = p.weights != p.dtype;
  FASTSEQ_CHECK(packed == (call.hidden > 0 && call.outputs > 0),
                "scan: hidden and outputs go with packed weights, and these with them");
  FASTSEQ_CHECK(packed || rank_of(call.weights[1]) == 2, "scan: w_hh must be [G*H, P]");
  const int64_t* w_hh = sizes_of(call.weights[1]);
  p.T = is_cell() ? 1 : x[swapped_ ? 1 : 0], p.B = batched_ ? x[swapped_ ? 0 : steps] : 1, p.I = x[rank_ - 1];
  p.H = packed ? call.hidden : w_hh[0] / gates_, p.P = packed ? call.outputs : w_hh[1];
  FASTSEQ_CHECK(projected_ || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");
  lengths_ = set_lengths(p, call.lengths, call.reset);
  FASTSEQ_CHECK(!call.block.h == !call.block.write && (call.block.h || !call.block.read) &&
                    (!call.block.h || !call.block.c == !lstm()),
                "scan: a block of states has h, an LSTM's c, and the rows to write");
  p.read = places("read", call.block.read), p.write = places("write", call.block.write);
}

// ---- Tensors in the caller's layout.

int64_t Stack::sizes_for(int64_t n, int64_t* sizes, int64_t* strides) const {
  std::copy(sizes_of(call_.x), sizes_of(call_.x) + rank_ - 1, sizes);
  sizes[rank_ - 1] = n, strides[rank_ - 1] = 1;
  for (int64_t i = rank_ - 2, next = n; i >= 0; --i) {
    const int64_t dimension = swapped_ ? rank_ - 2 - i : i;
    strides[dimension] = std::max<int64_t>(1, next), next *= sizes[dimension] ? sizes[dimension] : 1;
  }
  return rank_;
}

Tensor Stack::new_steps(int64_t n) const {
  int64_t sizes[3], strides[3];
  sizes_for(n, sizes, strides);
  return empty(sizes, strides, rank_, p_.dtype);
}

Tensor Stack::laid_out(const Tensor& steps, int64_t n) const {
  int64_t sizes[3], strides[3];
  sizes_for(n, sizes, strides);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(steps.get(), rank_, sizes, strides, 0, &made));
  return Tensor(made);
}

ScanView Stack::steps_of(const char* name, AtenTensorHandle x, int64_t n) const {
  if (!x) return {};
  const int64_t* sizes = sizes_of(call_.x);
  ScanView out = rank_ == 3   ? view(name, x, p_.dtype, {sizes[0], sizes[1], n})
                 : rank_ == 2 ? view(name, x, p_.dtype, {sizes[0], n})
                              : view(name, x, p_.dtype, {n});
  if (rank_ == 2 && !is_cell()) out.t = out.b;
  if (swapped_) std::swap(out.t, out.b);
  return out;
}

ScanView Stack::state_of(const char* name, AtenTensorHandle state, int64_t n, int64_t row) const {
  if (!state) return {};
  if (is_cell() || call_.layout == Layout::scan)
    return batched_ ? view(name, state, p_.dtype, {p_.B, n}) : view(name, state, p_.dtype, {n});
  ScanView out = batched_ ? view(name, state, p_.dtype, {rows_, p_.B, n}) : view(name, state, p_.dtype, {rows_, n});
  return offset(out, row * (batched_ ? out.t : out.b), p_.dtype);
}

Tensor Stack::new_states(int64_t n) const {
  int64_t sizes[3], rank = 0;
  if (!is_cell() && call_.layout != Layout::scan) sizes[rank++] = rows_;
  if (batched_) sizes[rank++] = p_.B;
  sizes[rank++] = n;
  return empty(sizes, rank, p_.dtype);
}

ScanView Stack::row_of(const OptionalTensor& states, int64_t n, int64_t row) const {
  return states ? offset({states->data_ptr(), 0, n, 1}, row * p_.B * n, p_.dtype) : ScanView{};
}

ScanView Stack::keep_of(const char* name, AtenTensorHandle keep, int64_t n, int64_t row) const {
  if (!keep) return {};
  if (call_.layout == Layout::scan) return view(name, keep, p_.dtype, {p_.T, p_.B, n});
  const ScanView first = view(name, keep, p_.dtype, {rows_, p_.T, p_.B, n});
  int64_t* strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(keep, &strides));
  return offset(first, row * strides[0], p_.dtype);
}

void Stack::set_options(ScanSizes& p, int64_t row) const {
  p.mask = state_of("state_mask", call_.state_mask, p.P, row);
  p.reset_h = state_of("reset_h", call_.reset_h, p.P, row);
  p.reset_c = state_of("reset_c", call_.reset_c, p.H, row);
  p.keep_h = keep_of("zoneout_h", call_.keep_h, p.P, row);
  p.keep_c = keep_of("zoneout_c", call_.keep_c, p.H, row);
}

ScanView Stack::block_of(const char* name, AtenTensorHandle block, int64_t n, int64_t row) const {
  if (!block) return {};
  FASTSEQ_CHECK(rank_of(block) == 3 && is_contiguous(block), "scan: a block of ", name, " must be contiguous, [rows, R, n]");
  const ScanView out = view(name, block, p_.dtype, {rows_, sizes_of(call_.block.h)[1], n});
  return offset(out, row * out.t, p_.dtype);
}

const int64_t* Stack::places(const char* name, AtenTensorHandle rows) const {
  if (!rows) return nullptr;
  int32_t code;
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(rows, &code));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(rows, &data));
  FASTSEQ_CHECK(code == aoti_torch_dtype_int64() && rank_of(rows) == 1 && sizes_of(rows)[0] == p_.B && is_contiguous(rows),
                "scan: ", name, " must be a contiguous int64 tensor of shape [", p_.B, "]");
  check_readable(name, rows);
  FASTSEQ_CHECK(rank_of(call_.block.h) == 3, "scan: a block of h must be [rows, R, n]");
  const int64_t* places = static_cast<const int64_t*>(data);
  for (int64_t i = 0, R = sizes_of(call_.block.h)[1]; i < p_.B; ++i)
    FASTSEQ_CHECK(places[i] >= 0 && places[i] < R, "scan: ", name, " must be rows of the block, 0 to ", R - 1, ", not ", places[i]);
  return places;
}

// A matrix of `gates` blocks of `rows` rows of K, as torch has it or packed.
ScanView Stack::matrix(const char* name, AtenTensorHandle w, int64_t gates, int64_t rows, int64_t K) const {
  return p_.weights == p_.dtype ? view(name, w, p_.dtype, {gates * rows, K})
                                : packed_view(name, w, p_.weights, gates, rows, K);
}

void Stack::set_weights(ScanForward& p, int64_t row) const {
  const AtenTensorHandle* w = weights(row);
  p.w_ih = matrix("w_ih", w[0], gates_, p.H, p.I);
  p.w_hh = matrix("w_hh", w[1], gates_, p.H, p.P);
  if (biases_) {
    p.b_ih = view("b_ih", w[2], p.dtype, {gates_ * p.H});
    p.b_hh = view("b_hh", w[3], p.dtype, {gates_ * p.H});
  }
  if (projected_) p.w_hr = matrix("w_hr", w[width_ - 1], 1, p.P, p.H);
  if (!scaled_) return;
  const AtenTensorHandle* s = call_.scales + row * (2 + projected_);
  p.s_ih = scales("w_ih", s[0], gates_ * p.H, p.narrow);
  p.s_hh = scales("w_hh", s[1], gates_ * p.H, p.narrow);
  if (projected_) p.s_hr = scales("w_hr", s[2], p.P, p.narrow);
}

// ---- Forward.

StackResult Stack::run(bool save, bool states) {
  ScanForward p = p_;
  const Dtype dtype = p.dtype;
  const int64_t out = directions_ * p.P, last = call_.num_layers - 1;
  StackResult result;
  if (!is_cell()) result.y = new_steps(out);
  result.h_n = new_states(p.P);
  if (lstm()) result.c_n = new_states(p.H);
  p.x = steps_of("x", call_.x, p.I);
  const ScanView y{result.y ? result.y->data_ptr() : result.h_n->data_ptr(), p.B * out, out, 1};
  for (int64_t layer = 0; layer <= last; ++layer) {
    ScanView target = y;
    if (layer < last && save) {
      result.ys.push_back(empty({p.T, p.B, out}, dtype));
      target = whole(result.ys.back(), p.B, out);
    } else if (layer < last) {
      target.data = between[layer & 1].of(size_t(p.T * p.B * out) * bytes_of(dtype));
    }
    for (int64_t direction = 0; direction < directions_; ++direction) {
      const int64_t row = layer * directions_ + direction;
      p.reverse = direction == 1 || call_.reverse;
      set_weights(p, row);
      p.h_kept = block_of("h", call_.block.h, p.P, row);
      p.c_kept = block_of("c", call_.block.c, p.H, row);
      p.h0 = p.read ? p.h_kept : state_of("h0", call_.h0, p.P, row);
      p.c0 = p.read ? p.c_kept : state_of("c0", call_.c0, p.H, row);
      set_options(p, row);
      p.y = offset(target, direction * p.P, dtype);
      p.h_n = row_of(result.h_n, p.P, row);
      p.c_n = row_of(result.c_n, p.H, row);
      p.states = p.tape = {};
      if (lstm() && (save || (states && layer == last))) {
        result.states.push_back(empty({p.T, p.B, p.H}, accumulator_of(dtype)));
        p.states = whole(result.states.back(), p.B, p.H);
      }
      if (save && tape_) {
        result.tapes.push_back(empty({p.T, p.B, tape_ * p.H}, dtype));
        p.tape = whole(result.tapes.back(), p.B, tape_ * p.H);
      }
      if (p.B > 0 && p.P > 0) run_forward(p);
    }
    p.x = target;
    p.I = out;
  }
  return result;
}

// ---- Backward.

// The gradient of w_hr [P,H]: h_t = W_hr (o_t tanh(c_t)), o being the last block of the tape.
static Tensor projection_gradient(const Tensor& dhidden, AtenTensorHandle tape_handle, AtenTensorHandle states_handle,
                                  int64_t P, int64_t H) {
  AtenTensorHandle own[2];
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tape_handle, &own[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(states_handle, &own[1]));
  Tensor tape(own[0]), states(own[1]);
  const Tensor o = torch::stable::narrow(tape, 2, tape.size(2) - H, H);
  const Tensor shown = torch::stable::to(call_torch("aten::tanh", "", std::array{value(states)}), tape.scalar_type());
  const Tensor h = call_torch("aten::mul", "Tensor", std::array{value(o), value(shown)});
  const Tensor d = torch::stable::view(dhidden, {-1, P});
  return torch::stable::matmul(torch::stable::transpose(d, 0, 1), torch::stable::view(h, {-1, H}));
}

StackInputGradients Stack::run_back(const StackGradient& given) {
  const Dtype dtype = p_.dtype, accumulator = accumulator_of(dtype);
  const int64_t T = p_.T, B = p_.B, H = p_.H, P = p_.P, N = gates_ * H, out = directions_ * P;
  const int64_t last = call_.num_layers - 1;
  FASTSEQ_CHECK(int64_t(given.ys.size()) == last && given.y && int64_t(given.states.size()) == (lstm() ? rows_ : 0) &&
                    int64_t(given.tapes.size()) == (tape_ ? rows_ : 0) &&
                    (given.dstates.empty() || (lstm() && int64_t(given.dstates.size()) == directions_)),
                "scan: the backward pass needs what the forward pass saved, of every layer and direction");
  FASTSEQ_CHECK(lstm() || !given.dc_n, "scan: only an LSTM has dc_n");
  StackInputGradients result;
  if (given.with_starts && call_.h0) result.dh0 = new_states(P);
  if (given.with_starts && call_.c0) result.dc0 = new_states(H);
  if (given.with_starts && call_.reset_h) result.dreset_h = new_states(P);
  if (given.with_starts && call_.reset_c) result.dreset_c = new_states(H);
  result.weights.resize(given.with_weights ? size_t(call_.weight_count) : 0);

  ScanView from_above = steps_of("dy", given.dy, out);
  OptionalTensor above;  // where it lies, below the last layer
  for (int64_t layer = last; layer >= 0; --layer) {
    const int64_t I = inputs(layer);
    const bool with_dx = layer || given.with_dx;
    const ScanView x = layer ? view("ys", given.ys[size_t(layer - 1)], dtype, {T, B, I}) : steps_of("x", call_.x, I);
    const ScanView y =
        layer < last ? view("ys", given.ys[size_t(layer)], dtype, {T, B, out}) : steps_of("y", given.y, out);
    // The gradient of the layer's input: of two directions there are two shares, and dx is the caller's to keep.
    OptionalTensor dx;
    if (with_dx && directions_ == 2) dx = kept(inputs_below[layer & 1], {2, T, B, I}, dtype);
    if (with_dx && directions_ == 1) dx = layer ? kept(inputs_below[layer & 1], {T, B, I}, dtype) : empty({T, B, I}, dtype);
    for (int64_t direction = 0; direction < directions_; ++direction) {
      const size_t row = size_t(layer * directions_ + direction);
      const AtenTensorHandle* w = weights(int64_t(row));
      ScanBackward p{};
      static_cast<ScanSizes&>(p) = p_;
      p.I = I, p.reverse = direction == 1 || call_.reverse;
      if (from_above.data) p.dy = offset(from_above, direction * P * from_above.e, dtype);  // e is 0 of a sum's gradient
      p.dh_n = state_of("dh_n", given.dh_n, P, int64_t(row));
      p.dc_n = state_of("dc_n", given.dc_n, H, int64_t(row));
      if (layer == last && !given.dstates.empty())
        p.dstates = view("dstates", given.dstates[size_t(direction)], accumulator, {T, B, H});
      p.y = offset(y, direction * P * y.e, dtype);
      if (lstm()) p.states = view("states", given.states[row], accumulator, {T, B, H});
      if (tape_) p.tape = view("tape", given.tapes[row], dtype, {T, B, tape_ * H});
      p.w_hh = view("w_hh", w[1], dtype, {N, P});
      if (projected_) p.w_hr = view("w_hr", w[width_ - 1], dtype, {P, H});
      p.h0 = state_of("h0", call_.h0, P, int64_t(row));
      p.c0 = state_of("c0", call_.c0, H, int64_t(row));
      set_options(p, int64_t(row));
      const int64_t beside = p.cell == Cell::gru ? H : projected_ ? P : 0;  // what dhidden holds a row
      const Tensor dgates = kept(gates, {T, B, N}, dtype, Workspace::kKept);
      const Tensor dhidden = kept(hidden, {T, B, beside}, dtype);
      p.dgates = whole(dgates, B, N);
      if (beside) p.dhidden = whole(dhidden, B, beside);
      p.dh0 = row_of(result.dh0, P, int64_t(row));
      p.dc0 = row_of(result.dc0, H, int64_t(row));
      p.dreset_h = row_of(result.dreset_h, P, int64_t(row));
      p.dreset_c = row_of(result.dreset_c, H, int64_t(row));
      if (B > 0 && P > 0) {
        p.workspace = scratch().of(FASTSEQ_DISPATCH(scan_backward_workspace, p));
        FASTSEQ_DISPATCH(scan_backward, p);
      }
      if (!with_dx && !given.with_weights) continue;
      ScanProducts q{};
      static_cast<ScanSizes&>(q) = p;
      q.dgates = p.dgates, q.x = x, q.y = p.y, q.h0 = p.h0;
      if (q.cell == Cell::gru) q.dhidden = p.dhidden;
      if (q.cell == Cell::gru_reset_before) q.tape = p.tape;
      if (with_dx) q.w_ih = view("w_ih", w[0], dtype, {N, I});
      if (with_dx) q.dx = offset(whole(*dx, B, I), direction * T * B * I, dtype);
      OptionalTensor db_ih, db_hh;  // the kernel makes them with the others, without biases too
      if (given.with_weights) {
        Tensor* d = &result.weights[row * size_t(width_)];
        d[0] = empty({N, I}, dtype), d[1] = empty({N, P}, dtype);
        q.dw_ih = {d[0].data_ptr(), 0, I, 1}, q.dw_hh = {d[1].data_ptr(), 0, P, 1};
        db_ih = empty({N}, dtype), db_hh = empty({N}, dtype);
        q.db_ih.data = db_ih->data_ptr(), q.db_hh.data = db_hh->data_ptr();
        if (biases_) d[2] = *db_ih, d[3] = *db_hh;
        if (projected_) d[width_ - 1] = projection_gradient(dhidden, given.tapes[row], given.states[row], P, H);
      }
      q.workspace = scratch().of(FASTSEQ_DISPATCH(scan_products_workspace, q));
      FASTSEQ_DISPATCH(scan_products, q);
    }
    if (!with_dx) break;
    if (directions_ == 2) {
      const int64_t over[] = {0};
      dx = torch::stable::sum(*dx, torch::headeronly::IntHeaderOnlyArrayRef(over, 1), false);
    }
    above = dx, from_above = whole(*dx, B, I);
    if (layer == 0) result.dx = laid_out(*dx, I);
  }
  return result;
}

}  // namespace fastseq
