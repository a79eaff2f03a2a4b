// csrc/plan/problem.h: what is to be computed.
#include "plan/problem.h"

#include <pybind11/native_enum.h>

#include "bindings/bindings.h"

using namespace fusedrnn;

void bind_problem(py::module_& m) {
  py::native_enum<Cell> cells(m, "Cell", "enum.Enum", "By torch.nn's names.");
#define CELL(mode, type) cells.value(mode, Cell::k##type);
#include "cells/cells.inc"
#undef CELL
  cells.finalize();

  py::native_enum<DType>(m, "DType", "enum.Enum", "By torch's names.")
      .value("float64", DType::kFloat64)
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .finalize();

  using T = Problem;
  auto type = structure<T>(m, "Problem");
  fields(type, NAMED(cell), NAMED(dtype), NAMED(input_size), NAMED(hidden_size), NAMED(one_hot),
         NAMED(proj_size), NAMED(num_layers), NAMED(num_directions), NAMED(bias), NAMED(zoneout),
         NAMED(all_states), NAMED(layer_norm));
}
