#include "cuda/persistent/backward.h"
#include "cuda/persistent/launch.h"

namespace fusedrnn {

int grid_backward(const PersistentBackward& p, void* stream) {
  return launch_persistent(
      p, stream, [](auto engine) { return persistent_backward_kernel<decltype(engine), false>; });
}

}  // namespace fusedrnn
