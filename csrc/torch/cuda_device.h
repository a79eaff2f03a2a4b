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

constexpr const char* kOpNamespace = "fusedrnn";  // of torch.ops, where these are the ops

// Makes the device of a tensor the current one, as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& x) : index_(checked_index(x)), guard_(index_) {
    FUSEDRNN_EXPECT_TORCH(aoti_torch_get_current_cuda_stream(index_, &stream_),
                          "give the current CUDA stream");
  }
  void* stream() const { return stream_; }  // torch's current one
  int index() const { return index_; }
  std::string name() const { return "cuda:" + std::to_string(index_); }

 private:
  static int32_t checked_index(const Tensor& x) {
    FUSEDRNN_EXPECT(x.is_cuda() && aoti_torch_get_current_cuda_stream,
                    "fusedrnn: expected CUDA tensors");
    return x.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fusedrnn
#endif
