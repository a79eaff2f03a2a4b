#include "cuda/persistent/forward.h"
#include "cuda/persistent/launch.h"

namespace fusedrnn {

int grid_forward(const PersistentForward& p, void* stream) {
  return launch_persistent(
      p, stream, [](auto engine) { return persistent_forward_kernel<decltype(engine), false>; });
}

}  // namespace fusedrnn
