// How the CPU divides a call, a pure function of its shape and the number of threads.
#pragma once
#include <cstdint>

namespace fusedrnn {

struct CpuPlan {
  int64_t rows_per_task;  // rows of the batch that a thread takes through all layers and steps
  int64_t tasks;
};

// One share of the batch a thread; a share of more rows than keep their states and gates in the
// second cache is cut into equal tasks.
inline CpuPlan plan_cpu(int64_t batch, int64_t threads) {
  constexpr int64_t kMostRows = 32;
  auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  if (batch == 0) return {1, 0};
  const int64_t share = divide(batch, threads);
  const int64_t rows = divide(share, divide(share, kMostRows));
  return {rows, divide(batch, rows)};
}

}  // namespace fusedrnn
