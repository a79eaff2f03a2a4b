// What the user sets outside of a call, read once a call.
#pragma once
#include "plan/inspection.h"

namespace fusedrnn {

// As the function says that is followed, in Python csrc/python/switches.cpp.
Float32Switches float32_switches();
void follow_float32_switches(Float32Switches (*read)());

// FUSEDRNN_PLAN, the backend to use in place of the planner's choice; null: not set.
const char* forced_plan();

}  // namespace fusedrnn
