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
#include "cpu/forward.h"

namespace {

// Vectors hold `w / kPart` sums in parts of that many lanes. Two make one with parts half as long,
// until lane i of v[0] is the sum of v[i].
template <int kPart, class C, int... I>
FUSEDRNN_INLINE void add_lanes(Vec<C>* v, Indices<I...> all) {
  constexpr int w = sizeof...(I), kHalf = kPart / 2;
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; i++)
    v[i] = shuffle<(I / kPart * kPart + I % kHalf + (I % kPart < kHalf ? 0 : w))...>(v[i],
                                                                                     v[i + kHalf]) +
           shuffle<(I / kPart * kPart + kHalf + I % kHalf + (I % kPart < kHalf ? 0 : w))...>(
               v[i], v[i + kHalf]);
  if constexpr (kPart > 2) add_lanes<kHalf, C>(v, all);
}

// Lane i of the result is the sum of v[i].
template <class C>
FUSEDRNN_INLINE Vec<C> sums_of(Vec<C> (&v)[Lanes<C>::kWidth]) {
  constexpr int w = Lanes<C>::kWidth;
  add_lanes<w, C>(v, FirstIndices<w>{});
  return v[0];
}

// Lane i of out[r]: the product of row i of w, which has `rows` rows, and row r of x; both of K
// elements. Lanes from `rows` on are anything.
template <int kRows, class C, class S>
__attribute__((noinline)) void dot_rows(Vec<C>* out, const S* w, int64_t rows, const C* x,
                                        int64_t K) {
  constexpr int width = Lanes<C>::kWidth;
  // Rows of w at a time: few, for rows of a power of two lie in the same places of the cache.
  constexpr int kTile = kRows == 1 ? width < 8 ? width : 8 : width < 4 ? width : 4;
  Vec<C> all[kRows][width];
  for (int first = 0; first < width; first += kTile) {
    const S* row[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; i++) row[i] = w + min(first + i, rows - 1) * K;
    Vec<C> sums[kRows][kTile] = {};
    auto step = [&](int64_t k, auto read) __attribute__((always_inline)) {
      Vec<C> part[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) part[r] = read(x + r * K + k);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; i++) {
        const Vec<C> weights = read(row[i] + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) sums[r][i] += weights * part[r];
      }
    };
    int64_t k = 0;
    for (; k + width <= K; k += width)
      step(k, [](auto* p) __attribute__((always_inline)) { return load(p); });
    if (k < K) step(k, [&](auto* p) __attribute__((always_inline)) { return load(p, K - k); });
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
      for (int i = 0; i < kTile; i++) all[r][first + i] = sums[r][i];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) out[r] = sums_of<C>(all[r]);
}

constexpr int kDirectRows = 4;  // of the batch, at a time

template <class C, class S>
FUSEDRNN_INLINE void dot_rows(Vec<C>* out, const S* w, int64_t rows, const C* x, int64_t K,
                              int64_t count) {
  switch (count) {
    case 1:
      return dot_rows<1>(out, w, rows, x, K);
    case 2:
      return dot_rows<2>(out, w, rows, x, K);
    case 3:
      return dot_rows<3>(out, w, rows, x, K);
    default:
      return dot_rows<kDirectRows>(out, w, rows, x, K);
  }
}

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
                                      Vec<C> (&out)[Cell::kGates][kDirectRows]) {
  const int64_t H = a.problem.hidden_size;
  const Weights& weights = a.weights[step.layer * a.problem.num_directions + step.dir];
  for (int k = 0; k < Cell::kGates; k++)
    dot_rows<C>(out[k],
                static_cast<const S*>(weights.w_hh) +
                    (gate_of(Cell::h_runs(), Cell::kSlots - Cell::kGates + k) * H + j) * H,
                n, static_cast<const C*>(step.h_prev) + first * H, H, count);
}

// These of a share of the units and all rows, to `step.by_h`.
template <class Cell, class S>
void direct_recurrent(const Forward& a, const DirectStep& step, int64_t part, int64_t parts) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth;
  C* const to = static_cast<C*>(step.by_h);
  each_vector_of<C>(a.problem.hidden_size, part, parts, step.falling, [&](int64_t j, int64_t n) {
    for (int64_t first = 0; first < step.rows; first += kDirectRows) {
      const int64_t count = min(kDirectRows, step.rows - first);
      Vec<C> by_h[Cell::kGates][kDirectRows];
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
    for (int64_t first = 0; first < step.rows; first += kDirectRows) {
      const int64_t count = min(kDirectRows, step.rows - first);
      const C* before = static_cast<const C*>(step.h_prev) + first * H;
      Vec<C> by_x[Cell::kGates][kDirectRows], by_h[Cell::kGates][kDirectRows];
      for (int k = 0; k < Cell::kGates; k++)
        dot_rows<C>(by_x[k], w_ih + (gate_of(Cell::x_runs(), k) * H + j) * K, n, x + first * K, K,
                    count);
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
