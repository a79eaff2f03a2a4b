// Stacked weights for a backend without kernels for them: its op runs for one after the other.
#pragma once
#include "torch/ops.h"

namespace fusedrnn {

ForwardOutputs forward_each(const Inputs&, const Config&, Save, ForwardFunction&);
BackwardOutputs backward_each(const Inputs&, const Config&, const OutputGradients&,
                              const SavedForBackward&, const Wanted&, BackwardFunction&);

}  // namespace fusedrnn
