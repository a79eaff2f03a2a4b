// Registers the ops, and has what the library answers besides them. Nothing here is Python's.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/run/scratch.h"
#include "cuda/device.h"
#include "cuda/elementwise.h"
#include "torch/host.h"
#include "torch/ops.h"
#ifdef FUSEDRNN_WITH_CUDA
#include "torch/cuda_standing.h"
#endif

#ifndef FUSEDRNN_CUDA_ARCHS
#define FUSEDRNN_CUDA_ARCHS ""
#endif

namespace fusedrnn {
namespace {

std::string cpu_variant() { return this_machine(1).variants[0].name; }

std::string cpu_plan(const Problem& p, const CpuRequest& request, int64_t threads) {
  CpuMachine machine = this_machine(threads);
  const CpuPlan plan = plan_cpu_here(p, request, &machine);
  return describe(plan, p, request, machine);
}

PlanInWords cuda_plan(const Problem& p, const CudaRequest& request, const DeviceSpec& device,
                      const char* forced) {
  CudaPlan plan;
  std::string reason;
  if (!plan_cuda(p, request, device, forced, &plan, &reason)) return {false, reason, -1};
  return {true, describe(plan), index_of(family_of(p, request, plan))};
}

bool cuda_plans(const Problem& p, const CudaRequest& request, const DeviceSpec& device,
                const char* forced, const CudaModel& model, std::vector<EstimatedPlan>* found,
                std::string* reason) {
  std::vector<CudaPlan> plans;
  if (!plans_cuda(p, request, device, forced, model, &plans, reason)) return false;
  for (const CudaPlan& plan : plans) found->push_back({forcing(plan), plan.microseconds});
  return true;
}

DeviceSpec cuda_device() {
  DeviceSpec device{};
#ifdef FUSEDRNN_WITH_CUDA
  if (const int error = device_spec(&device)) throw std::runtime_error(error_text(error));
#else
  throw std::runtime_error("this build has no CUDA kernels");
#endif
  return device;
}

void cuda_versions([[maybe_unused]] int* runtime, [[maybe_unused]] int* driver) {
#ifdef FUSEDRNN_WITH_CUDA
  library_versions(runtime, driver);
#endif
}

constexpr Inspection inspection{
    .version = FUSEDRNN_VERSION,
    .cuda_archs = FUSEDRNN_CUDA_ARCHS,
    .cpu_variants = installed_variants,
    .cpu_variant = cpu_variant,
    .cpu_plan = cpu_plan,
    .cuda_plan = cuda_plan,
    .cuda_plans = cuda_plans,
    .name_of_family = name_of,
    .cuda_device = cuda_device,
    .cuda_versions = cuda_versions,
    .set_host = set_host,
    .release_scratch = release_scratch,
};

}  // namespace
}  // namespace fusedrnn

const fusedrnn::Inspection* fusedrnn_inspection() { return &fusedrnn::inspection; }

STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(fusedrnn::kForwardSchema);
  m.def(fusedrnn::kInferSchema);
  m.def(fusedrnn::kInferQuantizedSchema);
  m.def(fusedrnn::kBackwardSchema);
  m.def(fusedrnn::kForwardTangentSchema);
  m.def(fusedrnn::kBackwardTangentSchema);
#ifdef FUSEDRNN_WITH_CUDA
  for (const char* schema : fusedrnn::kStandingSchemas) m.def(schema);
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  using namespace fusedrnn;
  m.impl("forward", forward<forward_cpu>);
  m.impl("infer", infer<forward_cpu>);
  m.impl("infer_quantized", infer_quantized<forward_cpu>);
  m.impl("backward", backward<backward_cpu>);
  m.impl("forward_tangent", forward_tangent<forward_tangent_cpu>);
  m.impl("backward_tangent", backward_tangent<backward_tangent_cpu>);
}

#ifdef FUSEDRNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  using namespace fusedrnn;
  m.impl("forward", forward<forward_cuda>);
  m.impl("infer", infer<forward_cuda>);
  m.impl("backward", backward<backward_cuda>);
  m.impl("forward_tangent", forward_tangent<forward_tangent_cuda>);
  m.impl("backward_tangent", backward_tangent<backward_tangent_cuda>);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  using namespace fusedrnn;
  m.impl("trial", trial_op);
  m.impl("standings", standings_op);
  m.impl("generation", generation_op);
}
#endif
