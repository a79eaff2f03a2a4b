// Layer normalisation of one row of one step (cells/normed.h): its means and variances go over
// whole rows, so it comes when the step's products are complete.
//
// Backward leaves two sets of gradients: those of the products before normalisation in dgates, from
// which all else follows as without it, and those of what comes out of it in dnormed, one value for
// each slot of the plain cell and then for n(c), from which the gradients of gains, biases and
// shift are summed.
#pragma once
#include "cpu/pass/cell.h"

namespace {

constexpr double kEpsilon = 1e-5;  // of fusedrnn/reference.py too

template <class S>
struct NormWeights {
  const S *b_ih, *b_hh, *gain_ih, *gain_hh, *gain_c, *shift_c;

  FUSEDRNN_INLINE explicit NormWeights(const Weights& w)
      : b_ih(static_cast<const S*>(w.b_ih)),
        b_hh(static_cast<const S*>(w.b_hh)),
        gain_ih(static_cast<const S*>(w.gain_ih)),
        gain_hh(static_cast<const S*>(w.gain_hh)),
        gain_c(static_cast<const S*>(w.gain_c)),
        shift_c(static_cast<const S*>(w.shift_c)) {}
};

// f(first unit, number of units) vector by vector. One copy of f, for these functions are long and
// compiled for every cell, dtype and instruction set: the last units take a branch in each `part`.
template <class C, class F>
FUSEDRNN_INLINE void each_vector(int64_t H, F f) {
  for (int64_t j = 0; j < H; j += Lanes<C>::kWidth) f(j, min(Lanes<C>::kWidth, H - j));
}
template <class S>
__attribute__((noinline)) Vec<Compute<S>> last_part(const S* p, int64_t n) {
  return load(p, n);
}
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> part(const S* p, int64_t n) {
  return n == Lanes<Compute<S>>::kWidth ? load(p) : last_part(p, n);
}
template <class S>
__attribute__((noinline)) void put_last_part(S* p, Vec<Compute<S>> v, int64_t n) {
  store(p, v, n);
}
template <class S>
FUSEDRNN_INLINE void put_part(S* p, Vec<Compute<S>> v, int64_t n) {
  if (n == Lanes<Compute<S>>::kWidth) return store(p, v);
  put_last_part(p, v, n);
}

// The first n lanes, and 0 in the others.
template <class C>
FUSEDRNN_INLINE Vec<C> first_lanes(Vec<C> v, int64_t n) {
  for (int64_t i = n; i < Lanes<C>::kWidth; i++) v[i] = 0;
  return v;
}

template <class C>
FUSEDRNN_INLINE C sum_of_lanes(Vec<C> v) {
  C sum = 0;
  for (int i = 0; i < Lanes<C>::kWidth; i++) sum += v[i];
  return sum;
}

// Of each gate the mean of a quantity over all units of its run, given the sums over units.
template <int kGates, class C, class R>
FUSEDRNN_INLINE void means(int64_t H, const R& runs, const Vec<C> (&sums)[kGates],
                           C (&mean)[kGates]) {
  for (const Run& run : runs.run) {
    C total = 0;
    for (int k = run.gate; k < run.gate + run.count; k++) total += sum_of_lanes<C>(sums[k]);
    for (int k = run.gate; k < run.gate + run.count; k++) mean[k] = total / C(run.count * H);
  }
}

// Mean and 1 / sqrt(var + epsilon) of each gate's run; at(k, j) points to units of gate k, from j
// on.
template <int kGates, class C, class R, class At>
FUSEDRNN_INLINE void moments(int64_t H, const R& runs, At at, C (&mean)[kGates],
                             C (&scale)[kGates]) {
  Vec<C> sums[kGates] = {}, squares[kGates] = {};
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) sums[k] += part(at(k, j), n);
  });
  means<kGates, C>(H, runs, sums, mean);
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      const Vec<C> centred = first_lanes<C>(part(at(k, j), n) - mean[k], n);
      squares[k] += centred * centred;
    }
  });
  means<kGates, C>(H, runs, squares, scale);
  for (C& s : scale) s = C(1 / __builtin_sqrt(double(s) + kEpsilon));
}

constexpr Runs<1> kRunOfC{{{0, 0, 1}}};

// In the place of cell_forward: all units of a row whose `gates` hold the products in the slots of
// Normed. They are overwritten. `scales` is null when nothing is kept for backward.
template <class Normed, class S>
__attribute__((noinline)) void normed_forward(int64_t H, const ForwardRow<S>& row,
                                              const NormWeights<S>& weights, Compute<S>* scales) {
  using C = Compute<S>;
  using Cell = typename Normed::Plain;
  constexpr int w = Lanes<C>::kWidth, kGates = Normed::kGates;
  constexpr auto runs = Cell::x_runs();
  auto slot = [&](int k, int64_t j) { return row.gates + j * Normed::kSlots + k * w; };
  auto keep = [&](int k, int64_t j, int64_t n, Vec<C> v) {
    if (row.saved) put_part(row.saved + k * H + j, v, n);
  };
  C mean_x[kGates], scale_x[kGates], mean_h[kGates], scale_h[kGates];
  moments<kGates, C>(H, runs, slot, mean_x, scale_x);
  moments<kGates, C>(
      H, runs, [&](int k, int64_t j) { return slot(kGates + k, j); }, mean_h, scale_h);
  for (const Run& run : runs.run) {
    if (!scales) break;
    *scales++ = scale_x[run.gate], *scales++ = scale_h[run.gate];
  }

  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vec<C> s[Cell::kSlots] = {};
    auto add = [&](int to, Vec<C> v, const S* gain, const S* bias, int64_t at) {
      if (bias) s[to] += part(bias + at, n);
      s[to] += v * part(gain + at, n);
    };
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      const Vec<C> x = (load(slot(k, j)) - mean_x[k]) * scale_x[k],
                   h = (load(slot(kGates + k, j)) - mean_h[k]) * scale_h[k];
      keep(Normed::kSavedProducts + k, j, n, x);
      keep(Normed::kSavedProducts + kGates + k, j, n, h);
      add(slot_of(Cell::x_runs(), k), x, weights.gain_ih, weights.b_ih, k * H + j);
      add(slot_of(Cell::h_runs(), k), h, weights.gain_hh, weights.b_hh, k * H + j);
    }
    if constexpr (Cell::kHasCell) {
      const Vec<C> c_prev = part(row.c + j, n);
      Vec<C> c = c_prev;
      Cell::template forward_cell<Math<S>>(s, c);
      put_c(row, j, n, zoned<S>(row.keep_c, j, n, c_prev, c));
      store(slot(0, j), c), store(slot(1, j), s[3]);  // for the second half
    } else {
      const Vec<C> h_prev = read_h_prev<Cell>(row, j, n);
      Vec<C> none{};
      const Vec<C> h = Cell::template forward<Math<S>>(s, h_prev, none);
      put_h(row, j, n, zoned<S>(row.keep_h, j, n, h_prev, h));
    }
    for (int k = 0; k < Cell::kSaved; k++) keep(k, j, n, s[k]);
  });

  if constexpr (Cell::kHasCell) {
    C mean[1], scale[1];
    moments<1, C>(H, kRunOfC, slot, mean, scale);
    if (scales) *scales = scale[0];
    each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vec<C> s[Cell::kSlots] = {};
      s[3] = load(slot(1, j));
      const Vec<C> c = (load(slot(0, j)) - mean[0]) * scale[0];
      keep(Normed::kSavedCell, j, n, c);
      const Vec<C> seen = c * part(weights.gain_c + j, n) + part(weights.shift_c + j, n);
      const Vec<C> h = Cell::template output<Math<S>>(s, seen);
      put_h(row, j, n, zoned<S>(row.keep_h, j, n, read_h_prev<Cell>(row, j, n), h));
    });
  }
}

// The gradient of what was normalised: d is that of the result n(a) = v.
template <class C>
FUSEDRNN_INLINE Vec<C> through_norm(Vec<C> d, Vec<C> v, C mean_d, C mean_dv, C scale) {
  return scale * (d - mean_d - v * mean_dv);
}

// In the place of cell_backward_row.
template <class Normed, class S>
__attribute__((noinline)) void normed_backward(int64_t H, const BackwardRow<S>& row,
                                               const NormWeights<S>& weights,
                                               const Compute<S>* scales, Compute<S>* dnormed) {
  using C = Compute<S>;
  using Cell = typename Normed::Plain;
  constexpr int kGates = Normed::kGates;
  constexpr auto runs = Cell::x_runs();
  auto saved = [&](int k, int64_t j, int64_t n) { return part(row.saved + k * H + j, n); };
  C* const dseen = dnormed + Cell::kSlots * H;
  auto of_c = [&](int64_t j, int64_t n) {
    return part(dseen + j, n) * part(weights.gain_c + j, n);
  };
  C mean_dc[1], mean_dcc[1];

  if constexpr (Cell::kHasCell) {
    Vec<C> sums[1] = {}, products[1] = {};
    each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vec<C> s[Cell::kSlots], kept{};
      for (int k = 0; k < Cell::kSaved; k++) s[k] = saved(k, j, n);
      const Vec<C> c = saved(Normed::kSavedCell, j, n);
      const Vec<C> seen = c * part(weights.gain_c + j, n) + part(weights.shift_c + j, n);
      if (row.hidden) put_part(row.hidden + j, Cell::template output<Math<S>>(s, seen), n);
      const Vec<C> dh = gradient<C>(row.dh, row.dy, row.keep_h, j, n, &kept);
      put_part(dseen + j, Cell::template backward_output<Math<S>>(s, seen, dh), n);
      put_part(dnormed + 3 * H + j, s[3], n);
      if (row.dh_direct) put_part(row.dh_direct + j, kept, n);
      const Vec<C> d = of_c(j, n);
      sums[0] += d, products[0] += d * c;
    });
    means<1, C>(H, kRunOfC, sums, mean_dc);
    means<1, C>(H, kRunOfC, products, mean_dcc);
  }

  // Of each product: the gradient of its normalised value, and its own in the end.
  auto of_x = [&](int k, int64_t j, int64_t n) {
    return part(dnormed + slot_of(Cell::x_runs(), k) * H + j, n) *
           part(weights.gain_ih + k * H + j, n);
  };
  auto of_h = [&](int k, int64_t j, int64_t n) {
    return part(dnormed + slot_of(Cell::h_runs(), k) * H + j, n) *
           part(weights.gain_hh + k * H + j, n);
  };
  Vec<C> sums_x[kGates] = {}, products_x[kGates] = {}, sums_h[kGates] = {}, products_h[kGates] = {};
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vec<C> s[Cell::kSlots], kept{};
    for (int k = 0; k < Cell::kSaved; k++) s[k] = saved(k, j, n);
    if constexpr (Cell::kHasCell) {
      Vec<C> dc = gradient<C>(row.dc, row.dcs, row.keep_c, j, n, &kept);
      dc += through_norm<C>(of_c(j, n), saved(Normed::kSavedCell, j, n), mean_dc[0], mean_dcc[0],
                            scales[Normed::kScales - 1]);
      Cell::backward_cell(s, read_c_prev(row, j, n), dc);
      put_part(row.dc + j, dc + kept, n);
    } else {
      const Vec<C> h_prev = row.h_prev ? part(row.h_prev + j, n) : Vec<C>{};
      const Vec<C> dh = gradient<C>(row.dh, row.dy, row.keep_h, j, n, &kept), none{};
      Vec<C> dc{};
      const Vec<C> direct = Cell::template backward<Math<S>>(s, h_prev, none, none, none, dh, dc);
      if (row.dh_direct) put_part(row.dh_direct + j, direct + kept, n);
    }
    for (int k = 0; k < Cell::kSlots - Cell::kHasCell; k++) put_part(dnormed + k * H + j, s[k], n);
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      const Vec<C> x = of_x(k, j, n), h = of_h(k, j, n);
      sums_x[k] += x, products_x[k] += x * saved(Normed::kSavedProducts + k, j, n);
      sums_h[k] += h, products_h[k] += h * saved(Normed::kSavedProducts + kGates + k, j, n);
    }
  });

  C mean_dx[kGates], mean_dxx[kGates], mean_dh[kGates], mean_dhh[kGates];
  C scale_x[kGates], scale_h[kGates];
  means<kGates, C>(H, runs, sums_x, mean_dx), means<kGates, C>(H, runs, products_x, mean_dxx);
  means<kGates, C>(H, runs, sums_h, mean_dh), means<kGates, C>(H, runs, products_h, mean_dhh);
  for (const Run& run : runs.run) {
    for (int k = run.gate; k < run.gate + run.count; k++)
      scale_x[k] = scales[0], scale_h[k] = scales[1];
    scales += 2;
  }
  auto put = [&](int k, int64_t j, int64_t n, Vec<C> d) {
    put_part(row.dgates + k * H + j, d, n);
    store_operands(row.factors, row.plane, k * H + j, d, n);
  };
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      put(k, j, n,
          through_norm<C>(of_x(k, j, n), saved(Normed::kSavedProducts + k, j, n), mean_dx[k],
                          mean_dxx[k], scale_x[k]));
      put(kGates + k, j, n,
          through_norm<C>(of_h(k, j, n), saved(Normed::kSavedProducts + kGates + k, j, n),
                          mean_dh[k], mean_dhh[k], scale_h[k]));
    }
  });
}

}  // namespace
