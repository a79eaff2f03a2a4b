// Memory for large results, which every call would have to ask the system for.
#pragma once
#include "torch/checks.h"

namespace fusedrnn {

// A tensor beside `like`, unwritten, of bytes or of a dtype of the kernels. One of 256 KiB and
// more on the CPU lies in a pool of the process, where torch (from 2.11 on) takes it: it may die in
// another thread than it was made in.
Tensor make_pooled(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType);

constexpr int64_t kLeastPooled = 1 << 18;  // bytes; less has few pages

}  // namespace fusedrnn
