// What drives the launches of a layer: its scratch memory, and the walk through its steps.
#pragma once
#include "cuda/elementwise.h"
#include "cuda/stack.h"
#include "cuda/stepwise/cell_step.h"

namespace fusedrnn {

// Hands out consecutive arrays of the workspace; with null it only adds up their size.
struct Arrays {
  char* base;
  int64_t used = 0;

  void* take(int64_t bytes) {
    void* at = base ? base + used : nullptr;
    used += (bytes + 255) / 256 * 256;
    return at;
  }
};

// The scratch memory of forward.
struct ForwardArrays {
  void *h, *c, *gates_h;     // compute type
  void* operand;             // storage type: h as the product reads it
  void *hidden, *projected;  // with a projection: what goes into its product and comes out
  void* halves;              // NormedForward's
  int64_t hidden_parts;      // of a row of `hidden`
  int64_t bytes;

  ForwardArrays(const LayerForward& a, void* workspace, int64_t parts = 1) : hidden_parts(parts) {
    Arrays arrays{static_cast<char*>(workspace)};
    const int64_t B = a.tokens.batch, H = a.hidden_size, P = a.out_size();
    const int64_t size = fusedrnn::bytes(a.dtype), wide = compute_bytes(a.dtype);
    h = arrays.take(B * P * wide);
    c = traits(a.cell).has_cell ? arrays.take(B * H * wide) : nullptr;
    gates_h = arrays.take(B * a.gate_columns() * wide);
    operand = size == wide && !a.h_mask ? h : arrays.take(B * P * size);
    hidden = a.proj_size ? arrays.take(hidden_parts * B * H * size) : nullptr;
    projected = a.proj_size ? arrays.take(B * P * wide) : nullptr;
    halves = a.layer_norm && traits(a.cell).has_cell ? arrays.take(2 * B * H * wide) : nullptr;
    bytes = arrays.used;
  }
};

// Element i of an array of elements of `size` bytes.
inline void* at(void* array, int64_t i, int64_t size) {
  return array ? static_cast<char*>(array) + i * size : nullptr;
}
inline const void* at(const void* array, int64_t i, int64_t size) {
  return array ? static_cast<const char*>(array) + i * size : nullptr;
}

// Where a step of packed or padded rows begins, found by walking through them.
struct Walk {
  const Tokens& tokens;
  int64_t t, first;

  Walk(const Tokens& tokens, bool from_end)
      : tokens(tokens), t(from_end ? tokens.steps - 1 : 0), first(0) {
    if (from_end) first = tokens.tokens - rows();
  }
  int64_t rows() const { return tokens.rows(t); }
  void move(bool up) {
    if (up) {
      first += rows(), t++;
    } else if (--t >= 0) {
      first -= rows();
    }
  }
  // CellStep::resets of this step.
  const uint8_t* resets(const Layer& a) const {
    if (!a.resets || (a.reverse && t + 1 >= tokens.steps)) return nullptr;
    return a.resets + first + (a.reverse ? rows() : 0);
  }
};

// What a launch of a step has of its layer. The masks of zoneout are its cell's: with a projection
// the one of h belongs to that.
template <class Step>
Step step_of(const Layer& a, const Walk& walk) {
  Step p{};
  p.cell = a.cell, p.dtype = a.dtype;
  p.batch = walk.rows(), p.hidden_size = a.hidden_size, p.members = a.members;
  p.step = walk.t, p.steps = a.tokens.steps;
  p.lengths = a.tokens.lengths, p.reverse = a.reverse;
  p.resets = walk.resets(a);
  auto of_step = [&](Zoneout z, int64_t width) {
    if (z.mask) z.mask += walk.first * width;
    return z;
  };
  p.zoneout_h = of_step(a.zoneout_h, a.out_size());
  p.zoneout_c = of_step(a.zoneout_c, a.hidden_size);
  p.h_mask = a.h_mask, p.c_stride = a.c_stride;
  return p;
}
// The same of the halves of a step with a projection.
template <class Step>
Step cell_of(Step p) {
  p.h_mask = nullptr, p.zoneout_h = {};
  return p;
}
template <class Step>
Step projection_of(Step p, int64_t proj_size) {
  p.hidden_size = proj_size, p.zoneout_c = {};
  return p;
}

// The initial states as forward's scratch memory has them. Rows that have no step yet are
// multiplied with W_hr too, and are not written by the cells.
inline int begin_forward(const LayerForward& a, const ForwardArrays& w, void* stream) {
  const int64_t B = a.tokens.batch, H = a.hidden_size, P = a.out_size();
  int error = to_compute_type(a.dtype, a.h0, w.h, B * P, stream);
  if (!error && w.c) error = to_compute_type(a.dtype, a.c0, w.c, B * H, stream);
  if (!error && w.operand != w.h)
    error = to_storage_type(a.dtype, w.h, a.h_mask, w.operand, B * P, stream);
  if (!error && w.hidden)
    error = to_storage_type(a.dtype, nullptr, w.hidden, w.hidden_parts * B * H, stream);
  return error;
}
// What the kernel of the cells takes of a step, and what the one puts out that ends it.
inline void set_cells(CellForward& p, const LayerForward& a, const ForwardArrays& w,
                      const Walk& walk) {
  const int64_t G = a.gate_columns(), size = bytes(a.dtype), wide = compute_bytes(a.dtype);
  p.gates_x = at(a.gates_x, walk.first * G, wide), p.gates_x_stride = G;
  p.gates_h = w.gates_h, p.gates_h_stride = G;
  p.b_ih = a.weights.b_ih, p.b_hh = a.weights.b_hh;
  p.c = w.c;
  p.saved = at(a.saved, walk.first * a.cell_traits().saved * a.hidden_size, size);
  p.saved_c = at(a.saved_c, walk.first * a.c_stride, wide);
}
inline void set_results(CellForward& p, const LayerForward& a, const ForwardArrays& w,
                        const Walk& walk) {
  p.h = w.h;
  p.operand = w.operand == w.h ? nullptr : w.operand;
  p.y = at(a.y, walk.first * a.y_stride, bytes(a.dtype)), p.y_stride = a.y_stride;
}
// The last states.
inline int end_forward(const LayerForward& a, const ForwardArrays& w, void* stream) {
  const int64_t B = a.tokens.batch;
  const int error = to_storage_type(a.dtype, w.h, a.hn, B * a.out_size(), stream);
  if (error || !w.c) return error;
  return to_storage_type(a.dtype, w.c, a.cn, B * a.hidden_size, stream);
}

// What forward left of the step at hand, of the saved values or of their tangents.
inline SavedStep saved_at(const LayerSaved& a, const Walk& walk) {
  const int64_t size = bytes(a.dtype), wide = compute_bytes(a.dtype);
  const int64_t before = a.reverse ? walk.t + 1 : walk.t - 1;  // the step that forward took before
  const bool inside = before >= 0 && before < a.tokens.steps;
  const int64_t before_first = !inside     ? 0
                               : a.reverse ? walk.first + walk.rows()
                                           : walk.first - a.tokens.rows(before);
  SavedStep s{};
  s.saved = at(a.saved, walk.first * a.cell_traits().saved * a.hidden_size, size);
  s.h = at(a.y, walk.first * a.y_stride, size), s.h_stride = a.y_stride;
  s.h_prev = inside ? at(a.y, before_first * a.y_stride, size) : nullptr;
  s.c = at(a.saved_c, walk.first * a.c_stride, wide);
  s.c_prev = inside ? at(a.saved_c, before_first * a.c_stride, wide) : nullptr;
  s.h0 = a.h0, s.c0 = a.c0;
  return s;
}

inline NormWeights norms_of(const Layer& a) {
  const Weights& w = a.weights;
  return {w.gain_ih, w.gain_hh, w.gain_c, w.shift_c};
}
// With layer normalisation; the step's tokens begin with `first`.
inline NormedBackward normed_of(const CellBackward& p, const LayerBackward& a, int64_t first) {
  const int64_t wide = compute_bytes(a.dtype);
  NormedBackward normed{};
  static_cast<CellBackward&>(normed) = p;
  normed.norms = norms_of(a);
  normed.scales = at(a.scales, first * a.cell_traits().scales, wide);
  const int64_t columns = (traits(a.cell).slots + traits(a.cell).has_cell) * a.hidden_size;
  normed.dnormed = at(a.dnormed, first * columns, wide);
  return normed;
}

}  // namespace fusedrnn
