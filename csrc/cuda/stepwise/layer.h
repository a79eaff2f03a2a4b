// One layer and direction, a launch or two a step: the product of the state and W_hh, which the
// caller supplies, and the cells of cell_step.h. Takes every cell, size and dtype.
#pragma once
#include <functional>

#include "cuda/stack.h"

namespace fusedrnn {

// out [rows, columns] = a [rows, depth] times w [depth, columns], or times the transpose of
// w [columns, depth]. a and w of the storage type, out of the compute type. Of w
// [members, ...] row i of a takes i % members; members divide the rows.
struct Product {
  const void* a;
  int64_t a_stride, rows, depth;
  const void* w;
  bool transposed;
  void* out;
  int64_t columns;
  int64_t members = 1;
};
// Enqueues a product on the same stream, and throws where that fails.
using Multiply = std::function<void(const Product&)>;

// Bytes of scratch memory that a call needs.
int64_t stepwise_workspace(const LayerForward&);
int64_t stepwise_workspace(const LayerBackward&);
int64_t stepwise_workspace(const LayerForwardTangent&);
int64_t stepwise_workspace(const LayerBackwardTangent&);

// Returns a cudaError_t, 0 for success.
int stepwise_forward(const LayerForward&, void* workspace, const Multiply&, void* stream);
int stepwise_backward(const LayerBackward&, void* workspace, const Multiply&, void* stream);
int stepwise_forward_tangent(const LayerForwardTangent&, void* workspace, const Multiply&,
                             void* stream);
int stepwise_backward_tangent(const LayerBackwardTangent&, void* workspace, const Multiply&,
                              void* stream);

}  // namespace fusedrnn
