// The forward pass of a whole stack for some rows of the batch.
//
// A thread runs its rows through all layers and steps alone; nothing is shared but the packed
// weights, so there is no barrier. Only where each row has two threads or more, or the weights are
// large, does a team take rows together: each member computes its groups of units, reads h of all
// of them, and meets the others once h of a step is written. Gates, and what they are made of, are
// a member's own. Per layer and direction,
// time goes in chunks: the input products of a chunk's tokens are one matrix product. Then each
// step goes through the groups of units: h W_hh^T is added to a group's gates and its cells are
// computed while they are in the first cache. Every second step goes from the last group to the
// first: of weights that are more than the second cache holds, it finds there what the step before
// it read last.
#pragma once
#include "cpu/pass/layer_norm.h"
#include "cpu/product/unpacked.h"

namespace {

template <class S>
struct ForwardBuffers {
  using C = Compute<S>;
  using X = Operand<S>;
  int64_t ld_input, ld_gates, ld_h, ld_hidden, ld_operand, ld_projected;
  C *gates, *h[2], *c, *hidden;  // h of the last step and of this one take turns
  X* input;
  X *operand, *projected;  // h of the last step through recurrent dropout, and `hidden`, as factors

  ForwardBuffers(const Problem& p, int64_t rows, Scratch& common, Scratch& s)
      : ld_input(operands<X>(max(p.product_input(0), p.num_directions * p.out_size())) +
                 kRowPad<X>),
        ld_gates(p.cell_traits().slots * Panels<C>::padded(p.hidden_size) + kRowPad<C>),
        ld_h(p.out_size() + kRowPad<C>),
        ld_hidden(p.hidden_size + kRowPad<C>),
        ld_operand(operands<X>(p.out_size()) + kRowPad<X>),
        ld_projected(operands<X>(p.hidden_size) + kRowPad<X>) {
    const int64_t tokens = max(rows, kChunkTokens<X>);
    input = s.take<X>((tokens + kSpareRows<X>)*ld_input);
    gates = s.take<C>(tokens * ld_gates);
    for (C*& buffer : h) buffer = common.take<C>(rows * ld_h);
    c = common.take<C>(traits(p.cell).has_cell ? rows * p.hidden_size : 0);
    operand = s.take<X>((rows + kSpareRows<X>)*ld_operand);
    hidden = s.take<C>(p.proj_size ? rows * ld_hidden : 0);
    projected = s.take<X>(p.proj_size && kDepth<X> > 1 ? (rows + kSpareRows<X>)*ld_projected : 0);
  }
};

// The initial states of a layer and direction, for the rows at places first .. of Sequence::order;
// c is not touched where a cell has none.
template <class S>
void read_states(const Forward& a, int64_t layer, int64_t dir, int64_t first, int64_t rows,
                 Compute<S>* h, int64_t ld_h, Compute<S>* c) {
  const Problem& p = a.problem;
  const int64_t P = p.out_size(), H = p.hidden_size;
  for (int64_t r = 0; r < rows; r++, h += ld_h, c += H) {
    const int64_t at = (layer * p.num_directions + dir) * a.seq.batch + a.seq.order[first + r];
    for (int64_t j = 0; j < P; j++) h[j] = 0;
    if (a.hx) convert_row(h, static_cast<const S*>(a.hx) + at * P, P);
    if (!traits(p.cell).has_cell) continue;
    for (int64_t j = 0; j < H; j++) c[j] = 0;
    if (a.cx) convert_row(c, static_cast<const S*>(a.cx) + at * H, H);
  }
}
// The same to the final ones.
template <class S>
void write_states(const Forward& a, int64_t layer, int64_t dir, int64_t first, int64_t rows,
                  const Compute<S>* h, int64_t ld_h, const Compute<S>* c) {
  const Problem& p = a.problem;
  const int64_t P = p.out_size(), H = p.hidden_size;
  for (int64_t r = 0; r < rows; r++, h += ld_h, c += H) {
    const int64_t at = (layer * p.num_directions + dir) * a.seq.batch + a.seq.order[first + r];
    convert_row(static_cast<S*>(a.hn) + at * P, h, P);
    if (traits(p.cell).has_cell) convert_row(static_cast<S*>(a.cn) + at * H, c, H);
  }
}
// Where the outputs of a layer go.
template <class S>
S* output_of(const Forward& a, int64_t layer) {
  if (layer == a.problem.num_layers - 1) return static_cast<S*>(a.y);
  S* const kept = kept_outputs<S>(a, layer);
  return kept ? kept : static_cast<S*>(a.inner[layer % 2]);
}

// The cells of a group of units, in all rows of a step, that wait for the time of a product.
template <class Cell, class S>
struct WaitingCells {
  int64_t H;
  const ForwardRow<S>* rows;
  int64_t block, blocks, done, count;

  void up_to(int64_t end) {
    const WaitingCells here = *this;  // which no store below can change
    for (int64_t r = here.done; r < end; r++)
      cell_forward<Cell>(here.H, here.block, here.blocks, here.rows[r]);
    done = end;
  }
  static void meanwhile(void* self, int64_t part, int64_t parts) {
    WaitingCells& cells = *static_cast<WaitingCells*>(self);
    cells.up_to(cells.count * part / parts);
  }
};

// Adds the products of W_hh, as it lies, with h of n <= kDotRows rows to the gates of some blocks
// of units.
template <class Cell, class S, class C>
void add_unpacked(const S* w_hh, int64_t H, int64_t P, int64_t block, int64_t blocks, int64_t n,
                  const C* h, int64_t ld_h, C* gates, int64_t ld_gates) {
  constexpr int w = Lanes<C>::kWidth;
  for (int64_t unit = block * w; unit < min(H, (block + blocks) * w); unit += w)
    for (int slot = Cell::kSlots - Cell::kGates; slot < Cell::kSlots; slot++) {
      Vec<C> sums[kDotRows];
      dot_rows<C>(sums, w_hh + (gate_of(Cell::h_runs(), slot) * H + unit) * P, min(w, H - unit), h,
                  ld_h, P, n);
      C* const to = gates + unit * Cell::kSlots + slot * w;
      for (int64_t r = 0; r < n; r++) store(to + r * ld_gates, load(to + r * ld_gates) + sums[r]);
    }
}

template <class Cell, class S>
void forward_rows(const Forward& a, const Rows& of, Member& me) {
  using C = Compute<S>;
  using X = Operand<S>;
  const Problem& p = a.problem;
  const Sequence& seq = a.seq;
  const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions;
  const int64_t first = of.first, end = of.end, rows = end - first;
  const int64_t longest = seq.length[seq.order[first]];
  using G = Groups<Cell, C>;
  constexpr int kFirstHSlot = Cell::kSlots - Cell::kGates;
  const Reserve reserve(p);
  // Cells are computed in the time of the next product where that is long: with three planes, or
  // with weights that come from beyond the second cache. Else right after their own, whose sums
  // are at hand.
  const bool cells_wait =
      kTiled<X> && (kPlanes<X> > 1 || p.gate_rows() * P * int64_t(sizeof(Element<X>)) > 1 << 20);
  Scratch common{static_cast<char*>(of.common)}, s{static_cast<char*>(of.own)};
  ForwardBuffers<S> buf(p, rows, common, s);
  ForwardRow<S>* const step = s.take<ForwardRow<S>>(rows);
  const C* packed = static_cast<const C*>(a.packed);
  const void* below = nullptr;

  for (int64_t layer = 0; layer < p.num_layers; layer++) {
    const PackedOffsets at = forward_offsets<X>(a, layer);
    const LayerInput<S> input(a, layer, below);
    S* const out = output_of<S>(a, layer);
    for (int64_t dir = 0; dir < D; dir++, packed += at.total) {
      const int64_t state = (layer * D + dir) * seq.batch;
      S* const saved =
          a.reserve ? reinterpret_cast<S*>(a.reserve + reserve.slots_offset(layer, dir, seq.tokens))
                    : nullptr;
      const KeptCells<C> cells(a, layer, dir);
      const X* const panels = reinterpret_cast<const X*>(packed);
      const S* const w_hh = static_cast<const S*>(a.weights[layer * D + dir].w_hh);
      const bool keeps_candidates = a.reserve && Reserve::keeps_candidates(p);
      C* const scales =
          a.reserve
              ? reinterpret_cast<C*>(a.reserve + reserve.scales_offset(layer, dir, seq.tokens))
              : nullptr;

      if (me.index == 0) read_states<S>(a, layer, dir, first, rows, buf.h[0], buf.ld_h, buf.c);
      me.meet();

      // What a row starts a step from: a state of zeros, or of the step before through dropout.
      auto prepare = [&](int64_t t, int64_t r) {
        const int64_t b = seq.order[first + r];
        int64_t before;
        C* h = buf.h[0] + r * buf.ld_h;
        if (seq.start(dir, t, b, &before) == Sequence::Start::kZeros) {
          for (int64_t j = 0; j < P; j++) h[j] = 0;
          for (int64_t j = 0; Cell::kHasCell && j < H; j++) buf.c[r * H + j] = 0;
        }
        X* const to = buf.operand + r * buf.ld_operand;
        constexpr int kP = kPlanes<X>;
        if (a.h_mask) {
          const C* mask = static_cast<const C*>(a.h_mask) + (state + b) * P;
          make_operands(to, buf.ld_operand / kP, P,
                        [&](int64_t j, int64_t n) { return load(h + j, n) * load(mask + j, n); });
        } else if (kDepth<X> > 1) {
          to_operands(to, buf.ld_operand / kP, h, P);
        }
      };
      // Rows as factors: converted, or as they are.
      auto factors = [](const C* same, const X* converted) -> const X* {
        if constexpr (kDepth<X> == 1) {
          if (same) return same;
        }
        return converted;
      };
      const int64_t columns = G::gate_columns(H);
      auto at_value = [&](int64_t token) {
        return packed + at.w_ih + a.one_hot.which[token] * columns;
      };
      const int64_t steps = chunk_steps<X>(rows);
      for (int64_t chunk = 0; chunk < longest; chunk += steps) {
        const int64_t chunk_end = min(longest, chunk + steps);
        int64_t q = 0;
        for (int64_t i = chunk; i < chunk_end; i++) {
          const int64_t t = dir == 0 ? i : longest - 1 - i;
          const int64_t n = active_rows(seq, first, end, t);
          for (int64_t r = 0; r < n; r++, q++) {
            const int64_t b = seq.order[first + r];
            if (p.indexed(layer))
              convert_row(buf.gates + q * buf.ld_gates, at_value(seq.token(t, b)), columns);
            else
              input.read(buf.input + q * buf.ld_input, buf.ld_input / kPlanes<X>, t, b);
          }
        }
        if (!p.indexed(layer))
          G::each(H, me, false, [&](int64_t block, int64_t blocks) {
            const int64_t column = block * Cell::kSlots * G::kWidth;
            gemm(q, blocks * Cell::kGates * G::kWidth, input.width, buf.input, buf.ld_input,
                 panels + at.w_ih + block * Cell::kGates * G::kWidth * operands<X>(input.width),
                 buf.gates + column, buf.ld_gates,
                 {kIsNormed<Cell> ? nullptr : packed + at.bias + column, 0});
            // Slots that the input does not reach.
            for (int k = Cell::kGates; !kIsNormed<Cell> && k < Cell::kSlots; k++)
              for (int64_t i = 0; i < q; i++)
                store(buf.gates + i * buf.ld_gates + column + k * G::kWidth,
                      load(packed + at.bias + column + k * G::kWidth));
          });

        C* gates = buf.gates;
        for (int64_t i = chunk; i < chunk_end; i++) {
          const int64_t t = dir == 0 ? i : longest - 1 - i;
          const int64_t n = active_rows(seq, first, end, t);
          for (int64_t r = 0; r < n; r++) {
            const int64_t token = seq.token(t, seq.order[first + r]);
            const int64_t index = (layer * D + dir) * seq.tokens + token;
            ForwardRow<S>& row = step[r];
            row.gates = gates + r * buf.ld_gates;
            row.h_prev = buf.h[0] + r * buf.ld_h;
            row.h = p.proj_size ? buf.hidden + r * buf.ld_hidden : buf.h[1] + r * buf.ld_h;
            row.c = Cell::kHasCell ? buf.c + r * H : nullptr;
            row.y = p.proj_size ? nullptr : out + (token * D + dir) * P;
            row.saved = saved ? saved + token * Cell::kSaved * H : nullptr;
            row.saved_c = Cell::kHasCell ? cells.of(token) : nullptr;
            row.candidate = keeps_candidates ? cells.of(token) : nullptr;
            row.keep_h = p.proj_size ? Keep<C>() : Keep<C>(a.zoneout_h, index, P);
            row.keep_c = Keep<C>(a.zoneout_c, index, H);
            prepare(t, r);
          }
          const X* operand = factors(a.h_mask ? nullptr : buf.h[0], buf.operand);
          WaitingCells<Cell, S> cells{};
          Meanwhile meanwhile{};
          if constexpr (!kIsNormed<Cell>)
            if (cells_wait) meanwhile = {cells.meanwhile, &cells};
          G::each(H, me, i % 2, [&](int64_t block, int64_t blocks) {
            const int64_t column = block * Cell::kSlots * G::kWidth;
            C* to = gates + column + kFirstHSlot * G::kWidth;
            auto multiply = [&] {
              if constexpr (kDepth<X> == 1 && !kIsNormed<Cell>)
                if (a.unpacked_hh)
                  return add_unpacked<Cell>(w_hh, H, P, block, blocks, n, operand, buf.ld_operand,
                                            gates, buf.ld_gates);
              gemm(n, blocks * Cell::kGates * G::kWidth, P, operand, buf.ld_operand,
                   panels + at.w_hh + block * Cell::kGates * G::kWidth * operands<X>(P), to,
                   buf.ld_gates, {kIsNormed<Cell> ? nullptr : to, buf.ld_gates}, meanwhile);
            };
            multiply();
            if constexpr (!kIsNormed<Cell>) {
              cells.up_to(cells.count);  // what is left of the last group
              cells = {H, step, block, blocks, 0, n};
              if (!cells_wait) cells.up_to(n);
            }
          });
          if constexpr (!kIsNormed<Cell>) cells.up_to(cells.count);
          if constexpr (kIsNormed<Cell>)
            for (int64_t r = 0; r < n; r++) {
              const int64_t token = seq.token(t, seq.order[first + r]);
              normed_forward<Cell>(H, step[r], NormWeights<S>(a.weights[layer * D + dir]),
                                   scales ? scales + token * Cell::kScales : nullptr);
            }
          if (p.proj_size) {
            for (int64_t r = 0; kDepth<X> > 1 && r < n; r++)
              to_operands(buf.projected + r * buf.ld_projected, buf.ld_projected / kPlanes<X>,
                          buf.hidden + r * buf.ld_hidden, H);
            gemm(n, P, H, factors(buf.hidden, buf.projected), buf.ld_projected, panels + at.w_hr,
                 buf.h[1], buf.ld_h, {});
            for (int64_t r = 0; r < n; r++) {
              const int64_t token = seq.token(t, seq.order[first + r]);
              C* h = buf.h[1] + r * buf.ld_h;
              const Keep<C> keep(a.zoneout_h, (layer * D + dir) * seq.tokens + token, P);
              for (int64_t j = 0; keep && j < P; j += G::kWidth) {
                const int64_t width = min(G::kWidth, P - j);
                const Vec<C> before = load(buf.h[0] + r * buf.ld_h + j, width);
                store(h + j, zone_out<C>(keep.at(j, width), before, load(h + j, width)), width);
              }
              convert_row(out + (token * D + dir) * P, h, P);
            }
          }
          for (int64_t r = n; me.index == 0 && r < rows; r++)  // rows that rest at this step
            convert_row(buf.h[1] + r * buf.ld_h, buf.h[0] + r * buf.ld_h, P);
          C* const last = buf.h[0];
          buf.h[0] = buf.h[1], buf.h[1] = last;
          me.meet();
          gates += n * buf.ld_gates;
        }
      }

      if (me.index == 0) write_states<S>(a, layer, dir, first, rows, buf.h[0], buf.ld_h, buf.c);
    }
    below = out;
  }
}

}  // namespace
