// The forward pass without packed weights, for calls of few tokens, in which packing would take
// longer than the products. For plain layers: no projection, regularisers or resets.
//
// The gates of a vector of units are dot products with as many rows of the weights; then the cells
// of these units are computed. Threads divide the units of a step, which share nothing that is
// written. Where weights exceed L2, steps take the units in ascending and descending order in turn,
// and the recurrent products of a single step may be computed apart from it. If the plan
// says so, the weights of the next units are prefetched while those of a unit are multiplied.
#pragma once
#include "cpu/pass/arrays.h"
#include "cpu/product/unpacked.h"
#include "cpu/vector/math.h"

namespace {

// f(first unit, units) for part `part` of `parts` of the vectors of units, in descending order if
// asked for.
template <class C, class F>
FUSEDRNN_INLINE void each_unit_vector(int64_t H, int64_t part, int64_t parts, bool descending,
                                      F f) {
  constexpr int w = Lanes<C>::kWidth;
  const int64_t all = (H + w - 1) / w, begin = all * part / parts, end = all * (part + 1) / parts;
  for (int64_t i = begin; i < end; i++) {
    const int64_t j = (descending ? begin + end - 1 - i : i) * w;
    f(j, min(w, H - j));
  }
}

// One step of a layer and direction.
template <class Cell, class S>
class UnpackedPass {
  using C = Compute<S>;
  static constexpr int kWidth = Lanes<C>::kWidth, kGates = Cell::kGates,
                       kFirst = Cell::kSlots - kGates;  // the first slot of W_hh

 public:
  UnpackedPass(const Forward& forward, const UnpackedStep& unpacked_step)
      : call(forward),
        step(unpacked_step),
        H(forward.problem.hidden_size),
        D(forward.problem.num_directions),
        weights(forward.weights[step.layer * D + step.dir]),
        out(layer_output<S>(forward, step.layer)),
        saved(forward.reserve ? saved_slots<S>(forward, step.layer, step.dir) : nullptr),
        cells(forward, step.layer, step.dir),
        ahead(forward.pass.prefetches ? (step.descending ? -kWidth : kWidth) : 0) {}

  // The recurrent products of a part of the units and all rows, to step.recurrent.
  void recurrent_products(int64_t part, int64_t parts) const {
    each_unit_vector<C>(H, part, parts, step.descending, [&](int64_t j, int64_t n) {
      for (int64_t first = 0; first < step.rows; first += kDotRows) {
        const int64_t count = min(kDotRows, step.rows - first);
        Vec<C> sums[kGates][kDotRows];
        multiply_h(j, n, first, count, sums);
        for (int k = 0; k < kGates; k++)
          for (int64_t i = 0; i < count; i++) store(recurrent(j, k, first + i), sums[k][i]);
      }
    });
  }

  // The step for a part of the units and all rows.
  void run(int64_t part, int64_t parts, void* scratch) const {
    const Sequence& seq = call.seq;
    const LayerInput<S> input(call, step.layer,
                              step.layer ? layer_output<S>(call, step.layer - 1) : nullptr);
    const int64_t K = input.width;
    C* const x = static_cast<C*>(scratch);
    for (int64_t r = 0; r < step.rows; r++) input.read(x + r * K, K, step.t, seq.order[r]);
    each_unit_vector<C>(H, part, parts, step.descending, [&](int64_t j, int64_t n) {
      for (int64_t first = 0; first < step.rows; first += kDotRows) {
        const int64_t count = min(kDotRows, step.rows - first);
        Vec<C> sums_x[kGates][kDotRows], sums_h[kGates][kDotRows];
        multiply_x(j, n, x + first * K, K, count, sums_x);
        if (!step.recurrent) multiply_h(j, n, first, count, sums_h);
        for (int64_t i = 0; i < count; i++) {
          Vec<C> s[Cell::kSlots] = {};
          for (int k = 0; k < kGates; k++) {
            s[k] += sums_x[k][i];
            s[kFirst + k] += step.recurrent ? load(recurrent(j, k, first + i)) : sums_h[k][i];
            add_bias(s, k, j, n);
          }
          compute_cell(s, first + i, j, n);
        }
      }
    });
  }

 private:
  // The products of W_ih and W_hh with some rows, for units from j on: sums[gate][row].
  FUSEDRNN_INLINE void multiply_x(int64_t j, int64_t n, const C* x, int64_t K, int64_t count,
                                  Vec<C> (&sums)[kGates][kDotRows]) const {
    const S* const w_ih = static_cast<const S*>(weights.w_ih);
    for (int k = 0; k < kGates; k++)
      dot_rows<C>(sums[k], w_ih + (gate_of(Cell::x_ranges(), k) * H + j) * K, n, x, K, K, count,
                  ahead * K);
  }
  FUSEDRNN_INLINE void multiply_h(int64_t j, int64_t n, int64_t first, int64_t count,
                                  Vec<C> (&sums)[kGates][kDotRows]) const {
    const S* const w_hh = static_cast<const S*>(weights.w_hh);
    const C* const h = static_cast<const C*>(step.h_prev) + first * H;
    for (int k = 0; k < kGates; k++)
      dot_rows<C>(sums[k], w_hh + (gate_of(Cell::h_ranges(), kFirst + k) * H + j) * H, n, h, H, H,
                  count, ahead * H);
  }
  // The place of a vector in step.recurrent.
  FUSEDRNN_INLINE C* recurrent(int64_t j, int k, int64_t row) const {
    return static_cast<C*>(step.recurrent) +
           ((j / kWidth * kGates + k) * step.all_rows + row) * kWidth;
  }

  FUSEDRNN_INLINE void add_bias(Vec<C> (&s)[Cell::kSlots], int k, int64_t j, int64_t n) const {
    const auto *b_ih = static_cast<const S*>(weights.b_ih),
               *b_hh = static_cast<const S*>(weights.b_hh);
    if (b_ih) s[k] += load(b_ih + gate_of(Cell::x_ranges(), k) * H + j, n);
    if (b_hh) s[kFirst + k] += load(b_hh + gate_of(Cell::h_ranges(), kFirst + k) * H + j, n);
  }

  // The cells of n units of row r, from j on.
  FUSEDRNN_INLINE void compute_cell(Vec<C> (&s)[Cell::kSlots], int64_t r, int64_t j,
                                    int64_t n) const {
    const int64_t token = call.seq.token(step.t, call.seq.order[r]);
    C* const c_row = Cell::kHasCell ? static_cast<C*>(step.c) + r * H + j : nullptr;
    Vec<C> c = Cell::kHasCell ? load(c_row, n) : Vec<C>{};
    const Vec<C> h_prev =
        Cell::kUsesHPrev ? load(static_cast<const C*>(step.h_prev) + r * H + j, n) : Vec<C>{};
    const Vec<C> h = Cell::template forward<Math<S>>(s, h_prev, c);
    store(static_cast<C*>(step.h) + r * H + j, h, n);
    store(out + (token * D + step.dir) * H + j, h, n);
    if (Cell::kHasCell) store(c_row, c, n);
    if (!saved) return;
    if (Cell::kHasCell) store(cells.row(token) + j, c, n);
    for (int k = 0; k < Cell::kSaved; k++)
      store(saved + (token * Cell::kSaved + k) * H + j, s[k], n);
  }

  const Forward& call;
  const UnpackedStep& step;
  const int64_t H, D;
  const Weights& weights;
  S *const out, *const saved;
  const CellStates<C> cells;
  const int64_t ahead;  // rows of weights, from those that are read to those prefetched
};

}  // namespace
