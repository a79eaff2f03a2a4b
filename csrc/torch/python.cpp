#include "torch/python.h"

#include <Python.h>

#include "torch/error.h"

namespace fusedrnn {
namespace {

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

std::string text_of(PyObject* object) {
  PyObject* text = object ? PyObject_Str(object) : nullptr;
  const char* found = text ? PyUnicode_AsUTF8AndSize(text, nullptr) : nullptr;
  const std::string copy = found ? found : "unknown";
  Py_XDECREF(text);
  PyErr_Clear();
  return copy;
}

// The error that is set, which it clears.
std::string take_error() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  PyErr_Fetch(&type, &value, &trace);
  const std::string text = text_of(value);
  Py_XDECREF(type), Py_XDECREF(value), Py_XDECREF(trace);
  return text;
}

}  // namespace

void warn(const std::string& text) {
  bool raised;
  {
    const Gil gil;
    raised = PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 1) < 0;
    if (raised) PyErr_Clear();
  }
  if (raised) fail(text);
}

std::string check_family(int family, const char* ops, const std::string& device) {
  const Gil gil;
  PyObject* module = PyImport_ImportModule("fusedrnn.families");
  PyObject* found =
      module ? PyObject_CallMethod(module, "verify", "iss", family, ops, device.c_str()) : nullptr;
  const std::string reason = found ? text_of(found) : "could not be computed: " + take_error();
  Py_XDECREF(found), Py_XDECREF(module);
  return reason;
}

}  // namespace fusedrnn
