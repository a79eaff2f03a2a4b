// csrc/plan/cpu_plan.h: how a CPU divides a call.
#include "plan/cpu_plan.h"

#include <pybind11/native_enum.h>

#include <map>
#include <string>
#include <vector>

#include "bindings/bindings.h"

using namespace fusedrnn;

namespace {

// CpuVariant and CpuMachine, but with what their pointers point to.
struct Variant {
  std::string name;
  std::map<DType, CpuCosts> costs;

  CpuVariant value() const {
    CpuVariant v{};
    v.name = name.c_str();
    for (const auto& [dtype, cost] : costs) v.costs[int(dtype)] = cost;
    return v;
  }
};

struct Machine {
  std::vector<Variant> variants;
  bool named, tiles, all_threads, quick_l3;
  int64_t threads, l3_bytes;

  // What f makes of the CpuMachine.
  template <class F>
  auto with(F f) const {
    std::vector<CpuVariant> values;
    for (const Variant& v : variants) values.push_back(v.value());
    if (values.empty()) throw py::value_error("a machine without variants");
    return f(CpuMachine{values.data(), int(values.size()), named, tiles, threads, all_threads,
                        l3_bytes, quick_l3});
  }
};

CpuPlan plan(const Problem& p, const CpuRequest& r, const Machine& machine) {
  return machine.with([&](const CpuMachine& m) { return plan_cpu(p, r, m); });
}

std::string words(const CpuPlan& made, const Problem& p, const CpuRequest& r,
                  const Machine& machine) {
  return machine.with([&](const CpuMachine& m) { return describe(made, p, r, m); });
}

void bind_costs(py::module_& m) {
  using T = CpuCosts;
  auto type = structure<T>(m, "CpuCosts");
  fields(type, NAMED(computes), NAMED(tiled), NAMED(least_rows), NAMED(planes), NAMED(weight_bytes),
         NAMED(loads_quickly), NAMED(words), NAMED(deepest_integers));
}

void bind_variant(py::module_& m) {
  using T = Variant;
  auto type = structure<T>(m, "CpuVariant");
  fields(type, NAMED(name), NAMED(costs));
}

void bind_machine(py::module_& m) {
  using T = Machine;
  auto type = structure<T>(m, "CpuMachine");
  fields(type, NAMED(variants), NAMED(named), NAMED(tiles), NAMED(all_threads), NAMED(threads),
         NAMED(l3_bytes), NAMED(quick_l3));
}

void bind_request(py::module_& m) {
  using T = CpuRequest;
  auto type = structure<T>(m, "CpuRequest");
  fields(type, NAMED(backward), NAMED(steps), NAMED(batch), NAMED(tokens), NAMED(longest),
         NAMED(resets), NAMED(recurrent_dropout), NAMED(tangent), NAMED(ensemble));
}

void bind_pass(py::module_& m) {
  py::native_enum<ProductKind>(m, "Product", "enum.Enum",
                               "How weights in fewer bytes are multiplied.")
      .value("panels", ProductKind::kPanels)
      .value("words", ProductKind::kWords)
      .value("integers", ProductKind::kIntegers)
      .value("pairs", ProductKind::kPairs)
      .finalize();
  using T = CpuPass;
  auto type = structure<T>(m, "CpuPass");
  fields(type, NAMED(unpacked_hh), NAMED(alternates), NAMED(prefetches), NAMED(streams),
         NAMED(overlaps_cells), NAMED(long_sums), NAMED(product));
}

void bind_plan(py::module_& m) {
  using T = CpuPlan;
  auto type = structure<T>(m, "CpuPlan");
  fields(type, NAMED(variant), NAMED(threads), NAMED(unpacked), NAMED(recurrent_first),
         NAMED(rows_per_task), NAMED(tasks), NAMED(members), NAMED(ensemble));
  type.def_readwrite("pass_", &T::pass);  // `pass` is a keyword of Python
}

}  // namespace

void bind_cpu_plan(py::module_& m) {
  bind_costs(m);
  bind_variant(m);
  bind_machine(m);
  bind_request(m);
  bind_pass(m);
  bind_plan(m);
  m.def("plan_cpu", plan, py::arg("problem"), py::arg("request"), py::arg("machine"));
  m.def("describe_cpu", words, py::arg("plan"), py::arg("problem"), py::arg("request"),
        py::arg("machine"));
}
