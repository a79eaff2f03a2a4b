// Packs the weights of a layer and direction for forward and backward.
#pragma once
#include "cpu/call.h"
#include "cpu/pass/gate_layout.h"
#include "cpu/product/words.h"

namespace {

using namespace fusedrnn;

template <class S>
PackedOffsets forward_offsets(const Common& call, int64_t layer) {
  using X = Operand<S>;
  const Problem& p = call.problem;
  const int64_t columns = Panels<Compute<S>>::padded(p.hidden_size),
                gates = traits(p.cell).gates * columns, slots = p.cell_traits().slots * columns;
  PackedOffsets o{};
  o.w_ih = p.layer_norm ? 0 : slots;  // after the bias
  o.w_hh = o.w_ih + (p.indexed(layer) ? call.one_hot.distinct * slots : 0);
  if constexpr (kInPlace<S>) {
    o.w_hr = o.total = o.w_hh;
    return o;
  } else {
    if (!p.indexed(layer)) o.w_hh += operands<X>(p.layer_input(layer)) * gates;
    o.w_hr = o.w_hh + operands<X>(p.out_size()) * gates;
    o.total = o.w_hr + Panels<X>::size(p.hidden_size, p.proj_size);
    return o;
  }
}

template <class X>
PackedOffsets backward_offsets(const Problem& p, int64_t layer) {
  PackedOffsets o{};
  // Each range is rounded up, and a cell has at most two.
  const int64_t rows = p.gate_rows() + 2 * (kStep<X> - 1);
  o.w_ih = Panels<X>::size(rows, p.out_size());
  o.w_hr = o.w_ih + Panels<X>::size(rows, p.product_input(layer));
  o.total = o.w_hr + Panels<X>::size(p.proj_size, p.hidden_size);
  return o;
}

// Packs w [gates * H, K] transposed, group by group of `most` blocks, for the slots of `ranges`.
template <class X, class S>
void pack_groups(X* dst, const S* w, int64_t H, int64_t K, const GateRangeList& ranges, int gates,
                 int first_slot, int64_t most, int64_t part, int64_t parts) {
  constexpr int width = Panels<X>::kWidth;
  const int64_t all = (H + width - 1) / width;
  for (int64_t block = part * most; block < all; block += parts * most) {
    const int64_t vectors = min(most, all - block) * gates;
    pack_vectors(
        dst + block * gates * width * operands<X>(K), w, K, K, vectors,
        [&](int64_t v) {
          return gate_of(ranges, first_slot + int(v % gates)) * H + (block + v / gates) * width;
        },
        [&](int64_t v) { return min(width, H - (block + v / gates) * width); });
  }
}

// The same of weights that are stored in words.
template <class X>
void pack_groups(X* dst, const WordMatrix& m, const GateRangeList& ranges, int first_slot,
                 int64_t most, int64_t part, int64_t parts) {
  constexpr int width = Panels<X>::kWidth;
  const int64_t all = (m.rows + width - 1) / width;
  for (int64_t block = part * most; block < all; block += parts * most)
    pack_words(
        dst + block * m.gates * width * operands<X>(m.K), m, min(most, all - block) * m.gates,
        [&](int64_t v) { return gate_of(ranges, first_slot + int(v % m.gates)); },
        [&](int64_t v) { return (block + v / m.gates) * width; });
}

// Packs B[k, n] = w[first_row + k, n].
template <class X, class S>
void pack_rows(X* dst, const S* w, int64_t first_row, int64_t N, int64_t K, int64_t part,
               int64_t parts) {
  const Columns columns = share<X>(N, part, parts);
  pack_panels(dst, w + first_row * N, K, N, columns.begin, columns.end);
}

// One part of `parts` of the packing of a layer and direction for forward.
template <class S>
class ForwardPacking {
  using C = Compute<S>;
  using X = Operand<S>;

 public:
  ForwardPacking(const Forward& forward, int64_t which, void* packed, int64_t my_part,
                 int64_t all_parts)
      : call(forward),
        p(forward.problem),
        w(forward.weights[which]),
        layer(which / p.num_directions),
        offsets(forward_offsets<S>(forward, layer)),
        ranges(gate_ranges(p.cell, p.layer_norm)),
        gates(traits(p.cell).gates),
        slots(p.cell_traits().slots),
        group(group_blocks<X>(gates, slots)),
        values(static_cast<C*>(packed)),
        panels(static_cast<X*>(packed)),
        part(my_part),
        parts(all_parts) {}

  void run() const {
    if (!p.layer_norm) pack_bias();
    if (p.indexed(layer) && w.w_ih) pack_one_hot();
    if constexpr (!kInPlace<S> && sizeof(S) == 4)
      if (p.stored != Stored::kPlain) return pack_stored();
    if constexpr (!kForwardOnly<S>) pack_plain();
  }

 private:
  void pack_plain() const {
    // Tangents of weights may be null, which are zeros.
    if (!p.indexed(layer) && w.w_ih)
      pack_groups(panels + offsets.w_ih, static_cast<const S*>(w.w_ih), p.hidden_size,
                  p.layer_input(layer), ranges.x, gates, 0, group, part, parts);
    if (w.w_hh && (kDepth<X> > 1 || !call.pass.unpacked_hh))
      pack_groups(panels + offsets.w_hh, static_cast<const S*>(w.w_hh), p.hidden_size, p.out_size(),
                  ranges.h, gates, slots - gates, group, part, parts);
    if (w.w_hr && part == parts - 1) pack_projection();
  }

  // Weights that are stored in fewer bytes.
  void pack_stored() const {
    if (!p.indexed(layer))
      pack_groups(panels + offsets.w_ih, words_ih(), ranges.x, 0, group, part, parts);
    pack_groups(panels + offsets.w_hh, words_of(w.w_hh, w.scale_hh, p.out_size()), ranges.h,
                slots - gates, group, part, parts);
    if (!p.proj_size || part < parts - 1) return;
    constexpr int width = Panels<X>::kWidth;
    pack_words(
        panels + offsets.w_hr,
        {static_cast<const uint32_t*>(w.w_hr), static_cast<const float*>(w.scale_hr), p.out_size(),
         p.hidden_size, 1},
        (p.out_size() + width - 1) / width, [](int64_t) { return 0; },
        [](int64_t v) { return v * width; });
  }
  WordMatrix words_of(const void* stored, const void* scales, int64_t K) const {
    return {static_cast<const uint32_t*>(stored), static_cast<const float*>(scales), p.hidden_size,
            K, gates};
  }
  WordMatrix words_ih() const { return words_of(w.w_ih, w.scale_ih, p.layer_input(layer)); }

  // b_ih + b_hh of a slot. Layer normalisation adds them later.
  Vec<C> bias(int slot, int64_t unit, int64_t n) const {
    Vec<C> sum{};
    auto add = [&](const void* b, int gate) {
      if (b && gate >= 0) sum += load(static_cast<const S*>(b) + gate * p.hidden_size + unit, n);
    };
    if (p.layer_norm) return sum;
    add(w.b_ih, gate_of(ranges.x, slot)), add(w.b_hh, gate_of(ranges.h, slot));
    return sum;
  }

  void pack_bias() const {
    each_gate_vector<C>(p.hidden_size, slots, part, parts,
                        [&](int slot, int64_t unit, int64_t n, int64_t column) {
                          store(values + column, bias(slot, unit, n));
                        });
  }

  // A row of gates for each distinct input value: its column of W_ih, plus the bias.
  void pack_one_hot() const {
    const OneHot& x = call.one_hot;
    const int64_t H = p.hidden_size, row = Panels<C>::padded(H) * slots;
    C* const rows = values + offsets.w_ih;
    each_gate_vector<C>(H, slots, part, parts,
                        [&](int slot, int64_t unit, int64_t n, int64_t column) {
                          const int gate = gate_of(ranges.x, slot);
                          const Vec<C> b = bias(slot, unit, n);
                          for (int64_t i = 0; i < x.distinct; i++) {
                            Vec<C> v{};
                            for (int64_t j = 0; gate >= 0 && j < n; j++)
                              v[j] = weight_ih(gate, unit + j, x.value[i]);
                            store(rows + i * row + column, b + v);
                          }
                        });
  }

  C weight_ih(int gate, int64_t unit, int64_t k) const {
    if (p.stored != Stored::kPlain) return C(words_ih().at(gate, unit, k));
    if constexpr (kForwardOnly<S>)
      __builtin_unreachable();
    else
      return to_compute(
          static_cast<const S*>(w.w_ih)[(gate * p.hidden_size + unit) * p.input_size + k]);
  }

  void pack_projection() const {
    constexpr int width = Panels<X>::kWidth;
    const int64_t H = p.hidden_size, P = p.out_size();
    pack_vectors(
        panels + offsets.w_hr, static_cast<const S*>(w.w_hr), H, H, (P + width - 1) / width,
        [](int64_t v) { return v * width; }, [&](int64_t v) { return min(width, P - v * width); });
  }

  const Forward& call;
  const Problem& p;
  const Weights& w;
  const int64_t layer;
  const PackedOffsets offsets;
  const CellGateRanges ranges;
  const int gates, slots, group;  // group: the blocks of one
  C* const values;                // the packed weights, as the compute type and as operands
  X* const panels;
  const int64_t part, parts;
};

// One part of `parts` of the packing of a layer and direction for backward: W_hh and W_ih range by
// range, and W_hr.
template <class S>
void pack_backward(const Backward& call, int64_t which, void* packed, int64_t part, int64_t parts) {
  using X = Operand<S>;
  const Problem& p = call.problem;
  const Weights& w = call.weights[which];
  const PackedOffsets offsets = backward_offsets<X>(p, call.layer);
  const CellGateRanges ranges = gate_ranges(p.cell, p.layer_norm);
  X* const panels = static_cast<X*>(packed);
  const int64_t H = p.hidden_size, P = p.out_size();
  auto pack_ranges = [&](X* dst, const GateRangeList& list, const void* weights, int64_t N) {
    if (!weights) return;  // the tangents of weights that have none
    for (const GateRange& range : list) {
      const int64_t K = range.count * H;
      pack_rows(dst, static_cast<const S*>(weights), range.gate * H, N, K, part, parts);
      dst += Panels<X>::size(K, N);
    }
  };
  // The gradient of the initial state, or a second step.
  if (call.dhx || call.seq.length[call.seq.order[0]] > 1) pack_ranges(panels, ranges.h, w.w_hh, P);
  if (call.grad_in)
    pack_ranges(panels + offsets.w_ih, ranges.x, w.w_ih, p.product_input(call.layer));
  if (w.w_hr) pack_rows(panels + offsets.w_hr, static_cast<const S*>(w.w_hr), 0, H, P, part, parts);
}

}  // namespace
