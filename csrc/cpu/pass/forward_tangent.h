// The derivative of the forward pass in one direction, of a whole stack for some rows of the batch.
//
// With a the pre-activations, s what forward saved, and d the tangents:
//
//   da_t = dx_t W_ih^T + x_t dW_ih^T + h_{t-1} dW_hh^T + db  +  dh_{t-1} W_hh^T
//   ds_t, dc_t, dh_t = the cell's `tangent`
//
// Rows go through layers, chunks of steps and steps as in forward.h. All products but the last are
// those of a chunk's tokens at once. A layer whose weights have no tangents skips theirs.
#pragma once
#include "cpu/pass/forward.h"
#include "cpu/pass/layer_norm_tangent.h"

namespace {

template <class S>
struct TangentBuffers : ForwardBuffers<S> {
  TangentRow<S>* row;  // of each row of the batch, at this step
  // The values whose tangents `hidden` has.
  Compute<S>* hidden_values;
  TangentBuffers(const Problem& p, int64_t rows, Scratch& memory)
      : ForwardBuffers<S>(p, rows, memory, memory), row(memory.take<TangentRow<S>>(rows)) {
    hidden_values = memory.take<Compute<S>>(p.proj_size ? rows * this->ld_hidden : 0);
  }
};

template <class Cell, class S>
class ForwardTangentPass {
  using C = Compute<S>;
  using X = Operand<S>;
  using G = UnitGroups<Cell, C>;
  using Direction = ForwardDirection<S>;
  static constexpr int kFirstHSlot = Cell::kSlots - Cell::kGates;
  static constexpr bool kNormed = kIsNormed<Cell>;

  // A direction of a layer: what forward used and made, and the tangents of these.
  struct Both {
    const Direction value, tangent;
  };

 public:
  ForwardTangentPass(const ForwardTangent& both, const Rows& task, Member& member)
      : primal(both.primal),
        call(both.tangent),
        p(call.problem),
        seq(call.seq),
        me(member),
        rows(seq, task.first, task.end),
        scratch{static_cast<char*>(task.own)},
        buf(p, rows.count, scratch) {}

  void run() {
    const C *packed = static_cast<const C*>(primal.packed),
            *packed_tangent = static_cast<const C*>(call.packed);
    const S *below = nullptr, *below_tangent = nullptr;
    for (int64_t layer = 0; layer < p.num_layers; layer++) {
      const PackedOffsets offsets = forward_offsets<S>(call, layer);
      for (int64_t dir = 0; dir < p.num_directions; dir++) {
        run_direction({Direction(primal, layer, dir, below, packed, offsets),
                       Direction(call, layer, dir, below_tangent, packed_tangent, offsets)});
        packed += offsets.total, packed_tangent += offsets.total;
      }
      below = layer_output<S>(primal, layer), below_tangent = layer_output<S>(call, layer);
    }
  }

 private:
  void run_direction(const Both& d) {
    const int64_t layer = d.value.layer, dir = d.value.dir;
    read_states<S>(call, layer, dir, rows.first, rows.count, buf.h[0], buf.ld_h, buf.c);
    const int64_t steps = rows.chunk_steps<X>();
    for (int64_t begin = 0; begin < rows.longest; begin += steps) {
      const int64_t end = min(rows.longest, begin + steps);
      chunk_products(d, begin, end);
      C* gates = buf.gates;
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = rows.time(dir, i), n = rows.active(t);
        for (int64_t r = 0; r < n; r++) prepare(d, t, r, gates + r * buf.ld_gates);
        recurrent_step(d.value, i % 2, n, gates);
        if constexpr (kNormed) normalise(d, t, n);
        if (p.proj_size) project(d, t, n);
        finish(n);
        gates += n * buf.ld_gates;
      }
    }
    write_states<S>(call, layer, dir, rows.first, rows.count, buf.h[0], buf.ld_h, buf.c);
  }

  // f(row of the chunk, t, b) for the tokens of steps [begin, end); returns their number.
  template <class F>
  int64_t each_token(int64_t dir, int64_t begin, int64_t end, F f) const {
    int64_t q = 0;
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = rows.time(dir, i), n = rows.active(t);
      for (int64_t r = 0; r < n; r++) f(q++, t, rows.row(r));
    }
    return q;
  }

  // The part of da that needs no step before.
  void chunk_products(const Both& d, int64_t begin, int64_t end) {
    const int64_t dir = d.value.dir, columns = G::gate_columns(p.hidden_size),
                  plane = buf.ld_input / kPlanes<X>;
    const C* const bias = d.tangent.bias;
    const bool dx = !d.value.indexed && d.tangent.input.base, dw_ih = d.tangent.weights.w_ih,
               dw_hh = d.tangent.weights.w_hh;
    const int64_t tokens = each_token(dir, begin, end, [&](int64_t q, int64_t t, int64_t b) {
      const C* start = kNormed ? nullptr : bias;
      if (d.value.indexed && dw_ih)
        start = d.tangent.gates_of_values + call.one_hot.which[seq.token(t, b)] * columns;
      C* const gates = buf.gates + q * buf.ld_gates;
      if (start)
        convert_row(gates, start, columns);
      else
        for (int64_t j = 0; j < columns; j++) gates[j] = 0;
      if (dx) d.tangent.input.read(buf.input + q * buf.ld_input, plane, t, b);
    });
    if (dx) add_product(d.value.w_ih, 0, tokens);
    if (dw_ih && !d.value.indexed) {
      each_token(dir, begin, end, [&](int64_t q, int64_t t, int64_t b) {
        d.value.input.read(buf.input + q * buf.ld_input, plane, t, b);
      });
      add_product(d.tangent.w_ih, 0, tokens);
    }
    if (dw_hh) {
      each_token(dir, begin, end, [&](int64_t q, int64_t t, int64_t b) {
        const S* const h = h_before(d.value, t, b);
        const C* const mask = mask_of(d.value, b);
        make_operands(buf.input + q * buf.ld_input, plane, p.out_size(), [&](int64_t j, int64_t n) {
          const Vec<C> values = load_or_zero(h, j, n);
          return mask ? values * load(mask + j, n) : values;
        });
      });
      add_product(d.tangent.w_hh, kFirstHSlot, tokens);
    }
  }

  // Adds the chunk's rows times a matrix to the gates from a slot on.
  void add_product(const Factor<S>& w, int first_slot, int64_t tokens) {
    G::each(p.hidden_size, me, false, [&](int64_t block, int64_t blocks) {
      C* const sums = buf.gates + (block * Cell::kSlots + first_slot) * G::kWidth;
      w.multiply(block, blocks * Cell::kGates * G::kWidth, tokens, buf.input, buf.ld_input, sums,
                 buf.ld_gates, {sums, buf.ld_gates});
    });
  }

  // h_{t-1}, null for zeros.
  const S* h_before(const Direction& d, int64_t t, int64_t b) const {
    int64_t before;
    const auto start = seq.start(d.dir, t, b, &before);
    if (start == Sequence::Start::kBefore)
      return d.out + (seq.token(before, b) * p.num_directions + d.dir) * p.out_size();
    if (start == Sequence::Start::kZeros || !primal.hx) return nullptr;
    return static_cast<const S*>(primal.hx) + (d.index * seq.batch + b) * p.out_size();
  }

  // Recurrent dropout of a row, or null.
  const C* mask_of(const Direction& d, int64_t b) const {
    if (!primal.h_mask) return nullptr;
    return static_cast<const C*>(primal.h_mask) + (d.index * seq.batch + b) * p.out_size();
  }

  // Sets up the row of a step, and the factors of its recurrent product.
  void prepare(const Both& d, int64_t t, int64_t r, C* gates) {
    const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions, dir = d.value.dir;
    const int64_t b = rows.row(r), token = seq.token(t, b),
                  state_row = d.value.index * seq.tokens + token;
    C *const dh = buf.h[0] + r * buf.ld_h, *const dc = buf.c + r * H;
    int64_t before;
    const auto start = seq.start(dir, t, b, &before);
    if (start == Sequence::Start::kZeros) {
      for (int64_t j = 0; j < P; j++) dh[j] = 0;
      for (int64_t j = 0; Cell::kHasCell && j < H; j++) dc[j] = 0;
    }
    TangentRow<S>& row = buf.row[r] = {};
    row.gates = gates;
    row.saved = d.value.saved + token * Cell::kSaved * H;
    row.h = d.value.out + (token * D + dir) * P;
    row.h_prev = h_before(d.value, t, b);
    row.dh = dh;
    if (p.proj_size) {
      row.dh_new = buf.hidden + r * buf.ld_hidden;
      row.hidden = buf.hidden_values + r * buf.ld_hidden;
    } else {
      row.dh_new = buf.h[1] + r * buf.ld_h;
      row.dy = d.tangent.out + (token * D + dir) * P;
      row.zoneout_h = ZoneoutMask<C>(primal.zoneout_h, state_row, P);
    }
    row.dsaved = d.tangent.saved ? d.tangent.saved + token * Cell::kSaved * H : nullptr;
    if (Cell::kHasCell) {
      row.c = d.value.cells.row(token);
      if (start == Sequence::Start::kBefore)
        row.c_prev = d.value.cells.row(seq.token(before, b));
      else if (start == Sequence::Start::kInitial && primal.cx)
        row.c0 = static_cast<const S*>(primal.cx) + (d.value.index * seq.batch + b) * H;
      row.dc = dc, row.saved_dc = d.tangent.cells.row(token);
      row.zoneout_c = ZoneoutMask<C>(primal.zoneout_c, state_row, H);
    } else if (Reserve::keeps_candidates(p)) {
      row.candidate = d.value.cells.row(token), row.dcandidate = d.tangent.cells.row(token);
    }
    X* const operand = buf.operand + r * buf.ld_operand;
    if (const C* const mask = mask_of(d.value, b))
      make_operands(operand, buf.ld_operand / kPlanes<X>, P,
                    [&](int64_t j, int64_t n) { return load(dh + j, n) * load(mask + j, n); });
    else if (kDepth<X> > 1)
      to_operands(operand, buf.ld_operand / kPlanes<X>, dh, P);
  }

  void recurrent_step(const Direction& d, bool descending, int64_t n, C* gates) {
    const X* const dh = factors<X, C>(primal.h_mask ? nullptr : buf.h[0], buf.operand);
    const TangentRow<S>* const row = buf.row;
    G::each(p.hidden_size, me, descending, [&](int64_t block, int64_t blocks) {
      C* const sums = gates + (block * Cell::kSlots + kFirstHSlot) * G::kWidth;
      d.w_hh.multiply(block, blocks * Cell::kGates * G::kWidth, n, dh, buf.ld_operand, sums,
                      buf.ld_gates, {sums, buf.ld_gates});
      if constexpr (!kNormed)
        for (int64_t r = 0; r < n; r++) cell_tangent<Cell, S>(p.hidden_size, block, blocks, row[r]);
    });
  }

  // Cells with layer normalisation, which needs the gates of all units.
  void normalise(const Both& d, int64_t t, int64_t n) {
    for (int64_t r = 0; r < n; r++) {
      const int64_t scales = seq.token(t, rows.row(r)) * Cell::kScales;
      normed_tangent<Cell>(p.hidden_size, buf.row[r], NormWeights<S>(d.value.weights),
                           NormWeights<S>(d.tangent.weights), d.value.scales + scales,
                           d.tangent.scales ? d.tangent.scales + scales : nullptr);
    }
  }

  // dh = dhidden W_hr^T + hidden dW_hr^T, and its zoneout.
  void project(const Both& d, int64_t t, int64_t n) {
    const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions;
    auto multiply = [&](const Factor<S>& w_hr, const C* hidden, Addend<C> addend) {
      for (int64_t r = 0; kDepth<X> > 1 && r < n; r++)
        to_operands(buf.projected + r * buf.ld_projected, buf.ld_projected / kPlanes<X>,
                    hidden + r * buf.ld_hidden, H);
      w_hr.multiply(0, P, n, factors<X, C>(hidden, buf.projected), buf.ld_projected, buf.h[1],
                    buf.ld_h, addend);
    };
    multiply(d.value.w_hr, buf.hidden, {});
    if (d.tangent.weights.w_hr) multiply(d.tangent.w_hr, buf.hidden_values, {buf.h[1], buf.ld_h});
    for (int64_t r = 0; r < n; r++) {
      const int64_t token = seq.token(t, rows.row(r));
      C *const before = buf.h[0] + r * buf.ld_h, *const dh = buf.h[1] + r * buf.ld_h;
      zone_out_projected<C>({primal.zoneout_h, d.value.index * seq.tokens + token, P}, P, before,
                            dh);
      convert_row(d.tangent.out + (token * D + d.value.dir) * P, dh, P);
    }
  }

  // Hands dh to the next step, with that of rows that are not active.
  void finish(int64_t n) {
    for (int64_t r = n; r < rows.count; r++)
      convert_row(buf.h[1] + r * buf.ld_h, buf.h[0] + r * buf.ld_h, p.out_size());
    C* const last = buf.h[0];
    buf.h[0] = buf.h[1], buf.h[1] = last;
  }

  const Forward &primal, &call;  // call: the tangents
  const Problem& p;
  const Sequence& seq;
  const Member& me;
  const TaskRows rows;
  Scratch scratch;
  TangentBuffers<S> buf;
};

}  // namespace
