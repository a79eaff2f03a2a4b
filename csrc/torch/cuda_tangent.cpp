// The derivatives of the ops in one direction, on CUDA tensors; see tangents.py. As in cuda.cpp all
// products but those with W_hh and W_hr are products over all steps.
//
// A product with a tangent, such as dx W^T + x dW^T, is one of twice the depth: rows (dx, x) times
// rows (W, dW). The same rows, twice as many of half the width, are factors of the sum
// g^T dx + dg^T x of a weight's gradient, where rows of g and of its tangent take turns.
#include "torch/cuda_gradients.h"

namespace fusedrnn {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

void put(const Tensor& to, int64_t dim, int64_t start, const Tensor& from) {
  Tensor whole = to, part = narrow(whole, dim, start, from.size(dim));
  torch::stable::copy_(part, from);
}
// Both along `dim` with `gap` zeros between them.
Tensor joined(const CudaCall& call, int64_t dim, const Tensor& a, int64_t gap, const Tensor& b) {
  std::vector<int64_t> sizes{a.sizes().begin(), a.sizes().end()};
  sizes[dim] += gap + b.size(dim);
  const Tensor both = call.empty(sizes, call.type());
  Tensor whole = both, zeros = narrow(whole, dim, a.size(dim), gap);
  if (gap) torch::stable::zero_(zeros);
  put(both, dim, 0, a), put(both, dim, a.size(dim) + gap, b);
  return both;
}
// Of matrices, or of one for each member: rows of both, a row of the first with one of the second
// beside it.
Tensor beside(const CudaCall& call, const Tensor& a, const Tensor& b) {
  return joined(call, a.dim() - 1, a, 0, b);
}
// Likewise: the rows of a, `gap` rows of zeros, and the rows of b.
Tensor above(const CudaCall& call, const Tensor& a, int64_t gap, const Tensor& b) {
  return joined(call, a.dim() - 2, a, gap, b);
}
// The left part of each row, then its right part, as rows of their own; of a matrix, or of one for
// each member.
Tensor halves(const Tensor& rows) {
  std::vector<int64_t> sizes{rows.sizes().begin(), rows.sizes().end()};
  sizes[sizes.size() - 2] *= 2, sizes.back() /= 2;
  return torch::stable::reshape(rows, sizes);
}

// A call with tangents of its tensors, and what forward left of it.
struct TangentCall : CudaCall {
  const TangentTensors v;

  TangentCall(const Inputs& in, const Config& config, const Tangents& direction, bool backward)
      : CudaCall(in, config, backward, true), v(*this, direction) {}

  // Empty: zeros. As weight().
  Tensor weight_tangent(int64_t layer, int64_t dir, WeightKind kind) const {
    const Tensor dw = v.weights[problem.weight_index(layer, dir, kind)];
    const bool alone = dw.numel() > 0 && stacked(weights) && ensemble == 1;
    return alone ? torch::stable::select(dw, 0, 0) : dw;
  }
  // The output of a layer [tokens, width], or the tangent of that.
  Tensor output(int64_t layer, const SavedForBackward& of) const {
    if (layer < problem.num_layers - 1) return output_in(of.reserve, of.hs, layer);
    return torch::stable::reshape(of.y, {tokens, out_width()});
  }
  // What was saved of a layer and direction, or the tangents of that.
  LayerSaved layer_in(const SavedForBackward& of, int64_t layer, int64_t dir) const {
    return saved_of(layer, dir, output(layer, of), of.reserve, of.cs);
  }
  // `a`, of the values, with the tangents of states and weights in their place.
  template <class L>
  L with_tangents(L a, int64_t layer, int64_t dir) const {
    a.weights = v.weights_of(*this, layer, dir);
    auto state = [&](const OptionalTensor& all, int64_t width) -> const void* {
      const int64_t at = (layer * problem.num_directions + dir) * batch * width;
      return all ? static_cast<const char*>(all->const_data_ptr()) +
                       at * fusedrnn::bytes(problem.dtype)
                 : nullptr;
    };
    a.h0 = state(v.hx, problem.out_size()), a.c0 = state(v.cx, problem.hidden_size);
    return a;
  }

  // What a layer reads, its tangent, and the tangent beside the value; none of integers. The value
  // may be left out where only its tangent is used.
  struct Input {
    std::optional<Tensor> value, tangent, both;

    const Tensor& pair(const CudaCall& call) {
      if (!both) both = beside(call, *tangent, *value);
      return *both;
    }
  };
  // below: the output of the layer below and its tangent.
  Input input_pair(int64_t layer, const std::optional<Tensor>& below,
                   const std::optional<Tensor>& below_tangent, bool with_value, bool exact) const {
    if (problem.indexed(layer)) return {};
    Input found{};
    if (with_value) found.value = input_of(layer, layer ? *below : x, exact);
    if (layer)
      found.tangent = input_of(layer, *below_tangent, exact);
    else if (v.x)
      found.tangent = input_of(layer, *v.x, exact);
    return found;
  }

  // What the input and the tangent of W_ih make of the tangents of a layer's gates; null for zeros.
  std::optional<Tensor> gates_of_input(int64_t layer, int64_t dir, Input& input) const {
    const Tensor w = weight(layer, dir, kWeightIH), dw = weight_tangent(layer, dir, kWeightIH);
    const bool with_dw = dw.numel() > 0;
    if (!input.tangent && !with_dw) return std::nullopt;
    const Tensor gates = empty({tokens, problem.gate_rows()}, compute());
    if (!input.tangent)
      multiply_input(input.value, dw, gates);
    else if (!with_dw)
      multiply_input(input.tangent, w, gates);
    else
      multiply_input(input.pair(*this), beside(*this, w, dw), gates);
    return gates;
  }

  // What was multiplied with W_hh, or the tangent of that, written to the columns of `to` from
  // `column` on.
  void put_states_before(const LayerSaved& a, const Tensor& to, int64_t column) const {
    Tensor whole = to, part = narrow(whole, 1, column, a.out_size());
    check(previous_states(a, a.y, part.mutable_data_ptr(), to.size(1), stream()),
          "gathering states");
  }
};

ForwardOutputs run_forward_tangent(const Inputs& in, const Config& config,
                                   const Tangents& direction, const SavedForBackward& saved,
                                   bool save) {
  const TangentCall call(in, config, direction, false);
  const Problem& p = call.problem;
  const int64_t L = p.num_layers, D = p.num_directions, B = call.batch, tokens = call.tokens;
  const int64_t size = bytes(p.dtype), out = p.out_size();
  const std::vector<bool> needs(3 + call.weights.size());
  GradientTensors(call, {}, saved, {needs, 0});  // checks what was saved
  auto [dy, dhn, dcn, dreserve, dhs, dcs] = call.outputs(save ? Save::kReserve : Save::kEmpty);
  if (B == 0) return {dy, dhn, dcn, dreserve, dhs, dcs};
  // As in forward, the kernels write no cell states where a row has no step.
  if (p.all_states && call.lengths) torch::stable::zero_(dcs);
  const SavedForBackward dmade{dy, dreserve, dhs, dcs};
  char *const dhn_at = static_cast<char*>(dhn.mutable_data_ptr()),
              *const dcn_at =
                  traits(p.cell).has_cell ? static_cast<char*>(dcn.mutable_data_ptr()) : nullptr;

  std::optional<Tensor> below, below_tangent;
  for (int64_t layer = 0; layer < L; layer++) {
    const Tensor output = layer == L - 1 || save || p.all_states
                              ? call.output(layer, dmade)
                              : call.empty({tokens, D * out}, call.type());
    bool moves = false;  // W_ih of a direction
    for (int64_t dir = 0; dir < D; dir++)
      moves |= call.weight_tangent(layer, dir, kWeightIH).numel() > 0;
    TangentCall::Input input = call.input_pair(layer, below, below_tangent, moves, false);
    for (int64_t dir = 0; dir < D; dir++) {
      LayerForwardTangent both{};
      both.value = call.layer_in(saved, layer, dir);
      LayerForward& a = both.tangent;
      static_cast<Layer&>(a) = call.with_tangents(static_cast<Layer>(both.value), layer, dir);
      const std::optional<Tensor> gates_x = call.gates_of_input(layer, dir, input);
      if (gates_x) a.gates_x = gates_x->const_data_ptr();
      std::optional<Tensor> known_h, w_hr;
      if (a.weights.w_hh) {
        const Tensor before = call.empty({tokens, out}, call.type());
        call.put_states_before(both.value, before, 0);
        known_h = call.empty({tokens, p.gate_rows()}, call.compute());
        Tensor dw = call.weight_tangent(layer, dir, kWeightHH);
        call.multiply(by_member(before, call.ensemble), transpose(dw, -2, -1),
                      by_member(*known_h, call.ensemble));
        both.known_h = known_h->const_data_ptr();
      }
      if (a.weights.w_hr) {
        w_hr = beside(call, call.weight(layer, dir, kWeightHR),
                      call.weight_tangent(layer, dir, kWeightHR));
        both.w_hr = w_hr->const_data_ptr();
      }
      a.y = static_cast<char*>(output.mutable_data_ptr()) + dir * out * size;
      const int64_t row = (layer * D + dir) * B * size;
      a.hn = dhn_at + row * out;
      a.cn = dcn_at ? dcn_at + row * p.hidden_size : nullptr;
      if (save) {
        a.saved = call.slots_in(dreserve, layer, dir);
        a.scales = call.scales_in(dreserve, layer, dir);
      }
      if (save || (p.all_states && dcn_at)) a.saved_c = call.cells_in(dreserve, dcs, layer, dir);
      const Tensor workspace = call.bytes(stepwise_workspace(both));
      call.check(stepwise_forward_tangent(both, workspace.mutable_data_ptr(), call.multiply(),
                                          call.stream()),
                 "the derivative of forward");
    }
    below = call.output(layer, saved), below_tangent = output;
  }
  return {dy, dhn, dcn, dreserve, dhs, dcs};
}

// What backward of a layer and direction leaves of values and tangents side by side, as
// LayerBackwardTangent says.
struct Differentials {
  Tensor dgates, dproj, hidden;
  Tensor dnormed[2];  // with layer normalisation: of values, of tangents
};

void weight_gradients_of(const TangentCall& call, const LayerBackwardTangent& a,
                         const Differentials& of, TangentCall::Input& input,
                         const std::vector<bool>& needs, int64_t index, GradientTensors& d) {
  const Problem& p = call.problem;
  const int64_t tokens = call.tokens, S = p.slot_columns(), out = p.out_size();
  const bool wants_w_hh = needs[3 + index + p.weight_place(kWeightHH)];
  const Tensor before = call.empty({wants_w_hh ? tokens : 0, 2 * out}, call.type());
  if (wants_w_hh) {
    call.put_states_before(a.tangent, before, 0);
    call.put_states_before(a.value, before, out);
  }
  const bool moves = input.tangent.has_value();
  auto rows = [&](const Tensor& all) { return by_member(all, d.members); };
  Tensor dgates = of.dgates;
  const Tensor both = halves(rows(dgates)), tangent = rows(narrow(dgates, 1, S, S));
  std::optional<Tensor> read;
  if (input.value) read = moves ? halves(rows(input.pair(call))) : rows(*input.value);
  weight_gradients(
      call, a.value,
      {moves ? both : tangent, read, both, halves(rows(before)), tangent, halves(rows(of.dproj)),
       halves(rows(of.hidden)), of.dnormed[1], of.dnormed[0], a.tangent.saved},
      needs, index, d);
}

BackwardOutputs run_backward_tangent(const Inputs& in, const Config& config,
                                     const OutputGradients& given, const OutputGradients& dgiven,
                                     const Tangents& direction, const SavedForBackward& saved,
                                     const SavedForBackward& dsaved, const Wanted& wanted) {
  const TangentCall call(in, config, direction, true);
  const Problem& p = call.problem;
  const int64_t L = p.num_layers, D = p.num_directions, B = call.batch, tokens = call.tokens;
  const int64_t H = p.hidden_size, out = p.out_size(), S = p.slot_columns(), G = p.gate_rows();
  const int64_t size = bytes(p.dtype), wide = compute_bytes(p.dtype);
  const std::vector<bool> nothing(wanted.needs.size());
  // Of the value, of the tangent; the results are those of the second.
  GradientTensors g(call, given, saved, {nothing, 0}), d(call, dgiven, dsaved, wanted);
  if (B == 0) return d.in_type(call.type());

  OptionalTensor grad_out[] = {g.y, d.y};  // of the output of the layer at hand; null: zeros
  for (int64_t layer = L - 1; layer >= d.lowest; layer--) {
    std::vector<LayerBackwardTangent> layers;
    std::vector<Differentials> differentials;
    for (int64_t dir = 0; dir < D; dir++) {
      const int64_t projected = p.proj_size ? tokens : 0;
      const Differentials& of = differentials.emplace_back(
          Differentials{call.empty({tokens, 2 * S}, call.type()),
                        call.empty({projected, 2 * out}, call.type()),
                        call.empty({projected, 2 * H}, call.type()),
                        {call.empty({tokens, p.normed_columns()}, call.compute()),
                         call.empty({tokens, p.normed_columns()}, call.compute())}});
      LayerBackwardTangent& both = layers.emplace_back();
      static_cast<LayerSaved&>(both.value) = call.layer_in(saved, layer, dir);
      static_cast<LayerSaved&>(both.tangent) =
          call.with_tangents(call.layer_in(dsaved, layer, dir), layer, dir);
      std::vector<Tensor> unwanted;  // gradients that no one asked for
      auto fill = [&](LayerBackward& a, GradientTensors& of_states, int which) {
        auto element = [&](const Tensor& all, int64_t i, int64_t bytes) -> void* {
          return static_cast<char*>(all.mutable_data_ptr()) + i * bytes;
        };
        const int64_t row = (layer * D + dir) * B;
        if (grad_out[which]) a.dy = element(*grad_out[which], dir * out, wide);
        a.dy_stride = D * out;
        if (of_states.cs) a.dcs = element(*of_states.cs, (layer * tokens * D + dir) * H, wide);
        if (of_states.hn) a.dhn = element(*of_states.hn, row * out, wide);
        if (of_states.cn) a.dcn = element(*of_states.cn, row * H, wide);
        auto result = [&](bool needed, const Tensor& all, int64_t width) {
          if (needed) return element(all, row * width, wide);
          unwanted.push_back(call.empty({B, width}, call.compute()));
          return element(unwanted.back(), 0, wide);
        };
        a.dh0 = result(of_states.need_hx, of_states.hx, out);
        if (traits(p.cell).has_cell) a.dc0 = result(of_states.need_cx, of_states.cx, H);
        a.dgates = element(of.dgates, which * S, size);
        if (p.layer_norm) a.dnormed = element(of.dnormed[which], 0, wide);
        if (!p.proj_size) return;
        a.dproj = element(of.dproj, which * out, size);
        a.hidden = element(of.hidden, (1 - which) * H, size);
      };
      fill(both.value, g, 0), fill(both.tangent, d, 1);
      std::optional<Tensor> w_hh, w_hr;
      if (both.tangent.weights.w_hh) {
        w_hh = above(call, call.weight_tangent(layer, dir, kWeightHH), S - G,
                     call.weight(layer, dir, kWeightHH));
        both.w_hh = w_hh->const_data_ptr();
      }
      if (both.tangent.weights.w_hr) {
        w_hr = above(call, call.weight_tangent(layer, dir, kWeightHR), 0,
                     call.weight(layer, dir, kWeightHR));
        both.w_hr = w_hr->const_data_ptr();
      }
      const Tensor workspace = call.bytes(stepwise_workspace(both));
      call.check(stepwise_backward_tangent(both, workspace.mutable_data_ptr(), call.multiply(),
                                           call.stream()),
                 "the derivative of backward");
    }
    if (tokens == 0) continue;

    std::optional<TangentCall::Input> input;
    for (int64_t dir = 0; dir < D; dir++) {
      const int64_t index = p.weight_index(layer, dir, WeightKind(0));
      if (!wants_weights(p, wanted.needs, index)) continue;
      if (!input) {
        std::optional<Tensor> below, below_tangent;
        if (layer) below = call.output(layer - 1, saved);
        if (layer) below_tangent = call.output(layer - 1, dsaved);
        input = call.input_pair(layer, below, below_tangent, true, true);
      }
      weight_gradients_of(call, layers[dir], differentials[dir], *input, wanted.needs, index, d);
    }

    grad_out[0] = grad_out[1] = std::nullopt;
    if (!d.wants_input(layer)) continue;
    const int64_t width = p.layer_input(layer);
    std::vector<Tensor> values, tangents;  // of each direction
    for (int64_t dir = 0; dir < D; dir++) {
      auto product = [&](std::vector<Tensor>& to, int64_t column, const Tensor& w) {
        Tensor dgates = differentials[dir].dgates;
        to.push_back(layer == 0 && dir == 0 ? torch::stable::reshape(d.x, {tokens, width})
                                            : call.empty({tokens, width}, call.compute()));
        call.multiply(by_member(narrow(dgates, 1, column, w.size(w.dim() - 2)), call.ensemble), w,
                      by_member(to.back(), call.ensemble));
      };
      const Tensor w = in_order_of_slots(call, call.weight(layer, dir, kWeightIH));
      const Tensor dw = call.weight_tangent(layer, dir, kWeightIH);
      if (dw.numel())
        product(tangents, 0, above(call, in_order_of_slots(call, dw), S - G, w));
      else
        product(tangents, S, w);
      if (layer > d.lowest) product(values, 0, w);
    }
    const uint8_t* const mask = call.mask_of(layer);
    // `given`: beside what the layer contributes, for the states of the one below.
    auto sum = [&](const std::vector<Tensor>& parts,
                   const GradientTensors& given) -> OptionalTensor {
      if (parts.empty()) return std::nullopt;
      void* const at = parts[0].mutable_data_ptr();
      const void* const more = layer && given.hs
                                   ? static_cast<const char*>(given.hs->const_data_ptr()) +
                                         (layer - 1) * tokens * width * wide
                                   : nullptr;
      if (D == 2 || mask || more)
        call.check(input_gradient({p.dtype, at, D == 2 ? parts[1].const_data_ptr() : nullptr, more,
                                   mask, call.mask_scale(), tokens * width, at},
                                  call.stream()),
                   "the gradient of a layer's input");
      return parts[0];
    };
    grad_out[0] = sum(values, g), grad_out[1] = sum(tangents, d);
  }
  return d.in_type(call.type());
}

}  // namespace

ForwardOutputs forward_tangent_cuda(const Inputs& in, const Config& config,
                                    const Tangents& direction, const SavedForBackward& saved,
                                    bool save) {
  return until_accepted([&] { return run_forward_tangent(in, config, direction, saved, save); });
}

BackwardOutputs backward_tangent_cuda(const Inputs& in, const Config& config,
                                      const OutputGradients& given, const OutputGradients& dgiven,
                                      const Tangents& direction, const SavedForBackward& saved,
                                      const SavedForBackward& dsaved, const Wanted& wanted) {
  return until_accepted([&] {
    return run_backward_tangent(in, config, given, dgiven, direction, saved, dsaved, wanted);
  });
}

}  // namespace fusedrnn
