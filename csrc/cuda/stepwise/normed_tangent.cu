// The derivative of forward of the cells with layer normalisation (normed.h) in one direction:
//
//   tangent of n(a) = through_norm of da
//   tangent of 1 / sqrt(var + epsilon) = -mean(da n(a)) / (var + epsilon)
#include "cuda/stepwise/normed.h"

namespace fusedrnn {
namespace {

using namespace normed;

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads, 2)
    normed_forward_tangent_kernel(const __grid_constant__ NormedForwardTangent p) {
  using C = Compute<S>;
  using Norm = Normed<Cell>;
  constexpr auto kRanges = Cell::x_ranges();
  constexpr int kGates = Cell::kGates, kCount = decltype(Cell::x_ranges())::kCount;
  const SavedStep& value = p.value;
  const int64_t H = p.hidden_size;
  const bool zones_h = p.zoneout_h.rate > 0, zones_c = p.zoneout_c.rate > 0;
  each_row<S>(p, [&](int64_t b, bool anew, int64_t unit0) {
    const int64_t gate0 = unit0 * kGates;
    // Tangents of the products of the input (0) and of h (1), and what these are normalised.
    auto product = [&](int which, int gate, int64_t j) {
      if (which == 0) return read<C>(p.gates_x, b * p.gates_x_stride + gate * H + j);
      return (anew ? C(0) : read<C>(p.gates_h, b * p.gates_h_stride + gate * H + j)) +
             read<C>(p.known_h, b * p.known_h_stride + gate * H + j);
    };
    auto saved = [&](int slot, int64_t j) {
      return load<S>(value.saved, (b * Norm::kSaved + slot) * H + j);
    };
    auto save = [&](int slot, int64_t j, C tangent) {
      write<S>(p.saved, (b * Norm::kSaved + slot) * H + j, tangent);
    };
    auto scale = [&](int i) { return load<C>(p.scales, b * Norm::kScales + i); };
    auto save_scale = [&](int i, C mean_dv) {
      if (threadIdx.x == 0)
        write<C>(p.dscales, b * Norm::kScales + i, -scale(i) * scale(i) * mean_dv);
    };

    C means[4 * kCount] = {};  // of da and da * n(a), for both products of each range
    each_unit(H, [&](int64_t j) {
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int gate = i / 2, of = 2 * (2 * range_of(kRanges, gate) + i % 2);
        const C da = product(i % 2, gate, j);
        means[of] += da;
        means[of + 1] += da * saved(Norm::kSavedProducts + i % 2 * kGates + gate, j);
      }
    });
    add_up(means);
#pragma unroll
    for (int i = 0; i < 4 * kCount; i++) means[i] /= C(kRanges.range[i / 4].count * H);
#pragma unroll
    for (int i = 0; i < 2 * kCount; i++) save_scale(i, means[2 * i + 1]);

    C* const halves = static_cast<C*>(p.halves) + b * 2 * H;  // tangents of c and o
    each_unit(H, [&](int64_t j) {
      const int64_t at = b * H + j;
      Dual<C> s[Cell::kSlots] = {};
#pragma unroll
      for (int k = 0; k < Cell::kSaved; k++) s[k].value = saved(k, j);
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int gate = i / 2, of = 2 * range_of(kRanges, gate) + i % 2;
        const int slot = Norm::kSavedProducts + i % 2 * kGates + gate;
        const int64_t of_gate = gate0 + gate * H + j;
        const C v = saved(slot, j);
        const C dv = through_norm<C>(product(i % 2, gate, j), v, means[2 * of], means[2 * of + 1],
                                     scale(of));
        save(slot, j, dv);
        if (i % 2 == 0)
          s[slot_of(Cell::x_ranges(), gate)].tangent += dv * load<S>(p.norms.gain_ih, of_gate) +
                                                        v * read<S>(p.dnorms.gain_ih, of_gate) +
                                                        read<S>(p.b_ih, of_gate);
        else
          s[slot_of(Cell::h_ranges(), gate)].tangent += dv * load<S>(p.norms.gain_hh, of_gate) +
                                                        v * read<S>(p.dnorms.gain_hh, of_gate) +
                                                        read<S>(p.b_hh, of_gate);
      }
      if constexpr (Cell::kHasCell) {
        const Dual<C> c_prev{state_before<S, C>(p, value.c0, value.c_prev, p.c_stride, b, j),
                             anew ? C(0) : read<C>(p.c, at)};
        C dc = Cell::tangent_cell(s, c_prev);
        halves[j] = dc, halves[H + j] = s[3].tangent;
        if (zones_c) dc = zone_out(rate_of<C>(p.zoneout_c, at), c_prev.tangent, dc);
        write<C>(p.c, at, dc);
        write<C>(p.saved_c, b * p.c_stride + j, dc);
      } else {
        const Dual<C> h_prev{state_before<S, S>(p, value.h0, value.h_prev, value.h_stride, b, j),
                             anew ? C(0) : read<C>(p.h, at)};
        Dual<C> none{};
        C dh = Cell::template tangent<ScalarMath>(s, h_prev, C(0), none, none);
        if (zones_h) dh = zone_out(rate_of<C>(p.zoneout_h, at), h_prev.tangent, dh);
        write_h<S>(p, b, j, dh);
      }
#pragma unroll
      for (int k = 0; k < Cell::kSaved; k++) save(k, j, s[k].tangent);
    });
    if constexpr (Cell::kHasCell) {
      constexpr int kLast = Norm::kScales - 1;
      C means_c[2] = {};
      each_unit(H, [&](int64_t j) {
        means_c[0] += halves[j], means_c[1] += halves[j] * saved(Norm::kSavedCell, j);
      });
      add_up(means_c);
      means_c[0] /= C(H), means_c[1] /= C(H);
      save_scale(kLast, means_c[1]);
      each_unit(H, [&](int64_t j) {
        const int64_t at = b * H + j;
        Dual<C> s[Cell::kSlots] = {};
        s[3] = {saved(3, j), halves[H + j]};
        const C v = saved(Norm::kSavedCell, j);
        const Dual<C> c{v, through_norm<C>(halves[j], v, means_c[0], means_c[1], scale(kLast))};
        save(Norm::kSavedCell, j, c.tangent);
        const Dual<C> gain{load<S>(p.norms.gain_c, unit0 + j), read<S>(p.dnorms.gain_c, unit0 + j)};
        const Dual<C> shift{load<S>(p.norms.shift_c, unit0 + j),
                            read<S>(p.dnorms.shift_c, unit0 + j)};
        const Dual<C> h = Cell::template output<DualMath<ScalarMath>>(s, c * gain + shift);
        write<S>(p.hidden, 2 * b * H + j, h.tangent);
        write<S>(p.hidden, (2 * b + 1) * H + j, h.value);
        C dh = h.tangent;
        if (zones_h) dh = zone_out(rate_of<C>(p.zoneout_h, at), anew ? C(0) : read<C>(p.h, at), dh);
        write_h<S>(p, b, j, dh);
      });
    }
  });
}

}  // namespace

int normed_forward_tangent(const NormedForwardTangent& p, void* stream) {
  return normed::run(p, p, stream, [](auto cell, auto s) {
    return normed_forward_tangent_kernel<decltype(cell), decltype(s)>;
  });
}

}  // namespace fusedrnn
