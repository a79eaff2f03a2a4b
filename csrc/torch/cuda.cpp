// The ops on CUDA tensors. Layers go in groups, as the plan says: the product of the input and
// W_ih for all steps of a group's lowest layer at once, then the recurrence of its layers by one
// of the backends; in backward the recurrence first, and then every gradient of a weight or an
// input as one product over all steps.
#include "torch/cuda.h"

#include <algorithm>

#include "cuda/elementwise.h"
#include "cuda/persistent/layers.h"
#include "torch/cuda_gradients.h"

namespace fusedrnn {
namespace {

using torch::stable::narrow;

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

// What the recurrence of a layer and direction leaves for the gradients over all steps.
struct Differentials {
  Tensor dgates;         // storage type [tokens, slots * hidden]
  Tensor dproj, hidden;  // with a projection: [tokens, out], [tokens, hidden]
  Tensor dnormed;        // with layer normalisation: compute type [tokens, normed columns]
};

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
    if (!p.indexed(first)) input = call.input_of(first, first ? *below : call.x, false);
    for (int64_t dir = 0; dir < D; dir++) {
      gates_x.push_back(call.empty({call.tokens, p.gate_rows()}, call.compute()));
      call.multiply_input(input, call.weight(first, dir, kWeightIH), gates_x.back());
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
        static_cast<LayerSaved&>(a) =
            call.saved_of(layer, dir, output_of(layer), reserve, saved.cs);
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
      std::optional<Tensor> input;
      for (int64_t dir = 0; dir < D; dir++) {
        const int64_t index = p.weight_index(layer, dir, WeightKind(0)),
                      at = (layer - first) * D + dir;
        if (!wants_weights(p, needs, index)) continue;
        if (!input && !p.indexed(layer))
          input = call.input_of(layer, layer ? output_of(layer - 1) : call.x, true);
        const bool wants_w_hh = needs[3 + index + p.weight_place(kWeightHH)];
        const Tensor before = call.empty({wants_w_hh ? tokens : 0, out}, call.type());
        if (wants_w_hh)
          call.check(previous_states(layers[at], layers[at].y, before.mutable_data_ptr(), out,
                                     call.stream()),
                     "gathering states");
        const Differentials& d = differentials[at];
        auto of_members = [&](const Tensor& rows) { return by_member(rows, g.members); };
        const Tensor dgates = of_members(d.dgates);
        std::optional<Tensor> read;
        if (input) read = of_members(*input);
        weight_gradients(call, layers[at],
                         {dgates, read, dgates, of_members(before), dgates, of_members(d.dproj),
                          of_members(d.hidden), d.dnormed},
                         needs, index, g);
      }
    }

    grad_out = std::nullopt;
    if (!g.wants_input(first)) continue;
    const int64_t width = p.layer_input(first);
    const Tensor grad_in = first == 0 ? torch::stable::reshape(g.x, {tokens, width})
                                      : call.empty({tokens, width}, call.compute());
    Tensor other = call.empty({D == 2 ? tokens : 0, width}, call.compute());
    for (int64_t dir = 0; dir < D; dir++) {
      Tensor dgates = differentials[dir].dgates;
      call.multiply(by_member(narrow(dgates, 1, 0, p.gate_rows()), call.ensemble),
                    in_order_of_slots(call, call.weight(first, dir, kWeightIH)),
                    by_member(dir == 0 ? grad_in : other, call.ensemble));
    }
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
  return until_accepted([&] { return run_forward(in, config, save); });
}

BackwardOutputs backward_cuda(const Inputs& in, const Config& config, const OutputGradients& given,
                              const SavedForBackward& saved, const Wanted& wanted) {
  return until_accepted([&] { return run_backward(in, config, given, saved, wanted); });
}

}  // namespace fusedrnn
