#include "bindings/bindings.h"

PYBIND11_MODULE(fusedrnn_bindings, m) {
  bind_problem(m);
  bind_cpu_plan(m);
  bind_cuda_plan(m);
  bind_launches(m);
}
