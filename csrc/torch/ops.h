// What the ops are called with and return, their schemas, and what is registered for each backend.
#pragma once
#include <tuple>

#include "torch/checks.h"

namespace fusedrnn {

struct Inputs {
  Tensor x;  // (T, B, input) with any strides over T and B, or packed (tokens, input); or integers
             // (T, B), (tokens) that mean one-hot vectors
  OptionalTensor hx, cx;
  std::vector<Tensor> weights;
  OptionalTensor batch_sizes{};       // of packed input
  OptionalTensor lengths{};           // of padded input
  OptionalTensor mask{};              // of the dropout between layers, uint8
  OptionalTensor resets{};            // where a new sequence begins, bool
  OptionalTensor h_mask{};            // recurrent dropout, compute type
  OptionalTensor zone_h{}, zone_c{};  // zoneout, uint8
  double dropout = 0;
};

struct OutputGradients {
  OptionalTensor y, hn, cn, hs, cs;
};

// What forward leaves for backward. hs and cs, the states of all layers and steps, are empty unless
// asked for.
struct Kept {
  Tensor y, reserve, hs, cs;
};

using States = std::tuple<Tensor, Tensor, OptionalTensor>;  // y, hn, an LSTM's cn
using ForwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // these, reserve, hs, cs
using BackwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // of x, hx, cx, weights

// What forward leaves beside y, hn and cn.
enum class Save {
  kReserve,
  kEmpty,    // a reserve of no rows
  kNothing,  // reserve, hs and cs are no tensors, nor is cn where there is none
};

// needs: whether the gradients of x, hx, cx and each weight are wanted; the others come back empty.
using ForwardFunction = ForwardOutputs(const Inputs&, const Config&, Save);
using BackwardFunction = BackwardOutputs(const Inputs&, const Config&, const OutputGradients&,
                                         const Kept&, const std::vector<bool>& needs);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;

// fusedrnn/ops.py documents the arguments.
#define FUSEDRNN_INPUTS                                                                        \
  "Tensor x, Tensor? hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, " \
  "Tensor? mask, Tensor? resets, Tensor? h_mask, Tensor? zone_h, Tensor? zone_c, float dropout"
#define FUSEDRNN_STACK \
  "str mode, int hidden_size, int proj_size, int num_layers, bool bias, bool bidirectional"
#define FUSEDRNN_CONFIG \
  FUSEDRNN_STACK ", float zoneout_h, float zoneout_c, bool all_states, bool layer_norm"

inline constexpr const char* kForwardSchema =
    "forward(" FUSEDRNN_INPUTS ", " FUSEDRNN_CONFIG
    ", bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
inline constexpr const char* kInferSchema =
    "infer(Tensor x, Tensor? hx, Tensor? cx, Tensor[] weights, " FUSEDRNN_STACK
    ") -> (Tensor, Tensor, Tensor?)";
inline constexpr const char* kBackwardSchema =
    "backward(Tensor? grad_y, Tensor? grad_hn, Tensor? grad_cn, Tensor? grad_hs, Tensor? grad_cs, "
    "Tensor y, Tensor reserve, Tensor hs, Tensor cs, bool[] needs, " FUSEDRNN_INPUTS
    ", " FUSEDRNN_CONFIG ") -> (Tensor, Tensor, Tensor, Tensor[])";

template <ForwardFunction& implementation>
ForwardOutputs forward(Tensor x, OptionalTensor hx, OptionalTensor cx, std::vector<Tensor> weights,
                       OptionalTensor batch_sizes, OptionalTensor lengths, OptionalTensor mask,
                       OptionalTensor resets, OptionalTensor h_mask, OptionalTensor zone_h,
                       OptionalTensor zone_c, double dropout, std::string mode, int64_t hidden_size,
                       int64_t proj_size, int64_t num_layers, bool bias, bool bidirectional,
                       double zoneout_h, double zoneout_c, bool all_states, bool layer_norm,
                       bool save) {
  return implementation(
      {x, hx, cx, weights, batch_sizes, lengths, mask, resets, h_mask, zone_h, zone_c, dropout},
      {mode, hidden_size, proj_size, num_layers, bias, bidirectional, zoneout_h, zoneout_c,
       all_states, layer_norm},
      save ? Save::kReserve : Save::kEmpty);
}

template <ForwardFunction& implementation>
States infer(Tensor x, OptionalTensor hx, OptionalTensor cx, std::vector<Tensor> weights,
             std::string mode, int64_t hidden_size, int64_t proj_size, int64_t num_layers,
             bool bias, bool bidirectional) {
  Inputs in{x, hx, cx, std::move(weights)};
  Config config{std::move(mode), hidden_size, proj_size, num_layers, bias, bidirectional};
  auto [y, hn, cn, reserve, hs, cs] = implementation(in, config, Save::kNothing);
  return {y, hn, cn.defined() ? OptionalTensor(cn) : std::nullopt};
}

template <BackwardFunction& implementation>
BackwardOutputs backward(OptionalTensor grad_y, OptionalTensor grad_hn, OptionalTensor grad_cn,
                         OptionalTensor grad_hs, OptionalTensor grad_cs, Tensor y, Tensor reserve,
                         Tensor hs, Tensor cs, std::vector<bool> needs, Tensor x, OptionalTensor hx,
                         OptionalTensor cx, std::vector<Tensor> weights, OptionalTensor batch_sizes,
                         OptionalTensor lengths, OptionalTensor mask, OptionalTensor resets,
                         OptionalTensor h_mask, OptionalTensor zone_h, OptionalTensor zone_c,
                         double dropout, std::string mode, int64_t hidden_size, int64_t proj_size,
                         int64_t num_layers, bool bias, bool bidirectional, double zoneout_h,
                         double zoneout_c, bool all_states, bool layer_norm) {
  return implementation(
      {x, hx, cx, weights, batch_sizes, lengths, mask, resets, h_mask, zone_h, zone_c, dropout},
      {mode, hidden_size, proj_size, num_layers, bias, bidirectional, zoneout_h, zoneout_c,
       all_states, layer_norm},
      {grad_y, grad_hn, grad_cn, grad_hs, grad_cs}, {y, reserve, hs, cs}, needs);
}

}  // namespace fusedrnn
