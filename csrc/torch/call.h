// What every backend does alike: checks a call's tensors, makes its results, and decides what of
// the backward pass is needed.
#pragma once
#include "torch/ops.h"

namespace fusedrnn {

// The tensors of a call, checked but for what lies in `lengths`, and kept alive.
struct Call {
  Tensor x;     // rows of which the elements follow each other; integers as int64
  Tensor like;  // what is computed has its dtype
  Problem problem;
  OptionalTensor hx, cx, lengths, resets;
  RegulariserTensors regularisers;
  std::vector<Tensor> weights;  // [ensemble, ...] where they are stacked
  int64_t steps, batch, tokens;
  int64_t ensemble;  // weights that differ; row b of the batch has weights b % ensemble
  std::vector<int64_t> batch_sizes;  // of packed input: rows at each step

  Call(const Inputs&, const Config&);

  bool packed() const { return !batch_sizes.empty(); }
  int64_t directions() const { return problem.num_layers * problem.num_directions; }
  int64_t out_width() const { return problem.num_directions * problem.out_size(); }
  ScalarType type() const { return like.scalar_type(); }
  ScalarType compute() const { return compute_type(problem.dtype); }
  std::vector<int64_t> token_sizes(int64_t width, int64_t sharing = 1) const;
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType) const;
  Weights weights_of(int64_t layer, int64_t dir, int64_t which = 0) const;  // of the ensemble's
  // What dropout multiplies with where it keeps a value.
  double mask_scale() const {
    return regularisers.dropout < 1 ? 1 / (1 - regularisers.dropout) : 0;
  }

  // The sizes of the states of all layers and steps; nothing where they are not asked for.
  std::vector<int64_t> hs_sizes() const, cs_sizes() const;
  // y, hn, cn, the reserve, hs and cs, unwritten.
  ForwardOutputs outputs(Save) const;

 private:
  void read_batch_sizes(const Tensor&);
  void check_regularisers() const;
};

// The tensors of a backward call beside those of its forward, in the compute type but for
// gradients of weights.
struct GradientTensors {
  OptionalTensor y, hn, cn, hs, cs;  // given
  Tensor x, hx, cx;                  // to be written; empty where not wanted
  std::vector<Tensor> weights;       // with a leading dimension where there are members
  int64_t members;                   // at least 1, a multiple of the ensemble
  bool need_x, need_hx, need_cx;
  // The lowest layer that anything asked for depends on; below it nothing is done.
  int64_t lowest;

  // `of_weights`: the type of their gradients. `sharing`: rows that share what was saved for one.
  GradientTensors(const Call&, const OutputGradients&, const SavedForBackward&, const Wanted&,
                  ScalarType of_weights, int64_t sharing = 1);
  GradientTensors(const Call& call, const OutputGradients& given, const SavedForBackward& saved,
                  const Wanted& wanted)
      : GradientTensors(call, given, saved, wanted, call.compute()) {}

  // Whether the gradient of a layer's input is needed, for the layer below or for itself.
  bool wants_input(int64_t layer) const { return layer > lowest || (layer == 0 && need_x); }
  BackwardOutputs in_type(ScalarType) const;
};

// The tensors of a direction in which a call is differentiated, checked. Of weights an empty one
// stands for zeros.
struct TangentTensors {
  OptionalTensor x, hx, cx;
  std::vector<Tensor> weights;

  TangentTensors(const Call&, const Tangents&);
  // Of the ensemble's `which`; null: zeros.
  Weights weights_of(const Call&, int64_t layer, int64_t dir, int64_t which = 0) const;
};

Tensor as_int64(const Tensor&, torch::stable::Device);  // contiguous
std::vector<int64_t> int64_values(const char* name, const Tensor&);

}  // namespace fusedrnn
