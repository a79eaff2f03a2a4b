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
#include "torch/ops.h"
#include "torch/switches.h"

namespace {

using namespace fusedrnn;

// Runs f, turning a C++ exception into a Python one.
template <class F>
PyObject* guarded(F f) {
  try {
    return f();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

Problem problem_named(const char* mode, const std::string& dtype, int64_t hidden, int64_t proj,
                      int64_t layers, bool bidirectional) {
  Problem p{};
  p.cell = cell_of(mode);
  p.dtype = dtype == "float64"    ? DType::kFloat64
            : dtype == "float32"  ? DType::kFloat32
            : dtype == "bfloat16" ? DType::kBFloat16
                                  : DType::kFloat16;
  p.hidden_size = hidden, p.proj_size = proj, p.num_layers = layers;
  p.num_directions = bidirectional ? 2 : 1;
  return p;
}

PyObject* reserve_bytes(PyObject*, PyObject* args) {
  const char *mode, *dtype;
  long long hidden, proj, layers;
  int bidirectional, zoneout, all_states, layer_norm;
  if (!PyArg_ParseTuple(args, "ssLLLpppp", &mode, &dtype, &hidden, &proj, &layers, &bidirectional,
                        &zoneout, &all_states, &layer_norm))
    return nullptr;
  return guarded([&] {
    Problem p = problem_named(mode, dtype, hidden, proj, layers, bidirectional);
    p.zoneout = zoneout, p.all_states = all_states, p.layer_norm = layer_norm;
    return PyLong_FromLongLong(Reserve(p).bytes_per_token());
  });
}

PyObject* cuda_plan(PyObject*, PyObject* args) {
  const char *mode, *dtype, *forced;
  long long hidden, proj, layers, steps, batch;
  int bidirectional, backward, tf32;
  DeviceSpec device{};
  PyObject* clusters;
  if (!PyArg_ParseTuple(args, "ssLLLpLLppiiiO!s", &mode, &dtype, &hidden, &proj, &layers,
                        &bidirectional, &steps, &batch, &backward, &tf32, &device.capability,
                        &device.processors, &device.shared_bytes, &PyTuple_Type, &clusters,
                        &forced))
    return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_Size(clusters) && i < kLargestCluster; i++) {
    device.clusters[i + 1] = int(PyLong_AsLong(PyTuple_GetItem(clusters, i)));
    if (PyErr_Occurred()) return nullptr;
  }
  return guarded([&] {
    const Problem p = problem_named(mode, dtype, hidden, proj, layers, bidirectional);
    CudaPlan plan;
    std::string reason;
    if (!plan_cuda(p, {steps, batch, backward != 0, tf32 != 0}, device, forced, &plan, &reason)) {
      PyErr_SetString(PyExc_ValueError, reason.c_str());
      return static_cast<PyObject*>(nullptr);
    }
    return Py_BuildValue("(siiiiiiids)", kCudaBackendNames[int(plan.backend)], plan.layers,
                         plan.shape.team, plan.shape.units, plan.shape.rows, plan.slices,
                         plan.at_once, plan.shape.shared_bytes, plan.microseconds,
                         describe(plan).c_str());
  });
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
    return Py_BuildValue("(iiiN)", device.capability, device.processors, device.shared_bytes,
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

PyObject* cpu_plan(PyObject*, PyObject* args) {
  const char *mode, *dtype;
  long long input, hidden, proj, layers, batch, steps, tokens, threads;
  int one_hot, bidirectional, layer_norm;
  if (!PyArg_ParseTuple(args, "ssLpLLLppLLLL", &mode, &dtype, &input, &one_hot, &hidden, &proj,
                        &layers, &bidirectional, &layer_norm, &batch, &steps, &tokens, &threads))
    return nullptr;
  return guarded([&] {
    Problem p = problem_named(mode, dtype, hidden, proj, layers, bidirectional);
    p.input_size = input, p.one_hot = one_hot, p.layer_norm = layer_norm;
    const Kernels& k = kernels(p, batch, tokens);
    const CpuPlan plan =
        plan_cpu(p, k.costs(p.dtype), false, batch, tokens, threads, all_threads(), true);
    return Py_BuildValue("(sLLLLL)", k.name,
                         (long long)plan_direct(p, k.costs(p.dtype), steps, tokens, threads),
                         (long long)plan.threads, (long long)plan.rows_per_task,
                         (long long)plan.tasks, (long long)plan.members);
  });
}

PyObject* cuda_archs(PyObject*, PyObject*) {
#ifdef FUSEDRNN_CUDA_ARCHS
  return PyUnicode_FromString(FUSEDRNN_CUDA_ARCHS);
#else
  return PyUnicode_FromString("");
#endif
}

PyMethodDef methods[] = {
    {"reserve_bytes", reserve_bytes, METH_VARARGS,
     "reserve_bytes(mode, dtype, hidden_size, proj_size, num_layers, bidirectional, zoneout, "
     "all_states, layer_norm) -> bytes per token"},
    {"cpu_variants", cpu_variants, METH_NOARGS,
     "[(instruction set, whether this processor has it)], best first"},
    {"cpu_variant", cpu_variant, METH_NOARGS, "the instruction set in use"},
    {"cpu_plan", cpu_plan, METH_VARARGS,
     "cpu_plan(mode, dtype, input_size, one_hot, hidden_size, proj_size, num_layers, "
     "bidirectional, "
     "layer_norm, batch, steps, tokens, threads) -> (instruction set, threads without packing or "
     "0, "
     "threads, rows a task, tasks, threads a task)"},
    {"cuda_device", cuda_device, METH_NOARGS,
     "of the current CUDA device: (capability, processors, shared_bytes, clusters), for cuda_plan"},
    {"cuda_plan", cuda_plan, METH_VARARGS,
     "cuda_plan(mode, dtype, hidden_size, proj_size, num_layers, bidirectional, steps, batch, "
     "backward, tf32, capability, processors, shared_bytes, clusters, forced) -> (backend, layers, "
     "team, units, rows, slices, at_once, shared_bytes, microseconds, text)"},
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
