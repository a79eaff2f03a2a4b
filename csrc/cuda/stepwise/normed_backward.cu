// Backward of the cells with layer normalisation (normed.h), and with it its derivative in one
// direction: the same on dual numbers, each part of which has arrays of its own.
#include "cuda/stepwise/normed.h"

namespace fusedrnn {
namespace {

using namespace normed;

// What both parts have in common; f of each part; f(each part, its part of x).
__device__ inline const NormedBackward& common(const NormedBackward& p) { return p; }
__device__ inline const NormedBackward& common(const NormedBackwardTangent& p) { return p.value; }

template <class C, class F>
__device__ inline C gather(const NormedBackward& p, F f) {
  return f(p);
}
template <class C, class F>
__device__ inline Dual<C> gather(const NormedBackwardTangent& p, F f) {
  return {f(p.value), f(p.tangent)};
}
template <class C, class F>
__device__ inline void scatter(const NormedBackward& p, C x, F f) {
  f(p, x);
}
template <class C, class F>
__device__ inline void scatter(const NormedBackwardTangent& p, Dual<C> x, F f) {
  f(p.value, x.value), f(p.tangent, x.tangent);
}

// A gain or shift; the tangent of one may be null: zeros.
using Weight = const void* NormWeights::*;
template <class S>
__device__ inline Compute<S> weight(const NormedBackward& p, Weight w, int64_t at) {
  return load<S>(p.norms.*w, at);
}
template <class S>
__device__ inline Dual<Compute<S>> weight(const NormedBackwardTangent& p, Weight w, int64_t at) {
  return {load<S>(p.value.norms.*w, at), read<S>(p.tangent.norms.*w, at)};
}

template <class P, class C>
struct Kind {  // P = NormedBackward
  using V = C;
  using M = ScalarMath;
  static constexpr int kTurns = 1;  // rows of dgates and `hidden` that a row of the batch takes
};
template <class C>
struct Kind<NormedBackwardTangent, C> {
  using V = Dual<C>;
  using M = DualMath<ScalarMath>;
  static constexpr int kTurns = 2;
};

template <class Cell, class S, class P>
__global__ void __launch_bounds__(kThreads, 2)
    normed_backward_kernel(const __grid_constant__ P parts) {
  using C = Compute<S>;
  using V = typename Kind<P, C>::V;
  using M = typename Kind<P, C>::M;
  using Norm = Normed<Cell>;
  constexpr int kTurns = Kind<P, C>::kTurns;
  constexpr auto kRanges = Cell::x_ranges();
  constexpr int kGates = Cell::kGates, kCount = decltype(Cell::x_ranges())::kCount;
  constexpr int kNormed = Cell::kSlots + Cell::kHasCell;  // columns of dnormed
  const NormedBackward& p = common(parts);
  const int64_t H = p.hidden_size;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    auto get = [&](auto f) { return gather<C>(parts, f); };
    auto put_dh = [&](int64_t j, V x) {
      scatter<C>(parts, x, [&](auto& a, C own) { write<C>(a.dh, b * H + j, own); });
    };
    auto put_gate = [&](int slot, int64_t j, V x) {
      scatter<C>(parts, x, [&](auto& a, C own) {
        write<S>(a.dgates, (b * kTurns * Norm::kSlots + slot) * H + j, own);
      });
    };
    auto put_normed = [&](int column, int64_t j, V x) {
      scatter<C>(parts, x, [&](auto& a, C own) {
        static_cast<C*>(a.dnormed)[(b * kNormed + column) * H + j] = own;
      });
    };
    auto get_normed = [&](int column, int64_t j) {
      return get([&](auto& a) { return load<C>(a.dnormed, (b * kNormed + column) * H + j); });
    };
    auto put_hidden = [&](int64_t j, V x) {
      scatter<C>(parts, x, [&](auto& a, C own) { write<S>(a.hidden, b * kTurns * H + j, own); });
    };
    auto later = [&](int64_t j) {
      return get([&](auto& a) { return later_gradient<C>(a, b, j); });
    };
    if (!runs_at(p, b, p.step)) {
      each_unit(H, [&](int64_t j) {
        put_dh(j, later(j));
        for (int k = 0; k < Norm::kSlots; k++) put_gate(k, j, V{});
        for (int k = 0; k < kNormed; k++) put_normed(k, j, V{});
        put_hidden(j, V{});
      });
      continue;
    }
    const bool anew = begins_anew(p, p.resets, b, p.step);
    // Of the row's weights, among those of all members.
    const int64_t unit0 = member_of(p, b) * H, gate0 = unit0 * kGates;
    auto scale = [&](int i) {
      return get([&](auto& a) { return load<C>(a.scales, b * Norm::kScales + i); });
    };
    auto saved = [&](int slot, int64_t j) {
      return get([&](auto& a) { return load<S>(a.saved, (b * Norm::kSaved + slot) * H + j); });
    };
    // What zoneout passes of a gradient to the step before; the rest is left in d.
    auto zone_out = [&](const Zoneout& z, int64_t j, V& d) {
      if (z.rate <= 0) return V{};
      const C rate = rate_of<C>(z, b * H + j);
      if constexpr (kTurns == 1)
        return zone_out_backward(rate, d);
      else
        return V{zone_out_backward(rate, d.value), zone_out_backward(rate, d.tangent)};
    };
    // dL/dh of this step, less what zoneout passes to the step before.
    auto gradient_h = [&](int64_t j, V* passed) {
      V dh = later(j) + get([&](auto& a) { return read<C>(a.dy, b * a.dy_stride + j); });
      *passed = zone_out(p.zoneout_h, j, dh);
      return dh;
    };
    auto gain_c = [&](int64_t j) { return weight<S>(parts, &NormWeights::gain_c, unit0 + j); };

    // From dL/dh to the gradients of o and of n(c), and the means of the latter.
    V means_c[2] = {};
    if constexpr (Cell::kHasCell) {
      each_unit(H, [&](int64_t j) {
        V s[Cell::kSlots] = {}, passed;
        s[3] = saved(3, j);
        const V value = saved(Norm::kSavedCell, j), gain = gain_c(j);
        const V seen = value * gain + weight<S>(parts, &NormWeights::shift_c, unit0 + j);
        if (p.hidden) put_hidden(j, Cell::template output<M>(s, seen));
        const V dh = gradient_h(j, &passed);
        const V dseen = Cell::template backward_output<M>(s, seen, dh);
        put_normed(Cell::kSlots, j, dseen);
        put_normed(3, j, s[3]);
        put_dh(j, anew ? V{} : passed);
        means_c[0] += dseen * gain, means_c[1] += dseen * gain * value;
      });
      add_up(means_c);
      means_c[0] = means_c[0] / C(H), means_c[1] = means_c[1] / C(H);
    }

    // The gradients of the slots, and the means of those of the normalised products: of d and
    // d * value, for both products of each range.
    V means[4 * kCount] = {};
    auto normed_gradient = [&](const V(&s)[Cell::kSlots], int i, int64_t j) {
      const int gate = i / 2;
      const int64_t at = gate0 + gate * H + j;
      return i % 2 == 0
                 ? s[slot_of(Cell::x_ranges(), gate)] * weight<S>(parts, &NormWeights::gain_ih, at)
                 : s[slot_of(Cell::h_ranges(), gate)] * weight<S>(parts, &NormWeights::gain_hh, at);
    };
    auto saved_product = [&](int i, int64_t j) {
      return saved(Norm::kSavedProducts + i % 2 * kGates + i / 2, j);
    };
    each_unit(H, [&](int64_t j) {
      V s[Cell::kSlots] = {};
#pragma unroll
      for (int k = 0; k < Cell::kSaved; k++) s[k] = saved(k, j);
      if constexpr (Cell::kHasCell) {
        V dc = get(
            [&](auto& a) { return read<C>(a.dc, b * H + j) + read<C>(a.dcs, b * a.c_stride + j); });
        const V passed = zone_out(p.zoneout_c, j, dc);
        dc += through_norm<V>(get_normed(Cell::kSlots, j) * gain_c(j), saved(Norm::kSavedCell, j),
                              means_c[0], means_c[1], scale(Norm::kScales - 1));
        const V c_prev =
            get([&](auto& a) { return state_before<S, C>(a, a.c0, a.c_prev, a.c_stride, b, j); });
        Cell::backward_cell(s, c_prev, dc);
        scatter<C>(parts, anew ? V{} : dc + passed,
                   [&](auto& a, C own) { write<C>(a.dc, b * H + j, own); });
        s[3] = get_normed(3, j);
      } else {
        V passed, none{};
        const V dh = gradient_h(j, &passed);
        const V h_prev =
            get([&](auto& a) { return state_before<S, S>(a, a.h0, a.h_prev, a.h_stride, b, j); });
        const V direct = Cell::template backward<M>(s, h_prev, V{}, V{}, V{}, dh, none);
        put_dh(j, anew ? V{} : direct + passed);
      }
#pragma unroll
      for (int k = 0; k < Cell::kSlots; k++) put_normed(k, j, s[k]);
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int of = 2 * (2 * range_of(kRanges, i / 2) + i % 2);
        const V d = normed_gradient(s, i, j);
        means[of] += d, means[of + 1] += d * saved_product(i, j);
      }
    });
    add_up(means);
#pragma unroll
    for (int i = 0; i < 4 * kCount; i++) means[i] = means[i] / C(kRanges.range[i / 4].count * H);

    each_unit(H, [&](int64_t j) {
      V s[Cell::kSlots];
#pragma unroll
      for (int k = 0; k < Cell::kSlots; k++) s[k] = get_normed(k, j);
#pragma unroll
      for (int i = 0; i < 2 * kGates; i++) {
        const int range = 2 * range_of(kRanges, i / 2) + i % 2;
        put_gate(i % 2 * kGates + i / 2, j,
                 through_norm<V>(normed_gradient(s, i, j), saved_product(i, j), means[2 * range],
                                 means[2 * range + 1], scale(range)));
      }
    });
  }
}

template <class P>
int run_backward(const P& parts, const CellStep& step, void* stream) {
  return normed::run(step, parts, stream, [](auto cell, auto s) {
    return normed_backward_kernel<decltype(cell), decltype(s), P>;
  });
}

}  // namespace

int normed_backward(const NormedBackward& p, void* stream) { return run_backward(p, p, stream); }
int normed_backward_tangent(const NormedBackwardTangent& p, void* stream) {
  return run_backward(p, p.value, stream);
}

}  // namespace fusedrnn
