// What is to be computed, as plain numbers, and what follows from it alone: sizes of weights and of
// the buffer that forward leaves for backward. No torch, no CUDA, nothing about how it is computed.
#pragma once
#include <cstdint>

#include "cells/cells.h"

namespace fusedrnn {

enum class DType : int {
#define DTYPE(name, torch_name, scalar_type, bytes, compute_bytes) k##name,
#include "plan/dtypes.inc"
#undef DTYPE
  kCount
};

struct DTypeTraits {
  const char* name;  // torch's
  // Sums, cell states and carried gradients are kept in the compute type.
  int64_t bytes, compute_bytes;
};
FUSEDRNN_HD constexpr DTypeTraits traits(DType dtype) {
  switch (dtype) {
#define DTYPE(name, torch_name, scalar_type, bytes, compute_bytes) \
  case DType::k##name:                                             \
    return {torch_name, bytes, compute_bytes};
#include "plan/dtypes.inc"
#undef DTYPE
    default:
      return {};
  }
}
FUSEDRNN_HD constexpr int64_t bytes(DType t) { return traits(t).bytes; }
FUSEDRNN_HD constexpr int64_t compute_bytes(DType t) { return traits(t).compute_bytes; }

// How weight matrices are stored: as the dtype says, or packed for inference in fewer bytes: in 8
// bits with a scale for each row, or in bfloat16 (cpu/product/words.h).
enum class Stored : int { kPlain, kInt8, kBFloat16 };

// A weight of a layer and direction.
enum WeightKind : int {
#define WEIGHT(kind, name, torch_name, present, rows, columns) kind,
#include "plan/weights.inc"
#undef WEIGHT
  kWeightKinds
};

struct Problem {
  Cell cell;
  DType dtype;
  int64_t input_size, hidden_size;
  bool one_hot;       // the input is integers, which mean one-hot vectors of input_size
  int64_t proj_size;  // 0: no projection
  int64_t num_layers, num_directions;
  bool bias;
  bool zoneout;     // of h or c
  bool all_states;  // outputs and cell states of all layers are results, and not in the reserve
  bool layer_norm;  // cells/normed.h
  Stored stored;    // other than plain: inference in float32 on the CPU, without layer_norm

  FUSEDRNN_HD constexpr CellTraits cell_traits() const { return traits(cell, layer_norm); }

  // Width of h: what a layer's direction puts out and feeds back.
  FUSEDRNN_HD constexpr int64_t out_size() const { return proj_size ? proj_size : hidden_size; }
  FUSEDRNN_HD constexpr int64_t layer_input(int64_t layer) const {
    return layer == 0 ? input_size : num_directions * out_size();
  }
  // Width of the vectors that are multiplied with W_ih; integers have none.
  FUSEDRNN_HD constexpr int64_t product_input(int64_t layer) const {
    return indexed(layer) ? 0 : layer_input(layer);
  }
  FUSEDRNN_HD constexpr bool indexed(int64_t layer) const { return one_hot && layer == 0; }
  FUSEDRNN_HD constexpr int64_t gate_rows() const { return traits(cell).gates * hidden_size; }
  FUSEDRNN_HD constexpr int64_t slot_columns() const { return cell_traits().slots * hidden_size; }
  // Per token, direction and layer: the gradients of what layer normalisation puts out.
  FUSEDRNN_HD constexpr int64_t normed_columns() const {
    return layer_norm ? (traits(cell).slots + traits(cell).has_cell) * hidden_size : 0;
  }
  // The shape in which the weights of `gates` gates of `units` units and K columns are stored.
  FUSEDRNN_HD constexpr int64_t stored_rows(int64_t gates, int64_t units) const {
    return gates * (stored == Stored::kPlain ? units : (units + 15) / 16);
  }
  FUSEDRNN_HD constexpr int64_t stored_columns(int64_t K) const {
    if (stored == Stored::kPlain) return K;
    const int64_t piece = stored == Stored::kInt8 ? 64 : 32;  // a cache line holds of a row
    return (K + piece - 1) / piece * piece * 16;
  }
  FUSEDRNN_HD constexpr int weights_per_direction() const { return weight_place(kWeightKinds); }
  // How many weights come before that of a kind, within a layer and direction.
  FUSEDRNN_HD constexpr int weight_place(WeightKind wanted) const {
    const Problem& p = *this;
    int place = 0;
#define WEIGHT(kind, name, torch_name, present, rows, columns) place += kind < wanted && (present);
#include "plan/weights.inc"
#undef WEIGHT
    return place;
  }
  // Whether there is one of a kind.
  FUSEDRNN_HD constexpr bool has_weight(WeightKind kind) const {
    return weight_place(WeightKind(kind + 1)) > weight_place(kind);
  }
  // The same among the weights of all layers and directions.
  FUSEDRNN_HD constexpr int64_t weight_index(int64_t layer, int64_t dir, WeightKind wanted) const {
    return (layer * num_directions + dir) * weights_per_direction() + weight_place(wanted);
  }
};

// Of up to so many tokens a call may read its weights unpacked, in forward and in backward.
constexpr int64_t kFewTokens = 48, kFewTokensBack = 16;
// Rows of a batch that its dot products take at a time.
constexpr int64_t kDotRows = 4;

// A pointer to each weight of a layer and direction, or to its gradient, in torch.nn's layout; null
// where there is none.
template <class Pointer>
struct WeightPointers {
#define WEIGHT(kind, name, torch_name, present, rows, columns) Pointer name;
#include "plan/weights.inc"
#undef WEIGHT

  FUSEDRNN_HD constexpr Pointer operator[](WeightKind wanted) const {
    switch (wanted) {
#define WEIGHT(kind, name, torch_name, present, rows, columns) \
  case kind:                                                   \
    return name;
#include "plan/weights.inc"
#undef WEIGHT
      default:
        return nullptr;
    }
  }
};
using Weights = WeightPointers<const void*>;
using WeightGradients = WeightPointers<void*>;

// What part of an old value zoneout keeps.
struct Zoneout {
  const uint8_t* mask;  // of each token and unit, 1: all of it; null: `rate`
  double rate;          // 0: no zoneout
};

// The reserve holds, for every layer and direction, one row per token (a row of the batch at a
// step): first all cell states (compute type), then the scales of layer normalisation (compute
// type), then all saved slots (storage type), then the outputs of all layers but the last (storage
// type). In place of cell states a cell that saves no slot has with zoneout what it would have put
// out without. Offsets are bytes for `tokens` tokens.
struct Reserve {
  int64_t cell_row, scales_row, slots_row,
      output_row;  // bytes per token, of one layer and direction (output: layer)
  int64_t layers, directions;

  FUSEDRNN_HD explicit constexpr Reserve(const Problem& p)
      : cell_row(keeps_cells(p) || keeps_candidates(p) ? p.hidden_size * compute_bytes(p.dtype)
                                                       : 0),
        scales_row(p.cell_traits().scales * compute_bytes(p.dtype)),
        slots_row(p.cell_traits().saved * p.hidden_size * bytes(p.dtype)),
        output_row(p.all_states ? 0 : p.num_directions * p.out_size() * bytes(p.dtype)),
        layers(p.num_layers),
        directions(p.num_directions) {}

  static FUSEDRNN_HD constexpr bool keeps_cells(const Problem& p) {
    return traits(p.cell).has_cell && !p.all_states;
  }
  static FUSEDRNN_HD constexpr bool keeps_candidates(const Problem& p) {
    return p.zoneout && traits(p.cell).saved == 0;
  }

  FUSEDRNN_HD constexpr int64_t bytes_per_token() const {
    return layers * directions * (cell_row + scales_row + slots_row) + (layers - 1) * output_row;
  }
  FUSEDRNN_HD constexpr int64_t cell_offset(int64_t layer, int64_t dir, int64_t tokens) const {
    return (layer * directions + dir) * cell_row * tokens;
  }
  FUSEDRNN_HD constexpr int64_t scales_offset(int64_t layer, int64_t dir, int64_t tokens) const {
    return (layers * directions * cell_row + (layer * directions + dir) * scales_row) * tokens;
  }
  FUSEDRNN_HD constexpr int64_t slots_offset(int64_t layer, int64_t dir, int64_t tokens) const {
    return (layers * directions * (cell_row + scales_row) +
            (layer * directions + dir) * slots_row) *
           tokens;
  }
  FUSEDRNN_HD constexpr int64_t output_offset(int64_t layer, int64_t tokens) const {
    return (layers * directions * (cell_row + scales_row + slots_row) + layer * output_row) *
           tokens;
  }
};

}  // namespace fusedrnn
