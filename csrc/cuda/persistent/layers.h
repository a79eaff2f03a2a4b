// A group of layers by the persistent kernels, in one launch or, where the batch is too large for
// the device, in one for each part of the batch.
#pragma once
#include <vector>

#include "cuda/stack.h"
#include "plan/cuda_plan.h"

namespace fusedrnn {

// The lowest layer first, both directions of a layer together. Of all layers but the lowest,
// gates_x, of all but the highest, dy is not given: they take what their neighbour puts out.

// Bytes of scratch memory that a call needs.
int64_t persistent_workspace(const CudaPlan&, const std::vector<LayerForward>&);
int64_t persistent_workspace(const CudaPlan&, const std::vector<LayerBackward>&);

// Returns a cudaError_t, 0 for success.
int persistent_forward(const CudaPlan&, const std::vector<LayerForward>&, void* workspace,
                       void* stream);
int persistent_backward(const CudaPlan&, const std::vector<LayerBackward>&, void* workspace,
                        void* stream);

}  // namespace fusedrnn
