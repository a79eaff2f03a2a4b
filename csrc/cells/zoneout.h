// Zoneout, Krueger et al., arXiv:1606.01305: of h and of c a part `rate` stays as it was before the
// step. In training the rate of a unit is 0 or 1, in evaluation the probability of 1.
#pragma once
#include "cells/common.h"

namespace fusedrnn {

template <class V>
FUSEDRNN_HD V zone_out(V rate, V before, V now) {
  return rate * before + (1 - rate) * now;
}
// From the gradient of what zone_out returned to that of `now`; returns the gradient of `before`.
template <class V>
FUSEDRNN_HD V zone_out_backward(V rate, V& d) {
  const V passed = rate * d;
  d -= passed;
  return passed;
}

}  // namespace fusedrnn
