// The ops on CPU tensors: checks, allocates, fills what the kernels read, asks for a plan and runs
// it.
#include "torch/cpu_call.h"

namespace fusedrnn {

ForwardOutputs forward_cpu(const Inputs& in, const Config& config, Save save) {
  Forward a{};
  CpuCall call(in, config);
  call.fill(a);
  auto [y, hn, cn, reserve, hs, cs] = call.outputs(save);
  if (call.padded_rows)
    for (Tensor* t : {&y, &hs, &cs})
      if (t->defined()) torch::stable::zero_(*t);
  call.fill_states(a, hs, cs);
  a.y = y.mutable_data_ptr(), a.hn = hn.mutable_data_ptr();
  if (traits(call.problem.cell).has_cell) a.cn = cn.mutable_data_ptr();
  if (call.batch == 0) return {y, hn, cn, reserve, hs, cs};

  // A reserve of no bytes (one-layer RNN) still says that outputs are held.
  static char nothing;
  if (fills_reserve(save))
    a.reserve = reserve.numel() ? static_cast<char*>(reserve.mutable_data_ptr()) : &nothing;
  const CpuPlan plan = call.plan(a, false);
  run_forward({kernels_of(plan), plan, call.pool}, a);
  return {y, hn, cn, reserve, hs, cs};
}

// How many rows in turn share what forward saved for one, as batched gradients do. Gradients of
// weights and states of all layers do not read it so.
static int64_t rows_sharing(const CpuCall& call, const SavedForBackward& saved,
                            const Wanted& wanted) {
  const int64_t rows = saved.reserve.dim() ? saved.reserve.size(0) : 0;
  if (rows == 0 || call.tokens % rows || call.ensemble > 1 || call.problem.all_states) return 1;
  for (size_t i = 3; i < wanted.needs.size(); i++)
    if (wanted.needs[i]) return 1;
  const int64_t sharing = call.tokens / rows;
  auto shared = [&](int64_t n) { return n % sharing == 0; };
  const std::vector<int64_t>& sizes = call.batch_sizes;
  return shared(call.batch) && std::all_of(sizes.begin(), sizes.end(), shared) ? sharing : 1;
}

BackwardOutputs backward_cpu(const Inputs& in, const Config& config, const OutputGradients& given,
                             const SavedForBackward& saved, const Wanted& wanted) {
  BackwardStack a{};
  CpuCall call(in, config);
  call.fill(a);
  a.seq.sharing = rows_sharing(call, saved, wanted);
  const GradientTensors g(call, given, saved, wanted, call.type(), a.seq.sharing);
  const std::vector<MemberTokens> members =
      tokens_of_members(a.seq, call.indices, a.one_hot, g.members);
  Tensor dx = g.x;
  if (call.padded_rows) torch::stable::zero_(dx);
  if (call.batch == 0) return g.in_type(call.type());

  call.fill_states(a, saved.hs, saved.cs);
  a.y = saved.y.const_data_ptr();
  a.reserve = static_cast<char*>(const_cast<void*>(saved.reserve.const_data_ptr()));  // only read
  a.grad_y = pointer(g.y), a.grad_hn = pointer(g.hn), a.grad_cn = pointer(g.cn);
  a.grad_hs = pointer(g.hs), a.grad_cs = pointer(g.cs);
  if (g.need_x) a.dx = g.x.mutable_data_ptr();
  if (g.need_hx) a.dhx = g.hx.mutable_data_ptr();
  if (g.need_cx) a.dcx = g.cx.mutable_data_ptr();
  const std::vector<WeightGradients> dweights = gradient_pointers(call.problem, g, wanted.needs);
  a.dweights = dweights.data(), a.rounds_weights = true, a.lowest = g.lowest;
  a.members = members.data(), a.member_count = g.members;
  const CpuPlan plan = call.plan(a, true);
  run_backward({kernels_of(plan), plan, call.pool}, a);
  return g.in_type(call.type());
}

}  // namespace fusedrnn
