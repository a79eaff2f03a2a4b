// The CPU twin of csrc/torch/cuda_device.h.
#pragma once

namespace fusedrnn {

constexpr const char* kOpNamespace = "fusedrnn_emulated";

class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& x) {
    FUSEDRNN_EXPECT(x.is_cpu(), "fusedrnn: expected CUDA tensors, which are emulated on the CPU");
  }
  void* stream() const { return nullptr; }
  int index() const { return 0; }
  std::string name() const { return "cpu"; }
};

}  // namespace fusedrnn
