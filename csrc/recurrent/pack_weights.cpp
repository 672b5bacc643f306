// torch.ops.fastseq.pack_weights: a matrix of a smaller type, laid down as the kernels of inference read it.
#include <cstring>

#include "core/ops.h"
#include "recurrent/marshal.h"

namespace fastseq {

using torch::stable::Tensor;

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
