// The ops as they run on CUDA tensors, for CPU tensors: csrc/torch and csrc/cuda as they are, every
// launch emulated. What ATen does on the GPU, it does here on the CPU.
#include <torch/csrc/stable/library.h>

#include "cuda/device.h"
#include "emulator/simt.h"
#include "python/host.h"
#include "torch/cuda_standing.h"
#include "torch/host.h"
#include "torch/ops.h"

using namespace fusedrnn;

namespace {
void seed(int64_t value) { simt::set_seed(value); }  // of the order of threads; negative: fixed
void fail_after(int64_t launches) { simt::fail_after(launches); }
void play(std::string faults) { simt::play(faults.c_str()); }  // see simt.h; empty: none
int64_t launches() { return simt::launches(); }
int64_t longest_way() { return simt::longest_way(); }
void forget() { forget_standings(), take_lost_block(); }

[[maybe_unused]] const bool hosted = (set_host(python_host()), true);
}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn_emulated, m) {
  m.def(kForwardSchema);
  m.def(kInferSchema);
  m.def(kBackwardSchema);
  m.def(kForwardTangentSchema);
  m.def(kBackwardTangentSchema);
  m.def("seed(int value) -> ()");
  m.def("fail_after(int launches) -> ()");
  m.def("play(str faults) -> ()");
  m.def("launches() -> int");
  m.def("longest_way() -> int");
  m.def("forget() -> ()");
  for (const char* schema : kStandingSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn_emulated, CPU, m) {
  m.impl("forward", forward<forward_cuda>);
  m.impl("infer", infer<forward_cuda>);
  m.impl("backward", backward<backward_cuda>);
  m.impl("forward_tangent", forward_tangent<forward_tangent_cuda>);
  m.impl("backward_tangent", backward_tangent<backward_tangent_cuda>);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn_emulated, CompositeExplicitAutograd, m) {
  m.impl("seed", TORCH_BOX(&seed));
  m.impl("fail_after", TORCH_BOX(&fail_after));
  m.impl("play", TORCH_BOX(&play));
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("longest_way", TORCH_BOX(&longest_way));
  m.impl("forget", TORCH_BOX(&forget));
  m.impl("trial", trial_op);
  m.impl("standings", standings_op);
  m.impl("generation", generation_op);
}
