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

// How many threads share the steps of a call whose weights are read as they lie; 0: they are
// packed, which pays from some tokens on. `weights`: bytes of those of one layer and direction.
inline int64_t plan_direct(int64_t tokens, int64_t weights, int64_t threads) {
  constexpr int64_t kMostTokens = 8;
  constexpr int64_t kBytesOfThread = 256 << 10;  // take longer to read than threads to meet
  if (tokens > kMostTokens) return 0;
  const int64_t parts = weights / kBytesOfThread;
  return parts < 1 ? 1 : parts < threads ? parts : threads;
}

}  // namespace fusedrnn
