// The buffer that forward leaves for backward.
#pragma once
#include "torch/checks.h"

namespace fusedrnn {

// A reserve: bytes (rows, row) beside `like`. One of a megabyte and more on the CPU lies in a pool
// of the process, where torch (from 2.11 on) takes it: it may die in
// another thread than it was made in.
Tensor make_reserve(const Tensor& like, int64_t rows, int64_t row);

}  // namespace fusedrnn
