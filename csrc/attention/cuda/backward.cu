// Attention's backward: what each row of o needs (delta, lse), the sinks' gradient, and the order of the parts: dq comes
// first, since it settles the rows' share and delta for the others.
#include "attention/cuda/gradient.cuh"

namespace fastseq::cuda {
namespace attention {

constexpr int kRowThreads = 128;

// log and delta of kRowBlock rows, as lse and o have them.
template <class T>
FASTSEQ_KERNEL(kRowThreads, 1) rows_kernel(FASTSEQ_IN_PLACE AttentionBackward call, Tiling tiling) {
  const Slot slot = find_slot<kRowBlock>(call, tiling, int(bid()));
  const Sequence own(call, slot.b);
  const int i0 = slot.tile * kRowBlock;
  if (i0 >= own.rows) return;
  const T* o = at<T>(call.o, slot.b, slot.h, own.q_row);
  const T* d_o = at<T>(call.d_o, slot.b, slot.h, own.q_row);
  const float* lse = at<float>(call.lse, slot.b, slot.h, own.q_row);
  const float* dlse = call.dlse.data != nullptr ? at<float>(call.dlse, slot.b, slot.h, own.q_row) : nullptr;
  const int64_t scratch = scratch_of(call, own, slot.b, slot.h);

  // A row is shared by `lanes` lanes, eight columns each.
  const int lanes = call.dim_v <= 64 ? 8 : call.dim_v <= 128 ? 16 : 32;
  const int column = int(lane()) % lanes * 8;
  for (int r = int(lane()) / lanes; r < 32; r += 32 / lanes) {
    const int i = i0 + 32 * int(warp()) + r;
    const bool real = i < own.tq;
    float delta = 0;
    if (real && column < call.dim_v) {
      const T* a = o + i * call.o.row + column;
      const T* b = d_o + i * call.d_o.row + column;
      if (call.aligned) {
        const uint4 x = *reinterpret_cast<const uint4*>(a), y = *reinterpret_cast<const uint4*>(b);
        const uint32_t u[4] = {x.x, x.y, x.z, x.w}, w[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 p = unpack2<T>(u[e]), q = unpack2<T>(w[e]);
          delta += p.x * q.x + p.y * q.y;
        }
      } else {
        for (int e = 0; e < 8 && column + e < call.dim_v; ++e) delta += to_float(a[e]) * to_float(b[e]);
      }
    }
    for (int mask = 1; mask < lanes; mask *= 2) delta += shfl_xor(delta, unsigned(mask));
    const float log = real ? lse[i] : -kInfinity;
    if (real && dlse != nullptr) delta -= dlse[i];
    const bool empty = log == -kInfinity;
    if (empty) delta = 0;
    if (column == 0) {
      call.log[scratch + i] = empty ? kInfinity : log * kLog2e;
      call.delta[scratch + i] = delta;
      if (call.share != nullptr) call.share[scratch + i] = 0;
    }
  }
}

// The part of kRowBlock rows in the sinks' gradient, a row a thread.
FASTSEQ_KERNEL(kRowBlock, 1) sink_rows_kernel(FASTSEQ_IN_PLACE AttentionBackward call, Tiling tiling) {
  const Slot slot = find_slot<kRowBlock>(call, tiling, int(bid()));
  const Sequence own(call, slot.b);
  if (slot.tile * kRowBlock >= own.rows) return;
  const int64_t row = scratch_of(call, own, slot.b, slot.h) + slot.tile * kRowBlock + tid();
  const float share = call.share != nullptr ? call.share[row] : 1.0f;
  float* parts = reinterpret_cast<float*>(shared_memory());
  parts[tid()] =
      -ex2(number_at(call.sinks, call.sinks_dtype, slot.h) * kLog2e - call.log[row]) * share * call.delta[row];
  sync_block();
  if (tid() != 0) return;
  float sum = 0;
  for (int n = 0; n < kRowBlock; ++n) sum += parts[n];
  const int64_t part = call.cu_q != nullptr ? slot.slot : int64_t(slot.b) * tiling.tiles + slot.slot;
  call.sinks_parts[part * call.heads_q + slot.h] = sum;
}

// A warp sums one head's parts.
FASTSEQ_KERNEL(32, 1) sinks_kernel(FASTSEQ_IN_PLACE AttentionBackward call, int64_t parts) {
  const int h = int(bid());
  float sum = 0;
  for (int64_t n = lane(); n < parts; n += 32) sum += call.sinks_parts[n * call.heads_q + h];
  for (unsigned mask = 1; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);
  if (lane() == 0) put_number(call.dsinks, call.sinks_dtype, h, sum);
}

template <class T>
const char* launch_rows(const AttentionBackward& call, Stream stream) {
  const Tiling tiling = tiling_of(call, false, kRowBlock);
  Launch shape;
  shape.grid.x = unsigned(tiling.blocks());
  shape.threads = kRowThreads;
  return launch(rows_kernel<T>, shape, stream, call, tiling);
}

}  // namespace attention

const char* attention_backward_rows(const AttentionBackward& call, const Place& place) {
  using namespace attention;
  const Stream stream = static_cast<Stream>(place.stream);
  return call.dtype == Dtype::bf16 ? launch_rows<Bf16>(call, stream) : launch_rows<Fp16>(call, stream);
}

const char* attention_backward_sinks(const AttentionBackward& call, const Place& place) {
  using namespace attention;
  const Stream stream = static_cast<Stream>(place.stream);
  const Tiling tiling = tiling_of(call, false, kRowBlock);
  Launch rows;
  rows.grid.x = unsigned(tiling.blocks());
  rows.threads = kRowBlock;
  rows.shared = kRowBlock * sizeof(float);
  const char* error = launch(sink_rows_kernel, rows, stream, call, tiling);
  if (error != nullptr) return error;
  Launch shape;
  shape.grid.x = unsigned(call.heads_q);
  shape.threads = 32;
  return launch(sinks_kernel, shape, stream, call, sinks_parts(call));
}

const char* attention_backward(const AttentionBackward& call, const Place& place) {
  const bool nobody = (call.batch == 0 && call.cu_q == nullptr) || call.heads_q == 0;
  const bool queries = !nobody && call.length_q > 0, keys = !nobody && call.length_k > 0;
  const bool hopper = queries && keys && hopper_refusal(call, place) == nullptr;
  const char* error = nullptr;
  if (queries) error = attention_backward_rows(call, place);
  if (error == nullptr && queries)
    error = hopper ? attention_hopper_backward(call, place, false) : attention_backward_queries(call, place);
  if (error == nullptr && keys)
    error = hopper ? attention_hopper_backward(call, place, true) : attention_backward_keys(call, place);
  if (error == nullptr && queries && call.dsinks != nullptr) error = attention_backward_sinks(call, place);
  if (error == nullptr && queries && keys && call.dbias != nullptr) error = attention_backward_bias(call, place);
  return error;
}

}  // namespace fastseq::cuda
