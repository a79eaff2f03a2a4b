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
  bool all_states = false, layer_norm = false;
  // Of weights stored in fewer bytes, whose shape does not tell it: the format and the input's
  // width.
  std::string stored{};
  int64_t input_size = 0;
};

// What a call is regularised with; a mask that is absent is not applied.
struct RegulariserTensors {
  OptionalTensor mask;                  // of the dropout between layers, uint8: 1 keeps
  double dropout = 0;                   // the probability that it was drawn with
  OptionalTensor h_mask;                // recurrent dropout, compute type
  OptionalTensor zone_h, zone_c;        // zoneout, uint8: 1 keeps the old value
  double zoneout_h = 0, zoneout_c = 0;  // without a mask: how much of the old h and c stays
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

// All of them, as in "a, b or c".
inline std::string dtype_names() {
  std::string names;
  for (int i = 0; i < int(DType::kCount); i++)
    names += (i == 0                        ? ""
              : i + 1 == int(DType::kCount) ? " or "
                                            : ", ") +
             std::string(traits(DType(i)).name);
  return names;
}
inline DType dtype_of(ScalarType t) {
  switch (t) {
#define DTYPE(name, torch_name, scalar_type, bytes, compute_bytes) \
  case ScalarType::scalar_type:                                    \
    return DType::k##name;
#include "plan/dtypes.inc"
#undef DTYPE
    default:
      FUSEDRNN_EXPECT(false, "fusedrnn: expected ", dtype_names(), ", got another dtype");
  }
  return DType::kFloat32;
}
inline ScalarType compute_type(DType t) {
  return compute_bytes(t) == 8 ? ScalarType::Double : ScalarType::Float;
}

inline Cell cell_of(const std::string& mode) {
  for (int i = 0; i < int(Cell::kCount); i++)
    if (mode == traits(Cell(i)).mode) return Cell(i);
  FUSEDRNN_EXPECT(false, "fusedrnn: unknown mode ", mode);
  return Cell::kCount;
}

// A tensor that has the dtype of all that is computed: not the input where it is integers.
inline Tensor typed(const Tensor& x, const std::vector<Tensor>& weights, Stored stored) {
  if (!is_integer(x.scalar_type())) return x;
  FUSEDRNN_EXPECT(!weights.empty(), "fusedrnn: expected weights, got none");
  if (stored == Stored::kPlain) return weights[0];
  return torch::stable::new_empty(weights[0], {0}, ScalarType::Float);
}

// The problem's fields that the input's shape gives: its width, and whether it is integers.
inline void read_input(Problem& p, const Tensor& x, const Tensor& like, int64_t input_size) {
  p.one_hot = is_integer(x.scalar_type());
  p.dtype = dtype_of(like.scalar_type());
  if (p.stored != Stored::kPlain)
    FUSEDRNN_EXPECT(p.dtype == DType::kFloat32,
                    "fusedrnn: quantized weights take float32 input, got ", traits(p.dtype).name);
  if (p.one_hot) {
    FUSEDRNN_EXPECT(x.dim() == 1 || x.dim() == 2,
                    "fusedrnn: expected integer input of 1 (packed) or 2 dimensions, got ",
                    x.dim());
    FUSEDRNN_EXPECT(like.dim() == 2 || like.dim() == 3 || p.stored != Stored::kPlain,
                    "fusedrnn: expected weight_ih of 2 dimensions, or 3 of an ensemble, got ",
                    like.dim());
    FUSEDRNN_EXPECT(x.device() == like.device(),
                    "fusedrnn: the weights are on another device than the input");
    p.input_size = p.stored == Stored::kPlain ? like.size(like.dim() - 1) : input_size;
  } else {
    FUSEDRNN_EXPECT(x.dim() == 2 || x.dim() == 3,
                    "fusedrnn: expected input of 2 (packed) or 3 dimensions, got ", x.dim());
    p.input_size = x.size(x.dim() - 1);
    FUSEDRNN_EXPECT(p.stored == Stored::kPlain || p.input_size == input_size,
                    "fusedrnn: expected input of size ", input_size, ", got ", p.input_size);
  }
}

inline Stored stored_of(const std::string& name) {
  if (name.empty()) return Stored::kPlain;
  FUSEDRNN_EXPECT(name == "int8" || name == "bfloat16",
                  "fusedrnn: expected weights in int8 or bfloat16, got ", name);
  return name == "int8" ? Stored::kInt8 : Stored::kBFloat16;
}
inline ScalarType stored_type(Stored stored, ScalarType plain) {
  return stored == Stored::kInt8       ? ScalarType::Byte
         : stored == Stored::kBFloat16 ? ScalarType::BFloat16
                                       : plain;
}

// Whether all weights have a leading dimension, that of an ensemble.
inline bool stacked(const std::vector<Tensor>& weights) {
  return !weights.empty() && weights[0].dim() == 3;
}

// All weights, per layer and direction in the order of plan/weights.inc.
inline void check_weights(const Problem& p, const std::vector<Tensor>& weights,
                          const Tensor& like) {
  const int64_t ensemble = stacked(weights) ? weights[0].size(0) : 0;  // 0: not stacked
  FUSEDRNN_EXPECT(!ensemble || p.stored == Stored::kPlain,
                  "fusedrnn: quantized weights cannot be stacked");
  const size_t each = p.weights_per_direction();
  const int64_t directions = checked_product(p.num_layers, p.num_directions);
  FUSEDRNN_EXPECT(int64_t(weights.size()) == checked_product(directions, each),
                  "fusedrnn: expected ", directions, " x ", each, " weights, got ", weights.size());
  checked_product(traits(p.cell).gates, p.hidden_size);
  size_t i = 0;
  auto check = [&](const char* name, int64_t rows, int64_t columns) {
    if (columns >= 0 && p.stored != Stored::kPlain) {
      FUSEDRNN_EXPECT(weights[i].scalar_type() == stored_type(p.stored, like.scalar_type()),
                      "fusedrnn: ", name, " is not in the format that weights are said to have");
      FUSEDRNN_EXPECT(weights[i].device() == like.device(), "fusedrnn: ", name,
                      " is on another device than the input");
    } else {
      check_like(name, weights[i], like);
    }
    std::vector<int64_t> sizes{rows};
    if (columns >= 0) sizes.push_back(columns);
    if (stacked(weights)) sizes.insert(sizes.begin(), ensemble);
    check_shape(name, weights[i++], sizes);
  };
  for (int64_t layer = 0; layer < p.num_layers; layer++)
    for (int64_t dir = 0; dir < p.num_directions; dir++) {
#define WEIGHT(kind, name, torch_name, present, rows, columns) \
  if (present) check(torch_name, rows, columns);
#include "plan/weights.inc"
#undef WEIGHT
    }
}

inline Problem problem_of(const Config& c, const RegulariserTensors& r, const Tensor& x,
                          const Tensor& like, const std::vector<Tensor>& weights) {
  Problem p{};
  p.cell = cell_of(c.mode);
  p.stored = stored_of(c.stored);
  read_input(p, x, like, c.input_size);
  p.hidden_size = c.hidden_size;
  p.proj_size = c.proj_size;
  p.num_layers = c.num_layers;
  p.num_directions = c.bidirectional ? 2 : 1;
  p.bias = c.bias;
  FUSEDRNN_EXPECT(r.zoneout_h >= 0 && r.zoneout_h <= 1 && r.zoneout_c >= 0 && r.zoneout_c <= 1,
                  "fusedrnn: zoneout must lie in [0, 1]");
  p.zoneout = r.zoneout_h > 0 || r.zoneout_c > 0;
  p.all_states = c.all_states;
  p.layer_norm = c.layer_norm;
  FUSEDRNN_EXPECT(p.hidden_size > 0 && p.num_layers > 0,
                  "fusedrnn: hidden_size and num_layers must be positive");
  FUSEDRNN_EXPECT(p.proj_size >= 0 && p.proj_size < p.hidden_size,
                  "fusedrnn: proj_size must lie in [0, hidden_size)");
  FUSEDRNN_EXPECT(!p.proj_size || traits(p.cell).has_cell, "fusedrnn: only LSTM takes proj_size");
  FUSEDRNN_EXPECT(!r.zoneout_c || traits(p.cell).has_cell, "fusedrnn: only LSTM takes zoneout_c");
  FUSEDRNN_EXPECT(!p.layer_norm || p.cell == Cell::kGru || p.cell == Cell::kLstm,
                  "fusedrnn: only LSTM and GRU take layer_norm");
  check_weights(p, weights, like);
  return p;
}

}  // namespace fusedrnn
