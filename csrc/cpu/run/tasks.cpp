#include "cpu/run/tasks.h"

#include <atomic>

namespace fusedrnn {
namespace {

struct alignas(64) Progress {
  std::atomic<int64_t> next{0};
  // Tasks that are not done; of 32 bits, which Linux lets threads sleep on.
  std::atomic<int> left{0};
};

// Takes tasks of a phase until there are none, and waits for those that others took.
void take_tasks(const Phase& phase, Progress& progress, char* scratch, bool last) {
  int done = 0;
  for (int64_t i; (i = progress.next.fetch_add(1, std::memory_order_relaxed)) < phase.count; done++)
    phase.task(i, scratch);
  std::atomic<int>& left = progress.left;
  if (done && left.fetch_sub(done, std::memory_order_acq_rel) == done) left.notify_all();
  if (!last) wait_for_zero(left);
}

}  // namespace

// One parallel loop runs all phases. A thread takes the next task when it has finished one, and a
// phase ends when its tasks are done by any threads: a thread whose core is taken by another
// process does fewer, and only the end of the loop waits for it.
void run_phases(const ThreadPool& pool, int64_t threads, const std::vector<Phase>& phases) {
  int64_t most = 0, bytes = 0;
  for (const Phase& phase : phases)
    most = std::max(most, phase.count), bytes = std::max(bytes, phase.scratch_bytes);
  const int64_t workers = std::min(threads, most);
  if (workers < 1) return;
  std::vector<Progress> progress(phases.size());
  for (size_t i = 0; i < phases.size(); i++) progress[i].left = int(phases[i].count);
  const ScratchMemory scratch(workers, bytes);
  auto work = [&](int64_t worker) noexcept {  // or others would wait for ever for its tasks
    for (size_t p = 0; p < phases.size(); p++)
      take_tasks(phases[p], progress[p], scratch.data(worker), p + 1 == phases.size());
  };
  pool.parallel_for(workers, work);
}

}  // namespace fusedrnn
