// The derivative of the backward pass of one layer in one direction, for some rows of the batch.
//
// With g the gradients of the pre-activations, u those of h and c, and d the tangents, steps go
// back in time with both recurrences side by side:
//
//   u_{t-1} = g_t W_hh,   du_{t-1} = dg_t W_hh + g_t dW_hh   (and what does not pass through W_hh)
//   g, dg from u, du and what forward and its derivative saved: the cell's `backward` on dual
//   numbers
//
// The gradients of weights are sums of dg_t x h_{t-1} + g_t x dh_{t-1} over all tokens later.
#pragma once
#include "cpu/pass/backward.h"
#include "cpu/pass/tangent_cell.h"

namespace {

template <class S>
struct BackwardTangentBuffers {
  BackwardBuffers<S> value, tangent;
  BackwardTangentBuffers(const Problem& p, int64_t rows, Scratch& memory)
      : value(p, rows, memory, memory), tangent(p, rows, memory, memory) {}
};

template <class Cell, class S>
class BackwardTangentPass {
  using C = Compute<S>;
  using X = Operand<S>;
  using Direction = BackwardDirection<S>;
  using Buffers = BackwardBuffers<S>;

 public:
  BackwardTangentPass(const BackwardTangent& both, const Rows& task)
      : primal(both.primal),
        call(both.tangent),
        p(call.problem),
        seq(call.seq),
        rows(seq, task.first, task.end),
        scratch{static_cast<char*>(task.own)},
        buf(p, rows.count, scratch),
        value_input(primal, call.layer, nullptr),
        all{0, p.out_size()},
        inputs{0, value_input.width} {}

  void run() {
    clear_row_ends<S>(p, buf.value), clear_row_ends<S>(p, buf.tangent);
    const PackedOffsets offsets = backward_offsets<X>(p, call.layer);
    for (int64_t dir = 0; dir < p.num_directions; dir++) {
      auto direction = [&](const Backward& of) {
        return Direction(of, dir, static_cast<const X*>(of.packed) + dir * offsets.total, offsets);
      };
      run_direction(direction(primal), direction(call));
    }
  }

 private:
  void run_direction(const Direction& value, const Direction& tangent) {
    read_gradients(primal, value, buf.value), read_gradients(call, tangent, buf.tangent);
    const int64_t steps = rows.chunk_steps<X>(), dir = value.dir;
    for (int64_t end = rows.longest; end > 0; end -= min(end, steps)) {
      const int64_t begin = max(0, end - steps);
      X *gates = buf.value.gates, *dgates = buf.tangent.gates;
      int64_t tokens = 0;
      for (int64_t i = end - 1; i >= begin; i--) {
        const int64_t t = rows.time(dir, i), n = rows.active(t);
        const int64_t ld = buf.value.ld_gates;
        for (int64_t r = 0; r < n; r++)
          cell_backward_tangent<Cell, S>(p.hidden_size,
                                         row_of(primal, value, buf.value, t, r, gates + r * ld),
                                         row_of(call, tangent, buf.tangent, t, r, dgates + r * ld));
        recurrent_step(value, tangent, i, n, gates, dgates);
        gates += n * ld, dgates += n * ld, tokens += n;
      }
      input_gradients(value, tangent, begin, end, tokens);
    }
    write_gradients(tangent);
  }

  // Of the final states.
  void read_gradients(const Backward& of, const Direction& d, const Buffers& b) const {
    const int64_t H = p.hidden_size;
    auto read = [&](C* dst, const void* given, int64_t state) {
      for (int64_t j = 0; j < H; j++) dst[j] = 0;
      if (given) convert_row(dst, static_cast<const C*>(given) + state * H, H);
    };
    for (int64_t r = 0; r < rows.count; r++) {
      const int64_t state = d.index * seq.batch + rows.row(r);
      read(b.dh + r * b.ld_dh, of.grad_hn, state);
      if (Cell::kHasCell) read(b.dc + r * H, of.grad_cn, state);
    }
  }

  BackwardRow<S> row_of(const Backward& of, const Direction& d, const Buffers& buffers, int64_t t,
                        int64_t r, X* factors) const {
    const int64_t H = p.hidden_size, D = p.num_directions;
    const int64_t b = rows.row(r), token = seq.token(t, b), state = d.index * seq.batch + b;
    int64_t before;
    const auto start = seq.start(d.dir, t, b, &before);
    const bool has_before = start == Sequence::Start::kBefore,
               initial = start == Sequence::Start::kInitial;
    const int64_t prev = has_before ? seq.token(before, b) : 0;
    BackwardRow<S> row{};
    row.saved = d.saved + token * Cell::kSaved * H;
    row.h = d.out + (token * D + d.dir) * H;
    if (Cell::kUsesHPrev)
      row.h_prev = has_before         ? d.out + (prev * D + d.dir) * H
                   : initial && of.hx ? static_cast<const S*>(of.hx) + state * H
                                      : nullptr;
    if (Cell::kHasCell) {
      row.c = d.cells.row(token);
      row.c_prev = has_before ? d.cells.row(prev) : nullptr;
      row.c0 = initial && of.cx ? static_cast<const S*>(of.cx) + state * H : nullptr;
      row.dc = buffers.dc + r * H;
    }
    C* const dh = buffers.dh + r * buffers.ld_dh;
    if (Cell::kUsesHPrev) row.dh_direct = dh;
    row.dh = dh;
    if (of.grad_out) row.dy = static_cast<const C*>(of.grad_out) + (token * D + d.dir) * H;
    row.dgates = d.dgates + token * p.slot_columns();
    row.factors = factors;
    row.plane = buffers.ld_gates / kPlanes<X>;
    return row;
  }

  void recurrent_step(const Direction& value, const Direction& tangent, int64_t step, int64_t n,
                      const X* gates, const X* dgates) {
    const int64_t ld = buf.value.ld_gates, ld_dh = buf.value.ld_dh;
    if (step > 0 || call.dhx) {  // the initial state is before the first step
      auto multiply = [&](const X* factors, const GateMatrix<S>& w, C* dst, bool adds) {
        multiply_gates<S>(Cell::h_ranges(), w, p.hidden_size, n, factors, ld, all, dst, ld_dh,
                          adds ? dst : nullptr, step % 2);
      };
      multiply(dgates, value.w_hh, buf.tangent.dh, Cell::kUsesHPrev);
      if (tangent.weights.w_hh) multiply(gates, tangent.w_hh, buf.tangent.dh, true);
      multiply(gates, value.w_hh, buf.value.dh, Cell::kUsesHPrev);
    }
    for (int64_t r = 0; seq.resets && r < n; r++)
      clear_at_reset(value.dir, rows.time(value.dir, step), r);
  }

  // A state of zeros has no gradient.
  void clear_at_reset(int64_t dir, int64_t t, int64_t r) {
    int64_t before;
    if (seq.start(dir, t, rows.row(r), &before) != Sequence::Start::kZeros) return;
    const Buffers* const both[] = {&buf.value, &buf.tangent};
    for (const Buffers* b : both)
      for (int64_t j = 0; j < p.hidden_size; j++) {
        b->dh[r * b->ld_dh + j] = 0;
        if (Cell::kHasCell) b->dc[r * p.hidden_size + j] = 0;
      }
  }

  // Adds those of the chunk's tokens to those of the other direction.
  void input_gradients(const Direction& value, const Direction& tangent, int64_t begin, int64_t end,
                       int64_t tokens) {
    const int64_t ld = buf.value.ld_gates, ld_input = buf.value.ld_input;
    auto multiply = [&](const Buffers& of, const GateMatrix<S>& w, C* dst, bool adds) {
      multiply_gates<S>(Cell::x_ranges(), w, p.hidden_size, tokens, of.gates, ld, inputs, dst,
                        ld_input, adds ? dst : nullptr, false);
    };
    if (call.grad_in) {
      multiply(buf.tangent, value.w_ih, buf.tangent.input, false);
      if (tangent.weights.w_ih) multiply(buf.value, tangent.w_ih, buf.tangent.input, true);
      write_input_gradients(call, value.dir, begin, end, buf.tangent.input);
    }
    if (primal.grad_in) {
      multiply(buf.value, value.w_ih, buf.value.input, false);
      write_input_gradients(primal, value.dir, begin, end, buf.value.input);
    }
  }

  void write_input_gradients(const Backward& of, int64_t dir, int64_t begin, int64_t end,
                             C* src) const {
    for (int64_t i = end - 1; i >= begin; i--) {
      const int64_t t = rows.time(dir, i), n = rows.active(t);
      for (int64_t r = 0; r < n; r++, src += buf.value.ld_input) {
        const int64_t b = rows.row(r);
        C* const dst = static_cast<C*>(of.grad_in) + seq.token(t, b) * inputs.end;
        if (value_input.mask) value_input.drop(src, t, b, inputs);
        if (dir == 0) {
          convert_row(dst, src, inputs.end);
        } else {
          for (int64_t j = 0; j < inputs.end; j++) dst[j] += src[j];
        }
      }
    }
  }

  // Of the initial states.
  void write_gradients(const Direction& d) const {
    const int64_t H = p.hidden_size;
    const Buffers& b = buf.tangent;
    for (int64_t r = 0; r < rows.count; r++) {
      const int64_t state = d.index * seq.batch + rows.row(r);
      if (call.dhx) convert_row(static_cast<C*>(call.dhx) + state * H, b.dh + r * b.ld_dh, H);
      if (call.dcx) convert_row(static_cast<C*>(call.dcx) + state * H, b.dc + r * H, H);
    }
  }

  const Backward &primal, &call;  // call: the tangents
  const Problem& p;
  const Sequence& seq;
  const TaskRows rows;
  Scratch scratch;
  const BackwardTangentBuffers<S> buf;
  const LayerInput<S> value_input;
  const Columns all, inputs;  // of h, and of the layer's input
};

}  // namespace
