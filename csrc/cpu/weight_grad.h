// Weight gradients of one layer: products over all tokens, after the recurrence.
//
//   dW_ih = dgates^T x    dW_hh = dgates^T h_{t-1}    dW_hr = dh^T (o tanh c)    db = sum of dgates
//   with layer normalisation    db, dshift = sum of dnormed    dgain = sum of dnormed * normalised
//
// A task is a tile of columns of dgates, with all that they are multiplied with, or of another left
// factor, or a tile of the bias sums.
#pragma once
#include "cpu/outer_product.h"

namespace {

// Slots in a row whose gradients W_ih, W_hh or both get, as rows of the gates from x_gate and
// h_gate on; -1: not that one.
struct Segment {
  int slot, count, x_gate, h_gate;
};
struct Segments {
  int count = 0;
  Segment segment[4] = {};

  explicit constexpr Segments(const CellRuns& runs) {
    int slots = 0;
    auto reach = [&](const RunList& list) {
      for (const Run& run : list)
        slots = run.slot + run.count > slots ? run.slot + run.count : slots;
    };
    reach(runs.x), reach(runs.h);
    for (int slot = 0; slot < slots; slot++) {
      const int x = gate_of(runs.x, slot), h = gate_of(runs.h, slot);
      Segment& last = segment[count ? count - 1 : 0];
      auto follows = [&](int gate, int first) {
        return gate == (first < 0 ? -1 : first + last.count);
      };
      if (count && follows(x, last.x_gate) && follows(h, last.h_gate))
        last.count++;
      else
        segment[count++] = {slot, 1, x, h};
    }
  }
};

constexpr int64_t kBiasTile = 64;  // columns of one bias task
constexpr int64_t kTotalled = 8;   // tokens that are added before they join a total

// A sum of any number of terms that rounds about as much as one addition: what additions round away
// is added up too. Knuth, The Art of Computer Programming 2, 4.2.2, theorem B.
template <class C>
struct Total {
  Vec<C> sum{}, lost{};

  FUSEDRNN_INLINE void add(Vec<C> x) {
    const Vec<C> all = sum + x, of_x = all - sum;
    lost += (sum - (all - of_x)) + (x - of_x);
    sum = all;
  }
  // Of a sum that is not finite, what was lost is not a number.
  FUSEDRNN_INLINE Vec<C> value() const { return sum - sum == 0 ? sum + lost : sum; }
};

// What is divided into tiles: the columns of each segment of dgates, the bias sums, dh before W_hr.
enum Part { kBias = 4, kHR, kParts };
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
FUSEDRNN_INLINE int64_t part_columns(const Problem& p, const Segments& segments, int part) {
  switch (part) {
    case kBias:
      if (p.layer_norm) return p.normed_columns() / p.hidden_size * padded_slot(p);
      return p.bias ? p.slot_columns() : 0;
    case kHR:
      return p.proj_size;
    default:
      return part < segments.count ? segments.segment[part].count * p.hidden_size : 0;
  }
}
// Columns of a task: as many as share one packing of what they are multiplied with, but one task of
// each part for each thread.
template <class X>
FUSEDRNN_INLINE int64_t tile_columns(int64_t columns, int part, int64_t threads) {
  if (part == kBias) return kBiasTile;
  constexpr int64_t kUnit = kTiled<X> ? 32 : kRows;
  const int64_t want = max(48, (columns + threads - 1) / threads);
  return min(Outer<X>::kMostRows, (want + kUnit - 1) / kUnit * kUnit);
}

// A tile of a part, and how many tasks come before it; past the last: kParts.
struct Tile {
  int part;
  int64_t begin, columns, before;
};
template <class X>
Tile tile_of(const Problem& p, const Segments& segments, int64_t task, int64_t threads) {
  int64_t before = 0;
  for (int part = 0; part < kParts; part++) {
    const int64_t all = part_columns(p, segments, part), size = tile_columns<X>(all, part, threads),
                  tiles = (all + size - 1) / size;
    if (task < before + tiles) {
      const int64_t begin = (task - before) * size;
      return {part, begin, min(size, all - begin), task};
    }
    before += tiles;
  }
  return {kParts, 0, 0, before};
}

// Of one direction.
template <class X>
int64_t weight_tasks(const Problem& p, int64_t threads) {
  return tile_of<X>(p, Segments(cell_runs(p.cell, p.layer_norm)), INT64_MAX, threads).before;
}

template <class X>
int64_t weight_scratch(const Problem& p, int64_t layer, int64_t tokens) {
  const int64_t of_gates = p.layer_input(layer) + p.out_size();
  return Outer<X>::scratch_bytes(max(max(p.layer_input(layer), p.out_size()), p.hidden_size),
                                 max(of_gates, p.hidden_size), tokens);
}

// The product over tokens with one-hot rows: dst[m, value] is the sum of a[token, m] over the
// tokens of that value.
template <class C, class A>
void scatter_add(const OneHot& x, int64_t M, int64_t N, const A* a, int64_t lda, C* dst) {
  constexpr int w = Lanes<C>::kWidth;
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) dst[m * N + n] = 0;
  for (int64_t i = 0; i < x.distinct; i++) {
    for (int64_t m = 0; m < M; m += w) {
      const int64_t lanes = min(w, M - m);
      Total<C> total;
      for (int64_t k1 = x.begin[i]; k1 < x.begin[i + 1]; k1 += kTotalled) {
        Vec<C> block{};
        for (int64_t k = k1; k < min(x.begin[i + 1], k1 + kTotalled); k++)
          block += load(a + x.token[k] * lda + m, lanes);
        total.add(block);
      }
      const Vec<C> sum = total.value();
      for (int64_t j = 0; j < lanes; j++) dst[(m + j) * N + x.value[i]] = sum[j];
    }
  }
}

// total[j] = sum over tokens of lane j of value(token, j, lanes), j < cols <= kBiasTile; what lies
// behind in the last vector's lanes is anything.
template <class C, class Value>
FUSEDRNN_INLINE void sum_tokens(const Sequence& seq, int64_t cols, C* total, Value value) {
  constexpr int w = Lanes<C>::kWidth;
  Total<C> totals[kBiasTile / w];
  for (int64_t k1 = 0; k1 < seq.valid; k1 += kTotalled) {
    Vec<C> block[kBiasTile / w] = {};
    for (int64_t k = k1; k < min(seq.valid, k1 + kTotalled); k++) {
      const int64_t token = seq.token(seq.valid_step[k], seq.valid_row[k]);
      for (int64_t j = 0; j < cols; j += w) block[j / w] += value(token, j, cols - j);
    }
    for (int64_t j = 0; j < cols; j += w) totals[j / w].add(block[j / w]);
  }
  for (int64_t j = 0; j < cols; j += w) store(total + j, totals[j / w].value());
}

template <class C, class A>
void bias_grad(const Sequence& seq, const CellRuns& runs, int64_t H, int64_t column, int64_t cols,
               const A* dgates, int64_t ld, C* db_ih, C* db_hh) {
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
  const Segments segments(runs);
  const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions, layer = a.layer;
  const int64_t per_direction = weight_tasks<X>(p, threads), dir = task / per_direction;
  const Tile tile = tile_of<X>(p, segments, task % per_direction, threads);
  const auto* dgates = static_cast<const Kept<X>*>(a.dgates) + dir * seq.tokens * p.slot_columns();
  auto gradient_of = [&](int place) { return static_cast<C*>(a.dweights[dir * kPlaces + place]); };
  Scratch scratch{static_cast<char*>(scratch_space)};

  if (tile.part == kBias) {
    if (p.layer_norm) {
      const int64_t unit = tile.begin % padded_slot(p);
      norm_grad<S>(a, dir, tile.begin / padded_slot(p), unit, min(tile.columns, H - unit));
      return;
    }
    C *db_ih = gradient_of(kPlaceBiasIH), *db_hh = gradient_of(kPlaceBiasHH);
    if (db_ih || db_hh)
      bias_grad(seq, runs, H, tile.begin, tile.columns, dgates, p.slot_columns(), db_ih, db_hh);
    return;
  }

  auto zeros_if_null = [](const auto* from, int64_t n, int64_t lanes) {
    return from ? load(from + n, lanes) : Vec<C>{};
  };
  if (tile.part == kHR) {
    C* const dst = gradient_of(kPlaceHR);
    if (!dst) return;
    const C* hidden = static_cast<const C*>(a.hidden) + dir * seq.tokens * H;
    const C* dproj = static_cast<const C*>(a.dproj) + dir * seq.tokens * P;
    auto row = [&](int64_t k) {
      const C* from = hidden + seq.token(seq.valid_step[k], seq.valid_row[k]) * H;
      return [from](int64_t n, int64_t lanes) { return load(from + n, lanes); };
    };
    outer_products<X>(seq, tile.columns, dproj + tile.begin, P, scratch,
                      [&](auto product) { product(H, row, dst + tile.begin * H); });
    return;
  }

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

  const Segment& segment = segments.segment[tile.part];
  // The tile's rows of one of the matrices; null: it gets nothing, or nobody wants it.
  auto rows_of = [&](int place, int gate, int64_t width) -> C* {
    C* const dst = gate < 0 ? nullptr : gradient_of(place);
    return dst ? dst + (gate * H + tile.begin) * width : nullptr;
  };
  const bool indexed = p.indexed(layer);
  C* const dw_ih = rows_of(kPlaceIH, segment.x_gate, indexed ? p.input_size : input.width);
  C* const dw_hh = rows_of(kPlaceHH, segment.h_gate, P);
  const auto* from = dgates + segment.slot * H + tile.begin;
  const int64_t ld = p.slot_columns();
  if (dw_ih && indexed) scatter_add(a.one_hot, tile.columns, p.input_size, from, ld, dw_ih);
  if ((!dw_ih || indexed) && !dw_hh) return;
  outer_products<X>(seq, tile.columns, from, ld, scratch, [&](auto product) {
    if (dw_ih && !indexed) product(input.width, input_row, dw_ih);
    if (dw_hh) product(P, state_row, dw_hh);
  });
}

}  // namespace
