// The forward pass without packed weights, for calls of few tokens: packing would take longer than
// their products.
//
// Rows of the weights are read as they lie. The gates of a block of units, one vector of each, are
// dot products of as many rows at once as a vector has lanes; then the block's cells are computed.
// Blocks of a step share nothing that is written, so threads may divide them. For what a plain
// layer has: no projection, no regularisers, no resets. Where weights come from beyond the second
// cache steps go through the units up and down in turns; of a single step the recurrent products
// may be made apart.
#pragma once
#include "cpu/pass/forward.h"

namespace {

// f(first unit, units) for the vectors of units that are a part's share, from the last to the first
// where `falling`.
template <class C, class F>
FUSEDRNN_INLINE void each_vector_of(int64_t H, int64_t part, int64_t parts, bool falling, F f) {
  constexpr int w = Lanes<C>::kWidth;
  const int64_t all = (H + w - 1) / w, begin = all * part / parts, end = all * (part + 1) / parts;
  for (int64_t i = begin; i < end; i++) {
    const int64_t j = (falling ? begin + end - 1 - i : i) * w;
    f(j, min(w, H - j));
  }
}

// The products of W_hh with h_prev, of units from j on: out[gate][row].
template <class Cell, class S, class C>
FUSEDRNN_INLINE void direct_recurrent(const Forward& a, const DirectStep& step, int64_t j,
                                      int64_t n, int64_t first, int64_t count,
                                      Vec<C> (&out)[Cell::kGates][kDotRows]) {
  const int64_t H = a.problem.hidden_size;
  const Weights& weights = a.weights[step.layer * a.problem.num_directions + step.dir];
  for (int k = 0; k < Cell::kGates; k++)
    dot_rows<C>(out[k],
                static_cast<const S*>(weights.w_hh) +
                    (gate_of(Cell::h_runs(), Cell::kSlots - Cell::kGates + k) * H + j) * H,
                n, static_cast<const C*>(step.h_prev) + first * H, H, H, count);
}

// These of a share of the units and all rows, to `step.by_h`.
template <class Cell, class S>
void direct_recurrent(const Forward& a, const DirectStep& step, int64_t part, int64_t parts) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth;
  C* const to = static_cast<C*>(step.by_h);
  each_vector_of<C>(a.problem.hidden_size, part, parts, step.falling, [&](int64_t j, int64_t n) {
    for (int64_t first = 0; first < step.rows; first += kDotRows) {
      const int64_t count = min(kDotRows, step.rows - first);
      Vec<C> by_h[Cell::kGates][kDotRows];
      direct_recurrent<Cell, S, C>(a, step, j, n, first, count, by_h);
      for (int k = 0; k < Cell::kGates; k++)
        for (int64_t i = 0; i < count; i++)
          store(to + ((j / w * Cell::kGates + k) * a.seq.batch + first + i) * w, by_h[k][i]);
    }
  });
}

// A step of a share of the units, for all rows.
template <class Cell, class S>
void direct_step(const Forward& a, const DirectStep& step, int64_t part, int64_t parts,
                 void* scratch) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth, kFirst = Cell::kSlots - Cell::kGates;
  const Problem& p = a.problem;
  const int64_t H = p.hidden_size, D = p.num_directions, layer = step.layer, dir = step.dir;
  const LayerInput<S> input(a, layer, layer ? output_of<S>(a, layer - 1) : nullptr);
  const int64_t K = input.width, state = layer * D + dir, tokens = a.seq.tokens;
  const Reserve reserve(p);
  S* const saved = a.reserve
                       ? reinterpret_cast<S*>(a.reserve + reserve.slots_offset(layer, dir, tokens))
                       : nullptr;
  const KeptCells<C> cells(a, layer, dir);
  const Weights& weights = a.weights[state];
  const auto *w_ih = static_cast<const S*>(weights.w_ih),
             *b_ih = static_cast<const S*>(weights.b_ih),
             *b_hh = static_cast<const S*>(weights.b_hh);
  C* const x = static_cast<C*>(scratch);
  const C* const done = static_cast<const C*>(step.by_h);

  for (int64_t r = 0; r < step.rows; r++) input.read(x + r * K, K, step.t, a.seq.order[r]);
  each_vector_of<C>(H, part, parts, step.falling, [&](int64_t j, int64_t n) {
    for (int64_t first = 0; first < step.rows; first += kDotRows) {
      const int64_t count = min(kDotRows, step.rows - first);
      const C* before = static_cast<const C*>(step.h_prev) + first * H;
      Vec<C> by_x[Cell::kGates][kDotRows], by_h[Cell::kGates][kDotRows];
      for (int k = 0; k < Cell::kGates; k++)
        dot_rows<C>(by_x[k], w_ih + (gate_of(Cell::x_runs(), k) * H + j) * K, n, x + first * K, K,
                    K, count);
      if (!done) direct_recurrent<Cell, S, C>(a, step, j, n, first, count, by_h);
      for (int64_t i = 0; i < count; i++) {
        const int64_t r = first + i, token = a.seq.token(step.t, a.seq.order[r]);
        Vec<C> s[Cell::kSlots] = {};
        for (int k = 0; k < Cell::kGates; k++) {
          s[k] += by_x[k][i];
          s[kFirst + k] +=
              done ? load(done + ((j / w * Cell::kGates + k) * a.seq.batch + r) * w) : by_h[k][i];
          if (b_ih) s[k] += load(b_ih + gate_of(Cell::x_runs(), k) * H + j, n);
          if (b_hh) s[kFirst + k] += load(b_hh + gate_of(Cell::h_runs(), kFirst + k) * H + j, n);
        }
        C* const c_row = Cell::kHasCell ? static_cast<C*>(step.c) + r * H + j : nullptr;
        Vec<C> c = Cell::kHasCell ? load(c_row, n) : Vec<C>{};
        const Vec<C> h_prev = Cell::kUsesHPrev ? load(before + i * H + j, n) : Vec<C>{};
        const Vec<C> h = Cell::template forward<Math<S>>(s, h_prev, c);
        store(static_cast<C*>(step.h) + r * H + j, h, n);
        store(output_of<S>(a, layer) + (token * D + dir) * H + j, h, n);
        if (Cell::kHasCell) store(c_row, c, n);
        if (!saved) continue;
        if (Cell::kHasCell) store(cells.of(token) + j, c, n);
        for (int k = 0; k < Cell::kSaved; k++)
          store(saved + (token * Cell::kSaved + k) * H + j, s[k], n);
      }
    }
  });
}

}  // namespace
