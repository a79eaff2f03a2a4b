// All cells, and their number and names as run-time values.
#pragma once
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/normed.h"
#include "cells/rnn.h"

namespace fusedrnn {

enum class Cell : int {
#define CELL(mode, type) k##type,
#include "cells/cells.inc"
#undef CELL
  kCount
};

// Runs<N> for code that is not a template over cells.
struct RunList {
  int count;
  Run run[2];  // the second may be empty

  template <int N>
  FUSEDRNN_HD constexpr RunList(const Runs<N>& runs) : count(N), run{} {
    static_assert(N <= 2, "a cell has at most two runs");
    for (int i = 0; i < N; i++) run[i] = runs.run[i];
  }
  FUSEDRNN_HD constexpr const Run* begin() const { return run; }
  FUSEDRNN_HD constexpr const Run* end() const { return run + count; }
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

struct CellRuns {
  RunList x, h;
};
constexpr CellRuns cell_runs(Cell cell, bool layer_norm) {
  switch (cell) {
#define CELL(mode, type)                                                     \
  case Cell::k##type:                                                        \
    if (layer_norm) return {Normed<type>::x_runs(), Normed<type>::h_runs()}; \
    return {type::x_runs(), type::h_runs()};
#include "cells/cells.inc"
#undef CELL
    default:
      return {Runs<1>{}, Runs<1>{}};
  }
}

}  // namespace fusedrnn
