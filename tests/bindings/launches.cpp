// The structures of kernel launches, for the emulator: their bytes, and where their pointers lie.
#include "bindings/bindings.h"
#include "cuda/elementwise.h"
#include "cuda/persistent/persistent.h"
#include "cuda/stepwise/cell_step.h"
#include "emulator/programs.h"

using namespace fusedrnn;

namespace {

template <class T, class M>
size_t offset_of(M member) {
  static const T sample{};
  return size_t(reinterpret_cast<const char*>(&(sample.*member)) -
                reinterpret_cast<const char*>(&sample));
}

// A structure with its `bytes`, and a table `pointers`: where each lies in it.
template <class T>
py::class_<T> launch(py::module_& m, const char* name) {
  auto type = structure<T>(m, name);
  type.def("__bytes__", [](const T& params) {
    return py::bytes(reinterpret_cast<const char*>(&params), sizeof params);
  });
  type.attr("pointers") = py::dict();
  return type;
}

template <class T, class M, class... More>
void pointers(py::class_<T>& type, const char* name, M member, More... more) {
  type.attr("pointers")[name] = offset_of<T>(member);
  if constexpr (sizeof...(more)) pointers(type, more...);
}

template <class T>
py::class_<T> cell_step(py::module_& m, const char* name) {
  auto type = launch<T>(m, name);
  fields(type, NAMED(cell), NAMED(dtype), NAMED(batch), NAMED(hidden_size), NAMED(step),
         NAMED(steps), NAMED(reverse), NAMED(c_stride));
  pointers(type, NAMED(lengths));
  return type;
}

void bind_cell_forward(py::module_& m) {
  using T = CellForward;
  auto type = cell_step<T>(m, "CellForward");
  fields(type, NAMED(gates_x_stride), NAMED(gates_h_stride), NAMED(y_stride));
  pointers(type, NAMED(gates_x), NAMED(gates_h), NAMED(b_ih), NAMED(b_hh), NAMED(h), NAMED(c),
           NAMED(operand), NAMED(y), NAMED(saved), NAMED(saved_c));
}

void bind_cell_backward(py::module_& m) {
  using T = CellBackward;
  auto type = cell_step<T>(m, "CellBackward");
  fields(type, NAMED(h_stride), NAMED(dy_stride));
  pointers(type, NAMED(saved), NAMED(h), NAMED(h_prev), NAMED(c), NAMED(c_prev), NAMED(h0),
           NAMED(c0), NAMED(dy), NAMED(dh_product), NAMED(dh), NAMED(dc), NAMED(dgates),
           NAMED(hidden));
}

// The pointers of stage i are named (i, name).
template <class T, class Stage>
void persistent(py::module_& m, const char* name, const py::class_<Stage>& stage) {
  auto type = launch<T>(m, name);
  fields(type, NAMED(cell), NAMED(dtype), NAMED(engine), NAMED(cluster), NAMED(chained),
         NAMED(stages), NAMED(batch), NAMED(hidden_size), NAMED(steps), NAMED(mask_scale),
         NAMED(c_stride), NAMED(shape), NAMED(first_slice), NAMED(slices));
  pointers(type, NAMED(lengths), NAMED(offsets), NAMED(order));
  const py::dict table = type.attr("pointers"), of_stage = stage.attr("pointers");
  for (int i = 0; i < kMaxStages; i++)
    for (const auto& [field, offset] : of_stage)
      table[py::make_tuple(i, field)] =
          offset_of<T>(&T::stage) + size_t(i) * sizeof(Stage) + py::cast<size_t>(offset);
  type.def_property_readonly("stage", [](const py::object& self) {
    py::list list;
    for (Stage& s : self.cast<T&>().stage)
      list.append(py::cast(&s, py::return_value_policy::reference_internal, self));
    return list;
  });
}

void bind_persistent_forward(py::module_& m) {
  using T = ForwardStage;
  auto type = launch<T>(m, "ForwardStage");
  fields(type, NAMED(y_stride), NAMED(reverse));
  pointers(type, NAMED(w_hh), NAMED(b_ih), NAMED(b_hh), NAMED(gates_x), NAMED(w_ih), NAMED(mask),
           NAMED(h0), NAMED(c0), NAMED(hn), NAMED(cn), NAMED(y), NAMED(saved), NAMED(saved_c));
  persistent<PersistentForward>(m, "PersistentForward", type);
}

void bind_persistent_backward(py::module_& m) {
  using T = BackwardStage;
  auto type = launch<T>(m, "BackwardStage");
  fields(type, NAMED(y_stride), NAMED(dy_stride), NAMED(reverse));
  pointers(type, NAMED(w_hh), NAMED(saved), NAMED(saved_c), NAMED(y), NAMED(h0), NAMED(c0),
           NAMED(dy), NAMED(above), NAMED(above_mask), NAMED(w_ih), NAMED(dx), NAMED(dgates),
           NAMED(dhn), NAMED(dcn), NAMED(dh0), NAMED(dc0));
  persistent<PersistentBackward>(m, "PersistentBackward", type);
}

void bind_row_sums(py::module_& m) {
  using T = RowSums;
  auto type = launch<T>(m, "RowSums");
  fields(type, NAMED(dtype), NAMED(tokens), NAMED(width), NAMED(columns), NAMED(stride));
  pointers(type, NAMED(values), NAMED(rows), NAMED(out));
}

void bind_program(py::module_& m) {
  using T = Program;
  auto type = launch<T>(m, "Program");
  fields(type, NAMED(blocks), NAMED(threads), NAMED(cluster), NAMED(shared_bytes),
         NAMED(cooperative), NAMED(bug));
  pointers(type, NAMED(name), NAMED(a), NAMED(b), NAMED(out));
}

}  // namespace

void bind_launches(py::module_& m) {
  bind_cell_forward(m);
  bind_cell_backward(m);
  bind_persistent_forward(m);
  bind_persistent_backward(m);
  bind_row_sums(m);
  bind_program(m);
}
