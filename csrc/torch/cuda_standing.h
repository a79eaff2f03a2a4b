// Which CUDA kernels this process may run: what the user permits, what a GPU has refused to launch,
// and what has passed its check, or not, on this device. Known for each device and family.
#pragma once
#include "plan/cuda_plan.h"
#include "torch/cuda_device.h"
#include "torch/ops.h"

namespace fusedrnn {

// Whether recurrent layers of this thread may use TF32: what torch's switch says, or a check.
bool permits_tf32(bool torch_does);

// The plan of a call, of the families that may run. A family that runs for the first time on a
// device is checked before, unless FUSEDRNN_CUDA_KERNELS=on. Throws where nothing may run.
CudaPlan permitted_plan(const Problem&, const CudaRequest&, const CurrentDevice&);

// A launch that the GPU did not accept. What the call has written so far is its own: it starts
// again with another plan.
struct Refused {
  int device;
  Families families;  // that are launched in this way
  std::string plan, error;
};
// Handles what a launch returned: throws where it is an error, `Refused` where another plan may do.
void check_launch(int error, const char* what, const CudaPlan&, const Family&, int device);

// Strikes out what was refused, and adds it to `text`.
void strike(const Refused&, std::string* text);
void warn_of_refusals(const std::string& text);

// Runs a call, which plans for itself, until the GPU has accepted all its launches.
template <class F>
auto until_accepted(F run) {
  std::string refusals;
  for (;;) {
    try {
      auto results = run();
      if (!refusals.empty()) warn_of_refusals(refusals);
      return results;
    } catch (const Refused& refused) {
      strike(refused, &refusals);
    } catch (...) {
      if (!refusals.empty()) warn_of_refusals(refusals);
      throw;
    }
  }
}

void forget_standings();  // for tests

// ---- ops without tensors, for Python ----

// trial: this thread's calls are planned as `plan` says (FUSEDRNN_PLAN's words), with TF32 or
// without, and are not checked: they are the check. An empty plan ends it.
// standings: what is known of the families of a device, a line each: index, state, reason.
// generation: a number that changes with what any device's standings say.
inline constexpr const char* kStandingSchemas[] = {
    "trial(str plan, bool tf32) -> ()", "standings(int device) -> str", "generation() -> int"};
void trial_op(StableIValue* stack, uint64_t count, uint64_t);
void standings_op(StableIValue* stack, uint64_t count, uint64_t);
void generation_op(StableIValue* stack, uint64_t count, uint64_t);

}  // namespace fusedrnn
