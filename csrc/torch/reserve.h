// Memory for large results, which every call would have to ask the system for.
#pragma once
#include "torch/checks.h"

namespace fusedrnn {

// A tensor beside `like`, unwritten, of bytes or of a dtype of the kernels, in a pool of the
// process: on the CPU, from 256 KiB on, and where torch (from 2.11 on) takes it, for it may die in
// another thread than it was made in. Else nothing.
OptionalTensor make_pooled(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType);

}  // namespace fusedrnn
