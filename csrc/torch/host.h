// What the ops ask of the process that they are in, which the stable ABI has no word for.
#pragma once
#include "plan/inspection.h"

namespace fusedrnn {

// Before `set_host`, as in a program without Python: TF32 is not permitted in the recurrence,
// warnings go to stderr, and kernels are not checked before they run for the first time.
const Host& host();
void set_host(const Host&);

// Warns. Throws where the user has made warnings errors.
void warn(const std::string& text);

}  // namespace fusedrnn
