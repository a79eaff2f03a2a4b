// Back-propagation through time of one layer for some rows of the batch.
//
// The mirror of forward: each thread takes its rows from the last step to the first without
// meeting another, or each member of a team its units of all. Members share the gradients of
// the gates, which every one's part of the product with W_hh reads, and meet between the two; what
// comes out is for their own units. It writes the gradients of all pre-activations, from which the
// weight gradients are one product later, and the gradient of the layer's input, chunk by chunk.
// Steps go through the columns of W_hh up and down in turns, as in forward.
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

  BackwardBuffers(const Problem& p, int64_t rows, Scratch& common, Scratch& s)
      : tokens(max(rows, kChunkTokens<X>)),
        ld_gates(operands<X>(p.slot_columns()) + kRowPad<X>),
        ld_dh(p.out_size()),
        ld_proj(operands<X>(p.out_size()) + kRowPad<X>),
        ld_input(max(p.product_input(0), p.num_directions * p.out_size())) {
    gates = common.take<X>((tokens + kSpareRows<X>)*ld_gates);
    dh = s.take<C>(rows * ld_dh);
    dropped = s.take<C>(rows * ld_dh);
    dc = s.take<C>(traits(p.cell).has_cell ? rows * p.hidden_size : 0);
    dhidden = s.take<C>(p.proj_size ? rows * p.hidden_size : 0);
    dproj = s.take<X>(p.proj_size ? (rows + kSpareRows<X>)*ld_proj : 0);
    input = s.take<C>(tokens * ld_input);
  }
};

// For calls of few tokens, whose weights are not packed: `columns` of A W + D, W [K, N] in rows as
// it lies, a few of which are read at a time. M <= kFewTokensBack.
template <class C, class E, class S>
void multiply_unpacked(int64_t M, int64_t K, int64_t N, const E* a, int64_t lda, const S* weights,
                       Columns columns, C* to, int64_t ld, Addend<C> d) {
  constexpr int w = Lanes<C>::kWidth, kAtOnce = 8;
  constexpr int64_t kBlock = 512;  // columns whose sums stay in the first cache
  constexpr int64_t kChain = 32;   // rows that are added before they join the sum
  C sums[kFewTokensBack * kBlock];
  for (int64_t n0 = columns.begin; n0 < columns.end; n0 += kBlock) {
    const int64_t cols = min(kBlock, columns.end - n0);
    for (int64_t r = 0; r < M; r++)
      for (int64_t n = 0; n < cols; n += w)
        store(to + r * ld + n0 + n, d.at ? load(d.at + r * d.ld + n0 + n, cols - n) : Vec<C>{},
              cols - n);
    for (int64_t k0 = 0; k0 < K; k0 += kChain) {
      const int64_t k1 = min(K, k0 + kChain);
      for (int64_t k = k0; k < k1; k += kAtOnce) {
        const S* row[kAtOnce];
        for (int i = 0; i < kAtOnce; i++) row[i] = weights + min(k + i, K - 1) * N + n0;
        for (int64_t r = 0; r < M; r++) {
          Vec<C> factor[kAtOnce];
          for (int i = 0; i < kAtOnce; i++)
            factor[i] = broadcast<C>(k + i < k1 ? to_compute(a[r * lda + k + i]) : C(0));
          for (int64_t n = 0; n < cols; n += w) {
            Vec<C> sum = k > k0 ? load(sums + r * kBlock + n) : Vec<C>{};
#pragma GCC unroll 8
            for (int i = 0; i < kAtOnce; i++) sum += factor[i] * load(row[i] + n, cols - n);
            store(sums + r * kBlock + n, sum);
          }
        }
      }
      for (int64_t r = 0; r < M; r++)
        for (int64_t n = 0; n < cols; n += w) {
          C* const at = to + r * ld + n0 + n;
          store(at, load(at, cols - n) + load(sums + r * kBlock + n), cols - n);
        }
    }
  }
}

template <class Cell, class S>
void backward_rows(const Backward& a, const Rows& of, Member& me) {
  using C = Compute<S>;
  using X = Operand<S>;
  using E = Element<X>;
  const Problem& p = a.problem;
  const Sequence& seq = a.seq;
  const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions;
  const int64_t first = of.first, end = of.end, rows = end - first;
  const int64_t longest = seq.length[seq.order[first]], layer = a.layer;
  const Reserve reserve(p);
  Scratch common{static_cast<char*>(of.common)}, own{static_cast<char*>(of.own)};
  const BackwardBuffers<S> buf(p, rows, common, own);
  const PackedOffsets at = backward_offsets<X>(p, layer);
  const int64_t plane = buf.ld_gates / kPlanes<X>;
  // The last run may end within what a product takes at a time. A run before it ends in the next
  // slot's first values, times 0: in plain cells what is not finite there reaches the same sums
  // anyway, and with layer normalisation it makes that step's gradients NaN.
  for (int64_t r = 0; me.index == 0 && r < buf.tokens * kPlanes<X>; r++)
    for (int i = 0; i < kStep<X> - 1; i++)
      reinterpret_cast<E*>(buf.gates + r * plane)[p.slot_columns() + i] = E{};
  auto of_slot = [&](const X* gates, int slot) {
    return reinterpret_cast<const X*>(reinterpret_cast<const E*>(gates) + slot * H);
  };
  const LayerInput<S> input(a, layer, nullptr);
  // This member's units as the cells see them, as outputs, and as the layer's inputs.
  const Columns units = share<X>(H, me.index, me.count), outputs = share<X>(P, me.index, me.count),
                inputs = share<X>(input.width, me.index, me.count);
  // `columns` of the product of M rows of gates with a matrix of N, packed run by run, or as it is;
  // some at a time, from the last to the first where `falling`.
  auto multiply_runs = [&](const auto& runs, int64_t M, const X* gates, const X* packed,
                           int64_t panels, const void* weights, int64_t N, Columns columns, C* to,
                           int64_t ld, const C* onto, bool falling) {
    if constexpr (kPlanes<X> == 1) {
      if (!a.packed) {
        for (const Run& run : runs.run) {
          multiply_unpacked(
              M, run.count * H, N, reinterpret_cast<const E*>(of_slot(gates, run.slot)),
              buf.ld_gates * kDepth<X>, static_cast<const S*>(weights) + run.gate * H * N, columns,
              to, ld, Addend<C>{onto, ld});
          onto = to;
        }
        return;
      }
    }
    constexpr int64_t kAtOnce = kTiled<X> ? 4 * Panels<X>::kColumns : Panels<X>::kColumns;
    const int64_t blocks = (columns.end - columns.begin + kAtOnce - 1) / kAtOnce;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t n = columns.begin + (falling ? blocks - 1 - i : i) * kAtOnce;
      const X* of_run = packed + panels;
      const C* add = onto;
      for (const Run& run : runs.run) {
        const int64_t depth = run.count * H;
        gemm(M, min(kAtOnce, columns.end - n), depth, of_slot(gates, run.slot), buf.ld_gates,
             of_run + n * operands<X>(depth), to + n, ld, {add ? add + n : nullptr, ld});
        of_run += Panels<X>::size(depth, N);
        add = to;
      }
    }
  };
  const S* out = layer == p.num_layers - 1 ? static_cast<const S*>(a.y) : kept_outputs<S>(a, layer);

  for (int64_t dir = 0; dir < D; dir++) {
    const int64_t state = (layer * D + dir) * seq.batch;
    const X* packed = a.packed ? static_cast<const X*>(a.packed) + dir * at.total : nullptr;
    const Weights& weights = a.weights[layer * D + dir];
    const S* saved =
        reinterpret_cast<const S*>(a.reserve + reserve.slots_offset(layer, dir, seq.tokens));
    const KeptCells<C> cells(a, layer, dir);
    Kept<X>* const dgates = static_cast<Kept<X>*>(a.dgates) + dir * seq.tokens * p.slot_columns();
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
    auto finish = [&](int64_t t, int64_t r, bool multiplied) {
      const int64_t b = seq.order[first + r];
      C *dh = buf.dh + r * buf.ld_dh, *dropped = buf.dropped + r * buf.ld_dh;
      if (a.h_mask && multiplied) {
        const C* mask = static_cast<const C*>(a.h_mask) + (state + b) * P;
        for (int64_t j = outputs.begin; j < outputs.end; j++)
          dh[j] = (adds_direct ? dh[j] : 0) + dropped[j] * mask[j];
      }
      int64_t before;
      if (seq.start(dir, t, b, &before) != Sequence::Start::kZeros) return;
      for (int64_t j = 0; j < P; j++) dh[j] = 0;
      for (int64_t j = 0; Cell::kHasCell && j < H; j++) buf.dc[r * H + j] = 0;
    };

    const int64_t steps = chunk_steps<X>(rows);
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
            to_operands(buf.dproj + r * buf.ld_proj, buf.ld_proj / kPlanes<X>, d, P);
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
          row.factors = gates + r * buf.ld_gates;
          row.plane = plane;
          if constexpr (kIsNormed<Cell>)
            normed_backward<Cell>(H, row, NormWeights<S>(weights), scales + token * Cell::kScales,
                                  dnormed + token * p.normed_columns());
          else
            cell_backward_row<Cell, S>(H, units.begin, units.end, row);
        }
        me.meet();
        const bool multiplies = i > 0 || a.dhx;  // before the first step comes the initial state
        if (multiplies)
          multiply_runs(Cell::h_runs(), n, gates, packed, at.w_hh, weights.w_hh, P, outputs,
                        a.h_mask ? buf.dropped : buf.dh, buf.ld_dh,
                        adds_direct && !a.h_mask ? buf.dh : nullptr, i % 2);
        for (int64_t r = 0; (a.h_mask || seq.resets) && r < n; r++) finish(t, r, multiplies);
        gates += n * buf.ld_gates;
      }

      if (a.grad_in)
        multiply_runs(Cell::x_runs(), (gates - buf.gates) / buf.ld_gates, buf.gates, packed,
                      at.w_ih, weights.w_ih, input.width, inputs, buf.input, buf.ld_input, nullptr,
                      false);
      me.meet();  // the next chunk's gates take the place of these
      if (!a.grad_in) continue;
      C* from = buf.input;
      for (int64_t i = chunk_end - 1; i >= chunk; i--) {
        const int64_t t = dir == 0 ? i : longest - 1 - i;
        const int64_t n = active_rows(seq, first, end, t);
        for (int64_t r = 0; r < n; r++, from += buf.ld_input) {
          const int64_t b = seq.order[first + r];
          C* to = static_cast<C*>(a.grad_in) + seq.token(t, b) * input.width;
          if (input.mask) input.drop(from, t, b, inputs);
          if (dir == 0 && !a.onto_grad_in) {
            convert_row(to + inputs.begin, from + inputs.begin, inputs.end - inputs.begin);
          } else {
            for (int64_t j = inputs.begin; j < inputs.end; j++) to[j] += from[j];
          }
        }
      }
    }

    for (int64_t r = 0; r < rows; r++) {
      const int64_t b = seq.order[first + r];
      auto put = [&](void* all, int64_t width, Columns columns, const C* from) {
        if (all)
          convert_row(static_cast<C*>(all) + (state + b) * width + columns.begin,
                      from + columns.begin, columns.end - columns.begin);
      };
      put(a.dhx, P, outputs, buf.dh + r * buf.ld_dh);
      if (Cell::kHasCell) put(a.dcx, H, units, buf.dc + r * H);
    }
  }
}

}  // namespace
