// From a dtype or a cell as a value to one as a type, for launches.
#pragma once
#include "cuda/primitives.h"
#include "plan/problem.h"

namespace fusedrnn {

// Calls f with a value of the storage type.
template <class F>
int with_dtype(DType dtype, F f) {
  switch (dtype) {
#define DTYPE(name, torch_name, scalar_type, bytes, compute_bytes) \
  case DType::k##name:                                             \
    return f(name{});
#include "plan/dtypes.inc"
#undef DTYPE
    default:
      return kInvalidValue;
  }
}

// Calls f with a value of the cell's struct.
template <class F>
int with_cell(Cell cell, F f) {
  switch (cell) {
#define CELL(mode, type) \
  case Cell::k##type:    \
    return f(type{});
#include "cells/cells.inc"
#undef CELL
    default:
      return kInvalidValue;
  }
}

}  // namespace fusedrnn
