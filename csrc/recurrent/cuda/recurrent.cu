// Launches of the recurrent scan, and the kernels of the role `step`.
#include "recurrent/cuda/resident.cuh"

#include <algorithm>

namespace fastseq::cuda {
namespace {

constexpr int kStepThreads = 256;

// What a thread of the role `step` looks after: one unit of one row.
struct Alone {
  Place at;
  int64_t i;  // in [B,H]
  bool there;
  FASTSEQ_DEVICE explicit Alone(const ScanWalk& a) {
    i = int64_t(bid()) * kStepThreads + tid();
    there = i < int64_t(a.B) * a.H;
    at = Place{static_cast<int>(i / a.H), static_cast<int>(i % a.H), 0};
    if (there) at.length = length_of(a, at.b);
  }
};

template <ScanCell C, class T, bool kOptions>
FASTSEQ_KERNEL(kStepThreads, 1)
forward_step(ScanForward a, ScanStep s) {
  constexpr int G = kGates<C>;
  const Alone own(a);
  if (!own.there) return;
  const Place& at = own.at;
  Extras<T, kOptions> extras;
  read_extras<C>(a, time_of(a, s.step < 0 ? 0 : s.step), at, extras);
  const auto give = [&](float h, int next) {
    const bool clear = next < a.T && cleared(a, time_of(a, next), at.b);
    write<T>(s.operand, own.i, operand_before<T, kOptions>(a, at, clear, h));
  };
  if (s.step < 0) {
    const float h = read_or_zero<T>(a.h0, own.i);
    s.state[own.i] = h;
    if constexpr (kHasC<C>) s.cell_state[own.i] = read_or_zero<T>(a.c0, own.i);
    give(h, 0);
    return;
  }
  const int t = time_of(a, s.step);
  const bool clear = cleared(a, t, at.b);
  const auto hidden_side = [&](int gates, int from, int gate) {
    return s.product[(int64_t(at.b) * gates + gate - from) * a.H + at.u] +
           read_or_zero<T>(a.b_hh, a.b_hh ? int64_t(gate) * a.H + at.u : 0);
  };
  T x[G];
  float h = s.state[own.i];
  read_gates<C, T>(a, t, at, x);
  if constexpr (kTwice<C>) {
    if (s.phase == 0) {
      float z;
      const float q = forward_reset<T, kOptions>(a, t, at, clear, to_float(x[0]) + hidden_side(2, 0, 0),
                                                 to_float(x[1]) + hidden_side(2, 0, 1), h, z);
      s.kept[own.i] = z;
      write<T>(s.operand, own.i, q);
      return;
    }
    forward_candidate<T>(a, t, at, clear, extras, to_float(x[2]) + hidden_side(1, 2, 2), s.kept[own.i], h);
  } else {
    float p[G], c = kHasC<C> ? s.cell_state[own.i] : 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g) p[g] = hidden_side(G, 0, g);
    Left<C> left;
    forward_element<C, T>(a, t, at, clear, x, extras, p, h, c, left);
    write_left<C, T>(a, t, at, h, c, left);
    if constexpr (kHasC<C>) {
      s.cell_state[own.i] = c;
      if (s.step == a.T - 1) write<T>(a.c_n, own.i, c);
    }
  }
  s.state[own.i] = h;
  give(h, s.step + 1);
  if (s.step == a.T - 1) write<T>(a.h_n, own.i, h);
}

template <ScanCell C, class T, bool kOptions>
FASTSEQ_KERNEL(kStepThreads, 1)
backward_step(ScanBackward a, ScanStep s) {
  constexpr int D = kDirect<C>;
  const Alone own(a);
  if (!own.there) return;
  const Place& at = own.at;
  const auto give = [&](int gates, int gate, float d) {
    write<T>(s.operand, (int64_t(at.b) * gates + gate) * a.H + at.u, d);
  };
  Extras<T, kOptions> extras;
  read_extras<C>(a, time_back(a, s.step < a.T ? s.step : a.T - 1), at, extras);
  float dh, dc = 0.0f;
  if (s.phase == 0) {
    if (s.step == 0) {
      dh = read_or_zero<T>(a.dh_n, own.i);
      if constexpr (kHasC<C>) dc = read_or_zero<T>(a.dc_n, own.i);
    } else {
      const int later = time_back(a, s.step - 1);
      dh = s.state[own.i];
      const bool replaced = cleared(a, later, at.b);
      if (later < at.length && goes_on<kOptions>(a, replaced))
        add_product<T, kOptions>(a, at, replaced, s.product[own.i], dh);
      if constexpr (kHasC<C>) dc = s.cell_state[own.i];
    }
  } else {
    dh = s.kept[own.i];
  }
  if (s.step == a.T) {
    if (a.dh0) write<T>(a.dh0, own.i, dh);
    if constexpr (kHasC<C>)
      if (a.dc0) write<T>(a.dc0, own.i, dc);
    return;
  }
  const int t = time_back(a, s.step);
  const bool clear = cleared(a, t, at.b);
  Saved<C, T> saved;
  read_saved<C, T, kOptions>(a, t, at, clear, saved);
  if constexpr (kTwice<C>) {
    float dz;
    const float dn = backward_candidate<T>(a, t, at, saved, extras, dh, dz);
    if (s.phase == 0) {
      s.kept[own.i] = dh;
      give(1, 0, dn);
      return;
    }
    float dr;
    dh = backward_reset<T>(a, t, at, clear, saved, extras, dh, s.product[own.i], dr);
    give(D, 0, dr);
    give(D, 1, dz);
  } else {
    Gradients<C> gradients;
    dh = backward_element<C, T>(a, t, at, clear, saved, extras, dh, dc, gradients);
    write_gradients<C, T>(a, t, at, gradients);
#pragma unroll
    for (int g = 0; g < D; ++g) give(D, g, gradients.d[g]);
    if constexpr (kHasC<C>) s.cell_state[own.i] = dc;
  }
  s.state[own.i] = dh;
}

template <class T>
FASTSEQ_KERNEL(kStepThreads, 1)
add(const float* a, const float* b, void* out, int64_t n) {
  for (int64_t i = int64_t(bid()) * kStepThreads + tid(); i < n; i += int64_t(nblocks()) * kStepThreads)
    write<T>(out, i, a[i] + (b ? b[i] : 0.0f));
}

template <template <ScanCell, class> class Pick, class T>
auto pick(ScanCell cell) {
  return for_cell(cell, [](auto c) { return Pick<code_of(c.value), T>::kernel(); });
}
template <template <ScanCell, class> class Pick>
auto pick(ScanCell cell, Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return pick<Pick, Bf16>(cell);
    case Dtype::f16: return pick<Pick, Fp16>(cell);
    default: return pick<Pick, float>(cell);
  }
}
template <bool kOptions>
struct Step {
  template <ScanCell C, class T>
  struct Forward {
    static auto kernel() { return &forward_step<C, T, kOptions>; }
  };
  template <ScanCell C, class T>
  struct Backward {
    static auto kernel() { return &backward_step<C, T, kOptions>; }
  };
};

Launch step_launch(const ScanWalk& a) {
  Launch launch;
  launch.threads = kStepThreads;
  launch.grid.x = static_cast<unsigned>((int64_t(a.B) * a.H + kStepThreads - 1) / kStepThreads);
  return launch;
}

ForwardKernel forward_of(ScanCell cell, ScanNumber number, ScanRole role, bool options) {
  if (options) return role == ScanRole::cluster ? cluster_options_forward(cell, number) : grid_options_forward(cell, number);
  return role == ScanRole::cluster           ? cluster_forward(cell, number)
         : role == ScanRole::cluster_barrier ? cluster_barrier_forward(cell, number)
                                             : grid_forward(cell, number);
}
BackwardKernel backward_of(ScanCell cell, ScanNumber number, ScanRole role, bool options) {
  if (options)
    return role == ScanRole::cluster ? cluster_options_backward(cell, number) : grid_options_backward(cell, number);
  return role == ScanRole::cluster           ? cluster_backward(cell, number)
         : role == ScanRole::cluster_barrier ? cluster_barrier_backward(cell, number)
                                             : grid_backward(cell, number);
}

}  // namespace

const char* step_forward(const ScanForward& args, ScanCell cell, Dtype dtype, const ScanStep& step, void* stream) {
  const auto kernel =
      args.options.any() ? pick<Step<true>::Forward>(cell, dtype) : pick<Step<false>::Forward>(cell, dtype);
  return launch(kernel, step_launch(args), static_cast<Stream>(stream), args, step);
}
const char* step_backward(const ScanBackward& args, ScanCell cell, Dtype dtype, const ScanStep& step,
                          void* stream) {
  const auto kernel =
      args.options.any() ? pick<Step<true>::Backward>(cell, dtype) : pick<Step<false>::Backward>(cell, dtype);
  return launch(kernel, step_launch(args), static_cast<Stream>(stream), args, step);
}

const char* scan_add(const float* a, const float* b, void* out, int64_t n, Dtype dtype, void* stream) {
  Launch shape;
  shape.threads = kStepThreads;
  shape.grid.x = static_cast<unsigned>(std::min<int64_t>((n + kStepThreads - 1) / kStepThreads, 1024));
  const auto kernel = dtype == Dtype::bf16 ? &add<Bf16> : dtype == Dtype::f16 ? &add<Fp16> : &add<float>;
  return n == 0 ? nullptr : launch(kernel, shape, static_cast<Stream>(stream), a, b, out, n);
}

const char* scan_clear(void* target, size_t bytes, void* stream) {
  return set_zero(target, bytes, static_cast<Stream>(stream));
}

const char* scan_forward(const ScanForward& args, ScanCell cell, ScanNumber number, const ScanPlan& plan,
                         void* workspace, void* stream) {
  return launch(forward_of(cell, number, plan.role, args.options.any()), plan.launch, static_cast<Stream>(stream), args,
                Resident{plan.shape, plan.layout, workspace});
}
const char* scan_backward(const ScanBackward& args, ScanCell cell, ScanNumber number, const ScanPlan& plan,
                          void* workspace, void* stream) {
  return launch(backward_of(cell, number, plan.role, args.options.any()), plan.launch, static_cast<Stream>(stream), args,
                Resident{plan.shape, plan.layout, workspace});
}

int resident_groups(const ScanProblem& problem, ScanRole role, const Launch& shape) {
  const auto ask = [&](auto kernel) {
    return in_cluster(role) && shape.cluster > 1 ? resident_clusters(kernel, shape)
                                                          : blocks_per_multiprocessor(kernel, shape);
  };
  return problem.backward ? ask(backward_of(problem.cell, problem.number, role, problem.options))
                          : ask(forward_of(problem.cell, problem.number, role, problem.options));
}

}  // namespace fastseq::cuda
