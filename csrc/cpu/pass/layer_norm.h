// Layer normalisation of one row of one step (cells/normed.h). Its means and variances are those of
// whole rows, so it follows the step's products.
//
// Backward computes two sets of gradients. dgates has those of the products before normalisation,
// from which everything else follows as without it. dnormed has those of the normalised values, one
// for each slot of the plain cell and one for n(c), from which the gradients of gains, biases and
// shift are summed. On dual numbers it is the derivative of backward.
#pragma once
#include "cpu/pass/cell.h"

namespace {

constexpr double kEpsilon = 1e-5;  // the same as in fusedrnn/reference.py

template <class Cell>
constexpr bool kIsNormed = false;
template <class Cell>
constexpr bool kIsNormed<Normed<Cell>> = true;

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

// f(first unit, units) vector by vector. There is one copy of f for full and partial vectors, which
// load_part and store_part tell apart: these functions are long, and compiled for every cell, dtype
// and instruction set.
template <class C, class F>
FUSEDRNN_INLINE void each_vector(int64_t H, F f) {
  for (int64_t j = 0; j < H; j += Lanes<C>::kWidth) f(j, min(Lanes<C>::kWidth, H - j));
}
template <class S>
__attribute__((noinline)) Vec<Compute<S>> load_last_part(const S* p, int64_t n) {
  return load(p, n);
}
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> load_part(const S* p, int64_t n) {
  return n == Lanes<Compute<S>>::kWidth ? load(p) : load_last_part(p, n);
}
template <class S>
__attribute__((noinline)) void store_last_part(S* p, Vec<Compute<S>> v, int64_t n) {
  store(p, v, n);
}
template <class S>
FUSEDRNN_INLINE void store_part(S* p, Vec<Compute<S>> v, int64_t n) {
  if (n == Lanes<Compute<S>>::kWidth) return store(p, v);
  store_last_part(p, v, n);
}

// The first n lanes, and 0 in the others.
template <class C>
FUSEDRNN_INLINE Vec<C> first_lanes(Vec<C> v, int64_t n) {
  for (int64_t i = n; i < Lanes<C>::kWidth; i++) v[i] = 0;
  return v;
}

// Called a few times a row.
template <class C>
__attribute__((noinline)) C sum_of_lanes(Vec<C> v) {
  C sum = 0;
  for (int i = 0; i < Lanes<C>::kWidth; i++) sum += v[i];
  return sum;
}
template <class C>
FUSEDRNN_INLINE Dual<C> sum_of_lanes(Dual<Vec<C>> v) {
  return {sum_of_lanes<C>(v.value), sum_of_lanes<C>(v.tangent)};
}

// The mean of a quantity over all units of each gate's range, given the sums over units. Sums and
// means are vectors and numbers, or dual numbers of these.
template <int kGates, class C, class R, class Sum, class Mean>
FUSEDRNN_INLINE void means(int64_t H, const R& ranges, const Sum (&sums)[kGates],
                           Mean (&mean)[kGates]) {
  for (const GateRange& range : ranges.range) {
    Mean total{};
    for (int k = range.gate; k < range.gate + range.count; k++) total += sum_of_lanes<C>(sums[k]);
    for (int k = range.gate; k < range.gate + range.count; k++)
      mean[k] = total / C(range.count * H);
  }
}

// Mean and 1 / sqrt(var + epsilon) of each gate's range; values(k, j) points to the units of gate k
// from j on.
template <int kGates, class C, class R, class Values>
FUSEDRNN_INLINE void moments(int64_t H, const R& ranges, Values values, C (&mean)[kGates],
                             C (&scale)[kGates]) {
  Vec<C> sums[kGates] = {}, squares[kGates] = {};
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) sums[k] += load_part(values(k, j), n);
  });
  means<kGates, C>(H, ranges, sums, mean);
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      const Vec<C> centred = first_lanes<C>(load_part(values(k, j), n) - mean[k], n);
      squares[k] += centred * centred;
    }
  });
  means<kGates, C>(H, ranges, squares, scale);
  for (C& s : scale) s = C(1 / __builtin_sqrt(double(s) + kEpsilon));
}

constexpr GateRanges<1> kRangeOfC{{{0, 0, 1}}};

// The steps of normed_forward. They are inlined in it, like those of NormedBackward.
template <class Normed, class S>
struct NormedForward {
  using C = Compute<S>;
  using Cell = typename Normed::Plain;
  static constexpr int kWidth = Lanes<C>::kWidth, kGates = Normed::kGates;
  static constexpr auto kRanges = Cell::x_ranges();

  const int64_t H;
  const ForwardRow<S>& row;
  const NormWeights<S>& weights;
  C mean_x[kGates], scale_x[kGates], mean_h[kGates], scale_h[kGates];

  FUSEDRNN_INLINE C* slot(int k, int64_t j) const {
    return row.gates + j * Normed::kSlots + k * kWidth;
  }
  FUSEDRNN_INLINE void save(int k, int64_t j, int64_t n, Vec<C> v) const {
    if (row.saved) store_part(row.saved + k * H + j, v, n);
  }

  FUSEDRNN_INLINE void measure() {
    moments<kGates, C>(H, kRanges, [&](int k, int64_t j) { return slot(k, j); }, mean_x, scale_x);
    moments<kGates, C>(
        H, kRanges, [&](int k, int64_t j) { return slot(kGates + k, j); }, mean_h, scale_h);
  }
  // Returns where the next scale goes.
  FUSEDRNN_INLINE C* save_scales(C* scales) const {
    for (const GateRange& range : kRanges.range)
      *scales++ = scale_x[range.gate], *scales++ = scale_h[range.gate];
    return scales;
  }

  // Normalises the gates of units [j, j + n) and computes the cell; where this has a c only its
  // first half, and c and o replace the first two slots.
  FUSEDRNN_INLINE void gates(int64_t j, int64_t n) const {
    Vec<C> s[Cell::kSlots] = {};
    auto add = [&](int k, Vec<C> v, const S* gain, const S* bias, int64_t unit) {
      if (bias) s[k] += load_part(bias + unit, n);
      s[k] += v * load_part(gain + unit, n);
    };
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      const Vec<C> x = (load(slot(k, j)) - mean_x[k]) * scale_x[k],
                   h = (load(slot(kGates + k, j)) - mean_h[k]) * scale_h[k];
      save(Normed::kSavedProducts + k, j, n, x);
      save(Normed::kSavedProducts + kGates + k, j, n, h);
      add(slot_of(Cell::x_ranges(), k), x, weights.gain_ih, weights.b_ih, k * H + j);
      add(slot_of(Cell::h_ranges(), k), h, weights.gain_hh, weights.b_hh, k * H + j);
    }
    if constexpr (Cell::kHasCell) {
      const Vec<C> c_prev = load_part(row.c + j, n);
      Vec<C> c = c_prev;
      Cell::template forward_cell<Math<S>>(s, c);
      store_c(row, j, n, with_zoneout<S>(row.zoneout_c, j, n, c_prev, c));
      store(slot(0, j), c), store(slot(1, j), s[3]);
    } else {
      const Vec<C> h_prev = read_h_prev<Cell>(row, j, n);
      Vec<C> none{};
      const Vec<C> h = Cell::template forward<Math<S>>(s, h_prev, none);
      store_h(row, j, n, with_zoneout<S>(row.zoneout_h, j, n, h_prev, h));
    }
    for (int k = 0; k < Cell::kSaved; k++) save(k, j, n, s[k]);
  }

  // The second half: normalises c and computes h.
  FUSEDRNN_INLINE void output(int64_t j, int64_t n, C mean, C scale) const {
    Vec<C> s[Cell::kSlots] = {};
    s[3] = load(slot(1, j));
    const Vec<C> c = (load(slot(0, j)) - mean) * scale;
    save(Normed::kSavedCell, j, n, c);
    const Vec<C> seen = c * load_part(weights.gain_c + j, n) + load_part(weights.shift_c + j, n);
    const Vec<C> h = Cell::template output<Math<S>>(s, seen);
    store_h(row, j, n, with_zoneout<S>(row.zoneout_h, j, n, read_h_prev<Cell>(row, j, n), h));
  }
};

// Replaces cell_forward: all units of a row whose `gates` hold the products in the slots of Normed.
// They are overwritten. `scales` is null when nothing is saved for backward.
template <class Normed, class S>
__attribute__((noinline)) void normed_forward(int64_t H, const ForwardRow<S>& row,
                                              const NormWeights<S>& weights, Compute<S>* scales) {
  using C = Compute<S>;
  NormedForward<Normed, S> steps{H, row, weights, {}, {}, {}, {}};
  steps.measure();
  if (scales) scales = steps.save_scales(scales);
  each_vector<C>(H,
                 [&](int64_t j, int64_t n) __attribute__((always_inline)) { steps.gates(j, n); });
  if constexpr (Normed::kHasCell) {
    C mean[1], scale[1];
    moments<1, C>(H, kRangeOfC, [&](int k, int64_t j) { return steps.slot(k, j); }, mean, scale);
    if (scales) *scales = scale[0];
    each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      steps.output(j, n, mean[0], scale[0]);
    });
  }
}

// The gradient through n(a) = v, whose own gradient is d. The derivative of n is symmetric, so this
// is the tangent of v too, where that of a is d.
template <class V, class C>
FUSEDRNN_INLINE V through_norm(V d, V v, C mean_d, C mean_dv, C scale) {
  return scale * (d - mean_d - v * mean_dv);
}

// Sums over units of a gradient or tangent d of normalised values v, and of d * v; then their
// means. V and Scalar: a vector and a number, or dual numbers of these.
template <int kGates, class C, class V, class Scalar>
struct NormSums {
  V d[kGates], dv[kGates];
  Scalar mean_d[kGates], mean_dv[kGates];

  FUSEDRNN_INLINE void add(int k, V gradient, V value) {
    d[k] += gradient, dv[k] += gradient * value;
  }
  template <class R>
  FUSEDRNN_INLINE void take_means(int64_t H, const R& ranges) {
    means<kGates, C>(H, ranges, d, mean_d), means<kGates, C>(H, ranges, dv, mean_dv);
  }
  FUSEDRNN_INLINE V through(int k, V gradient, V value, Scalar scale) const {
    return through_norm(gradient, value, mean_d[k], mean_dv[k], scale);
  }
};

// The arrays of one row of one step in backward.
template <class S>
struct NormedRow : BackwardRow<S>, NormWeights<S> {
  const Compute<S>* scales;
  Compute<S>* dnormed;

  FUSEDRNN_INLINE NormedRow(const BackwardRow<S>& row, const Weights& weights,
                            const Compute<S>* saved_scales, Compute<S>* gradients)
      : BackwardRow<S>(row), NormWeights<S>(weights), scales(saved_scales), dnormed(gradients) {}
};

// What backward computes with, n units from j on: what the row has,
template <class S>
struct NormedValues {
  using C = Compute<S>;
  using Scalar = C;
  using V = Vec<C>;
  using M = Math<S>;
  using Row = NormedRow<S>;
  const Row row;

  template <class R, class P>
  FUSEDRNN_INLINE bool has(P* R::* array) const {
    return row.*array;
  }
  template <class R, class P>
  FUSEDRNN_INLINE V load(P* R::* array, int64_t j, int64_t n) const {
    return load_part(row.*array + j, n);
  }
  template <class R, class P>
  FUSEDRNN_INLINE void store(P* R::* array, int64_t j, int64_t n, V v) const {
    store_part(row.*array + j, v, n);
  }
  FUSEDRNN_INLINE Scalar scale(int i) const { return row.scales[i]; }
  FUSEDRNN_INLINE V gradient_h(int64_t j, int64_t n, V* passed) const {
    return gradient<C>(row.dh, row.dy, row.zoneout_h, j, n, passed);
  }
  FUSEDRNN_INLINE V gradient_c(int64_t j, int64_t n, V* passed) const {
    return gradient<C>(row.dc, row.dcs, row.zoneout_c, j, n, passed);
  }
  FUSEDRNN_INLINE V c_prev(int64_t j, int64_t n) const { return read_c_prev(row, j, n); }
  FUSEDRNN_INLINE void store_gate(int64_t j, int64_t n, V d) const {
    store_part(row.dgates + j, d, n);
    store_operands(row.factors, row.plane, j, d, n);
  }
};
// or dual numbers of that and of another row's tangents, of which some are null: zeros. Loads and
// stores are not inlined: products take most of the time of second derivatives.
template <class S>
struct NormedDuals {
  using C = Compute<S>;
  using Scalar = Dual<C>;
  using V = Dual<Vec<C>>;
  using M = DualMath<Math<S>>;
  using Row = NormedRow<S>;
  const NormedValues<S> value, tangent;

  template <class R, class P>
  FUSEDRNN_INLINE bool has(P* R::* array) const {
    return value.has(array);
  }
  template <class R, class P>
  __attribute__((noinline)) V load(P* R::* array, int64_t j, int64_t n) const {
    return {value.load(array, j, n), tangent.has(array) ? tangent.load(array, j, n) : Vec<C>{}};
  }
  template <class R, class P>
  __attribute__((noinline)) void store(P* R::* array, int64_t j, int64_t n, V v) const {
    value.store(array, j, n, v.value), tangent.store(array, j, n, v.tangent);
  }
  FUSEDRNN_INLINE Scalar scale(int i) const { return {value.scale(i), tangent.scale(i)}; }
  FUSEDRNN_INLINE V gradient_h(int64_t j, int64_t n, V* passed) const {
    return {value.gradient_h(j, n, &passed->value), tangent.gradient_h(j, n, &passed->tangent)};
  }
  FUSEDRNN_INLINE V gradient_c(int64_t j, int64_t n, V* passed) const {
    return {value.gradient_c(j, n, &passed->value), tangent.gradient_c(j, n, &passed->tangent)};
  }
  FUSEDRNN_INLINE V c_prev(int64_t j, int64_t n) const {
    return {value.c_prev(j, n), tangent.c_prev(j, n)};
  }
  __attribute__((noinline)) void store_gate(int64_t j, int64_t n, V d) const {
    value.store_gate(j, n, d.value), tangent.store_gate(j, n, d.tangent);
  }
};

// Of: NormedValues or NormedDuals.
template <class Normed, class Of>
struct NormedBackward {
  using C = typename Of::C;
  using V = typename Of::V;
  using M = typename Of::M;
  using Row = typename Of::Row;
  using Scalar = typename Of::Scalar;
  using Cell = typename Normed::Plain;
  static constexpr int kGates = Normed::kGates;

  const int64_t H;
  const Of& of;

  FUSEDRNN_INLINE V saved(int k, int64_t j, int64_t n) const {
    return of.load(&Row::saved, k * H + j, n);
  }
  FUSEDRNN_INLINE V saved_x(int k, int64_t j, int64_t n) const {
    return saved(Normed::kSavedProducts + k, j, n);
  }
  FUSEDRNN_INLINE V saved_h(int k, int64_t j, int64_t n) const {
    return saved(Normed::kSavedProducts + kGates + k, j, n);
  }
  // The gradients of n(c), n(W_ih x) and n(W_hh h'). That of gain_c * n(c) + shift_c follows those
  // of the slots.
  FUSEDRNN_INLINE V gradient_c(int64_t j, int64_t n) const {
    return of.load(&Row::dnormed, Cell::kSlots * H + j, n) * of.load(&Row::gain_c, j, n);
  }
  FUSEDRNN_INLINE V gradient_x(int k, int64_t j, int64_t n) const {
    return of.load(&Row::dnormed, slot_of(Cell::x_ranges(), k) * H + j, n) *
           of.load(&Row::gain_ih, k * H + j, n);
  }
  FUSEDRNN_INLINE V gradient_h(int k, int64_t j, int64_t n) const {
    return of.load(&Row::dnormed, slot_of(Cell::h_ranges(), k) * H + j, n) *
           of.load(&Row::gain_hh, k * H + j, n);
  }

  // From dL/dh to the gradients of o and of n(c).
  FUSEDRNN_INLINE void output(int64_t j, int64_t n, NormSums<1, C, V, Scalar>& sums) const {
    V s[Cell::kSlots], passed{};
    for (int k = 0; k < Cell::kSaved; k++) s[k] = saved(k, j, n);
    const V c = saved(Normed::kSavedCell, j, n);
    const V seen = c * of.load(&Row::gain_c, j, n) + of.load(&Row::shift_c, j, n);
    if (of.has(&Row::hidden)) of.store(&Row::hidden, j, n, Cell::template output<M>(s, seen));
    const V dh = of.gradient_h(j, n, &passed);
    of.store(&Row::dnormed, Cell::kSlots * H + j, n,
             Cell::template backward_output<M>(s, seen, dh));
    of.store(&Row::dnormed, 3 * H + j, n, s[3]);
    if (of.has(&Row::dh_direct)) of.store(&Row::dh_direct, j, n, passed);
    sums.add(0, gradient_c(j, n), c);
  }

  // The gradients of the slots; those of c are through `sums_c`.
  FUSEDRNN_INLINE void cell(int64_t j, int64_t n, const NormSums<1, C, V, Scalar>& sums_c,
                            Scalar scale_c) const {
    V s[Cell::kSlots], passed{};
    for (int k = 0; k < Cell::kSaved; k++) s[k] = saved(k, j, n);
    if constexpr (Cell::kHasCell) {
      V dc = of.gradient_c(j, n, &passed);
      dc += sums_c.through(0, gradient_c(j, n), saved(Normed::kSavedCell, j, n), scale_c);
      Cell::backward_cell(s, of.c_prev(j, n), dc);
      of.store(&Row::dc, j, n, dc + passed);
    } else {
      const V h_prev = of.has(&Row::h_prev) ? of.load(&Row::h_prev, j, n) : V{};
      const V dh = of.gradient_h(j, n, &passed), none{};
      V dc{};
      const V direct = Cell::template backward<M>(s, h_prev, none, none, none, dh, dc);
      if (of.has(&Row::dh_direct)) of.store(&Row::dh_direct, j, n, direct + passed);
    }
    for (int k = 0; k < Cell::kSlots - Cell::kHasCell; k++)
      of.store(&Row::dnormed, k * H + j, n, s[k]);
  }
};

// Replaces cell_backward_row, and on dual numbers cell_backward_tangent.
template <class Normed, class Of>
__attribute__((noinline)) void normed_backward(int64_t H, const Of& of) {
  using C = typename Of::C;
  using V = typename Of::V;
  using Scalar = typename Of::Scalar;
  using Cell = typename Normed::Plain;
  constexpr int kGates = Normed::kGates;
  constexpr auto ranges = Cell::x_ranges();
  const NormedBackward<Normed, Of> steps{H, of};

  NormSums<1, C, V, Scalar> sums_c{};
  if constexpr (Cell::kHasCell) {
    each_vector<C>(H, [&](int64_t j, int64_t n)
                          __attribute__((always_inline)) { steps.output(j, n, sums_c); });
    sums_c.take_means(H, kRangeOfC);
  }

  NormSums<kGates, C, V, Scalar> sums_x{}, sums_h{};
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    steps.cell(j, n, sums_c, Cell::kHasCell ? of.scale(Normed::kScales - 1) : Scalar{});
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      sums_x.add(k, steps.gradient_x(k, j, n), steps.saved_x(k, j, n));
      sums_h.add(k, steps.gradient_h(k, j, n), steps.saved_h(k, j, n));
    }
  });
  sums_x.take_means(H, ranges), sums_h.take_means(H, ranges);

  Scalar scale_x[kGates], scale_h[kGates];
  int next = 0;
  for (const GateRange& range : ranges.range) {
    for (int k = range.gate; k < range.gate + range.count; k++)
      scale_x[k] = of.scale(next), scale_h[k] = of.scale(next + 1);
    next += 2;
  }
  each_vector<C>(H, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kGates; k++) {
      of.store_gate(
          k * H + j, n,
          sums_x.through(k, steps.gradient_x(k, j, n), steps.saved_x(k, j, n), scale_x[k]));
      of.store_gate(
          (kGates + k) * H + j, n,
          sums_h.through(k, steps.gradient_h(k, j, n), steps.saved_h(k, j, n), scale_h[k]));
    }
  });
}

}  // namespace
