// The element-wise half of the stepwise backend: one step of one layer and direction, forward and
// backward, of any cell and dtype. The products with W_ih, W_hh and W_hr are the caller's.
//
// A structure holds what one launch needs and knows nothing of torch. Arrays are of the storage
// type (the problem's dtype) or of the compute type (float64 for float64, float32 for the rest).
// Strides are in elements; an array without one has rows that follow each other.
//
// A row b runs at a step that lies within its length. Rows that rest keep their state and carried
// gradients, write zeros where a value of the step is asked for, and are not read from.
#pragma once
#include <cstdint>

#include "plan/problem.h"

namespace fusedrnn {

struct CellStep {
  Cell cell;
  DType dtype;
  int64_t batch, hidden_size;
  int64_t members = 1;  // weights that differ; row b has biases, gains and shifts b % members
  int64_t step, steps;  // this step in time, also in the reverse direction, and how many there are
  const int64_t* lengths;  // [batch], null: every row has `steps` steps
  bool reverse;
  // [batch] of the step at which sequences begin if this one starts from zeros: `step`, in reverse
  // step + 1. Null: none does.
  const uint8_t* resets;
  const void* h_mask;            // recurrent dropout, compute type [batch, hidden]; null: none
  Zoneout zoneout_h, zoneout_c;  // masks [batch, hidden]
  int64_t c_stride;              // of saved_c, c, c_prev and dcs
};

// (gates_x + b_ih, gates_h + b_hh, h, c) -> h, c. Rows of the gates are in torch.nn's order.
struct CellForward : CellStep {
  const void* gates_x;      // compute type [batch, gates * hidden]: x W_ih^T
  const void* gates_h;      // the same of h W_hh^T; null: zeros
  const void *b_ih, *b_hh;  // storage type [members, gates * hidden]; null: zeros
  void *h, *c;              // compute type [batch, hidden], updated in place; h may be null for
                            // cells that do not read it, c for those that have none
  void* operand;            // storage type [batch, hidden]: h times h_mask for the next product,
                            // or null
  void* y;                  // storage type [batch, hidden], or null
  void* saved;              // storage type [batch, saved * hidden], or null
  void* saved_c;  // compute type [batch, hidden], or null: c; h before zoneout of cells without c
  int64_t gates_x_stride, gates_h_stride, y_stride;
};

// What forward left of a step.
struct SavedStep {
  const void* saved;       // storage type [batch, saved * hidden]
  const void *h, *h_prev;  // storage type [batch, hidden]: y of this step and the one before;
                           // h for cells that save nothing, h_prev for cells that read it
  const void *c, *c_prev;  // compute type [batch, hidden]: saved_c of the same steps; c in
                           // place of h where h was zoned out
  const void *h0, *c0;     // storage type [batch, hidden]: initial states; null: zeros
  int64_t h_stride;        // of h and h_prev
};

// The gradients of the pre-activations. dL/dh of this step is dh + dh_product + dy; what of it goes
// around W_hh to the step before is left in dh, what goes through it is the caller's product of
// dgates and W_hh, given as dh_product of the next launch (which takes it for the rows that ran in
// the launch before, and did not start from zeros there). A last launch, of step -1 (`steps` in
// reverse), folds the last product into dh: then dh and dc are the gradients of the initial states.
//
// Packed data has fewer rows at later steps: `batch` says how many, `lengths` is still needed to
// tell a row's first step. In reverse, a row that is not part of the next launch keeps its product
// where it is, and the last launch has no lengths: it folds in the last product of every row.
struct CellBackward : CellStep, SavedStep {
  const void *dy, *dcs;         // compute type [batch, hidden], given at this step; or null
  const void* dh_product;       // compute type [batch, hidden], or null
  const uint8_t* later_resets;  // `resets` of the launch before
  void *dh, *dc;                // compute type [batch, hidden], updated in place; dh may be null
  void* dgates;                 // storage type [batch, slots * hidden], or null
  void* hidden;                 // storage type [batch, hidden]: h before a projection, or null
  int64_t dy_stride;            // of dy
};

// The same of cells with layer normalisation (cells/normed.h): saved and dgates have the slots of
// Normed. Storage type [members, gates * hidden] and [members, hidden]; the latter null for cells
// without c.
struct NormWeights {
  const void *gain_ih, *gain_hh, *gain_c, *shift_c;
};
struct NormedForward : CellForward {
  NormWeights norms;
  void* scales;  // compute type [batch, scales], or null
  void* halves;  // compute type [batch, 2 * hidden], of cells with c: scratch memory
};
struct NormedBackward : CellBackward {
  NormWeights norms;
  const void* scales;
  void* dnormed;  // compute type [batch, (slots + c) * hidden]: gradients of the normalised values,
                  // for each slot of the plain cell and for n(c)
};

// The derivative of CellForward in one direction: each array that it reads or writes, and each
// bias, has the tangents of what CellForward has there; null: zeros. gates_h is the product of the
// tangent of h and W_hh, and is ignored where a row starts from zeros.
struct CellForwardTangent : CellForward {
  SavedStep value;  // what forward left
  const void*
      known_h;   // compute type [batch, gates * hidden]: h times the tangent of W_hh; or null
  void* hidden;  // storage type [batch, 2 * hidden], before a projection: the tangent of h,
                 // then h; or null
  int64_t known_h_stride;
};

// CellBackward together with its derivative in one direction. Rows of dgates of the value and of
// the tangent take turns in one array, and so do those of `hidden`.
struct CellBackwardTangent {
  CellBackward value, tangent;
};

// The same with layer normalisation. Tangents of gains and shifts may be null: zeros.
struct NormedForwardTangent : CellForwardTangent {
  NormWeights norms, dnorms;
  const void* scales;
  void* dscales;  // compute type [batch, scales], or null
  void* halves;   // as NormedForward's
};
struct NormedBackwardTangent {
  NormedBackward value, tangent;
};

// Each enqueues one kernel on `stream`, a CUDA stream, and returns a cudaError_t, 0 for success.
int cell_forward(const CellForward&, void* stream);
int cell_backward(const CellBackward&, void* stream);
int normed_forward(const NormedForward&, void* stream);
int normed_backward(const NormedBackward&, void* stream);
int cell_forward_tangent(const CellForwardTangent&, void* stream);
int cell_backward_tangent(const CellBackwardTangent&, void* stream);
int normed_forward_tangent(const NormedForwardTangent&, void* stream);
int normed_backward_tangent(const NormedBackwardTangent&, void* stream);

// The same for the projection of an LSTM, whatever `cell` says, with proj_size as hidden_size: h is
// gates_x as it stands, and dgates is dL/dh. The cell's own launches then have no h, y, h_prev, dh
// and dh_product; the product of operand and W_hr is the gates_x of the projection, and the product
// of its dgates and W_hr is the dy of the cell.
int projection_forward(const CellForward&, void* stream);
int projection_backward(const CellBackward&, void* stream);
// The tangent of a projection is projection_forward of tangents.
int projection_backward_tangent(const CellBackwardTangent&, void* stream);

}  // namespace fusedrnn
