// What the planner has to know of a GPU, asked once for each.
#pragma once
#include "plan/cuda_plan.h"

namespace fusedrnn {

constexpr int kMostDevices = 64;

// Of the current device. Returns a cudaError_t, 0 for success.
int device_spec(DeviceSpec* spec);

}  // namespace fusedrnn
