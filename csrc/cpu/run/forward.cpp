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

void run_packed(const CpuRun& run, Forward& a) {
  const Problem& p = a.problem;
  const Kernels& k = run.kernels;
  const CpuPlan& plan = run.plan;
  const std::vector<int64_t> offsets = packed_offsets(k, a);
  const int64_t size = compute_bytes(p.dtype);
  const ScratchMemory packed(1, offsets.back() * size);
  a.packed = packed.data();
  auto pack = [&](int64_t task, char*) {
    const int64_t i = task / kPackParts;
    k.pack_forward(a, i, packed.data() + offsets[i] * size, task % kPackParts, kPackParts);
  };
  RowTasks tasks(plan, a.seq.batch, k.rows_scratch(p, plan.pass, plan.rows_per_task), 1);
  run_phases(run.pool, plan.threads,
             {{p.num_layers * p.num_directions * kPackParts, 0, pack},
              tasks.phase(0, [&](const Rows& rows, Member& me) { k.forward(a, rows, me); })});
}

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
    run_packed(run, a);
}

}  // namespace fusedrnn
