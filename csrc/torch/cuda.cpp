// The ops on CUDA tensors. Layers go in groups, as the plan says: the product of the input and
// W_ih for all steps of a group's lowest layer at once, then the recurrence of its layers by one
// of the backends; in backward the recurrence first, and then every gradient of a weight or an
// input as one product over all steps.
#include "torch/cuda.h"

#include <algorithm>

#include "cuda/elementwise.h"
#include "cuda/persistent/layers.h"
#include "torch/ensemble.h"

namespace fusedrnn {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

// ---- the backends ----

int stepwise(const CudaCall& call, const LayerForward& a, void* workspace) {
  return stepwise_forward(a, workspace, call.multiply(), call.stream());
}
int stepwise(const CudaCall& call, const LayerBackward& a, void* workspace) {
  return stepwise_backward(a, workspace, call.multiply(), call.stream());
}
int persistent(const CudaCall& call, const std::vector<LayerForward>& layers, void* workspace) {
  return persistent_forward(call.plan, layers, workspace, call.stream());
}
int persistent(const CudaCall& call, const std::vector<LayerBackward>& layers, void* workspace) {
  return persistent_backward(call.plan, layers, workspace, call.stream());
}

// The layers of a group, the lowest first and its directions together. Their neighbours' outputs
// are given, but for gates_x of the upper ones and dy of the lower ones.
template <class L>
void run_recurrence(const CudaCall& call, const std::vector<L>& layers, const char* what) {
  if (call.plan.backend != CudaBackend::kStepwise) {
    const Tensor workspace = call.bytes(persistent_workspace(call.plan, layers));
    return call.check(persistent(call, layers, workspace.mutable_data_ptr()), what);
  }
  for (const L& a : layers) {
    const Tensor workspace = call.bytes(stepwise_workspace(a));
    call.check(stepwise(call, a, workspace.mutable_data_ptr()), what);
  }
}

// ---- gradients over all steps ----

// What the recurrence of a layer and direction leaves for them.
struct Differentials {
  Tensor dgates;         // storage type [tokens, slots * hidden]
  Tensor dproj, hidden;  // with a projection: [tokens, out], [tokens, hidden]
  Tensor dnormed;        // with layer normalisation: compute type [tokens, normed columns]
};

// Of [tokens, columns], the tokens of every members-th row from `member` on.
Tensor rows_of_member(Tensor all, int64_t member, int64_t members) {
  if (members == 1) return all;
  Tensor grouped = torch::stable::reshape(all, {all.size(0) / members, members, all.size(1)});
  return torch::stable::select(grouped, 1, member);
}

// The gradients of the biases, gains and shift of layer normalisation: sums of dnormed, of gains
// times the normalised value. wanted(kind), gradient(kind): of a weight.
template <class Wanted, class Gradient>
void norm_gradients(const CudaCall& call, const LayerBackward& a, const Tensor& dnormed,
                    int64_t member, int64_t members, Wanted wanted, Gradient gradient) {
  const int64_t H = a.hidden_size, tokens = call.tokens, dim = 0;
  const CellTraits cell = traits(a.cell);
  // `count` gates from `gate` on, whose gradients are in dnormed from `slot` on; factor: the saved
  // slot of their values, -1: a bias.
  auto add_up = [&](WeightKind kind, int64_t gate, int64_t slot, int64_t count, int64_t factor) {
    if (!wanted(kind)) return;
    Tensor all = dnormed;
    Tensor terms = narrow(all, 1, slot * H, count * H);
    if (factor >= 0) {
      terms = call.empty({tokens, count * H}, call.compute());
      call.check(times_saved({a.dtype, a.tokens,
                              static_cast<const char*>(dnormed.const_data_ptr()) +
                                  slot * H * compute_bytes(a.dtype),
                              static_cast<const char*>(a.saved) + factor * H * bytes(a.dtype),
                              dnormed.size(1), a.cell_traits().saved * H, count * H,
                              terms.mutable_data_ptr()},
                             call.stream()),
                 "the gradient of a gain");
    }
    Tensor whole = gradient(kind), to = narrow(whole, 0, gate * H, count * H);
    terms = rows_of_member(terms, member, members);
    torch::stable::copy_(to, torch::stable::sum(terms, {{&dim, 1}}, false, call.compute()));
  };
  const int saved_x = cell.saved, saved_h = saved_x + cell.gates, saved_c = saved_h + cell.gates;
  const CellGateRanges ranges = gate_ranges(a.cell, false);
  for (const GateRange& r : ranges.x) {
    add_up(kBiasIH, r.gate, r.slot, r.count, -1);
    add_up(kGainIH, r.gate, r.slot, r.count, saved_x + r.gate);
  }
  for (const GateRange& r : ranges.h) {
    add_up(kBiasHH, r.gate, r.slot, r.count, -1);
    add_up(kGainHH, r.gate, r.slot, r.count, saved_h + r.gate);
  }
  add_up(kShiftC, 0, cell.slots, 1, -1);
  add_up(kGainC, 0, cell.slots, 1, saved_c);
}

// Of one member.
void weight_gradients(const CudaCall& call, const LayerBackward& a, const Differentials& d,
                      const std::optional<Tensor>& input, const Integers& integers,
                      const Tensor& before, const std::vector<bool>& needs, int64_t index,
                      int64_t member, GradientTensors& g) {
  const int64_t H = a.hidden_size, S = a.slot_columns(), G = a.gate_columns();
  const GateRangeList ranges = gate_ranges(a.cell, a.layer_norm).x;
  const Problem& p = call.problem;
  auto wanted = [&](WeightKind kind) {
    return p.has_weight(kind) && needs[3 + index + p.weight_place(kind)];
  };
  auto gradient = [&](WeightKind kind) -> Tensor {
    Tensor t = g.weights[index + p.weight_place(kind)];
    const bool led = t.dim() > call.weights[index + p.weight_place(kind)].dim();
    return led ? torch::stable::select(t, 0, member) : t;
  };
  auto part = [](Tensor of, int64_t row, int64_t count) { return narrow(of, 0, row, count); };
  // Gradients of the pre-activations as rows of a weight's gradient.
  auto rows = [&](int64_t column, int64_t count) -> Tensor {
    Tensor slots = d.dgates;
    return transpose(narrow(slots, 1, column, count), 0, 1);
  };
  if (wanted(kWeightIH)) {
    Tensor by_value = call.empty({input ? 0 : p.input_size, G}, call.compute());
    if (!input) {
      RowSums sums{integers.dtype,
                   integers.tokens.tokens,
                   integers.width,
                   G,
                   integers.values,
                   d.dgates.const_data_ptr(),
                   d.dgates.stride(0),
                   nullptr,
                   by_value.mutable_data_ptr()};
      const Tensor workspace = call.bytes(sum_rows_workspace(sums));
      sums.workspace = workspace.mutable_data_ptr();
      call.check(sum_rows(sums, call.stream()), "adding rows of gradients");
    }
    for (const GateRange& range : ranges) {
      Tensor to = part(gradient(kWeightIH), range.gate * H, range.count * H);
      if (input)
        call.multiply(rows(range.slot * H, range.count * H), *input, to);
      else
        torch::stable::copy_(to,
                             transpose(narrow(by_value, 1, range.slot * H, range.count * H), 0, 1));
    }
  }
  if (wanted(kWeightHH)) call.multiply(rows(S - G, G), before, gradient(kWeightHH));
  if (p.layer_norm) {
    norm_gradients(call, a, d.dnormed, member, g.members, wanted, gradient);
  } else if (wanted(kBiasIH) || wanted(kBiasHH)) {
    const int64_t dim = 0;
    Tensor sums = torch::stable::sum(d.dgates, {{&dim, 1}}, false, call.compute());
    if (wanted(kBiasIH))
      for (const GateRange& range : ranges) {
        Tensor to = part(gradient(kBiasIH), range.gate * H, range.count * H);
        torch::stable::copy_(to, narrow(sums, 0, range.slot * H, range.count * H));
      }
    if (wanted(kBiasHH)) {
      Tensor to = gradient(kBiasHH);
      torch::stable::copy_(to, narrow(sums, 0, S - G, G));
    }
  }
  if (wanted(kWeightHR)) call.multiply(transpose(d.dproj, 0, 1), d.hidden, gradient(kWeightHR));
}

// h_{t-1} of all tokens, for the gradient of W_hh; without that a tensor of no rows.
Tensor states_before(const CudaCall& call, const Layer& a, const Tensor& output,
                     const std::vector<bool>& needs, int64_t index) {
  const bool wanted = needs[3 + index + call.problem.weight_place(kWeightHH)];
  const Tensor before = call.empty({wanted ? call.tokens : 0, a.out_size()}, call.type());
  if (wanted)
    call.check(
        previous_states(a, output.const_data_ptr(), before.mutable_data_ptr(), call.stream()),
        "gathering states");
  return before;
}

// dgates W_ih: the rows of W_ih brought into the order of slots, which are the first.
void multiply_with_input_weight(const CudaCall& call, const Layer& a, const Differentials& d,
                                Tensor w_ih, const Tensor& out) {
  const int64_t H = a.hidden_size, G = a.gate_columns();
  const GateRangeList ranges = gate_ranges(a.cell, a.layer_norm).x;
  if (ranges.count > 1) {
    Tensor ordered = call.empty({G, w_ih.size(1)}, call.type());
    for (const GateRange& range : ranges) {
      Tensor to = narrow(ordered, 0, range.slot * H, range.count * H);
      torch::stable::copy_(to, narrow(w_ih, 0, range.gate * H, range.count * H));
    }
    w_ih = ordered;
  }
  Tensor slots = d.dgates;
  call.multiply(narrow(slots, 1, 0, G), w_ih, out);
}

ForwardOutputs run_forward(const Inputs& in, const Config& config, Save save) {
  const CudaCall call(in, config, false);
  const Problem& p = call.problem;
  const int64_t L = p.num_layers, D = p.num_directions, B = call.batch;
  const int64_t size = bytes(p.dtype), out = p.out_size();
  const bool saves = fills_reserve(save);
  auto [y, hn, cn, reserve, hs, cs] = call.outputs(save);
  if (B == 0) return {y, hn, cn, reserve, hs, cs};
  // The kernels write no cell states where a row has no step.
  if (p.all_states && call.lengths) torch::stable::zero_(cs);
  char *const hn_at = static_cast<char*>(hn.mutable_data_ptr()),
              *const cn_at =
                  traits(p.cell).has_cell ? static_cast<char*>(cn.mutable_data_ptr()) : nullptr;

  std::optional<Tensor> below;
  for (int64_t first = 0, end; first < L; first = end) {
    end = std::min(L, first + call.plan.layers);
    std::vector<Tensor> outputs, gates_x;  // of the group
    std::optional<Tensor> input;
    if (!p.indexed(first)) input = call.input_of(first, below, false);
    for (int64_t dir = 0; dir < D; dir++) {
      gates_x.push_back(call.empty({call.tokens, p.gate_rows()}, call.compute()));
      Tensor w_ih = call.weights[p.weight_index(first, dir, kWeightIH)];
      call.multiply_input(input, w_ih, gates_x.back());
    }
    std::vector<LayerForward> layers;
    for (int64_t layer = first; layer < end; layer++) {
      outputs.push_back(layer == L - 1          ? torch::stable::reshape(y, {call.tokens, D * out})
                        : saves || p.all_states ? call.output_in(reserve, hs, layer)
                                                : call.empty({call.tokens, D * out}, call.type()));
      for (int64_t dir = 0; dir < D; dir++) {
        LayerForward a{};
        static_cast<Layer&>(a) = call.layer_of(layer, dir);
        if (layer == first) a.gates_x = gates_x[dir].const_data_ptr();
        a.y = static_cast<char*>(outputs.back().mutable_data_ptr()) + dir * out * size;
        const int64_t row = (layer * D + dir) * B * size;
        a.hn = hn_at + row * out;
        a.cn = cn_at ? cn_at + row * p.hidden_size : nullptr;
        if (saves) {
          a.saved = call.slots_in(reserve, layer, dir);
          a.scales = call.scales_in(reserve, layer, dir);
        }
        if (saves || p.all_states) a.saved_c = call.cells_in(reserve, cs, layer, dir);
        layers.push_back(a);
      }
    }
    run_recurrence(call, layers, "forward");
    below = outputs.back();
  }
  return {y, hn, cn, reserve, hs, cs};
}

BackwardOutputs run_backward(const Inputs& in, const Config& config, const OutputGradients& given,
                             const SavedForBackward& saved, const Wanted& wanted) {
  const std::vector<bool>& needs = wanted.needs;
  const CudaCall call(in, config, true);
  const Problem& p = call.problem;
  const int64_t L = p.num_layers, D = p.num_directions, B = call.batch, tokens = call.tokens;
  const int64_t H = p.hidden_size, out = p.out_size();
  const int64_t size = bytes(p.dtype), wide = compute_bytes(p.dtype);
  const Tensor &y = saved.y, &reserve = saved.reserve;
  GradientTensors g(call, given, saved, wanted);
  if (B == 0) return g.in_type(call.type());

  auto output_of = [&](int64_t layer) {
    return layer == L - 1 ? torch::stable::reshape(y, {tokens, D * out})
                          : call.output_in(reserve, saved.hs, layer);
  };
  // What is given for the outputs of a layer, beside what the layer above contributes.
  auto given_for = [&](int64_t layer) -> const void* {
    if (layer == L - 1) return g.y ? g.y->const_data_ptr() : nullptr;
    return g.hs ? static_cast<const char*>(g.hs->const_data_ptr()) + layer * tokens * D * out * wide
                : nullptr;
  };
  // Of one layer and direction, among those of all; null stays null.
  auto state_at = [&](void* all, int64_t layer, int64_t dir, int64_t width) -> void* {
    return all ? static_cast<char*>(all) + (layer * D + dir) * B * width * wide : nullptr;
  };
  void *const dhn = g.hn ? g.hn->mutable_data_ptr() : nullptr, *const dcn =
                                                                   g.cn ? g.cn->mutable_data_ptr()
                                                                        : nullptr;

  OptionalTensor grad_out;  // of the output of the layer at hand; null: what is given for it
  for (int64_t end = L, first; end > g.lowest; end = first) {
    first = std::max(g.lowest, (end - 1) / call.plan.layers * call.plan.layers);
    std::vector<LayerBackward> layers;
    std::vector<Differentials> differentials;
    std::vector<Tensor> unwanted;  // gradients that no one asked for
    for (int64_t layer = first; layer < end; layer++)
      for (int64_t dir = 0; dir < D; dir++) {
        Differentials d{call.empty({tokens, p.slot_columns()}, call.type()),
                        call.empty({p.proj_size ? tokens : 0, out}, call.type()),
                        call.empty({p.proj_size ? tokens : 0, H}, call.type()),
                        call.empty({tokens, p.normed_columns()}, call.compute())};
        LayerBackward a{};
        static_cast<Layer&>(a) = call.layer_of(layer, dir);
        a.y = static_cast<const char*>(output_of(layer).const_data_ptr()) + dir * out * size;
        a.saved = call.slots_in(reserve, layer, dir),
        a.saved_c = call.cells_in(reserve, saved.cs, layer, dir);
        a.scales = call.scales_in(reserve, layer, dir);
        if (p.layer_norm) a.dnormed = d.dnormed.mutable_data_ptr();
        const void* const dy =
            layer == end - 1 && grad_out ? grad_out->const_data_ptr() : given_for(layer);
        if (dy) a.dy = static_cast<const char*>(dy) + dir * out * wide;
        a.dy_stride = D * out;
        if (g.cs)
          a.dcs = static_cast<const char*>(g.cs->const_data_ptr()) +
                  (layer * tokens * D + dir) * H * wide;
        a.dhn = state_at(dhn, layer, dir, out), a.dcn = state_at(dcn, layer, dir, H);
        auto result = [&](bool needed, Tensor& all, int64_t width) {
          if (needed) return state_at(all.mutable_data_ptr(), layer, dir, width);
          unwanted.push_back(call.empty({B, width}, call.compute()));
          return unwanted.back().mutable_data_ptr();
        };
        a.dh0 = result(g.need_hx, g.hx, out);
        if (traits(p.cell).has_cell) a.dc0 = result(g.need_cx, g.cx, H);
        a.dgates = d.dgates.mutable_data_ptr();
        if (p.proj_size)
          a.dproj = d.dproj.mutable_data_ptr(), a.hidden = d.hidden.mutable_data_ptr();
        layers.push_back(a);
        differentials.push_back(d);
      }
    run_recurrence(call, layers, "backward");
    if (tokens == 0) continue;

    for (int64_t layer = end - 1; layer >= first; layer--) {
      const Tensor output = output_of(layer);
      std::optional<Tensor> below, input;
      if (layer) below = output_of(layer - 1);
      for (int64_t dir = 0; dir < D; dir++) {
        const int64_t index = p.weight_index(layer, dir, WeightKind(0)),
                      at = (layer - first) * D + dir;
        const auto begin = needs.begin() + 3 + index;
        if (std::find(begin, begin + p.weights_per_direction(), true) ==
            begin + p.weights_per_direction())
          continue;
        if (!input && !p.indexed(layer)) input = call.input_of(layer, below, true);
        Tensor own = narrow(const_cast<Tensor&>(output), 1, dir * out, out);
        const Tensor before = states_before(call, layers[at], own, needs, index);
        const Differentials& d = differentials[at];
        for (int64_t m = 0; m < g.members; m++) {
          auto rows = [&](const Tensor& all) { return rows_of_member(all, m, g.members); };
          Integers integers = call.integers();
          Tensor values = call.empty({0}, ScalarType::Long);
          if (!input && g.members > 1) {
            values = torch::stable::contiguous(rows(torch::stable::reshape(call.x, {tokens, 1})));
            integers.values = static_cast<const int64_t*>(values.const_data_ptr());
            integers.tokens.tokens = tokens / g.members;
          }
          weight_gradients(call, layers[at],
                           {rows(d.dgates), rows(d.dproj), rows(d.hidden), d.dnormed},
                           input ? std::optional<Tensor>(rows(*input)) : std::nullopt, integers,
                           rows(before), needs, index, m, g);
        }
      }
    }

    grad_out = std::nullopt;
    if (!g.wants_input(first)) continue;
    const int64_t width = p.layer_input(first);
    const Tensor grad_in = first == 0 ? torch::stable::reshape(g.x, {tokens, width})
                                      : call.empty({tokens, width}, call.compute());
    Tensor other = call.empty({D == 2 ? tokens : 0, width}, call.compute());
    for (int64_t dir = 0; dir < D; dir++)
      multiply_with_input_weight(call, layers[dir], differentials[dir],
                                 call.weights[p.weight_index(first, dir, kWeightIH)],
                                 dir == 0 ? grad_in : other);
    const uint8_t* mask = call.mask_of(first);
    const void* const more = first ? given_for(first - 1) : nullptr;
    if (D == 2 || mask || more)
      call.check(input_gradient(
                     {p.dtype, grad_in.const_data_ptr(), D == 2 ? other.const_data_ptr() : nullptr,
                      more, mask, call.mask_scale(), tokens * width, grad_in.mutable_data_ptr()},
                     call.stream()),
                 "the gradient of a layer's input");
    grad_out = grad_in;
  }
  return g.in_type(call.type());
}

}  // namespace

// What a call has written before a launch is refused is its own, new, and written again.
ForwardOutputs forward_cuda(const Inputs& in, const Config& config, Save save) {
  if (stacked(in.weights)) return forward_each(in, config, save, forward_cuda);
  return until_accepted([&] { return run_forward(in, config, save); });
}

BackwardOutputs backward_cuda(const Inputs& in, const Config& config, const OutputGradients& given,
                              const SavedForBackward& saved, const Wanted& wanted) {
  if (stacked(in.weights)) return backward_each(in, config, given, saved, wanted, backward_cuda);
  return until_accepted([&] { return run_backward(in, config, given, saved, wanted); });
}

}  // namespace fusedrnn
