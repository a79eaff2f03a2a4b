// What the user sets outside of a call, read once a call.
#pragma once

namespace fusedrnn {

// FUSEDRNN_CUDA_KERNELS: whether CUDA kernels run not at all, once a small case of theirs has been
// right on the device, or without that. Not set: verified.
enum class KernelSwitch { kOff, kVerified, kOn };
KernelSwitch kernel_switch();

// FUSEDRNN_PLAN, the backend to use in place of the planner's choice; null: not set.
const char* forced_plan();

}  // namespace fusedrnn
