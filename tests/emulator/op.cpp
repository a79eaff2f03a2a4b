// The ops as they run on CUDA tensors, for CPU tensors: csrc/torch and csrc/cuda as they are, every
// launch emulated. What ATen does on the GPU, it does here on the CPU.
#include <torch/csrc/stable/library.h>

#include "emulator/simt.h"
#include "python/switches.h"
#include "torch/ops.h"
#include "torch/switches.h"

using namespace fusedrnn;

namespace {
void seed(int64_t value) { simt::set_seed(value); }  // of the order of threads; negative: fixed
void fail_after(int64_t launches) { simt::fail_after(launches); }

[[maybe_unused]] const bool follows = (follow_float32_switches(switches_of_python), true);
}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn_emulated, m) {
  m.def(kForwardSchema);
  m.def(kInferSchema);
  m.def(kBackwardSchema);
  m.def("seed(int value) -> ()");
  m.def("fail_after(int launches) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn_emulated, CPU, m) {
  m.impl("forward", forward<forward_cuda>);
  m.impl("infer", infer<forward_cuda>);
  m.impl("backward", backward<backward_cuda>);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn_emulated, CompositeExplicitAutograd, m) {
  m.impl("seed", TORCH_BOX(&seed));
  m.impl("fail_after", TORCH_BOX(&fail_after));
}
