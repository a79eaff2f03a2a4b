// The Python module fusedrnn_C, whose few functions need no tensors. Loading it loads the library
// of the ops, which it asks.
#include <Python.h>

#include <cstring>
#include <exception>
#include <stdexcept>

#include "plan/inspection.h"
#include "python/host.h"
#include "python/named_arguments.h"

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

const Inspection& library() { return *fusedrnn_inspection(); }

DType dtype_of(const std::string& name) {
  for (int i = 0; i < int(DType::kCount); i++)
    if (name == traits(DType(i)).name) return DType(i);
  throw std::runtime_error("fusedrnn: unknown dtype " + name);
}
Cell cell_of(const std::string& mode) {
  for (int i = 0; i < int(Cell::kCount); i++)
    if (mode == traits(Cell(i)).mode) return Cell(i);
  throw std::runtime_error("fusedrnn: unknown mode " + mode);
}

Stored stored_of(const std::string& name) {
  return name == "int8" ? Stored::kInt8 : name == "bfloat16" ? Stored::kBFloat16 : Stored::kPlain;
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

PyObject* reserve_rows(const NamedArguments& a) {
  Problem p = problem_of(a);
  p.zoneout = a.flag("zoneout"), p.all_states = a.flag("all_states");
  p.layer_norm = a.flag("layer_norm");
  const Reserve reserve(p);
  PyObject* list = PyList_New(0);
  auto add = [&](int64_t count, int64_t row) {
    for (int64_t i = 0; list && i < count; i++) {
      PyObject* number = PyLong_FromLongLong(row);
      if (!number || PyList_Append(list, number) < 0) Py_CLEAR(list);
      Py_XDECREF(number);
    }
  };
  const int64_t stack = reserve.layers * reserve.directions;
  add(stack, reserve.cell_row), add(stack, reserve.scales_row), add(stack, reserve.slots_row);
  add(reserve.layers - 1, reserve.output_row);
  return list;
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
                            a.flag("tf32"),     a.flag("tangent"),  a.integer("members")};
  DeviceSpec device = device_of(a.group("device"));
  for (int64_t family : a.integers("struck"))
    if (family >= 0 && family < kFamilies) device.struck.set(size_t(family));
  Problem p = problem_of(a);
  p.layer_norm = a.flag("layer_norm");
  const PlanInWords found = library().cuda_plan(p, request, device, a.text("forced").c_str());
  if (!found.possible) {
    PyErr_SetString(PyExc_ValueError, found.text.c_str());
    throw PythonError();
  }
  return Py_BuildValue("(si)", found.text.c_str(), found.family);
}

PyObject* cuda_products(const NamedArguments& a) {
  const Float32Switches permitted{a.flag("recurrent"), a.flag("products")};
  const Float32Products found = float32_products(permitted, int(a.integer("capability")));
  return PyUnicode_FromString(in_words(found, permitted));
}

PyObject* cuda_families(PyObject*, PyObject*) {
  return guarded([] {
    PyObject* list = PyList_New(0);
    for (int i = 0; list && i < kFamilies; i++) {
      const Family f = family_at(i);
      if (!exists(f)) continue;
      auto flag = [](bool value) { return value ? Py_True : Py_False; };
      PyObject* entry =
          Py_BuildValue("(isssOOOs)", i, kExchangeNames[int(f.exchange)],
                        kArithmeticNames[int(f.arithmetic)], traits(f.cell).mode, flag(f.backward),
                        flag(f.chained), flag(f.tangent), library().name_of_family(f).c_str());
      if (!entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
      Py_XDECREF(entry);
    }
    return list;
  });
}

PyObject* cuda_plans(const NamedArguments& a) {
  const CudaRequest request{a.integer("steps"), a.integer("batch"), a.flag("backward"),
                            a.flag("tf32")};
  const NamedArguments given = a.group("model");
  CudaModel model;
#define CONSTANT(name, value) model.name = given.number(#name);
#include "plan/cuda_model.inc"
#undef CONSTANT
  std::vector<EstimatedPlan> plans;
  std::string reason;
  if (!library().cuda_plans(problem_of(a), request, device_of(a.group("device")),
                            a.text("forced").c_str(), model, &plans, &reason)) {
    PyErr_SetString(PyExc_ValueError, reason.c_str());
    throw PythonError();
  }
  PyObject* list = PyList_New(Py_ssize_t(plans.size()));
  for (size_t i = 0; list && i < plans.size(); i++) {
    PyObject* entry = Py_BuildValue("(sd)", plans[i].forcing.c_str(), plans[i].microseconds);
    if (!entry || PyList_SetItem(list, Py_ssize_t(i), entry) < 0) Py_CLEAR(list);
  }
  return list;
}

PyObject* cuda_model(PyObject*, PyObject*) {
  PyObject* found = PyDict_New();
  const CudaModel model;
  auto add = [&](const char* name, double value) {
    PyObject* number = PyFloat_FromDouble(value);
    if (found && (!number || PyDict_SetItemString(found, name, number) < 0)) Py_CLEAR(found);
    Py_XDECREF(number);
  };
#define CONSTANT(name, value) add(#name, model.name);
#include "plan/cuda_model.inc"
#undef CONSTANT
  return found;
}

PyObject* cuda_device(PyObject*, PyObject*) {
  return guarded([] {
    const DeviceSpec device = library().cuda_device();
    PyObject* clusters = PyTuple_New(kLargestCluster);
    for (int i = 0; clusters && i < kLargestCluster; i++)
      PyTuple_SetItem(clusters, i, PyLong_FromLong(device.clusters[i + 1]));
    return Py_BuildValue("{sisisisN}", "capability", device.capability, "processors",
                         device.processors, "shared_bytes", device.shared_bytes, "clusters",
                         clusters);
  });
}

PyObject* cuda_versions(PyObject*, PyObject*) {
  int runtime = 0, driver = 0;
  library().cuda_versions(&runtime, &driver);
  return Py_BuildValue("(ii)", runtime, driver);
}

PyObject* release_scratch(PyObject*, PyObject*) {
  library().release_scratch();
  Py_RETURN_NONE;
}

PyObject* cpu_variants(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  int count;
  const InstalledVariant* all = library().cpu_variants(&count);
  for (int i = 0; list && i < count; i++) {
    PyObject* entry = Py_BuildValue("(sO)", all[i].name, all[i].supported ? Py_True : Py_False);
    if (!entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
    Py_XDECREF(entry);
  }
  return list;
}

PyObject* cpu_variant(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(library().cpu_variant().c_str()); });
}

PyObject* cpu_plan(const NamedArguments& a) {
  Problem p = problem_of(a);
  p.input_size = a.integer("input_size"), p.one_hot = a.flag("one_hot");
  p.zoneout = a.flag("zoneout"), p.layer_norm = a.flag("layer_norm");
  p.all_states = a.flag("return_all"), p.stored = stored_of(a.text("stored"));
  CpuRequest request{};
  request.backward = a.flag("backward");
  request.steps = request.longest = a.integer("steps");
  request.batch = a.integer("batch"), request.tokens = a.integer("tokens");
  request.ensemble = a.integer("members");
  request.resets = a.flag("resets"), request.recurrent_dropout = a.flag("recurrent_dropout");
  return PyUnicode_FromString(library().cpu_plan(p, request, a.integer("threads")).c_str());
}

PyObject* cuda_archs(PyObject*, PyObject*) { return PyUnicode_FromString(library().cuda_archs); }

// fusedrnn/_C.pyi has their arguments and results.
PyMethodDef methods[] = {
    by_name<reserve_rows>(
        "reserve_rows",
        "the arrays that forward leaves for backward, in order: bytes of each per token"),
    {"cpu_variants", cpu_variants, METH_NOARGS,
     "[(instruction set, whether this processor has it)], best first"},
    {"cpu_variant", cpu_variant, METH_NOARGS, "the instruction set in use"},
    {"release_scratch", release_scratch, METH_NOARGS,
     "returns to the system what pools on the CPU keep between calls"},
    by_name<cpu_plan>("cpu_plan", "how the CPU would divide a call, in words"),
    {"cuda_device", cuda_device, METH_NOARGS, "what the planner asks of the current CUDA device"},
    by_name<cuda_plan>("cuda_plan", "how a GPU would divide a call, in words; its family's index"),
    by_name<cuda_products>("cuda_products", "how float32 is multiplied over all steps, in words"),
    {"cuda_families", cuda_families, METH_NOARGS, "the kernel families: see Family in families.py"},
    {"cuda_versions", cuda_versions, METH_NOARGS, "of the binary's CUDA runtime, of the driver"},
    by_name<cuda_plans>("cuda_plans", "[(FUSEDRNN_PLAN, estimated microseconds)], fastest first"),
    {"cuda_model", cuda_model, METH_NOARGS, "the constants of the planner's estimate"},
    {"cuda_archs", cuda_archs, METH_NOARGS, "the GPU architectures in this binary, separated by ;"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit_fusedrnn_C() {
  if (std::strcmp(library().version, FUSEDRNN_VERSION)) {
    PyErr_Format(PyExc_ImportError, "libfusedrnn.so beside it is of version %s", library().version);
    return nullptr;
  }
  library().set_host(python_host());
  static PyModuleDef def{};
  def.m_base = PyModuleDef_HEAD_INIT;
  def.m_name = "fusedrnn_C", def.m_size = -1, def.m_methods = methods;
  PyObject* module = PyModule_Create(&def);
  if (module && PyModule_AddStringConstant(module, "__version__", FUSEDRNN_VERSION) < 0)
    Py_CLEAR(module);
  return module;
}
