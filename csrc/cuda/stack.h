// What the recurrence of a layer is given on a GPU, whichever kernels run it. The torch side fills
// these in; products over all steps at once (the input's, and every weight gradient) are its
// business, before and after.
//
// Pointers are to the device unless said otherwise. Arrays are of the storage type (the problem's
// dtype) or of the compute type (float64 for float64, float32 for the rest). Those with a row per
// token have the token (t, b), row b of the batch at step t, at row `first(t) + b`. Strides are in
// elements; an array without one has rows that follow each other.
#pragma once
#include "plan/problem.h"

namespace fusedrnn {

// Padded rows, all of the same number of steps or as many as `lengths` says; or packed ones, which
// fall in length.
struct Tokens {
  int64_t steps, batch, tokens;
  const int64_t* lengths;      // [batch], each in [0, steps]; null: all rows have `steps` steps
  const int64_t* offsets;      // [steps]: first(t) of packed rows; null: padded
  const int64_t* batch_sizes;  // [steps] on the host: rows that packed data has at a step
  // [batch] the rows from the longest to the shortest, where backends should take them so, or null.
  const int64_t* order;

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
};

// What changes the recurrence of a layer and direction; null: nothing.
struct LayerRegularisers {
  // [tokens] whether a new sequence begins at a token: see begins_anew() in cuda/tokens.h.
  const uint8_t* resets;
  const void* h_mask;            // compute type [batch, out]: h is multiplied with it before W_hh
  Zoneout zoneout_h, zoneout_c;  // masks [tokens, out], [tokens, hidden]
};

struct Layer : LayerRegularisers {  // of one direction
  Cell cell;
  DType dtype;
  int64_t hidden_size, proj_size;
  bool layer_norm;
  bool reverse;
  Tokens tokens;
  Weights weights;      // contiguous; [members, ...] where they differ
  int64_t members = 1;  // weights that differ; row b of the batch has weights b % members
  const void *h0, *c0;  // storage type [batch, out], [batch, hidden]; null: zeros
  int64_t y_stride;     // of y
  int64_t c_stride;     // of saved_c
  // The dropout of what the layer reads of the one below [tokens, width]: 0 drops, 1 keeps times
  // the scale. Null: none. For backends that run several layers at once.
  const uint8_t* input_mask;
  double mask_scale;

  FUSEDRNN_HD constexpr int64_t out_size() const { return proj_size ? proj_size : hidden_size; }
  FUSEDRNN_HD constexpr CellTraits cell_traits() const { return traits(cell, layer_norm); }
  FUSEDRNN_HD constexpr int64_t gate_columns() const { return traits(cell).gates * hidden_size; }
  FUSEDRNN_HD constexpr int64_t slot_columns() const { return cell_traits().slots * hidden_size; }
};

struct LayerForward : Layer {
  const void* gates_x;  // compute type [tokens, gates * hidden], x W_ih^T
  void* y;              // storage type [tokens, out], zeros where a row has no step
  void *hn, *cn;        // storage type [batch, out], [batch, hidden]; cn null without a cell state
  // The slots that the cell saves, null: nothing is kept; and its cell states (compute type), of a
  // cell that saves no slots with zoneout what it would have put out without; null where there are
  // none or nobody wants them.
  void *saved, *saved_c;
  void* scales;  // with layer normalisation: the reserve's, null as saved
};

struct LayerSaved : Layer {  // as forward left it
  const void *y, *saved, *saved_c, *scales;
};

struct LayerBackward : LayerSaved {
  // dL/dy, but for what a layer above in the same launch contributes; compute type [tokens, out],
  // null: zeros.
  const void* dy;
  int64_t dy_stride;
  // Given for every cell state beside what later steps contribute; compute type, rows as saved_c.
  // Null: zeros.
  const void* dcs;
  const void *dhn, *dcn;  // compute type [batch, out], [batch, hidden]; null: zeros
  void *dh0, *dc0;        // the same of the initial states, written in any case
  void* dgates;  // storage type [tokens, slots * hidden], gradients of the pre-activations, zeros
                 // where a row has no step
  // With a projection, likewise: the gradients of its result [tokens, out], and its operand
  // [tokens, hidden].
  void *dproj, *hidden;
  // With layer normalisation: gradients of the normalised values, compute type [tokens,
  // Problem::normed_columns()], zeros where a row has no step.
  void* dnormed;
};

// The derivative of forward in one direction: `tangent` has the tangents of all that LayerForward
// has, also of weights, biases and initial states, null for zeros; gates_x is the part of the input
// and of the tangent of W_ih.
struct LayerForwardTangent {
  LayerForward tangent;
  LayerSaved value;
  const void* known_h;  // compute type [tokens, gates * hidden]: what was multiplied with W_hh
                        // times the tangent of W_hh; or null
  const void* w_hr;  // storage type [out, 2 * hidden]: W_hr, and beside it its tangent; null where
                     // that is zeros
};

// Backward together with its derivative in one direction; what the first LayerBackward has, the
// second has the tangents of, and of the weights of the second only gains and shifts are read. Rows
// of dgates and of dproj of the value and of the tangent take turns, those of `hidden` of the
// tangent and of the value.
struct LayerBackwardTangent {
  LayerBackward value, tangent;
  // Storage type, null where the tangent is zeros: the tangent of W_hh, rows of zeros for the slots
  // that it does not reach, and W_hh [slots + gates, out]; the tangent of W_hr and W_hr
  // [2 * out, hidden].
  const void *w_hh, *w_hr;
};

}  // namespace fusedrnn
