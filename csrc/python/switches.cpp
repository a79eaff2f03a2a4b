#include "python/switches.h"

#include <Python.h>

#include <cstring>

namespace fusedrnn {
namespace {

// `unknown` is what to assume where a torch does not have the switch.
bool permits_tf32(const char* module, const char* group, bool unknown) {
  bool found = unknown;
  PyObject* backend = PyImport_ImportModule(module);
  PyObject* settings = backend ? PyObject_GetAttrString(backend, group) : nullptr;
  PyObject* precision = settings ? PyObject_GetAttrString(settings, "fp32_precision") : nullptr;
  const char* text = precision ? PyUnicode_AsUTF8AndSize(precision, nullptr) : nullptr;
  if (text) found = !std::strcmp(text, "tf32");
  PyErr_Clear();
  Py_XDECREF(precision), Py_XDECREF(settings), Py_XDECREF(backend);
  return found;
}

}  // namespace

Float32Switches switches_of_python() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const Float32Switches found{permits_tf32("torch.backends.cudnn", "rnn", false),
                              permits_tf32("torch.backends.cuda", "matmul", true)};
  PyGILState_Release(state);
  return found;
}

}  // namespace fusedrnn
