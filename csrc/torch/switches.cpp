#include "torch/switches.h"

#include <Python.h>

#include <cstdlib>
#include <cstring>

#include "torch/error.h"

namespace fusedrnn {
namespace {

// The stable ABI has no word for these switches, Python has. `unknown` is what to assume where a
// torch does not have them either.
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

Float32Switches float32_switches() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const Float32Switches found{permits_tf32("torch.backends.cudnn", "rnn", false),
                              permits_tf32("torch.backends.cuda", "matmul", true)};
  PyGILState_Release(state);
  return found;
}

KernelSwitch kernel_switch() {
  const char* const found = std::getenv("FUSEDRNN_CUDA_KERNELS");
  if (!found || !*found || !std::strcmp(found, "verified")) return KernelSwitch::kVerified;
  if (!std::strcmp(found, "off")) return KernelSwitch::kOff;
  FUSEDRNN_EXPECT(!std::strcmp(found, "on"), "fusedrnn: FUSEDRNN_CUDA_KERNELS is '", found,
                  "'; it takes off, verified or on");
  return KernelSwitch::kOn;
}

const char* forced_plan() { return std::getenv("FUSEDRNN_PLAN"); }

}  // namespace fusedrnn
