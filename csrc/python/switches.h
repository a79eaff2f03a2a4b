// torch's switches, which only Python can read: its stable ABI has no word for them.
#pragma once
#include "plan/inspection.h"

namespace fusedrnn {

Float32Switches switches_of_python();

}  // namespace fusedrnn
