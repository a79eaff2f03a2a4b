// Back-propagation through time of one layer for some rows of the batch.
//
// The mirror of forward: each thread takes its rows from the last step to the first without
// meeting another. It writes the gradients of all pre-activations, from which the weight gradients
// are one product later, and the gradient of the layer's input, chunk by chunk.
#pragma once
#include "cpu/layer_norm.h"

namespace {

template <class S>
struct BackwardBuffers {
  using C = Compute<S>;
  using X = Operand<S>;
  int64_t tokens, ld_gates, ld_dh, ld_proj, ld_input;
  X *gates, *dproj;
  C *dh, *dc, *dhidden, *input, *dropped;

  BackwardBuffers(const Problem& p, int64_t rows, Scratch& s)
      : tokens(max(rows, kChunkTokens)),
        ld_gates(operands<X>(p.slot_columns()) + kRowPad),
        ld_dh(p.out_size()),
        ld_proj(operands<X>(p.out_size()) + kRowPad),
        ld_input(max(p.product_input(0), p.num_directions * p.out_size())) {
    gates = s.take<X>(tokens * ld_gates);
    dh = s.take<C>(rows * ld_dh);
    dropped = s.take<C>(rows * ld_dh);
    dc = s.take<C>(traits(p.cell).has_cell ? rows * p.hidden_size : 0);
    dhidden = s.take<C>(p.proj_size ? rows * p.hidden_size : 0);
    dproj = s.take<X>(p.proj_size ? rows * ld_proj : 0);
    input = s.take<C>(tokens * ld_input);
  }
};

template <class Cell, class S>
void backward_rows(const Backward& a, int64_t first, int64_t end, void* scratch) {
  using C = Compute<S>;
  using X = Operand<S>;
  using E = Element<X>;
  const Problem& p = a.problem;
  const Sequence& seq = a.seq;
  const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions, rows = end - first;
  const int64_t longest = seq.length[seq.order[first]], layer = a.layer;
  const Reserve reserve(p);
  Scratch scratch_space{static_cast<char*>(scratch)};
  const BackwardBuffers<S> buf(p, rows, scratch_space);
  const PackedOffsets at = backward_offsets<X>(p, layer);
  auto row_of_gates = [&](X* gates, int64_t r) {
    return reinterpret_cast<E*>(gates + r * buf.ld_gates);
  };
  // The last run may end in half a pair. A run before it ends in the next slot's first value, times
  // 0: what is not finite there reaches the same sums anyway.
  for (int64_t r = 0; r < buf.tokens; r++) row_of_gates(buf.gates, r)[p.slot_columns()] = E{};
  auto of_slot = [&](const X* gates, int slot) {
    return reinterpret_cast<const X*>(reinterpret_cast<const E*>(gates) + slot * H);
  };
  const LayerInput<S> input(a, layer, nullptr);
  const S* out = layer == p.num_layers - 1 ? static_cast<const S*>(a.y) : kept_outputs<S>(a, layer);

  for (int64_t dir = 0; dir < D; dir++) {
    const int64_t state = (layer * D + dir) * seq.batch;
    const X* packed = static_cast<const X*>(a.packed) + dir * at.total;
    const S* saved =
        reinterpret_cast<const S*>(a.reserve + reserve.slots_offset(layer, dir, seq.tokens));
    const KeptCells<C> cells(a, layer, dir);
    C* const dgates = static_cast<C*>(a.dgates) + dir * seq.tokens * p.slot_columns();
    const C* scales =
        reinterpret_cast<const C*>(a.reserve + reserve.scales_offset(layer, dir, seq.tokens));
    C* const dnormed = static_cast<C*>(a.dnormed) + dir * seq.tokens * p.normed_columns();

    for (int64_t r = 0; r < rows; r++) {
      const int64_t b = seq.order[first + r];
      C* dh = buf.dh + r * buf.ld_dh;
      for (int64_t j = 0; j < P; j++) dh[j] = 0;
      if (a.grad_hn) convert_row(dh, static_cast<const C*>(a.grad_hn) + (state + b) * P, P);
      if (!Cell::kHasCell) continue;
      C* dc = buf.dc + r * H;
      for (int64_t j = 0; j < H; j++) dc[j] = 0;
      if (a.grad_cn) convert_row(dc, static_cast<const C*>(a.grad_cn) + (state + b) * H, H);
    }

    // The part of dL/dh_prev that does not pass through W_hh, to which the rest is added.
    const bool adds_direct = Cell::kUsesHPrev || p.zoneout;
    // Of a row after the product with W_hh: dropout's gradient, and nothing to pass on to a state
    // that was zeroed.
    auto finish = [&](int64_t t, int64_t r) {
      const int64_t b = seq.order[first + r];
      C *dh = buf.dh + r * buf.ld_dh, *dropped = buf.dropped + r * buf.ld_dh;
      if (a.h_mask) {
        const C* mask = static_cast<const C*>(a.h_mask) + (state + b) * P;
        for (int64_t j = 0; j < P; j++) dh[j] = (adds_direct ? dh[j] : 0) + dropped[j] * mask[j];
      }
      int64_t before;
      if (seq.start(dir, t, b, &before) != Sequence::Start::kZeros) return;
      for (int64_t j = 0; j < P; j++) dh[j] = 0;
      for (int64_t j = 0; Cell::kHasCell && j < H; j++) buf.dc[r * H + j] = 0;
    };

    const int64_t steps = chunk_steps(rows);
    for (int64_t chunk_end = longest; chunk_end > 0; chunk_end -= min(chunk_end, steps)) {
      const int64_t chunk = max(0, chunk_end - steps);
      X* gates = buf.gates;
      for (int64_t i = chunk_end - 1; i >= chunk; i--) {
        const int64_t t = dir == 0 ? i : longest - 1 - i;
        const int64_t n = active_rows(seq, first, end, t);
        if (p.proj_size) {  // dL/dh of the projected output, then through W_hr
          for (int64_t r = 0; r < n; r++) {
            const int64_t token = seq.token(t, seq.order[first + r]);
            const C* dy = static_cast<const C*>(a.grad_out) + (token * D + dir) * P;
            C *d = static_cast<C*>(a.dproj) + (dir * seq.tokens + token) * P,
              *dh = buf.dh + r * buf.ld_dh;
            const Keep<C> keep(a.zoneout_h, (layer * D + dir) * seq.tokens + token, P);
            for (int64_t j = 0; j < P; j++) {
              const C all = dh[j] + dy[j], kept = keep ? keep.at(j, 1)[0] * all : C(0);
              d[j] = all - kept, dh[j] = kept;
            }
            to_operands(buf.dproj + r * buf.ld_proj, d, P);
          }
          gemm(n, H, P, buf.dproj, buf.ld_proj, packed + at.w_hr, buf.dhidden, H, {});
        }
        for (int64_t r = 0; r < n; r++) {
          const int64_t b = seq.order[first + r], token = seq.token(t, b);
          int64_t before;
          const auto start = seq.start(dir, t, b, &before);
          const bool has_before = start == Sequence::Start::kBefore,
                     initial = start == Sequence::Start::kInitial;
          const int64_t prev = has_before ? seq.token(before, b) : 0;
          BackwardRow<S> row{};
          row.saved = saved + token * Cell::kSaved * H;
          row.h = out + (token * D + dir) * P;
          if (Cell::kUsesHPrev)
            row.h_prev = has_before        ? out + (prev * D + dir) * P
                         : initial && a.hx ? static_cast<const S*>(a.hx) + (state + b) * P
                                           : nullptr;
          if (Cell::kHasCell) {
            row.c = cells.of(token);
            row.c_prev = has_before ? cells.of(prev) : nullptr;
            row.c0 = initial && a.cx ? static_cast<const S*>(a.cx) + (state + b) * H : nullptr;
            row.dc = buf.dc + r * H;
            row.keep_c = Keep<C>(a.zoneout_c, (state / seq.batch) * seq.tokens + token, H);
            if (a.grad_cs) row.dcs = static_cast<const C*>(a.grad_cs) + (token * D + dir) * H;
          } else if (Reserve::keeps_candidates(p)) {
            row.candidate = cells.of(token);
          }
          C* const dh = buf.dh + r * buf.ld_dh;
          if (adds_direct && !p.proj_size) row.dh_direct = dh;
          if (p.proj_size) {
            row.dh = buf.dhidden + r * H;
            row.hidden = static_cast<C*>(a.hidden) + (dir * seq.tokens + token) * H;
          } else {
            row.dh = dh;
            row.keep_h = Keep<C>(a.zoneout_h, (layer * D + dir) * seq.tokens + token, P);
            row.dy = static_cast<const C*>(a.grad_out) + (token * D + dir) * P;
          }
          row.dgates = dgates + token * p.slot_columns();
          row.factors = row_of_gates(gates, r);
          if constexpr (kIsNormed<Cell>)
            normed_backward<Cell>(H, row, NormWeights<S>(a.weights[layer * D + dir]),
                                  scales + token * Cell::kScales,
                                  dnormed + token * p.normed_columns());
          else
            cell_backward_row<Cell, S>(H, row);
        }
        const X* w_hh = packed + at.w_hh;
        C* const product = a.h_mask ? buf.dropped : buf.dh;
        Addend<C> onto{adds_direct && !a.h_mask ? buf.dh : nullptr, buf.ld_dh};
        for (const Run& run : Cell::h_runs().run) {
          gemm(n, P, run.count * H, of_slot(gates, run.slot), buf.ld_gates, w_hh, product,
               buf.ld_dh, onto);
          w_hh += Panels<X>::size(run.count * H, P);
          onto.at = product;
        }
        for (int64_t r = 0; (a.h_mask || seq.resets) && r < n; r++) finish(t, r);
        gates += n * buf.ld_gates;
      }

      if (!a.grad_in) continue;
      const X* w_ih = packed + at.w_ih;
      Addend<C> onto{nullptr, buf.ld_input};
      for (const Run& run : Cell::x_runs().run) {
        gemm((gates - buf.gates) / buf.ld_gates, input.width, run.count * H,
             of_slot(buf.gates, run.slot), buf.ld_gates, w_ih, buf.input, buf.ld_input, onto);
        w_ih += Panels<X>::size(run.count * H, input.width);
        onto.at = buf.input;
      }
      C* from = buf.input;
      for (int64_t i = chunk_end - 1; i >= chunk; i--) {
        const int64_t t = dir == 0 ? i : longest - 1 - i;
        const int64_t n = active_rows(seq, first, end, t);
        for (int64_t r = 0; r < n; r++, from += buf.ld_input) {
          const int64_t b = seq.order[first + r];
          C* to = static_cast<C*>(a.grad_in) + seq.token(t, b) * input.width;
          if (input.mask) input.drop(from, t, b);
          if (dir == 0 && !a.onto_grad_in) {
            convert_row(to, from, input.width);
          } else {
            for (int64_t j = 0; j < input.width; j++) to[j] += from[j];
          }
        }
      }
    }

    for (int64_t r = 0; r < rows; r++) {
      const int64_t b = seq.order[first + r];
      if (a.dhx) convert_row(static_cast<C*>(a.dhx) + (state + b) * P, buf.dh + r * buf.ld_dh, P);
      if (Cell::kHasCell && a.dcx)
        convert_row(static_cast<C*>(a.dcx) + (state + b) * H, buf.dc + r * H, H);
    }
  }
}

}  // namespace
