// The element-wise part of one row of one step: the cell and zoneout.
#pragma once
#include "cpu/pass/arrays.h"
#include "cpu/vector/math.h"

namespace {

// The arrays of one row of one step in forward. `gates` holds the pre-activations. The new h is
// written to h and, unless null, to y; saved, saved_c and candidate (h before zoneout) are null
// when they are not saved for backward.
template <class S>
struct ForwardRow {
  using C = Compute<S>;
  C* gates;
  const C* h_prev;
  C *h, *c, *saved_c, *candidate;
  S *y, *saved;
  ZoneoutMask<C> zoneout_h, zoneout_c;
};

// The functions below take n units from j on.

// h_{t-1}, where it is used.
template <class Cell, class S>
FUSEDRNN_INLINE Vec<Compute<S>> read_h_prev(const ForwardRow<S>& row, int64_t j, int64_t n) {
  return Cell::kUsesHPrev || row.zoneout_h ? load(row.h_prev + j, n) : Vec<Compute<S>>{};
}
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> with_zoneout(const ZoneoutMask<Compute<S>>& zoneout, int64_t j,
                                             int64_t n, Vec<Compute<S>> before,
                                             Vec<Compute<S>> now) {
  return zoneout ? zone_out(zoneout.load(j, n), before, now) : now;
}
template <class S>
FUSEDRNN_INLINE void store_h(const ForwardRow<S>& row, int64_t j, int64_t n, Vec<Compute<S>> h) {
  store(row.h + j, h, n);
  if (row.y) store(row.y + j, h, n);
}
template <class S>
FUSEDRNN_INLINE void store_c(const ForwardRow<S>& row, int64_t j, int64_t n, Vec<Compute<S>> c) {
  store(row.c + j, c, n);
  if (row.saved_c) store(row.saved_c + j, c, n);
}

// Computes the cells of blocks [block, block + blocks) of units (gate_layout.h).
template <class Cell, class S>
FUSEDRNN_INLINE void cell_forward(int64_t H, int64_t block, int64_t blocks,
                                  const ForwardRow<S>& row) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth;
  auto units = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vec<C> s[Cell::kSlots];
    for (int k = 0; k < Cell::kSlots; k++) s[k] = load(row.gates + j * Cell::kSlots + k * w);
    const Vec<C> h_prev = read_h_prev<Cell>(row, j, n);
    Vec<C> c = Cell::kHasCell ? load(row.c + j, n) : Vec<C>{};
    const Vec<C> c_prev = c;
    Vec<C> h = Cell::template forward<Math<S>>(s, h_prev, c);
    if (row.candidate) store(row.candidate + j, h, n);
    h = with_zoneout<S>(row.zoneout_h, j, n, h_prev, h);
    if (Cell::kHasCell) c = with_zoneout<S>(row.zoneout_c, j, n, c_prev, c);
    store_h(row, j, n, h);
    if (Cell::kHasCell) store_c(row, j, n, c);
    if (row.saved)
      for (int k = 0; k < Cell::kSaved; k++) store(row.saved + k * H + j, s[k], n);
  };
  for (int64_t j = block * w; j < (block + blocks) * w; j += w) {
    if (j + w <= H) {
      units(j, w);
    } else {
      units(j, H - j);
    }
  }
}

// The arrays of one row of one step in backward. Where null, h_prev, c_prev and dcs are zeros, and
// `hidden` and the direct part of dL/dh_prev are not required.
template <class S>
struct BackwardRow {
  using C = Compute<S>;
  const S *saved, *h, *h_prev, *c0;  // c0: c_prev when it is the initial state
  const C *c, *c_prev, *candidate;   // candidate: h before zoneout, where it is not h itself
  const C *dh, *dy, *dcs;            // dL/dh of this row is dh + dy; dy may be null
  C *dh_direct, *dc, *hidden;
  // The result, twice: stored for all tokens, and as factors of the next product, whose planes are
  // `plane` apart.
  StoredOperand<Operand<S>>* dgates;
  Operand<S>* factors;
  int64_t plane;
  ZoneoutMask<C> zoneout_h, zoneout_c;
};

// The gradient d + more (null: d alone), less the part that zoneout passes to the step before. That
// goes to `passed`, which is not touched without zoneout.
template <class C>
FUSEDRNN_INLINE Vec<C> gradient(const C* d, const C* more, const ZoneoutMask<C>& zoneout, int64_t j,
                                int64_t n, Vec<C>* passed) {
  Vec<C> sum = load(d + j, n);
  if (more) sum += load(more + j, n);
  if (zoneout) *passed = zone_out_backward(zoneout.load(j, n), sum);
  return sum;
}
template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> read_c_prev(const BackwardRow<S>& row, int64_t j, int64_t n) {
  return row.c_prev ? load(row.c_prev + j, n) : row.c0 ? load(row.c0 + j, n) : Vec<Compute<S>>{};
}

// Computes the gradients of units [first, end); `first` is a multiple of a vector.
template <class Cell, class S>
void cell_backward_row(int64_t H, int64_t first, int64_t end, const BackwardRow<S>& row) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth;
  auto units = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vec<C> s[Cell::kSlots];
    for (int k = 0; k < Cell::kSaved; k++) s[k] = load(row.saved + k * H + j, n);
    const Vec<C> zero{};
    Vec<C> h = zero;
    if (Cell::kSaved == 0) h = row.candidate ? load(row.candidate + j, n) : load(row.h + j, n);
    const Vec<C> h_prev = Cell::kUsesHPrev && row.h_prev ? load(row.h_prev + j, n) : zero;
    Vec<C> c = zero, c_prev = zero, dc = zero, passed_h = zero, passed_c = zero;
    if constexpr (Cell::kHasCell) {
      dc = gradient<C>(row.dc, row.dcs, row.zoneout_c, j, n, &passed_c);
      c_prev = read_c_prev(row, j, n);
      c = row.zoneout_c ? Cell::cell_state(s, c_prev) : load(row.c + j, n);
      if (row.hidden) store(row.hidden + j, Cell::template output<Math<S>>(s, c), n);
    }
    const Vec<C> dh = gradient<C>(row.dh, row.dy, row.zoneout_h, j, n, &passed_h);
    const Vec<C> direct = Cell::template backward<Math<S>>(s, h_prev, h, c_prev, c, dh, dc);
    if (row.dh_direct) store(row.dh_direct + j, direct + passed_h, n);
    if (Cell::kHasCell) store(row.dc + j, dc + passed_c, n);
    for (int k = 0; k < Cell::kSlots; k++) {
      store(row.dgates + k * H + j, s[k], n);
      store_operands(row.factors, row.plane, k * H + j, s[k], n);
    }
  };
  int64_t j = first;
  for (; j + w <= end; j += w) units(j, w);
  if (j < end) units(j, end - j);
}

}  // namespace
