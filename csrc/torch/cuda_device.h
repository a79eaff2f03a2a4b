// The device and stream of a call.
#pragma once
#include "torch/checks.h"

#ifdef FUSEDRNN_EMULATED
#include "emulator/device.h"
#else
#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda, which a torch for CPUs does not have: null there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fusedrnn {

// Makes the device of a tensor the current one, as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& x) : guard_(checked_index(x)) {
    FUSEDRNN_EXPECT_TORCH(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_),
                          "give the current CUDA stream");
  }
  void* stream() const { return stream_; }  // torch's current one

 private:
  static int32_t checked_index(const Tensor& x) {
    FUSEDRNN_EXPECT(x.is_cuda() && aoti_torch_get_current_cuda_stream,
                    "fusedrnn: expected CUDA tensors");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fusedrnn
#endif
