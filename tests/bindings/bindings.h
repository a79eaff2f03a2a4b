// Classes of Python for plain structures.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

namespace py = pybind11;

// Made from keyword arguments; what is not given is zero.
template <class T>
py::class_<T> structure(py::module_& m, const char* name) {
  py::class_<T> type(m, name);
  type.def(py::init([](const py::kwargs& fields) {
    auto made = std::make_unique<T>();
    const py::object self = py::cast(made.get(), py::return_value_policy::reference);
    for (const auto& [field, value] : fields) py::setattr(self, field, value);
    return made;
  }));
  return type;
}

// fields(type, NAMED(a), NAMED(b)): members of T, to be read and written.
#define NAMED(member) #member, &T::member

template <class T, class M, class... More>
void fields(py::class_<T>& type, const char* name, M member, More... more) {
  type.def_readwrite(name, member);
  if constexpr (sizeof...(more)) fields(type, more...);
}

void bind_problem(py::module_&);
void bind_cpu_plan(py::module_&);
void bind_cuda_plan(py::module_&);
void bind_launches(py::module_&);
