#include "cuda/stepwise/layer.h"

#include "cuda/elementwise.h"
#include "cuda/stepwise/walk.h"

namespace fusedrnn {
namespace {

// The product with W_hh fills, and is differentiated through, the last slots in the order of gates.
#define CELL(mode, type)                                                               \
  static_assert(type::h_ranges().kCount == 1 && type::h_ranges().range[0].gate == 0 && \
                type::h_ranges().range[0].slot == type::kSlots - type::kGates);
#include "cells/cells.inc"
#undef CELL

struct BackwardArrays {
  void* product;  // compute type: dgates W_hh
  void* dhidden;  // compute type, with a projection: the gradient of its operand
  int64_t bytes;

  BackwardArrays(const LayerBackward& a, void* workspace) {
    Arrays arrays{static_cast<char*>(workspace)};
    const int64_t B = a.tokens.batch, wide = compute_bytes(a.dtype);
    product = arrays.take(B * a.out_size() * wide);
    dhidden = a.proj_size ? arrays.take(B * a.hidden_size * wide) : nullptr;
    bytes = arrays.used;
  }
};

}  // namespace

int64_t stepwise_workspace(const LayerForward& a) { return ForwardArrays(a, nullptr).bytes; }
int64_t stepwise_workspace(const LayerBackward& a) { return BackwardArrays(a, nullptr).bytes; }

int stepwise_forward(const LayerForward& a, void* workspace, const Multiply& multiply,
                     void* stream) {
  const ForwardArrays w(a, workspace);
  const int64_t H = a.hidden_size, P = a.out_size(), G = a.gate_columns();
  const int64_t wide = compute_bytes(a.dtype);

  auto run_cells = [&](const CellForward& p, int64_t first) {
    if (!a.layer_norm) return cell_forward(p, stream);
    NormedForward normed{};
    static_cast<CellForward&>(normed) = p;
    normed.norms = norms_of(a), normed.halves = w.halves;
    normed.scales = at(a.scales, first * a.cell_traits().scales, wide);
    return normed_forward(normed, stream);
  };

  int error = begin_forward(a, w, stream);
  Walk walk(a.tokens, a.reverse);
  for (int64_t i = 0; i < a.tokens.steps && !error; i++, walk.move(!a.reverse)) {
    const int64_t first = walk.first, rows = walk.rows();
    multiply({w.operand, P, rows, P, a.weights.w_hh, true, w.gates_h, G, a.members});
    const CellForward step = step_of<CellForward>(a, walk);
    CellForward p = a.proj_size ? cell_of(step) : step;
    set_cells(p, a, w, walk);

    CellForward result{};  // of the kernel that ends the step
    if (a.proj_size) {
      p.operand = w.hidden;
      if ((error = run_cells(p, first))) break;
      multiply({w.hidden, H, rows, H, a.weights.w_hr, true, w.projected, P, a.members});
      result = projection_of(step, P);
      result.gates_x = w.projected, result.gates_x_stride = P;
    } else {
      result = p;
    }
    set_results(result, a, w, walk);
    error = a.proj_size ? projection_forward(result, stream) : run_cells(result, first);
  }
  return error ? error : end_forward(a, w, stream);
}

int stepwise_backward(const LayerBackward& a, void* workspace, const Multiply& multiply,
                      void* stream) {
  const BackwardArrays w(a, workspace);
  const int64_t B = a.tokens.batch, H = a.hidden_size, P = a.out_size();
  const int64_t G = a.gate_columns(), S = a.slot_columns();
  const int64_t size = bytes(a.dtype), wide = compute_bytes(a.dtype);
  const bool has_cell = traits(a.cell).has_cell;

  auto run_cells = [&](const CellBackward& p, int64_t first) {
    if (!a.layer_norm) return cell_backward(p, stream);
    return normed_backward(normed_of(p, a, first), stream);
  };

  // Compute to compute: gradients carried from step to step, in place.
  const DType carried = a.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  int error = to_compute_type(carried, a.dhn, a.dh0, B * P, stream);
  if (!error && has_cell) error = to_compute_type(carried, a.dcn, a.dc0, B * H, stream);

  Walk walk(a.tokens, !a.reverse);
  const void* product = nullptr;  // of the step that came before this one, in the walk
  const uint8_t* later_resets = nullptr;
  for (int64_t i = 0; i < a.tokens.steps && !error; i++, walk.move(a.reverse)) {
    const int64_t first = walk.first, rows = walk.rows();
    const CellBackward step = step_of<CellBackward>(a, walk);
    CellBackward outer = a.proj_size ? projection_of(step, P) : step;  // takes dL/dy
    outer.later_resets = later_resets;
    outer.dy = at(a.dy, first * a.dy_stride, wide), outer.dy_stride = a.dy_stride;
    outer.dh_product = product, outer.dh = a.dh0;
    CellBackward p = outer;
    if (a.proj_size) {
      void* const dproj = at(a.dproj, first * P, size);
      outer.dgates = dproj;
      if ((error = projection_backward(outer, stream))) break;
      multiply({dproj, P, rows, P, a.weights.w_hr, false, w.dhidden, H, a.members});
      p = cell_of(step);
      p.dy = w.dhidden, p.dy_stride = H;
      p.hidden = at(a.hidden, first * H, size);
    }
    static_cast<SavedStep&>(p) = saved_at(a, walk);
    if (has_cell) p.dc = a.dc0, p.dcs = at(a.dcs, first * a.c_stride, wide);
    p.dgates = at(a.dgates, first * S, size);
    if ((error = run_cells(p, first))) break;
    // W_hh reaches the last slots.
    multiply(
        {at(p.dgates, S - G, size), S, rows, G, a.weights.w_hh, false, w.product, P, a.members});
    product = w.product, later_resets = step.resets;
  }
  if (error || !product) return error;

  CellBackward last{};  // folds in the product of the first step
  last.cell = a.cell, last.dtype = a.dtype, last.reverse = a.reverse;
  last.batch = B, last.hidden_size = P;
  last.step = a.reverse ? a.tokens.steps : -1, last.steps = a.tokens.steps;
  last.lengths = a.tokens.lengths;
  last.later_resets = later_resets, last.h_mask = a.h_mask;
  if (a.tokens.batch_sizes) last.lengths = nullptr;  // each packed row has one to be folded in
  last.dh_product = w.product, last.dh = a.dh0;
  return a.proj_size ? projection_backward(last, stream) : cell_backward(last, stream);
}

}  // namespace fusedrnn
