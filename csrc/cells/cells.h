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

FUSEDRNN_HD constexpr CellTraits traits(Cell cell) {
  switch (cell) {
#define CELL(mode, type) \
  case Cell::k##type:    \
    return {mode, type::kGates, type::kSlots, type::kSaved, type::kHasCell};
#include "cells/cells.inc"
#undef CELL
    default:
      return {};
  }
}

}  // namespace fusedrnn
