#include "torch/cuda_gradients.h"

#include <algorithm>

#include "cuda/elementwise.h"

namespace fusedrnn {

using torch::stable::narrow;
using torch::stable::transpose;

Tensor rows_of_member(Tensor all, int64_t member, int64_t members) {
  if (members == 1) return all;
  Tensor grouped = torch::stable::reshape(all, {all.size(0) / members, members, all.size(1)});
  return torch::stable::select(grouped, 1, member);
}

bool wants_weights(const Problem& p, const std::vector<bool>& needs, int64_t index) {
  const auto begin = needs.begin() + 3 + index, end = begin + p.weights_per_direction();
  return std::find(begin, end, true) != end;
}

namespace {

// The gradient of W_ih by integers: for each value the sum of its tokens' rows, of one member.
void add_rows_of_integers(const CudaCall& call, const Tensor& rows, int64_t member, int64_t members,
                          Tensor& out) {
  const Integers integers = call.integers();
  RowSums sums{integers.dtype,        call.tokens / members, integers.width, out.size(1),
               integers.values,       rows.const_data_ptr(), rows.stride(0), nullptr,
               out.mutable_data_ptr()};
  Tensor values = call.empty({0}, ScalarType::Long);
  if (members > 1) {
    values = torch::stable::contiguous(
        rows_of_member(torch::stable::reshape(call.x, {call.tokens, 1}), member, members));
    sums.values = static_cast<const int64_t*>(values.const_data_ptr());
  }
  const Tensor workspace = call.bytes(sum_rows_workspace(sums));
  sums.workspace = workspace.mutable_data_ptr();
  call.check(sum_rows(sums, call.stream()), "adding rows of gradients");
}

// The gradients of the biases, gains and shift of layer normalisation: sums of dnormed, of gains
// times the normalised value. wanted(kind), gradient(kind): of a weight.
template <class Wanted, class Gradient>
void norm_gradients(const CudaCall& call, const LayerSaved& a, const Tensor& dnormed,
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

}  // namespace

void weight_gradients(const CudaCall& call, const LayerSaved& a, const WeightFactors& f,
                      const std::vector<bool>& needs, int64_t index, int64_t member,
                      GradientTensors& g) {
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
  auto rows = [&](Tensor slots, int64_t column, int64_t count) -> Tensor {
    return transpose(narrow(slots, 1, column, count), 0, 1);
  };
  if (wanted(kWeightIH)) {
    Tensor by_value = call.empty({f.input ? 0 : p.input_size, G}, call.compute());
    if (!f.input) add_rows_of_integers(call, f.of_input, member, g.members, by_value);
    for (const GateRange& range : ranges) {
      Tensor to = part(gradient(kWeightIH), range.gate * H, range.count * H);
      if (f.input)
        call.multiply(rows(f.of_input, range.slot * H, range.count * H), *f.input, to);
      else
        torch::stable::copy_(to,
                             transpose(narrow(by_value, 1, range.slot * H, range.count * H), 0, 1));
    }
  }
  if (wanted(kWeightHH)) call.multiply(rows(f.of_states, S - G, G), f.before, gradient(kWeightHH));
  if (p.layer_norm) {
    norm_gradients(call, a, *f.dnormed, member, g.members, wanted, gradient);
  } else if (wanted(kBiasIH) || wanted(kBiasHH)) {
    const int64_t dim = 0;
    Tensor sums = torch::stable::sum(f.of_biases, {{&dim, 1}}, false, call.compute());
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
  if (wanted(kWeightHR)) {
    Tensor dproj = f.dproj;
    call.multiply(transpose(dproj, 0, 1), f.hidden, gradient(kWeightHR));
  }
}

Tensor in_order_of_slots(const CudaCall& call, Tensor w_ih) {
  const Problem& p = call.problem;
  const int64_t H = p.hidden_size;
  const GateRangeList ranges = gate_ranges(p.cell, p.layer_norm).x;
  if (ranges.count == 1) return w_ih;
  Tensor ordered = call.empty({p.gate_rows(), w_ih.size(1)}, call.type());
  for (const GateRange& range : ranges) {
    Tensor to = narrow(ordered, 0, range.slot * H, range.count * H);
    torch::stable::copy_(to, narrow(w_ih, 0, range.gate * H, range.count * H));
  }
  return ordered;
}

}  // namespace fusedrnn
