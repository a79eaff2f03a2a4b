// One call of the CPU kernels as plain pointers. The torch side fills it in; every variant of the
// kernels reads it. Storage-type arrays have the problem's dtype, compute-type arrays float64 for
// float64 and float32 otherwise.
//
// A token is one row of the batch at one step. Token (t, b) lies at row offset[t] + b of every
// per-token array, so padded (T, B) and packed data are the same thing here.
#pragma once
#include "plan/cpu_pass.h"
#include "plan/problem.h"

namespace fusedrnn {

struct Sequence {
  int64_t steps, batch, tokens;  // tokens: rows of the per-token arrays
  const int64_t* offset;         // [steps]
  const int64_t* length;         // [batch]
  const int64_t* order;          // [batch] rows by descending length
  const uint8_t* resets;         // [tokens] whether a new sequence begins there; null: nowhere
  // The tokens that exist, in storage order; fewer than `tokens` where rows are padded.
  int64_t valid;
  const int64_t *valid_step, *valid_row;  // [valid]
  // Above 1: that many rows in turn share what forward saved for one row, which has its place.
  int64_t sharing;

  FUSEDRNN_HD int64_t token(int64_t t, int64_t b) const { return offset[t] + b; }
  FUSEDRNN_HD int64_t saved_token(int64_t token) const {
    return sharing > 1 ? token / sharing : token;
  }
  // What step t of a direction starts from: zeros, the call's initial state, or the state that
  // step `before` left.
  enum class Start { kZeros, kInitial, kBefore };
  FUSEDRNN_HD Start start(int64_t dir, int64_t t, int64_t b, int64_t* before) const {
    *before = dir == 0 ? t - 1 : t + 1;
    const bool has_before = dir == 0 ? t > 0 : t + 1 < length[b];
    // The reverse direction comes to the last step of a sequence from one of the next sequence.
    if (resets && (dir == 0 || has_before) && resets[token(dir == 0 ? t : t + 1, b)])
      return Start::kZeros;
    return has_before ? Start::kBefore : Start::kInitial;
  }
};

// Integer input: what distinct values it has, and the tokens of each. Without a value: other input.
struct OneHot {
  int64_t distinct;
  const int64_t* value;  // [distinct], ascending
  const int64_t* which;  // [tokens] which of them a token has
  // The tokens that have value i lie from token[begin[i]] to token[begin[i + 1]], in storage order.
  const int64_t *begin, *token;  // [distinct + 1], [valid]
};

// Where a call's packed weights lie, in elements of the compute type. Forward: first the bias of
// all slots (none with layer normalisation), then W_ih (for integer input the gates of each
// distinct value) and W_hh group by group (pass/gate_layout.h), W_hr. Backward: first W_hh, then
// W_ih, both range by range, W_hr.
struct PackedOffsets {
  int64_t w_ih, w_hh, w_hr, total;
};

// Null: that one is not applied.
struct Regularisers {
  const uint8_t* mask;  // dropout between layers [layers - 1, tokens, directions * out]
  double mask_scale;
  // Recurrent dropout: h is multiplied with it before W_hh. Compute type
  // [layers * directions, batch, out].
  const void* h_mask;
  Zoneout zoneout_h, zoneout_c;  // masks [layers * directions, tokens, width]
};

struct Common : Regularisers {
  Problem problem;
  CpuPass pass;
  Sequence seq;
  const void* x;  // storage type; token (t, b) at x + x_offset[t] + b * x_row elements
  const int64_t* x_offset;
  int64_t x_row;
  OneHot one_hot;       // in place of x
  const void *hx, *cx;  // storage type [layers * directions, batch, ...], null: zeros
  // Where all states are results: the outputs of all layers but the last, storage type
  // [layers - 1, tokens, directions * out], and all cell states, compute type
  // [layers, tokens, directions * hidden]; null where they are not.
  void *hs, *cs;
  const Weights* weights;  // [layers * directions]
  // Compute type, one PackedOffsets::total per layer and direction; null: backward of few tokens,
  // which reads the weights unpacked.
  const void* packed;
  char* reserve;  // null: nothing is saved for backward
};

struct Forward : Common {
  void *y, *hn, *cn;  // storage type
  void* inner[2];     // storage type [tokens, directions * out], layer outputs when reserve is null
};

struct Backward : Common {
  const void* y;
  // Compute type. grad_hn, grad_cn null: zeros. The gradient of a layer's output, read, and of its
  // input, written (null: not wanted); dhx, dcx null: not wanted.
  const void *grad_hn, *grad_cn, *grad_out;
  void *grad_in, *dhx, *dcx;
  bool onto_grad_in;    // grad_in holds a gradient already, to which this layer's is added
  const void* grad_cs;  // of this layer's cell states, as in `cs`; null: zeros
  // [directions, tokens, slots * hidden], the gradients of the pre-activations: as the products
  // take them, in the space of the compute type
  void* dgates;
  void* dproj;    // [directions, tokens, out], gradients of h, with a projection
  void* hidden;   // [directions, tokens, hidden], what was projected, with a projection
  void* dnormed;  // [directions, tokens, Problem::normed_columns()] (pass/layer_norm.h)
  const WeightGradients* dweights;  // [directions]; null: not wanted
  bool rounds_weights;              // they are of the storage type, not the compute type
  int64_t layer;
};

// The derivative of forward in one direction: the call whose derivative it is, with what forward
// made, and a call with the tangents of all of it in place of the values. Tangents of weights that
// are null are zeros.
struct ForwardTangent {
  Forward primal, tangent;
};
// Likewise of backward. Of the primal call only gradients of gates, and of the inputs of layers
// where the layer below needs them, are written.
struct BackwardTangent {
  Backward primal, tangent;
};

// One step of a layer and direction without packed weights (pass/forward_unpacked.h), for the first
// `rows` rows in Sequence::order.
struct UnpackedStep {
  int64_t layer, dir, t, rows, all_rows;  // all_rows: at any time
  bool descending;                        // the order of units
  void *h_prev, *h, *c;  // compute type [all_rows, hidden], rows in Sequence::order
  // The products of W_ih and then of W_hh: [vectors of units][2][gates][all_rows] whole vectors.
  void* sums;
  bool has_recurrent;  // those of W_hh are there, from unpacked_recurrent
};

// A thread's place in a team, which takes a task together (run/team.h). Without a team it is alone.
struct Member {
  class Team* team = nullptr;
  int64_t index = 0, count = 1;
  int64_t passed = 0;  // barriers, times `count`

  // Returns once all members have called it as often: what they wrote before can be read.
  void barrier();
};

// Rows that a task takes through all steps: places in Sequence::order. A team of more than one
// member takes rows of a plain layer: without projection, resets or layer normalisation.
struct Rows {
  int64_t first, end;
  void *common, *own;  // scratch memory
};

// Bytes of scratch memory for a task: what its team has in common, and what each member has.
struct RowsScratch {
  int64_t common, own;
};

// One variant of the kernels, compiled for one instruction set; every entry takes what the dtype
// and cell of the problem ask for. `part` of `parts` is a share of the work that needs no other
// share.
struct Kernels {
  const char* name;
  int vector_bytes;
  CpuCosts (*costs)(DType);
  PackedOffsets (*forward_offsets)(const Common&, int64_t layer);
  PackedOffsets (*backward_offsets)(const Problem&, int64_t layer);
  // `which`: of the layers and directions
  void (*pack_forward)(const Forward&, int64_t which, void* packed, int64_t part, int64_t parts);
  void (*pack_backward)(const Backward&, int64_t which, void* packed, int64_t part, int64_t parts);
  RowsScratch (*rows_scratch)(const Problem&, const CpuPass&, int64_t rows);  // both directions
  void (*forward)(const Forward&, const Rows&, Member&);
  void (*backward)(const Backward&, const Rows&, Member&);
  // Common: UnpackedStep::recurrent of each state; own: of each part.
  RowsScratch (*unpacked_scratch)(const Problem&, int64_t rows);
  // Of all rows: h_prev and c from the call's initial states, and to its final ones.
  void (*unpacked_begin)(const Forward&, const UnpackedStep&);
  void (*unpacked_recurrent)(const Forward&, const UnpackedStep&, int64_t part, int64_t parts);
  void (*unpacked_step)(const Forward&, const UnpackedStep&, int64_t part, int64_t parts,
                        void* scratch);
  void (*unpacked_end)(const Forward&, const UnpackedStep&);
  // Of a task of either derivative, by one thread.
  int64_t (*tangent_scratch)(const Problem&, int64_t rows);
  void (*forward_tangent)(const ForwardTangent&, const Rows&, Member&);
  void (*backward_tangent)(const BackwardTangent&, const Rows&);
  int64_t (*weight_tasks)(const Problem&, int64_t threads);
  int64_t (*weight_scratch)(const Problem&, int64_t layer, int64_t tokens);
  void (*weight_grad)(const Backward&, int64_t task, int64_t threads, void* scratch);
};

}  // namespace fusedrnn
