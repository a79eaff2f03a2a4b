// All cells, and their number and names as run-time values.
#pragma once
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

namespace fusedrnn {

enum class Cell : int {
#define CELL(mode, type) k##type,
#include "cells/cells.inc"
#undef CELL
  kCount
};

// The constants of a cell, for code that is not a template over cells.
struct CellTraits {
  const char* mode;
  int gates, slots, saved;
  bool has_cell;
};

inline constexpr CellTraits kCellTraits[] = {
#define CELL(mode, type) {mode, type::kGates, type::kSlots, type::kSaved, type::kHasCell},
#include "cells/cells.inc"
#undef CELL
};

FUSEDRNN_HD constexpr const CellTraits& traits(Cell cell) {
  return kCellTraits[static_cast<int>(cell)];
}

}  // namespace fusedrnn
