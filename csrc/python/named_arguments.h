// The keyword arguments of a Python function, by name.
#pragma once
#include <Python.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fusedrnn {

struct PythonError {};  // thrown where a Python exception is set

// Of a dictionary. What is missing, or of another type than it is asked for, is a TypeError.
class NamedArguments {
 public:
  explicit NamedArguments(PyObject* named) : named_(named) {}

  int64_t integer(const char* name) const { return as_integer(get(name)); }
  double number(const char* name) const {
    const double value = PyFloat_AsDouble(get(name));
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
  }
  bool flag(const char* name) const {
    const int value = PyObject_IsTrue(get(name));
    if (value < 0) throw PythonError();
    return value;
  }
  std::string text(const char* name) const {
    Py_ssize_t size;
    const char* value = PyUnicode_AsUTF8AndSize(get(name), &size);
    if (!value) throw PythonError();
    return {value, size_t(size)};
  }
  std::vector<int64_t> integers(const char* name) const {  // of a tuple
    PyObject* tuple = get(name);
    const Py_ssize_t size = PyTuple_Size(tuple);
    if (size < 0) throw PythonError();
    std::vector<int64_t> values;
    for (Py_ssize_t i = 0; i < size; i++) values.push_back(as_integer(PyTuple_GetItem(tuple, i)));
    return values;
  }
  NamedArguments group(const char* name) const {  // of a dictionary
    return NamedArguments(get(name));
  }

 private:
  PyObject* get(const char* name) const {
    PyObject* key = PyUnicode_FromString(name);
    PyObject* value = key && named_ ? PyDict_GetItemWithError(named_, key) : nullptr;
    Py_XDECREF(key);
    if (!value && !PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "missing argument '%s'", name);
    if (!value) throw PythonError();
    return value;
  }
  static int64_t as_integer(PyObject* object) {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
  }

  PyObject* named_;
};

}  // namespace fusedrnn
