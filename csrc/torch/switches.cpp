#include "torch/switches.h"

#include <cstdlib>
#include <cstring>

#include "torch/error.h"

namespace fusedrnn {

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
