// The derivatives of the cells of one step in one direction, forward and backward: the cells'
// functions of cells/ on dual numbers (cells/dual.h). See cell_grid.h for what a thread owns.
#include "cuda/stepwise/cell_grid.h"
#include "cuda/stepwise/step.h"

namespace fusedrnn {
namespace {

template <class Cell, class S>
__global__ void __launch_bounds__(kUnits* kRows, 2)
    forward_tangent_kernel(const __grid_constant__ CellForwardTangent p) {
  using C = Compute<S>;
  const SavedStep& value = p.value;
  const int64_t H = p.hidden_size;
  each_cell(p, [&](int64_t b, int64_t j) {
    if (!runs_at(p, b, p.step)) {
      write<S>(p.y, b * p.y_stride + j, 0);
      return;
    }
    const bool anew = begins_anew(p, p.resets, b, p.step);
    const int64_t bias = member_of(p, b) * Cell::kGates * H + j;
    Dual<C> s[Cell::kSlots]{}, h_prev{}, c_prev{}, c{};
    for (int k = 0; k < Cell::kSlots; k++) {
      const int x = gate_of(Cell::x_ranges(), k), h = gate_of(Cell::h_ranges(), k);
      C& da = s[k].tangent;
      if (x >= 0)
        da += read<C>(p.gates_x, b * p.gates_x_stride + x * H + j) + read<S>(p.b_ih, bias + x * H);
      if (h >= 0)
        da += (anew ? 0 : read<C>(p.gates_h, b * p.gates_h_stride + h * H + j)) +
              read<C>(p.known_h, b * p.known_h_stride + h * H + j) + read<S>(p.b_hh, bias + h * H);
    }
    for (int k = 0; k < Cell::kSaved; k++)
      s[k].value = read<S>(value.saved, (b * Cell::kSaved + k) * H + j);
    const int64_t at = b * H + j;
    const bool zones_h = p.zoneout_h.rate > 0, zones_c = p.zoneout_c.rate > 0;
    C h = 0;
    if constexpr (Cell::kSaved == 0)
      h = value.c ? read<C>(value.c, b * p.c_stride + j) : read<S>(value.h, b * value.h_stride + j);
    if constexpr (Cell::kUsesHPrev)
      h_prev.value = state_before<S, S>(p, value.h0, value.h_prev, value.h_stride, b, j);
    if ((Cell::kUsesHPrev || zones_h) && !anew) h_prev.tangent = read<C>(p.h, at);
    if constexpr (Cell::kHasCell) {
      c_prev = {state_before<S, C>(p, value.c0, value.c_prev, p.c_stride, b, j),
                anew ? 0 : read<C>(p.c, at)};
      c.value = zones_c ? Cell::cell_state(s, c_prev).value : read<C>(value.c, b * p.c_stride + j);
    }
    C dh = Cell::template tangent<ScalarMath>(s, h_prev, h, c_prev, c);
    if (!Cell::kHasCell) write<C>(p.saved_c, b * p.c_stride + j, dh);
    if (zones_h) dh = zone_out(rate_of<C>(p.zoneout_h, at), h_prev.tangent, dh);
    write_h<S>(p, b, j, dh);
    if constexpr (Cell::kHasCell) {
      write<S>(p.hidden, 2 * b * H + j, dh);
      if (p.hidden)
        write<S>(p.hidden, (2 * b + 1) * H + j,
                 Cell::template output<DualMath<ScalarMath>>(s, c).value);
      C dc = c.tangent;
      if (zones_c) dc = zone_out(rate_of<C>(p.zoneout_c, at), c_prev.tangent, dc);
      write<C>(p.c, at, dc);
      write<C>(p.saved_c, b * p.c_stride + j, dc);
    }
    for (int k = 0; k < Cell::kSaved; k++)
      write<S>(p.saved, (b * Cell::kSaved + k) * H + j, s[k].tangent);
  });
}

// f of the value's arrays and of the tangent's.
template <class C, class F>
__device__ inline Dual<C> dual(const CellBackwardTangent& p, F f) {
  return {f(p.value), f(p.tangent)};
}

template <class Cell, class S>
__global__ void __launch_bounds__(kUnits* kRows, 2)
    backward_tangent_kernel(const __grid_constant__ CellBackwardTangent both) {
  using C = Compute<S>;
  const CellBackward& p = both.value;  // it has what both have in common
  const int64_t H = p.hidden_size;
  each_cell(p, [&](int64_t b, int64_t j) {
    const int64_t at = b * H + j, in_turn = 2 * b * H + j;
    Dual<C> s[Cell::kSlots]{}, h{}, h_prev{}, c{}, c_prev{}, dc{}, hidden{}, direct{};
    Dual<C> dh = dual<C>(both, [&](auto& a) { return later_gradient<C>(a, b, j); });
    const bool runs = runs_at(p, b, p.step), anew = begins_anew(p, p.resets, b, p.step);
    if (runs) {
      dh += dual<C>(both, [&](auto& a) { return read<C>(a.dy, b * a.dy_stride + j); });
      for (int k = 0; k < Cell::kSaved; k++)
        s[k] = dual<C>(both,
                       [&](auto& a) { return read<S>(a.saved, (b * Cell::kSaved + k) * H + j); });
      if constexpr (Cell::kSaved == 0)
        h = dual<C>(both, [&](auto& a) {
          return a.c ? read<C>(a.c, b * a.c_stride + j) : read<S>(a.h, b * a.h_stride + j);
        });
      if constexpr (Cell::kUsesHPrev)
        h_prev = dual<C>(
            both, [&](auto& a) { return state_before<S, S>(a, a.h0, a.h_prev, a.h_stride, b, j); });
      Dual<C> passed_h{}, passed_c{};  // by zoneout to the step before
      auto zone_out = [](C rate, Dual<C>& d) {
        return Dual<C>{zone_out_backward(rate, d.value), zone_out_backward(rate, d.tangent)};
      };
      if (p.zoneout_h.rate > 0) passed_h = zone_out(rate_of<C>(p.zoneout_h, at), dh);
      if constexpr (Cell::kHasCell) {
        c = dual<C>(both, [&](auto& a) { return read<C>(a.c, b * a.c_stride + j); });
        c_prev = dual<C>(
            both, [&](auto& a) { return state_before<S, C>(a, a.c0, a.c_prev, a.c_stride, b, j); });
        dc = dual<C>(
            both, [&](auto& a) { return read<C>(a.dc, at) + read<C>(a.dcs, b * a.c_stride + j); });
        if (p.zoneout_c.rate > 0) {
          c = Cell::cell_state(s, c_prev);
          passed_c = zone_out(rate_of<C>(p.zoneout_c, at), dc);
        }
        if (p.hidden) hidden = Cell::template output<DualMath<ScalarMath>>(s, c);
      }
      direct =
          Cell::template backward<DualMath<ScalarMath>>(s, h_prev, h, c_prev, c, dh, dc) + passed_h;
      dc += passed_c;
      if (anew) direct = dc = {};
    } else {
      direct = dh;
    }
    auto put = [&](const CellBackward& to, auto part) {
      write<C>(to.dh, at, part(direct));
      if (Cell::kHasCell && runs) write<C>(to.dc, at, part(dc));
      for (int k = 0; k < Cell::kSlots; k++)
        write<S>(to.dgates, (2 * b * Cell::kSlots + k) * H + j, part(s[k]));
      write<S>(to.hidden, in_turn, part(hidden));
    };
    put(p, [](const Dual<C>& x) { return x.value; });
    put(both.tangent, [](const Dual<C>& x) { return x.tangent; });
  });
}

template <class Cell>
int run_backward_tangent(const CellBackwardTangent& p, void* stream) {
  return run(p.value, p, stream, [](auto s) { return backward_tangent_kernel<Cell, decltype(s)>; });
}

}  // namespace

int cell_forward_tangent(const CellForwardTangent& p, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return run(p, p, stream, [](auto s) { return forward_tangent_kernel<Cell, decltype(s)>; });
  });
}
int cell_backward_tangent(const CellBackwardTangent& p, void* stream) {
  return with_cell(p.value.cell,
                   [&](auto cell) { return run_backward_tangent<decltype(cell)>(p, stream); });
}
int projection_backward_tangent(const CellBackwardTangent& p, void* stream) {
  return run_backward_tangent<Projection>(p, stream);
}

}  // namespace fusedrnn
