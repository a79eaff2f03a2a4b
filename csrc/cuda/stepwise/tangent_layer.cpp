// The derivatives of layer.cpp's passes in one direction, likewise a few launches a step.
#include "cuda/elementwise.h"
#include "cuda/stepwise/layer.h"
#include "cuda/stepwise/walk.h"

namespace fusedrnn {
namespace {

// Twice: of the value, of the tangent.
struct TangentArrays {
  void* product[2];  // compute type: what goes through W_hh
  void* dhidden[2];  // compute type, with a projection: the gradient of its operand
  int64_t bytes;

  TangentArrays(const LayerBackward& a, void* workspace) {
    Arrays arrays{static_cast<char*>(workspace)};
    const int64_t B = a.tokens.batch, wide = compute_bytes(a.dtype);
    for (int i = 0; i < 2; i++) {
      product[i] = arrays.take(B * a.out_size() * wide);
      dhidden[i] = a.proj_size ? arrays.take(B * a.hidden_size * wide) : nullptr;
    }
    bytes = arrays.used;
  }
};

}  // namespace

int64_t stepwise_workspace(const LayerForwardTangent& a) {
  return ForwardArrays(a.tangent, nullptr, 2).bytes;
}
int64_t stepwise_workspace(const LayerBackwardTangent& a) {
  return TangentArrays(a.value, nullptr).bytes;
}

int stepwise_forward_tangent(const LayerForwardTangent& both, void* workspace,
                             const Multiply& multiply, void* stream) {
  const LayerForward& a = both.tangent;
  const Weights& weights = both.value.weights;
  const ForwardArrays w(a, workspace, 2);
  const int64_t H = a.hidden_size, P = a.out_size(), G = a.gate_columns();
  const int64_t wide = compute_bytes(a.dtype);

  auto run_cells = [&](const CellForwardTangent& p, int64_t first) {
    if (!a.layer_norm) return cell_forward_tangent(p, stream);
    NormedForwardTangent normed{};
    static_cast<CellForwardTangent&>(normed) = p;
    normed.norms = norms_of(both.value), normed.dnorms = norms_of(a), normed.halves = w.halves;
    const int64_t scales = first * a.cell_traits().scales;
    normed.scales = at(both.value.scales, scales, wide);
    normed.dscales = at(a.scales, scales, wide);
    return normed_forward_tangent(normed, stream);
  };

  int error = begin_forward(a, w, stream);
  Walk walk(a.tokens, a.reverse);
  for (int64_t i = 0; i < a.tokens.steps && !error; i++, walk.move(!a.reverse)) {
    const int64_t first = walk.first, rows = walk.rows();
    multiply({w.operand, P, rows, P, weights.w_hh, true, w.gates_h, G, a.members});
    const CellForwardTangent step = step_of<CellForwardTangent>(a, walk);
    CellForwardTangent p = a.proj_size ? cell_of(step) : step;
    p.value = saved_at(both.value, walk);
    set_cells(p, a, w, walk);
    p.known_h = at(both.known_h, first * G, wide), p.known_h_stride = G;
    if (!a.proj_size) {
      set_results(p, a, w, walk);
      error = run_cells(p, first);
      continue;
    }
    p.hidden = w.hidden;
    if ((error = run_cells(p, first))) break;
    if (both.w_hr)
      multiply({w.hidden, 2 * H, rows, 2 * H, both.w_hr, true, w.projected, P, a.members});
    else
      multiply({w.hidden, 2 * H, rows, H, weights.w_hr, true, w.projected, P, a.members});
    CellForward result = projection_of<CellForward>(step, P);
    result.gates_x = w.projected, result.gates_x_stride = P;
    set_results(result, a, w, walk);
    error = projection_forward(result, stream);
  }
  return error ? error : end_forward(a, w, stream);
}

int stepwise_backward_tangent(const LayerBackwardTangent& both, void* workspace,
                              const Multiply& multiply, void* stream) {
  const LayerBackward& a = both.value;
  const LayerBackward* const each[] = {&both.value, &both.tangent};
  const TangentArrays w(a, workspace);
  const int64_t B = a.tokens.batch, H = a.hidden_size, P = a.out_size();
  const int64_t G = a.gate_columns(), S = a.slot_columns();
  const int64_t size = bytes(a.dtype), wide = compute_bytes(a.dtype);

  // Compute to compute: gradients carried from step to step, in place.
  const DType carried = a.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  int error = 0;
  for (const LayerBackward* of : each) {
    if (!error) error = to_compute_type(carried, of->dhn, of->dh0, B * P, stream);
    if (!error && traits(a.cell).has_cell)
      error = to_compute_type(carried, of->dcn, of->dc0, B * H, stream);
  }

  // Those of a step, or null for what comes before the last step.
  const void* product[] = {nullptr, nullptr};
  const uint8_t* later_resets = nullptr;
  // f(the values' structure or the tangents', the values' layer or the tangents', which of these).
  auto fill = [&](CellBackwardTangent& p, auto f) {
    f(p.value, *each[0], 0), f(p.tangent, *each[1], 1);
  };
  // What the kernel takes that is given dL/dy: all of a step, or its projection.
  auto take_gradients = [&](CellBackward& p, const LayerBackward& of, int i) {
    p.later_resets = later_resets;
    p.dh_product = product[i], p.dh = of.dh0;
  };

  Walk walk(a.tokens, !a.reverse);
  for (int64_t i = 0; i < a.tokens.steps && !error; i++, walk.move(a.reverse)) {
    const int64_t first = walk.first, rows = walk.rows();
    const CellBackward step = step_of<CellBackward>(a, walk);
    CellBackwardTangent p{};
    if (a.proj_size) {
      CellBackwardTangent outer{};
      fill(outer, [&](CellBackward& q, const LayerBackward& of, int which) {
        q = projection_of(step, P);
        take_gradients(q, of, which);
        q.dy = at(of.dy, first * of.dy_stride, wide), q.dy_stride = of.dy_stride;
        q.dgates = at(of.dproj, 2 * first * P, size);
      });
      if ((error = projection_backward_tangent(outer, stream))) break;
      const void *dproj = outer.value.dgates, *tangent = outer.tangent.dgates;
      multiply({dproj, 2 * P, rows, P, a.weights.w_hr, false, w.dhidden[0], H, a.members});
      if (both.w_hr)
        multiply({dproj, 2 * P, rows, 2 * P, both.w_hr, false, w.dhidden[1], H, a.members});
      else
        multiply({tangent, 2 * P, rows, P, a.weights.w_hr, false, w.dhidden[1], H, a.members});
    }
    fill(p, [&](CellBackward& q, const LayerBackward& of, int which) {
      q = a.proj_size ? cell_of(step) : step;
      if (a.proj_size) {
        q.dy = w.dhidden[which], q.dy_stride = H;
        q.hidden = at(of.hidden, 2 * first * H, size);
      } else {
        take_gradients(q, of, which);
        q.dy = at(of.dy, first * of.dy_stride, wide), q.dy_stride = of.dy_stride;
      }
      static_cast<SavedStep&>(q) = saved_at(of, walk);
      q.dc = of.dc0, q.dcs = at(of.dcs, first * of.c_stride, wide);
      q.dgates = at(of.dgates, 2 * first * S, size);
    });
    error = a.layer_norm ? normed_backward_tangent({normed_of(p.value, both.value, first),
                                                    normed_of(p.tangent, both.tangent, first)},
                                                   stream)
                         : cell_backward_tangent(p, stream);
    if (error) break;
    // W_hh reaches the last slots.
    const void *dgates = at(p.value.dgates, S - G, size),
               *tangent = at(p.tangent.dgates, S - G, size);
    multiply({dgates, 2 * S, rows, G, a.weights.w_hh, false, w.product[0], P, a.members});
    if (both.w_hh)
      multiply({dgates, 2 * S, rows, S + G, both.w_hh, false, w.product[1], P, a.members});
    else
      multiply({tangent, 2 * S, rows, G, a.weights.w_hh, false, w.product[1], P, a.members});
    product[0] = w.product[0], product[1] = w.product[1], later_resets = step.resets;
  }
  if (error || !product[0]) return error;

  CellBackwardTangent last{};  // folds in the products of the first step
  fill(last, [&](CellBackward& q, const LayerBackward& of, int which) {
    q.cell = a.cell, q.dtype = a.dtype, q.reverse = a.reverse;
    q.batch = B, q.hidden_size = P;
    q.step = a.reverse ? a.tokens.steps : -1, q.steps = a.tokens.steps;
    // Each packed row has one to be folded in.
    q.lengths = a.tokens.batch_sizes ? nullptr : a.tokens.lengths;
    q.h_mask = a.h_mask;
    take_gradients(q, of, which);
  });
  return projection_backward_tangent(last, stream);
}

}  // namespace fusedrnn
