// The derivatives of the ops in one direction, on CPU tensors.
#include "torch/cpu_call.h"
#include "torch/reserve.h"

namespace fusedrnn {
namespace {

// The tangents of a call's tensors, in the order and layout of the call's own.
struct TangentCall : TangentTensors {
  std::vector<int64_t> x_offset;
  std::vector<Weights> weight_pointers;

  TangentCall(const CpuCall& call, const Tangents& given) : TangentTensors(call, given) {}

  // Everything else is as in the primal call, which is filled already.
  void fill(Common& a, const Common& primal, const CpuCall& call) {
    a = primal;
    const Problem& p = call.problem;
    for (size_t t = 0; t < call.indices.offset.size(); t++)
      x_offset.push_back(call.indices.offset[t] * p.input_size);
    a.x = pointer(x), a.x_offset = x_offset.data(), a.x_row = p.input_size;
    a.hx = pointer(hx), a.cx = pointer(cx);
    for (int64_t which = 0; which < call.ensemble; which++)
      for (int64_t i = 0; i < call.directions(); i++)
        weight_pointers.push_back(
            weights_of(call, i / p.num_directions, i % p.num_directions, which));
    a.weights = weight_pointers.data();
  }
};

// What forward made, which is only read here. A reserve of no bytes still says that outputs are
// held.
char* reserve_of(const Tensor& reserve) {
  static char nothing;
  return reserve.numel() ? static_cast<char*>(const_cast<void*>(reserve.const_data_ptr()))
                         : &nothing;
}
void* output_of(const Tensor& y) { return const_cast<void*>(y.const_data_ptr()); }

}  // namespace

ForwardOutputs forward_tangent_cpu(const Inputs& in, const Config& config, const Tangents& given,
                                   const SavedForBackward& saved, bool save) {
  ForwardTangent a{};
  CpuCall call(in, config);
  call.fill(a.primal);
  TangentCall tangents(call, given);
  tangents.fill(a.tangent, a.primal, call);
  const std::vector<bool> needs(3 + call.weights.size());
  GradientTensors(call, {}, saved, {needs, 0});  // checks what was saved
  auto [dy, dhn, dcn, dreserve, dhs, dcs] = call.outputs(save ? Save::kReserve : Save::kEmpty);
  if (call.padded_rows)
    for (Tensor* t : {&dy, &dhs, &dcs}) torch::stable::zero_(*t);
  if (call.batch == 0) return {dy, dhn, dcn, dreserve, dhs, dcs};
  call.fill_states(a.primal, saved.hs, saved.cs), call.fill_states(a.tangent, dhs, dcs);
  a.primal.y = output_of(saved.y), a.primal.reserve = reserve_of(saved.reserve);
  a.tangent.y = dy.mutable_data_ptr(), a.tangent.hn = dhn.mutable_data_ptr();
  if (traits(call.problem.cell).has_cell) a.tangent.cn = dcn.mutable_data_ptr();
  a.tangent.reserve = save ? reserve_of(dreserve) : nullptr;
  const CpuPlan plan = call.plan(a.primal, false, true);
  run_forward_tangent({kernels_of(plan), plan, call.pool}, a);
  return {dy, dhn, dcn, dreserve, dhs, dcs};
}

BackwardOutputs backward_tangent_cpu(const Inputs& in, const Config& config,
                                     const OutputGradients& given, const OutputGradients& dgiven,
                                     const Tangents& tangents_given, const SavedForBackward& saved,
                                     const SavedForBackward& dsaved, const Wanted& wanted) {
  BackwardTangentStack a{};
  CpuCall call(in, config);
  call.fill(a.primal);
  TangentCall tangents(call, tangents_given);
  tangents.fill(a.tangent, a.primal, call);
  const std::vector<bool> nothing(wanted.needs.size());
  const GradientTensors g(call, given, saved, {nothing, 0}), d(call, dgiven, dsaved, wanted);
  const std::vector<MemberTokens> members =
      tokens_of_members(a.primal.seq, call.indices, a.primal.one_hot, d.members);
  Tensor dx = d.x;
  if (call.padded_rows) torch::stable::zero_(dx);
  if (call.batch == 0) return d.in_type(call.type());
  auto fill = [&call](BackwardStack& s, const SavedForBackward& from,
                      const GradientTensors& gradients) {
    s.y = from.y.const_data_ptr(), s.reserve = reserve_of(from.reserve);
    call.fill_states(s, from.hs, from.cs);
    s.grad_y = pointer(gradients.y);
    s.grad_hn = pointer(gradients.hn), s.grad_cn = pointer(gradients.cn);
    s.grad_hs = pointer(gradients.hs), s.grad_cs = pointer(gradients.cs);
  };
  fill(a.primal, saved, g), fill(a.tangent, dsaved, d);
  if (d.need_x) a.tangent.dx = dx.mutable_data_ptr();
  if (d.need_hx) a.tangent.dhx = d.hx.mutable_data_ptr();
  if (d.need_cx) a.tangent.dcx = d.cx.mutable_data_ptr();
  const std::vector<WeightGradients> dweights = gradient_pointers(call.problem, d, wanted.needs);
  a.tangent.dweights = dweights.data(), a.tangent.lowest = d.lowest;
  a.tangent.members = members.data(), a.tangent.member_count = d.members;
  const CpuPlan plan = call.plan(a.primal, true, true);
  run_backward_tangent({kernels_of(plan), plan, call.pool}, a);
  return d.in_type(call.type());
}

}  // namespace fusedrnn
