// What the plan has to know of the CPU kernels that a call uses.
#pragma once
#include <cstdint>

namespace fusedrnn {

struct CpuCosts {
  int64_t least_rows;    // that fill what they multiply at a time
  int64_t weight_bytes;  // that a weight takes when it is packed
  bool loads_quickly;    // weights as they are stored: no conversion, or one instruction
};

}  // namespace fusedrnn
