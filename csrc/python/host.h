// What the ops ask of Python, which torch's stable ABI has no word for. Each takes the GIL.
#pragma once
#include "plan/inspection.h"

namespace fusedrnn {

const Host& python_host();

}  // namespace fusedrnn
