// Inference in one call (inference.h), and torch.ops.fastseq.pack_weights, which lays its weights down.
#include "recurrent/inference.h"
#include "core/ops.h"

#include <algorithm>
#include <cstring>

namespace fastseq {
namespace {

using torch::stable::Tensor;

// Row `index` of an initial state [rows, B, N], or [rows, N] where B is not a dimension; of a cell [B, N] or [N]. All zeros
// if absent.
ScanView state_row(const char* name, AtenTensorHandle state, Dtype dtype, int64_t rows, int64_t B, int64_t N,
                   bool is_cell, bool batched, int64_t index) {
  if (!state) return {};
  if (is_cell) return batched ? view(name, state, dtype, {B, N}) : view(name, state, dtype, {N});
  ScanView out = batched ? view(name, state, dtype, {rows, B, N}) : view(name, state, dtype, {rows, N});
  return offset(out, index * (batched ? out.t : out.b), dtype);
}

// A matrix of `gates` blocks of `rows` rows of K, as torch has it or packed.
ScanView matrix_view(const ScanForward& p, const char* name, AtenTensorHandle w, int64_t gates, int64_t rows,
                     int64_t K) {
  return p.weights == p.dtype ? view(name, w, p.weights, {gates * rows, K})
                              : packed_view(name, w, p.weights, gates, rows, K);
}

// The scales of an int8 matrix's rows.
ScanView scales(const char* of, AtenTensorHandle given, int64_t rows) {
  if (!given) return {};
  ScanView out = view((std::string("scales of ") + of).c_str(), given, Dtype::f32, {rows});
  FASTSEQ_CHECK(out.e == 1, "scan: scales of ", of, " must be contiguous");
  return out;
}

thread_local Workspace between[2];  // outputs of the layer before and of this one

}  // namespace

Layout layout_of(const char* name) {
  const char* const names[] = {"scan", "layer", "batch_first", "cell"};
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(name, names[i])) return Layout(i);
  refuse("scan: layout must be scan, layer, batch_first or cell, not ", name);
}

Stack::Stack(const StackCall& call) : call_(call) {
  ScanForward& p = p_;
  p.cell = call.cell;
  p.dtype = dtype_of(call.x);
  p.threads = int(torch::stable::get_num_threads());
  const int64_t rank = rank_ = rank_of(call.x), *x = sizes_of(call.x), steps = is_cell() ? 0 : 1;
  FASTSEQ_CHECK(rank - steps == 1 || rank - steps == 2, "scan: x must be [T, B, I] or [T, I], a cell's [B, I] or [I]");
  FASTSEQ_CHECK(call.layout != Layout::scan && (!is_cell() || (call.num_layers == 1 && !call.bidirectional)),
                "scan: inference is of layers, or of one cell");
  batched_ = rank - steps == 2, swapped_ = batched_ && call.layout == Layout::batch_first;
  gates_ = gates_of(p.cell), directions_ = call.bidirectional ? 2 : 1, rows_ = call.num_layers * directions_;
  width_ = rows_ > 0 ? call.weight_count / rows_ : 0;
  FASTSEQ_CHECK(width_ >= 2 && width_ <= 5 && width_ * rows_ == call.weight_count,
                  "scan: weights must be w_ih, w_hh, biases and projection of each layer and direction");
  biases_ = width_ >= 4, projected_ = width_ % 2 == 1;
  p.weights = weights_of(call.weights[0], p.dtype);
  scaled_ = p.weights == Dtype::i8;
  FASTSEQ_CHECK(call.scale_count == (scaled_ ? rows_ * (2 + projected_) : 0),
                  "scan: scales must be one [rows] of each int8 matrix, and none without these");
  FASTSEQ_CHECK(lstm() || (!projected_ && !call.c0), "scan: only an LSTM has w_hr and c0");
  const bool packed = p.weights != p.dtype;
  FASTSEQ_CHECK(packed == (call.hidden > 0 && call.outputs > 0),
                  "scan: hidden and outputs go with packed weights, and these with them");
  FASTSEQ_CHECK(packed || rank_of(call.weights[1]) == 2, "scan: w_hh must be [G*H, P]");
  const int64_t* w_hh = sizes_of(call.weights[1]);
  p.T = is_cell() ? 1 : x[swapped_ ? 1 : 0], p.B = batched_ ? x[swapped_ ? 0 : steps] : 1, p.I = x[rank - 1];
  p.H = packed ? call.hidden : w_hh[0] / gates_, p.P = packed ? call.outputs : w_hh[1];
  FASTSEQ_CHECK(p.T > 0, "scan: x has no time steps");
  FASTSEQ_CHECK(projected_ || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");

  int64_t i = 0, j = 0;
  for (int64_t n = 0; n < rank - 1; ++n) y_sizes[i++] = x[n];
  y_sizes[i] = directions_ * p.P;
  // Steps come first in memory, as of torch's layers.
  y_strides[i] = 1;
  for (int64_t n = rank - 2, next = y_sizes[i]; n >= 0; --n) {
    const int64_t dimension = swapped_ ? rank - 2 - n : n;
    y_strides[dimension] = next, next *= std::max<int64_t>(1, y_sizes[dimension]);
  }
  if (!is_cell()) h_sizes[j++] = rows_;
  if (batched_) h_sizes[j++] = p.B;
  h_sizes[j] = p.P;
  for (int64_t n = 0; n < rank; ++n) c_sizes[n] = h_sizes[n];
  c_sizes[j] = p.H;
}

int64_t Stack::products() const { return p_.T * p_.B * (p_.I + p_.P) * p_.H * gates_ * rows_; }

void Stack::run(void* y, void* h_n, void* c_n) {
  ScanForward& p = p_;
  const Dtype dtype = p.dtype;
  const int64_t out = directions_ * p.P, *x = sizes_of(call_.x);
  p.x = rank_ == 3   ? view("x", call_.x, dtype, {x[0], x[1], p.I})
        : rank_ == 2 ? view("x", call_.x, dtype, {x[0], p.I})
                     : view("x", call_.x, dtype, {p.I});
  if (rank_ == 2 && !is_cell()) p.x.t = p.x.b;
  if (swapped_) std::swap(p.x.t, p.x.b);
  if (p.B == 0 || p.P == 0) return;
  if (is_cell()) y = h_n;  // after one step they are the same

  const ScanView result{y, p.B * out, out, 1};
  for (int64_t layer = 0; layer < call_.num_layers; ++layer) {
    ScanView target = result;
    if (layer + 1 < call_.num_layers) {
      void* rows = between[layer & 1].of(size_t(p.T * p.B * out) * bytes_of(dtype));
      target = {rows, p.B * out, out, 1};
    }
    for (int64_t direction = 0; direction < directions_; ++direction) {
      const int64_t index = layer * directions_ + direction;
      const AtenTensorHandle* w = call_.weights + index * width_;
      p.reverse = direction == 1;
      p.w_ih = matrix_view(p, "w_ih", w[0], gates_, p.H, p.I);
      p.w_hh = matrix_view(p, "w_hh", w[1], gates_, p.H, p.P);
      if (biases_) {
        p.b_ih = view("b_ih", w[2], dtype, {gates_ * p.H});
        p.b_hh = view("b_hh", w[3], dtype, {gates_ * p.H});
      }
      if (projected_) p.w_hr = matrix_view(p, "w_hr", w[width_ - 1], 1, p.P, p.H);
      if (scaled_) {
        const AtenTensorHandle* s = call_.scales + index * (2 + projected_);
        p.s_ih = scales("w_ih", s[0], gates_ * p.H);
        p.s_hh = scales("w_hh", s[1], gates_ * p.H);
        if (projected_) p.s_hr = scales("w_hr", s[2], p.P);
      }
      p.h0 = state_row("h0", call_.h0, dtype, rows_, p.B, p.P, is_cell(), batched_, index);
      p.c0 = state_row("c0", call_.c0, dtype, rows_, p.B, p.H, is_cell(), batched_, index);
      p.y = offset(target, direction * p.P, dtype);
      p.h_n = offset({h_n, 0, p.P, 1}, index * p.B * p.P, dtype);
      if (lstm()) p.c_n = offset({c_n, 0, p.H, 1}, index * p.B * p.H, dtype);
      run_forward(p);
    }
    p.x = target;
    p.I = out;
  }
}

// Element by element, as the layout says: done once, not in a call.
Tensor pack_weights_cpu(const Tensor& w, int64_t gates, int64_t apart) {
  const Dtype dtype = weights_of(w.get(), Dtype::f32);
  FASTSEQ_CHECK(dtype != Dtype::f32 && w.is_cpu() && w.dim() == 2,
                  "pack_weights: w must be a matrix of bfloat16 or int8 on the CPU");
  FASTSEQ_CHECK(gates > 0 && apart >= 0 && w.size(0) % (gates + apart) == 0,
                  "pack_weights: w must have gates + apart blocks of rows, got ", w.size(0), " rows");
  check_readable("w", w.get());
  const int64_t size = int64_t(bytes_of(dtype)), H = w.size(0) / (gates + apart), K = w.size(1);
  const ScanPacked layout{FASTSEQ_DISPATCH(scan_lanes), 4 / size};
  const int64_t words = layout.words(K), rows = layout.vectors(H) * words * (gates + apart);
  Tensor packed = empty({rows, layout.lanes, layout.word}, dtype);
  char* to = static_cast<char*>(packed.data_ptr());
  const char* from = static_cast<const char*>(w.data_ptr());
  std::memset(to, 0, size_t(rows * layout.lanes * 4));
  const int64_t blocks[][2] = {{0, gates}, {gates, apart}};  // first gate, gates
  for (const auto& [first, count] : blocks) {
    for (int64_t g = 0; g < count; ++g)
      for (int64_t unit = 0; unit < H; ++unit) {
        const int64_t v = unit / layout.lanes, lane = unit % layout.lanes;
        const char* row = from + ((first + g) * H + unit) * w.stride(0) * size;
        for (int64_t k = 0; k < K; ++k)
          std::memcpy(to + (((v * words + k / layout.word) * count + g) * layout.lanes + lane) * 4 +
                          k % layout.word * size,
                      row + k * w.stride(1) * size, size_t(size));
      }
    to += layout.vectors(H) * words * count * layout.lanes * 4;
  }
  return packed;
}

}  // namespace fastseq
