// How a call's work is spread over threads.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/call.h"
#include "cpu/run/scratch.h"
#include "cpu/run/team.h"
#include "cpu/run/threads.h"
#include "plan/cpu_plan.h"

namespace fusedrnn {

// Tasks that pack the weights of a layer and direction; of an ensemble other weights are tasks too.
inline int64_t pack_parts(const CpuPlan& plan) { return std::max<int64_t>(1, 8 / plan.ensemble); }

// Work of which no part needs another: task(i, scratch) for every i below `count`.
struct Phase {
  int64_t count, scratch_bytes;
  std::function<void(int64_t, char*)> task;
};

// Runs phases one after the other, on up to `threads` threads.
void run_phases(const ThreadPool&, int64_t threads, const std::vector<Phase>&);

// What one of an ensemble's weights has of a call: these, and its rows, which are the next in
// Sequence::order.
template <class Call>
Call of_weights(Call a, const CpuPlan& plan, int64_t which) {
  a.weights += which * a.problem.num_layers * a.problem.num_directions;
  a.seq.order += which * (a.seq.batch / plan.ensemble);
  return a;
}

// The same of a call and its tangents.
template <class Both>
Both both_of_weights(Both both, const CpuPlan& plan, int64_t which) {
  both.primal = of_weights(both.primal, plan, which);
  both.tangent = of_weights(both.tangent, plan, which);
  return both;
}

// All rows of the batch through task(which of the ensemble's weights, rows, member of a team), one
// thread or one team each; `times` times.
class RowTasks {
 public:
  RowTasks(const CpuPlan& plan, int64_t batch, const RowsScratch& bytes, int64_t times)
      : plan_(plan),
        batch_(batch / plan.ensemble),
        tasks_(plan.tasks / plan.ensemble),
        bytes_(bytes),
        teams_(plan.members > 1 ? times * plan.tasks : 0),
        memory_(plan.members > 1 ? plan.tasks : 0, task_bytes()) {}

  template <class Task>
  Phase phase(int64_t time, Task task) {
    const int64_t M = plan_.members;
    if (M == 1)
      return {plan_.tasks, task_bytes(), [this, task](int64_t i, char* scratch) {
                Member alone;
                task(i / tasks_, rows(i, scratch, 0), alone);
              }};
    Team* const teams = teams_.data() + time * plan_.tasks;
    return {plan_.tasks * M, 0, [this, task, teams, M](int64_t place, char*) {
              const int64_t i = place / M;
              Member me;
              if (teams[i].join(1, M, &me))
                task(i / tasks_, rows(i, memory_.data(i), me.index), me);
            }};
  }

  int64_t task_bytes() const { return bytes_.common + plan_.members * bytes_.own; }
  Rows rows(int64_t i, char* scratch, int64_t member) const {
    const int64_t first = i % tasks_ * plan_.rows_per_task;
    return Rows{first, std::min(batch_, first + plan_.rows_per_task), scratch,
                scratch + bytes_.common + member * bytes_.own};
  }

 private:
  const CpuPlan plan_;
  const int64_t batch_, tasks_;  // of each of the ensemble's weights
  const RowsScratch bytes_;
  std::vector<Team> teams_;
  const ScratchMemory memory_;
};

}  // namespace fusedrnn
