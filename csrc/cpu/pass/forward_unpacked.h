// The forward pass without packed weights, for calls of few tokens, in which packing would take
// longer than the products. For plain layers: no projection, regularisers or resets.
//
// Gates are dot products with the rows of the weights, which are read in the order in which they
// lie in memory: the products of a vector of units with one gate, then those of the next units, and
// so gate after gate. The cells follow. Threads divide the units of a step, which share nothing
// that is written. Where weights exceed L2, the plan may have steps read them in ascending and
// descending order in turn, and the recurrent products of a single step computed apart from it; or
// have the weights of the next units prefetched while those of a unit are multiplied; or have rows
// of weights read one at a time.
#pragma once
#include "cpu/pass/arrays.h"
#include "cpu/product/unpacked.h"
#include "cpu/vector/math.h"

namespace {

// Some vectors of units.
template <class C>
struct UnitVectors {
  int64_t H, begin, end;

  UnitVectors(int64_t hidden, int64_t part, int64_t parts) : H(hidden) {
    const int64_t all = (H + Lanes<C>::kWidth - 1) / Lanes<C>::kWidth;
    begin = all * part / parts, end = all * (part + 1) / parts;
  }
  // f(first unit, units) for each, in descending order if asked for.
  template <class F>
  FUSEDRNN_INLINE void each(bool descending, F f) const {
    constexpr int w = Lanes<C>::kWidth;
    for (int64_t i = begin; i < end; i++) {
      const int64_t j = (descending ? begin + end - 1 - i : i) * w;
      f(j, min(w, H - j));
    }
  }
};

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
        reading{forward.pass.streams,
                forward.pass.prefetches ? (step.descending ? -kWidth : kWidth) : 0} {}

  // The recurrent products of a part of the units and all rows, before the others.
  void recurrent_products(int64_t part, int64_t parts) const { multiply_h({H, part, parts}); }

  // The step for a part of the units and all rows.
  void run(int64_t part, int64_t parts, void* scratch) const {
    const Sequence& seq = call.seq;
    const LayerInput<S> input(call, step.layer,
                              step.layer ? layer_output<S>(call, step.layer - 1) : nullptr);
    const int64_t K = input.width;
    C* const x = static_cast<C*>(scratch);
    for (int64_t r = 0; r < step.rows; r++) input.read(x + r * K, K, step.t, seq.order[r]);
    const UnitVectors<C> units(H, part, parts);
    if (!step.has_recurrent && !step.descending) multiply_h(units);
    multiply(units, false, x, K);
    if (!step.has_recurrent && step.descending) multiply_h(units);
    units.each(false, [&](int64_t j, int64_t n) {
      for (int64_t r = 0; r < step.rows; r++) {
        Vec<C> s[Cell::kSlots] = {};
        for (int k = 0; k < kGates; k++) {
          s[k] += *sum(j, k, r);
          s[kFirst + k] += *sum(j, kGates + k, r);
          add_bias(s, k, j, n);
        }
        compute_cell(s, r, j, n);
      }
    });
  }

 private:
  // The products of W_ih with x, or of W_hh with h, of a part of the units and all rows.
  __attribute__((noinline)) void multiply(const UnitVectors<C>& units, bool of_h, const C* factor,
                                          int64_t K) const {
    const S* const matrix = static_cast<const S*>(of_h ? weights.w_hh : weights.w_ih);
    for (int i = 0; i < kGates; i++) {
      const int k = step.descending ? kGates - 1 - i : i;
      const int64_t gate =
          of_h ? gate_of(Cell::h_ranges(), kFirst + k) : gate_of(Cell::x_ranges(), k);
      units.each(step.descending, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        for (int64_t r = 0; r < step.rows; r += kDotRows)
          dot_rows<C>(sum(j, of_h * kGates + k, r), matrix + (gate * H + j) * K, n, factor + r * K,
                      K, K, min(kDotRows, step.rows - r), reading);
      });
    }
  }
  void multiply_h(const UnitVectors<C>& units) const {
    multiply(units, true, static_cast<const C*>(step.h_prev), H);
  }
  // A vector of step.sums, followed by that of the next row.
  FUSEDRNN_INLINE Vec<C>* sum(int64_t j, int gate, int64_t row) const {
    return static_cast<Vec<C>*>(step.sums) + (j / kWidth * 2 * kGates + gate) * step.all_rows + row;
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
  const RowReading reading;
};

}  // namespace
