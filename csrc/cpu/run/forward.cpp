#include <algorithm>

#include "cpu/run/run.h"
#include "cpu/run/tasks.h"

namespace fusedrnn {
namespace {

// Where the packed weights of each layer and direction begin, and their end; elements.
std::vector<int64_t> packed_offsets(const Kernels& kernels, const Forward& a) {
  std::vector<int64_t> offsets{0};
  for (int64_t i = 0; i < a.problem.num_layers * a.problem.num_directions; i++) {
    const int64_t layer = i / a.problem.num_directions;
    offsets.push_back(offsets.back() + kernels.forward_offsets(a, layer).total);
  }
  return offsets;
}

class PackedForward {
 public:
  PackedForward(const CpuRun& run, const Forward& a)
      : run_(run),
        plan_(run.plan),
        stack_(a.problem.num_layers * a.problem.num_directions),
        size_(compute_bytes(a.problem.dtype)),
        offsets_(packed_offsets(run.kernels, a)),
        packed_bytes_((offsets_.back() * size_ + 63) / 64 * 64),
        packed_(1, plan_.by_weights() ? 0 : plan_.ensemble * packed_bytes_),
        tasks_(plan_, a.seq.batch,
               run.kernels.rows_scratch(a.problem, plan_.pass, plan_.rows_per_task), 1) {
    for (int64_t i = 0; i < plan_.ensemble; i++) {
      calls_.push_back(of_weights(a, plan_, i));
      calls_.back().packed = packed_.data() + i * packed_bytes_;
    }
  }

  void run() {
    if (plan_.by_weights()) return run_by_weights();
    const int64_t parts = pack_parts(plan_), each = stack_ * parts;
    auto pack = [&](int64_t task, char*) {
      const int64_t which = task / each, i = task % each / parts;
      pack_part(which, i, packed_.data() + which * packed_bytes_, task % parts, parts);
    };
    run_phases(run_.pool, plan_.threads,
               {{plan_.ensemble * each, 0, pack},
                tasks_.phase(0, [&](int64_t which, const Rows& rows, Member& me) {
                  run_.kernels.forward(calls_[which], rows, me);
                })});
  }

 private:
  // What is packed is then in the cache of the thread that reads it.
  void run_by_weights() {
    auto task = [&](int64_t which, char* scratch) {
      for (int64_t i = 0; i < stack_; i++) pack_part(which, i, scratch, 0, 1);
      calls_[which].packed = scratch;
      Member alone;
      run_.kernels.forward(calls_[which], tasks_.rows(which, scratch + packed_bytes_, 0), alone);
    };
    run_phases(run_.pool, plan_.threads,
               {{plan_.ensemble, packed_bytes_ + tasks_.task_bytes(), task}});
  }

  // A part of the weights of layer and direction i.
  void pack_part(int64_t which, int64_t i, char* packed, int64_t part, int64_t parts) const {
    run_.kernels.pack_forward(calls_[which], i, packed + offsets_[i] * size_, part, parts);
  }

  const CpuRun& run_;
  const CpuPlan& plan_;
  const int64_t stack_, size_;  // layers and directions; bytes of the compute type
  const std::vector<int64_t> offsets_;
  const int64_t packed_bytes_;
  const ScratchMemory packed_;
  RowTasks tasks_;
  std::vector<Forward> calls_;  // of each of the ensemble's weights
};

}  // namespace

void run_forward(const CpuRun& run, Forward& a) {
  a.pass = run.plan.pass;
  const Problem& p = a.problem;
  // The outputs of the layers but the last, where nothing else holds them, take turns.
  const bool held = a.reserve || a.hs;
  const ScratchMemory inner(held ? 0 : std::min<int64_t>(2, p.num_layers - 1),
                            a.seq.tokens * p.num_directions * p.out_size() * bytes(p.dtype));
  if (!held)
    for (int64_t i = 0; i < std::min<int64_t>(2, p.num_layers - 1); i++) a.inner[i] = inner.data(i);
  if (run.plan.unpacked)
    run_unpacked(run, a);
  else
    PackedForward(run, a).run();
}

}  // namespace fusedrnn
