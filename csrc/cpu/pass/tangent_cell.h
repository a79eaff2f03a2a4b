// The element-wise parts of one row of one step in derivatives of forward and of backward.
#pragma once
#include "cpu/pass/cell.h"

namespace {

// The arrays of one row of one step in the derivative of forward. `gates` holds the tangents of the
// pre-activations; saved, h, c, candidate (h before zoneout) and what precedes are the values, null
// where they are zeros; `d...` the tangents. dh, dc: of the state before on entry of a step, dh_new
// that of h after it. dsaved, saved_dc and dcandidate are null when they are not kept. With a
// projection dh_new is the tangent of what is projected, and `hidden` its value.
template <class S>
struct TangentRow {
  using C = Compute<S>;
  C* gates;
  const S *saved, *h, *h_prev, *c0;  // c0: c_prev when it is the initial state
  const C *c, *c_prev, *candidate;
  const C* dh;
  C *dh_new, *dc, *saved_dc, *dcandidate, *hidden;
  S *dy, *dsaved;
  ZoneoutMask<C> zoneout_h, zoneout_c;
};

template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> load_or_zero(const S* p, int64_t j, int64_t n) {
  return p ? load(p + j, n) : Vec<Compute<S>>{};
}

// The functions below take n units from j on.

// Applies zoneout to the tangent of h, and stores it.
template <class S>
FUSEDRNN_INLINE void store_dh(const TangentRow<S>& row, int64_t j, int64_t n, Vec<Compute<S>> dh) {
  if (row.zoneout_h) dh = with_zoneout<S>(row.zoneout_h, j, n, load(row.dh + j, n), dh);
  store(row.dh_new + j, dh, n);
  if (row.dy) store(row.dy + j, dh, n);
}
// Likewise of c, whose tangent before is in row.dc.
template <class S>
FUSEDRNN_INLINE void store_dc(const TangentRow<S>& row, int64_t j, int64_t n,
                              Vec<Compute<S>> before, Vec<Compute<S>> dc) {
  dc = with_zoneout<S>(row.zoneout_c, j, n, before, dc);
  store(row.dc + j, dc, n);
  if (row.saved_dc) store(row.saved_dc + j, dc, n);
}
// c_{t-1} and its tangent.
template <class S>
FUSEDRNN_INLINE Dual<Vec<Compute<S>>> read_c_prev(const TangentRow<S>& row, int64_t j, int64_t n) {
  return {row.c_prev ? load(row.c_prev + j, n) : load_or_zero(row.c0, j, n), load(row.dc + j, n)};
}

// Computes the cells of blocks [block, block + blocks) of units (gate_layout.h).
template <class Cell, class S>
void cell_tangent(int64_t H, int64_t block, int64_t blocks, const TangentRow<S>& row) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth;
  auto units = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Dual<Vec<C>> s[Cell::kSlots]{}, h_prev{}, c_prev{}, c{};
    for (int k = 0; k < Cell::kSlots; k++)
      s[k].tangent = load(row.gates + j * Cell::kSlots + k * w);
    for (int k = 0; k < Cell::kSaved; k++) s[k].value = load(row.saved + k * H + j, n);
    Vec<C> h{};
    if constexpr (Cell::kSaved == 0)
      h = row.candidate ? load(row.candidate + j, n) : load(row.h + j, n);
    if constexpr (Cell::kUsesHPrev) h_prev = {load_or_zero(row.h_prev, j, n), load(row.dh + j, n)};
    if constexpr (Cell::kHasCell) {
      c_prev = read_c_prev(row, j, n);
      c.value = row.zoneout_c ? Cell::cell_state(s, c_prev).value : load(row.c + j, n);
    }
    const Vec<C> dh = Cell::template tangent<Math<S>>(s, h_prev, h, c_prev, c);
    if (row.dcandidate) store(row.dcandidate + j, dh, n);
    store_dh(row, j, n, dh);
    if constexpr (Cell::kHasCell) {
      if (row.hidden)
        store(row.hidden + j, Cell::template output<DualMath<Math<S>>>(s, c).value, n);
      store_dc(row, j, n, c_prev.tangent, c.tangent);
    }
    for (int k = 0; row.dsaved && k < Cell::kSaved; k++)
      store(row.dsaved + k * H + j, s[k].tangent, n);
  };
  for (int64_t j = block * w; j < min(H, (block + blocks) * w); j += w) units(j, min(w, H - j));
}

// From dL/dh and dL/dc of a row to the gradients of its gates, and the same for the tangents of all
// of these, which `d` has in place of the values.
template <class Cell, class S>
void cell_backward_tangent(int64_t H, const BackwardRow<S>& row, const BackwardRow<S>& d) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth;
  auto units = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    auto dual = [&](auto* value, auto* tangent) __attribute__((always_inline)) {
      return Dual<Vec<C>>{load_or_zero(value, j, n), load_or_zero(tangent, j, n)};
    };
    Dual<Vec<C>> s[Cell::kSlots]{}, h{}, h_prev{}, c{}, c_prev{}, dc{}, passed_h{}, passed_c{};
    for (int k = 0; k < Cell::kSaved; k++) s[k] = dual(row.saved + k * H, d.saved + k * H);
    if constexpr (Cell::kSaved == 0)
      h = row.candidate ? dual(row.candidate, d.candidate) : dual(row.h, d.h);
    if constexpr (Cell::kUsesHPrev) h_prev = dual(row.h_prev, d.h_prev);
    if constexpr (Cell::kHasCell) {
      dc = {gradient<C>(row.dc, row.dcs, row.zoneout_c, j, n, &passed_c.value),
            gradient<C>(d.dc, d.dcs, row.zoneout_c, j, n, &passed_c.tangent)};
      c_prev = {read_c_prev(row, j, n), read_c_prev(d, j, n)};
      c = row.zoneout_c ? Cell::cell_state(s, c_prev) : dual(row.c, d.c);
      if (row.hidden) {
        const Dual<Vec<C>> hidden = Cell::template output<DualMath<Math<S>>>(s, c);
        store(row.hidden + j, hidden.value, n), store(d.hidden + j, hidden.tangent, n);
      }
    }
    const Dual<Vec<C>> dh{gradient<C>(row.dh, row.dy, row.zoneout_h, j, n, &passed_h.value),
                          gradient<C>(d.dh, d.dy, row.zoneout_h, j, n, &passed_h.tangent)};
    const Dual<Vec<C>> direct =
        Cell::template backward<DualMath<Math<S>>>(s, h_prev, h, c_prev, c, dh, dc) + passed_h;
    dc += passed_c;
    auto put = [&](const BackwardRow<S>& to, auto part) __attribute__((always_inline)) {
      if (to.dh_direct) store(to.dh_direct + j, part(direct), n);
      if (Cell::kHasCell) store(to.dc + j, part(dc), n);
      for (int k = 0; k < Cell::kSlots; k++) {
        store(to.dgates + k * H + j, part(s[k]), n);
        store_operands(to.factors, to.plane, k * H + j, part(s[k]), n);
      }
    };
    put(row, [](const Dual<Vec<C>>& x) __attribute__((always_inline)) { return x.value; });
    put(d, [](const Dual<Vec<C>>& x) __attribute__((always_inline)) { return x.tangent; });
  };
  for (int64_t j = 0; j < H; j += w) units(j, min(w, H - j));
}

}  // namespace
