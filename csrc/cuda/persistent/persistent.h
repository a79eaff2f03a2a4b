// The persistent backends: one launch runs all steps of one or more layers and directions.
//
// What both kernels of a backend need, and know nothing of torch. Arrays are of the storage type
// (the problem's dtype) or of the compute type (float32; there is no float64 here). Rows of tokens,
// (step, row of the batch), follow each other as csrc/plan/problem.h says; strides are in elements.
#pragma once
#include <cstdint>

#include "plan/persistent.h"

namespace fusedrnn {

// What regularises one layer and direction; null: nothing. Where zoneout has no mask there is a
// rate.
struct StageMasks {
  const void* h_mask;              // compute type [batch, hidden]
  const uint8_t *zone_h, *zone_c;  // [tokens, hidden]
};

// One layer and direction, forward.
struct ForwardStage {
  const void *w_hh, *b_ih, *b_hh;  // storage type; biases may be null: zeros; of all members
  const void* gates_x;             // compute type [tokens, gates * hidden]: x W_ih^T
  // Of a chained stage in its place: W_ih, and which elements of the stage before are kept.
  const void* w_ih;
  const uint8_t* mask;    // [tokens, hidden], or null
  const void *h0, *c0;    // storage type [batch, hidden]; null: zeros
  void *hn, *cn;          // storage type [batch, hidden]
  void* y;                // storage type [tokens, y_stride]
  void *saved, *saved_c;  // storage type [tokens, saved * hidden], compute type [tokens, c_stride];
                          // null: not saved
  StageMasks masks;
  int64_t y_stride;
  bool reverse;
};

// The same backward.
struct BackwardStage {
  const void* w_hh;                 // storage type
  const void *saved, *saved_c, *y;  // what forward left
  const void *h0, *c0;              // storage type, or null: zeros
  const void *dy, *dcs;             // compute type [tokens, dy_stride], [tokens, c_stride], or null
  const void* above;                // compute type [tokens, hidden], of a chained stage: dx of the
                                    // stage before, which comes on top of dy
  const uint8_t* above_mask;        // elements of it that count; or null
  const void* w_ih;                 // storage type, where a stage that follows is chained
  void* dx;                         // compute type [tokens, hidden], of such a stage
  void* dgates;                     // storage type [tokens, slots * hidden]
  const void *dhn, *dcn;            // compute type [batch, hidden], or null: zeros
  void *dh0, *dc0;                  // compute type [batch, hidden]
  StageMasks masks;
  int64_t y_stride, dy_stride;
  bool reverse;
};

constexpr int kMostSlots = 4;

// A cell's constants as values: kernels are compiled for all cells at once.
struct CellLayout {
  int gates, slots, saved;
  bool has_cell, uses_h_prev;
  int x_gate[kMostSlots], h_gate[kMostSlots];  // of each slot, as gate_of says; -1: none

  // The first slot that W_hh reaches; those of W_ih begin with slot 0.
  FUSEDRNN_HD constexpr int first() const { return slots - gates; }
};

struct Persistent {
  Cell cell;
  CellLayout layout;  // the launch fills it in
  DType dtype;        // of the storage type
  Engine engine;
  bool cluster;  // teams are clusters of two blocks or more, and else blocks anywhere
  // Every stage but the first takes what the one before puts out, step by step: y, or backward dx.
  bool chained;
  int stages;
  int64_t batch, hidden_size, steps;
  int64_t members = 1;  // weights that differ, [members, ...]: row b of the batch has b % members
  // On the device. The first token of a step stands in `offsets` for packed data, which has lengths
  // too; they are null where every row has `steps` steps.
  const int64_t* lengths;  // [batch], each in [0, steps]
  const int64_t* offsets;  // [steps], or null
  // The rows of the batch in the order in which slices take them, members in turn; null: their own.
  const int64_t* order;
  float mask_scale;
  const uint8_t* resets;       // [tokens], or null: see begins_anew() in cuda/tokens.h
  float zoneout_h, zoneout_c;  // 0: none
  int64_t c_stride;            // of saved_c
  PersistentShape shape;
  // Which of the slices of shape.rows rows this launch runs. Slice i has rows of member i %
  // members.
  int first_slice, slices;
  int* flags;       // flag_count() times kMissing
  void* workspace;  // workspace_bytes(), forward all kMissing
  // Where the host learns that a block has waited too long for another, and what it finds there:
  // see device.h. Null: nowhere.
  int* tell_host;
  int launch_code;

  // The row of the batch in a place of a member's slices; no row from `batch` on.
  FUSEDRNN_HD int64_t row_at(int64_t place, int64_t member) const {
    const int64_t b = place * members + member;
    return order && b < batch ? order[b] : b;
  }
  FUSEDRNN_HD int64_t blocks() const { return int64_t(slices) * stages * shape.team; }
  // Whether blocks exchange through global memory, and whether some wait for what others write
  // there: those have to know that all run.
  bool through_memory() const { return !cluster && shape.team > 1; }
  bool waits_for_others() const { return through_memory() || (chained && stages > 1); }
  // One for each block, and one for all.
  FUSEDRNN_HD int64_t flag_count() const { return blocks() + 1; }
};

struct PersistentForward : Persistent {
  // y of a stage that another one follows is all kMissing where a row has a step.
  ForwardStage stage[kMaxStages];
  // What a team exchanges: h of all its units and rows, after each step but the last.
  FUSEDRNN_HD int64_t exchanged() const { return int64_t(shape.rows) * shape.team * shape.units; }
  int64_t workspace_bytes() const {
    const int64_t step = exchanged() * tile_of(engine).operand_bytes;
    return through_memory() && steps > 1 ? int64_t(slices) * stages * (steps - 1) * step : 0;
  }
};

struct PersistentBackward : Persistent {
  BackwardStage stage[kMaxStages];  // dx is all kMissing
  int64_t workspace_bytes() const {
    return through_memory() ? blocks() * 2 * inbox_floats(shape, chained) * int64_t(sizeof(float))
                            : 0;
  }
};

// Each enqueues one kernel on `stream`, a CUDA stream, and returns a cudaError_t, 0 for success.
int persistent_forward(const PersistentForward&, void* stream);
int persistent_backward(const PersistentBackward&, void* stream);

// Those of a backend, a source file each direction: they are what takes long to compile.
int cluster_forward(const PersistentForward&, void* stream);
int cluster_backward(const PersistentBackward&, void* stream);
int grid_forward(const PersistentForward&, void* stream);
int grid_backward(const PersistentBackward&, void* stream);

// How many clusters of `size` blocks, of so much shared memory each, run at once on the current
// device; 0: none can.
int clusters_at_once(int size, int shared_bytes);

}  // namespace fusedrnn
