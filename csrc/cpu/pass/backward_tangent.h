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

 public:
  BackwardTangentPass(const BackwardTangent& both, const Rows& task)
      : p(both.tangent.problem),
        scratch{static_cast<char*>(task.own)},
        value(both.primal, task, {}, scratch, scratch),
        tangent(both.tangent, task, {}, scratch, scratch),
        rows(value.rows) {}

  void run() {
    clear_row_ends<S>(p, value.buf), clear_row_ends<S>(p, tangent.buf);
    const PackedOffsets offsets = backward_offsets<X>(p, value.call.layer);
    for (int64_t dir = 0; dir < p.num_directions; dir++) {
      auto direction = [&](const Backward& of) {
        return Direction(of, dir, static_cast<const X*>(of.packed) + dir * offsets.total, offsets);
      };
      run_direction(direction(value.call), direction(tangent.call));
    }
  }

 private:
  // v: the direction of the values, d: of their tangents.
  void run_direction(const Direction& v, const Direction& d) {
    value.read_gradients(v), tangent.read_gradients(d);
    const int64_t steps = rows.template chunk_steps<X>(), ld = value.buf.ld_gates;
    for (int64_t end = rows.longest; end > 0; end -= min(end, steps)) {
      const int64_t begin = max(0, end - steps);
      X *gates = value.buf.gates, *dgates = tangent.buf.gates;
      int64_t tokens = 0;
      for (int64_t i = end - 1; i >= begin; i--) {
        const int64_t t = rows.time(v.dir, i), n = rows.active(t);
        if (p.proj_size) project(v, d, t, n);
        for (int64_t r = 0; r < n; r++) {
          compute_cells(v, d, t, r, gates + r * ld, dgates + r * ld);
        }
        recurrent_step(v, d, i, n, gates, dgates);
        gates += n * ld, dgates += n * ld, tokens += n;
      }
      input_gradients(v, d, begin, end, tokens);
    }
    tangent.write_gradients(d);
  }

  // The cells of a row of a step.
  void compute_cells(const Direction& v, const Direction& d, int64_t t, int64_t r, X* gates,
                     X* dgates) const {
    const int64_t token = value.seq.token(t, rows.row(r));
    if constexpr (kIsNormed<Cell>)
      normed_backward<Cell>(p.hidden_size,
                            NormedDuals<S>{value.normed_row_of(v, t, r, token, gates),
                                           tangent.normed_row_of(d, t, r, token, dgates)});
    else
      cell_backward_tangent<Cell, S>(p.hidden_size, value.row_of(v, t, r, token, gates),
                                     tangent.row_of(d, t, r, token, dgates));
  }

  // From the gradients of the projected output to those of what was projected.
  void project(const Direction& v, const Direction& d, int64_t t, int64_t n) const {
    value.read_projected(v, t, n), tangent.read_projected(d, t, n);
    const int64_t H = p.hidden_size, P = p.out_size();
    auto multiply = [&](const BackwardBuffers<S>& of, const X* w_hr, C* dst, Addend<C> addend) {
      gemm(n, H, P, of.dproj, of.ld_proj, w_hr, dst, H, addend,
           longest_sum<X>(value.call.pass.long_sums));
    };
    C *const hidden = value.buf.dhidden, *const dhidden = tangent.buf.dhidden;
    multiply(value.buf, v.w_hr, hidden, {});
    multiply(tangent.buf, v.w_hr, dhidden, {});
    if (d.weights.w_hr) multiply(value.buf, d.w_hr, dhidden, {dhidden, H});
  }

  void recurrent_step(const Direction& v, const Direction& d, int64_t step, int64_t n,
                      const X* gates, const X* dgates) const {
    const bool multiplies = step > 0 || tangent.call.dhx;  // the initial state is before step 0
    if (multiplies) {
      auto multiply = [&](const X* factors, const GateMatrix<S>& w, C* dst, const C* addend) {
        multiply_gates<S>(Cell::h_ranges(), w, p.hidden_size, n, factors, value.buf.ld_gates,
                          value.outputs, dst, value.buf.ld_dh, addend, step % 2);
      };
      multiply(dgates, v.w_hh, tangent.product(), tangent.addend());
      if (d.weights.w_hh) multiply(gates, d.w_hh, tangent.product(), tangent.product());
      multiply(gates, v.w_hh, value.product(), value.addend());
    }
    const int64_t t = rows.time(v.dir, step);
    value.finish_rows(v, t, n, multiplies), tangent.finish_rows(d, t, n, multiplies);
  }

  // Of the chunk's tokens.
  void input_gradients(const Direction& v, const Direction& d, int64_t begin, int64_t end,
                       int64_t tokens) const {
    auto multiply = [&](const BackwardBuffers<S>& of, const GateMatrix<S>& w, C* dst, bool adds) {
      multiply_gates<S>(Cell::x_ranges(), w, p.hidden_size, tokens, of.gates, of.ld_gates,
                        value.inputs, dst, of.ld_input, adds ? dst : nullptr, false);
    };
    if (tangent.call.grad_in) {
      multiply(tangent.buf, v.w_ih, tangent.buf.input, false);
      if (d.weights.w_ih) multiply(value.buf, d.w_ih, tangent.buf.input, true);
      tangent.write_input_gradients(d, begin, end);
    }
    if (value.call.grad_in) {
      multiply(value.buf, v.w_ih, value.buf.input, false);
      value.write_input_gradients(v, begin, end);
    }
  }

  const Problem& p;
  Scratch scratch;
  const BackwardRows<Cell, S> value, tangent;
  const TaskRows& rows;
};

}  // namespace
