// What the ops ask of Python, which the stable ABI has no word for. Each takes the GIL.
#pragma once
#include <string>

namespace fusedrnn {

// Warns as warnings.warn does. Throws where the user's filters make that an error.
void warn(const std::string& text);

// Runs fusedrnn.families.verify: a small case of a family on a device, by the ops of a namespace
// of torch.ops. Why the kernels must not run; empty where they are right.
std::string check_family(int family, const char* ops, const std::string& device);

}  // namespace fusedrnn
