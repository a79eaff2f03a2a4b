// The gradients over all steps: what becomes of a recurrence's gradients of the pre-activations.
#pragma once
#include "torch/cuda.h"

namespace fusedrnn {

// Whether a gradient of a weight is needed, of those from `index` on of a layer and direction.
bool wants_weights(const Problem&, const std::vector<bool>& needs, int64_t index);

// The gradients of weights are products of two factors, summed over the rows of both. Storage type,
// for members as by_member() has them.
struct WeightFactors {
  Tensor of_input;  // gradients of pre-activations [rows, slots * hidden], and
  std::optional<Tensor>
      input;                 // what was multiplied with W_ih; without it the call's integers were
  Tensor of_states, before;  // the same, and what was multiplied with W_hh
  Tensor of_biases;          // the same, with the biases
  Tensor dproj, hidden;      // with a projection: gradients of its result, and its operand
  // With layer normalisation: compute type [tokens, columns]. In derivatives also that of the
  // values, and what was saved of the tangents.
  std::optional<Tensor> dnormed{}, value_dnormed{};
  const void* saved_tangents = nullptr;
};
void weight_gradients(const CudaCall&, const LayerSaved&, const WeightFactors&,
                      const std::vector<bool>& needs, int64_t index, GradientTensors&);

// W_ih, or one for each member, with its rows in the order of slots, of which they fill the first.
Tensor in_order_of_slots(const CudaCall&, Tensor w_ih);

}  // namespace fusedrnn
