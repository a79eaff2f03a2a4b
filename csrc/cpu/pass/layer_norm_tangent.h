// The derivative of layer normalisation of one row of one step (layer_norm.h) in one direction:
//
//   tangent of n(a) = the gradient through n (through_norm) of da
//   tangent of 1 / sqrt(var + epsilon) = -mean(da n(a)) / (var + epsilon)
#pragma once
#include "cpu/pass/layer_norm.h"
#include "cpu/pass/tangent_cell.h"

namespace {

// The steps of normed_tangent, n units from j on. All but `add` are inlined in it.
template <class Normed, class S>
struct NormedTangent {
  using C = Compute<S>;
  using V = Vec<C>;
  using Cell = typename Normed::Plain;
  static constexpr int kWidth = Lanes<C>::kWidth, kGates = Normed::kGates;
  static constexpr auto kRanges = Cell::x_ranges();

  const int64_t H;
  const TangentRow<S>& row;
  const NormWeights<S>&weights, &dweights;
  const C* const scales;
  NormSums<kGates, C, V, C> sums_x, sums_h;
  NormSums<1, C, V, C> sums_c;

  FUSEDRNN_INLINE C* slot(int k, int64_t j) const {
    return row.gates + j * Normed::kSlots + k * kWidth;
  }
  FUSEDRNN_INLINE V saved(int k, int64_t j, int64_t n) const {
    return load_part(row.saved + k * H + j, n);
  }
  FUSEDRNN_INLINE void keep(int k, int64_t j, int64_t n, V v) const {
    if (row.dsaved) store_part(row.dsaved + k * H + j, v, n);
  }
  // With its tangent, null for zeros.
  FUSEDRNN_INLINE Dual<V> weight(const S* NormWeights<S>::* of, int64_t j, int64_t n) const {
    return {load_part(weights.*of + j, n), dweights.*of ? load_part(dweights.*of + j, n) : V{}};
  }

  FUSEDRNN_INLINE void measure(int64_t j, int64_t n) {
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      sums_x.add(k, load_part(slot(k, j), n), saved(Normed::kSavedProducts + k, j, n));
      sums_h.add(k, load_part(slot(kGates + k, j), n),
                 saved(Normed::kSavedProducts + kGates + k, j, n));
    }
  }

  // The tangent of 1 / sqrt(var + epsilon), where those of the products have this mean times n(a).
  static FUSEDRNN_INLINE C of_scale(C scale, C mean_dv) { return -scale * scale * mean_dv; }

  // Normalises the products and computes the cell; where this has a c only its first half, and the
  // tangents of c and o replace the first two slots.
  FUSEDRNN_INLINE void gates(int64_t j, int64_t n) {
    Dual<V> s[Cell::kSlots] = {};
    for (int k = 0; k < Cell::kSaved; k++) s[k].value = saved(k, j, n);
    int next = 0;
    for (const GateRange& range : kRanges.range) {
#pragma GCC unroll 4
      for (int k = range.gate; k < range.gate + range.count; k++) {
        add(s[slot_of(Cell::x_ranges(), k)], sums_x, k, k, scales[next], &NormWeights<S>::gain_ih,
            dweights.b_ih, j, n);
        add(s[slot_of(Cell::h_ranges(), k)], sums_h, k, kGates + k, scales[next + 1],
            &NormWeights<S>::gain_hh, dweights.b_hh, j, n);
      }
      next += 2;
    }
    if constexpr (Cell::kHasCell) {
      const Dual<V> c_prev = read_c_prev(row, j, n);
      const V dc = Cell::tangent_cell(s, c_prev);
      store_dc(row, j, n, c_prev.tangent, dc);
      store(slot(0, j), dc), store(slot(1, j), s[3].tangent);
      sums_c.add(0, first_lanes<C>(dc, n), saved(Normed::kSavedCell, j, n));
    } else {
      const Dual<V> h_prev{load_or_zero(row.h_prev, j, n), load(row.dh + j, n)};
      Dual<V> none{};
      store_dh(row, j, n, Cell::template tangent<Math<S>>(s, h_prev, V{}, none, none));
    }
    for (int k = 0; k < Cell::kSaved; k++) keep(k, j, n, s[k].tangent);
  }
  // Adds the tangent of gain * n(a) + bias of a gate, whose products are in slot `product`.
  __attribute__((noinline)) void add(Dual<V>& sum, const NormSums<kGates, C, V, C>& sums, int k,
                                     int product, C scale, const S* NormWeights<S>::* gain,
                                     const S* dbias, int64_t j, int64_t n) const {
    const int place = Normed::kSavedProducts + product;
    const V v = saved(place, j, n), dv = sums.through(k, load_part(slot(product, j), n), v, scale);
    keep(place, j, n, dv);
    sum.tangent += (weight(gain, k * H + j, n) * Dual<V>{v, dv}).tangent;
    if (dbias) sum.tangent += load_part(dbias + k * H + j, n);
  }

  // The second half: normalises c and computes h.
  FUSEDRNN_INLINE void output(int64_t j, int64_t n, C scale) const {
    Dual<V> s[Cell::kSlots] = {};
    s[3] = {saved(3, j, n), load(slot(1, j))};
    const V v = saved(Normed::kSavedCell, j, n);
    const Dual<V> c{v, sums_c.through(0, load(slot(0, j)), v, scale)};
    keep(Normed::kSavedCell, j, n, c.tangent);
    const Dual<V> seen =
        c * weight(&NormWeights<S>::gain_c, j, n) + weight(&NormWeights<S>::shift_c, j, n);
    const Dual<V> h = Cell::template output<DualMath<Math<S>>>(s, seen);
    if (row.hidden) store_part(row.hidden + j, h.value, n);
    store_dh(row, j, n, h.tangent);
  }
};

// Replaces cell_tangent: all units of a row whose `gates` hold the tangents of the products in the
// slots of Normed. They are overwritten. `dscales` is null when nothing is kept.
template <class Normed, class S>
__attribute__((noinline)) void normed_tangent(int64_t H, const TangentRow<S>& row,
                                              const NormWeights<S>& weights,
                                              const NormWeights<S>& dweights,
                                              const Compute<S>* scales, Compute<S>* dscales) {
  using C = Compute<S>;
  using Steps = NormedTangent<Normed, S>;
  Steps steps{H, row, weights, dweights, scales, {}, {}, {}};
  each_vector<C>(H,
                 [&](int64_t j, int64_t n) __attribute__((always_inline)) { steps.measure(j, n); });
  steps.sums_x.take_means(H, Steps::kRanges), steps.sums_h.take_means(H, Steps::kRanges);
  each_vector<C>(H,
                 [&](int64_t j, int64_t n) __attribute__((always_inline)) { steps.gates(j, n); });
  int next = 0;
  for (const GateRange& range : Steps::kRanges.range) {
    if (!dscales) break;
    dscales[next] = Steps::of_scale(scales[next], steps.sums_x.mean_dv[range.gate]);
    dscales[next + 1] = Steps::of_scale(scales[next + 1], steps.sums_h.mean_dv[range.gate]);
    next += 2;
  }
  if constexpr (Normed::kHasCell) {
    constexpr int last = Normed::kScales - 1;
    steps.sums_c.take_means(H, kRangeOfC);
    if (dscales) dscales[last] = Steps::of_scale(scales[last], steps.sums_c.mean_dv[0]);
    each_vector<C>(H, [&](int64_t j, int64_t n)
                          __attribute__((always_inline)) { steps.output(j, n, scales[last]); });
  }
}

}  // namespace
