// How a call's work is spread over torch's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "cpu/stack.h"
#include "cpu/team.h"
#include "plan/cpu_plan.h"
#include "torch/kept_memory.h"

namespace fusedrnn {

// Work of which no part needs another: task(i, scratch) for every i below `count`.
struct Phase {
  int64_t count, scratch_bytes;
  std::function<void(int64_t, char*)> task;
};

// Runs phases one after the other, in one parallel loop. A thread takes the next task when it is
// done with one, and a phase ends when its tasks are done, whoever did them: a thread whose core
// another process holds does fewer, or none, and is waited for at the end of the loop alone.
inline void run_phases(int64_t threads, const std::vector<Phase>& phases) {
  int64_t most = 0, bytes = 0;
  for (const Phase& phase : phases)
    most = std::max(most, phase.count), bytes = std::max(bytes, phase.scratch_bytes);
  const int64_t workers = std::min(threads, most);
  if (workers < 1) return;
  struct alignas(64) Progress {
    std::atomic<int64_t> next{0};
    // Tasks that are not done; of 32 bits, which Linux lets threads sleep on.
    std::atomic<int> left{0};
  };
  std::vector<Progress> progress(phases.size());
  for (size_t i = 0; i < phases.size(); i++) progress[i].left = int(phases[i].count);
  const ScratchMemory scratch(workers, bytes);
  // noexcept: others would wait for ever for the task of a thread that left.
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t worker = begin; worker < end; worker++)
      for (size_t p = 0; p < phases.size(); p++) {
        int done = 0;
        for (int64_t i;
             (i = progress[p].next.fetch_add(1, std::memory_order_relaxed)) < phases[p].count;
             done++)
          phases[p].task(i, scratch.of(worker));
        std::atomic<int>& left = progress[p].left;
        if (done && left.fetch_sub(done, std::memory_order_acq_rel) == done) left.notify_all();
        if (p + 1 < phases.size()) wait_for_zero(left);
      }
  });
}

// All rows of the batch through a task, one thread or one team each; `times` times.
class RowTasks {
 public:
  RowTasks(const CpuPlan& plan, int64_t batch, const RowsScratch& bytes, int64_t times)
      : plan_(plan),
        batch_(batch),
        bytes_(bytes),
        teams_(plan.members > 1 ? times * plan.tasks : 0),
        memory_(plan.members > 1 ? plan.tasks : 0, of_task()) {}

  template <class Task>
  Phase phase(int64_t time, Task task) {
    const int64_t M = plan_.members;
    if (M == 1)
      return {plan_.tasks, of_task(), [this, task](int64_t i, char* scratch) {
                Member alone;
                task(rows(i, scratch, 0), alone);
              }};
    Team* const teams = teams_.data() + time * plan_.tasks;
    return {plan_.tasks * M, 0, [this, task, teams, M](int64_t place, char*) {
              const int64_t i = place / M;
              Member me;
              if (teams[i].join(1, M, &me)) task(rows(i, memory_.of(i), me.index), me);
            }};
  }

 private:
  int64_t of_task() const { return bytes_.common + plan_.members * bytes_.own; }
  Rows rows(int64_t i, char* scratch, int64_t member) const {
    const int64_t first = i * plan_.rows_per_task;
    return Rows{first, std::min(batch_, first + plan_.rows_per_task), scratch,
                scratch + bytes_.common + member * bytes_.own};
  }

  const CpuPlan plan_;
  const int64_t batch_;
  const RowsScratch bytes_;
  std::vector<Team> teams_;
  const ScratchMemory memory_;
};

}  // namespace fusedrnn
