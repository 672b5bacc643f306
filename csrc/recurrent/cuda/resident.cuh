// The walk of the resident roles: W_hh stays on the chip, spread over the blocks of a group, for all steps.
//
// Forward, each step: wait for h; W_hh h of this block's units and their gates; new h of those units; publish it.
// Backward: dgates of this block's units; publish them; wait; W_hhᵀ dgates, columns of this block's units: dh of them.
// gru_reset_before exchanges twice a step: h, then q = r * h_prev; backward dn, then dr and dz.
// What a step reads besides is read while the exchange before it is under way.
#pragma once
#include "recurrent/cuda/cell.cuh"
#include "recurrent/cuda/exchange.cuh"
#include "recurrent/cuda/product.cuh"

namespace fastseq::cuda {

constexpr int kElements = kScanElements;
constexpr int kAhead = 4;  // steps before it is read, what a step reads is brought into the second-level cache

struct Resident {
  ScanShape shape;
  ScanLayout layout;
  void* workspace;
};

// The elements of a thread in one tile of rows. Bits of a mask stand for elements.
struct Tile {
  int first_row, columns, units, first_unit;
  Place at[kElements];  // of none the row is -1

  FASTSEQ_DEVICE Tile(const ScanWalk& a, const ScanShape& s, int tile, int rank) {
    first_row = tile * s.columns;
    columns = a.B - first_row < s.columns ? a.B - first_row : s.columns;
    first_unit = rank * s.units;
    units = a.H - first_unit < s.units ? a.H - first_unit : s.units;
    units = units < 0 ? 0 : units;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int i = tid() + e * nthreads();
      at[e] = Place{-1, 0, 0};
      if (i < units * columns) {
        at[e] = Place{first_row + i / units, first_unit + i % units, 0};
        at[e].length = length_of(a, at[e].b);
      }
    }
  }
  FASTSEQ_DEVICE bool has(int e) const { return at[e].b >= 0; }
  FASTSEQ_DEVICE int column(int e) const { return at[e].b - first_row; }
  FASTSEQ_DEVICE int unit(int e) const { return at[e].u - first_unit; }
  FASTSEQ_DEVICE uint32_t cleared_at(const ScanWalk& a, int t) const {
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (has(e) && cleared(a, t, at[e].b)) bits |= 1u << e;
    return bits;
  }
};

// Where a block keeps what, and its share of the products.
template <ScanCell C, class T, template <class> class Exchange, bool kOptions>
struct Block {
  Exchange<T> exchange;
  const ScanLayout& layout;
  int columns;  // of the vector
  Fragment* stored;
  float *partial, *bias;
  FirstTask first[2];
  static constexpr int kHeld = scan_held(Exchange<T>::kRole, kNumber<T>, kOptions);
  Fragment held[kHeld ? kHeld : 1];

  FASTSEQ_DEVICE explicit Block(const Resident& r)
      : exchange(shared_memory(), r.workspace, r.layout, r.shape),
        layout(r.layout),
        columns(r.shape.columns),
        stored(reinterpret_cast<Fragment*>(shared_memory() + r.layout.fragments)),
        partial(reinterpret_cast<float*>(shared_memory() + r.layout.partial)),
        bias(reinterpret_cast<float*>(shared_memory() + r.layout.bias)),
        first{FirstTask(r.layout.product[0]), FirstTask(r.layout.product[1])} {}

  template <int kWhich>
  FASTSEQ_DEVICE void multiply_by() {
    multiply<T, kWhich ? 0 : kHeld>(layout.product[kWhich], first[kWhich], held, stored, partial, layout.partial_rows,
                                    columns, exchange);
    sync_block();
  }
  // kCount elements of the product, `apart` rows from one to the next.
  template <int kCount>
  FASTSEQ_DEVICE void product(int which, int row, int apart, int column, float (&out)[kCount]) const {
    sums_of(layout.product[which], partial + column * layout.partial_rows + row, apart, columns * layout.partial_rows, out);
  }
};

template <ScanCell C, class T, template <class> class Exchange, bool kOptions>
FASTSEQ_DEVICE void walk_forward(const ScanForward& a, const Resident& r) {
  constexpr int G = kGates<C>, D = kDirect<C>;
  Block<C, T, Exchange, kOptions> block(r);
  constexpr int kHeld = Block<C, T, Exchange, kOptions>::kHeld;
  auto& exchange = block.exchange;
  const int first_unit = exchange.rank * r.shape.units, H = a.H;
  exchange.start();
  // Row g * units + u of a block's share is row g * H + first_unit + u of W.
  const auto weight = [&](int gate, int gates, int row, int k) {
    const int g = row / r.shape.units, u = first_unit + row % r.shape.units;
    if (g >= gates || u >= H || k >= H) return from_float<T>(0.0f);
    return static_cast<const T*>(a.w_hh)[(int64_t(gate + g) * H + u) * H + k];
  };
  lay_weights<T, kHeld>(r.layout.product[0], block.held, block.stored, [&](int row, int k) { return weight(0, D, row, k); });
  if constexpr (kTwice<C>) {
    lay_weights<T, 0>(r.layout.product[1], block.held, block.stored, [&](int row, int k) { return weight(2, 1, row, k); });
  }
  for (int i = tid(); i < G * r.shape.units; i += nthreads()) {
    const int u = first_unit + i % r.shape.units;
    block.bias[i] = a.b_hh && u < H ? read<T>(a.b_hh, int64_t(i / r.shape.units) * H + u) : 0.0f;
  }

  for (int tile = exchange.group; tile * r.shape.columns < a.B; tile += r.shape.groups) {
    const Tile own(a, r.shape, tile, exchange.rank);
    const Slice slice{r.layout.part, first_unit, own.units, own.columns};
    const auto bias = [&](int e, int gate) { return block.bias[gate * r.shape.units + own.unit(e)]; };
    T x[kElements][G];
    float h[kElements], c[kElements], z[kElements];
    Left<C> left[kElements];
    Extras<T, kOptions> extras[kElements];
    int t = time_of(a, 0);
    uint32_t clear = own.cleared_at(a, t);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!own.has(e)) continue;
      const int64_t i = element(a, own.at[e]);
      h[e] = a.h_in ? a.h_in[i] : read_or_zero<T>(a.h0, i);
      c[e] = !kHasC<C> ? 0.0f : a.c_in ? a.c_in[i] : read_or_zero<T>(a.c0, i);
      read_extras<C>(a, t, own.at[e], extras[e]);
      exchange.put(own.column(e), own.at[e].u, operand_before<T, kOptions>(a, own.at[e], clear >> e & 1, h[e]));
      read_gates<C, T>(a, t, own.at[e], x[e]);
    }
    uint32_t clear_next = a.T > 1 ? own.cleared_at(a, time_of(a, 1)) : 0;
    exchange.template publish<1>(slice, 0);
    exchange.template wait<1>(slice, 0);
    for (int step = 0; step < a.T; ++step) {
      block.template multiply_by<0>();
      if constexpr (kTwice<C>) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          if (!own.has(e)) continue;
          float p[2];
          block.product(0, own.unit(e), r.shape.units, own.column(e), p);
          const float x_r = to_float(x[e][0]) + p[0] + bias(e, 0), x_z = to_float(x[e][1]) + p[1] + bias(e, 1);
          const float q = forward_reset<T, kOptions>(a, t, own.at[e], clear >> e & 1, x_r, x_z, h[e], z[e]);
          exchange.put(own.column(e), own.at[e].u, q);
        }
        exchange.template publish<1>(slice, 0);
        exchange.template wait<1>(slice, 0);
        block.template multiply_by<1>();
      }
      const bool more = step + 1 < a.T;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (!own.has(e)) continue;
        if constexpr (kTwice<C>) {
          float p[1];
          block.product(1, own.unit(e), 0, own.column(e), p);
          forward_candidate<T>(a, t, own.at[e], clear >> e & 1, extras[e], to_float(x[e][2]) + p[0] + bias(e, 2), z[e],
                               h[e]);
        } else {
          float p[G];
          block.product(0, own.unit(e), r.shape.units, own.column(e), p);
#pragma unroll
          for (int g = 0; g < G; ++g) p[g] += bias(e, g);
          forward_element<C, T>(a, t, own.at[e], clear >> e & 1, x[e], extras[e], p, h[e], c[e], left[e]);
        }
        if (more) {
          const float read = operand_before<T, kOptions>(a, own.at[e], clear_next >> e & 1, h[e]);
          exchange.put(own.column(e), own.at[e].u, read);
        }
      }
      if (more) exchange.template publish<1>(slice, 0);
      // What no peer waits for, while h is on its way.
      const int done = t;
      t = time_of(a, step + 1);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (!own.has(e)) continue;
        if (more) {
          read_gates<C, T>(a, t, own.at[e], x[e]);
          read_extras<C>(a, t, own.at[e], extras[e]);
        }
        if constexpr (!kTwice<C>) write_left<C, T>(a, done, own.at[e], h[e], c[e], left[e]);
        if (step + kAhead < a.T) prefetch_gates<C, T>(a, time_of(a, step + kAhead), own.at[e]);
      }
      if (!more) break;
      clear = clear_next;
      clear_next = step + 2 < a.T ? own.cleared_at(a, time_of(a, step + 2)) : 0;
      exchange.template wait<1>(slice, 0);
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!own.has(e)) continue;
      const int64_t i = element(a, own.at[e]);
      if (a.h_out) {
        a.h_out[i] = h[e];
        if constexpr (kHasC<C>) a.c_out[i] = c[e];
      } else {
        write<T>(a.h_n, i, h[e]);
        if constexpr (kHasC<C>) write<T>(a.c_n, i, c[e]);
      }
    }
  }
}

template <ScanCell C, class T, template <class> class Exchange, bool kOptions>
FASTSEQ_DEVICE void walk_backward(const ScanBackward& a, const Resident& r) {
  constexpr int D = kDirect<C>;
  Block<C, T, Exchange, kOptions> block(r);
  constexpr int kHeld = Block<C, T, Exchange, kOptions>::kHeld;
  auto& exchange = block.exchange;
  const int first_unit = exchange.rank * r.shape.units, H = a.H, part = r.layout.part;
  exchange.start();
  // Row u of a block's share is column first_unit + u of W; k runs over the gates' parts of the vector.
  const auto weight = [&](int gate, int gates, int row, int k) {
    const int g = k / part, i = k % part, u = first_unit + row;
    if (row >= r.shape.units || g >= gates || u >= H || i >= H) return from_float<T>(0.0f);
    return static_cast<const T*>(a.w_hh)[(int64_t(gate + g) * H + i) * H + u];
  };
  lay_weights<T, kHeld>(r.layout.product[0], block.held, block.stored, [&](int row, int k) { return weight(0, D, row, k); });
  if constexpr (kTwice<C>) {
    lay_weights<T, 0>(r.layout.product[1], block.held, block.stored, [&](int row, int k) { return weight(2, 1, row, k); });
  }

  for (int tile = exchange.group; tile * r.shape.columns < a.B; tile += r.shape.groups) {
    const Tile own(a, r.shape, tile, exchange.rank);
    const Slice slice{part, first_unit, own.units, own.columns};
    float dh[kElements], dc[kElements], dz[kElements];
    Saved<C, T> saved[kElements];
    Gradients<C> gradients[kElements];
    Extras<T, kOptions> extras[kElements];
    int t = time_back(a, 0);
    uint32_t clear = own.cleared_at(a, t);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!own.has(e)) continue;
      const int64_t i = element(a, own.at[e]);
      dh[e] = a.dh_in ? a.dh_in[i] : read_or_zero<T>(a.dh_n, i);
      dc[e] = !kHasC<C> ? 0.0f : a.dc_in ? a.dc_in[i] : read_or_zero<T>(a.dc_n, i);
      read_saved<C, T, kOptions>(a, t, own.at[e], clear >> e & 1, saved[e]);
      read_extras<C>(a, t, own.at[e], extras[e]);
    }
    for (int step = 0; step < a.T; ++step) {
      const bool more = step + 1 < a.T;
      uint32_t takes = 0;  // the product of this step
      [[maybe_unused]] const uint32_t replaced = clear;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (!own.has(e)) continue;
        if (t < own.at[e].length && goes_on<kOptions>(a, clear >> e & 1)) takes |= 1u << e;
        if constexpr (kTwice<C>) {
          exchange.put(own.column(e), 2 * part + own.at[e].u,
                       backward_candidate<T>(a, t, own.at[e], saved[e], extras[e], dh[e], dz[e]));
        } else {
          dh[e] = backward_element<C, T>(a, t, own.at[e], clear >> e & 1, saved[e], extras[e], dh[e], dc[e],
                                         gradients[e]);
#pragma unroll
          for (int g = 0; g < kGates<C>; ++g) exchange.put(own.column(e), g * part + own.at[e].u, gradients[e].d[g]);
        }
      }
      if constexpr (kTwice<C>) {
        exchange.template publish<1>(slice, 2);
        exchange.template wait<1>(slice, 2);
        block.template multiply_by<1>();
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          if (!own.has(e)) continue;
          float dr, dq[1];
          block.product(1, own.unit(e), 0, own.column(e), dq);
          dh[e] = backward_reset<T>(a, t, own.at[e], clear >> e & 1, saved[e], extras[e], dh[e], dq[0], dr);
          exchange.put(own.column(e), own.at[e].u, dr);
          exchange.put(own.column(e), part + own.at[e].u, dz[e]);
        }
      }
      const auto write = [&] {
        if constexpr (!kTwice<C>) {
#pragma unroll
          for (int e = 0; e < kElements; ++e)
            if (own.has(e)) write_gradients<C, T>(a, t, own.at[e], gradients[e]);
        }
      };
      const bool wanted = more || a.dh0 || a.dh_out || (kOptions && a.options.dreset_h);
      if (kThreefold<T>) write();  // whose products leave no registers to keep them in
      if (wanted) exchange.template publish<D>(slice, 0);
      if (!kThreefold<T>) write();  // what no peer waits for, while the gradients are on their way
      if (!wanted) break;
      if (more) {
        t = time_back(a, step + 1);
        clear = own.cleared_at(a, t);
#pragma unroll
        for (int e = 0; e < kElements; ++e)
          if (own.has(e)) {
            read_saved<C, T, kOptions>(a, t, own.at[e], clear >> e & 1, saved[e]);
            read_extras<C>(a, t, own.at[e], extras[e]);
            if (step + kAhead < a.T) prefetch_saved<C, T>(a, time_back(a, step + kAhead), own.at[e]);
          }
      }
      exchange.template wait<D>(slice, 0);
      block.template multiply_by<0>();
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (own.has(e) && (takes >> e & 1)) {
          float sum[1];
          block.product(0, own.unit(e), 0, own.column(e), sum);
          add_product<T, kOptions>(a, own.at[e], replaced >> e & 1, sum[0], dh[e]);
        }
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!own.has(e)) continue;
      const int64_t i = element(a, own.at[e]);
      if (a.dh_out) {
        a.dh_out[i] = dh[e];
        if constexpr (kHasC<C>) a.dc_out[i] = dc[e];
        continue;
      }
      if (a.dh0) write<T>(a.dh0, i, dh[e]);
      if constexpr (kHasC<C>)
        if (a.dc0) write<T>(a.dc0, i, dc[e]);
    }
  }
}

// Code for a GPU without clusters holds no walk through them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif
template <class Exchange>
constexpr bool kRuns = kClusters || !in_cluster(Exchange::kRole);

template <ScanCell C, class T, template <class> class Exchange, bool kOptions = false>
FASTSEQ_KERNEL(kScanThreads, 1)
resident_forward(ScanForward a, Resident r) {
  if constexpr (kRuns<Exchange<T>>) walk_forward<C, T, Exchange, kOptions>(a, r);
}
template <ScanCell C, class T, template <class> class Exchange, bool kOptions = false>
FASTSEQ_KERNEL(kScanThreads, 1)
resident_backward(ScanBackward a, Resident r) {
  if constexpr (kRuns<Exchange<T>>) walk_backward<C, T, Exchange, kOptions>(a, r);
}

// The kernel of a cell and a dtype; each file instantiates one exchange and one direction, with options or without.
using ForwardKernel = void (*)(ScanForward, Resident);
using BackwardKernel = void (*)(ScanBackward, Resident);

template <class T, template <class> class Exchange, bool kOptions>
ForwardKernel forward_kernel(ScanCell cell) {
  return for_cell(
      cell, [](auto c) -> ForwardKernel { return resident_forward<code_of(c.value), T, Exchange, kOptions>; });
}
template <template <class> class Exchange, bool kOptions = false>
ForwardKernel forward_kernel(ScanCell cell, ScanNumber number) {
  switch (number.dtype) {
    case Dtype::bf16: return forward_kernel<Bf16, Exchange, kOptions>(cell);
    case Dtype::f16: return forward_kernel<Fp16, Exchange, kOptions>(cell);
    default:
      return number.tf32 ? forward_kernel<Tf32, Exchange, kOptions>(cell) : forward_kernel<float, Exchange, kOptions>(cell);
  }
}
template <class T, template <class> class Exchange, bool kOptions>
BackwardKernel backward_kernel(ScanCell cell) {
  return for_cell(
      cell, [](auto c) -> BackwardKernel { return resident_backward<code_of(c.value), T, Exchange, kOptions>; });
}
template <template <class> class Exchange, bool kOptions = false>
BackwardKernel backward_kernel(ScanCell cell, ScanNumber number) {
  switch (number.dtype) {
    case Dtype::bf16: return backward_kernel<Bf16, Exchange, kOptions>(cell);
    case Dtype::f16: return backward_kernel<Fp16, Exchange, kOptions>(cell);
    default:
      return number.tf32 ? backward_kernel<Tf32, Exchange, kOptions>(cell) : backward_kernel<float, Exchange, kOptions>(cell);
  }
}

// Defined in the files that instantiate them.
ForwardKernel cluster_forward(ScanCell cell, ScanNumber number);
ForwardKernel cluster_options_forward(ScanCell cell, ScanNumber number);
ForwardKernel cluster_barrier_forward(ScanCell cell, ScanNumber number);
ForwardKernel grid_forward(ScanCell cell, ScanNumber number);
ForwardKernel grid_options_forward(ScanCell cell, ScanNumber number);
BackwardKernel cluster_backward(ScanCell cell, ScanNumber number);
BackwardKernel cluster_options_backward(ScanCell cell, ScanNumber number);
BackwardKernel cluster_barrier_backward(ScanCell cell, ScanNumber number);
BackwardKernel grid_backward(ScanCell cell, ScanNumber number);
BackwardKernel grid_options_backward(ScanCell cell, ScanNumber number);

}  // namespace fastseq::cuda
