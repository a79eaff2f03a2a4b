#include "torch/cuda_gradients.h"

#include <algorithm>

#include "cuda/elementwise.h"

namespace fusedrnn {

using torch::stable::narrow;
using torch::stable::transpose;

bool wants_weights(const Problem& p, const std::vector<bool>& needs, int64_t index) {
  const auto begin = needs.begin() + 3 + index, end = begin + p.weights_per_direction();
  return std::find(begin, end, true) != end;
}

namespace {

// The columns of a matrix, or of one for each member, from `first` on, and its rows.
Tensor columns_of(Tensor matrix, int64_t first, int64_t count) {
  return narrow(matrix, matrix.dim() - 1, first, count);
}
Tensor rows_of(Tensor matrix, int64_t first, int64_t count) {
  return narrow(matrix, matrix.dim() - 2, first, count);
}

// The gradient of W_ih by integers: for each member and value the sum of its tokens' rows, which
// lie `stride` elements apart.
Tensor sums_by_integers(const CudaCall& call, const void* rows, int64_t stride, int64_t members) {
  const Problem& p = call.problem;
  const int64_t G = p.gate_rows(), values = members * p.input_size;
  const Tensor out = call.empty({values, G}, call.compute());
  Integers integers = call.integers();
  const Tensor indices = call.empty({members > 1 ? call.tokens : 0}, ScalarType::Long);
  if (members > 1) {
    integers.members = members;
    int64_t* const at = static_cast<int64_t*>(indices.mutable_data_ptr());
    call.check(rows_of_members(integers, at, call.stream()), "reading integers");
    integers.values = at;
  }
  RowSums sums{p.dtype, call.tokens,           values, G, integers.values, rows, stride,
               nullptr, out.mutable_data_ptr()};
  const Tensor workspace = call.bytes(sum_rows_workspace(sums));
  sums.workspace = workspace.mutable_data_ptr();
  call.check(sum_rows(sums, call.stream()), "adding rows of gradients");
  return members == 1 ? out : torch::stable::reshape(out, {members, p.input_size, G});
}

// The sums over the rows of a matrix, or of one for each member.
Tensor sums_of(const CudaCall& call, const Tensor& rows) {
  const int64_t dim = rows.dim() - 2;
  return torch::stable::sum(rows, {{&dim, 1}}, false, call.compute());
}

// The gradients of the biases, gains and shift of layer normalisation: sums of dnormed, of gains
// times the normalised value. wanted(kind), gradient(kind): of a weight.
template <class Wanted, class Gradient>
void norm_gradients(const CudaCall& call, const LayerSaved& a, const WeightFactors& f,
                    int64_t members, Wanted wanted, Gradient gradient) {
  const Tensor& dnormed = *f.dnormed;
  const int64_t H = a.hidden_size, tokens = call.tokens;
  const CellTraits cell = traits(a.cell);
  // `count` gates from `gate` on, whose gradients are in dnormed from `slot` on; factor: the saved
  // slot of their values, -1: a bias.
  auto add_up = [&](WeightKind kind, int64_t gate, int64_t slot, int64_t count, int64_t factor) {
    if (!wanted(kind)) return;
    Tensor all = dnormed;
    Tensor terms = narrow(all, 1, slot * H, count * H);
    if (factor >= 0) {
      terms = call.empty({tokens, count * H}, call.compute());
      auto column = [&](const std::optional<Tensor>& of) -> const void* {
        return of ? static_cast<const char*>(of->const_data_ptr()) +
                        slot * H * compute_bytes(a.dtype)
                  : nullptr;
      };
      auto saved = [&](const void* of) -> const void* {
        return of ? static_cast<const char*>(of) + factor * H * bytes(a.dtype) : nullptr;
      };
      call.check(times_saved({a.dtype, a.tokens, column(f.dnormed), saved(a.saved),
                              column(f.value_dnormed), saved(f.saved_tangents), dnormed.size(1),
                              a.cell_traits().saved * H, count * H, terms.mutable_data_ptr()},
                             call.stream()),
                 "the gradient of a gain");
    }
    Tensor to = columns_of(gradient(kind), gate * H, count * H);
    torch::stable::copy_(to, sums_of(call, by_member(terms, members)));
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
                      const std::vector<bool>& needs, int64_t index, GradientTensors& g) {
  const int64_t H = a.hidden_size, S = a.slot_columns(), G = a.gate_columns();
  const GateRangeList ranges = gate_ranges(a.cell, a.layer_norm).x;
  const Problem& p = call.problem;
  auto wanted = [&](WeightKind kind) {
    return p.has_weight(kind) && needs[3 + index + p.weight_place(kind)];
  };
  // Where there are members, with theirs in the leading dimension.
  auto gradient = [&](WeightKind kind) -> Tensor {
    Tensor t = g.weights[index + p.weight_place(kind)];
    const Tensor& w = call.weights[index + p.weight_place(kind)];
    const bool led = t.dim() > w.dim() - stacked(call.weights);
    return led && g.members == 1 ? torch::stable::select(t, 0, 0) : t;
  };
  // Gradients of the pre-activations as rows of a weight's gradient.
  auto rows = [](const Tensor& slots, int64_t column, int64_t count) -> Tensor {
    return transpose(columns_of(slots, column, count), -2, -1);
  };
  if (wanted(kWeightIH)) {
    std::optional<Tensor> by_value;
    if (!f.input)
      by_value =
          sums_by_integers(call, f.of_input.const_data_ptr(), f.of_input.stride(0), g.members);
    for (const GateRange& range : ranges) {
      const int64_t slot = range.slot * H, count = range.count * H;
      Tensor to = rows_of(gradient(kWeightIH), range.gate * H, count);
      if (f.input)
        call.multiply(rows(f.of_input, slot, count), *f.input, to);
      else
        torch::stable::copy_(to, rows(*by_value, slot, count));
    }
  }
  if (wanted(kWeightHH)) call.multiply(rows(f.of_states, S - G, G), f.before, gradient(kWeightHH));
  if (p.layer_norm) {
    norm_gradients(call, a, f, g.members, wanted, gradient);
  } else if (wanted(kBiasIH) || wanted(kBiasHH)) {
    const Tensor sums = sums_of(call, f.of_biases);
    if (wanted(kBiasIH))
      for (const GateRange& range : ranges) {
        const int64_t count = range.count * H;
        Tensor to = columns_of(gradient(kBiasIH), range.gate * H, count);
        torch::stable::copy_(to, columns_of(sums, range.slot * H, count));
      }
    if (wanted(kBiasHH)) {
      Tensor to = gradient(kBiasHH);
      torch::stable::copy_(to, columns_of(sums, S - G, G));
    }
  }
  if (wanted(kWeightHR))
    call.multiply(rows(f.dproj, 0, p.out_size()), f.hidden, gradient(kWeightHR));
}

Tensor in_order_of_slots(const CudaCall& call, Tensor w_ih) {
  const Problem& p = call.problem;
  const int64_t H = p.hidden_size;
  const GateRangeList ranges = gate_ranges(p.cell, p.layer_norm).x;
  if (ranges.count == 1) return w_ih;
  const Tensor ordered = call.empty({w_ih.sizes().begin(), w_ih.sizes().end()}, call.type());
  for (const GateRange& range : ranges) {
    Tensor to = rows_of(ordered, range.slot * H, range.count * H);
    torch::stable::copy_(to, rows_of(w_ih, range.gate * H, range.count * H));
  }
  return ordered;
}

}  // namespace fusedrnn
