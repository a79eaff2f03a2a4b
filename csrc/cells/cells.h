// All cells, and their number and names as run-time values.
#pragma once
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/normed.h"
#include "cells/rnn.h"
#include "cells/zoneout.h"

namespace fusedrnn {

enum class Cell : int {
#define CELL(mode, type) k##type,
#include "cells/cells.inc"
#undef CELL
  kCount
};

// GateRanges<N> for code that is not a template over cells.
struct GateRangeList {
  int count;
  GateRange range[2];  // the second may be empty

  template <int N>
  FUSEDRNN_HD constexpr GateRangeList(const GateRanges<N>& ranges) : count(N), range{} {
    static_assert(N <= 2, "a cell has at most two ranges");
    for (int i = 0; i < N; i++) range[i] = ranges.range[i];
  }
  FUSEDRNN_HD constexpr const GateRange* begin() const { return range; }
  FUSEDRNN_HD constexpr const GateRange* end() const { return range + count; }
};

// The constants of a cell, for the same.
struct CellTraits {
  const char* mode;
  int gates, slots, saved, scales;  // scales: of layer normalisation, 0 without
  bool has_cell;
};

FUSEDRNN_HD constexpr CellTraits traits(Cell cell, bool layer_norm = false) {
  switch (cell) {
#define CELL(mode, type)             \
  case Cell::k##type:                \
    if (layer_norm)                  \
      return {mode,                  \
              type::kGates,          \
              Normed<type>::kSlots,  \
              Normed<type>::kSaved,  \
              Normed<type>::kScales, \
              type::kHasCell};       \
    return {mode, type::kGates, type::kSlots, type::kSaved, 0, type::kHasCell};
#include "cells/cells.inc"
#undef CELL
    default:
      return {};
  }
}

struct CellGateRanges {
  GateRangeList x, h;
};
constexpr CellGateRanges gate_ranges(Cell cell, bool layer_norm) {
  switch (cell) {
#define CELL(mode, type)                                                         \
  case Cell::k##type:                                                            \
    if (layer_norm) return {Normed<type>::x_ranges(), Normed<type>::h_ranges()}; \
    return {type::x_ranges(), type::h_ranges()};
#include "cells/cells.inc"
#undef CELL
    default:
      return {GateRanges<1>{}, GateRanges<1>{}};
  }
}

}  // namespace fusedrnn
