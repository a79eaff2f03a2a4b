// A step of the cells with layer normalisation, whose means and variances are sums over all units
// of a row: a block takes a row of the batch, and a thread of it the units j, j + kThreads, ...
// What a thread writes for the next pass over its units, nobody else reads.
#include <cmath>

#include "cuda/dispatch.h"
#include "cuda/stepwise/step.h"

namespace fusedrnn {
namespace {

constexpr int kThreads = 128;
constexpr double kEpsilon = 1e-5;  // the same as in fusedrnn/reference.py

// Replaces each value by its sum over the threads of the block, in a fixed order. All threads.
template <int N, class C>
__device__ inline void add_up(C (&values)[N]) {
  FUSEDRNN_STATIC_SHARED(C, sums, N * kThreads);
  const int i = threadIdx.x;
  __syncthreads();  // the last ones have been read
#pragma unroll
  for (int k = 0; k < N; k++) sums[k * kThreads + i] = values[k];
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (i < n)
#pragma unroll
      for (int k = 0; k < N; k++) sums[k * kThreads + i] += sums[k * kThreads + i + n];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; k++) values[k] = sums[k * kThreads];
}

// An element of an array that is not null.
template <class T>
__device__ inline Compute<T> load(const void* array, int64_t at) {
  return to_compute(static_cast<const T*>(array)[at]);
}

// f(unit) for the units of this thread. f has loads of all gates, which are on their way together;
// unrolled, the kernels would be several times as large.
template <class F>
__device__ inline void each_unit(int64_t H, F f) {
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < H; j += kThreads) f(j);
}

template <class C>
__device__ inline C inverse_deviation(C variance) {
  return C(1 / sqrt(double(variance) + kEpsilon));
}

// The range whose gates `gate` is normalised with.
template <int N>
FUSEDRNN_HD constexpr int range_of(const GateRanges<N>& ranges, int gate) {
  for (int r = 0; r < N; r++)
    if (gate >= ranges.range[r].gate && gate < ranges.range[r].gate + ranges.range[r].count)
      return r;
  return -1;
}

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads, 2)
    normed_forward_kernel(const __grid_constant__ NormedForward p) {
  using C = Compute<S>;
  using Norm = Normed<Cell>;
  constexpr auto kRanges = Cell::x_ranges();
  constexpr int kGates = Cell::kGates, kCount = decltype(Cell::x_ranges())::kCount;
  const int64_t H = p.hidden_size;
  const bool zones_h = p.zoneout_h.rate > 0, zones_c = p.zoneout_c.rate > 0;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    if (!runs_at(p, b, p.step)) {
      each_unit(H, [&](int64_t j) { write<S>(p.y, b * p.y_stride + j, 0); });
      continue;
    }
    const bool anew = begins_anew(p, p.resets, b, p.step);
    // Of the row's weights, among those of all members.
    const int64_t unit0 = member_of(p, b) * H, gate0 = unit0 * kGates;
    // Products of the input (0) and of h (1).
    auto product = [&](int which, int gate, int64_t j) {
      if (which == 0) return load<C>(p.gates_x, b * p.gates_x_stride + gate * H + j);
      return anew ? C(0) : load<C>(p.gates_h, b * p.gates_h_stride + gate * H + j);
    };
    auto save = [&](int slot, int64_t j, C value) {
      write<S>(p.saved, (b * Norm::kSaved + slot) * H + j, value);
    };

    C mean[2 * kCount] = {}, scale[2 * kCount] = {};  // of each range, of both products
    each_unit(H, [&](int64_t j) {
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++)
        mean[2 * range_of(kRanges, i / 2) + i % 2] += product(i % 2, i / 2, j);
    });
    add_up(mean);
#pragma unroll
    for (int i = 0; i < 2 * kCount; i++) mean[i] /= C(kRanges.range[i / 2].count * H);
    each_unit(H, [&](int64_t j) {
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int at = 2 * range_of(kRanges, i / 2) + i % 2;
        const C centred = product(i % 2, i / 2, j) - mean[at];
        scale[at] += centred * centred;
      }
    });
    add_up(scale);
#pragma unroll
    for (int i = 0; i < 2 * kCount; i++) {
      scale[i] = inverse_deviation<C>(scale[i] / C(kRanges.range[i / 2].count * H));
      if (threadIdx.x == 0) write<C>(p.scales, b * Norm::kScales + i, scale[i]);
    }

    C* const halves = static_cast<C*>(p.halves) + b * 2 * H;  // c and o
    each_unit(H, [&](int64_t j) {
      const int64_t at = b * H + j;
      C s[Cell::kSlots] = {};
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int gate = i / 2, of = 2 * range_of(kRanges, gate) + i % 2;
        const C value = (product(i % 2, gate, j) - mean[of]) * scale[of];
        save(Norm::kSavedProducts + i % 2 * kGates + gate, j, value);
        if (i % 2 == 0)
          s[slot_of(Cell::x_ranges(), gate)] +=
              value * load<S>(p.norms.gain_ih, gate0 + gate * H + j) +
              read<S>(p.b_ih, gate0 + gate * H + j);
        else
          s[slot_of(Cell::h_ranges(), gate)] +=
              value * load<S>(p.norms.gain_hh, gate0 + gate * H + j) +
              read<S>(p.b_hh, gate0 + gate * H + j);
      }
      if constexpr (Cell::kHasCell) {
        const C c_prev = anew ? C(0) : read<C>(p.c, at);
        C c = c_prev;
        Cell::template forward_cell<ScalarMath>(s, c);
        halves[j] = c, halves[H + j] = s[3];
        if (zones_c) c = zone_out(rate_of<C>(p.zoneout_c, at), c_prev, c);
        write<C>(p.c, at, c);
        write<C>(p.saved_c, b * p.c_stride + j, c);
      } else {
        const C h_prev = anew ? C(0) : read<C>(p.h, at);
        C none = 0, h = Cell::template forward<ScalarMath>(s, h_prev, none);
        if (zones_h) h = zone_out(rate_of<C>(p.zoneout_h, at), h_prev, h);
        write_h<S>(p, b, j, h);
      }
#pragma unroll
      for (int k = 0; k < Cell::kSaved; k++) save(k, j, s[k]);
    });
    if constexpr (Cell::kHasCell) {
      C mean_c[1] = {}, scale_c[1] = {};
      each_unit(H, [&](int64_t j) { mean_c[0] += halves[j]; });
      add_up(mean_c);
      mean_c[0] /= C(H);
      each_unit(H, [&](int64_t j) {
        const C centred = halves[j] - mean_c[0];
        scale_c[0] += centred * centred;
      });
      add_up(scale_c);
      scale_c[0] = inverse_deviation<C>(scale_c[0] / C(H));
      if (threadIdx.x == 0) write<C>(p.scales, (b + 1) * Norm::kScales - 1, scale_c[0]);
      each_unit(H, [&](int64_t j) {
        const int64_t at = b * H + j;
        C s[Cell::kSlots] = {};
        s[3] = halves[H + j];
        const C value = (halves[j] - mean_c[0]) * scale_c[0];
        save(Norm::kSavedCell, j, value);
        const C seen =
            value * load<S>(p.norms.gain_c, unit0 + j) + load<S>(p.norms.shift_c, unit0 + j);
        C h = Cell::template output<ScalarMath>(s, seen);
        if (zones_h) h = zone_out(rate_of<C>(p.zoneout_h, at), anew ? C(0) : read<C>(p.h, at), h);
        write_h<S>(p, b, j, h);
      });
    }
  }
}

// The gradient through n(a) = value, whose own gradient is d; the means are of d and d * value.
template <class C>
__device__ inline C through_norm(C d, C value, C mean_d, C mean_dv, C scale) {
  return scale * (d - mean_d - value * mean_dv);
}

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads, 2)
    normed_backward_kernel(const __grid_constant__ NormedBackward p) {
  using C = Compute<S>;
  using Norm = Normed<Cell>;
  constexpr auto kRanges = Cell::x_ranges();
  constexpr int kGates = Cell::kGates, kCount = decltype(Cell::x_ranges())::kCount;
  constexpr int kNormed = Cell::kSlots + Cell::kHasCell;  // columns of dnormed
  const int64_t H = p.hidden_size;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    C* const dnormed = static_cast<C*>(p.dnormed) + b * kNormed * H;
    S* const dgates = static_cast<S*>(p.dgates) + b * Norm::kSlots * H;
    if (!runs_at(p, b, p.step)) {
      each_unit(H, [&](int64_t j) {
        write<C>(p.dh, b * H + j, later_gradient<C>(p, b, j));
        for (int k = 0; k < Norm::kSlots; k++) dgates[k * H + j] = from_compute<S>(0);
        for (int k = 0; k < kNormed; k++) dnormed[k * H + j] = 0;
        write<S>(p.hidden, b * H + j, 0);
      });
      continue;
    }
    const bool anew = begins_anew(p, p.resets, b, p.step);
    // Of the row's weights, among those of all members.
    const int64_t unit0 = member_of(p, b) * H, gate0 = unit0 * kGates;
    const C* const scales = static_cast<const C*>(p.scales) + b * Norm::kScales;
    auto saved = [&](int slot, int64_t j) {
      return load<S>(p.saved, (b * Norm::kSaved + slot) * H + j);
    };
    // dL/dh of this step, less what zoneout passes to the step before.
    auto gradient_h = [&](int64_t j, C* passed) {
      C dh = later_gradient<C>(p, b, j) + read<C>(p.dy, b * p.dy_stride + j);
      *passed = 0;
      if (p.zoneout_h.rate > 0) *passed = zone_out_backward(rate_of<C>(p.zoneout_h, b * H + j), dh);
      return dh;
    };

    // From dL/dh to the gradients of o and of n(c), and the means of the latter.
    C means_c[2] = {};
    if constexpr (Cell::kHasCell) {
      each_unit(H, [&](int64_t j) {
        C s[Cell::kSlots] = {}, passed;
        s[3] = saved(3, j);
        const C value = saved(Norm::kSavedCell, j), gain = load<S>(p.norms.gain_c, unit0 + j);
        const C seen = value * gain + load<S>(p.norms.shift_c, unit0 + j);
        if (p.hidden) write<S>(p.hidden, b * H + j, Cell::template output<ScalarMath>(s, seen));
        const C dh = gradient_h(j, &passed);
        const C dseen = Cell::template backward_output<ScalarMath>(s, seen, dh);
        dnormed[Cell::kSlots * H + j] = dseen;
        dnormed[3 * H + j] = s[3];
        write<C>(p.dh, b * H + j, anew ? 0 : passed);
        means_c[0] += dseen * gain, means_c[1] += dseen * gain * value;
      });
      add_up(means_c);
      means_c[0] /= C(H), means_c[1] /= C(H);
    }

    // The gradients of the slots, and the means of those of the normalised products: of d and
    // d * value, for both products of each range.
    C means[4 * kCount] = {};
    auto normed_gradient = [&](const C(&s)[Cell::kSlots], int i, int64_t j) {
      const int gate = i / 2;
      return i % 2 == 0 ? s[slot_of(Cell::x_ranges(), gate)] *
                              load<S>(p.norms.gain_ih, gate0 + gate * H + j)
                        : s[slot_of(Cell::h_ranges(), gate)] *
                              load<S>(p.norms.gain_hh, gate0 + gate * H + j);
    };
    auto saved_product = [&](int i, int64_t j) {
      return saved(Norm::kSavedProducts + i % 2 * kGates + i / 2, j);
    };
    each_unit(H, [&](int64_t j) {
      const int64_t at = b * H + j;
      C s[Cell::kSlots];
#pragma unroll
      for (int k = 0; k < Cell::kSaved; k++) s[k] = saved(k, j);
      if constexpr (Cell::kHasCell) {
        C dc = read<C>(p.dc, at) + read<C>(p.dcs, b * p.c_stride + j), passed = 0;
        if (p.zoneout_c.rate > 0) passed = zone_out_backward(rate_of<C>(p.zoneout_c, at), dc);
        dc += through_norm<C>(dnormed[Cell::kSlots * H + j] * load<S>(p.norms.gain_c, unit0 + j),
                              saved(Norm::kSavedCell, j), means_c[0], means_c[1],
                              scales[Norm::kScales - 1]);
        Cell::backward_cell(s, state_before<S, C>(p, p.c0, p.c_prev, p.c_stride, b, j), dc);
        write<C>(p.dc, at, anew ? 0 : dc + passed);
        s[3] = dnormed[3 * H + j];
      } else {
        C passed, none = 0;
        const C dh = gradient_h(j, &passed);
        const C h_prev = state_before<S, S>(p, p.h0, p.h_prev, p.h_stride, b, j);
        const C direct = Cell::template backward<ScalarMath>(s, h_prev, C(0), C(0), C(0), dh, none);
        write<C>(p.dh, at, anew ? 0 : direct + passed);
      }
#pragma unroll
      for (int k = 0; k < Cell::kSlots; k++) dnormed[k * H + j] = s[k];
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int of = 2 * (2 * range_of(kRanges, i / 2) + i % 2);
        const C d = normed_gradient(s, i, j);
        means[of] += d, means[of + 1] += d * saved_product(i, j);
      }
    });
    add_up(means);
#pragma unroll
    for (int i = 0; i < 4 * kCount; i++) means[i] /= C(kRanges.range[i / 4].count * H);

    each_unit(H, [&](int64_t j) {
      C s[Cell::kSlots];
#pragma unroll
      for (int k = 0; k < Cell::kSlots; k++) s[k] = dnormed[k * H + j];
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int range = 2 * range_of(kRanges, i / 2) + i % 2;
        const C d = through_norm<C>(normed_gradient(s, i, j), saved_product(i, j), means[2 * range],
                                    means[2 * range + 1], scales[range]);
        dgates[(i % 2 * kGates + i / 2) * H + j] = from_compute<S>(d);
      }
    });
  }
}

// The kernel of `select`, a function of a cell and a value of the storage type, on all of p.
template <class P, class F>
int run(const P& p, void* stream, F select) {
  if (p.batch == 0 || p.hidden_size == 0) return 0;
  const Grid grid{dim3(unsigned(p.batch < 1 << 20 ? p.batch : 1 << 20)), dim3(kThreads)};
  auto on = [&](auto cell) {
    return with_dtype(p.dtype, [&](auto s) { return launch(select(cell, s), grid, stream, p); });
  };
  switch (p.cell) {
    case Cell::kGru:
      return on(Gru{});
    case Cell::kLstm:
      return on(Lstm{});
    default:
      return kInvalidValue;
  }
}

}  // namespace

int normed_forward(const NormedForward& p, void* stream) {
  return run(p, stream,
             [](auto cell, auto s) { return normed_forward_kernel<decltype(cell), decltype(s)>; });
}
int normed_backward(const NormedBackward& p, void* stream) {
  return run(p, stream,
             [](auto cell, auto s) { return normed_backward_kernel<decltype(cell), decltype(s)>; });
}

}  // namespace fusedrnn
