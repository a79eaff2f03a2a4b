#include "cuda/persistent/persistent.h"

namespace fusedrnn {

int persistent_forward(const PersistentForward& p, void* stream) {
  if (p.batch == 0 || p.hidden_size == 0) return 0;
  return p.cluster ? cluster_forward(p, stream) : grid_forward(p, stream);
}
int persistent_backward(const PersistentBackward& p, void* stream) {
  if (p.batch == 0 || p.hidden_size == 0) return 0;
  return p.cluster ? cluster_backward(p, stream) : grid_backward(p, stream);
}

}  // namespace fusedrnn
