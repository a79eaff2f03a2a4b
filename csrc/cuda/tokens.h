// Where the sequences of a row of the batch begin and end. P is a structure of a launch with
// `lengths`, `steps`, `offsets` and `batch`, as Tokens of cuda/stack.h has them.
#pragma once
#include <cstdint>

#include "cuda/primitives.h"

namespace fusedrnn {

template <class P>
__device__ inline int64_t length_of(const P& p, int64_t b) {
  return p.lengths ? p.lengths[b] : p.steps;
}
// The token of row b at step t.
template <class P>
__device__ inline int64_t token_of(const P& p, int64_t t, int64_t b) {
  return (p.offsets ? p.offsets[t] : t * p.batch) + b;
}
// Whether step t of a direction starts from states of zeros, because `resets` has the first token
// of a sequence there. The reverse direction comes to the last step of a sequence from the first
// one of the next sequence.
template <class P>
__device__ inline bool begins_anew(const P& p, const uint8_t* resets, bool reverse, int64_t t,
                                   int64_t b, int64_t length) {
  if (!resets) return false;
  const int64_t first = reverse ? t + 1 : t;
  return first >= 0 && first < length && resets[token_of(p, first, b)];
}

}  // namespace fusedrnn
