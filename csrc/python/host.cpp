#include "python/host.h"

#include <Python.h>

#include <cstring>

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

Float32Switches float32_switches() {
  const Gil gil;
  return {permits_tf32("torch.backends.cudnn", "rnn", false),
          permits_tf32("torch.backends.cuda", "matmul", true)};
}

bool warn(const std::string& text) {
  const Gil gil;
  const bool raised = PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 1) < 0;
  if (raised) PyErr_Clear();
  return !raised;
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

}  // namespace

const Host& python_host() {
  static constexpr Host host{
      .float32_switches = float32_switches, .warn = warn, .check_family = check_family};
  return host;
}

}  // namespace fusedrnn
