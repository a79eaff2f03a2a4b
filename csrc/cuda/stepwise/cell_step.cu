// The cells of one step, forward and backward: see cell_grid.h for what a thread owns.
#include "cuda/stepwise/cell_grid.h"
#include "cuda/stepwise/step.h"

namespace fusedrnn {
namespace {

template <class Cell, class S>
__global__ void __launch_bounds__(kUnits* kRows, 2)
    forward_kernel(const __grid_constant__ CellForward p) {
  using C = Compute<S>;
  const int64_t H = p.hidden_size;
  each_cell(p, [&](int64_t b, int64_t j) {
    if (!runs_at(p, b, p.step)) {
      write<S>(p.y, b * p.y_stride + j, 0);
      return;
    }
    const bool anew = begins_anew(p, p.resets, b, p.step);
    const int64_t bias = member_of(p, b) * Cell::kGates * H + j;
    C s[Cell::kSlots];
    for (int k = 0; k < Cell::kSlots; k++) {
      const int x = gate_of(Cell::x_ranges(), k), h = gate_of(Cell::h_ranges(), k);
      s[k] = 0;
      if (x >= 0)
        s[k] +=
            read<C>(p.gates_x, b * p.gates_x_stride + x * H + j) + read<S>(p.b_ih, bias + x * H);
      if (h >= 0)
        s[k] += (anew ? 0 : read<C>(p.gates_h, b * p.gates_h_stride + h * H + j)) +
                read<S>(p.b_hh, bias + h * H);
    }
    const int64_t at = b * H + j;
    const bool zones_h = p.zoneout_h.rate > 0, zones_c = p.zoneout_c.rate > 0;
    const C h_prev = (Cell::kUsesHPrev || zones_h) && !anew ? read<C>(p.h, at) : C(0);
    const C c_prev = Cell::kHasCell && !anew ? read<C>(p.c, at) : C(0);
    C c = c_prev, h = Cell::template forward<ScalarMath>(s, h_prev, c);
    if (!Cell::kHasCell) write<C>(p.saved_c, b * p.c_stride + j, h);
    if (zones_h) h = zone_out(rate_of<C>(p.zoneout_h, at), h_prev, h);
    if (zones_c) c = zone_out(rate_of<C>(p.zoneout_c, at), c_prev, c);
    write_h<S>(p, b, j, h);
    if constexpr (Cell::kHasCell) {
      write<C>(p.c, at, c);
      write<C>(p.saved_c, b * p.c_stride + j, c);
    }
    for (int k = 0; k < Cell::kSaved; k++) write<S>(p.saved, (b * Cell::kSaved + k) * H + j, s[k]);
  });
}

template <class Cell, class S>
__global__ void __launch_bounds__(kUnits* kRows, 2)
    backward_kernel(const __grid_constant__ CellBackward p) {
  using C = Compute<S>;
  const int64_t H = p.hidden_size;
  each_cell(p, [&](int64_t b, int64_t j) {
    const int64_t at = b * H + j;
    C dh = later_gradient<C>(p, b, j);
    if (!runs_at(p, b, p.step)) {
      write<C>(p.dh, at, dh);
      for (int k = 0; k < Cell::kSlots; k++) write<S>(p.dgates, (b * Cell::kSlots + k) * H + j, 0);
      write<S>(p.hidden, at, 0);
      return;
    }
    dh += read<C>(p.dy, b * p.dy_stride + j);
    const bool anew = begins_anew(p, p.resets, b, p.step);
    C s[Cell::kSlots];
    for (int k = 0; k < Cell::kSaved; k++) s[k] = read<S>(p.saved, (b * Cell::kSaved + k) * H + j);
    C h = 0, h_prev = 0, c = 0, c_prev = 0, dc = 0;
    if constexpr (Cell::kSaved == 0)
      h = p.c ? read<C>(p.c, b * p.c_stride + j) : read<S>(p.h, b * p.h_stride + j);
    if constexpr (Cell::kUsesHPrev)
      h_prev = state_before<S, S>(p, p.h0, p.h_prev, p.h_stride, b, j);
    C passed_h = 0, passed_c = 0;  // by zoneout to the step before
    if (p.zoneout_h.rate > 0) passed_h = zone_out_backward(rate_of<C>(p.zoneout_h, at), dh);
    if constexpr (Cell::kHasCell) {
      c = read<C>(p.c, b * p.c_stride + j);
      c_prev = state_before<S, C>(p, p.c0, p.c_prev, p.c_stride, b, j);
      dc = read<C>(p.dc, at) + read<C>(p.dcs, b * p.c_stride + j);
      if (p.zoneout_c.rate > 0) {
        c = Cell::cell_state(s, c_prev);
        passed_c = zone_out_backward(rate_of<C>(p.zoneout_c, at), dc);
      }
      if (p.hidden) write<S>(p.hidden, at, Cell::template output<ScalarMath>(s, c));
    }
    const C direct = Cell::template backward<ScalarMath>(s, h_prev, h, c_prev, c, dh, dc);
    write<C>(p.dh, at, anew ? 0 : direct + passed_h);
    if constexpr (Cell::kHasCell) write<C>(p.dc, at, anew ? 0 : dc + passed_c);
    for (int k = 0; k < Cell::kSlots; k++) write<S>(p.dgates, (b * Cell::kSlots + k) * H + j, s[k]);
  });
}

template <class Cell>
int run_forward(const CellForward& p, void* stream) {
  return run(p, p, stream, [](auto s) { return forward_kernel<Cell, decltype(s)>; });
}
template <class Cell>
int run_backward(const CellBackward& p, void* stream) {
  return run(p, p, stream, [](auto s) { return backward_kernel<Cell, decltype(s)>; });
}

}  // namespace

int cell_forward(const CellForward& p, void* stream) {
  return with_cell(p.cell, [&](auto cell) { return run_forward<decltype(cell)>(p, stream); });
}
int cell_backward(const CellBackward& p, void* stream) {
  return with_cell(p.cell, [&](auto cell) { return run_backward<decltype(cell)>(p, stream); });
}
int projection_forward(const CellForward& p, void* stream) {
  return run_forward<Projection>(p, stream);
}
int projection_backward(const CellBackward& p, void* stream) {
  return run_backward<Projection>(p, stream);
}

}  // namespace fusedrnn
