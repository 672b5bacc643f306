// Attention's kernels called from a test: the arrays of attention_emulated.py in, scratch made and poisoned here.
#include <cstring>
#include <memory>
#include <vector>

#include "attention/cuda/hopper_tile.cuh"
#include "attention/cuda/table.cuh"
#include "entry.h"

namespace fastseq::cuda {
namespace {

struct Reader {
  void* const* p;
  const int64_t* n;
  const double* x;
  template <class T>
  T* pointer() {
    return static_cast<T*>(*p++);
  }
  template <class T>
  void integer(T& to) {
    to = static_cast<T>(*n++);
  }
  void view(View& to) {
    to.data = *p++;
    to.batch = n[0], to.head = n[1], to.row = n[2];
    n += 3;
  }
  void pairs(Pairs& to) {
    to.data = *p++;
    to.batch = n[0], to.head = n[1], to.row = n[2], to.step = n[3];
    n += 4;
  }
};

void read_call(Reader& in, AttentionCall& call) {
  in.integer(call.dtype), in.integer(call.bias_dtype), in.integer(call.sinks_dtype);
  in.integer(call.batch), in.integer(call.heads_q), in.integer(call.heads_k);
  in.integer(call.length_q), in.integer(call.length_k), in.integer(call.dim), in.integer(call.dim_v);
  in.integer(call.causal), in.integer(call.bottom_right);
  in.integer(call.window_left), in.integer(call.window_right);
  in.view(call.q), in.view(call.k), in.view(call.v);
  in.pairs(call.bias), in.pairs(call.mask);
  call.sinks = in.pointer<void>(), call.alibi = in.pointer<float>();
  call.lengths_q = in.pointer<int64_t>(), call.lengths_k = in.pointer<int64_t>();
  call.prefix = in.pointer<int64_t>();
  call.cu_q = in.pointer<int32_t>(), call.cu_k = in.pointer<int32_t>();
  call.seed = in.pointer<int64_t>();
  call.scale = in.x[0], call.softcap = in.x[1], call.dropout_p = in.x[2];
}

// Scratch that is NaN until written.
class Scratch {
 public:
  float* make(int64_t size, bool zero = false) {
    parts_.push_back(std::make_unique<float[]>(size_t(size)));
    std::memset(parts_.back().get(), zero ? 0 : 0xff, size_t(size) * sizeof(float));
    return parts_.back().get();
  }

 private:
  std::vector<std::unique_ptr<float[]>> parts_;
};

void read_forward(Reader& in, AttentionForward& call, Place& place, bool& decode) {
  read_call(in, call);
  in.view(call.o), in.view(call.lse);
  in.integer(decode), in.integer(place.multiprocessors), in.integer(place.capability);
  prepare(call);
}

// Fills in all but the scratch; returns how many numbers the bias has.
int64_t read_backward(Reader& in, AttentionBackward& call, Place& place) {
  read_call(in, call);
  in.view(call.o), in.view(call.d_o), in.view(call.lse), in.view(call.dlse);
  in.view(call.dq), in.view(call.dk), in.view(call.dv);
  call.dbias = in.pointer<void>(), call.dsinks = in.pointer<void>();
  int64_t size = 1;
  for (int32_t& extent : call.bias_size) in.integer(extent), size *= extent;
  in.integer(place.multiprocessors), in.integer(place.capability);
  prepare(call);
  return size;
}

}  // namespace

// Why the kernel for Hopper leaves a call to the portable one.
FASTSEQ_ENTRY(hopper_refusal_entry) {
  Reader in{p, n, x};
  AttentionForward call;
  Place place;
  bool decode = false;
  read_forward(in, call, place, decode);
  return hopper_refusal(call, place);
}

// The same of the backward kernels.
FASTSEQ_ENTRY(attention_backward_refusal_entry) {
  Reader in{p, n, x};
  AttentionBackward call;
  Place place;
  read_backward(in, call, place);
  return hopper_refusal(call, place);
}

FASTSEQ_ENTRY(attention_forward_entry) {
  Reader in{p, n, x};
  AttentionForward call;
  Place place;
  bool decode = false;
  read_forward(in, call, place, decode);
  if (decode) plan_decode(call, place, false);
  if (call.splits == 0) return attention_forward(call, place);
  Scratch scratch;
  const int64_t rows = int64_t(call.batch) * call.heads_q * call.length_q * call.splits;
  call.o_split = scratch.make(rows * call.dim_v), call.lse_split = scratch.make(rows);
  return attention_decode(call, place);
}

FASTSEQ_ENTRY(attention_backward_entry) {
  Reader in{p, n, x};
  AttentionBackward call;
  Place place;
  const int64_t size = read_backward(in, call, place);
  Scratch scratch;
  const int64_t heads = int64_t(call.cu_q != nullptr ? 1 : call.batch) * call.heads_q;
  call.rows = scratch_rows(call);
  call.log = scratch.make(heads * call.rows), call.delta = scratch.make(heads * call.rows);
  if (is_general(call)) call.share = scratch.make(heads * call.rows);
  if (call.dsinks != nullptr) call.sinks_parts = scratch.make(sinks_parts(call) * call.heads_q, true);
  if (call.dbias != nullptr) {
    call.bias_splits = plan_bias(call, place);
    call.dbias_parts = scratch.make(call.bias_splits * size);
  }
  return attention_backward(call, place);
}

namespace attention {
// A block writes its tiles in the order in which it makes them: head of all sequences, and tile; then -1.
template <int kBlock>
FASTSEQ_KERNEL(32, 1) order_kernel(FASTSEQ_IN_PLACE AttentionCall call, FASTSEQ_IN_PLACE Tiling tiling, int32_t* out) {
  if (lane() != 0) return;
  const int rounds = (tiling.tiles * tiling.units + int(nblocks()) - 1) / int(nblocks());
  int32_t* to = out + int(bid()) * 2 * rounds;
  for (int i = 0; i < 2 * rounds; ++i) to[i] = -1;
  for_each_slot<kBlock>(call, tiling, [&](const Slot& slot, const Sequence&) {
    *to++ = slot.b * (tiling.units / call.batch) + slot.h, *to++ = slot.tile;
  });
}
}  // namespace attention

// Which tiles of 128 rows a call's blocks make on Hopper: of the forward kernel, or of the backward kernels (of keys, of queries).
FASTSEQ_ENTRY(hopper_order_entry) {
  Reader in{p, n, x};
  AttentionForward call;
  Place place;
  bool decode = false, of_gradients = false, of_keys = false;
  read_forward(in, call, place, decode);
  in.integer(of_gradients), in.integer(of_keys);
  Launch shape;
  shape.grid.x = unsigned(place.multiprocessors);
  shape.threads = 32;
  const auto tiling = attention::even_tiling(call, of_keys, 128, place.multiprocessors, of_gradients);
  const AttentionCall& all = call;
  return launch(attention::order_kernel<128>, shape, Stream{}, all, tiling, in.pointer<int32_t>());
}

namespace attention {
template <class H, bool kGeneral>
void write_shared(int64_t*& to) {
  const int64_t sizes[4] = {ForwardShape<Bf16, H, kGeneral>::kShared, DecodeShape<Bf16, H, kGeneral>::kShared,
                            KeysShape<Bf16, H, kGeneral>::kShared, QueriesShape<Bf16, H, kGeneral>::kShared};
  for (int64_t kernel = 0; kernel < 4; ++kernel)
    *to++ = kernel + 1, *to++ = H::kDim, *to++ = H::kDimV, *to++ = kGeneral, *to++ = sizes[kernel];
  if (kGeneral) *to++ = 5, *to++ = H::kDim, *to++ = H::kDimV, *to++ = 1, *to++ = BiasShape<Bf16, H>::kShared;
}
template <class H, bool kLarge>
void write_hopper(int64_t*& to) {
  *to++ = 6, *to++ = H::kDim, *to++ = H::kDimV, *to++ = kLarge;
  *to++ = HopperForwardShape<Bf16, H, kLarge>::kShared;
}
template <class H>
void write_hopper_gradients(int64_t*& to) {
  const int64_t sizes[2] = {HopperGradientShape<Bf16, H, true>::kShared, HopperGradientShape<Bf16, H, false>::kShared};
  for (int64_t kernel = 0; kernel < 2; ++kernel)
    *to++ = 7 + kernel, *to++ = H::kDim, *to++ = H::kDimV, *to++ = 0, *to++ = sizes[kernel];
}
template <class... H>
void write_all(int64_t* to) {
  (write_shared<H, false>(to), ...);
  (write_shared<H, true>(to), ...);
  write_hopper<Heads<64, 64>, false>(to), write_hopper<Heads<64, 64>, true>(to);
  write_hopper<Heads<128, 128>, false>(to), write_hopper<Heads<128, 128>, true>(to);
  write_hopper<Heads<192, 128>, false>(to), write_hopper<Heads<256, 256>, false>(to);
  write_hopper_gradients<Heads<64, 64>>(to), write_hopper_gradients<Heads<128, 128>>(to);
  write_hopper_gradients<Heads<192, 128>>(to), write_hopper_gradients<Heads<256, 256>>(to);
  *to = 0;
}
}  // namespace attention

// (kernel, Dk, Dv, general or limited, bytes of shared memory) of every variant, ended by a 0.
FASTSEQ_ENTRY(attention_shared_entry) {
  using namespace attention;
  write_all<Heads<64, 64>, Heads<96, 96>, Heads<128, 128>, Heads<192, 128>, Heads<256, 256>>(static_cast<int64_t*>(p[0]));
  return nullptr;
}

}  // namespace fastseq::cuda
