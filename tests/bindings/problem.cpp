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

  py::native_enum<DType> dtypes(m, "DType", "enum.Enum", "By torch's names.");
  for (int i = 0; i < int(DType::kCount); i++) dtypes.value(traits(DType(i)).name, DType(i));
  dtypes.finalize();

  py::native_enum<Stored>(m, "Stored", "enum.Enum", "How weights are stored.")
      .value("plain", Stored::kPlain)
      .value("int8", Stored::kInt8)
      .value("bfloat16", Stored::kBFloat16)
      .finalize();

  using T = Problem;
  auto type = structure<T>(m, "Problem");
  fields(type, NAMED(cell), NAMED(dtype), NAMED(input_size), NAMED(hidden_size), NAMED(one_hot),
         NAMED(proj_size), NAMED(num_layers), NAMED(num_directions), NAMED(bias), NAMED(zoneout),
         NAMED(all_states), NAMED(layer_norm), NAMED(stored));
}
