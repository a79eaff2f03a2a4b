#include "torch/call.h"

#include <algorithm>

#include "torch/reserve.h"

namespace fusedrnn {
namespace {

// torch::stable's functions of these names look their operator up by its name, at 0.6 us a call.
Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(as_contiguous(*t)) : std::nullopt;
}
Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

void check_integers(const char* name, const Tensor& t) {
  FUSEDRNN_EXPECT(t.dim() == 1, "fusedrnn: expected ", name, " of 1 dimension, got ", t.dim());
  FUSEDRNN_EXPECT(is_integer(t.scalar_type()), "fusedrnn: expected ", name, " of integers");
}

}  // namespace

Tensor as_int64(const Tensor& t, torch::stable::Device device) {
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Long, std::nullopt, device));
}

std::vector<int64_t> int64_values(const char* name, const Tensor& t) {
  check_integers(name, t);
  const Tensor host = as_int64(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int64_t* values = static_cast<const int64_t*>(host.const_data_ptr());
  return std::vector<int64_t>(values, values + host.numel());
}

Call::Call(const Inputs& in, const Config& config)
    : x(in.x),
      like(typed(in.x, in.weights, stored_of(config.stored))),
      problem(problem_of(config, in.regularisers, in.x, like, in.weights)),
      ensemble(stacked(in.weights) ? in.weights[0].size(0) : 1) {
  const Problem& p = problem;
  const bool one_hot = p.one_hot;
  if (one_hot) {
    x = as_int64(x, x.device());
  } else if (x.stride(x.dim() - 1) != 1 && x.size(x.dim() - 1) > 1) {
    x = as_contiguous(x);
  }
  if (in.batch_sizes) {
    FUSEDRNN_EXPECT(x.dim() == 2 - one_hot, "fusedrnn: packed ",
                    one_hot ? "integer input has 1 dimension" : "input has 2 dimensions", ", got ",
                    x.dim());
    FUSEDRNN_EXPECT(!in.lengths, "fusedrnn: packed input takes no lengths");
    read_batch_sizes(*in.batch_sizes);
  } else {
    FUSEDRNN_EXPECT(x.dim() == 3 - one_hot, "fusedrnn: expected input of ", 3 - one_hot,
                    " dimensions, got ", x.dim());
    steps = x.size(0), batch = x.size(1), tokens = checked_product(steps, batch);
    if (in.lengths) {
      check_integers("lengths", *in.lengths);
      FUSEDRNN_EXPECT(in.lengths->size(0) == batch, "fusedrnn: expected ", batch, " lengths, got ",
                      in.lengths->size(0));
      lengths = in.lengths;
    }
  }

  FUSEDRNN_EXPECT(ensemble > 0 && batch % ensemble == 0, "fusedrnn: expected weights of an ",
                  "ensemble that divides ", batch, " rows, got ", ensemble);

  hx = as_contiguous(in.hx), cx = as_contiguous(in.cx), resets = as_contiguous(in.resets);
  if (hx) check_like("hx", *hx, like), check_shape("hx", *hx, {directions(), batch, p.out_size()});
  if (cx) {
    FUSEDRNN_EXPECT(traits(p.cell).has_cell, "fusedrnn: only LSTM takes a cell state");
    check_like("cx", *cx, like), check_shape("cx", *cx, {directions(), batch, p.hidden_size});
  }
  weights.reserve(in.weights.size());
  for (const Tensor& w : in.weights) weights.push_back(as_contiguous(w));
  regularisers = in.regularisers;
  for (OptionalTensor* mask :
       {&regularisers.mask, &regularisers.h_mask, &regularisers.zone_h, &regularisers.zone_c})
    *mask = as_contiguous(*mask);
  check_regularisers();
}

void Call::check_regularisers() const {
  const Problem& p = problem;
  const RegulariserTensors& r = regularisers;
  if (r.mask) {
    FUSEDRNN_EXPECT(r.mask->scalar_type() == ScalarType::Byte && r.mask->device() == x.device(),
                    "fusedrnn: expected the dropout mask as uint8 on the device of the input");
    check_shape("the dropout mask", *r.mask, {p.num_layers - 1, tokens, out_width()});
  }
  FUSEDRNN_EXPECT(r.dropout >= 0 && r.dropout <= 1, "fusedrnn: dropout must lie in [0, 1]");
  auto check_mask = [&](const char* name, const OptionalTensor& t, ScalarType type,
                        const std::vector<int64_t>& sizes) {
    if (!t) return;
    FUSEDRNN_EXPECT(t->scalar_type() == type, "fusedrnn: ", name, " has a wrong dtype");
    FUSEDRNN_EXPECT(t->device() == x.device(), "fusedrnn: ", name,
                    " is on another device than the input");
    check_shape(name, *t, sizes);
  };
  check_mask("resets", resets, ScalarType::Bool,
             packed() ? std::vector<int64_t>{tokens} : std::vector<int64_t>{steps, batch});
  check_mask("h_mask", r.h_mask, compute(), {directions(), batch, p.out_size()});
  check_mask("zone_h", r.zone_h, ScalarType::Byte, {directions(), tokens, p.out_size()});
  check_mask("zone_c", r.zone_c, ScalarType::Byte, {directions(), tokens, p.hidden_size});
  FUSEDRNN_EXPECT((!r.zone_h || r.zoneout_h > 0) && (!r.zone_c || r.zoneout_c > 0),
                  "fusedrnn: zoneout's masks need zoneout above 0");
}

void Call::read_batch_sizes(const Tensor& given) {
  batch_sizes = int64_values("batch_sizes", given);
  steps = batch_sizes.size(), tokens = x.size(0);
  FUSEDRNN_EXPECT(steps > 0, "fusedrnn: batch_sizes is empty");
  batch = batch_sizes[0];
  int64_t sum = 0;
  for (int64_t t = 0; t < steps; t++) {
    const int64_t rows = batch_sizes[t];
    FUSEDRNN_EXPECT(rows > 0 && (t == 0 || rows <= batch_sizes[t - 1]),
                    "fusedrnn: batch_sizes must be positive and not rise");
    FUSEDRNN_EXPECT(rows <= tokens - sum, "fusedrnn: batch_sizes add up to more than ", tokens,
                    " tokens");
    sum += rows;
  }
  FUSEDRNN_EXPECT(sum == tokens, "fusedrnn: batch_sizes add up to ", sum, ", not to ", tokens,
                  " tokens");
}

std::vector<int64_t> Call::token_sizes(int64_t width, int64_t sharing) const {
  if (packed()) return {tokens / sharing, width};
  return {steps, batch / sharing, width};
}

std::vector<int64_t> Call::hs_sizes() const {
  if (!problem.all_states) return {0};
  std::vector<int64_t> sizes = token_sizes(out_width());
  sizes.insert(sizes.begin(), problem.num_layers - 1);
  return sizes;
}
std::vector<int64_t> Call::cs_sizes() const {
  if (!problem.all_states || !traits(problem.cell).has_cell) return {0};
  std::vector<int64_t> sizes = token_sizes(problem.num_directions * problem.hidden_size);
  sizes.insert(sizes.begin(), problem.num_layers);
  return sizes;
}

Weights Call::weights_of(int64_t layer, int64_t dir, int64_t which) const {
  const Problem& p = problem;
  auto next = weights.begin() + p.weight_index(layer, dir, WeightKind(0));
  Weights w{};
  auto take = [&] {
    const Tensor& t = *next++;
    const char* const all = static_cast<const char*>(t.const_data_ptr());
    return all + which * (t.numel() / ensemble) * bytes(p.dtype);
  };
#define WEIGHT(kind, name, torch_name, present, rows, columns) \
  if (present) w.name = take();
#include "plan/weights.inc"
#undef WEIGHT
  return w;
}

// Not torch::stable::new_empty, which goes through the dispatcher, by name even: a call makes up to
// seven tensors.
Tensor Call::empty(const std::vector<int64_t>& sizes, ScalarType type) const {
  constexpr size_t kMostDims = 4;
  FUSEDRNN_EXPECT(sizes.size() <= kMostDims, "fusedrnn: too many dimensions");
  int64_t strides[kMostDims], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i]))
    strides[i] = stride;
  const torch::stable::Device device = like.device();
  AtenTensorHandle made;
  const AOTITorchError error = aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())),
      device.index(), &made);
  FUSEDRNN_EXPECT_TORCH(error, "allocate a tensor of shape " + show(sizes));
  return Tensor(made);
}

ForwardOutputs Call::outputs(Save save) const {
  const Problem& p = problem;
  const int64_t reserve_row = Reserve(p).bytes_per_token();
  checked_product(tokens, std::max(reserve_row, 8 * out_width()));
  Tensor reserve, hs = reserve, cs = reserve, cn = reserve;
  const bool all = save == Save::kReserve || save == Save::kEmpty;
  if (save != Save::kNothing) {
    const std::vector<int64_t> sizes{fills_reserve(save) ? tokens : 0, reserve_row};
    const OptionalTensor pooled = make_pooled(like, sizes, ScalarType::Byte);
    // Through the dispatcher: what is never written of it torch fills where it is told to.
    reserve = pooled                ? *pooled
              : sizes[0] * sizes[1] ? torch::stable::new_empty(like, sizes, ScalarType::Byte)
                                    : empty(sizes, ScalarType::Byte);
  }
  if (all) hs = empty(hs_sizes(), type()), cs = empty(cs_sizes(), compute());
  if (traits(p.cell).has_cell)
    cn = empty({directions(), batch, p.hidden_size}, type());
  else if (all)
    cn = empty({0}, type());
  return {empty(token_sizes(out_width()), type()),
          empty({directions(), batch, p.out_size()}, type()),
          cn,
          reserve,
          hs,
          cs};
}

GradientTensors::GradientTensors(const Call& call, const OutputGradients& given,
                                 const SavedForBackward& saved, const Wanted& wanted,
                                 ScalarType of_weights, int64_t sharing)
    : members(wanted.members ? wanted.members : call.ensemble) {
  const std::vector<bool>& needs = wanted.needs;
  const Problem& p = call.problem;
  const bool has_cell = traits(p.cell).has_cell;
  const std::vector<int64_t> hidden{call.directions(), call.batch, p.out_size()},
      cells{call.directions(), call.batch, p.hidden_size},
      outputs = call.token_sizes(call.out_width());
  FUSEDRNN_EXPECT(needs.size() == 3 + call.weights.size(), "fusedrnn: expected ",
                  3 + call.weights.size(), " needs, got ", needs.size());
  FUSEDRNN_EXPECT(wanted.members >= 0 && call.batch % members == 0,
                  "fusedrnn: expected members that divide ", call.batch, " rows, got ",
                  wanted.members);
  FUSEDRNN_EXPECT(members % call.ensemble == 0, "fusedrnn: expected members of each of ",
                  call.ensemble, " weights, got ", wanted.members);
  auto check_saved = [&](const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                         ScalarType type) {
    check_shape(name, t, sizes);
    FUSEDRNN_EXPECT(t.is_contiguous() && t.device() == call.x.device() && t.scalar_type() == type,
                    "fusedrnn: expected ", name, " as forward made it");
  };
  check_like("the output", saved.y, call.like);
  check_saved("the output", saved.y, call.token_sizes(call.out_width(), sharing), call.type());
  check_saved("the reserve", saved.reserve, {call.tokens / sharing, Reserve(p).bytes_per_token()},
              ScalarType::Byte);
  auto check_states = [&](const char* name, const OptionalTensor& t,
                          const std::vector<int64_t>& sizes, ScalarType type) {
    const bool asked_for = sizes.size() > 1;
    FUSEDRNN_EXPECT(t || !asked_for, "fusedrnn: expected ", name, " of shape ", show(sizes),
                    ", got none");
    if (t) check_saved(name, *t, sizes, type);
  };
  check_states("hs", saved.hs, call.hs_sizes(), call.type());
  check_states("cs", saved.cs, call.cs_sizes(), call.compute());
  auto gradient = [&](const char* name, const OptionalTensor& g,
                      const std::vector<int64_t>& sizes) -> OptionalTensor {
    if (!g) return std::nullopt;
    check_shape(name, *g, sizes);
    FUSEDRNN_EXPECT(g->device() == call.x.device(), "fusedrnn: ", name,
                    " is on another device than the input");
    return as_contiguous(as_type(*g, call.compute()));
  };
  hn = gradient("the gradient of h_n", given.hn, hidden);
  cn = gradient("the gradient of c_n", has_cell ? given.cn : std::nullopt, cells);
  y = gradient("the gradient of the output", given.y, outputs);
  if (p.all_states) {
    hs = gradient("the gradient of hs", given.hs, call.hs_sizes());
    cs = gradient("the gradient of cs", has_cell ? given.cs : std::nullopt, call.cs_sizes());
  }

  auto result = [&](bool needed, const std::vector<int64_t>& sizes) {
    return call.empty(needed ? sizes : std::vector<int64_t>{0}, call.compute());
  };
  FUSEDRNN_EXPECT(!needs[0] || !p.one_hot, "fusedrnn: integer input has no gradient");
  need_x = needs[0], need_hx = needs[1], need_cx = needs[2] && has_cell;
  x = result(need_x, call.token_sizes(p.input_size));
  hx = result(need_hx, hidden);
  cx = result(need_cx, cells);
  lowest = need_x || need_hx || need_cx ? 0 : p.num_layers;
  const int64_t layer_weights = p.num_directions * p.weights_per_direction();
  for (size_t i = 0; i < call.weights.size(); i++) {
    const auto of_weight = call.weights[i].sizes();
    std::vector<int64_t> sizes{of_weight.begin() + stacked(call.weights), of_weight.end()};
    if (wanted.members || stacked(call.weights)) sizes.insert(sizes.begin(), members);
    if (!needs[3 + i]) sizes = {0};
    const OptionalTensor pooled = make_pooled(call.like, sizes, of_weights);
    weights.push_back(pooled ? *pooled : call.empty(sizes, of_weights));
    if (call.tokens == 0) torch::stable::zero_(weights.back());
    if (needs[3 + i]) lowest = std::min<int64_t>(lowest, i / layer_weights);
  }
}

BackwardOutputs GradientTensors::in_type(ScalarType type) const {
  std::vector<Tensor> out;
  for (const Tensor& w : weights) out.push_back(as_type(w, type));
  return {as_type(x, type), as_type(hx, type), as_type(cx, type), out};
}

TangentTensors::TangentTensors(const Call& call, const Tangents& given) {
  const Problem& p = call.problem;
  FUSEDRNN_EXPECT(!given.x || !p.one_hot, "fusedrnn: integer input has no tangent");
  auto checked = [&](const char* name, const OptionalTensor& t,
                     const std::vector<int64_t>& sizes) -> OptionalTensor {
    if (!t) return t;
    check_like(name, *t, call.like);
    check_shape(name, *t, sizes);
    return as_contiguous(t);
  };
  x = checked("the tangent of the input", given.x, call.token_sizes(p.input_size));
  hx = checked("the tangent of hx", given.hx, {call.directions(), call.batch, p.out_size()});
  FUSEDRNN_EXPECT(!given.cx || traits(p.cell).has_cell, "fusedrnn: only LSTM takes a cell state");
  cx = checked("the tangent of cx", given.cx, {call.directions(), call.batch, p.hidden_size});
  FUSEDRNN_EXPECT(given.weights.size() == call.weights.size(), "fusedrnn: expected ",
                  call.weights.size(), " tangents of weights, got ", given.weights.size());
  for (size_t i = 0; i < call.weights.size(); i++) {
    const auto sizes = call.weights[i].sizes();
    weights.push_back(
        given.weights[i].numel() == 0
            ? given.weights[i]
            : *checked("the tangent of a weight", given.weights[i], {sizes.begin(), sizes.end()}));
  }
}

Weights TangentTensors::weights_of(const Call& call, int64_t layer, int64_t dir,
                                   int64_t which) const {
  const Problem& p = call.problem;
  auto next = weights.begin() + p.weight_index(layer, dir, WeightKind(0));
  Weights w{};
  auto take = [&]() -> const void* {
    const Tensor& t = *next++;
    if (t.numel() == 0) return nullptr;
    return static_cast<const char*>(t.const_data_ptr()) +
           which * (t.numel() / call.ensemble) * bytes(p.dtype);
  };
#define WEIGHT(kind, name, torch_name, present, rows, columns) \
  if (present) w.name = take();
#include "plan/weights.inc"
#undef WEIGHT
  return w;
}

}  // namespace fusedrnn
