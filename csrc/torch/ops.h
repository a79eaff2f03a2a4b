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
  OptionalTensor batch_sizes;  // of packed input
  OptionalTensor lengths;      // of padded input
  OptionalTensor mask;         // of the dropout between layers, uint8
  double dropout;
};

struct OutputGradients {
  OptionalTensor y, hn, cn;
};

using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, hn, cn, reserve
using BackwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // of x, hx, cx, weights

// needs: whether the gradients of x, hx, cx and each weight are wanted; the others come back empty.
using ForwardFunction = ForwardOutputs(const Inputs&, const Config&, bool save);
using BackwardFunction = BackwardOutputs(const Inputs&, const Config&, const OutputGradients&,
                                         const Tensor& y, const Tensor& reserve,
                                         const std::vector<bool>& needs);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;

// src/fusedrnn/ops.py documents the arguments.
#define FUSEDRNN_INPUTS                                                                        \
  "Tensor x, Tensor? hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, " \
  "Tensor? mask, float dropout"
#define FUSEDRNN_CONFIG \
  "str mode, int hidden_size, int proj_size, int num_layers, bool bias, bool bidirectional"

inline constexpr const char* kForwardSchema = "forward(" FUSEDRNN_INPUTS ", " FUSEDRNN_CONFIG
                                              ", bool save) -> (Tensor, Tensor, Tensor, Tensor)";
inline constexpr const char* kBackwardSchema =
    "backward(Tensor? grad_y, Tensor? grad_hn, Tensor? grad_cn, Tensor y, Tensor reserve, bool[] "
    "needs, " FUSEDRNN_INPUTS ", " FUSEDRNN_CONFIG ") -> (Tensor, Tensor, Tensor, Tensor[])";

template <ForwardFunction& implementation>
ForwardOutputs forward(Tensor x, OptionalTensor hx, OptionalTensor cx, std::vector<Tensor> weights,
                       OptionalTensor batch_sizes, OptionalTensor lengths, OptionalTensor mask,
                       double dropout, std::string mode, int64_t hidden_size, int64_t proj_size,
                       int64_t num_layers, bool bias, bool bidirectional, bool save) {
  return implementation({x, hx, cx, weights, batch_sizes, lengths, mask, dropout},
                        {mode, hidden_size, proj_size, num_layers, bias, bidirectional}, save);
}

template <BackwardFunction& implementation>
BackwardOutputs backward(OptionalTensor grad_y, OptionalTensor grad_hn, OptionalTensor grad_cn,
                         Tensor y, Tensor reserve, std::vector<bool> needs, Tensor x,
                         OptionalTensor hx, OptionalTensor cx, std::vector<Tensor> weights,
                         OptionalTensor batch_sizes, OptionalTensor lengths, OptionalTensor mask,
                         double dropout, std::string mode, int64_t hidden_size, int64_t proj_size,
                         int64_t num_layers, bool bias, bool bidirectional) {
  return implementation({x, hx, cx, weights, batch_sizes, lengths, mask, dropout},
                        {mode, hidden_size, proj_size, num_layers, bias, bidirectional},
                        {grad_y, grad_hn, grad_cn}, y, reserve, needs);
}

}  // namespace fusedrnn
