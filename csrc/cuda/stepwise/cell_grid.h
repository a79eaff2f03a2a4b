// How the threads of a cell's kernel divide a step, and its launch.
//
// A thread owns one unit j of the rows b, b + kRows * gridDim.y, ... It reads and writes the
// elements (b, j) of every array, of all gates and slots, and no other thread's: nothing is shared
// and nothing waits. A warp holds 32 units side by side, so that what it loads and stores is
// contiguous.
#pragma once
#include "cells/cells.h"
#include "cuda/dispatch.h"
#include "cuda/stepwise/cell_step.h"

namespace fusedrnn {

constexpr int kUnits = 32, kRows = 8;  // of a block

// f(b, j) for all that a thread owns.
template <class F>
__device__ inline void each_cell(const CellStep& p, F f) {
  const int64_t j = int64_t(blockIdx.x) * kUnits + threadIdx.x;
  if (j >= p.hidden_size) return;
  for (int64_t b = int64_t(blockIdx.y) * kRows + threadIdx.y; b < p.batch;
       b += int64_t(gridDim.y) * kRows)
    f(b, j);
}

// h = what a product gave: lets the kernels finish a step whose h is projected.
struct Projection {
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0;
  static constexpr bool kHasCell = false, kUsesHPrev = false;
  static FUSEDRNN_HD constexpr GateRanges<1> x_ranges() { return {{{0, 0, 1}}}; }
  static FUSEDRNN_HD constexpr GateRanges<1> h_ranges() { return {{{0, 0, 0}}}; }

  template <class M, class V>
  static FUSEDRNN_HD V forward(V (&s)[1], V, V&) {
    return s[0];
  }
  template <class M, class V>
  static FUSEDRNN_HD V backward(V (&s)[1], V, V, V, V, V dh, V&) {
    s[0] = dh;
    return V{};
  }
};

// The kernel of `select`, a function of a cell and a value of the storage type, on all of p.
template <class P, class F>
int run(const CellStep& step, const P& p, void* stream, F select) {
  if (step.batch == 0 || step.hidden_size == 0) return 0;
  const int64_t columns = (step.hidden_size + kUnits - 1) / kUnits;
  const int64_t rows = (step.batch + kRows - 1) / kRows;
  if (columns > INT32_MAX) return kInvalidValue;
  Grid grid{dim3(unsigned(columns), unsigned(rows < 65535 ? rows : 65535)), dim3(kUnits, kRows)};
  return with_dtype(step.dtype, [&](auto s) { return launch(select(s), grid, stream, p); });
}
}  // namespace fusedrnn
