#include "cuda/persistent/backward.h"
#include "cuda/persistent/launch.h"

namespace fusedrnn {

int cluster_backward(const PersistentBackward& p, void* stream) {
  return launch_persistent(
      p, stream, [](auto engine) { return persistent_backward_kernel<decltype(engine), true>; });
}

}  // namespace fusedrnn
