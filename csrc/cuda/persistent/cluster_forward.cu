#include "cuda/persistent/forward.h"
#include "cuda/persistent/launch.h"

namespace fusedrnn {

int cluster_forward(const PersistentForward& p, void* stream) {
  return launch_persistent(
      p, stream, [](auto engine) { return persistent_forward_kernel<decltype(engine), true>; });
}

int clusters_at_once(int size, int shared_bytes) {
  // All kernels have blocks of one size, and one of them fills a processor's shared memory.
  return at_once(persistent_forward_kernel<Tf32, true>, size, dim3(kPersistentThreads),
                 size_t(shared_bytes));
}

}  // namespace fusedrnn
