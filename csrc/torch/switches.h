// What the user sets outside of a call, read once a call.
#pragma once

namespace fusedrnn {

// torch's switches for float32 on CUDA: whether TF32 is permitted.
struct Float32Switches {
  bool recurrent;  // torch.backends.cudnn.rnn.fp32_precision, which also follows cudnn.allow_tf32
  bool products;   // torch.backends.cuda.matmul.fp32_precision, which ATen's products obey
};
Float32Switches float32_switches();

// FUSEDRNN_CUDA_KERNELS: whether CUDA kernels run not at all, once a small case of theirs has been
// right on the device, or without that. Not set: verified.
enum class KernelSwitch { kOff, kVerified, kOn };
KernelSwitch kernel_switch();

// FUSEDRNN_PLAN, the backend to use in place of the planner's choice; null: not set.
const char* forced_plan();

}  // namespace fusedrnn
