// One call of the CPU kernels as plain pointers. The torch side fills it in; every variant of the
// kernels reads it. Storage-type arrays have the problem's dtype, compute-type arrays float64 for
// float64 and float32 otherwise.
//
// A token is one row of the batch at one step. Token (t, b) lies at row offset[t] + b of every
// per-token array, so padded (T, B) and packed data are the same thing here.
#pragma once
#include "cpu/member.h"
#include "plan/cpu_costs.h"
#include "plan/problem.h"

namespace fusedrnn {

struct Sequence {
  int64_t steps, batch, tokens;  // tokens: rows of the per-token arrays
  const int64_t* offset;         // [steps]
  const int64_t* length;         // [batch]
  const int64_t* order;          // [batch] rows by falling length
  const uint8_t* resets;         // [tokens] whether a new sequence begins there; null: nowhere
  // The tokens that exist, in storage order; fewer than `tokens` where rows are padded.
  int64_t valid;
  const int64_t *valid_step, *valid_row;  // [valid]

  FUSEDRNN_HD int64_t token(int64_t t, int64_t b) const { return offset[t] + b; }
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
  const int64_t* value;  // [distinct], rising
  const int64_t* which;  // [tokens] which of them a token has
  // The tokens that have value i lie from token[begin[i]] to token[begin[i + 1]], in storage order.
  const int64_t *begin, *token;  // [distinct + 1], [valid]
};

// Where a call's packed weights lie, in elements of the compute type. Forward: bias of all slots
// (with layer normalisation none), then W_ih (of integer input: the gates that each distinct value
// makes) and W_hh group by group (layer.h), W_hr. Backward: W_hh and W_ih run by run, W_hr.
struct PackedOffsets {
  int64_t bias, w_ih, w_hh, w_hr, total;
};

// Zoneout: what part of an old value stays, and the rest is the new one.
struct Zoneout {
  const uint8_t* mask;  // [layers * directions, tokens, width], 1: all of it; null: `rate`
  double rate;
};

struct Common {
  Problem problem;
  Sequence seq;
  const void* x;  // storage type; token (t, b) at x + x_offset[t] + b * x_row elements
  const int64_t* x_offset;
  int64_t x_row;
  OneHot one_hot;       // in place of x
  const void *hx, *cx;  // storage type [layers * directions, batch, ...], null: zeros
  const uint8_t* mask;  // dropout between layers [layers - 1, tokens, directions * out], null: none
  double mask_scale;
  // Recurrent dropout: h is multiplied with it before W_hh; null: none. Compute type
  // [layers * directions, batch, out].
  const void* h_mask;
  Zoneout zoneout_h, zoneout_c;
  // Where all states are results: the outputs of all layers but the last, storage type
  // [layers - 1, tokens, directions * out], and all cell states, compute type
  // [layers, tokens, directions * hidden]; null where they are not.
  void *hs, *cs;
  const Weights* weights;  // [layers * directions]
  // Compute type, one PackedOffsets::total per layer and direction; null: backward of few tokens,
  // which reads the weights as they lie.
  const void* packed;
  char* reserve;  // null: nothing is kept for backward
};

struct Forward : Common {
  void *y, *hn, *cn;  // storage type
  bool unpacked_hh;   // W_hh is read as it lies, by kernels that do not multiply pairs
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
  void* dproj;            // [directions, tokens, out], gradients of h, with a projection
  void* hidden;           // [directions, tokens, hidden], what was projected, with a projection
  void* dnormed;          // [directions, tokens, Problem::normed_columns()] (layer_norm.h)
  void* const* dweights;  // [directions * 9] in the order of Weights; null: not wanted
  int64_t layer;
};

// One step of a layer and direction without packed weights (direct.h), for the first `rows` rows in
// Sequence::order.
struct DirectStep {
  int64_t layer, dir, t, rows;
  bool falling;          // units go from the last to the first
  void *h_prev, *h, *c;  // compute type [batch, hidden], rows in that order too
  // The products of W_hh where direct_recurrent makes them, [vectors of units][gates][batch] whole
  // vectors; null: the step does.
  void* by_h;
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
  RowsScratch (*rows_scratch)(const Problem&, int64_t rows);  // for forward and backward
  void (*forward)(const Forward&, const Rows&, Member&);
  void (*backward)(const Backward&, const Rows&, Member&);
  // For each state DirectStep::by_h, and each part's own.
  RowsScratch (*direct_scratch)(const Problem&, int64_t rows);
  // Of all rows: h_prev and c from the call's initial states, and to its final ones.
  void (*direct_begin)(const Forward&, const DirectStep&);
  void (*direct_recurrent)(const Forward&, const DirectStep&, int64_t part, int64_t parts);
  void (*direct_step)(const Forward&, const DirectStep&, int64_t part, int64_t parts,
                      void* scratch);
  void (*direct_end)(const Forward&, const DirectStep&);
  int64_t (*weight_tasks)(const Problem&, int64_t threads);
  int64_t (*weight_scratch)(const Problem&, int64_t layer, int64_t tokens);
  void (*weight_grad)(const Backward&, int64_t task, int64_t threads, void* scratch);
};

struct Variant {
  const Kernels* kernels;
  bool supported;  // by this processor
};

const Kernels& kernels();  // the best that this processor runs, or the one that FUSEDRNN_CPU names
// The same for a call: avx512bf16 has bfloat16 alone and amx float32 too, where that pays. They
// leave all else to avx512.
const Kernels& kernels(const Problem& p, int64_t batch, int64_t tokens);
const Variant* variants(int* count);  // all in the binary, best first

}  // namespace fusedrnn
