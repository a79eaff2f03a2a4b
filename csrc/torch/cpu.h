// What the ops are called with and return, and their CPU implementation.
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

using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, hn, cn, reserve
using BackwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // of x, hx, cx, weights

ForwardOutputs forward_cpu(const Inputs&, const Config&, bool save);
// needs: whether the gradients of x, hx, cx and each weight are wanted; the others come back empty.
BackwardOutputs backward_cpu(const Inputs&, const Config&, const OptionalTensor& grad_y,
                             const OptionalTensor& grad_hn, const OptionalTensor& grad_cn,
                             const Tensor& y, const Tensor& reserve,
                             const std::vector<bool>& needs);

}  // namespace fusedrnn
