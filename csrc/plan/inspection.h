// What the library of the ops answers besides them, without tensors. The Python module asks it.
#pragma once
#include <string>

#include "plan/cpu_plan.h"
#include "plan/cuda_plan.h"

namespace fusedrnn {

// torch's switches for float32 on CUDA: whether TF32 is permitted.
struct Float32Switches {
  bool recurrent;  // torch.backends.cudnn.rnn.fp32_precision, which also follows cudnn.allow_tf32
  bool products;   // torch.backends.cuda.matmul.fp32_precision, which ATen's products obey
};

// Instruction sets that kernels were compiled for: a name, and whether this processor has it.
struct InstalledVariant {
  const char* name;
  bool supported;
};

struct Inspection {
  const char* version;     // of the package; first, so that any version of it can be compared
  const char* cuda_archs;  // separated by ;, empty without CUDA
  const InstalledVariant* (*cpu_variants)(int* count);                          // best first
  std::string (*cpu_variant)();                                                 // the one in use
  std::string (*cpu_plan)(const Problem&, const CpuRequest&, int64_t threads);  // in words
  // The same, or with *possible false why no backend can.
  std::string (*cuda_plan)(const Problem&, const CudaRequest&, const DeviceSpec&,
                           const char* forced, bool* possible);
  DeviceSpec (*cuda_device)();  // the current one
  // Has `read` asked for the switches before each CUDA call; without, TF32 is not permitted in the
  // recurrence.
  void (*follow_float32_switches)(Float32Switches (*read)());
};

}  // namespace fusedrnn

// The library's one symbol. Functions of it may throw a std::exception.
extern "C" [[gnu::visibility("default")]] const fusedrnn::Inspection* fusedrnn_inspection();
