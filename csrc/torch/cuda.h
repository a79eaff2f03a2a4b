// A call on a GPU: its plan, its tensors as the kernels see them, and the products of ATen.
#pragma once
#include "cuda/elementwise.h"
#include "cuda/stack.h"
#include "cuda/stepwise/layer.h"
#include "plan/cuda_plan.h"
#include "plan/products.h"
#include "torch/call.h"
#include "torch/cuda_device.h"
#include "torch/cuda_standing.h"

namespace fusedrnn {

class CudaCall : public Call {
 public:
  CudaPlan plan;
  Family family;  // of the plan

  CudaCall(const Inputs&, const Config&, bool backward, bool tangent = false);

  void* stream() const { return device_.stream(); }
  // Throws where a launch returned an error: see check_launch.
  void check(int error, const char* what) const;

  // out = a b, sums in the compute type; a and b alike, out of theirs or of the compute type.
  // Matrices, or as many of each in a leading dimension: by_member() makes those of rows. Of
  // float32 as torch's switches say: see plan/products.h.
  void multiply(const Tensor& a, const Tensor& b, Tensor out) const;
  // The same on bare memory, for the product of a step: too small to be split.
  Multiply multiply() const;

  Tensor tensor_at(const void* data, const std::vector<int64_t>& sizes, ScalarType) const;
  Tensor bytes(int64_t count) const { return empty({count}, ScalarType::Byte); }

  // Of an ensemble of one the matrix alone.
  Tensor weight(int64_t layer, int64_t dir, WeightKind) const;
  Layer layer_of(int64_t layer, int64_t dir) const;
  // The cell states or candidates, slots and, of an inner layer, outputs: in the reserve, or in hs
  // and cs where all states are results. Null where there are none.
  char* cells_in(const Tensor& reserve, const OptionalTensor& cs, int64_t layer, int64_t dir) const;
  char* slots_in(const Tensor& reserve, int64_t layer, int64_t dir) const;
  char* scales_in(const Tensor& reserve, int64_t layer, int64_t dir) const;
  Tensor output_in(const Tensor& reserve, const OptionalTensor& hs, int64_t layer) const;
  // All of these, and y; `output` is the layer's.
  LayerSaved saved_of(int64_t layer, int64_t dir, const Tensor& output, const Tensor& reserve,
                      const OptionalTensor& cs) const;

  // What a layer reads [tokens, width] of x or, through the mask, of the output of the layer below.
  // With `exact` rows that have no step are zeros, and not whatever the user left there.
  Tensor input_of(int64_t layer, const Tensor& from, bool exact) const;
  const uint8_t* mask_of(int64_t layer) const;  // of a layer's input
  // What the input makes of a layer's gates: out = input W_ih^T, of the compute type.
  // Without input it is the call's integers. w_ih: of all members.
  void multiply_input(const std::optional<Tensor>& input, const Tensor& w_ih, Tensor out) const;
  Integers integers() const;

 private:
  CurrentDevice device_;
  void multiply_whole(const Tensor& a, const Tensor& b, const Tensor& out) const;
  void multiply_split(const Tensor& a, const Tensor& b, const Tensor& out) const;
  // The parts of a float32 matrix, behind each other along `depth`, which a product adds up over.
  Tensor parts_of(Tensor, int64_t depth, bool left) const;

  Float32Products float32_products_;
  Tokens tokens_;
  Tensor lengths_, offsets_, order_;  // what tokens_ points to
};

// [rows, columns] as [members, rows / members, columns], a view: row b belongs to b % members. Of
// one member the matrix itself.
Tensor by_member(const Tensor& rows, int64_t members);

}  // namespace fusedrnn
