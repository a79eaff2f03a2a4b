// Forward of the cells with layer normalisation: see normed.h.
#include <cmath>

#include "cuda/stepwise/normed.h"

namespace fusedrnn {
namespace {

using namespace normed;

constexpr double kEpsilon = 1e-5;  // the same as in fusedrnn/reference.py

template <class C>
__device__ inline C inverse_deviation(C variance) {
  return C(1 / sqrt(double(variance) + kEpsilon));
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
  each_row<S>(p, [&](int64_t b, bool anew, int64_t unit0) {
    const int64_t gate0 = unit0 * kGates;
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
  });
}

}  // namespace

int normed_forward(const NormedForward& p, void* stream) {
  return normed::run(p, p, stream, [](auto cell, auto s) {
    return normed_forward_kernel<decltype(cell), decltype(s)>;
  });
}

}  // namespace fusedrnn
