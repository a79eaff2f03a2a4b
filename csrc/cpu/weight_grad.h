// Weight gradients of one layer: for every matrix one product over all tokens, after the
// recurrence.
//
//   dW_ih = dgates^T x    dW_hh = dgates^T h_{t-1}    dW_hr = dh^T (o tanh c)    db = sum of dgates
//   with layer normalisation    db, dshift = sum of dnormed    dgain = sum of dnormed * normalised
//
// A task is a tile of rows of one matrix, or a tile of the bias sums; tokens are always added in
// the same order, block by block, so results depend neither on the number of threads nor on the
// tiling.
#pragma once
#include "cpu/layer.h"

namespace {

constexpr int64_t kTokenBlock = 128;   // tokens packed at a time; short, for the sake of rounding
constexpr int64_t kColumnBlock = 512;  // columns packed at a time
constexpr int64_t kBiasTile = 64;      // slot columns of one bias task
constexpr int64_t kBiasBlock = 16;     // tokens added before they join the sum, for the same sake

constexpr int64_t kMostRows = 64 * kRows;  // of one task

enum Matrix { kIH, kHH, kBias, kHR, kMatrices };
// Places in Weights and in Backward::dweights.
enum {
  kPlaceIH,
  kPlaceHH,
  kPlaceBiasIH,
  kPlaceBiasHH,
  kPlaceHR,
  kPlaceGainIH,
  kPlaceGainHH,
  kPlaceGainC,
  kPlaceShiftC,
  kPlaces
};

// Columns of a slot in bias tasks with layer normalisation: none of them has two slots.
FUSEDRNN_INLINE int64_t padded_slot(const Problem& p) {
  return (p.hidden_size + kBiasTile - 1) / kBiasTile * kBiasTile;
}
FUSEDRNN_INLINE int64_t matrix_rows(const Problem& p, int matrix) {
  switch (matrix) {
    case kIH:
    case kHH:
      return p.gate_rows();
    case kBias:
      if (p.layer_norm) return p.normed_columns() / p.hidden_size * padded_slot(p);
      return p.bias ? p.slot_columns() : 0;
    default:
      return p.proj_size;
  }
}
// Rows of a task: as many as share one packing of the other factor, but one task of each matrix for
// each thread.
FUSEDRNN_INLINE int64_t tile_rows(const Problem& p, int matrix, int64_t threads) {
  if (matrix == kBias) return kBiasTile;
  const int64_t want = (matrix_rows(p, matrix) + threads - 1) / threads;
  return min(kMostRows, max(8, (want + kRows - 1) / kRows) * kRows);
}
FUSEDRNN_INLINE int64_t tiles(const Problem& p, int matrix, int64_t threads) {
  const int64_t rows = tile_rows(p, matrix, threads);
  return (matrix_rows(p, matrix) + rows - 1) / rows;
}

inline int64_t weight_tasks(const Problem& p, int64_t, int64_t threads) {
  int64_t n = 0;
  for (int matrix = 0; matrix < kMatrices; matrix++) n += tiles(p, matrix, threads);
  return n * p.num_directions;
}

// Operands of M rows of a block of tokens as the left factor.
template <class X>
FUSEDRNN_INLINE int64_t left_factor(int64_t M) {
  const int64_t depth = operands<X>(kTokenBlock);
  return kTiled<X> ? (M + kSpareRows<X>)*(depth + kRowPad) : M * depth;
}

template <class X>
int64_t weight_scratch(const Problem& p, int64_t layer) {
  const int64_t widest = max(max(p.layer_input(layer), p.out_size()), p.hidden_size);
  const int64_t columns = Panels<X>::padded(min(widest, kColumnBlock));
  return (operands<X>(kTokenBlock) * columns + left_factor<X>(kMostRows)) * sizeof(X) + 128;
}

// Up to kTokenBlock tokens side by side as the left factor, M values of each: token(k) points to
// those of the k-th. In blocks of rows for the registers, [k][rows of a block] each.
template <class X, class C, class Token>
void pack_tokens(X* to, int64_t M, int64_t tokens, Token token) {
  constexpr int w = Lanes<X>::kWidth;
  const int64_t K = operands<X>(tokens);
  for (int64_t k = 0; k < K; k++) {
    // The tokens of one operand; without a second one zeros are in its place.
    const int64_t first = k * kDepth<X>, second = min(first + 1, tokens - 1);
    const bool pair = second > first;
    const C *a1 = token(first), *a2 = token(second);
    X row[kMostRows + w];
    for (int64_t m = 0; m < M; m += w)
      store(row + m, operand<X>(load(a1 + m, M - m), pair ? load(a2 + m, M - m) : Vec<C>{}));
    each_block(M, [&](int64_t m, int64_t rows) {
      X* at = to + m * K + k * rows;
      if (rows == kRows) {  // a size the compiler knows
        std::memcpy(at, row + m, kRows * sizeof(X));
      } else {
        for (int64_t r = 0; r < rows; r++) at[r] = row[m + r];
      }
    });
  }
}

// The same for tiles: M rows of `ld` operands.
template <class X, class C, class Token>
void turn_tokens(X* to, int64_t ld, int64_t M, int64_t tokens, Token token) {
  constexpr int w = Lanes<X>::kWidth;
  for (int64_t k = 0; k < operands<X>(tokens); k += w) {
    const C* at[w * kDepth<X>];
    for (int i = 0; i < w * kDepth<X>; i++) {
      const int64_t which = k * kDepth<X> + i;
      at[i] = which < tokens ? token(which) : nullptr;
    }
    for (int64_t m = 0; m < M; m += w) {
      auto values = [&](int i) { return at[i] ? load(at[i] + m, M - m) : Vec<C>{}; };
      Vec<X> block[w];
      turn_block<X>(
          block,
          [&](int i) {
            return operand<X>(values(i * kDepth<X>), values(i * kDepth<X> + kDepth<X> - 1));
          },
          FirstIndices<w>{});
      for (int64_t i = 0; i < w && m + i < M; i++) store(to + (m + i) * ld + k, block[i]);
    }
  }
}

// dst [M, N] = sum over tokens of a[token, m] * row(token)[n]; row(k) gives a function (n, lanes)
// that loads from the k-th valid token's row of N values.
template <class X, class C, class Row>
void outer_product(const Sequence& seq, int64_t M, int64_t N, const C* a, int64_t lda, Row row,
                   C* dst, Scratch scratch) {
  using P = Panels<X>;
  constexpr int w = P::kWidth;
  constexpr int64_t kMostDepth = operands<X>(kTokenBlock);
  X* const b_panels = scratch.take<X>(kMostDepth * P::padded(min(N, kColumnBlock)));
  X* const a_rows = scratch.take<X>(left_factor<X>(M));
  for (int64_t n0 = 0; n0 < N; n0 += kColumnBlock) {
    const int64_t cols = min(kColumnBlock, N - n0);
    for (int64_t k0 = 0; k0 < seq.valid; k0 += kTokenBlock) {
      const int64_t tokens = min(kTokenBlock, seq.valid - k0), K = operands<X>(tokens);
      for (int64_t k = 0; k < K; k++) {
        const int64_t first = k * kDepth<X>, second = first + kDepth<X> - 1;
        const auto row1 = row(k0 + min(first, tokens - 1)),
                   row2 = row(k0 + min(second, tokens - 1));
        for (int64_t n = 0; n < cols; n += w) {
          const int64_t panel = n / P::kColumns * P::kColumns,
                        width = min(P::kColumns, P::padded(cols - panel)), lanes = cols - n;
          store(b_panels + panel * K + k * width + n - panel,
                operand<X>(first < tokens ? row1(n0 + n, lanes) : Vec<C>{},
                           second < tokens ? row2(n0 + n, lanes) : Vec<C>{}));
        }
      }
      auto token = [&](int64_t k) {
        return a + seq.token(seq.valid_step[k0 + k], seq.valid_row[k0 + k]) * lda;
      };
      C* const to = dst + n0;
      const C* const onto = k0 > 0 ? to : nullptr;
      if constexpr (kTiled<X>) {
        const int64_t ld = kMostDepth + kRowPad;
        turn_tokens<X, C>(a_rows, ld, M, tokens, token);
        gemm<X>(M, cols, tokens, a_rows, ld, b_panels, to, N, {onto, N});
      } else {
        pack_tokens<X, C>(a_rows, M, tokens, token);
        for (int64_t n = 0; n < cols; n += P::kColumns) {
          const int64_t width = min(P::kColumns, cols - n);
          each_block(M, [&](int64_t m, int64_t rows) {
            const int64_t at = m * N + n;
            multiply_for<X>(rows, width)(K, a_rows + m * K, 1, rows, b_panels + n * K, to + at, N,
                                         width, {onto ? onto + at : nullptr, N});
          });
        }
      }
    }
    if (seq.valid == 0)
      for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < cols; n++) dst[m * N + n0 + n] = 0;
  }
}

// The same for one-hot rows: dst[m, value] is the sum of a[token, m] over the tokens of that value,
// in blocks as those of bias gradients.
template <class C>
void scatter_add(const OneHot& x, int64_t M, int64_t N, const C* a, int64_t lda, C* dst) {
  constexpr int w = Lanes<C>::kWidth;
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) dst[m * N + n] = 0;
  for (int64_t i = 0; i < x.distinct; i++) {
    for (int64_t m = 0; m < M; m += w) {
      const int64_t lanes = min(w, M - m);
      Vec<C> total{}, block{}, sum{};
      for (int64_t k = x.begin[i], n = 1; k < x.begin[i + 1]; k++, n++) {
        sum += load(a + x.token[k] * lda + m, lanes);
        if (n % kBiasBlock == 0) block += sum, sum = Vec<C>{};
        if (n % kTokenBlock == 0) total += block, block = Vec<C>{};
      }
      total += block + sum;
      for (int64_t j = 0; j < lanes; j++) dst[(m + j) * N + x.value[i]] = total[j];
    }
  }
}

// total[j] = sum over tokens of lane j of value(token, j, lanes), j < cols <= kBiasTile; what lies
// behind in the last vector's lanes is anything.
template <class C, class Value>
FUSEDRNN_INLINE void sum_tokens(const Sequence& seq, int64_t cols, C* total, Value value) {
  constexpr int w = Lanes<C>::kWidth;
  Vec<C> all[kBiasTile / w] = {};
  for (int64_t k0 = 0; k0 < seq.valid; k0 += kTokenBlock) {
    const int64_t k2 = min(seq.valid, k0 + kTokenBlock);
    Vec<C> block[kBiasTile / w] = {};
    for (int64_t k1 = k0; k1 < k2; k1 += kBiasBlock) {
      Vec<C> sum[kBiasTile / w] = {};
      for (int64_t k = k1; k < min(k2, k1 + kBiasBlock); k++) {
        const int64_t token = seq.token(seq.valid_step[k], seq.valid_row[k]);
        for (int64_t j = 0; j < cols; j += w) sum[j / w] += value(token, j, cols - j);
      }
      for (int64_t j = 0; j < cols; j += w) block[j / w] += sum[j / w];
    }
    for (int64_t j = 0; j < cols; j += w) all[j / w] += block[j / w];
  }
  std::memcpy(total, all, sizeof all);
}

template <class C>
void bias_grad(const Sequence& seq, const CellRuns& runs, int64_t H, int64_t column, int64_t cols,
               const C* dgates, int64_t ld, C* db_ih, C* db_hh) {
  C total[kBiasTile];
  sum_tokens(seq, cols, total, [&](int64_t token, int64_t j, int64_t lanes) {
    return load(dgates + token * ld + column + j, lanes);
  });
  auto put = [&](C* db, const Run& run) {
    if (!db) return;
    for (int64_t j = 0; j < cols; j++) {
      const int64_t at = column + j - run.slot * H;
      if (at >= 0 && at < run.count * H) db[run.gate * H + at] = total[j];
    }
  };
  for (const Run& run : runs.x) put(db_ih, run);
  for (const Run& run : runs.h) put(db_hh, run);
}

// With layer normalisation biases, gains and shift: `cols` units from `unit` on of one slot of
// dnormed.
template <class S>
void norm_grad(const Backward& a, int64_t dir, int64_t slot, int64_t unit, int64_t cols) {
  using C = Compute<S>;
  const Problem& p = a.problem;
  const CellTraits cell = traits(p.cell);
  const CellRuns runs = cell_runs(p.cell, false);
  const int64_t H = p.hidden_size, tokens = a.seq.tokens, ld = p.normed_columns();
  const C* const d = static_cast<const C*>(a.dnormed) + dir * tokens * ld + slot * H + unit;
  const S* const saved =
      reinterpret_cast<const S*>(a.reserve + Reserve(p).slots_offset(a.layer, dir, tokens)) + unit;
  // Into the part of a gate, of c: 0. `with`: the saved slot that it multiplies, -1: none.
  auto put = [&](int place, int64_t gate, int64_t with) __attribute__((noinline)) {
    C* to = static_cast<C*>(a.dweights[dir * kPlaces + place]);
    if (!to) return;
    C total[kBiasTile];
    const S* const factors = saved + max(with, 0) * H;
    sum_tokens(a.seq, cols, total, [&](int64_t token, int64_t j, int64_t lanes) {
      const Vec<C> v = load(d + token * ld + j, lanes);
      return with < 0 ? v : v * load(factors + token * p.cell_traits().saved * H + j, lanes);
    });
    for (int64_t j = 0; j < cols; j++) to[gate * H + unit + j] = total[j];
  };
  const int of_x = cell.saved, of_h = of_x + cell.gates,
            of_c = of_h + cell.gates;  // cells/normed.h
  for (const Run& run : runs.x) {
    const int64_t gate = run.gate + slot - run.slot;
    if (slot < run.slot || slot >= run.slot + run.count) continue;
    put(kPlaceBiasIH, gate, -1), put(kPlaceGainIH, gate, of_x + gate);
  }
  for (const Run& run : runs.h) {
    const int64_t gate = run.gate + slot - run.slot;
    if (slot < run.slot || slot >= run.slot + run.count) continue;
    put(kPlaceBiasHH, gate, -1), put(kPlaceGainHH, gate, of_h + gate);
  }
  if (slot == cell.slots) put(kPlaceShiftC, 0, -1), put(kPlaceGainC, 0, of_c);
}

template <class S>
void weight_grad(const Backward& a, int64_t task, int64_t threads, void* scratch_space) {
  using C = Compute<S>;
  using X = Operand<S>;
  const Problem& p = a.problem;
  const Sequence& seq = a.seq;
  const CellRuns runs = cell_runs(p.cell, p.layer_norm);
  const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions, layer = a.layer;
  const int64_t per_direction = weight_tasks(p, layer, threads) / D, dir = task / per_direction;
  int matrix = 0;
  int64_t tile = task % per_direction;
  while (tile >= tiles(p, matrix, threads)) tile -= tiles(p, matrix++, threads);
  const int64_t begin = tile * tile_rows(p, matrix, threads);
  const int64_t rows = min(tile_rows(p, matrix, threads), matrix_rows(p, matrix) - begin);
  const C* dgates = static_cast<const C*>(a.dgates) + dir * seq.tokens * p.slot_columns();
  void* const* dweights = a.dweights + dir * kPlaces;
  Scratch scratch{static_cast<char*>(scratch_space)};

  if (matrix == kBias) {
    if (p.layer_norm) {
      const int64_t unit = begin % padded_slot(p);
      norm_grad<S>(a, dir, begin / padded_slot(p), unit, min(rows, H - unit));
      return;
    }
    C *db_ih = static_cast<C*>(dweights[kPlaceBiasIH]),
      *db_hh = static_cast<C*>(dweights[kPlaceBiasHH]);
    if (db_ih || db_hh)
      bias_grad(seq, runs, H, begin, rows, dgates, p.slot_columns(), db_ih, db_hh);
    return;
  }

  auto zeros_if_null = [](const auto* from, int64_t n, int64_t lanes) {
    return from ? load(from + n, lanes) : Vec<C>{};
  };
  if (matrix == kHR) {
    C* dst = static_cast<C*>(dweights[kPlaceHR]);
    if (!dst) return;
    const C* hidden = static_cast<const C*>(a.hidden) + dir * seq.tokens * H;
    const C* dproj = static_cast<const C*>(a.dproj) + dir * seq.tokens * P;
    auto row = [&](int64_t k) {
      const C* from = hidden + seq.token(seq.valid_step[k], seq.valid_row[k]) * H;
      return [from](int64_t n, int64_t lanes) { return load(from + n, lanes); };
    };
    outer_product<X>(seq, rows, H, dproj + begin, P, row, dst + begin * H, scratch);
    return;
  }

  C* dst = static_cast<C*>(dweights[matrix == kIH ? kPlaceIH : kPlaceHH]);
  if (!dst) return;
  auto output_of = [&](int64_t l) {
    return l == p.num_layers - 1 ? static_cast<const S*>(a.y) : kept_outputs<S>(a, l);
  };
  const LayerInput<S> input(a, layer, layer ? output_of(layer - 1) : nullptr);
  auto input_row = [&](int64_t k) {
    const int64_t t = seq.valid_step[k], b = seq.valid_row[k];
    const S* from = input.at(t, b);
    const uint8_t* keep = input.mask ? input.mask + seq.token(t, b) * input.width : nullptr;
    return [from, keep, scale = input.scale](int64_t n, int64_t lanes) {
      Vec<C> v = load(from + n, lanes);
      for (int i = 0; keep && i < Lanes<C>::kWidth && i < lanes; i++) v[i] *= keep[n + i] * scale;
      return v;
    };
  };
  auto state_row = [&](int64_t k) {
    const int64_t t = seq.valid_step[k], b = seq.valid_row[k];
    int64_t before;
    const S* from = nullptr;
    const int64_t state = ((layer * D + dir) * seq.batch + b) * P;
    const auto start = seq.start(dir, t, b, &before);
    if (start == Sequence::Start::kBefore) {
      from = output_of(layer) + (seq.token(before, b) * D + dir) * P;
    } else if (start == Sequence::Start::kInitial && a.hx) {
      from = static_cast<const S*>(a.hx) + state;
    }
    const C* keep = a.h_mask ? static_cast<const C*>(a.h_mask) + state : nullptr;
    return [zeros_if_null, from, keep](int64_t n, int64_t lanes) {
      const Vec<C> v = zeros_if_null(from, n, lanes);
      return keep ? v * load(keep + n, lanes) : v;
    };
  };

  // Rows [begin, begin + rows) of the weight, run by run.
  auto each_run = [&](const RunList& list, int64_t N, auto product) {
    for (const Run& run : list) {
      const int64_t m0 = max(begin, run.gate * H),
                    m1 = min(begin + rows, (run.gate + run.count) * H);
      if (m0 < m1) product(m1 - m0, N, dgates + m0 + (run.slot - run.gate) * H, dst + m0 * N);
    }
  };
  auto with_rows = [&](auto row) {
    return [&, row](int64_t M, int64_t N, const C* from, C* to) {
      outer_product<X>(seq, M, N, from, p.slot_columns(), row, to, scratch);
    };
  };
  if (matrix == kHH) {
    each_run(runs.h, P, with_rows(state_row));
  } else if (!p.indexed(layer)) {
    each_run(runs.x, input.width, with_rows(input_row));
  } else {
    each_run(runs.x, p.input_size, [&](int64_t M, int64_t N, const C* from, C* to) {
      scatter_add(a.one_hot, M, N, from, p.slot_columns(), to);
    });
  }
}

}  // namespace
