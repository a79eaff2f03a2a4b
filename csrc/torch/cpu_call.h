// A call on CPU tensors, as what the kernels read.
#pragma once
#include <algorithm>

#include "cpu/run/run.h"
#include "cpu/run/sequence.h"
#include "cpu/run/taken_core.h"
#include "torch/call.h"

namespace fusedrnn {

inline const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline const uint8_t* bytes_of(const OptionalTensor& t) {
  return static_cast<const uint8_t*>(pointer(t));
}

inline ThreadPool torch_threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t count, void (*share)(int64_t, void*), void* context) {
            LoopClock clock;
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              const LoopClock::Time start = LoopClock::now();
              for (int64_t i = begin; i < end; i++) share(i, context);
              clock.share_took(LoopClock::now() - start);
            });
            clock.loop_ended();
          }};
}

// A call, and the memory of what the kernels read of it beside tensors.
struct CpuCall : Call {
  ThreadPool pool = torch_threads();
  TokenIndices indices;
  std::vector<int64_t> x_offset;
  std::vector<Weights> weight_pointers;
  bool padded_rows = false;  // some tokens do not exist: what lies there must be zeroed

  CpuCall(const Inputs& in, const Config& config) : Call(in, config) {
    FUSEDRNN_EXPECT(x.is_cpu(), "fusedrnn: expected CPU tensors");
  }

  void fill(Common& a) {
    a.problem = problem;
    fill_sequence(a);
    a.hx = pointer(hx), a.cx = pointer(cx);
    const RegulariserTensors& r = regularisers;
    static_cast<Regularisers&>(a) = {bytes_of(r.mask),
                                     mask_scale(),
                                     pointer(r.h_mask),
                                     {bytes_of(r.zone_h), r.zoneout_h},
                                     {bytes_of(r.zone_c), r.zoneout_c}};
    weight_pointers.reserve(ensemble * directions());
    for (int64_t which = 0; which < ensemble; which++)
      for (int64_t i = 0; i < directions(); i++)
        weight_pointers.push_back(
            weights_of(i / problem.num_directions, i % problem.num_directions, which));
    a.weights = weight_pointers.data();
  }

  CpuPlan plan(const Common& a, bool backward, bool tangent = false) const {
    CpuMachine machine = this_machine(pool.threads);
    int64_t longest = 0;
    for (int64_t which = 0; batch && which < ensemble; which++)
      longest = std::max(longest, a.seq.length[a.seq.order[which * (batch / ensemble)]]);
    const CpuRequest request{backward,
                             steps,
                             batch,
                             tokens,
                             longest,
                             resets.has_value(),
                             regularisers.h_mask.has_value(),
                             tangent,
                             ensemble};
    const CpuPlan plan = plan_cpu_here(problem, request, &machine);
    const bool meet = plan.threads > 1 && (plan.unpacked || plan.members > 1);  // at every step
    if (!meet || machine.all_threads || !is_core_taken()) return plan;
    machine.threads = 1;
    return plan_cpu_here(problem, request, &machine);
  }

  // What is not a result is only read.
  void fill_states(Common& a, const OptionalTensor& hs, const OptionalTensor& cs) const {
    if (!problem.all_states) return;
    a.hs = const_cast<void*>(pointer(hs));
    if (traits(problem.cell).has_cell) a.cs = const_cast<void*>(pointer(cs));
  }

 private:
  void fill_sequence(Common& a) {
    Sequence& s = a.seq;
    s.steps = steps, s.batch = batch, s.tokens = tokens, s.resets = bytes_of(resets);
    if (packed())
      index_packed(s, indices, batch_sizes);
    else if (lengths)
      index_padded(s, indices, checked_lengths());
    else
      index_padded(s, indices);
    order_by_weights(s, indices, ensemble);
    a.x = x.const_data_ptr(), a.x_row = x.stride(packed() ? 0 : 1);
    x_offset.resize(indices.offset.size());
    for (size_t t = 0; t < x_offset.size(); t++)
      x_offset[t] = packed() ? indices.offset[t] * a.x_row : t * x.stride(0);
    a.x_offset = x_offset.data();
    if (problem.one_hot)
      a.one_hot = sort_by_value(s, indices, static_cast<const int64_t*>(a.x), problem.input_size);
  }

  std::vector<int64_t> checked_lengths() {
    std::vector<int64_t> found = int64_values("lengths", *lengths);
    for (int64_t n : found) {
      FUSEDRNN_EXPECT(n >= 0 && n <= steps, "fusedrnn: expected lengths in [0, ", steps, "], got ",
                      n);
      padded_rows |= n < steps;
    }
    return found;
  }
};

// The gradients of each member's, layer's and direction's weights that are wanted; the rest are
// null.
inline std::vector<WeightGradients> gradient_pointers(const Problem& p, const GradientTensors& g,
                                                      const std::vector<bool>& needs) {
  const size_t stack = p.num_layers * p.num_directions;
  std::vector<WeightGradients> all(g.members * stack);
  int64_t member = 0;
  size_t i = 0;
  auto next = [&]() -> void* {
    const Tensor& t = g.weights[i];
    if (!needs[3 + i++]) return nullptr;
    return static_cast<char*>(t.mutable_data_ptr()) +
           member * (t.numel() / g.members) * bytes(dtype_of(t.scalar_type()));
  };
  for (size_t k = 0; k < all.size(); k++) {
    if (k % stack == 0) member = k / stack, i = 0;
    WeightGradients& d = all[k] = {};
#define WEIGHT(kind, name, torch_name, present, rows, columns) \
  if (present) d.name = next();
#include "plan/weights.inc"
#undef WEIGHT
  }
  return all;
}

}  // namespace fusedrnn
