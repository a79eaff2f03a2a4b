// What the planner has to know of a GPU, asked once for each, and what else the host asks of CUDA's
// runtime.
#pragma once
#include "plan/cuda_plan.h"

namespace fusedrnn {

constexpr int kMostDevices = 64;

// Of the current device. Returns a cudaError_t, 0 for success.
int device_spec(DeviceSpec* spec);

// Of the CUDA runtime in this binary and of the newest that the driver serves, as 1000 times the
// major version plus 10 times the minor one; 0: unknown, or no driver.
void library_versions(int* runtime, int* driver);

// Whether a launch that returned this was not accepted, for a reason that another kernel or another
// shape of launch may not meet. All else, such as an error that an earlier kernel left, is none.
bool launch_was_refused(int error);

// Where kernels on the current device, once it was asked for its spec, tell the host that a block
// has waited too long for another: a word of the host's memory, 0 until then. Null: there is none.
int* lost_block_word();
// What they have written there, which it clears.
int take_lost_block();

// Whether a CUDA graph captures what is enqueued on the stream.
bool is_capturing(void* stream);

// Enqueues what fills memory with kMissing (cuda/primitives.h). Returns a cudaError_t, 0 for
// success.
int fill_missing(void* data, int64_t bytes, void* stream);

}  // namespace fusedrnn
