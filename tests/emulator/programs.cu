#include "emulator/programs.h"

#include "cuda/primitives.h"

namespace fusedrnn {
int program(const Program&, void*) { return kInvalidValue; }
}  // namespace fusedrnn
