// From tensors to a Problem: every argument of the ops is checked here, before a kernel sees it.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "plan/problem.h"
#include "torch/error.h"

namespace fusedrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What describes a stack besides its tensors; the trailing arguments of every op.
struct Config {
  std::string mode;
  int64_t hidden_size, proj_size, num_layers;
  bool bias, bidirectional;
  double zoneout_h = 0, zoneout_c = 0;  // how much of the old h and c stays
  bool all_states = false, layer_norm = false;
};

inline std::string show(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}
inline std::string show(const std::vector<int64_t>& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); i++) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

template <class Sizes = std::initializer_list<int64_t>>
void check_shape(const char* name, const Tensor& t, const Sizes& sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (int64_t i = 0; same && i < t.dim(); i++) same = t.size(i) == std::data(sizes)[i];
  FUSEDRNN_EXPECT(same, "fusedrnn: expected ", name, " of shape ", show(sizes), ", got ", show(t));
}
inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  FUSEDRNN_EXPECT(t.scalar_type() == x.scalar_type(), "fusedrnn: ", name,
                  " has another dtype than the input");
  FUSEDRNN_EXPECT(t.device() == x.device(), "fusedrnn: ", name,
                  " is on another device than the input");
}

inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t out;
  FUSEDRNN_EXPECT(!__builtin_mul_overflow(a, b, &out), "fusedrnn: sizes overflow 64 bits");
  return out;
}

inline bool is_integer(ScalarType t) {
  return t == ScalarType::Long || t == ScalarType::Int || t == ScalarType::Short ||
         t == ScalarType::Char || t == ScalarType::Byte;
}

inline DType dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      FUSEDRNN_EXPECT(
          false, "fusedrnn: expected float64, float32, bfloat16 or float16, got another dtype");
  }
  return DType::kFloat32;
}
inline ScalarType compute_type(DType t) {
  return t == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Cell cell_of(const std::string& mode) {
  for (int i = 0; i < int(Cell::kCount); i++)
    if (mode == traits(Cell(i)).mode) return Cell(i);
  FUSEDRNN_EXPECT(false, "fusedrnn: unknown mode ", mode);
  return Cell::kCount;
}

// The tensor that has the dtype of all that is computed: not the input where it is integers.
inline const Tensor& typed(const Tensor& x, const std::vector<Tensor>& weights) {
  if (!is_integer(x.scalar_type())) return x;
  FUSEDRNN_EXPECT(!weights.empty(), "fusedrnn: expected weights, got none");
  return weights[0];
}

// Weights in torch.nn's order: per layer and direction w_ih, w_hh, [b_ih, b_hh], [w_hr],
// [gain_ih, gain_hh, [gain_c, shift_c]].
inline Problem problem_of(const Config& c, const Tensor& x, const std::vector<Tensor>& weights) {
  Problem p{};
  p.cell = cell_of(c.mode);
  p.one_hot = is_integer(x.scalar_type());
  const Tensor& like = typed(x, weights);
  p.dtype = dtype_of(like.scalar_type());
  if (p.one_hot) {
    FUSEDRNN_EXPECT(x.dim() == 1 || x.dim() == 2,
                    "fusedrnn: expected integer input of 1 (packed) or 2 dimensions, got ",
                    x.dim());
    FUSEDRNN_EXPECT(like.dim() == 2, "fusedrnn: expected weight_ih of 2 dimensions, got ",
                    like.dim());
    FUSEDRNN_EXPECT(x.device() == like.device(),
                    "fusedrnn: the weights are on another device than the input");
    p.input_size = like.size(1);
  } else {
    FUSEDRNN_EXPECT(x.dim() == 2 || x.dim() == 3,
                    "fusedrnn: expected input of 2 (packed) or 3 dimensions, got ", x.dim());
    p.input_size = x.size(x.dim() - 1);
  }
  p.hidden_size = c.hidden_size;
  p.proj_size = c.proj_size;
  p.num_layers = c.num_layers;
  p.num_directions = c.bidirectional ? 2 : 1;
  p.bias = c.bias;
  FUSEDRNN_EXPECT(c.zoneout_h >= 0 && c.zoneout_h <= 1 && c.zoneout_c >= 0 && c.zoneout_c <= 1,
                  "fusedrnn: zoneout must lie in [0, 1]");
  p.zoneout = c.zoneout_h > 0 || c.zoneout_c > 0;
  p.all_states = c.all_states;
  p.layer_norm = c.layer_norm;
  FUSEDRNN_EXPECT(p.hidden_size > 0 && p.num_layers > 0,
                  "fusedrnn: hidden_size and num_layers must be positive");
  FUSEDRNN_EXPECT(p.proj_size >= 0 && p.proj_size < p.hidden_size,
                  "fusedrnn: proj_size must lie in [0, hidden_size)");
  FUSEDRNN_EXPECT(!p.proj_size || traits(p.cell).has_cell, "fusedrnn: only LSTM takes proj_size");
  FUSEDRNN_EXPECT(!c.zoneout_c || traits(p.cell).has_cell, "fusedrnn: only LSTM takes zoneout_c");
  FUSEDRNN_EXPECT(!p.layer_norm || p.cell == Cell::kGru || p.cell == Cell::kLstm,
                  "fusedrnn: only LSTM and GRU take layer_norm");

  const size_t each = p.weights_per_direction();
  const int64_t directions = checked_product(p.num_layers, p.num_directions);
  FUSEDRNN_EXPECT(int64_t(weights.size()) == checked_product(directions, each),
                  "fusedrnn: expected ", directions, " x ", each, " weights, got ", weights.size());
  const int64_t gate_rows = checked_product(traits(p.cell).gates, p.hidden_size);
  size_t i = 0;
  for (int64_t layer = 0; layer < p.num_layers; layer++)
    for (int64_t dir = 0; dir < p.num_directions; dir++) {
      auto next = [&](const char* name, std::initializer_list<int64_t> sizes) {
        check_like(name, weights[i], like);
        check_shape(name, weights[i++], sizes);
      };
      next("weight_ih", {gate_rows, p.layer_input(layer)});
      next("weight_hh", {gate_rows, p.out_size()});
      if (p.bias) next("bias_ih", {gate_rows}), next("bias_hh", {gate_rows});
      if (p.proj_size) next("weight_hr", {p.proj_size, p.hidden_size});
      if (!p.layer_norm) continue;
      next("gain_ih", {gate_rows}), next("gain_hh", {gate_rows});
      if (traits(p.cell).has_cell)
        next("gain_c", {p.hidden_size}), next("shift_c", {p.hidden_size});
    }
  return p;
}

}  // namespace fusedrnn
