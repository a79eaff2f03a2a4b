// csrc/plan/cuda_plan.h and persistent.h: how a GPU divides a call.
#include "plan/cuda_plan.h"

#include <pybind11/native_enum.h>

#include <algorithm>
#include <vector>

#include "bindings/bindings.h"

using namespace fusedrnn;

namespace {

// Of 1, 2, ... blocks.
std::vector<int> clusters(const DeviceSpec& d) {
  return {d.clusters + 1, d.clusters + kLargestCluster + 1};
}
void set_clusters(DeviceSpec& d, const std::vector<int>& counts) {
  if (counts.size() > kLargestCluster) throw py::value_error("clusters of at most 16 blocks");
  std::fill_n(d.clusters, kLargestCluster + 1, 0);
  std::copy(counts.begin(), counts.end(), d.clusters + 1);
}

std::vector<int> struck(const DeviceSpec& d) {
  std::vector<int> found;
  for (int i = 0; i < kFamilies; i++)
    if (d.struck[size_t(i)]) found.push_back(i);
  return found;
}
void set_struck(DeviceSpec& d, const std::vector<int>& families) {
  d.struck.reset();
  for (int i : families) d.struck.set(size_t(i));
}

CudaPlan plan(const Problem& p, const CudaRequest& request, const DeviceSpec& device,
              const std::string& forced) {
  CudaPlan made{};
  std::string reason;
  if (!plan_cuda(p, request, device, forced.c_str(), &made, &reason)) throw py::value_error(reason);
  return made;
}

void bind_device(py::module_& m) {
  using T = DeviceSpec;
  auto type = structure<T>(m, "DeviceSpec");
  fields(type, NAMED(capability), NAMED(processors), NAMED(shared_bytes));
  type.def_property("clusters", clusters, set_clusters);
  type.def_property("struck", struck, set_struck);
}

void bind_request(py::module_& m) {
  using T = CudaRequest;
  auto type = structure<T>(m, "CudaRequest");
  fields(type, NAMED(steps), NAMED(batch), NAMED(backward), NAMED(tf32), NAMED(tangent),
         NAMED(members));
}

void bind_shape(py::module_& m) {
  py::native_enum<Engine>(m, "Engine", "enum.Enum")
      .value("ffma", Engine::kFfma)
      .value("ffma_narrow", Engine::kFfmaNarrow)
      .value("tf32", Engine::kTf32)
      .value("half", Engine::kHalf)
      .finalize();
  using T = PersistentShape;
  auto type = structure<T>(m, "PersistentShape");
  fields(type, NAMED(team), NAMED(units), NAMED(rows), NAMED(shared_bytes));
  type.def_property_readonly("kept", [](const T& s) { return s.recurrent.kept; });
  auto shape = [&](const char* name, auto function) {
    m.def(name, function, py::kw_only(), py::arg("cell"), py::arg("engine"), py::arg("cluster"),
          py::arg("hidden_size"), py::arg("units"), py::arg("rows"), py::arg("chained"));
  };
  shape("forward_shape", forward_shape);
  shape("backward_shape", backward_shape);
}

void bind_plan(py::module_& m) {
  py::native_enum<CudaBackend> backends(m, "CudaBackend", "enum.Enum");
  for (int i = 0; i < int(CudaBackend::kCount); i++)
    backends.value(kCudaBackendNames[i], CudaBackend(i));
  backends.finalize();

  using T = CudaPlan;
  auto type = structure<T>(m, "CudaPlan");
  fields(type, NAMED(backend), NAMED(layers), NAMED(engine), NAMED(shape), NAMED(slices),
         NAMED(at_once), NAMED(microseconds));
  type.def("__str__", describe);
  m.def("plan_cuda", plan, py::arg("problem"), py::arg("request"), py::arg("device"),
        py::arg("forced") = "", "Raises ValueError where nothing that `forced` allows can run.");
}

}  // namespace

void bind_cuda_plan(py::module_& m) {
  bind_device(m);
  bind_request(m);
  bind_shape(m);
  bind_plan(m);
}
