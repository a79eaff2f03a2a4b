// Registers the ops and makes the Python module fusedrnn_C, whose few functions need no tensors.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <stdexcept>

#include "cpu/stack.h"
#include "cuda/device.h"
#include "cuda/elementwise.h"
#include "plan/cpu_plan.h"
#include "plan/cuda_plan.h"
#include "torch/arguments.h"
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
template <PyObject* (*function)(const Arguments&)>
PyObject* call_by_name(PyObject*, PyObject* positional, PyObject* named) {
  if (PyTuple_Size(positional)) {
    PyErr_SetString(PyExc_TypeError, "expected keyword arguments only");
    return nullptr;
  }
  return guarded([&] { return function(Arguments(named)); });
}
template <PyObject* (*function)(const Arguments&)>
PyMethodDef by_name(const char* name, const char* doc) {
  const auto pointer = reinterpret_cast<void (*)()>(call_by_name<function>);
  return {name, reinterpret_cast<PyCFunction>(pointer), METH_VARARGS | METH_KEYWORDS, doc};
}

// Of `mode`, `dtype`, `hidden_size`, `proj_size`, `num_layers` and `bidirectional`.
Problem problem_of(const Arguments& a) {
  Problem p{};
  p.cell = cell_of(a.text("mode"));
  const std::string dtype = a.text("dtype");
  p.dtype = dtype == "float64"    ? DType::kFloat64
            : dtype == "float32"  ? DType::kFloat32
            : dtype == "bfloat16" ? DType::kBFloat16
                                  : DType::kFloat16;
  p.hidden_size = a.integer("hidden_size"), p.proj_size = a.integer("proj_size");
  p.num_layers = a.integer("num_layers"), p.num_directions = a.flag("bidirectional") ? 2 : 1;
  return p;
}

PyObject* reserve_bytes(const Arguments& a) {
  Problem p = problem_of(a);
  p.zoneout = a.flag("zoneout"), p.all_states = a.flag("all_states");
  p.layer_norm = a.flag("layer_norm");
  return PyLong_FromLongLong(Reserve(p).bytes_per_token());
}

DeviceSpec device_of(const Arguments& a) {
  DeviceSpec device{};
  device.capability = int(a.integer("capability"));
  device.processors = int(a.integer("processors"));
  device.shared_bytes = int(a.integer("shared_bytes"));
  const std::vector<int64_t> clusters = a.integers("clusters");
  for (size_t i = 0; i < clusters.size() && i < kLargestCluster; i++)
    device.clusters[i + 1] = int(clusters[i]);
  return device;
}

PyObject* cuda_plan(const Arguments& a) {
  const CudaRequest request{a.integer("steps"), a.integer("batch"), a.flag("backward"),
                            a.flag("tf32")};
  CudaPlan plan;
  std::string reason;
  if (!plan_cuda(problem_of(a), request, device_of(a.group("device")), a.text("forced").c_str(),
                 &plan, &reason)) {
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
  const Variant* all = variants(&count);
  for (int i = 0; list && i < count; i++) {
    PyObject* entry =
        Py_BuildValue("(sO)", all[i].kernels->name, all[i].supported ? Py_True : Py_False);
    if (!entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
    Py_XDECREF(entry);
  }
  return list;
}

PyObject* cpu_variant(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(kernels().name); });
}

PyObject* cpu_plan(const Arguments& a) {
  Problem p = problem_of(a);
  p.input_size = a.integer("input_size"), p.one_hot = a.flag("one_hot");
  p.layer_norm = a.flag("layer_norm");
  const int64_t batch = a.integer("batch"), steps = a.integer("steps");
  const int64_t tokens = a.integer("tokens"), threads = a.integer("threads");
  const Kernels& k = kernels(p, batch, tokens);
  const CpuPlan plan =
      plan_cpu(p, k.costs(p.dtype), false, batch, tokens, threads, all_threads(), true);
  return Py_BuildValue("(sLLLLL)", k.name,
                       (long long)plan_direct(p, k.costs(p.dtype), steps, tokens, threads),
                       (long long)plan.threads, (long long)plan.rows_per_task,
                       (long long)plan.tasks, (long long)plan.members);
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
    by_name<cpu_plan>("cpu_plan", "how the CPU would divide a forward call"),
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
  m.impl("forward", TORCH_BOX(&forward<forward_cpu>));
  m.impl("infer", TORCH_BOX(&infer<forward_cpu>));
  m.impl("backward", TORCH_BOX(&backward<backward_cpu>));
}

#ifdef FUSEDRNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward<forward_cuda>));
  m.impl("infer", TORCH_BOX(&infer<forward_cuda>));
  m.impl("backward", TORCH_BOX(&backward<backward_cuda>));
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
