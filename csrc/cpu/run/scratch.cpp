#include "cpu/run/scratch.h"

#include <cstdlib>

namespace fusedrnn {

bool poison_scratch() {
  const char* found = std::getenv("FUSEDRNN_POISON");
  return found && !std::strcmp(found, "1");
}

}  // namespace fusedrnn
