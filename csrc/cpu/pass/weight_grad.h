// Weight gradients of one layer: sums over all tokens, after the recurrence.
//
//   dW_ih = dgates^T x    dW_hh = dgates^T h_{t-1}    dW_hr = dh^T (o tanh c)    db = sum of dgates
//   with layer normalisation    db, dshift = sum of dnormed    dgain = sum of dnormed * normalised
#pragma once
#include "cpu/pass/arrays.h"
#include "cpu/pass/token_sums.h"
#include "cpu/pass/weight_tasks.h"
#include "cpu/product/outer.h"

namespace {

// One task of weight_tasks.h, of a layer with the cell and dtype of `call`.
template <class S>
class WeightGradTask {
  using C = Compute<S>;
  using X = Operand<S>;

 public:
  WeightGradTask(const Backward& backward, int64_t task, int64_t threads, void* scratch_memory)
      : call(backward),
        p(backward.problem),
        seq(backward.seq),
        H(p.hidden_size),
        P(p.out_size()),
        D(p.num_directions),
        dir(task / weight_tasks<X>(p, threads)),
        segments(gate_ranges(p.cell, p.layer_norm)),
        tile(tile_of<X>(p, segments, task % weight_tasks<X>(p, threads), threads)),
        dgates(static_cast<const StoredOperand<X>*>(backward.dgates) +
               dir * seq.tokens * p.slot_columns()),
        input(backward, backward.layer,
              backward.layer ? layer_output<S>(backward, backward.layer - 1) : nullptr),
        rounds(backward.rounds_weights && !std::is_same_v<S, C>),
        scratch(static_cast<X*>(scratch_memory)) {}

  void run() const {
    if (tile.part == kProjection) return projection();
    if (tile.part != kBias) return matrices();
    if (!p.layer_norm) return biases();
    const int64_t unit = tile.begin % padded_slot(p);
    norms(tile.begin / padded_slot(p), unit, min(tile.columns, H - unit));
  }

 private:
  // Calls f with the gradient from element `first` on, in its type; not where none is required.
  template <class F>
  FUSEDRNN_INLINE void with_gradient(WeightKind kind, int64_t first, F f) const {
    void* const dst = call.dweights[dir][kind];
    if (!dst) return;
    if (!rounds) return f(static_cast<C*>(dst) + first);
    f(static_cast<S*>(dst) + first);
  }
  // The same as an address; null where none is required.
  void* gradient_of(WeightKind kind, int64_t first) const {
    void* found = nullptr;
    with_gradient(kind, first, [&](auto* dst) { found = dst; });
    return found;
  }
  template <class D>
  static void put(D* dst, C value) {
    *dst = from_compute<D>(value);
  }
  int64_t token(int64_t k) const { return seq.token(seq.valid_step[k], seq.valid_row[k]); }

  void biases() const {
    const CellGateRanges ranges = gate_ranges(p.cell, false);
    if (!call.dweights[dir][kBiasIH] && !call.dweights[dir][kBiasHH]) return;
    const int64_t ld = p.slot_columns(), column = tile.begin, cols = tile.columns;
    const auto* const values = dgates;
    C total[kBiasTile];
    sum_tokens(seq, cols, total, [&](int64_t token, int64_t j, int64_t lanes) {
      return load(values + token * ld + column + j, lanes);
    });
    auto store_range = [&](WeightKind kind, const GateRange& range) {
      with_gradient(kind, range.gate * H, [&](auto* db) {
        for (int64_t j = 0; j < cols; j++) {
          const int64_t unit = column + j - range.slot * H;
          if (unit >= 0 && unit < range.count * H) put(db + unit, total[j]);
        }
      });
    };
    for (const GateRange& range : ranges.x) store_range(kBiasIH, range);
    for (const GateRange& range : ranges.h) store_range(kBiasHH, range);
  }

  // With layer normalisation biases, gains and shift: `cols` units from `unit` on of one slot of
  // dnormed.
  void norms(int64_t slot, int64_t unit, int64_t cols) const {
    const CellTraits cell = traits(p.cell);
    const CellGateRanges ranges = gate_ranges(p.cell, false);
    const int saved_x = cell.saved, saved_h = saved_x + cell.gates,
              saved_c = saved_h + cell.gates;  // cells/normed.h
    for (const GateRange& range : ranges.x) {
      const int64_t gate = range.gate + slot - range.slot;
      if (slot < range.slot || slot >= range.slot + range.count) continue;
      norm_sum(kBiasIH, gate, -1, slot, unit, cols);
      norm_sum(kGainIH, gate, saved_x + gate, slot, unit, cols);
    }
    for (const GateRange& range : ranges.h) {
      const int64_t gate = range.gate + slot - range.slot;
      if (slot < range.slot || slot >= range.slot + range.count) continue;
      norm_sum(kBiasHH, gate, -1, slot, unit, cols);
      norm_sum(kGainHH, gate, saved_h + gate, slot, unit, cols);
    }
    if (slot != cell.slots) return;
    norm_sum(kShiftC, 0, -1, slot, unit, cols);
    norm_sum(kGainC, 0, saved_c, slot, unit, cols);
  }

  // One of them: the sum of a slot of dnormed, times the saved slot `factor` (-1: none), is the
  // gradient of a gate.
  __attribute__((noinline)) void norm_sum(WeightKind kind, int64_t gate, int64_t factor,
                                          int64_t slot, int64_t unit, int64_t cols) const {
    if (!call.dweights[dir][kind]) return;
    const int64_t ld = p.normed_columns(), ld_saved = p.cell_traits().saved * H;
    const C* const dnormed =
        static_cast<const C*>(call.dnormed) + dir * seq.tokens * ld + slot * H + unit;
    const S* const factors = saved_slots<S>(call, call.layer, dir) + unit + max(factor, 0) * H;
    C total[kBiasTile];
    sum_tokens(seq, cols, total, [&](int64_t token, int64_t j, int64_t lanes) {
      const Vec<C> v = load(dnormed + token * ld + j, lanes);
      return factor < 0 ? v : v * load(factors + token * ld_saved + j, lanes);
    });
    with_gradient(kind, gate * H + unit, [&](auto* dst) {
      for (int64_t j = 0; j < cols; j++) put(dst + j, total[j]);
    });
  }

  void projection() const {
    void* const dst = gradient_of(kWeightHR, tile.begin * H);
    if (!dst) return;
    const C* const hidden = static_cast<const C*>(call.hidden) + dir * seq.tokens * H;
    const C* const dproj = static_cast<const C*>(call.dproj) + dir * seq.tokens * P + tile.begin;
    auto row = [&](int64_t k) { return TokenRow<C>{hidden + token(k) * H, nullptr, nullptr, 0}; };
    outer_products<S>(
        seq.valid, tile.columns, [&](int64_t k) { return dproj + token(k) * P; }, scratch, rounds,
        [&](auto product) { product(H, row, dst); });
  }

  // The row of the layer's input that belongs to the k-th token.
  FUSEDRNN_INLINE TokenRow<S> input_row(int64_t k) const {
    const int64_t t = seq.valid_step[k], b = seq.valid_row[k];
    const uint8_t* const mask = input.mask ? input.mask + seq.token(t, b) * input.width : nullptr;
    return {input.row(t, b), mask, nullptr, input.scale};
  }
  // The same of h_{t-1}, after recurrent dropout.
  FUSEDRNN_INLINE TokenRow<S> state_row(int64_t k) const {
    const int64_t t = seq.valid_step[k], b = seq.valid_row[k];
    const int64_t state = ((call.layer * D + dir) * seq.batch + b) * P;
    const S* values = nullptr;
    int64_t before;
    const auto start = seq.start(dir, t, b, &before);
    if (start == Sequence::Start::kBefore) {
      values = layer_output<S>(call, call.layer) + (seq.token(before, b) * D + dir) * P;
    } else if (start == Sequence::Start::kInitial && call.hx) {
      values = static_cast<const S*>(call.hx) + state;
    }
    const C* const mask = call.h_mask ? static_cast<const C*>(call.h_mask) + state : nullptr;
    return {values, nullptr, mask, 0};
  }

  void matrices() const {
    const Segment& segment = segments.segment[tile.part];
    // The tile's rows of one of the matrices; null: it has none, or no gradient is required.
    auto rows_of = [&](WeightKind kind, int gate, int64_t width) {
      return gate < 0 ? nullptr : gradient_of(kind, (gate * H + tile.begin) * width);
    };
    const auto* const gates = dgates + segment.slot * H + tile.begin;
    const int64_t ld = p.slot_columns();
    const bool indexed = p.indexed(call.layer);
    if (indexed && segment.x_gate >= 0)
      with_gradient(kWeightIH, (segment.x_gate * H + tile.begin) * p.input_size, [&](auto* dst) {
        scatter_add(call.one_hot, tile.columns, p.input_size, gates, ld, dst);
      });
    void* const dw_ih = indexed ? nullptr : rows_of(kWeightIH, segment.x_gate, input.width);
    void* const dw_hh = rows_of(kWeightHH, segment.h_gate, P);
    if (!dw_ih && !dw_hh) return;
    outer_products<S>(
        seq.valid, tile.columns, [&](int64_t k) { return gates + token(k) * ld; }, scratch, rounds,
        [&](auto product) {
          if (dw_ih) product(input.width, [this](int64_t k) { return input_row(k); }, dw_ih);
          if (dw_hh) product(P, [this](int64_t k) { return state_row(k); }, dw_hh);
        });
  }

  const Backward& call;
  const Problem& p;
  const Sequence& seq;
  const int64_t H, P, D, dir;
  const Segments segments;
  const Tile tile;
  const StoredOperand<X>* const dgates;
  const LayerInput<S> input;
  const bool rounds;
  X* const scratch;
};

}  // namespace
