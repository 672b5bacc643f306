// Random calls of attention, forward and backward: dense and packed, every option, 1 to 3 threads.
#include "attention/cpu/attention.h"

#include "harness.h"

namespace driver {
namespace {

using fastseq::AttentionBackward;
using fastseq::AttentionCall;
using fastseq::AttentionForward;
using fastseq::Pairs;
using fastseq::View;

struct Problem {
  Dtype dtype, bias_dtype, sinks_dtype;
  int64_t B, Hq, Hk, Tq, Tk, D, Dv;  // packed: Tq, Tk of the longest sequence
  int64_t rows_q, rows_k;            // of all sequences
  bool packed, time_major;
  int threads;
  std::vector<int32_t> cu_q, cu_k;
  std::vector<int64_t> lengths_q, lengths_k, prefix;
  int64_t bias_size[4] = {}, mask_size[4] = {};
  Array q, k, v, bias, sinks, alibi, d_o, dlse;
  std::shared_ptr<unsigned char[]> mask;
  AttentionCall options{};
  int64_t seed;
  int64_t page = 0;  // not 0: the forward pass runs once more with keys and values in pages of so many
  std::vector<int32_t> table;
  std::shared_ptr<int8_t[]> small_k, small_v;  // the forward pass runs once more with these, times scales
  Array k_scale, v_scale;

  explicit Problem(Random& random) {
    dtype = Dtype(random.below(4));
    B = random.pick({1, 1, 2, 3});
    Hk = random.pick({1, 1, 2, 3});
    Hq = Hk * random.pick({1, 1, 2, 4});
    Tq = random.pick({1, 1, 2, 7, 9, 17, 33, 65, 130});
    Tk = random.chance(0.4) ? Tq : random.pick({1, 2, 7, 17, 31, 65, 129, 200});
    D = random.pick({1, 3, 8, 16, 17, 33, 64, 65, 129});
    Dv = random.chance(0.6) ? D : random.pick({1, 5, 16, 31, 64, 72});
    packed = random.chance(0.25);
    time_major = random.chance(0.3);
    threads = int(1 + random.below(3));
    rows_q = Tq, rows_k = Tk;
    if (packed) {
      rows_q = draw_offsets(random, Tq, cu_q);
      rows_k = draw_offsets(random, Tk, cu_k);
    } else {
      if (random.chance(0.25)) lengths_q = draw_lengths(random, Tq);
      if (random.chance(0.35)) lengths_k = draw_lengths(random, Tk);
    }
    if (random.chance(0.2)) prefix = draw_lengths(random, Tk);
    const int64_t batches = packed ? 1 : B;
    q = random.array(dtype, batches * Hq * rows_q * D, 1);
    k = random.array(dtype, batches * Hk * rows_k * D, 1);
    v = random.array(dtype, batches * Hk * rows_k * Dv, 1);
    d_o = random.array(dtype, batches * Hq * rows_q * Dv, 1);
    if (random.chance(0.4)) dlse = random.array(accumulator_of(dtype), batches * Hq * rows_q, 1);
    bias_dtype = random.chance(0.3) ? Dtype::f32 : dtype;
    if (dtype == Dtype::f64) bias_dtype = dtype;
    sinks_dtype = bias_dtype;
    if (random.chance(0.35)) bias = random.array(bias_dtype, draw_sizes(random, bias_size), 1);
    if (random.chance(0.3)) {
      int64_t n = draw_sizes(random, mask_size);
      mask.reset(new unsigned char[size_t(n)]);
      double visible = random.chance(0.2) ? 0.02 : 0.7;
      for (int64_t i = 0; i < n; ++i) mask[size_t(i)] = random.chance(visible);
    }
    if (random.chance(0.25)) sinks = random.array(sinks_dtype, Hq, 1);
    if (random.chance(0.25)) alibi = random.array(Dtype::f32, Hq, 0.1);
    options.scale = random.chance(0.8) ? 1 / std::sqrt(double(D)) : 0.5;
    options.causal = random.chance(0.4);
    options.bottom_right = random.chance(0.5);
    if (random.chance(0.2)) options.window_left = random.below(Tk + 1);
    if (random.chance(0.1)) options.window_right = random.below(Tk + 1);
    if (random.chance(0.2)) options.softcap = 2;
    if (random.chance(0.2)) options.dropout_p = 0.3;
    seed = int64_t(random.bits());
    if (!packed && random.chance(0.4)) draw_pages(random);
    if (random.chance(0.4)) small_k = draw_small(random, k.size(), D, k_scale), small_v = draw_small(random, v.size(), Dv, v_scale);
  }

  std::shared_ptr<int8_t[]> draw_small(Random& random, int64_t n, int64_t features, Array& scale) {
    std::shared_ptr<int8_t[]> out(new int8_t[size_t(n)]);
    for (int64_t i = 0; i < n; ++i) out[size_t(i)] = int8_t(random.below(255) - 127);
    scale = random.array(Dtype::f32, n / features, 0.01);
    return out;
  }
  // Views of int8 rows and of their scales; in float64, which the kernels take no int8 beside, a copy of the products.
  Array set_small(const std::shared_ptr<int8_t[]>& rows, const Array& scale, int64_t n, View& to, View& to_scale) const {
    to = view(scale, Hk, rows_k, n), to_scale = view(scale, Hk, rows_k, 1), to.data = rows.get();
    if (dtype != Dtype::f64) return {};
    Array products(Dtype::f64, scale.size() * n);
    for (int64_t i = 0; i < products.size(); ++i) products.set(i, double(rows[size_t(i)]) * scale[i / n]);
    to.data = products.data(), to_scale = {};
    return products;
  }

  void draw_pages(Random& random) {
    page = random.pick({1, 3, 16, 64});
    const int64_t pages = B * ((Tk + page - 1) / page);
    for (int64_t i = 0; i < pages; ++i) table.push_back(int32_t(i));
    for (int64_t i = pages - 1; i > 0; --i) std::swap(table[size_t(i)], table[size_t(random.below(i + 1))]);
  }
  // [pages, page, Hk, n] of what view() says of [B,Hk,Tk,n]; past a sequence's keys it is NaN.
  Array in_pages(const Array& a, int64_t n) const {
    const View from = view(a, Hk, rows_k, n);
    const int64_t columns = int64_t(table.size()) / B;
    Array pool(a.dtype(), int64_t(table.size()) * page * Hk * n);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t j = 0; j < (lengths_k.empty() ? Tk : lengths_k[size_t(b)]); ++j)
        for (int64_t h = 0; h < Hk; ++h)
          for (int64_t d = 0; d < n; ++d) {
            const int64_t row = table[size_t(b * columns + j / page)] * page + j % page;
            pool.set((row * Hk + h) * n + d, a[b * from.batch + h * from.head + j * from.row + d]);
          }
    return pool;
  }

  int64_t draw_offsets(Random& random, int64_t longest, std::vector<int32_t>& cu) {
    cu.assign(1, 0);
    for (int64_t b = 0; b < B; ++b) cu.push_back(cu.back() + int32_t(b ? random.below(longest + 1) : longest));
    return cu.back();
  }
  std::vector<int64_t> draw_lengths(Random& random, int64_t longest) {
    std::vector<int64_t> out;
    for (int64_t b = 0; b < B; ++b) out.push_back(random.below(longest + 1));
    return out;
  }
  // Sizes that broadcast to [B,Hq,Tq,Tk]; returns their product.
  int64_t draw_sizes(Random& random, int64_t* sizes) {
    const int64_t whole[4] = {B, Hq, Tq, Tk};
    int64_t n = 1;
    for (int i = 0; i < 4; ++i) n *= sizes[i] = random.chance(0.4) ? 1 : whole[i];
    return n;
  }

  std::string describe(uint64_t seed) const {
    char text[240];
    std::snprintf(text, sizeof text,
                  "attention seed %lu: %s B%ld Hq%ld Hk%ld Tq%ld Tk%ld D%ld Dv%ld threads %d%s%s%s%s%s%s%s%s%s%s",
                  (unsigned long)seed, kDtypeNames[int(dtype)], long(B), long(Hq), long(Hk), long(Tq), long(Tk), long(D),
                  long(Dv), threads, packed ? " packed" : "", bias.absent() ? "" : " bias", mask ? " mask" : "",
                  options.causal ? " causal" : "", sinks.absent() ? "" : " sinks", alibi.absent() ? "" : " alibi",
                  options.dropout_p > 0 ? " dropout" : "", options.softcap > 0 ? " softcap" : "",
                  lengths_q.empty() && lengths_k.empty() ? "" : " lengths", prefix.empty() ? "" : " prefix");
    return text;
  }

  // Dense [B,heads,rows,n], or laid out as [B,rows,heads,n] where time_major; packed [rows,heads,n].
  View view(const Array& a, int64_t heads, int64_t rows, int64_t n) const {
    if (a.absent()) return {};
    if (packed) return {a.data(), 0, long(n), long(heads * n)};
    if (time_major) return {a.data(), long(heads * rows * n), long(n), long(heads * n)};
    return {a.data(), long(heads * rows * n), long(rows * n), long(n)};
  }
  View row_view(const Array& a) const {
    if (a.absent()) return {};
    return {a.data(), packed ? 0 : long(Hq * rows_q), long(rows_q), 1};
  }
  static Pairs pairs(const void* data, const int64_t* sizes) {
    int64_t strides[4], stride = 1;
    for (int i = 3; i >= 0; stride *= sizes[i--]) strides[i] = sizes[i] == 1 ? 0 : stride;
    return {data, strides[0], strides[1], strides[2], strides[3]};
  }

  void fill(AttentionCall& call) const {
    call = options;
    call.dtype = dtype, call.bias_dtype = bias_dtype, call.sinks_dtype = sinks_dtype;
    call.batch = B, call.heads_q = Hq, call.heads_k = Hk, call.length_q = Tq, call.length_k = Tk;
    call.dim = D, call.dim_v = Dv;
    call.q = view(q, Hq, rows_q, D), call.k = view(k, Hk, rows_k, D), call.v = view(v, Hk, rows_k, Dv);
    if (packed) call.cu_q = cu_q.data(), call.cu_k = cu_k.data();
    if (!lengths_q.empty()) call.lengths_q = lengths_q.data();
    if (!lengths_k.empty()) call.lengths_k = lengths_k.data();
    if (!prefix.empty()) call.prefix = prefix.data();
    if (!bias.absent()) call.bias = pairs(bias.data(), bias_size);
    if (mask) call.mask = pairs(mask.get(), mask_size);
    if (!sinks.absent()) call.sinks = sinks.data();
    if (!alibi.absent()) call.alibi = alibi.data();
    if (options.dropout_p > 0) call.seed = &seed;
    call.threads = threads;
    call.deterministic = threads == 3;
  }

  Problem widened() const {
    Problem out = *this;
    out.dtype = out.bias_dtype = out.sinks_dtype = Dtype::f64;
    for (Array* a : {&out.q, &out.k, &out.v, &out.bias, &out.sinks, &out.d_o, &out.dlse}) *a = a->widened();
    return out;
  }

  Outputs run() const {
    Array o(dtype, d_o.size()), lse(accumulator_of(dtype), (packed ? 1 : B) * Hq * rows_q);
    AttentionForward forward{};
    fill(forward);
    forward.o = view(o, Hq, rows_q, Dv), forward.lse = row_view(lse);
    bool done = run_attention(forward);
    Outputs out = {{"o", o}, {"lse", lse, true}};

    if (page) {
      Array paged_o(dtype, d_o.size()), paged_lse(accumulator_of(dtype), lse.size());
      const Array pool_k = in_pages(k, D), pool_v = in_pages(v, Dv);
      forward.k = {pool_k.data(), page * Hk * D, D, Hk * D}, forward.v = {pool_v.data(), page * Hk * Dv, Dv, Hk * Dv};
      forward.o = view(paged_o, Hq, rows_q, Dv), forward.lse = row_view(paged_lse);
      forward.pages = table.data(), forward.page = page, forward.table_row = int64_t(table.size()) / B;
      done = done && run_attention(forward);
      out.insert(out.end(), {{"o of pages", paged_o}, {"lse of pages", paged_lse, true}});
      forward.o = view(o, Hq, rows_q, Dv), forward.lse = row_view(lse);
    }

    if (small_k) {
      Array small_o(dtype, d_o.size()), small_lse(accumulator_of(dtype), lse.size());
      AttentionForward small{};
      fill(small);
      const Array wide_k = set_small(small_k, k_scale, D, small.k, small.k_scale);
      const Array wide_v = set_small(small_v, v_scale, Dv, small.v, small.v_scale);
      small.o = view(small_o, Hq, rows_q, Dv), small.lse = row_view(small_lse);
      done = done && run_attention(small);
      out.insert(out.end(), {{"o of int8", small_o}, {"lse of int8", small_lse, true}});
    }

    Array dq(dtype, q.size()), dk(dtype, k.size()), dv(dtype, v.size()), dbias, dsinks, rows;
    AttentionBackward backward{};
    fill(backward);
    backward.o = forward.o, backward.lse = forward.lse;
    backward.d_o = view(d_o, Hq, rows_q, Dv), backward.dlse = row_view(dlse);
    backward.dq = view(dq, Hq, rows_q, D), backward.dk = view(dk, Hk, rows_k, D), backward.dv = view(dv, Hk, rows_k, Dv);
    if (!sinks.absent()) {
      dsinks = Array(sinks_dtype, Hq);
      backward.dsinks = dsinks.data();
    }
    if (!bias.absent()) {
      dbias = Array(bias_dtype, bias.size());
      std::memset(dbias.data(), 0, size_t(bias.size()) * bytes_of(bias_dtype));  // as the kernel asks
      backward.dbias = dbias.data();
      rows = Array(accumulator_of(dtype), 2 * B * Hq * Tq);
      backward.rows = rows.data();
      for (int i = 0; i < 4; ++i) backward.bias_size[i] = long(bias_size[i]);
    }
    done = done && FASTSEQ_DISPATCH(attention_backward, backward);
    if (!bias.absent()) done = done && FASTSEQ_DISPATCH(attention_bias_gradient, backward);
    if (!done) {
      std::printf("out of memory\n");
      std::abort();
    }
    out.insert(out.end(), {{"dq", dq}, {"dk", dk}, {"dv", dv}});
    if (!dbias.absent()) out.push_back({"dbias", dbias});
    if (!dsinks.absent()) out.push_back({"dsinks", dsinks});
    return out;
  }
};

}  // namespace

int attention_case(uint64_t seed) {
  Random random(seed + 1000000);
  Problem problem(random);
  double terms = double(problem.D + problem.Dv + problem.Tk + problem.Tq);
  return over_isas(problem.describe(seed), rounding(problem.dtype, terms, 1), problem);
}

}  // namespace driver
