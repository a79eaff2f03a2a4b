// Registers the ops and makes the Python module fusedrnn_C, whose few functions need no tensors.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cuda/device.h"
#include "cuda/elementwise.h"
#include "plan/cuda_plan.h"
#include "torch/named_arguments.h"
#include "torch/ops.h"
#include "torch/switches.h"

namespace {

using namespace fusedrnn;

// Runs f, turning a C++ exception into a Python one.
template <class F>
PyObject* guarded(F f) {
  try {
    return f();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

// A function of keyword arguments as the method table has it.
template <PyObject* (*function)(const NamedArguments&)>
PyObject* call_by_name(PyObject*, PyObject* positional, PyObject* named) {
  if (PyTuple_Size(positional)) {
    PyErr_SetString(PyExc_TypeError, "expected keyword arguments only");
    return nullptr;
  }
  return guarded([&] { return function(NamedArguments(named)); });
}
template <PyObject* (*function)(const NamedArguments&)>
PyMethodDef by_name(const char* name, const char* doc) {
  const auto pointer = reinterpret_cast<void (*)()>(call_by_name<function>);
  return {name, reinterpret_cast<PyCFunction>(pointer), METH_VARARGS | METH_KEYWORDS, doc};
}

DType dtype_of(const std::string& name) {
  for (int i = 0; i < int(DType::kCount); i++)
    if (name == traits(DType(i)).name) return DType(i);
  throw std::runtime_error("fusedrnn: unknown dtype " + name);
}

// Of `mode`, `dtype`, `hidden_size`, `proj_size`, `num_layers` and `bidirectional`.
Problem problem_of(const NamedArguments& a) {
  Problem p{};
  p.cell = cell_of(a.text("mode"));
  p.dtype = dtype_of(a.text("dtype"));
  p.hidden_size = a.integer("hidden_size"), p.proj_size = a.integer("proj_size");
  p.num_layers = a.integer("num_layers"), p.num_directions = a.flag("bidirectional") ? 2 : 1;
  return p;
}

PyObject* reserve_bytes(const NamedArguments& a) {
  Problem p = problem_of(a);
  p.zoneout = a.flag("zoneout"), p.all_states = a.flag("all_states");
  p.layer_norm = a.flag("layer_norm");
  return PyLong_FromLongLong(Reserve(p).bytes_per_token());
}

DeviceSpec device_of(const NamedArguments& a) {
  DeviceSpec device{};
  device.capability = int(a.integer("capability"));
  device.processors = int(a.integer("processors"));
  device.shared_bytes = int(a.integer("shared_bytes"));
  const std::vector<int64_t> clusters = a.integers("clusters");
  for (size_t i = 0; i < clusters.size() && i < kLargestCluster; i++)
    device.clusters[i + 1] = int(clusters[i]);
  return device;
}

PyObject* cuda_plan(const NamedArguments& a) {
  const CudaRequest request{a.integer("steps"), a.integer("batch"), a.flag("backward"),
                            a.flag("tf32")};
  Problem p = problem_of(a);
  p.layer_norm = a.flag("layer_norm");
  CudaPlan plan;
  std::string reason;
  if (!plan_cuda(p, request, device_of(a.group("device")), a.text("forced").c_str(), &plan,
                 &reason)) {
    PyErr_SetString(PyExc_ValueError, reason.c_str());
    throw PythonError();
  }
  return PyUnicode_FromString(describe(plan).c_str());
}

PyObject* cuda_device(PyObject*, PyObject*) {
  return guarded([] {
    DeviceSpec device{};
#ifdef FUSEDRNN_WITH_CUDA
    if (const int error = device_spec(&device)) throw std::runtime_error(error_text(error));
#else
    throw std::runtime_error("this build has no CUDA kernels");
#endif
    PyObject* clusters = PyTuple_New(kLargestCluster);
    for (int i = 0; clusters && i < kLargestCluster; i++)
      PyTuple_SetItem(clusters, i, PyLong_FromLong(device.clusters[i + 1]));
    return Py_BuildValue("{sisisisN}", "capability", device.capability, "processors",
                         device.processors, "shared_bytes", device.shared_bytes, "clusters",
                         clusters);
  });
}

PyObject* cpu_variants(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  int count;
  const InstalledVariant* all = installed_variants(&count);
  for (int i = 0; list && i < count; i++) {
    PyObject* entry = Py_BuildValue("(sO)", all[i].name, all[i].supported ? Py_True : Py_False);
    if (!entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
    Py_XDECREF(entry);
  }
  return list;
}

PyObject* cpu_variant(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(this_machine(1).variants[0].name); });
}

PyObject* cpu_plan(const NamedArguments& a) {
  Problem p = problem_of(a);
  p.input_size = a.integer("input_size"), p.one_hot = a.flag("one_hot");
  p.zoneout = a.flag("zoneout"), p.layer_norm = a.flag("layer_norm");
  p.all_states = a.flag("return_all");
  CpuRequest request{};
  request.backward = a.flag("backward");
  request.steps = request.longest = a.integer("steps");
  request.batch = a.integer("batch"), request.tokens = a.integer("tokens");
  request.resets = a.flag("resets"), request.recurrent_dropout = a.flag("recurrent_dropout");
  CpuMachine machine = this_machine(a.integer("threads"));
  const CpuPlan plan = plan_cpu_here(p, request, &machine);
  return PyUnicode_FromString(describe(plan, p, request, machine).c_str());
}

PyObject* cuda_archs(PyObject*, PyObject*) {
#ifdef FUSEDRNN_CUDA_ARCHS
  return PyUnicode_FromString(FUSEDRNN_CUDA_ARCHS);
#else
  return PyUnicode_FromString("");
#endif
}

// fusedrnn/_C.pyi has their arguments and results.
PyMethodDef methods[] = {
    by_name<reserve_bytes>("reserve_bytes", "bytes per token that forward leaves for backward"),
    {"cpu_variants", cpu_variants, METH_NOARGS,
     "[(instruction set, whether this processor has it)], best first"},
    {"cpu_variant", cpu_variant, METH_NOARGS, "the instruction set in use"},
    by_name<cpu_plan>("cpu_plan", "how the CPU would divide a call, in words"),
    {"cuda_device", cuda_device, METH_NOARGS, "what the planner asks of the current CUDA device"},
    by_name<cuda_plan>("cuda_plan", "how a GPU would divide a call, in words"),
    {"cuda_archs", cuda_archs, METH_NOARGS, "the GPU architectures in this binary, separated by ;"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(kForwardSchema);
  m.def(kInferSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("forward", forward<forward_cpu>);
  m.impl("infer", infer<forward_cpu>);
  m.impl("backward", backward<backward_cpu>);
}

#ifdef FUSEDRNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("forward", forward<forward_cuda>);
  m.impl("infer", infer<forward_cuda>);
  m.impl("backward", backward<backward_cuda>);
}
#endif

PyMODINIT_FUNC PyInit_fusedrnn_C() {
  static PyModuleDef def{};
  def.m_base = PyModuleDef_HEAD_INIT;
  def.m_name = "fusedrnn_C", def.m_size = -1, def.m_methods = methods;
  PyObject* module = PyModule_Create(&def);
  if (module && PyModule_AddStringConstant(module, "__version__", FUSEDRNN_VERSION) < 0)
    Py_CLEAR(module);
  return module;
}
