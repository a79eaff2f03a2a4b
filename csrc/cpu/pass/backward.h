// Back-propagation through time of one layer for some rows of the batch.
//
// As in forward, a thread takes its rows alone, from the last step to the first, or each member of
// a team takes its units of all rows. Members share the gradients of the gates, which every
// member's part of the product with W_hh reads, and wait at a barrier between the two; the results
// are for their own units. It writes the gradients of all pre-activations, from which weight
// gradients are computed later, and, chunk by chunk, the gradient of the layer's input. Steps go
// through the columns of W_hh in ascending and descending order in turn, as in forward.
#pragma once
#include "cpu/pass/layer_norm.h"
#include "cpu/pass/pack.h"
#include "cpu/pass/rows.h"
#include "cpu/product/unpacked.h"

namespace {

template <class S>
struct BackwardBuffers {
  using C = Compute<S>;
  using X = Operand<S>;
  int64_t tokens, ld_gates, ld_dh, ld_proj, ld_input;
  X *gates, *dproj;  // factors of products: gradients of gates, and of projected outputs
  C *dh, *dc, *dhidden, *input;
  C* dropped;  // gradient of h after recurrent dropout

  BackwardBuffers(const Problem& p, int64_t rows, Scratch& common, Scratch& own)
      : tokens(max(rows, kChunkTokens<X>)),
        ld_gates(row_stride<X>(p.slot_columns())),
        ld_dh(p.out_size() + kRowPad<C>),
        ld_proj(row_stride<X>(p.out_size())),
        ld_input(max(p.product_input(0), p.num_directions * p.out_size())) {
    gates = common.take<X>((tokens + kSpareRows<X>)*ld_gates);
    dh = own.take<C>(rows * ld_dh);
    dropped = own.take<C>(rows * ld_dh);
    dc = own.take<C>(traits(p.cell).has_cell ? rows * p.hidden_size : 0);
    dhidden = own.take<C>(p.proj_size ? rows * p.hidden_size : 0);
    dproj = own.take<X>(p.proj_size ? (rows + kSpareRows<X>)*ld_proj : 0);
    input = own.take<C>(tokens * ld_input);
  }
};

// A matrix of N columns by which gradients of gates are multiplied.
template <class S>
struct GateMatrix {
  const Operand<S>* packed;
  const S* unpacked;
  int64_t N;
  int64_t longest;  // of longest_sum()
};

// One direction: its arrays, and its packed weights where there are any.
template <class S>
struct BackwardDirection {
  using C = Compute<S>;
  using X = Operand<S>;
  const int64_t dir, index;  // index: of all layers and directions
  const S *const out, *const saved;
  const CellStates<C> cells;
  StoredOperand<X>* const dgates;
  const C* const scales;
  C* const dnormed;
  const Weights& weights;
  const GateMatrix<S> w_hh, w_ih;
  const X* const w_hr;

  BackwardDirection(const Backward& call, int64_t direction, const X* packed,
                    const PackedOffsets& offsets)
      : dir(direction),
        index(call.layer * call.problem.num_directions + dir),
        out(layer_output<S>(call, call.layer)),
        saved(saved_slots<S>(call, call.layer, dir)),
        cells(call, call.layer, dir),
        dgates(static_cast<StoredOperand<X>*>(call.dgates) +
               dir * call.seq.tokens * call.problem.slot_columns()),
        scales(saved_scales<S>(call, call.layer, dir)),
        dnormed(static_cast<C*>(call.dnormed) +
                dir * call.seq.tokens * call.problem.normed_columns()),
        weights(call.weights[index]),
        w_hh{packed ? packed + offsets.w_hh : nullptr, static_cast<const S*>(weights.w_hh),
             call.problem.out_size(), longest_sum<X>(call.pass.long_sums)},
        w_ih{packed ? packed + offsets.w_ih : nullptr, static_cast<const S*>(weights.w_ih),
             call.problem.product_input(call.layer), longest_sum<X>(call.pass.long_sums)},
        w_hr(packed ? packed + offsets.w_hr : nullptr) {}
};

// The last range of a row of gates may end within what a product takes at a time. A range before it
// ends in the next slot's first values, times 0: in plain cells what is not finite there reaches
// the same sums anyway, and with layer normalisation it makes that step's gradients NaN.
template <class S>
void clear_row_ends(const Problem& p, const BackwardBuffers<S>& buf) {
  using X = Operand<S>;
  using E = Element<X>;
  const int64_t plane = buf.ld_gates / kPlanes<X>;
  for (int64_t r = 0; r < buf.tokens * kPlanes<X>; r++)
    for (int i = 0; i < kStep<X> - 1; i++)
      reinterpret_cast<E*>(buf.gates + r * plane)[p.slot_columns() + i] = E{};
}

// `columns` of the product of M rows of gates of H units with a matrix, plus `addend`: range by
// range, and some columns at a time, in descending order if asked for.
template <class S, class Ranges>
void multiply_gates(const Ranges& ranges, const GateMatrix<S>& w, int64_t H, int64_t M,
                    const Operand<S>* gates, int64_t ld_gates, Columns columns, Compute<S>* dst,
                    int64_t ld, const Compute<S>* addend, bool descending,
                    int64_t tile_height = kTileRows) {
  using C = Compute<S>;
  using X = Operand<S>;
  using E = Element<X>;
  const int64_t N = w.N;
  auto slot_of_gates = [&](int slot) {
    return reinterpret_cast<const X*>(reinterpret_cast<const E*>(gates) + slot * H);
  };
  if constexpr (kPlanes<X> == 1) {
    if (!w.packed) {
      for (const GateRange& range : ranges.range) {
        multiply_unpacked(M, range.count * H, N,
                          reinterpret_cast<const E*>(slot_of_gates(range.slot)),
                          ld_gates * kDepth<X>, w.unpacked + range.gate * H * N, columns, dst, ld,
                          Addend<C>{addend, ld});
        addend = dst;
      }
      return;
    }
  }
  int64_t rows = 0;
  for (const GateRange& range : ranges.range) rows += range.count * H;
  const TileShape shape = TileShape::of(tile_height, rows * N * int64_t(sizeof(E)));
  constexpr int64_t kAtOnce = kTiled<X> ? 4 * Panels<X>::kColumns : Panels<X>::kColumns;
  const int64_t blocks = (columns.count() + kAtOnce - 1) / kAtOnce;
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t n = columns.begin + (descending ? blocks - 1 - i : i) * kAtOnce;
    const X* panels = w.packed;
    const C* block_addend = addend;
    for (const GateRange& range : ranges.range) {
      const int64_t K = range.count * H;
      gemm(M, min(kAtOnce, columns.end - n), K, slot_of_gates(range.slot), ld_gates,
           panels + n * operands<X>(K), dst + n, ld,
           {block_addend ? block_addend + n : nullptr, ld}, w.longest, {}, shape);
      panels += Panels<X>::size(K, N);
      block_addend = dst;
    }
  }
}

// The rows of a task in one direction after the other, and the gradients that they carry from step
// to step: those of one backward pass, or the tangents of them.
template <class Cell, class S>
struct BackwardRows {
  using C = Compute<S>;
  using X = Operand<S>;
  using Direction = BackwardDirection<S>;

  const Backward& call;
  const Problem& p;
  const Sequence& seq;
  const TaskRows rows;
  const BackwardBuffers<S> buf;
  const LayerInput<S> input;
  const Columns units, outputs, inputs;  // of this thread: hidden units, of h, of the layer's input
  const bool adds_direct;                // whether dL/dh_{t-1} has a part beside W_hh

  BackwardRows(const Backward& backward, const Rows& task, const Member& me, Scratch& common,
               Scratch& own)
      : call(backward),
        p(backward.problem),
        seq(backward.seq),
        rows(seq, task.first, task.end),
        buf(p, rows.count, common, own),
        input(call, call.layer, nullptr),
        units(share<X>(p.hidden_size, me.index, me.count)),
        outputs(share<X>(p.out_size(), me.index, me.count)),
        inputs(share<X>(input.width, me.index, me.count)),
        adds_direct(Cell::kUsesHPrev || p.zoneout) {}

  // dL/dh and dL/dc of the final states.
  void read_gradients(const Direction& d) const {
    const int64_t H = p.hidden_size, P = p.out_size();
    for (int64_t r = 0; r < rows.count; r++) {
      const int64_t state = d.index * seq.batch + rows.row(r);
      C* const dh = buf.dh + r * buf.ld_dh;
      for (int64_t j = 0; j < P; j++) dh[j] = 0;
      if (call.grad_hn) convert_row(dh, static_cast<const C*>(call.grad_hn) + state * P, P);
      if (!Cell::kHasCell) continue;
      C* const dc = buf.dc + r * H;
      for (int64_t j = 0; j < H; j++) dc[j] = 0;
      if (call.grad_cn) convert_row(dc, static_cast<const C*>(call.grad_cn) + state * H, H);
    }
  }

  // dL/dh of the projected output of n rows, as factors too.
  void read_projected(const Direction& d, int64_t t, int64_t n) const {
    const int64_t P = p.out_size(), D = p.num_directions;
    for (int64_t r = 0; r < n; r++) {
      const int64_t token = seq.token(t, rows.row(r));
      const C* const dy =
          call.grad_out ? static_cast<const C*>(call.grad_out) + (token * D + d.dir) * P : nullptr;
      C *const dproj = static_cast<C*>(call.dproj) + (d.dir * seq.tokens + token) * P,
               *const dh = buf.dh + r * buf.ld_dh;
      const ZoneoutMask<C> zoneout(call.zoneout_h, d.index * seq.tokens + token, P);
      for (int64_t j = 0; j < P; j++) {
        C all = dy ? dh[j] + dy[j] : dh[j];
        dh[j] = zoneout ? zone_out_backward(zoneout.load(j, 1)[0], all) : C(0);
        dproj[j] = all;
      }
      to_operands(buf.dproj + r * buf.ld_proj, buf.ld_proj / kPlanes<X>, dproj, P);
    }
  }

  // The arrays of row r of step t.
  FUSEDRNN_INLINE BackwardRow<S> row_of(const Direction& d, int64_t t, int64_t r, int64_t token,
                                        X* factors) const {
    const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions;
    const int64_t b = rows.row(r), state = d.index * seq.batch + b;
    const int64_t state_row = d.index * seq.tokens + token;
    int64_t before;
    const auto start = seq.start(d.dir, t, b, &before);
    const bool has_before = start == Sequence::Start::kBefore,
               initial = start == Sequence::Start::kInitial;
    const int64_t saved = seq.saved_token(token),
                  prev = has_before ? seq.saved_token(seq.token(before, b)) : 0;
    BackwardRow<S> row{};
    row.saved = d.saved + saved * Cell::kSaved * H;
    row.h = d.out + (saved * D + d.dir) * P;
    if (Cell::kUsesHPrev)
      row.h_prev = has_before           ? d.out + (prev * D + d.dir) * P
                   : initial && call.hx ? static_cast<const S*>(call.hx) + state * P
                                        : nullptr;
    if (Cell::kHasCell) {
      row.c = d.cells.row(saved);
      row.c_prev = has_before ? d.cells.row(prev) : nullptr;
      row.c0 = initial && call.cx ? static_cast<const S*>(call.cx) + state * H : nullptr;
      row.dc = buf.dc + r * H;
      row.zoneout_c = ZoneoutMask<C>(call.zoneout_c, state_row, H);
      if (call.grad_cs) row.dcs = static_cast<const C*>(call.grad_cs) + (token * D + d.dir) * H;
    } else if (Reserve::keeps_candidates(p)) {
      row.candidate = d.cells.row(saved);
    }
    C* const dh = buf.dh + r * buf.ld_dh;
    if (adds_direct && !p.proj_size) row.dh_direct = dh;
    if (p.proj_size) {
      row.dh = buf.dhidden + r * H;
      row.hidden = static_cast<C*>(call.hidden) + (d.dir * seq.tokens + token) * H;
    } else {
      row.dh = dh;
      row.zoneout_h = ZoneoutMask<C>(call.zoneout_h, state_row, P);
      if (call.grad_out) row.dy = static_cast<const C*>(call.grad_out) + (token * D + d.dir) * P;
    }
    row.dgates = d.dgates + token * p.slot_columns();
    row.factors = factors;
    row.plane = buf.ld_gates / kPlanes<X>;
    return row;
  }

  // The same with layer normalisation.
  FUSEDRNN_INLINE NormedValues<S> normed_row_of(const Direction& d, int64_t t, int64_t r,
                                                int64_t token, X* factors) const {
    return {{row_of(d, t, r, token, factors), d.weights,
             d.scales + seq.saved_token(token) * Cell::kScales,
             d.dnormed + token * p.normed_columns()}};
  }

  // Where the gradients of gates times W_hh go, and what is added to them there.
  C* product() const { return call.h_mask ? buf.dropped : buf.dh; }
  const C* addend() const { return adds_direct && !call.h_mask ? buf.dh : nullptr; }

  // The gradient of recurrent dropout. A state of zeros gets none.
  void finish_rows(const Direction& d, int64_t t, int64_t n, bool multiplied) const {
    for (int64_t r = 0; (call.h_mask || seq.resets) && r < n; r++) finish_row(d, t, r, multiplied);
  }
  void finish_row(const Direction& d, int64_t t, int64_t r, bool multiplied) const {
    const int64_t H = p.hidden_size, P = p.out_size(), b = rows.row(r);
    C *const dh = buf.dh + r * buf.ld_dh, *const dropped = buf.dropped + r * buf.ld_dh;
    if (call.h_mask && multiplied) {
      const C* const mask = static_cast<const C*>(call.h_mask) + (d.index * seq.batch + b) * P;
      for (int64_t j = outputs.begin; j < outputs.end; j++)
        dh[j] = (adds_direct ? dh[j] : 0) + dropped[j] * mask[j];
    }
    int64_t before;
    if (seq.start(d.dir, t, b, &before) != Sequence::Start::kZeros) return;
    for (int64_t j = 0; j < P; j++) dh[j] = 0;
    for (int64_t j = 0; Cell::kHasCell && j < H; j++) buf.dc[r * H + j] = 0;
  }

  // Adds the chunk's gradients of the layer's input to those of the other direction.
  void write_input_gradients(const Direction& d, int64_t begin, int64_t end) const {
    C* src = buf.input;
    for (int64_t i = end - 1; i >= begin; i--) {
      const int64_t t = rows.time(d.dir, i), n = rows.active(t);
      for (int64_t r = 0; r < n; r++, src += buf.ld_input) {
        const int64_t b = rows.row(r);
        C* const dst = static_cast<C*>(call.grad_in) + seq.token(t, b) * input.width;
        if (input.mask) input.drop(src, t, b, inputs);
        if (d.dir == 0 && !call.onto_grad_in) {
          convert_row(dst + inputs.begin, src + inputs.begin, inputs.count());
        } else {
          const C* const values = src;
          for (int64_t j = inputs.begin, last = inputs.end; j < last; j++) dst[j] += values[j];
        }
      }
    }
  }

  // dL/dh and dL/dc of the initial states.
  void write_gradients(const Direction& d) const {
    const int64_t H = p.hidden_size, P = p.out_size();
    for (int64_t r = 0; r < rows.count; r++) {
      const int64_t state = d.index * seq.batch + rows.row(r);
      auto write = [&](void* gradients, int64_t width, Columns columns, const C* src) {
        if (gradients)
          convert_row(static_cast<C*>(gradients) + state * width + columns.begin,
                      src + columns.begin, columns.count());
      };
      write(call.dhx, P, outputs, buf.dh + r * buf.ld_dh);
      if (Cell::kHasCell) write(call.dcx, H, units, buf.dc + r * H);
    }
  }
};

template <class Cell, class S>
class BackwardPass {
  using C = Compute<S>;
  using X = Operand<S>;
  using Direction = BackwardDirection<S>;

 public:
  BackwardPass(const Backward& backward, const Rows& task, Member& member)
      : call(backward),
        p(backward.problem),
        me(member),
        common{static_cast<char*>(task.common)},
        own{static_cast<char*>(task.own)},
        of(backward, task, member, common, own),
        buf(of.buf) {}

  void run() {
    if (me.index == 0) clear_row_ends<S>(p, buf);
    const PackedOffsets offsets = backward_offsets<X>(p, call.layer);
    for (int64_t dir = 0; dir < p.num_directions; dir++) {
      const X* const packed =
          call.packed ? static_cast<const X*>(call.packed) + dir * offsets.total : nullptr;
      run_direction(Direction(call, dir, packed, offsets));
    }
  }

 private:
  void run_direction(const Direction& d) {
    of.read_gradients(d);
    const int64_t steps = of.rows.template chunk_steps<X>();
    for (int64_t end = of.rows.longest; end > 0; end -= min(end, steps)) {
      const int64_t begin = max(0, end - steps);
      X* gates = buf.gates;
      for (int64_t i = end - 1; i >= begin; i--) {
        const int64_t t = of.rows.time(d.dir, i), n = of.rows.active(t);
        if (p.proj_size) project(d, t, n);
        for (int64_t r = 0; r < n; r++) compute_cells(d, t, r, gates + r * buf.ld_gates);
        me.barrier();
        recurrent_step(d, i, n, gates);
        gates += n * buf.ld_gates;
      }
      if (call.grad_in)
        multiply_gates<S>(Cell::x_ranges(), d.w_ih, p.hidden_size,
                          (gates - buf.gates) / buf.ld_gates, buf.gates, buf.ld_gates, of.inputs,
                          buf.input, buf.ld_input, nullptr, false);
      me.barrier();  // the next chunk's gates replace these
      if (call.grad_in) of.write_input_gradients(d, begin, end);
    }
    of.write_gradients(d);
  }

  // From dL/dh of the projected output, through W_hr, that of what was projected.
  void project(const Direction& d, int64_t t, int64_t n) const {
    of.read_projected(d, t, n);
    gemm(n, p.hidden_size, p.out_size(), buf.dproj, buf.ld_proj, d.w_hr, buf.dhidden, p.hidden_size,
         {}, longest_sum<X>(call.pass.long_sums));
  }

  // The cells of a row of a step: from dL/dh and dL/dc to the gradients of its gates.
  void compute_cells(const Direction& d, int64_t t, int64_t r, X* factors) const {
    const int64_t token = of.seq.token(t, of.rows.row(r));
    if constexpr (kIsNormed<Cell>)
      normed_backward<Cell>(p.hidden_size, of.normed_row_of(d, t, r, token, factors));
    else
      cell_backward_row<Cell, S>(p.hidden_size, of.units.begin, of.units.end,
                                 of.row_of(d, t, r, token, factors));
  }

  // dL/dh of the step before: the gradients of the gates times W_hh, and the direct part.
  void recurrent_step(const Direction& d, int64_t step, int64_t n, const X* gates) const {
    const bool multiplies = step > 0 || call.dhx;  // the initial state is before the first step
    const StepTiles<X> tiles(n);
    if (multiplies)
      multiply_gates<S>(Cell::h_ranges(), d.w_hh, p.hidden_size, n, gates, buf.ld_gates, of.outputs,
                        of.product(), buf.ld_dh, of.addend(), call.pass.alternates && step % 2,
                        tiles.height);
    of.finish_rows(d, of.rows.time(d.dir, step), n, multiplies);
  }

  const Backward& call;
  const Problem& p;
  Member& me;
  Scratch common, own;
  const BackwardRows<Cell, S> of;
  const BackwardBuffers<S>& buf;
};

}  // namespace
