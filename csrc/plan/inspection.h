// What the library of the ops answers besides them, without tensors. The Python module asks it.
#pragma once
#include <string>
#include <vector>

#include "plan/cpu_plan.h"
#include "plan/cuda_plan.h"
#include "plan/products.h"

namespace fusedrnn {

// Instruction sets that kernels were compiled for: a name, and whether this processor has it.
struct InstalledVariant {
  const char* name;
  bool supported;
};

// What the library asks of its process. All of it lasts as long as the process.
struct Host {
  Float32Switches (*float32_switches)();
  bool (*warn)(const std::string& text);  // false: the user has made warnings errors
  // Has a small case of a family computed on a device, by the ops of a namespace of torch.ops. Why
  // the kernels must not run; empty where they are right.
  std::string (*check_family)(int family, const char* ops, const std::string& device);
};

// A plan in words and its family, or why no backend can.
struct PlanInWords {
  bool possible;
  std::string text;
  int family;
};

// A plan as FUSEDRNN_PLAN asks for it.
struct EstimatedPlan {
  std::string forcing;
  double microseconds;
};

struct Inspection {
  const char* version;     // of the package; first, so that any version of it can be compared
  const char* cuda_archs;  // separated by ;, empty without CUDA
  const InstalledVariant* (*cpu_variants)(int* count);                          // best first
  std::string (*cpu_variant)();                                                 // the one in use
  std::string (*cpu_plan)(const Problem&, const CpuRequest&, int64_t threads);  // in words
  PlanInWords (*cuda_plan)(const Problem&, const CudaRequest&, const DeviceSpec&,
                           const char* forced);
  // All plans that can run, by a model's estimates. False, with a reason, where `forced` is wrong.
  bool (*cuda_plans)(const Problem&, const CudaRequest&, const DeviceSpec&, const char* forced,
                     const CudaModel&, std::vector<EstimatedPlan>*, std::string* reason);
  std::string (*name_of_family)(const Family&);
  DeviceSpec (*cuda_device)();                       // the current one
  void (*cuda_versions)(int* runtime, int* driver);  // of the binary and the driver; 0: none
  void (*set_host)(const Host&);
  void (*release_scratch)();  // returns to the system what pools on the CPU keep between calls
};

}  // namespace fusedrnn

// The library's one symbol. Functions of it may throw a std::exception.
extern "C" [[gnu::visibility("default")]] const fusedrnn::Inspection* fusedrnn_inspection();
